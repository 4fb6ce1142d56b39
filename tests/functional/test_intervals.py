from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.intervals import (
    Interval,
    advantage_interval,
    auc_lower_end,
    auc_upper_end,
    bootstrap_band,
    clopper_pearson,
    clopper_pearson_lower,
    clopper_pearson_upper,
    delong_components,
    delong_interval,
    hanley_mcneil_pairs,
    hanley_mcneil_standard_error,
    n_non_members_needed,
    paired_delong_difference,
    realized_fpr_range,
    tpr_at_fpr_interval,
    tpr_at_fpr_lower_bound,
    tpr_at_fpr_upper_bound,
)
from ezmia_callbacks.functional.roc import auc, tpr_at_fpr

# Worked example of methods 3a: members (3, 5, 2), non-members (1, 2, 4).
SCORES = np.array([3.0, 5.0, 2.0, 1.0, 2.0, 4.0])
IS_MEMBER = np.array([True, True, True, False, False, False])


def gaussian_scores(
    rng: np.random.Generator, *, n_members: int, n_non_members: int, separation: float
) -> tuple[np.ndarray, np.ndarray]:
    is_member = np.arange(n_members + n_non_members) < n_members
    return rng.normal(size=len(is_member)) + separation * is_member, is_member


# Rounded to 4 digits in methods 3a.
@pytest.mark.parametrize(
    ("n_successes", "n_trials", "lower", "upper"),
    [
        (0, 100, 0.0, 0.0362),
        (1, 100, 0.0003, 0.0545),
        (5, 100, 0.0164, 0.1128),
        (30, 100, 0.2124, 0.3998),
        (30, 300, 0.0685, 0.1397),
        (0, 300, 0.0, 0.0122),
        (10, 1000, 0.0048, 0.0183),
    ],
)
def test_clopper_pearson_matches_published_values(
    n_successes: int, n_trials: int, lower: float, upper: float
) -> None:
    interval = clopper_pearson(n_successes, n_trials)

    assert interval.lower == pytest.approx(lower, abs=5.1e-5)
    assert interval.upper == pytest.approx(upper, abs=5.1e-5)


# One-sided bounds of methods 3b and 3c: at alpha .05, .005 and .025.
@pytest.mark.parametrize(
    ("n_successes", "n_trials", "failure_probability", "lower"),
    [
        (30, 300, 0.05, 0.0729),
        (30, 300, 0.005, 0.0604),
        (30, 100, 0.05, 0.2249),
        (30, 100, 0.005, 0.1890),
        (50, 100, 0.025, 0.3983),
        (826, 1000, 0.025, 0.8011),
    ],
)
def test_one_sided_lower_bound_matches_published_values(
    n_successes: int, n_trials: int, failure_probability: float, lower: float
) -> None:
    actual = clopper_pearson_lower(n_successes, n_trials, failure_probability=failure_probability)

    assert actual == pytest.approx(lower, abs=5.1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.5, 0.999))
def test_clopper_pearson_matches_scipy(k: int, extra: int, confidence: float) -> None:
    interval = clopper_pearson(k, k + extra, confidence=confidence)

    oracle = stats.binomtest(k, k + extra).proportion_ci(confidence, method="exact")
    assert (interval.lower, interval.upper) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def test_bounds_mirror_each_other() -> None:
    lower = clopper_pearson_lower(7, 40, failure_probability=0.05)
    upper = clopper_pearson_upper(33, 40, failure_probability=0.05)

    assert lower == pytest.approx(1.0 - upper)
    assert clopper_pearson_lower(0, 40, failure_probability=0.05) == 0.0
    assert clopper_pearson_upper(40, 40, failure_probability=0.05) == 1.0


