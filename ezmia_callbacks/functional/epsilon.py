"""Lower bounds of epsilon from an attack on canaries whose membership was drawn at random.

Each bound comes with its ceiling, the value that a perfect attack of the same size would have shown: an
epsilon of 0 means "not detected", never "private". The statement is about the whole pipeline, training
and early stopping included.

Membership must be drawn by independent coins, or by one coin per pair: see `check_epsilon_is_allowed`. How
the attack guesses (its threshold, its number of guesses) must be fixed before its scores are seen. If it
is not, `bonferroni_epsilon` or `split_half_epsilon` pays for the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import scipy

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.intervals import clopper_pearson_lower, clopper_pearson_upper
from ezmia_callbacks.functional.roc import split_by_class

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__: list[str] = []

EpsilonMethod = Literal["clopper_pearson", "clopper_pearson_gdp", "one_run", "one_run_gdp"]
AttackChoice = Literal["fixed", "bonferroni", "split_half"]

_CandidateT = TypeVar("_CandidateT")

# Width at which a search for the largest refuted epsilon or mu ends; its lower end is reported.
_TOLERANCE = 1e-7

_COIN_METHODS = ("hold_out_coins", "inserted_coins", "inserted_pairs")
_HOW_TO_RANDOMIZE = (
    "let the library flip an independent coin for each canary, or for each pair of canaries, before training "
    "starts (`hold_out_canaries`, `insert_canaries`); AUC and TPR at FPR need no coin flips"
)
_WHY_REFUSED: dict[str | None, str] = {
    None: (
        "membership was not assigned at random, so the numbers may show distribution shift instead of leakage"
    ),
    "user_lists": "the lists say which records are members, but membership was not decided by coin flips",
    "trainer_datasets": "the two datasets were already there, so membership was not decided by coin flips",
    "hold_out": "in a split of fixed sizes, the membership of one canary depends on that of the others",
}


@dataclass(frozen=True)
class EpsilonBound:
    """A lower bound of epsilon, with the largest value that it could have had.

    Attributes:
        value: Lower bound of epsilon at `delta`, >= 0; 0 if the attack refutes no epsilon.
        ceiling: What the bound would be if every guess had been right.
        n: Number of guesses (one run), or of canaries (rates), that the bound rests on.
        confidence: Probability with which such a bound does not exceed the truth, in (0, 1).
        delta: The delta of (epsilon, delta), in [0, 1).
        method: How it was made. Bounds by `"..._gdp"` hold only for Gaussian-like mechanisms.
        choice: How the attack's threshold or number of guesses was chosen.
        mu: The lower bound of mu behind it, for methods that test a claim of mu-GDP.
    """

    value: float
    ceiling: float
    n: int
    confidence: float
    delta: float
    method: EpsilonMethod
    choice: AttackChoice = "fixed"
    mu: float | None = None

    def describe(self) -> str:
        """The bound and its ceiling as one plain sentence."""
        what = f"epsilon >= {self.value:.3f}" if self.value > 0 else "no epsilon above 0 detected"
        return (
            f"{what} (delta {self.delta:g}, {100 * self.confidence:g} % confidence; "
            f"a perfect attack, n = {self.n}: {self.ceiling:.3f})"
        )


@dataclass(frozen=True)
class Guesses:
    """How an attack did that guesses for some of the canaries and abstains on the others.

    Attributes:
        n_canaries: Number of coins that were flipped: canaries, or pairs of them; >= 1.
        n_guesses: Number of guesses, fixed in advance, in [1, n_canaries].
        n_correct: Number of right guesses, in [0, n_guesses].

    Raises:
        ConfigurationError: if the counts are not whole numbers in that order.
    """

    n_canaries: int
    n_guesses: int
    n_correct: int

    def __post_init__(self) -> None:
        counts = (self.n_correct, self.n_guesses, self.n_canaries)
        if not (_are_whole(*counts) and 0 <= self.n_correct <= self.n_guesses <= self.n_canaries):
            raise ConfigurationError(
                f"Got {self.n_correct} correct of {self.n_guesses} guesses on {self.n_canaries} canaries, "
                "but there cannot be more guesses than canaries, or more correct guesses than guesses: check "
                "the counts."
            )
        if self.n_guesses == 0:
            raise ConfigurationError("Got no guesses, but at least one is needed: raise `n_guesses`.")


@dataclass(frozen=True)
class AttackCounts:
    """How often an attack called members and non-members "member".

    Attributes:
        n_true_positives: Members called member, in [0, n_members].
        n_members: Number of members, >= 1.
        n_false_positives: Non-members called member, in [0, n_non_members].
        n_non_members: Number of non-members, >= 1.

    Raises:
        ConfigurationError: if the counts are not whole numbers in those ranges.
        TooFewCanariesError: if either class is empty.
    """

    n_true_positives: int
    n_members: int
    n_false_positives: int
    n_non_members: int

    def __post_init__(self) -> None:
        pairs = ((self.n_true_positives, self.n_members), (self.n_false_positives, self.n_non_members))
        if not all(_are_whole(k, n) and 0 <= k <= n for k, n in pairs):
            raise ConfigurationError(
                f"Got {self.n_true_positives} of {self.n_members} members and {self.n_false_positives} of "
                f"{self.n_non_members} non-members called member: check the counts."
            )
        if self.n_members == 0 or self.n_non_members == 0:
            raise TooFewCanariesError(
                f"Got {self.n_members} members and {self.n_non_members} non-members, but at least one of "
                "each is needed: add canaries of the missing class."
            )


def check_epsilon_is_allowed(method: str | None) -> None:
    """Refuse an epsilon where membership was not drawn by independent coins.

    Args:
        method: How the canaries' membership came about, as in their provenance. One independent fair coin
            per canary (`"hold_out_coins"`, `"inserted_coins"`: count with `one_run_guesses`) or per pair
            (`"inserted_pairs"`: count with `pair_guesses`) is allowed. Anything else is refused, such as
            `"hold_out"` (a split of fixed sizes), `"user_lists"`, `"trainer_datasets"` or None.

    Raises:
        ConfigurationError: saying why no epsilon follows, and how to get one.

    Source: the assumption of Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem 5.2.

    >>> check_epsilon_is_allowed("hold_out_coins")
    """
    if method in _COIN_METHODS:
        return
    reason = _WHY_REFUSED.get(method, f"{method!r} is not a draw by independent coin flips")
    raise ConfigurationError(f"These canaries give no epsilon: {reason}. To get one, {_HOW_TO_RANDOMIZE}.")


def counts_above(
    scores: Float[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"], *, threshold: float
) -> AttackCounts:
    """Counts of the attack "member if score > threshold"; a tie with the threshold is no member.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.
        threshold: Fixed without looking at these scores.

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or the threshold is NaN.
        TooFewCanariesError: if either class is empty.

    >>> counts_above(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]), threshold=2.0)
    AttackCounts(n_true_positives=1, n_members=2, n_false_positives=0, n_non_members=1)
    """
    if math.isnan(threshold):
        raise ConfigurationError("The threshold is NaN: pass a number.")
    members, non_members = split_by_class(scores, is_member)
    return AttackCounts(
        n_true_positives=int(np.count_nonzero(members > threshold)),
        n_members=len(members),
        n_false_positives=int(np.count_nonzero(non_members > threshold)),
        n_non_members=len(non_members),
    )


def epsilon_from_rates(counts: AttackCounts, *, delta: float, confidence: float = 0.95) -> EpsilonBound:
    """Lower bound of epsilon from exact bounds of the attack's two error rates.

    A guarantee about the training algorithm only if each count comes from its own training run. With all
    canaries in one run it is a statement about this model and the population that the canaries were drawn
    from, not a refutation of differential privacy: `epsilon_one_run` is. The threshold must be fixed in
    advance.

    Args:
        counts: What the attack called member.
        delta: The delta of (epsilon, delta), in [0, 1).
        confidence: Confidence of the bound, in (0, 1); half of the error for each rate.

    Raises:
        ConfigurationError: if a rate is outside its range.

    Source: Kairouz, Oh and Viswanath 2015; Nasr et al. 2021, arXiv:2101.04535: TPR <= e^eps FPR + delta
    and TNR <= e^eps FNR + delta, with Clopper-Pearson bounds.

    >>> epsilon_from_rates(AttackCounts(50, 100, 0, 100), delta=1e-5).describe()
    'epsilon >= 2.398 (delta 1e-05, 95 % confidence; a perfect attack, n = 200: 3.281)'
    """
    _check_rates(delta, confidence)

    def bound(counted: AttackCounts) -> float:
        tpr_lower, fpr_upper = _bounds_of_rates(counted, confidence)
        # With one-sided bounds, TNR >= 1 - fpr_upper and FNR <= 1 - tpr_lower hold at the same time.
        return max(
            0.0,
            _log_ratio(tpr_lower - delta, fpr_upper),
            _log_ratio(1.0 - fpr_upper - delta, 1.0 - tpr_lower),
        )

    return EpsilonBound(
        value=bound(counts),
        ceiling=bound(_perfect(counts)),
        n=counts.n_members + counts.n_non_members,
        confidence=confidence,
        delta=delta,
        method="clopper_pearson",
    )


def epsilon_from_rates_gdp(counts: AttackCounts, *, delta: float, confidence: float = 0.95) -> EpsilonBound:
    """Lower bound of epsilon from the attack's error rates, for mechanisms that are mu-GDP.

    Tighter than `epsilon_from_rates`, but only for Gaussian-like mechanisms such as DP-SGD: it bounds
    the smallest mu that both error rates allow, and converts it. What `epsilon_from_rates` says about
    independent runs and about the threshold holds here, too. An attack that is worse than chance shows 0:
    turning it around would need bounds from the other side.

    Args:
        counts: What the attack called member.
        delta: The delta of (epsilon, delta), in (0, 1): mu-GDP gives no finite epsilon at 0.
        confidence: Confidence of the bound, in (0, 1); half of the error for each rate.

    Raises:
        ConfigurationError: if a rate is outside its range.

    Source: Nasr et al. 2023, arXiv:2302.07956; Koskela and Mohammadi 2024, arXiv:2406.04827:
    mu = Phi^-1(1 - FPR) - Phi^-1(FNR), with Clopper-Pearson upper bounds.

    >>> round(epsilon_from_rates_gdp(AttackCounts(50, 100, 0, 100), delta=1e-5).mu, 3)
    1.539
    """
    _check_rates(delta, confidence, is_gdp=True)

    def bound(counted: AttackCounts) -> float:
        tpr_lower, fpr_upper = _bounds_of_rates(counted, confidence)
        if tpr_lower <= fpr_upper:
            return 0.0
        return float(scipy.special.ndtri(tpr_lower) - scipy.special.ndtri(fpr_upper))

    mu = bound(counts)
    return EpsilonBound(
        value=epsilon_of_gdp(mu, delta=delta),
        ceiling=epsilon_of_gdp(bound(_perfect(counts)), delta=delta),
        n=counts.n_members + counts.n_non_members,
        confidence=confidence,
        delta=delta,
        method="clopper_pearson_gdp",
        mu=mu,
    )


def one_run_guesses(
    scores: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    n_guess_members: int,
    n_guess_non_members: int,
) -> Guesses:
    """Guesses "member" for the highest scores and "non-member" for the lowest, and how many are right.

    Ties never help: of records that tie at the edge of a group, which one is guessed must not depend on
    the truth, so none is, and each lost guess counts as wrong. Random guesses there would be right at
    least as often, and a bound grows with the right guesses, so it stays valid.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the canary's own coin put it into the training set.
        n_guess_members: Number of highest scores that are guessed to be members, fixed in advance.
        n_guess_non_members: Number of lowest scores that are guessed to be non-members, likewise.

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, there are more guesses than
            canaries, or one class is guessed for all of them.
        TooFewCanariesError: if either class is empty.

    Source: the attacker of Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, algorithm 1.

    >>> scores = np.array([4.0, 3.0, 2.0, 1.0])
    >>> is_member = np.array([True, False, True, False])
    >>> one_run_guesses(scores, is_member, n_guess_members=1, n_guess_non_members=1)
    Guesses(n_canaries=4, n_guesses=2, n_correct=2)
    """
    members, non_members = split_by_class(scores, is_member)
    ordered = np.sort(np.concatenate([members, non_members]))
    n, n_in, n_out = len(ordered), n_guess_members, n_guess_non_members
    if not _are_whole(n_in, n_out) or min(n_in, n_out) < 0 or n_in + n_out > n or n_in + n_out == 0:
        raise ConfigurationError(
            f"Got {n_in} guesses of members and {n_out} of non-members for {n} canaries, but there must "
            "be at least one guess, and no more guesses than canaries: check the counts."
        )
    if n in (n_in, n_out):
        raise ConfigurationError(
            f"All {n} canaries are guessed to be in the same class, which takes no score: guess fewer."
        )
    # Strictly beyond the nearest record outside the group: a tie across its edge guesses nobody.
    n_correct = 0
    if n_in:
        n_correct += int(np.count_nonzero(members > ordered[n - n_in - 1]))
    if n_out:
        n_correct += int(np.count_nonzero(non_members < ordered[n_out]))
    return Guesses(n_canaries=n, n_guesses=n_in + n_out, n_correct=n_correct)


def pair_guesses(
    member_scores: Float[np.ndarray, " n_pairs"],
    non_member_scores: Float[np.ndarray, " n_pairs"],
    *,
    n_guesses: int,
) -> Guesses:
    """Guesses that the twin with the higher score was trained, for the pairs with the widest gaps.

    A coin picked which twin of each pair was trained; `n_canaries` of the result is the number of pairs, and
    adjacency is "one record replaced". Which pairs are guessed depends on the size of the gap alone,
    never on its sign, which only the truth gives. A pair without a gap, and pairs that tie at the edge of
    the abstention, count as wrong guesses: to leave them out of `n_guesses` would make that number depend
    on the scores, and it has to be fixed in advance.

    Args:
        member_scores: Finite score of the twin of each pair that was trained.
        non_member_scores: Finite score of the other twin, in the same order.
        n_guesses: Number of pairs that are guessed, fixed in advance, in [1, n_pairs].

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or `n_guesses` is outside
            its range.

    Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, with one coin per pair; abstention as there.

    >>> pair_guesses(np.array([5.0, 1.0, 2.0]), np.array([1.0, 1.5, 2.0]), n_guesses=2)
    Guesses(n_canaries=3, n_guesses=2, n_correct=1)
    """
    trained = np.asarray(member_scores, dtype=np.float64)
    other = np.asarray(non_member_scores, dtype=np.float64)
    if trained.ndim != 1 or trained.shape != other.shape:
        raise ConfigurationError(
            f"`member_scores` has shape {trained.shape} and `non_member_scores` {other.shape}, but both need "
            "shape (n_pairs,): pass one score per twin, in the same order."
        )
    if not (np.isfinite(trained).all() and np.isfinite(other).all()):
        raise ConfigurationError(
            "Scores are NaN or infinite, but a gap needs finite scores: use the bounded score, or find "
            "the record whose model outputs overflow."
        )
    n_pairs = len(trained)
    if not _are_whole(n_guesses) or not 1 <= n_guesses <= n_pairs:
        raise ConfigurationError(f"`n_guesses` is {n_guesses}, but it needs to lie in [1, {n_pairs}].")
    # Two huge scores may be infinitely far apart: as good a gap as any.
    with np.errstate(over="ignore"):
        gap = trained - other
    sizes = np.sort(np.abs(gap))
    edge = sizes[n_pairs - n_guesses - 1] if n_guesses < n_pairs else -1.0
    return Guesses(
        n_canaries=n_pairs,
        n_guesses=n_guesses,
        n_correct=int(np.count_nonzero((gap > 0) & (np.abs(gap) > edge))),
    )


def one_run_p_value(epsilon: float, guesses: Guesses, *, delta: float) -> float:
    """Largest probability of so many right guesses, or more, if training were (epsilon, delta)-DP.

    Args:
        epsilon: Claimed epsilon, >= 0.
        guesses: What the attack achieved.
        delta: Claimed delta, in [0, 1).

    Raises:
        ConfigurationError: if a claimed figure is outside its range.

    Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, corollary 5.4: with q = e^eps / (1 + e^eps),
    beta = P(Bin(r, q) >= v) and alpha = max_i P(v > Bin(r, q) >= v - i) / i over 1 <= i <= v, it is
    beta + 2 m delta alpha, where m counts all canaries, not only the r guessed ones.

    >>> round(one_run_p_value(np.log(3), Guesses(100, 100, 75), delta=0.0), 5)
    0.55347
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ConfigurationError(f"`epsilon` is {epsilon}, but it needs to be a finite number >= 0.")
    _check_delta(delta)
    n, n_correct, q = guesses.n_guesses, guesses.n_correct, float(scipy.special.expit(epsilon))
    # P(Bin(r, q) >= k) for k = v, v - 1, ..., 0, as an incomplete beta function.
    at_least = scipy.special.bdtrc(np.arange(n_correct - 1, -2, -1), n, q)
    beta = float(at_least[0])
    if delta == 0.0 or n_correct == 0:
        return beta
    alpha = float(np.max((at_least[1:] - beta) / np.arange(1, n_correct + 1)))
    return min(1.0, beta + 2.0 * guesses.n_canaries * delta * alpha)


