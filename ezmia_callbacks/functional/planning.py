"""How many canaries a leakage budget needs, before any model is trained.

Two numbers answer two questions. To be *resolved*, a budget needs so many canaries that some outcome could
cross it at all; fewer are refused by `check_resolvable`. To be *decided*, it needs so many that a run whose
true leakage is well beyond the limit (with rule "upper": well within) is recognized with high probability.

Counts depend on what is promised. 299 non-members certify a false-positive rate of 1 % once, one-sided, at
5 % (`n_non_members_needed(fpr=0.01, failure_probability=0.05)`). A decision reads more: a two-sided band,
each side shared between threshold and members, each audit with its share of the error. That leaves a quarter
of the share for the threshold, so that a run with one audit at 95 % needs 437, and one with ten audits 666.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.budget import (
    LeakageBudget,
    alpha_for_audit,
    check_resolvable,
    end_shares,
)
from ezmia_callbacks.functional.intervals import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    hanley_mcneil_pairs,
    student_shrinkage,
)
from ezmia_callbacks.functional.search import smallest_between, smallest_enough

__all__: list[str] = []

MINIMUM_PER_CLASS = 10
"""Canary sets with fewer members, or fewer non-members, are refused."""
_MAXIMUM_PER_CLASS = 10_000_000
# Values of a metric that `minimum_detectable_value` tries, between the limit and either end.
_N_VALUES = 100
# Equally likely values of a threshold's true false-positive rate.
_N_QUANTILES = 64


@dataclass(frozen=True)
class CanaryPlan:
    """Numbers of canaries with which a budget can be resolved, and decided.

    Attributes:
        budget: The budget that was planned for.
        n_audits: Number of audits that share its error rate.
        n_members_to_resolve: Fewest members with which the budget is not refused or useless.
        n_non_members_to_resolve: Fewest non-members likewise.
        expected: True value of the metric that is to be recognized; None if only the fewest were asked for.
        power: Probability with which one audit recognizes it, in (0, 1).
        n_members: Members needed for that; `n_members_to_resolve` without an expected value.
        n_non_members: Non-members needed for that, likewise.
        n_members_at_worst: Members needed for it however the scores are distributed, as when members' spread
            far more; for AUC with an expected value, else None. The counts above take both classes to spread
            alike.
        n_non_members_at_worst: Non-members likewise.
        n_scores: Number of scores that are judged together.
    """

    budget: LeakageBudget
    n_audits: int
    n_members_to_resolve: int
    n_non_members_to_resolve: int
    expected: float | None
    power: float
    n_members: int
    n_non_members: int
    n_members_at_worst: int | None = None
    n_non_members_at_worst: int | None = None
    n_scores: int = 1

    def describe(self) -> str:
        """The plan in one or two plain sentences."""
        label, percent = self.budget.label, f"{100 * self.budget.confidence:g} %"
        audits = f"{self.n_audits} audits" if self.n_audits > 1 else "1 audit"
        if self.n_scores > 1:
            audits += f" and {self.n_scores} scores"
        text = (
            f"A budget of {label} {self.budget.limit:g} needs at least {self.n_members_to_resolve} members "
            f"and {self.n_non_members_to_resolve} non-members to be resolved over {audits} at {percent} "
            "confidence."
        )
        if self.expected is None:
            return text
        outcome = "over" if self.expected > self.budget.limit else "within"
        text = (
            f"{text} To detect a run {outcome} budget with {100 * self.power:g} % probability per audit when "
            f"its true {label} is {self.expected:g}, it needs {self.n_members} members and "
            f"{self.n_non_members} non-members"
        )
        if self.n_members_at_worst is None:
            return f"{text}{_assumption_about_scores(self.budget)}."
        return (
            f"{text} if the scores of both spread alike, and at most {self.n_members_at_worst} and "
            f"{self.n_non_members_at_worst} however they spread."
        )


def canaries_needed(
    budget: LeakageBudget,
    *,
    n_audits: int,
    expected: float | None = None,
    power: float = 0.8,
    non_members_per_member: float = 1.0,
    n_scores: int = 1,
) -> CanaryPlan:
    """Numbers of members and non-members with which a budget can be resolved, and decided.

    The search follows `decide`: the same two-sided band, at the least favored audit of a run. Power is
    that of one audit; over several, the chance to stop at any of them is larger. Patience is not
    counted. Power does not grow evenly with the counts of TPR at FPR: a few records more than planned may
    lower it by a hair.

    Args:
        budget: The budget.
        n_audits: Number of audits in the run, the one before training not counted, >= 1.
        expected: True value of the metric that one audit is to recognize: beyond the limit for rule
            `"lower"` (the run is to be stopped), within it for `"upper"` (the run is to go on), either for
            `"point"`. None: only what it takes to be resolved.
        power: Probability with which it is to be recognized, in (0, 1).
        non_members_per_member: Ratio of the classes, > 0. TPR at FPR takes as many non-members as its
            certificate needs, whatever the ratio says.
        n_scores: Number of scores that are judged together, >= 1: 4 for `score="strongest"`, 5 of it with
            preference pairs.

    Raises:
        ConfigurationError: if an argument is outside its range, or `expected` lies on the other side.
        TooFewCanariesError: if ten million records of a class would not do.

    Source: `decision_power` for the formulas.

    >>> plan = canaries_needed(LeakageBudget(metric="auc", limit=0.6), n_audits=10, expected=0.7)
    >>> plan.n_members, plan.n_non_members
    (211, 211)
    >>> plan.n_members_at_worst
    321
    >>> canaries_needed(LeakageBudget(limit=0.6), n_audits=10, expected=0.7, n_scores=4).n_members
    261
    """
    _check_arguments(budget, n_audits, expected, power, non_members_per_member)
    share = alpha_for_audit(n_audits, n_planned=n_audits, failure_probability=1.0 - budget.confidence)
    fewest_members, fewest_non_members = _fewest(budget, share, non_members_per_member, n_scores)

    def n_non_members(n_members: int) -> int:
        return max(fewest_non_members, math.ceil(non_members_per_member * n_members))

    def needed(value: float, *, is_worst_case: bool) -> int:
        def is_decided(n_members: int) -> bool:
            reached = decision_power(
                budget,
                expected=value,
                n_members=n_members,
                n_non_members=n_non_members(n_members),
                failure_probability=share,
                n_scores=n_scores,
                is_worst_case=is_worst_case,
            )
            return reached >= power

        return _smallest(is_decided, fewest_members)

    n_members = fewest_members if expected is None else needed(expected, is_worst_case=False)
    at_worst = None
    if expected is not None and budget.metric == "auc":
        at_worst = max(n_members, needed(expected, is_worst_case=True))
    return CanaryPlan(
        budget=budget,
        n_audits=n_audits,
        n_members_to_resolve=fewest_members,
        n_non_members_to_resolve=fewest_non_members,
        expected=expected,
        power=power,
        n_members=n_members,
        n_non_members=fewest_non_members if expected is None else n_non_members(n_members),
        n_members_at_worst=at_worst,
        n_non_members_at_worst=None if at_worst is None else n_non_members(at_worst),
        n_scores=n_scores,
    )


def decision_power(
    budget: LeakageBudget,
    *,
    expected: float,
    n_members: int,
    n_non_members: int,
    failure_probability: float,
    n_scores: int = 1,
    is_worst_case: bool = False,
) -> float:
    """Probability that one audit finds a run on the right side of its budget.

    Args:
        budget: The budget.
        expected: True value of its metric. Above the limit, "over budget" is right; else "within budget",
            which the score turned around must be, too.
        n_members: Number of members, >= 1.
        n_non_members: Number of non-members, >= 1.
        failure_probability: Error rate that this audit may spend, both sides together, in (0, 1).
        n_scores: Number of scores that are judged together, >= 1. Over budget takes one of them at
            `expected`, and within budget all of them: a bound that supposes nothing of how alike they are.
        is_worst_case: Whether the AUC's variance is the largest that any scores can have, instead of that of
            scores that spread alike in both classes. Advantage is always planned for the worst case, TPR at
            FPR always for scores that spread alike.

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: AUC: normal on the logit scale (Pepe 2003, section 5.2) with the variance of Hanley and McNeil
    1982, or in the worst case the largest one, A (1 - A) / min(n1, n0) (Birnbaum and Klose 1957); the least
    AUC that is decided has its end at the limit, see `intervals.delong_interval`. Advantage: normal with the
    largest variance that it allows, and, to stay within, the one-sided two-sample Kolmogorov-Smirnov tail
    exp(-2 x^2 n1 n0 / (n1 + n0)). TPR at FPR: exact, given a ROC that is a shifted normal through (fpr,
    expected); the true rate of the threshold is Beta(k, n0 - k + 1).

    >>> budget = LeakageBudget(metric="auc", limit=0.6)
    >>> counts = {"n_members": 211, "n_non_members": 211, "failure_probability": 0.005}
    >>> round(decision_power(budget, expected=0.7, **counts), 2)
    0.8
    >>> round(decision_power(budget, expected=0.7, **counts, is_worst_case=True), 2)
    0.54
    """
    _check_expected(budget, expected)
    if min(n_members, n_non_members) < 1 or not 0.0 < failure_probability < 1.0:
        raise ConfigurationError(
            f"Got {n_members} members, {n_non_members} non-members and a failure probability of "
            f"{failure_probability}: at least one of each and a probability in (0, 1) are needed."
        )
    shares = end_shares(budget, failure_probability=failure_probability, n_scores=n_scores)
    side = shares.upper if budget.rule == "upper" else shares.lower

    def power_at(value: float) -> float:
        if budget.metric == "auc":
            return _power_of_auc(budget, value, n_members, n_non_members, side, is_worst_case)
        power_of = _power_of_advantage if budget.metric == "advantage" else _power_of_tpr
        return power_of(budget, value, n_members, n_non_members, side)

    power = power_at(expected)
    if expected > budget.limit:
        return power
    # Within only if every score is, and turned around as well.
    failure = (1.0 - power) + (1.0 - power_at(_expected_reversed(budget, expected)))
    return max(0.0, 1.0 - n_scores * failure)


def minimum_detectable_value(
    budget: LeakageBudget,
    *,
    n_members: int,
    n_non_members: int,
    failure_probability: float,
    n_scores: int = 1,
    power: float = 0.8,
    is_worst_case: bool = False,
) -> float | None:
    """The least excess that one audit finds with some probability.

    Args:
        budget: The budget.
        n_members: Number of members, >= 1.
        n_non_members: Number of non-members, >= 1.
        failure_probability: Error rate that this audit may spend, both sides together, in (0, 1).
        n_scores: Number of scores that are judged together, >= 1.
        power: Probability with which it is to be found, in (0, 1).
        is_worst_case: See `decision_power`.

    Returns:
        The smallest true value of the metric above the limit that is found over budget with that probability,
        to a hundredth of the way from the limit to 1; None if no value is.

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: `decision_power`.

    >>> budget = LeakageBudget(metric="auc", limit=0.6)
    >>> counts = {"n_members": 211, "n_non_members": 211}
    >>> round(minimum_detectable_value(budget, **counts, failure_probability=0.005), 3)
    0.7
    """
    for i in range(1, _N_VALUES):
        value = budget.limit + (1.0 - budget.limit) * i / _N_VALUES
        reached = decision_power(
            budget,
            expected=value,
            n_members=n_members,
            n_non_members=n_non_members,
            failure_probability=failure_probability,
            n_scores=n_scores,
            is_worst_case=is_worst_case,
        )
        if reached >= power:
            return value
    return None


def has_enough_power(
    budget: LeakageBudget,
    *,
    n_members: int,
    n_non_members: int,
    failure_probability: float,
    n_scores: int = 1,
    power: float = 0.8,
) -> bool:
    """Whether an audit has a fair chance to give the answers that its budget is set for.

    A run that leaks far too much, halfway from the limit to 1, must be found over budget; under the rules
    that may stop a harmless run, `"point"` and `"upper"`, one that leaks nothing must be found within.

    Args:
        budget: The budget.
        n_members: Number of members, >= 1.
        n_non_members: Number of non-members, >= 1.
        failure_probability: Error rate that this audit may spend, both sides together, in (0, 1).
        n_scores: Number of scores that are judged together, >= 1.
        power: Probability of either answer, in (0, 1).

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: `decision_power`; that halfway is far is a convention of this library.

    >>> budget = LeakageBudget(metric="auc", limit=0.6)
    >>> [has_enough_power(budget, n_members=n, n_non_members=n, failure_probability=0.005) for n in (15, 60)]
    [False, True]
    """
    far_over = (budget.limit + 1.0) / 2.0
    answers = (far_over,) if budget.rule == "lower" else (far_over, budget.chance)
    return all(
        decision_power(
            budget,
            expected=expected,
            n_members=n_members,
            n_non_members=n_non_members,
            failure_probability=failure_probability,
            n_scores=n_scores,
        )
        >= power
        for expected in answers
    )


def describe_power(
    budget: LeakageBudget,
    *,
    n_members: int,
    n_non_members: int,
    failure_probability: float,
    n_scores: int = 1,
) -> str:
    """What one audit with so many canaries can find out about a budget, in one sentence.

    Args:
        budget: The budget.
        n_members: Number of members, >= 1.
        n_non_members: Number of non-members, >= 1.
        failure_probability: Error rate that this audit may spend, both sides together, in (0, 1).
        n_scores: Number of scores that are judged together, >= 1.

    Raises:
        ConfigurationError: if an argument is outside its range.

    >>> print(describe_power(
    ...     LeakageBudget(limit=0.6), n_members=211, n_non_members=211, failure_probability=0.005
    ... ))  # doctest: +NORMALIZE_WHITESPACE
    An audit detects a run over budget with 80 % probability once its true AUC reaches 0.700 if the scores of
    members and non-members spread alike, and at 0.724 however they spread.
    """

    def found(*, is_worst_case: bool) -> float | None:
        return minimum_detectable_value(
            budget,
            n_members=n_members,
            n_non_members=n_non_members,
            failure_probability=failure_probability,
            n_scores=n_scores,
            is_worst_case=is_worst_case,
        )

    def passes(*, is_worst_case: bool) -> str:
        chance = decision_power(
            budget,
            expected=budget.chance,
            n_members=n_members,
            n_non_members=n_non_members,
            failure_probability=failure_probability,
            n_scores=n_scores,
            is_worst_case=is_worst_case,
        )
        return f"{'at least ' if n_scores > 1 else ''}{100 * chance:.0f} %"

    value = found(is_worst_case=False)
    if value is None:
        return (
            "No matter how far a run is over budget, an audit detects it with less than 80 % probability: "
            f"{n_members} members and {n_non_members} non-members are too few for {budget.label} "
            f"{budget.limit:g}."
        )
    text = (
        f"An audit detects a run over budget with 80 % probability once its true {budget.label} reaches "
        f"{value:.3f}"
    )
    if budget.rule != "lower":
        text += (
            f", and finds a run that leaks nothing within budget with {passes(is_worst_case=False)} "
            "probability,"
        )
    if budget.metric != "auc":
        return f"{text.removesuffix(',')}{_assumption_about_scores(budget)}."
    text += " if the scores of members and non-members spread alike"
    at_worst = found(is_worst_case=True)
    if at_worst is None:
        return f"{text}."
    if budget.rule == "lower":
        return f"{text}, and at {at_worst:.3f} however they spread."
    return f"{text}; however they spread, at {at_worst:.3f} and with {passes(is_worst_case=True)}."


def _assumption_about_scores(budget: LeakageBudget) -> str:
    """What a plan for another metric than AUC takes for granted, to end a sentence with."""
    if budget.metric == "advantage":
        return ""
    return " if the scores of members and non-members are normal and spread alike"


def _power_of_auc(
    budget: LeakageBudget, expected: float, n1: int, n0: int, side: float, is_worst_case: bool
) -> float:
    # Without two records in each class there is no interval.
    if min(n1, n0) < 2:
        return 0.0
    n_pairs = float(min(n1, n0)) if is_worst_case else hanley_mcneil_pairs(expected, n1, n0)
    threshold = _least_auc_over(budget, n1, n0, side, n_pairs, is_worst_case)
    distance = float(scipy.special.logit(expected) - scipy.special.logit(threshold))
    is_found_over = float(scipy.special.ndtr(distance * math.sqrt(n_pairs * expected * (1.0 - expected))))
    return is_found_over if expected > budget.limit else 1.0 - is_found_over


def _least_auc_over(
    budget: LeakageBudget, n1: int, n0: int, side: float, n_pairs: float, is_worst_case: bool
) -> float:
    """Measured AUC above which a run is found over budget, where a variance is worth so many pairs."""
    if budget.rule == "point":
        return budget.limit
    # In the worst case the smaller class has all of the variance; else each has what its number gives it.
    member_part, non_member_part = (
        (float(n1 <= n0), float(n1 > n0)) if is_worst_case else (1.0 / n1, 1.0 / n0)
    )
    n_pairs = min(n_pairs, hanley_mcneil_pairs(budget.limit, n1, n0))
    n_pairs *= student_shrinkage(member_part, non_member_part, n1, n0, failure_probability=side)

    def least_over(limit: float) -> float:
        def excess(auc: float) -> float:
            return side - float(scipy.special.betainc(n_pairs * auc, n_pairs * (1.0 - auc) + 1.0, limit))

        # Even an AUC of 1 is not enough.
        return float(scipy.optimize.brentq(excess, limit, 1.0)) if excess(1.0) > 0.0 else 1.0

    return least_over(budget.limit) if budget.rule == "lower" else 1.0 - least_over(1.0 - budget.limit)


def _expected_reversed(budget: LeakageBudget, expected: float) -> float:
    """True value of the metric for the score turned around, with the ROC that `decision_power` assumes."""
    if budget.metric == "auc":
        return 1.0 - expected
    if budget.metric == "advantage":
        return 0.0
    ndtri = scipy.special.ndtri
    return float(scipy.special.ndtr(2.0 * ndtri(budget.fpr) - ndtri(expected)))


def _side_of_band(budget: LeakageBudget, expected: float) -> int:
    """Whether half of the band stands between a true value and the right answer: 1, or helps: -1."""
    if budget.rule == "point":
        return 0
    return 1 if (expected > budget.limit) == (budget.rule == "lower") else -1


def _power_of_advantage(budget: LeakageBudget, expected: float, n1: int, n0: int, side: float) -> float:
    # The band gives each class and side its own piece.
    radius = sum(math.sqrt(math.log(2.0 / side) / (2.0 * n)) for n in (n1, n0))
    room = abs(expected - budget.limit) - _side_of_band(budget, expected) * radius
    spread = 1.0 / n1 + 1.0 / n0
    if expected > budget.limit:
        return float(scipy.special.ndtr(room / math.sqrt(max(1e-12, 1.0 - expected**2) / 4.0 * spread)))
    # The largest difference over all thresholds is biased upward: its tail, not a normal one.
    return 1.0 - math.exp(-2.0 * room**2 / spread) if room > 0.0 else 0.0


def _power_of_tpr(budget: LeakageBudget, expected: float, n1: int, n0: int, side: float) -> float:
    rank = _rank_of_threshold(budget, n0, side / 2.0)
    if rank is None:
        return 0.0
    middles = (np.arange(_N_QUANTILES) + 0.5) / _N_QUANTILES
    true_fpr = scipy.special.betaincinv(rank, n0 - rank + 1, middles)
    ndtri = scipy.special.ndtri
    true_tpr = scipy.special.ndtr(ndtri(expected) + ndtri(true_fpr) - ndtri(budget.fpr))
    n_within = _largest_count_within(budget, n1, side / 2.0)
    within = scipy.special.bdtr(n_within, n1, true_tpr) if n_within >= 0 else np.zeros(_N_QUANTILES)
    return float(np.mean(1.0 - within if expected > budget.limit else within))


def _rank_of_threshold(budget: LeakageBudget, n0: int, piece: float) -> int | None:
    """Rank among non-members of the threshold that the rule reads; None if there is none."""
    if budget.rule == "point":
        rank = math.floor(n0 * budget.fpr + 1e-9) + 1
    elif budget.rule == "lower":
        # Largest k with P(Binomial(n0, fpr) < k) <= piece.
        rank = int(scipy.stats.binom.ppf(piece, n0, budget.fpr))
        while rank > 0 and scipy.stats.binom.cdf(rank - 1, n0, budget.fpr) > piece:
            rank -= 1
        while scipy.stats.binom.cdf(rank, n0, budget.fpr) <= piece:
            rank += 1
    else:
        # Smallest k with P(Binomial(n0, fpr) >= k) <= piece.
        rank = int(scipy.stats.binom.isf(piece, n0, budget.fpr)) + 1
    return rank if 1 <= rank <= n0 else None


def _largest_count_within(budget: LeakageBudget, n1: int, piece: float) -> int:
    """Largest number of members above the threshold that is still within budget; -1 if none is."""

    def is_over(count: int) -> bool:
        if budget.rule == "lower":
            return clopper_pearson_lower(count, n1, failure_probability=piece) > budget.limit
        if budget.rule == "upper":
            return clopper_pearson_upper(count, n1, failure_probability=piece) > budget.limit
        return count / n1 > budget.limit

    return smallest_between(is_over, too_few=-1, enough=n1 + 1) - 1


def _fewest(budget: LeakageBudget, share: float, ratio: float, n_scores: int) -> tuple[int, int]:
    """Fewest members and non-members with which the budget is neither refused nor undecidable."""

    def is_resolved(n1: int, n0: int) -> bool:
        try:
            check_resolvable(
                budget, n_members=n1, n_non_members=n0, failure_probability=share, n_scores=n_scores
            )
        except TooFewCanariesError:
            return False
        return True

    if budget.metric != "tpr_at_fpr":
        n1 = _smallest(lambda n: is_resolved(n, math.ceil(ratio * n)), MINIMUM_PER_CLASS)
        return n1, max(MINIMUM_PER_CLASS, math.ceil(ratio * n1))
    n0 = _smallest(lambda n: is_resolved(_MAXIMUM_PER_CLASS, n), MINIMUM_PER_CLASS)
    return _smallest(lambda n: is_resolved(n, n0), MINIMUM_PER_CLASS), n0


def _smallest(is_enough: Callable[[int], bool], fewest: int) -> int:
    """Smallest number >= `fewest` that is enough, up to saw teeth."""

    def is_enough_or_hopeless(n: int) -> bool:
        if is_enough(n):
            return True
        if n >= _MAXIMUM_PER_CLASS:
            raise TooFewCanariesError(
                f"Even {_MAXIMUM_PER_CLASS} records per class would not be enough: move `expected` away from "
                "the limit, lower `power`, or choose AUC, which needs far fewer."
            )
        return False

    return smallest_enough(is_enough_or_hopeless, fewest=fewest)


def _check_arguments(
    budget: LeakageBudget, n_audits: int, expected: float | None, power: float, ratio: float
) -> None:
    if n_audits < 1:
        raise ConfigurationError(f"`n_audits` is {n_audits}, but it needs to be at least 1.")
    if not 0.0 < power < 1.0:
        raise ConfigurationError(f"`power` is {power}, but it needs to lie in (0, 1): use 0.8 for 80 %.")
    if not (math.isfinite(ratio) and ratio > 0.0):
        raise ConfigurationError(f"`non_members_per_member` is {ratio}, but it needs to be above 0.")
    if expected is None:
        return
    _check_expected(budget, expected)
    is_over = expected > budget.limit
    is_wrong_side = (budget.rule == "lower" and not is_over) or (budget.rule == "upper" and is_over)
    if expected == budget.limit or is_wrong_side:
        side = {"lower": "above", "upper": "below", "point": "away from"}[budget.rule]
        raise ConfigurationError(
            f"`expected` is {expected}, but rule {budget.rule!r} can detect only values {side} the limit "
            f"{budget.limit:g}: pass one of those."
        )


def _check_expected(budget: LeakageBudget, expected: float) -> None:
    if not budget.chance <= expected < 1.0:
        raise ConfigurationError(
            f"`expected` is {expected}, but a true {budget.label} lies between {budget.chance:g}, where "
            "nothing leaks, and 1, which no finite set can show: pass a value in between."
        )
