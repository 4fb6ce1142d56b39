"""Confidence intervals of leakage figures, and the record counts they need.

All intervals treat the member and the non-member records as two independent samples and the
model as fixed: they are statements about this model and this population of records, for one
look at the data. Several looks need a union bound, which is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.roc import ScoresByClass, membership_advantage, split_by_class
from ezmia_callbacks.functional.search import smallest_enough

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64

__all__: list[str] = []

# Ends of the search for an AUC, and its accuracy.
_TINY = 1e-12

IntervalMethod = Literal[
    "clopper_pearson",
    "delong",
    "exact_pairs",
    "tied_pairs",
    "paired_delong",
    "hoeffding_pairs",
    "order_statistics",
    "dkw",
]


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval, ends included.

    Attributes:
        lower: Lower end.
        upper: Upper end, >= `lower`.
        confidence: Probability with which such intervals cover the true value, in (0, 1).
        method: How it was made.

    Raises:
        ConfigurationError: if the ends are not ordered numbers or `confidence` is outside (0, 1).

    >>> 0.5 in Interval(lower=0.4, upper=0.6, confidence=0.95, method="delong")
    True
    """

    lower: float
    upper: float
    confidence: float
    method: IntervalMethod

    def __post_init__(self) -> None:
        _check_confidence(self.confidence)
        if not self.lower <= self.upper:
            raise ConfigurationError(
                f"The interval runs from {self.lower} to {self.upper}, but the lower end must not "
                "exceed the upper one: check the order of the arguments."
            )

    def __contains__(self, value: float) -> bool:
        return self.lower <= value <= self.upper


@dataclass(frozen=True, eq=False)
class DelongComponents:
    """AUC with the structural components that carry its variance.

    Attributes:
        auc: Probability that a member outscores a non-member, a tie counting one half.
        member_components: V10, per member the share of non-members it outscores, in [0, 1].
        non_member_components: V01, per non-member the share of members that outscore it.
        variance: Estimated variance of `auc`; 0 only if the classes are separated or all tied.
    """

    auc: float
    member_components: Float64[np.ndarray, " n_members"]
    non_member_components: Float64[np.ndarray, " n_non_members"]
    variance: float


@dataclass(frozen=True)
class DelongDifference:
    """How far the AUCs of two scores of the same records are apart.

    Attributes:
        difference: AUC of the first score minus AUC of the second, in [-1, 1].
        interval: Its confidence interval.
        p_value: Two-sided p-value of "both AUCs are equal".
    """

    difference: float
    interval: Interval
    p_value: float


@dataclass(frozen=True, eq=False)
class BootstrapBand:
    """How far the true-positive rate at each of several false-positive rates moves under resampling.

    Attributes:
        fpr: False-positive rates, in [0, 1], as they were asked for.
        lower: Lower end at each of them, in [0, 1].
        upper: Upper end at each of them, >= `lower`.
        confidence: Nominal share of resamples inside, at each rate alone.
        n_resamples: Number of resamples behind it.
    """

    fpr: Float64[np.ndarray, " n_rates"]
    lower: Float64[np.ndarray, " n_rates"]
    upper: Float64[np.ndarray, " n_rates"]
    confidence: float
    n_resamples: int