def epsilon_one_run(guesses: Guesses, *, delta: float, confidence: float = 0.95) -> EpsilonBound:
    """Lower bound of epsilon from a single training run with many canaries.

    Needs membership by independent coins (`check_epsilon_is_allowed`), and a number of guesses that was
    fixed before the scores were seen. Known to be loose for some mechanisms.

    Args:
        guesses: What the attack achieved.
        delta: The delta of (epsilon, delta), in [0, 1).
        confidence: Confidence of the bound, in (0, 1).

    Raises:
        ConfigurationError: if a rate is outside its range.

    Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, corollary 5.4: the largest epsilon with
    `one_run_p_value` < 1 - confidence. At delta 0 that is the logit of the Clopper-Pearson lower bound.

    >>> epsilon_one_run(Guesses(n_canaries=100, n_guesses=100, n_correct=75), delta=0.0).describe()
    'epsilon >= 0.702 (delta 0, 95 % confidence; a perfect attack, n = 100: 3.493)'
    """
    _check_rates(delta, confidence)
    failure = 1.0 - confidence

    def bound(guessed: Guesses) -> float:
        share = clopper_pearson_lower(guessed.n_correct, guessed.n_guesses, failure_probability=failure)
        if share <= 0.5:
            return 0.0
        at_delta_zero = float(scipy.special.logit(share))
        if delta == 0.0:
            return at_delta_zero
        return _largest_refuted(
            lambda epsilon: one_run_p_value(epsilon, guessed, delta=delta) < failure, too_large=at_delta_zero
        )

    return EpsilonBound(
        value=bound(guesses),
        ceiling=bound(replace(guesses, n_correct=guesses.n_guesses)),
        n=guesses.n_guesses,
        confidence=confidence,
        delta=delta,
        method="one_run",
    )