def test_delong_components_match_the_worked_example() -> None:
    components = delong_components(SCORES, IS_MEMBER)

    assert components.auc == pytest.approx(0.722222, abs=1e-6)
    assert components.member_components == pytest.approx([2 / 3, 1.0, 0.5])
    assert components.non_member_components == pytest.approx([1.0, 5 / 6, 1 / 3])
    assert np.var(components.member_components, ddof=1) == pytest.approx(0.064815, abs=1e-6)
    assert np.var(components.non_member_components, ddof=1) == pytest.approx(0.120370, abs=1e-6)
    assert components.variance == pytest.approx(0.061728, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=15),
    st.lists(st.integers(0, 6), min_size=2, max_size=15),
)
def test_components_match_all_pairs(members: list[int], non_members: list[int]) -> None:
    x, y = np.array(members, dtype=float), np.array(non_members, dtype=float)
    is_member = np.arange(len(x) + len(y)) < len(x)

    components = delong_components(np.concatenate([x, y]), is_member)

    wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    assert components.auc == pytest.approx(wins.mean())
    assert components.member_components == pytest.approx(wins.mean(axis=1))
    assert components.non_member_components == pytest.approx(wins.mean(axis=0))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=2, max_size=6),
    st.lists(st.integers(0, 2), min_size=2, max_size=6),
)
def test_variance_is_zero_only_for_separated_or_all_tied_classes(
    members: list[int], non_members: list[int]
) -> None:
    scores = np.array(members + non_members, dtype=float)
    is_member = np.arange(len(scores)) < len(members)

    components = delong_components(scores, is_member)

    is_all_tied = len(set(members + non_members)) == 1
    assert (components.variance == 0.0) == (components.auc in (0.0, 1.0) or is_all_tied)


def supposed_aucs_not_ruled_out(members, non_members, *, side: float) -> tuple[float, float]:
    """Ends of the AUC's interval by trying every AUC, from all pairs and textbook formulas."""
    n1, n0 = len(members), len(non_members)
    wins = (members[:, None] > non_members) + 0.5 * (members[:, None] == non_members)
    auc = wins.mean()
    parts = np.var(wins.mean(axis=1), ddof=1) / n1, np.var(wins.mean(axis=0), ddof=1) / n0
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / (n1 - 1) + parts[1] ** 2 / (n0 - 1))
    supposed = np.arange(1, 200_000) / 200_000
    # Hanley and McNeil's Q1 - A^2 and Q2 - A^2; the smaller class gets the larger one.
    spreads = np.sort([supposed / (2 - supposed), 2 * supposed**2 / (1 + supposed)], axis=0) - supposed**2
    largest = supposed * (1 - supposed) + (max(n1, n0) - 1) * spreads[1] + (min(n1, n0) - 1) * spreads[0]
    largest /= n1 * n0
    n_pairs = np.minimum(auc * (1 - auc) / sum(parts), supposed * (1 - supposed) / largest)
    n_pairs *= (stats.norm.ppf(side) / stats.t.ppf(side, degrees)) ** 2
    at_least = stats.beta.cdf(supposed, n_pairs * auc, n_pairs * (1 - auc) + 1)
    at_most = stats.beta.sf(supposed, n_pairs * auc + 1, n_pairs * (1 - auc))
    kept = supposed[(at_least >= side) & (at_most >= side)]
    return kept.min(), kept.max()


@pytest.mark.parametrize("confidence", [0.95, 0.995])
@pytest.mark.parametrize(
    ("n_members", "n_non_members", "separation", "spread"),
    # One where the estimated variance counts, two where that of Hanley and McNeil does.
    [(40, 40, 0.5, 3.0), (30, 400, 1.2, 1.0), (60, 20, 2.5, 1.0)],
)
def test_delong_interval_holds_all_aucs_that_the_pairs_do_not_rule_out(
    n_members: int, n_non_members: int, separation: float, spread: float, confidence: float
) -> None:
    rng = np.random.default_rng(11)
    members = rng.normal(size=n_members) * spread + separation
    non_members = rng.normal(size=n_non_members)
    is_member = np.arange(n_members + n_non_members) < n_members

    interval = delong_interval(np.concatenate([members, non_members]), is_member, confidence=confidence)

    lower, upper = supposed_aucs_not_ruled_out(members, non_members, side=(1 - confidence) / 2)
    assert (interval.lower, interval.upper) == pytest.approx((lower, upper), abs=1e-5)
    assert interval.method == "delong"


@pytest.mark.parametrize(("n_won", "n"), [(1, 40), (20, 40), (39, 40), (6, 7)])
def test_independent_pairs_have_the_exact_binomial_ends(n_won: int, n: int) -> None:
    exact = clopper_pearson(n_won, n, confidence=0.99)

    lower = auc_lower_end(n_won / n, lambda supposed: n, failure_probability=0.005)
    upper = auc_upper_end(n_won / n, lambda supposed: n, failure_probability=0.005)

    assert (lower, upper) == pytest.approx((exact.lower, exact.upper), abs=1e-9)