def clopper_pearson(n_successes: int, n_trials: int, *, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval of a success probability, half of the error on each side.

    As an interval of a true-positive rate it is valid only if the threshold was fixed without
    looking at these records; otherwise use `tpr_at_fpr_interval`.

    Args:
        n_successes: Number of successes, in [0, n_trials].
        n_trials: Number of independent trials, >= 1.
        confidence: Coverage, in (0, 1).

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: Clopper and Pearson 1934, as quantiles of the beta distribution.

    >>> interval = clopper_pearson(5, 100)
    >>> round(interval.lower, 4), round(interval.upper, 4)
    (0.0164, 0.1128)
    """
    _check_confidence(confidence)
    side = (1.0 - confidence) / 2.0
    return Interval(
        lower=clopper_pearson_lower(n_successes, n_trials, failure_probability=side),
        upper=clopper_pearson_upper(n_successes, n_trials, failure_probability=side),
        confidence=confidence,
        method="clopper_pearson",
    )


def clopper_pearson_lower(n_successes: int, n_trials: int, *, failure_probability: float) -> float:
    """Exact one-sided lower bound of a success probability.

    Args:
        n_successes: Number of successes, in [0, n_trials].
        n_trials: Number of independent trials, >= 1.
        failure_probability: Largest probability that the bound exceeds the truth, in (0, 1).

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: Clopper and Pearson 1934.

    >>> round(clopper_pearson_lower(100, 100, failure_probability=0.05), 4)
    0.9705
    """
    _check_counts(n_successes, n_trials)
    _check_failure_probability(failure_probability)
    if n_successes == 0:
        return 0.0
    return float(scipy.stats.beta.ppf(failure_probability, n_successes, n_trials - n_successes + 1))


def clopper_pearson_upper(n_successes: int, n_trials: int, *, failure_probability: float) -> float:
    """Exact one-sided upper bound of a success probability.

    Args:
        n_successes: Number of successes, in [0, n_trials].
        n_trials: Number of independent trials, >= 1.
        failure_probability: Largest probability that the truth exceeds the bound, in (0, 1).

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: Clopper and Pearson 1934.

    >>> round(clopper_pearson_upper(0, 100, failure_probability=0.025), 4)
    0.0362
    """
    _check_counts(n_successes, n_trials)
    _check_failure_probability(failure_probability)
    if n_successes == n_trials:
        return 1.0
    return float(scipy.stats.beta.isf(failure_probability, n_successes + 1, n_trials - n_successes))


def delong_components(scores: Float[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"]) -> DelongComponents:
    """AUC, its structural components and its variance, in O(n log n) by mid-ranks.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.

    Raises:
        ConfigurationError: if the arrays do not match, or a score is not finite.
        TooFewCanariesError: if either class has fewer than 2 records.

    Source: DeLong et al. 1988, Biometrics 44:837; mid-ranks of Sun and Xu 2014, IEEE SPL 21:1389.
    V10_i = mean_j psi(X_i, Y_j), V01_j = mean_i psi(X_i, Y_j), variance = var(V10) / n_members +
    var(V01) / n_non_members.

    >>> scores = np.array([3.0, 5.0, 2.0, 1.0, 2.0, 4.0])
    >>> components = delong_components(scores, np.array([True, True, True, False, False, False]))
    >>> round(components.auc, 6), round(components.variance, 6)
    (0.722222, 0.061728)
    """
    members, non_members = split_by_class(scores, is_member)
    n_members, n_non_members = len(members), len(non_members)
    if n_members < 2 or n_non_members < 2:
        raise TooFewCanariesError(
            f"Got {n_members} members and {n_non_members} non-members, but the variance of AUC "
            "needs at least 2 of each: add canaries of the smaller class."
        )
    ranks = scipy.stats.rankdata(np.concatenate([members, non_members]))
    n_won = ranks[:n_members] - scipy.stats.rankdata(members)
    n_lost_to = n_members - (ranks[n_members:] - scipy.stats.rankdata(non_members))
    member_components = n_won / n_non_members
    non_member_components = n_lost_to / n_members
    return DelongComponents(
        # From the integer count, so that separated classes give exactly 0 or 1.
        auc=float(n_won.sum()) / (n_members * n_non_members),
        member_components=member_components,
        non_member_components=non_member_components,
        variance=_two_sample_variance(member_components, non_member_components),
    )


def delong_interval(
    scores: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
) -> Interval:
    """Interval of the AUC: that of a share among as many independent pairs as the variance is worth.

    A share A of n independent pairs has variance A (1 - A) / n. DeLong's variance is therefore worth
    n = A (1 - A) / variance pairs, and each end is the exact binomial one (Clopper-Pearson) of that
    many, with two corrections that hold the share of the error where classes are small or unequal:

    * The estimated variance is often far too small where a few records carry it, as near AUC 1. At
      a supposed AUC it is worth no more pairs than `hanley_mcneil_pairs` allows there.
    * n is multiplied by (z / t)^2, the quantiles at the side's share of the normal distribution and
      of Student's t, with the degrees of freedom of Welch and Satterthwaite.

    DeLong's variance is 0 in exactly three cases, where it would claim certainty. There, an exact
    bound from n = min(n_members, n_non_members) independent member/non-member pairs is used, with
    a = 1 - confidence:

    * Separated classes, AUC 1 ("exact_pairs"): all n pairs are won, so [(a/2)^(1/n), 1]; mirrored
      at AUC 0. The informative side gets a/2 only, as on any other data.
    * All scores tied, AUC 0.5 ("tied_pairs"), as with an adapter that was not trained yet: all n
      pairs are tied, so ties have probability t >= a^(1/n) and the AUC lies within
      0.5 +- (1 - t) / 2. At n = 100 and 95 % that is [0.485, 0.515].

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.
        confidence: Coverage, in (0, 1); by simulation for "delong", at least that otherwise.

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or `confidence`
            is outside (0, 1).
        TooFewCanariesError: if either class has fewer than 2 records.

    Source: DeLong et al. 1988; Korn and Graubard 1998, Survey Methodology 24:193, for exact binomial
    ends at an effective sample size with Student's t; Newcombe 2006, Statistics in Medicine 25:559,
    method 5, for the variance of Hanley and McNeil at the supposed AUC. `benchmarks/auc_interval.py`
    compares it with others.

    >>> is_member = np.arange(200) < 100
    >>> interval = delong_interval(is_member.astype(float), is_member, confidence=0.9)
    >>> round(interval.lower, 4), interval.upper, interval.method
    (0.9705, 1.0, 'exact_pairs')
    """
    _check_confidence(confidence)
    components = delong_components(scores, is_member)
    auc = components.auc
    failure = 1.0 - confidence
    n_members, n_non_members = len(components.member_components), len(components.non_member_components)
    n_smaller = min(n_members, n_non_members)
    if auc in (0.0, 1.0):
        bound = (failure / 2.0) ** (1.0 / n_smaller)
        lower, upper = (bound, 1.0) if auc == 1.0 else (0.0, 1.0 - bound)
        return Interval(lower, upper, confidence, "exact_pairs")
    if components.variance == 0.0:
        radius = (1.0 - failure ** (1.0 / n_smaller)) / 2.0
        return Interval(0.5 - radius, 0.5 + radius, confidence, "tied_pairs")

    member_part, non_member_part = (
        _variance_of_mean(values)
        for values in (components.member_components, components.non_member_components)
    )
    shrinkage = student_shrinkage(
        member_part, non_member_part, n_members, n_non_members, failure_probability=failure / 2.0
    )
    n_pairs = auc * (1.0 - auc) / components.variance

    def pairs_at(supposed: float) -> float:
        return shrinkage * min(n_pairs, hanley_mcneil_pairs(supposed, n_members, n_non_members))

    return Interval(
        auc_lower_end(auc, pairs_at, failure_probability=failure / 2.0),
        auc_upper_end(auc, pairs_at, failure_probability=failure / 2.0),
        confidence,
        "delong",
    )


def auc_lower_end(auc: float, pairs_at: Callable[[float], float], *, failure_probability: float) -> float:
    """Largest supposed AUC that so many independent pairs rule out as too low.

    Args:
        auc: Measured AUC, in (0, 1).
        pairs_at: For a supposed AUC, in (0, 1), number of independent pairs that the records are worth; need
            not be whole.
        failure_probability: Largest probability that the end exceeds the truth, in (0, 1/2).

    Source: Clopper and Pearson 1934: the supposed AUC at which P(Binomial(n, supposed) >= n auc) is the
    failure probability, by the incomplete beta function.

    >>> round(auc_lower_end(0.5, lambda supposed: 100.0, failure_probability=0.025), 4)
    0.3983
    """

    def excess(supposed: float) -> float:
        n = pairs_at(supposed)
        return float(scipy.special.betainc(n * auc, n * (1.0 - auc) + 1.0, supposed)) - failure_probability

    # With a pair or less nothing above 0 can be ruled out.
    if excess(_TINY) >= 0.0:
        return 0.0
    return float(scipy.optimize.brentq(excess, _TINY, auc, xtol=_TINY))


def auc_upper_end(auc: float, pairs_at: Callable[[float], float], *, failure_probability: float) -> float:
    """Smallest supposed AUC that so many pairs rule out as too high: `auc_lower_end`, mirrored."""
    mirrored = auc_lower_end(
        1.0 - auc, lambda supposed: pairs_at(1.0 - supposed), failure_probability=failure_probability
    )
    return 1.0 - mirrored


def auc_half_width(n_members: int, n_non_members: int, *, failure_probability: float) -> float:
    """How far either end lies from a measured AUC of 0.5, if the scores of both classes spread alike.

    Args:
        n_members: Number of members; fewer than 2 leave all AUCs open.
        n_non_members: Number of non-members, likewise.
        failure_probability: Error rate of one end, in (0, 1/2).

    Source: `delong_interval` with the variance of Hanley and McNeil 1982.

    >>> round(auc_half_width(100, 100, failure_probability=0.025), 3)
    0.083
    """
    if min(n_members, n_non_members) < 2:
        return 0.5
    n_pairs = hanley_mcneil_pairs(0.5, n_members, n_non_members) * student_shrinkage(
        1.0 / n_members,
        1.0 / n_non_members,
        n_members,
        n_non_members,
        failure_probability=failure_probability,
    )
    return 0.5 - auc_lower_end(0.5, lambda supposed: n_pairs, failure_probability=failure_probability)


def hanley_mcneil_pairs(auc: float, n_members: int, n_non_members: int) -> float:
    """Number of independent pairs that so many records are worth by the variance of Hanley and McNeil.

    Of the two variances, that of members with the longer tail and that of non-members with it, the larger
    one counts: which class has it is not known beforehand, and matters where classes are unequal.

    Args:
        auc: True AUC, in (0, 1).
        n_members: Number of members, >= 1.
        n_non_members: Number of non-members, >= 1.

    Source: Hanley and McNeil 1982; see `hanley_mcneil_standard_error`.

    >>> round(hanley_mcneil_pairs(0.5, 100, 100), 1)
    149.3
    """
    error = max(
        hanley_mcneil_standard_error(value, n_members=n_members, n_non_members=n_non_members)
        for value in (auc, 1.0 - auc)
    )
    return auc * (1.0 - auc) / error**2


def student_shrinkage(
    member_part: float,
    non_member_part: float,
    n_members: int,
    n_non_members: int,
    *,
    failure_probability: float,
) -> float:
    """Share of its pairs that a variance is worth when it is estimated itself, in (0, 1].

    Args:
        member_part: What members add to the variance of the AUC, >= 0.
        non_member_part: What non-members add to it, >= 0; not both 0.
        n_members: Number of members, >= 2.
        n_non_members: Number of non-members, >= 2.
        failure_probability: Error rate of one end, in (0, 1/2).

    Source: Welch 1938 and Satterthwaite 1946 for the degrees of freedom; Korn and Graubard 1998.

    >>> round(student_shrinkage(0.01, 0.0, 30, 1000, failure_probability=0.025), 3)
    0.918
    """
    # As shares of the sum, since squares of small variances may vanish.
    share = member_part / (member_part + non_member_part)
    degrees = 1.0 / (share**2 / (n_members - 1) + (1.0 - share) ** 2 / (n_non_members - 1))
    normal = scipy.special.ndtri(failure_probability)
    return float(normal / scipy.special.stdtrit(degrees, failure_probability)) ** 2


def paired_delong_difference(
    scores_a: Float[np.ndarray, " n"],
    scores_b: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
) -> DelongDifference:
    """Difference of the AUCs of two scores of the same records, such as two epochs.

    Where the variance of the difference is 0 (equal rankings, or two degenerate scores), interval
    and p-value come from Hoeffding's inequality over min(n_members, n_non_members) pairs
    ("hoeffding_pairs"), which is wide but claims no certainty.

    Args:
        scores_a: Membership scores, finite; higher means more likely a member.
        scores_b: Other membership scores of the same records, in the same order.
        is_member: True where the record was in the training set.
        confidence: Coverage, in (0, 1).

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or `confidence`
            is outside (0, 1).
        TooFewCanariesError: if either class has fewer than 2 records.

    Source: DeLong et al. 1988, section 3, with the covariance of the structural components;
    Hoeffding 1963, section 5b, for two-sample U-statistics.

    >>> is_member = np.array([True, True, True, False, False, False])
    >>> scores = np.array([3.0, 5.0, 2.0, 1.0, 2.0, 4.0])
    >>> result = paired_delong_difference(scores, -scores, is_member)
    >>> round(result.difference, 6), round(result.p_value, 3)
    (0.444444, 0.371)
    """
    _check_confidence(confidence)
    a = delong_components(scores_a, is_member)
    b = delong_components(scores_b, is_member)
    difference = a.auc - b.auc
    variance = _two_sample_variance(
        a.member_components - b.member_components,
        a.non_member_components - b.non_member_components,
    )
    failure = 1.0 - confidence
    method: IntervalMethod
    if variance == 0.0:
        n_pairs = min(len(a.member_components), len(a.non_member_components))
        radius = math.sqrt(2.0 * math.log(2.0 / failure) / n_pairs)
        p_value = min(1.0, 2.0 * math.exp(-n_pairs * difference**2 / 2.0))
        method = "hoeffding_pairs"
    else:
        standard_error = math.sqrt(variance)
        radius = float(scipy.stats.norm.isf(failure / 2.0)) * standard_error
        p_value = 2.0 * float(scipy.stats.norm.sf(abs(difference) / standard_error))
        method = "paired_delong"
    interval = Interval(max(-1.0, difference - radius), min(1.0, difference + radius), confidence, method)
    return DelongDifference(difference, interval, p_value)


def hanley_mcneil_standard_error(auc: float, *, n_members: int, n_non_members: int) -> float:
    """Standard error that an AUC would have, for planning; not for reporting measured data.

    Args:
        auc: Expected AUC, in [0, 1].
        n_members: Number of members, >= 1.
        n_non_members: Number of non-members, >= 1.

    Raises:
        ConfigurationError: if `auc` is outside [0, 1].
        TooFewCanariesError: if either class is empty.

    Source: Hanley and McNeil 1982, Radiology 143:29; Q1 = A / (2 - A), Q2 = 2 A^2 / (1 + A).

    >>> round(hanley_mcneil_standard_error(0.5, n_members=100, n_non_members=100), 4)
    0.0409
    """
    if not 0 <= auc <= 1:
        raise ConfigurationError(f"`auc` is {auc}, but it needs to lie in [0, 1]: 0.5 is chance.")
    if n_members < 1 or n_non_members < 1:
        raise TooFewCanariesError(
            f"Got {n_members} members and {n_non_members} non-members, but at least one of each "
            "is needed: plan for a positive number."
        )
    q1, q2 = auc / (2.0 - auc), 2.0 * auc**2 / (1.0 + auc)
    member_term = (n_members - 1) * (q1 - auc**2)
    non_member_term = (n_non_members - 1) * (q2 - auc**2)
    variance = auc * (1.0 - auc) + member_term + non_member_term
    return math.sqrt(max(0.0, variance) / (n_members * n_non_members))


def n_non_members_needed(*, fpr: float, failure_probability: float, rank: int = 1) -> int:
    """Smallest number of non-members that certifies a threshold for the rate `fpr`.

    With that many, the `rank`-th highest non-member score is a threshold whose true
    false-positive rate is at most `fpr`, except with probability `failure_probability`. Rank k
    spends k - 1 of the records as allowed false positives.

    Args:
        fpr: False-positive rate to certify, in (0, 1).
        failure_probability: Largest probability that the true rate exceeds `fpr`, in (0, 1). It
            is the threshold's share: `tpr_at_fpr_lower_bound` gives it half of its own, and
            `tpr_at_fpr_interval` a quarter of 1 - confidence.
        rank: Rank of the threshold among non-members, from 1 (the highest).

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: order statistics of uniform variables, P(Beta(k, n - k + 1) > fpr) =
    P(Binomial(n, fpr) < k); for k = 1 that is (1 - fpr)^n.

    >>> n_non_members_needed(fpr=0.01, failure_probability=0.05)
    299
    """
    _check_open_rate(fpr)
    _check_failure_probability(failure_probability)
    if rank < 1 or rank != int(rank):
        raise ConfigurationError(
            f"`rank` is {rank}, but ranks are whole numbers from 1: 1 is the highest non-member."
        )

    def certifies(n: int) -> bool:
        return bool(scipy.stats.binom.cdf(rank - 1, n, fpr) <= failure_probability)

    return smallest_enough(certifies, fewest=rank)


def tpr_at_fpr_interval(
    scores: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    fpr: float,
    confidence: float = 0.95,
) -> Interval:
    """Exact interval of the true-positive rate at a true false-positive rate of at most `fpr`.

    Each side fails with probability at most (1 - confidence) / 2, half of it for the threshold
    and half for the members. The empirical `roc.tpr_at_fpr` is biased upward and may lie above
    the interval.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.
        fpr: Allowed true false-positive rate, in (0, 1).
        confidence: Coverage, in (0, 1); the interval covers at least that often.

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or a rate is
            outside (0, 1).
        TooFewCanariesError: if a class is empty, or the non-members cannot certify `fpr`.

    Source: union of `tpr_at_fpr_lower_bound` and `tpr_at_fpr_upper_bound`.

    >>> is_member = np.arange(900) < 400
    >>> interval = tpr_at_fpr_interval(is_member.astype(float), is_member, fpr=0.01)
    >>> round(interval.lower, 3), interval.upper
    (0.989, 1.0)
    """
    _check_confidence(confidence)
    side = (1.0 - confidence) / 2.0
    return Interval(
        lower=tpr_at_fpr_lower_bound(scores, is_member, fpr=fpr, failure_probability=side),
        upper=tpr_at_fpr_upper_bound(scores, is_member, fpr=fpr, failure_probability=side),
        confidence=confidence,
        method="order_statistics",
    )


def tpr_at_fpr_lower_bound(
    scores: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    fpr: float,
    failure_probability: float,
) -> float:
    """True-positive rate that an attack with true false-positive rate at most `fpr` surely has.

    The threshold is the k-th highest non-member score with the largest k whose true
    false-positive rate exceeds `fpr` with probability at most b = failure_probability / 2; the
    members above it are then a binomial sample with a Clopper-Pearson lower bound at b. Exact for
    any score distribution: with ties the rule "score > threshold" has an even smaller
    false-positive rate.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.
        fpr: Allowed true false-positive rate, in (0, 1).
        failure_probability: Largest probability that the bound exceeds the truth, in (0, 1).

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or a rate is
            outside (0, 1).
        TooFewCanariesError: if a class is empty, or the non-members cannot certify `fpr`.

    Source: order-statistic tolerance limits (Wilks 1941), Y(k) exceeded with probability
    Beta(k, n - k + 1) or less.

    >>> is_member = np.arange(500) < 200
    >>> bound = tpr_at_fpr_lower_bound(
    ...     is_member.astype(float), is_member, fpr=0.01, failure_probability=0.1
    ... )
    >>> round(bound, 3)
    0.985
    """
    piece = _certificate_piece(fpr, failure_probability)
    by_class = split_by_class(scores, is_member)
    n_non_members = len(by_class.non_members)
    # P(Binomial(n, fpr) < k) for k = 1..n rises with k.
    exceedance = scipy.stats.binom.cdf(np.arange(n_non_members), n_non_members, fpr)
    rank = int(np.searchsorted(exceedance, piece, side="right"))
    if rank == 0:
        needed = n_non_members_needed(fpr=fpr, failure_probability=piece)
        raise TooFewCanariesError(
            f"A true-positive rate at FPR {fpr:g} needs at least {needed} non-members to be "
            f"certified at failure probability {failure_probability:.3g}, got {n_non_members}: add "
            "non-members, raise `fpr`, or lower the confidence."
        )
    n_above = _n_members_above(by_class, rank)
    return clopper_pearson_lower(n_above, len(by_class.members), failure_probability=piece)


def tpr_at_fpr_upper_bound(
    scores: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    fpr: float,
    failure_probability: float,
) -> float:
    """True-positive rate that no threshold on this score exceeds at true FPR at most `fpr`.

    Clears a model for this score only, not for other attacks. The best threshold t allowed by
    `fpr` is the lowest with P(non-member > t) <= fpr. The k-th highest non-member score lies
    above t only if k non-members do, which has probability P(Binomial(n, fpr) >= k) or less;
    the smallest k with that at most b = failure_probability / 2 gives a threshold at or below
    t, and the members above it a Clopper-Pearson upper bound at b. No step needs continuous
    scores: with ties P(non-member > t) is at most `fpr` all the same, and counting members
    that tie with the threshold would only call constant scores a perfect attack. Without a k, the
    bound is 1.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.
        fpr: Allowed true false-positive rate, in (0, 1).
        failure_probability: Largest probability that the truth exceeds the bound, in (0, 1).

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or a rate is
            outside (0, 1).
        TooFewCanariesError: if a class is empty.

    Source: as `tpr_at_fpr_lower_bound`, from the other side.

    >>> is_member = np.arange(500) < 200
    >>> bound = tpr_at_fpr_upper_bound(np.zeros(500), is_member, fpr=0.01, failure_probability=0.05)
    >>> round(bound, 3)
    0.018
    """
    piece = _certificate_piece(fpr, failure_probability)
    by_class = split_by_class(scores, is_member)
    n_members, n_non_members = len(by_class.members), len(by_class.non_members)
    # P(Binomial(n, fpr) >= k) for k = 1..n falls with k.
    exceedance = scipy.stats.binom.sf(np.arange(n_non_members), n_non_members, fpr)
    rank = int(np.count_nonzero(exceedance > piece)) + 1
    if rank > n_non_members:
        return 1.0
    n_above = _n_members_above(by_class, rank)
    return clopper_pearson_upper(n_above, n_members, failure_probability=piece)


def advantage_interval(
    scores: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
) -> Interval:
    """Interval of the largest true-positive rate minus false-positive rate over all thresholds.

    Valid although the threshold is chosen on the same records: it rests on uniform bands of both
    distribution functions. Four one-sided errors (each class, each side) share 1 - confidence
    equally by a union bound, b = (1 - confidence) / 4, so both radii are the same.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.
        confidence: Coverage, in (0, 1); the interval covers at least that often.

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or `confidence`
            is outside (0, 1).
        TooFewCanariesError: if either class is empty.

    Source: Dvoretzky-Kiefer-Wolfowitz with the constant of Massart 1990: one-sided error at most
    sqrt(ln(1 / b) / (2 n)).

    >>> interval = advantage_interval(np.zeros(2000), np.arange(2000) < 1000)
    >>> interval.lower, round(interval.upper, 3)
    (0.0, 0.094)
    """
    _check_confidence(confidence)
    advantage = membership_advantage(scores, is_member)
    by_class = split_by_class(scores, is_member)
    log_term = math.log(4.0 / (1.0 - confidence))
    radius = sum(math.sqrt(log_term / (2.0 * len(values))) for values in by_class)
    return Interval(max(0.0, advantage - radius), min(1.0, advantage + radius), confidence, "dkw")


def realized_fpr_range(n_non_members: int, *, n_allowed: int, confidence: float = 0.95) -> Interval:
    """Range of the true false-positive rate of a threshold that was set on these non-members.

    The threshold leaves `n_allowed` non-members strictly above it: the next lower score. How often it calls
    a new non-member a member differs from n_allowed / n_non_members by the luck of the draw, and this is
    by how much. It needs no scores. With ties at the threshold the true rate is lower.

    Args:
        n_non_members: Number of non-members that the threshold was set on, >= 1.
        n_allowed: False positives among them, in [0, n_non_members - 1].
        confidence: Share of draws inside the range, in (0, 1); half of the rest on each side.

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: order statistics of uniform variables: the rate is Beta(k + 1, n - k) distributed.

    >>> realized = realized_fpr_range(1000, n_allowed=10)
    >>> round(realized.lower, 4), round(realized.upper, 4)
    (0.0055, 0.0183)
    """
    _check_confidence(confidence)
    if n_non_members < 1 or not 0 <= n_allowed < n_non_members:
        raise ConfigurationError(
            f"Got {n_allowed} allowed false positives among {n_non_members} non-members, but the threshold "
            "is itself one of them: allow fewer."
        )
    side = (1.0 - confidence) / 2.0
    true_rate = scipy.stats.beta(n_allowed + 1, n_non_members - n_allowed)
    return Interval(float(true_rate.ppf(side)), float(true_rate.isf(side)), confidence, "order_statistics")


def bootstrap_band(
    scores: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    fpr: Sequence[float],
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> BootstrapBand:
    """Pointwise band of the empirical ROC: members and non-members resampled, thresholds set anew.

    For looking at, not for deciding: `roc.tpr_at_fpr` is biased upward with few non-members, and every
    resample repeats that bias, so that in simulations with 100 of each the lower end lay above the truth in
    11 to 25 % of the cases instead of 2.5 %. Trust it from 300 non-members and 10 allowed false positives;
    `tpr_at_fpr_interval` is the exact one. Perfectly separated classes give a band of no width.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.
        fpr: False-positive rates, each in [0, 1].
        confidence: Nominal coverage at each rate alone, in (0, 1).
        n_resamples: Number of resamples, >= 1.
        seed: Seed of the resampling.

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or an argument is
            outside its range.
        TooFewCanariesError: if either class is empty.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile interval), stratified by class.

    >>> is_member = np.arange(60) < 20
    >>> band = bootstrap_band(is_member * 1.0, is_member, fpr=[0.1, 0.5])
    >>> band.lower.tolist(), band.upper.tolist()
    ([1.0, 1.0], [1.0, 1.0])
    """
    _check_confidence(confidence)
    rates = np.array(fpr, dtype=np.float64)
    if rates.ndim != 1 or len(rates) == 0 or not np.all((rates >= 0) & (rates <= 1)):
        raise ConfigurationError(
            f"`fpr` is {fpr}, but it needs at least one rate, each in [0, 1]: use [0.01] for 1 %."
        )
    if n_resamples < 1:
        raise ConfigurationError(f"`n_resamples` is {n_resamples}, but it needs to be at least 1.")
    by_class = split_by_class(scores, is_member)
    members, non_members = np.sort(by_class.members)[::-1], np.sort(by_class.non_members)[::-1]
    n_members, n_non_members = len(members), len(non_members)
    # The same comparison as in `roc.tpr_at_fpr`, so that rounding decides alike.
    n_allowed = np.searchsorted(np.arange(n_non_members + 1) / n_non_members, rates, side="right") - 1
    # How many members lie above each non-member, and above minus infinity.
    n_above = np.append(np.searchsorted(-members, -non_members, side="left"), n_members)

    rng = np.random.default_rng(seed)
    tpr = np.empty((n_resamples, len(rates)))
    # One resample at a time: for large sets all of them would not fit into memory.
    for row in tpr:
        drawn = np.bincount(rng.integers(n_non_members, size=n_non_members), minlength=n_non_members)
        drawn_members = np.bincount(rng.integers(n_members, size=n_members), minlength=n_members)
        threshold = np.searchsorted(np.cumsum(drawn), n_allowed, side="right")
        n_members_above = np.concatenate([[0], np.cumsum(drawn_members)])[n_above[threshold]]
        row[:] = n_members_above / n_members
    side = (1.0 - confidence) / 2.0
    lower, upper = np.quantile(tpr, [side, 1.0 - side], axis=0)
    return BootstrapBand(rates, lower, upper, confidence, n_resamples)


def _two_sample_variance(
    member_values: Float64[np.ndarray, " n_members"],
    non_member_values: Float64[np.ndarray, " n_non_members"],
) -> float:
    """Variance of the sum of the means of two independent samples; exactly 0 if both are flat.

    Components are multiples of 1 / (2 n), so a spread of 1e-12 is rounding: without the rule a
    variance of 1e-34 would pass for certainty.
    """
    return _variance_of_mean(member_values) + _variance_of_mean(non_member_values)


def _variance_of_mean(values: Float64[np.ndarray, " n"]) -> float:
    return 0.0 if np.ptp(values) < 1e-12 else float(np.var(values, ddof=1)) / len(values)


def _n_members_above(by_class: ScoresByClass, rank: int) -> int:
    """Number of members that score above the `rank`-th highest non-member."""
    n_non_members = len(by_class.non_members)
    threshold = np.partition(by_class.non_members, n_non_members - rank)[n_non_members - rank]
    return int(np.count_nonzero(by_class.members > threshold))


def _certificate_piece(fpr: float, failure_probability: float) -> float:
    """Half of the failure probability: one half for the threshold, one for the members."""
    _check_open_rate(fpr)
    _check_failure_probability(failure_probability)
    return failure_probability / 2.0


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigurationError(
            f"`confidence` is {confidence}, but it needs to lie in (0, 1): use 0.95 for 95 %."
        )


def _check_failure_probability(failure_probability: float) -> None:
    if not 0 < failure_probability < 1:
        raise ConfigurationError(
            f"`failure_probability` is {failure_probability}, but it needs to lie in (0, 1): use "
            "0.05 for a one-sided 95 % bound."
        )


def _check_open_rate(fpr: float) -> None:
    if not 0 < fpr < 1:
        raise ConfigurationError(
            f"`fpr` is {fpr}, but no number of records certifies rates outside (0, 1): use 0.01 for 1 %."
        )


def _check_counts(n_successes: int, n_trials: int) -> None:
    if n_trials < 1 or not 0 <= n_successes <= n_trials:
        raise ConfigurationError(
            f"Got {n_successes} successes in {n_trials} trials, but there must be at least one "
            "trial, and no more successes than trials: check the counts."
        )