def epsilon_one_run_gdp(guesses: Guesses, *, delta: float, confidence: float = 0.95) -> EpsilonBound:
    """Lower bound of mu and epsilon from a single training run, for mechanisms that are mu-GDP.

    About twice as tight as `epsilon_one_run`, but it tests a claim of mu-GDP: meaningful for Gaussian-like
    mechanisms such as DP-SGD. For training without noise quote `epsilon_one_run`. What that one needs is
    needed here, too.

    Args:
        guesses: What the attack achieved.
        delta: The delta of (epsilon, delta), in (0, 1): mu-GDP gives no finite epsilon at 0.
        confidence: Confidence of the bound, in (0, 1).

    Raises:
        ConfigurationError: if a rate is outside its range.

    Source: Mahloujifar, Melis and Chaudhuri 2024, arXiv:2410.22235, algorithm 3, with the trade-off curve
    of the Gaussian mechanism.

    >>> round(epsilon_one_run_gdp(Guesses(100, 100, 75), delta=1e-5).mu, 4)
    0.4043
    """
    _check_rates(delta, confidence, is_gdp=True)

    def bound(guessed: Guesses) -> float:
        def is_refuted(mu: float) -> bool:
            return _refutes_gdp(mu, guessed, failure_probability=1.0 - confidence)

        too_large = 1.0
        while is_refuted(too_large):
            too_large *= 2.0
        return _largest_refuted(is_refuted, too_large=too_large)

    mu = bound(guesses)
    return EpsilonBound(
        value=epsilon_of_gdp(mu, delta=delta),
        ceiling=epsilon_of_gdp(bound(replace(guesses, n_correct=guesses.n_guesses)), delta=delta),
        n=guesses.n_guesses,
        confidence=confidence,
        delta=delta,
        method="one_run_gdp",
        mu=mu,
    )