def test_less_than_a_pair_rules_nothing_out() -> None:
    assert auc_lower_end(0.5, lambda supposed: 0.02, failure_probability=0.025) == 0.0
    assert auc_upper_end(0.5, lambda supposed: 0.02, failure_probability=0.025) == 1.0


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(2, 400), st.integers(2, 400))
def test_no_class_is_favored_by_the_pairs_that_records_are_worth(auc: float, n1: int, n0: int) -> None:
    n_pairs = hanley_mcneil_pairs(auc, n1, n0)

    assert n_pairs == pytest.approx(hanley_mcneil_pairs(1.0 - auc, n1, n0))
    assert n_pairs == pytest.approx(hanley_mcneil_pairs(auc, n0, n1))
    # The largest variance that any scores can have leaves the smaller number (Birnbaum and Klose 1957).
    assert min(n1, n0) - 1e-9 <= n_pairs <= n1 * n0


def test_an_interval_turns_with_the_scores() -> None:
    rng = np.random.default_rng(12)
    scores, is_member = gaussian_scores(rng, n_members=30, n_non_members=200, separation=1.0)

    interval, turned, swapped = (
        delong_interval(scores, is_member),
        delong_interval(-scores, is_member),
        delong_interval(-scores, ~is_member),
    )

    assert (1 - turned.upper, 1 - turned.lower) == pytest.approx((interval.lower, interval.upper), abs=1e-9)
    assert (swapped.lower, swapped.upper) == pytest.approx((interval.lower, interval.upper), abs=1e-9)


def test_separated_classes_get_the_exact_pairs_bound() -> None:
    is_member = np.arange(250) < 100
    scores = is_member.astype(float)

    perfect = delong_interval(scores, is_member, confidence=0.9)
    inverted = delong_interval(-scores, is_member, confidence=0.9)

    # 0.05 ** (1 / 100), methods 3a.
    assert perfect.lower == pytest.approx(0.9705, abs=5e-5)
    assert (perfect.upper, perfect.method) == (1.0, "exact_pairs")
    assert inverted.upper == pytest.approx(1.0 - 0.9705, abs=5e-5)
    assert (inverted.lower, inverted.method) == (0.0, "exact_pairs")


@pytest.mark.parametrize(("n", "radius"), [(2, 0.388197), (100, 0.014757)])
def test_constant_scores_claim_no_certainty(n: int, radius: float) -> None:
    interval = delong_interval(np.zeros(2 * n), np.arange(2 * n) < n)

    # (1 - 0.05 ** (1 / n)) / 2.
    assert interval.lower == pytest.approx(0.5 - radius, abs=1e-6)
    assert interval.upper == pytest.approx(0.5 + radius, abs=1e-6)
    assert interval.method == "tied_pairs"


def test_tied_pairs_interval_covers_when_ties_are_only_frequent() -> None:
    # 2 members of 100 leave the tie on average: AUC 0.51, and all are tied with chance 0.13.
    n, true_auc = 100, 0.51
    rng = np.random.default_rng(0)
    is_member = np.arange(2 * n) < n

    n_missed = sum(
        true_auc not in delong_interval((rng.random(2 * n) < 0.02) * is_member * 1.0, is_member)
        for _ in range(300)
    )

    # DeLong alone would miss whenever all records tie, which is in 13 % of the repetitions.
    assert n_missed / 300 <= 0.05


def test_wider_confidence_gives_wider_interval() -> None:
    rng = np.random.default_rng(1)
    scores, is_member = gaussian_scores(rng, n_members=500, n_non_members=1500, separation=1.0)

    makers: list[Callable[[float], Interval]] = [
        lambda c: clopper_pearson(30, 100, confidence=c),
        lambda c: delong_interval(scores, is_member, confidence=c),
        lambda c: paired_delong_difference(scores, -scores, is_member, confidence=c).interval,
        lambda c: tpr_at_fpr_interval(scores, is_member, fpr=0.01, confidence=c),
        lambda c: advantage_interval(scores, is_member, confidence=c),
    ]

    for make in makers:
        narrow, wide = make(0.8), make(0.99)
        assert wide.lower < narrow.lower <= narrow.upper < wide.upper


