from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional import permutation
from ezmia_callbacks.functional.permutation import leakage_permutation_test
from ezmia_callbacks.functional.roc import auc


def correlated_scores(rng: np.random.Generator, *, n_audits: int, n_records: int, rho: float) -> np.ndarray:
    """Scores of records that resemble themselves from audit to audit (first-order autoregression)."""
    rows = [rng.normal(size=n_records)]
    for _ in range(n_audits - 1):
        rows.append(rho * rows[-1] + np.sqrt(1 - rho**2) * rng.normal(size=n_records))
    return np.stack(rows)


def p_values_without_leakage(*, rho: float, n_runs: int, rounding: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(int(100 * rho))
    is_member = np.arange(40) < 15
    p_values = []
    for run in range(n_runs):
        scores = correlated_scores(rng, n_audits=6, n_records=40, rho=rho)
        if rounding is not None:
            scores = scores.round(rounding)
        p_values.append(leakage_permutation_test(scores, is_member, n_permutations=99, seed=run).p_value)
    return np.array(p_values)


@pytest.mark.parametrize("rho", [0.0, 0.9, 1.0])
def test_p_values_without_leakage_are_uniform(rho: float) -> None:
    p_values = p_values_without_leakage(rho=rho, n_runs=400)

    # On the grid 1/100, ..., 1, so half a step is granted.
    assert stats.kstest(p_values - 0.005, "uniform").pvalue > 0.001


def test_p_values_with_ties_are_at_most_uniform() -> None:
    p_values = p_values_without_leakage(rho=0.9, n_runs=400, rounding=0)

    for level in (0.05, 0.1, 0.3, 0.5):
        assert np.mean(p_values <= level) <= level + 3 * np.sqrt(level * (1 - level) / 400)


def test_small_sets_match_all_permutations() -> None:
    from itertools import combinations

    scores = np.array([[3.0, 1.0, 2.0, 0.5, 2.0, 1.5], [1.0, 1.0, 3.0, 0.5, 2.5, 2.0]])
    is_member = np.array([True, False, True, False, True, False])
    observed = max(abs(auc(row, is_member) - 0.5) for row in scores)
    largest = [
        max(abs(auc(row, np.isin(np.arange(6), chosen)) - 0.5) for row in scores)
        for chosen in combinations(range(6), 3)
    ]

    p_value = leakage_permutation_test(scores, is_member, n_permutations=20_000, seed=0).p_value

    assert p_value == pytest.approx(np.mean(np.array(largest) >= observed), abs=0.015)


def test_a_single_leaking_audit_is_found() -> None:
    rng = np.random.default_rng(3)
    is_member = np.arange(200) < 100
    scores = correlated_scores(rng, n_audits=8, n_records=200, rho=0.9)
    scores[5] += 0.8 * is_member

    result = leakage_permutation_test(scores, is_member, n_permutations=999)

    assert result.p_value <= 0.005
    assert result.audit == 5
    assert result.largest_auc == auc(scores[5], is_member)


def test_members_that_score_lower_are_leakage_as_well() -> None:
    rng = np.random.default_rng(3)
    is_member = np.arange(200) < 100
    scores = correlated_scores(rng, n_audits=8, n_records=200, rho=0.9)
    scores[5] -= 0.8 * is_member

    result = leakage_permutation_test(scores, is_member, n_permutations=999)

    assert (result.audit, result.largest_auc) == (5, auc(scores[5], is_member))
    assert result.p_value <= 0.005
    assert result.largest_auc < 0.4


def test_the_smallest_p_value_counts_the_observed_labels() -> None:
    is_member = np.arange(60) < 30

    result = leakage_permutation_test(is_member[None] * 1.0, is_member, n_permutations=49)

    assert result.p_value == 1 / 50


def test_equal_audits_cost_nothing() -> None:
    # A union bound over ten equal audits would multiply the p-value by ten.
    rng = np.random.default_rng(4)
    is_member = np.arange(60) < 30
    row = rng.normal(size=60) + 0.5 * is_member

    once = leakage_permutation_test(row[None], is_member, seed=1)
    ten_times = leakage_permutation_test(np.stack([row] * 10), is_member, seed=1)

    assert once.p_value == ten_times.p_value


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(2, 12), st.floats(-3, 3))
def test_constant_scores_are_no_evidence(n_audits: int, n_records: int, value: float) -> None:
    is_member = np.arange(n_records) < n_records // 2

    result = leakage_permutation_test(np.full((n_audits, n_records), value), is_member, n_permutations=20)

    assert (result.largest_auc, result.p_value, result.audit) == (0.5, 1.0, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_only_ranks_matter(rows: list[list[int]]) -> None:
    scores = np.array(rows, dtype=float)
    is_member = np.array([True, False, True, False, True, False])

    one = leakage_permutation_test(scores, is_member, n_permutations=50, seed=2)
    other = leakage_permutation_test(np.exp(scores) - 7.0, is_member, n_permutations=50, seed=2)

    assert one == other
    farthest = max(abs(auc(row, is_member) - 0.5) for row in scores)
    assert abs(one.largest_auc - 0.5) == pytest.approx(farthest)
    assert 1 / 51 <= one.p_value <= 1.0


def test_blocks_of_permutations_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    scores, is_member = rng.normal(size=(3, 30)), np.arange(30) < 15
    whole = leakage_permutation_test(scores, is_member, n_permutations=500)

    monkeypatch.setattr(permutation, "_CELLS_AT_ONCE", 30 * 7)

    assert leakage_permutation_test(scores, is_member, n_permutations=500) == whole


def test_invalid_input_is_refused() -> None:
    scores, is_member = np.zeros((2, 4)), np.array([True, True, False, False])
    with pytest.raises(ConfigurationError, match="at least one audit"):
        leakage_permutation_test(np.zeros((0, 4)), is_member)
    with pytest.raises(ConfigurationError, match=r"shape \(n_audits, n_records\)"):
        leakage_permutation_test(scores[0], is_member)
    with pytest.raises(ConfigurationError, match="one label per record"):
        leakage_permutation_test(scores, is_member[:3])
    with pytest.raises(ConfigurationError, match="booleans"):
        leakage_permutation_test(scores, is_member.astype(int))
    with pytest.raises(ConfigurationError, match="`n_permutations` is 0"):
        leakage_permutation_test(scores, is_member, n_permutations=0)
    with pytest.raises(TooFewCanariesError, match="at least one of each"):
        leakage_permutation_test(scores, np.ones(4, dtype=bool))
    for bad in (np.nan, np.inf):
        with pytest.raises(ConfigurationError, match="NaN or infinite"):
            leakage_permutation_test(np.array([[0.0, 0.0, 0.0, 0.0], [0.0, bad, 0.0, 0.0]]), is_member)