def epsilon_of_gdp(mu: float, *, delta: float) -> float:
    """Smallest epsilon with which a mu-GDP mechanism is (epsilon, delta)-DP, >= 0.

    Args:
        mu: Parameter of Gaussian differential privacy, >= 0.
        delta: The delta of (epsilon, delta), in (0, 1).

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: Dong, Roth and Su 2022, arXiv:1905.02383, corollary 2.13:
    delta(eps) = Phi(-eps / mu + mu / 2) - e^eps Phi(-eps / mu - mu / 2).

    >>> round(epsilon_of_gdp(0.4043, delta=1e-5), 2)
    1.57
    """
    _check_delta(delta, is_gdp=True)
    if not (math.isfinite(mu) and mu >= 0):
        raise ConfigurationError(f"`mu` is {mu}, but it needs to be a finite number >= 0.")

    def is_too_small(epsilon: float) -> bool:
        first = float(scipy.special.log_ndtr(-epsilon / mu + mu / 2))
        second = epsilon + float(scipy.special.log_ndtr(-epsilon / mu - mu / 2))
        return math.exp(first) * -math.expm1(min(0.0, second - first)) > delta

    if mu == 0.0 or not is_too_small(0.0):
        return 0.0
    too_large = 1.0
    while is_too_small(too_large):
        too_large *= 2.0
    return _largest_refuted(is_too_small, too_large=too_large)