@pytest.mark.parametrize("separation", [0.0, 1.0])
def test_delong_interval_covers_at_its_confidence(separation: float) -> None:
    rng = np.random.default_rng(2)
    true_auc = stats.norm.cdf(separation / np.sqrt(2))

    n_covered = sum(
        true_auc
        in delong_interval(*gaussian_scores(rng, n_members=100, n_non_members=100, separation=separation))
        for _ in range(400)
    )

    # Standard error of the simulation: 0.011.
    assert 0.92 <= n_covered / 400 <= 0.98


def test_shuffled_labels_cover_one_half() -> None:
    rng = np.random.default_rng(3)
    scores, is_member = gaussian_scores(rng, n_members=60, n_non_members=90, separation=2.0)

    n_covered = sum(0.5 in delong_interval(scores, rng.permutation(is_member)) for _ in range(1000))

    assert 0.93 <= n_covered / 1000 <= 0.97


def test_paired_difference_has_the_variance_of_the_component_differences() -> None:
    rng = np.random.default_rng(4)
    a, is_member = gaussian_scores(rng, n_members=40, n_non_members=60, separation=1.0)
    b = a + rng.normal(size=100)

    result = paired_delong_difference(a, b, is_member)

    parts = [delong_components(s, is_member) for s in (a, b)]
    covariance = np.cov([p.member_components for p in parts]) / 40
    covariance += np.cov([p.non_member_components for p in parts]) / 60
    se = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = auc(a, is_member) - auc(b, is_member)
    assert result.difference == pytest.approx(difference)
    assert result.interval.upper - result.difference == pytest.approx(1.959964 * se, rel=1e-6)
    assert result.p_value == pytest.approx(2 * stats.norm.sf(abs(difference) / se))


def test_paired_test_rejects_equal_scores_at_its_level() -> None:
    rng = np.random.default_rng(5)

    def p_value() -> float:
        shared, is_member = gaussian_scores(rng, n_members=80, n_non_members=80, separation=1.5)
        noise = rng.normal(size=(2, 160))
        return paired_delong_difference(shared + noise[0], shared + noise[1], is_member).p_value

    p_values = np.array([p_value() for _ in range(400)])

    assert 0.02 <= np.mean(p_values < 0.05) <= 0.09


def test_equal_scores_differ_by_nothing_but_without_certainty() -> None:
    rng = np.random.default_rng(6)
    scores, is_member = gaussian_scores(rng, n_members=100, n_non_members=150, separation=1.0)

    result = paired_delong_difference(scores, np.exp(scores), is_member)

    # sqrt(2 ln(2 / 0.05) / 100).
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert result.interval.upper == pytest.approx(0.271620, abs=1e-6)
    assert result.interval.lower == -result.interval.upper
    assert result.interval.method == "hoeffding_pairs"


def test_separated_against_inverted_scores_is_a_significant_difference() -> None:
    is_member = np.arange(100) < 50
    scores = is_member.astype(float)

    result = paired_delong_difference(scores, -scores, is_member)

    assert (result.difference, result.interval.upper) == (1.0, 1.0)
    assert 0.0 < result.p_value < 1e-9
    assert result.interval.lower < 1.0


# Published standard errors of methods 3a.
@pytest.mark.parametrize(
    ("value", "n", "standard_error"),
    [
        (0.5, 100, 0.0409),
        (0.5, 300, 0.0236),
        (0.5, 1000, 0.0129),
        (0.75, 100, 0.0344),
        (0.9, 100, 0.0226),
        (0.98, 300, 0.0058),
    ],
)
def test_hanley_mcneil_matches_published_values(value: float, n: int, standard_error: float) -> None:
    actual = hanley_mcneil_standard_error(value, n_members=n, n_non_members=n)

    assert actual == pytest.approx(standard_error, abs=5.1e-5)


def test_hanley_mcneil_is_zero_without_overlap() -> None:
    assert hanley_mcneil_standard_error(1.0, n_members=9, n_non_members=9) == 0.0
    assert hanley_mcneil_standard_error(0.0, n_members=9, n_non_members=9) == 0.0


