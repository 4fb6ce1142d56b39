from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.exposure import (
    EXTRAPOLATION_CEILING,
    exposure_of_rank,
    extrapolated_exposure,
    rank_exposure,
)

CANARY_FIRST = {n: np.arange(n + 1) < 1 for n in (30, 99, 299, 400, 999)}


def test_exposure_of_a_rank_matches_the_published_value() -> None:
    assert exposure_of_rank(5, 1000) == pytest.approx(7.644, abs=5e-4)
    assert exposure_of_rank(1, 1024) == 10.0
    assert exposure_of_rank(1024, 1024) == 0.0


# Mean over all equally likely ranks, methods 3d.
@pytest.mark.parametrize(("n_references", "mean"), [(99, 1.40), (299, 1.42), (999, 1.44)])
def test_mean_without_leakage_matches_published_values(n_references: int, mean: float) -> None:
    references = np.arange(n_references, dtype=float)
    members = np.arange(n_references + 1) - 0.5
    is_member = np.arange(2 * n_references + 1) <= n_references

    values = rank_exposure(np.concatenate([members, references]), is_member).values

    assert values.mean() == pytest.approx(mean, abs=5.1e-3)
    assert 4.05 <= np.quantile(values, 0.95) <= 4.35


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
    st.lists(st.integers(-3, 3), min_size=1, max_size=20),
)
def test_rank_exposure_counts_references_that_score_as_high(members: list[int], others: list[int]) -> None:
    scores = np.array(members + others, dtype=float)

    exposure = rank_exposure(scores, np.arange(len(scores)) < len(members))

    expected = [exposure_of_rank(1 + sum(y >= x for y in others), len(others) + 1) for x in members]
    assert exposure.values == pytest.approx(expected)
    assert np.all((exposure.values >= 0) & (exposure.values <= exposure.ceiling))
    assert (exposure.ceiling, exposure.n_references) == (np.log2(len(others) + 1), len(others))


def test_constant_scores_are_not_exposed() -> None:
    exposure = rank_exposure(np.full(100, 3.0), CANARY_FIRST[99])

    assert exposure.values.tolist() == [0.0]


def test_the_largest_rank_exposure_is_said_to_be_a_floor() -> None:
    scores = np.concatenate([[5.0], np.zeros(99)])

    assert rank_exposure(scores, CANARY_FIRST[99]).describe() == (
        "exposure among 99 references: median 6.64 bits, largest at least 6.64 (ceiling 6.64; 1.44 on "
        "average without leakage)"
    )
    assert "at least" not in rank_exposure(-scores, CANARY_FIRST[99]).describe()


@pytest.mark.parametrize("shape", [0.0, 3.0, -3.0])
def test_extrapolation_agrees_with_the_true_tail(shape: float) -> None:
    rng = np.random.default_rng(1)
    truth = stats.skewnorm(shape, loc=2.0, scale=0.3)
    references = truth.rvs(size=4000, random_state=rng)
    members = truth.isf([0.3, 0.01, 1e-4])

    exposure = extrapolated_exposure(np.concatenate([members, references]), np.arange(4003) < 3)

    assert exposure.values == pytest.approx(-np.log2([0.3, 0.01, 1e-4]), rel=0.12)


def test_extrapolation_matches_scipy_at_the_fitted_moments() -> None:
    rng = np.random.default_rng(2)
    references = stats.skewnorm(2.0).rvs(size=999, random_state=rng)
    mean, deviation, skewness = references.mean(), references.std(), stats.skew(references)
    # Location, scale and shape with these moments, by scipy's own root finder.
    from scipy.optimize import brentq

    shape = brentq(lambda a: stats.skewnorm.stats(a, moments="s") - skewness, 0.0, 50.0)
    unit = stats.skewnorm(shape)
    scale = deviation / unit.std()
    fitted = stats.skewnorm(shape, loc=mean - scale * unit.mean(), scale=scale)

    exposure = extrapolated_exposure(np.concatenate([[3.0], references]), CANARY_FIRST[999])

    assert exposure.values[0] == pytest.approx(-np.log2(fitted.sf(3.0)), rel=1e-6)


@pytest.mark.parametrize(
    "references",
    [
        np.random.default_rng(3).exponential(size=400),
        np.random.default_rng(3).standard_t(2, size=400),
        np.random.default_rng(3).normal(size=400) // 1,
        np.repeat([0.0, 1.0], 200),
        np.zeros(400),
    ],
    ids=["exponential", "heavy tails", "rounded", "two values", "constant"],
)
def test_extrapolation_is_suppressed_where_the_fit_fails(references: np.ndarray) -> None:
    exposure = extrapolated_exposure(np.concatenate([[9.0], references]), CANARY_FIRST[400])

    assert exposure.values is None
    assert exposure.goodness_of_fit < 0.05
    assert exposure.describe().startswith("no extrapolated exposure: the scores of the 400 references")


def test_a_good_fit_is_rarely_suppressed() -> None:
    rng = np.random.default_rng(4)

    n_suppressed = sum(
        extrapolated_exposure(
            np.concatenate([[0.0], stats.skewnorm(2.0).rvs(size=99, random_state=rng)]),
            CANARY_FIRST[99],
            seed=seed,
        ).values
        is None
        for seed in range(100)
    )

    assert n_suppressed <= 13


def test_extrapolation_never_exceeds_its_ceiling() -> None:
    rng = np.random.default_rng(5)
    members = np.array([1e300, 60.0, -1e300])

    exposure = extrapolated_exposure(np.concatenate([members, rng.normal(size=400)]), np.arange(403) < 3)

    assert exposure.values.tolist() == [EXTRAPOLATION_CEILING, EXTRAPOLATION_CEILING, 0.0]
    assert exposure.ceiling == EXTRAPOLATION_CEILING
    assert "largest at least 40.00" in exposure.describe()


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1e300, 0.0), (1.0, 1e6)])
def test_extrapolation_does_not_depend_on_the_unit(scale: float, shift: float) -> None:
    rng = np.random.default_rng(6)
    scores = np.concatenate([[3.0], rng.normal(size=400)])

    plain = extrapolated_exposure(scores, CANARY_FIRST[400])
    moved = extrapolated_exposure(scores * scale + shift, CANARY_FIRST[400])

    assert moved.values == pytest.approx(plain.values, rel=1e-6)
    assert moved.goodness_of_fit == plain.goodness_of_fit


def test_invalid_input_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`rank` is 0"):
        exposure_of_rank(0, 10)
    with pytest.raises(ConfigurationError, match=r"\[1, 10\]"):
        exposure_of_rank(11, 10)
    with pytest.raises(TooFewCanariesError, match="at least one of each"):
        rank_exposure(np.zeros(3), np.ones(3, dtype=bool))
    with pytest.raises(ConfigurationError, match="NaN or infinite"):
        rank_exposure(np.array([np.inf, 0.0]), np.array([True, False]))
    with pytest.raises(TooFewCanariesError, match="at least 30 non-members"):
        extrapolated_exposure(np.arange(30.0), np.arange(30) < 1)
    with pytest.raises(ConfigurationError, match="`significance` is 0"):
        extrapolated_exposure(np.arange(40.0), np.arange(40) < 1, significance=0.0)