def bonferroni_epsilon(
    candidates: Sequence[_CandidateT],
    bound: Callable[[_CandidateT, float], EpsilonBound],
    *,
    confidence: float = 0.95,
) -> EpsilonBound:
    """The best of several bounds whose attacks were all written down before the scores were seen.

    Each is computed at the confidence 1 - (1 - confidence) / n_candidates, so that together they hold at
    `confidence` (union bound). Thresholds read off the scores themselves are no such candidates. With very
    many candidates `split_half_epsilon` may cost less.

    Args:
        candidates: Attacks fixed in advance: thresholds, or numbers of guesses.
        bound: The bound of one candidate at a given confidence.
        confidence: Confidence of the result, in (0, 1).

    Raises:
        ConfigurationError: if there is no candidate, or `confidence` is outside (0, 1).

    Source: Bonferroni.

    >>> guesses = [Guesses(200, 20, 20), Guesses(200, 200, 130)]
    >>> best = bonferroni_epsilon(guesses, lambda g, c: epsilon_one_run(g, delta=0.0, confidence=c))
    >>> round(best.value, 3), best.n, best.choice
    (1.597, 20, 'bonferroni')
    """
    _check_candidates(candidates, confidence)
    each = 1.0 - (1.0 - confidence) / len(candidates)
    bounds = [bound(candidate, each) for candidate in candidates]
    best = max(bounds, key=lambda candidate: candidate.value)
    ceiling = max(candidate.ceiling for candidate in bounds)
    return replace(best, ceiling=ceiling, confidence=confidence, choice="bonferroni")