# Published counts of methods 3a.
@pytest.mark.parametrize(
    ("fpr", "failure_probability", "needed"),
    [
        (0.01, 0.05, [299, 473, 628, 913]),
        (0.01, 0.01, [459, 662, 838, 1157]),
        (0.001, 0.05, [2995, 4742, 6294, 9151]),
        (0.05, 0.05, [59, 93, 124, 181]),
    ],
)
def test_needed_non_members_match_published_counts(
    fpr: float, failure_probability: float, needed: list[int]
) -> None:
    actual = [
        n_non_members_needed(fpr=fpr, failure_probability=failure_probability, rank=rank)
        for rank in (1, 2, 3, 5)
    ]

    assert actual == needed


def test_needed_non_members_for_ten_looks_and_rare_rates() -> None:
    assert n_non_members_needed(fpr=0.001, failure_probability=0.01) == 4603
    assert n_non_members_needed(fpr=0.01, failure_probability=0.005) == 528


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 0.5), st.floats(0.001, 0.3), st.integers(1, 6))
def test_needed_non_members_are_the_smallest_that_suffice(
    fpr: float, failure_probability: float, rank: int
) -> None:
    n = n_non_members_needed(fpr=fpr, failure_probability=failure_probability, rank=rank)

    assert stats.beta.sf(fpr, rank, n - rank + 1) <= failure_probability * (1 + 1e-9)
    if n > rank:
        assert stats.beta.sf(fpr, rank, n - rank) > failure_probability * (1 - 1e-9)


@pytest.mark.parametrize("n_non_members", [298, 299])
def test_certificate_needs_299_non_members_at_one_percent(n_non_members: int) -> None:
    is_member = np.arange(n_non_members + 50) < 50
    scores = is_member.astype(float)

    if n_non_members < 299:
        with pytest.raises(TooFewCanariesError, match=r"at least 299 non-members .* got 298"):
            tpr_at_fpr_lower_bound(scores, is_member, fpr=0.01, failure_probability=0.1)
    else:
        bound = tpr_at_fpr_lower_bound(scores, is_member, fpr=0.01, failure_probability=0.1)
        assert bound == pytest.approx(0.05 ** (1 / 50))


def test_lower_bound_counts_members_above_the_certified_rank() -> None:
    # 473 non-members certify rank 2 at 1 % and 0.05, and 472 only rank 1.
    members = np.array([471.5] * 10 + [470.5] * 20 + [0.5] * 70)

    def bound(n_non_members: int) -> float:
        scores = np.concatenate([members, np.arange(473.0)[473 - n_non_members :]])
        is_member = np.arange(len(scores)) < 100
        return tpr_at_fpr_lower_bound(scores, is_member, fpr=0.01, failure_probability=0.1)

    assert bound(472) == clopper_pearson_lower(0, 100, failure_probability=0.05)
    assert bound(473) == clopper_pearson_lower(10, 100, failure_probability=0.05)


def test_upper_bound_uses_the_smallest_rank_that_is_low_enough() -> None:
    n, fpr, piece = 500, 0.01, 0.05
    rank = next(k for k in range(1, n + 1) if stats.beta.cdf(fpr, k, n - k + 1) <= piece)
    members = np.concatenate([np.full(30, n - rank + 0.5), np.full(70, n - rank - 0.5)])
    scores = np.concatenate([members, np.arange(float(n))])
    is_member = np.arange(len(scores)) < 100

    actual = tpr_at_fpr_upper_bound(scores, is_member, fpr=fpr, failure_probability=2 * piece)

    assert actual == clopper_pearson_upper(30, 100, failure_probability=piece)


def test_upper_bound_is_one_when_there_are_too_few_non_members() -> None:
    is_member = np.arange(52) < 50

    bound = tpr_at_fpr_upper_bound(np.zeros(52), is_member, fpr=0.5, failure_probability=0.1)

    assert bound == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.999), st.floats(0.03, 0.5))
def test_certified_interval_is_ordered_with_and_without_ties(
    seed: int, confidence: float, fpr: float
) -> None:
    rng = np.random.default_rng(seed)
    scores, is_member = gaussian_scores(rng, n_members=30, n_non_members=400, separation=1.0)
    needed = n_non_members_needed(fpr=fpr, failure_probability=(1 - confidence) / 4)
    if needed > 400:
        fpr = 0.5

    for values in (scores, np.round(scores), np.zeros(430)):
        interval = tpr_at_fpr_interval(values, is_member, fpr=fpr, confidence=confidence)
        assert 0.0 <= interval.lower <= interval.upper <= 1.0