def split_half_epsilon(
    candidates: Sequence[_CandidateT],
    bound: Callable[[_CandidateT, Int[np.ndarray, " n_rows"], float], EpsilonBound],
    *,
    n_rows: int,
    confidence: float = 0.95,
    seed: int = 0,
) -> EpsilonBound:
    """The bound of the attack that does best on a random half of the canaries, from the other half.

    The choice costs half of the canaries, however many candidates there are. Still, the candidates
    themselves must not be read off these scores: pass numbers of guesses, or a grid of thresholds.

    Args:
        candidates: Attacks to choose from, in order of preference where they do equally well.
        bound: The bound of one candidate, from the canaries in these rows alone, at a confidence.
        n_rows: Number of canaries, or of pairs; >= 4.
        confidence: Confidence of the result, in (0, 1).
        seed: Seed of the random halves.

    Raises:
        ConfigurationError: if there is no candidate, or `confidence` is outside (0, 1).
        TooFewCanariesError: if there are fewer than 4 rows.

    Source: sample splitting; Cox 1975, Biometrika 62:441.

    >>> is_member = np.arange(200) % 2 == 0
    >>> def bound(threshold, rows, confidence):
    ...     counts = counts_above(is_member[rows] * 1.0, is_member[rows], threshold=threshold)
    ...     return epsilon_from_rates(counts, delta=0.0, confidence=confidence)
    >>> best = split_half_epsilon([-1.0, 0.5], bound, n_rows=200)
    >>> best.n, best.choice, best.value == best.ceiling
    (100, 'split_half', True)
    """
    _check_candidates(candidates, confidence)
    if not _are_whole(n_rows) or n_rows < 4:
        raise TooFewCanariesError(f"Got {n_rows} canaries, but two halves need at least 4: add canaries.")
    order = np.random.default_rng(seed).permutation(n_rows)
    to_choose, to_bound = np.sort(order[: n_rows // 2]), np.sort(order[n_rows // 2 :])
    best = max(candidates, key=lambda candidate: bound(candidate, to_choose, confidence).value)
    return replace(bound(best, to_bound, confidence), choice="split_half")


def _refutes_gdp(mu: float, guesses: Guesses, *, failure_probability: float) -> bool:
    """Whether mu-GDP makes so many right guesses less likely than the failure probability."""
    n, n_correct, m = guesses.n_guesses, guesses.n_correct, guesses.n_canaries
    right = failure_probability * n_correct / m
    wrong = failure_probability * (n - n_correct) / m
    for i in range(n_correct - 1, -1, -1):
        wrong_before = wrong
        wrong = max(wrong, float(scipy.special.ndtr(scipy.special.ndtri(right) - mu)))
        if wrong == wrong_before:
            # Neither can change any more.
            break
        right = min(1.0, right + i / (n - i) * (wrong - wrong_before))
    return right + wrong > n / m


def _largest_refuted(is_refuted: Callable[[float], bool], *, too_large: float) -> float:
    """Largest refuted number in [0, too_large], rounded down; 0 if 0 is not refuted."""
    if not is_refuted(0.0):
        return 0.0
    refuted, other = 0.0, too_large
    while other - refuted > _TOLERANCE:
        middle = (refuted + other) / 2.0
        if is_refuted(middle):
            refuted = middle
        else:
            other = middle
    return refuted


def _bounds_of_rates(counts: AttackCounts, confidence: float) -> tuple[float, float]:
    """Lower bound of TPR and upper bound of FPR, which hold together at `confidence`."""
    side = (1.0 - confidence) / 2.0
    return (
        clopper_pearson_lower(counts.n_true_positives, counts.n_members, failure_probability=side),
        clopper_pearson_upper(counts.n_false_positives, counts.n_non_members, failure_probability=side),
    )


def _perfect(counts: AttackCounts) -> AttackCounts:
    return replace(counts, n_true_positives=counts.n_members, n_false_positives=0)


def _log_ratio(numerator: float, denominator: float) -> float:
    return math.log(numerator / denominator) if numerator > 0.0 else -math.inf


def _are_whole(*counts: object) -> bool:
    return all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in counts)


def _check_candidates(candidates: Sequence[object], confidence: float) -> None:
    if len(candidates) == 0:
        raise ConfigurationError("Got no candidates, but at least one attack is needed: pass one.")
    _check_confidence(confidence)


def _check_rates(delta: float, confidence: float, *, is_gdp: bool = False) -> None:
    _check_delta(delta, is_gdp=is_gdp)
    _check_confidence(confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigurationError(
            f"`confidence` is {confidence}, but it needs to lie in (0, 1): use 0.95 for 95 %."
        )


def _check_delta(delta: float, *, is_gdp: bool = False) -> None:
    if is_gdp and not 0 < delta < 1:
        raise ConfigurationError(
            f"`delta` is {delta}, but mu-GDP gives a finite epsilon only for one in (0, 1): use 1e-5."
        )
    if not 0 <= delta < 1:
        raise ConfigurationError(f"`delta` is {delta}, but it needs to lie in [0, 1): use 1e-5.")