def test_interval_splits_its_error_over_both_sides() -> None:
    rng = np.random.default_rng(8)
    scores, is_member = gaussian_scores(rng, n_members=300, n_non_members=900, separation=1.0)

    interval = tpr_at_fpr_interval(scores, is_member, fpr=0.02, confidence=0.9)

    lower = tpr_at_fpr_lower_bound(scores, is_member, fpr=0.02, failure_probability=0.05)
    upper = tpr_at_fpr_upper_bound(scores, is_member, fpr=0.02, failure_probability=0.05)
    assert (interval.lower, interval.upper) == pytest.approx((lower, upper))
    assert interval.method == "order_statistics"


@pytest.mark.parametrize("separation", [0.0, 1.5])
def test_certified_bounds_fail_at_most_at_their_rate(separation: float) -> None:
    rng = np.random.default_rng(9)
    true_tpr = stats.norm.sf(stats.norm.isf(0.01) - separation)
    n_repetitions, n_too_high, n_too_low = 300, 0, 0

    for _ in range(n_repetitions):
        scores, is_member = gaussian_scores(rng, n_members=400, n_non_members=400, separation=separation)
        options = {"fpr": 0.01, "failure_probability": 0.1}
        n_too_high += tpr_at_fpr_lower_bound(scores, is_member, **options) > true_tpr
        n_too_low += tpr_at_fpr_upper_bound(scores, is_member, **options) < true_tpr

    assert n_too_high / n_repetitions <= 0.1
    assert n_too_low / n_repetitions <= 0.1


def discrete_scores(
    rng: np.random.Generator, probabilities: tuple[list[float], list[float]]
) -> tuple[np.ndarray, np.ndarray]:
    is_member = np.arange(800) < 400
    draws = [rng.choice(len(p), size=400, p=p) for p in probabilities]
    return np.concatenate(draws).astype(float), is_member


# Score distributions of members and non-members over 0, 1, 2, and the true rate of the best
# threshold with P(non-member > threshold) <= 0.05.
@pytest.mark.parametrize(
    ("members", "non_members", "true_tpr"),
    [
        ([0.6, 0.2, 0.2], [0.9, 0.06, 0.04], 0.2),
        ([0.6, 0.2, 0.2], [0.9, 0.045, 0.055], 0.0),
        ([0.6, 0.2, 0.2], [0.95, 0.03, 0.02], 0.4),
    ],
)
def test_certified_bounds_hold_with_tied_scores(
    members: list[float], non_members: list[float], true_tpr: float
) -> None:
    rng = np.random.default_rng(10)
    n_repetitions, n_too_high, n_too_low = 200, 0, 0

    for _ in range(n_repetitions):
        scores, is_member = discrete_scores(rng, (members, non_members))
        options = {"fpr": 0.05, "failure_probability": 0.1}
        n_too_high += tpr_at_fpr_lower_bound(scores, is_member, **options) > true_tpr
        n_too_low += tpr_at_fpr_upper_bound(scores, is_member, **options) < true_tpr

    assert n_too_high / n_repetitions <= 0.1
    assert n_too_low / n_repetitions <= 0.1


def test_constant_scores_are_cleared() -> None:
    is_member = np.arange(1000) < 300

    interval = tpr_at_fpr_interval(np.zeros(1000), is_member, fpr=0.01)

    assert interval.lower == 0.0
    assert interval.upper == pytest.approx(clopper_pearson_upper(0, 300, failure_probability=0.0125))


# One-sided radii at 0.025, methods 3a; a confidence of 0.9 puts 0.025 on each of four errors.
@pytest.mark.parametrize(("n", "radius"), [(100, 0.136), (300, 0.078), (1000, 0.043), (10_000, 0.0136)])
def test_advantage_radius_is_the_sum_of_both_bands(n: int, radius: float) -> None:
    interval = advantage_interval(np.zeros(2 * n), np.arange(2 * n) < n, confidence=0.9)

    assert interval.lower == 0.0
    assert interval.upper / 2 == pytest.approx(radius, abs=5.1e-4)
    assert interval.method == "dkw"


def test_advantage_interval_covers_the_best_threshold() -> None:
    rng = np.random.default_rng(12)
    true_advantage = 2 * stats.norm.cdf(0.5) - 1

    n_covered = sum(
        true_advantage
        in advantage_interval(*gaussian_scores(rng, n_members=200, n_non_members=300, separation=1.0))
        for _ in range(200)
    )

    assert n_covered / 200 >= 0.95


# Methods 3a, in percent: what a threshold with so many empirical false positives really does.
@pytest.mark.parametrize(
    ("n_non_members", "n_allowed", "lower", "upper", "exceeds_one_percent"),
    [
        (100, 1, 0.2, 5.4, 0.74),
        (300, 3, 0.36, 2.9, 0.65),
        (1000, 10, 0.55, 1.8, 0.58),
        (10_000, 100, 0.82, 1.2, 0.53),
    ],
)
def test_realized_fpr_matches_published_values(
    n_non_members: int, n_allowed: int, lower: float, upper: float, exceeds_one_percent: float
) -> None:
    realized = realized_fpr_range(n_non_members, n_allowed=n_allowed)
    # The confidence whose lower end is 1 % says how often the rate is higher.
    below = stats.binom.sf(n_allowed, n_non_members, 0.01)

    # Published with one or two digits, some of them cut off.
    assert 100 * realized.lower == pytest.approx(lower, abs=0.06 if lower < 0.3 else 0.011)
    assert 100 * realized.upper == pytest.approx(upper, abs=0.06)
    assert 1.0 - below == pytest.approx(exceeds_one_percent, abs=6e-3)
    if below < 0.5:
        at_one_percent = realized_fpr_range(n_non_members, n_allowed=n_allowed, confidence=1 - 2 * below)
        assert at_one_percent.lower == pytest.approx(0.01)


def test_realized_fpr_covers_the_true_rate_of_a_chosen_threshold() -> None:
    rng = np.random.default_rng(13)
    realized = realized_fpr_range(50, n_allowed=2, confidence=0.8)

    true_rates = stats.norm.sf([np.sort(rng.normal(size=50))[-3] for _ in range(2000)])

    covered = np.mean((true_rates >= realized.lower) & (true_rates <= realized.upper))
    assert covered == pytest.approx(0.8, abs=0.03)


def test_realized_fpr_of_the_smallest_sets() -> None:
    assert realized_fpr_range(1, n_allowed=0, confidence=0.9).lower == pytest.approx(0.05)
    with pytest.raises(ConfigurationError, match="allow fewer"):
        realized_fpr_range(5, n_allowed=5)
    with pytest.raises(ConfigurationError, match="allow fewer"):
        realized_fpr_range(0, n_allowed=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_bootstrap_band_matches_plain_resampling(
    members: list[int], non_members: list[int], fpr: float
) -> None:
    x = np.sort(np.array(members, dtype=float))[::-1]
    y = np.sort(np.array(non_members, dtype=float))[::-1]
    is_member = np.arange(len(x) + len(y)) < len(x)

    band = bootstrap_band(
        np.concatenate([x, y]), is_member, fpr=[fpr, 0.0], confidence=0.7, n_resamples=20, seed=5
    )

    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(20):
        drawn_y, drawn_x = rng.choice(y, size=len(y)), rng.choice(x, size=len(x))
        scores = np.concatenate([drawn_x, drawn_y])
        drawn.append([tpr_at_fpr(scores, is_member, fpr=rate) for rate in (fpr, 0.0)])
    assert band.lower == pytest.approx(np.quantile(drawn, 0.15, axis=0))
    assert band.upper == pytest.approx(np.quantile(drawn, 0.85, axis=0))


def test_bootstrap_band_moves_the_threshold_as_well_as_the_members() -> None:
    # Binormal AUC .80, 500 each, methods 3a: standard errors .015 (members), .035 (threshold), .038 (both).
    rng = np.random.default_rng(14)
    widths = []
    for _ in range(15):
        scores, is_member = gaussian_scores(rng, n_members=500, n_non_members=500, separation=1.19)
        band = bootstrap_band(scores, is_member, fpr=[0.01], n_resamples=300)
        widths.append(band.upper[0] - band.lower[0])

    assert np.mean(widths) / (2 * 1.96) == pytest.approx(0.038, abs=0.008)


@pytest.mark.slow
def test_bootstrap_band_covers_as_often_as_its_docstring_says() -> None:
    rng = np.random.default_rng(15)
    n_runs, n_missed = 400, 0
    separation = stats.norm.ppf(0.3) - stats.norm.ppf(0.01)
    for _ in range(n_runs):
        scores, is_member = gaussian_scores(rng, n_members=100, n_non_members=100, separation=separation)
        n_missed += bootstrap_band(scores, is_member, fpr=[0.01], n_resamples=300).lower[0] > 0.3

    # .25 in methods 3a: why it must not decide anything.
    assert n_missed / n_runs == pytest.approx(0.25, abs=0.08)


def test_bootstrap_band_of_constant_scores_is_zero() -> None:
    band = bootstrap_band(np.ones(50), np.arange(50) < 20, fpr=[0.0, 0.5, 1.0], n_resamples=50)

    assert band.lower.tolist() == band.upper.tolist() == [0.0, 0.0, 1.0]
    assert band.fpr.tolist() == [0.0, 0.5, 1.0]


def test_bootstrap_band_repeats_with_its_seed() -> None:
    scores, is_member = gaussian_scores(
        np.random.default_rng(16), n_members=50, n_non_members=50, separation=1.0
    )

    bands = [bootstrap_band(scores, is_member, fpr=[0.1], n_resamples=99, seed=seed) for seed in (1, 1, 2)]

    assert bands[0].lower[0] == bands[1].lower[0]
    assert (bands[0].lower[0], bands[0].upper[0]) != (bands[2].lower[0], bands[2].upper[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fpr": []}, "at least one rate"),
        ({"fpr": [1.1]}, "each in"),
        ({"fpr": [float("nan")]}, "each in"),
        ({"n_resamples": 0}, "`n_resamples` is 0"),
        ({"confidence": 1.0}, r"use 0\.95"),
    ],
)
def test_bootstrap_band_refuses_arguments_outside_their_range(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        bootstrap_band(SCORES, IS_MEMBER, **{"fpr": [0.1]} | changes)


@pytest.mark.parametrize("function", [delong_components, delong_interval])
def test_variance_needs_two_records_of_each_class(
    function: Callable[[np.ndarray, np.ndarray], object],
) -> None:
    with pytest.raises(TooFewCanariesError, match="at least 2 of each"):
        function(np.array([1.0, 2.0, 3.0]), np.array([True, False, False]))


def test_interval_contains_its_ends_and_nothing_outside() -> None:
    interval = Interval(lower=0.2, upper=0.4, confidence=0.95, method="dkw")

    assert 0.2 in interval
    assert 0.4 in interval
    assert 0.41 not in interval


@pytest.mark.parametrize(("lower", "upper"), [(0.5, 0.4), (float("nan"), 0.4)])
def test_unordered_interval_is_refused(lower: float, upper: float) -> None:
    with pytest.raises(ConfigurationError, match="lower end"):
        Interval(lower=lower, upper=upper, confidence=0.95, method="dkw")


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, float("nan")])
def test_confidence_outside_the_unit_interval_is_refused(confidence: float) -> None:
    with pytest.raises(ConfigurationError, match=r"use 0\.95"):
        clopper_pearson(1, 2, confidence=confidence)
    with pytest.raises(ConfigurationError, match=r"use 0\.95"):
        delong_interval(SCORES, IS_MEMBER, confidence=confidence)


def test_arguments_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="successes"):
        clopper_pearson(3, 2)
    with pytest.raises(ConfigurationError, match="successes"):
        clopper_pearson(0, 0)
    with pytest.raises(ConfigurationError, match="failure_probability"):
        clopper_pearson_lower(1, 2, failure_probability=0.0)
    with pytest.raises(ConfigurationError, match="`fpr` is 0"):
        n_non_members_needed(fpr=0.0, failure_probability=0.05)
    with pytest.raises(ConfigurationError, match="`rank` is 0"):
        n_non_members_needed(fpr=0.1, failure_probability=0.05, rank=0)
    with pytest.raises(ConfigurationError, match="`fpr` is 1"):
        tpr_at_fpr_interval(SCORES, IS_MEMBER, fpr=1.0)
    with pytest.raises(ConfigurationError, match=r"`auc` is 1\.5"):
        hanley_mcneil_standard_error(1.5, n_members=2, n_non_members=2)
    with pytest.raises(TooFewCanariesError, match="positive number"):
        hanley_mcneil_standard_error(0.5, n_members=0, n_non_members=2)
