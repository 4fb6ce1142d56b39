from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.roc import (
    auc,
    membership_advantage,
    roc_curve,
    split_by_class,
    tpr_at_fpr,
)


@st.composite
def labeled_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, and at least one record of each class."""
    members = draw(st.lists(st.integers(-4, 4), min_size=1, max_size=15))
    non_members = draw(st.lists(st.integers(-4, 4), min_size=1, max_size=15))
    scores = np.array(members + non_members, dtype=np.float64)
    is_member = np.arange(len(scores)) < len(members)
    order = draw(st.permutations(range(len(scores))))
    return scores[order], is_member[order]


Labeled = tuple[np.ndarray, np.ndarray]


@settings(max_examples=60, deadline=None)
@given(labeled_scores())
def test_curve_matches_scikit_learn(labeled: Labeled) -> None:
    scores, is_member = labeled

    curve = roc_curve(scores, is_member)

    fpr, tpr, _ = sklearn.metrics.roc_curve(is_member, scores, drop_intermediate=False)
    assert curve.fpr == pytest.approx(fpr)
    assert curve.tpr == pytest.approx(tpr)


@settings(max_examples=60, deadline=None)
@given(labeled_scores())
def test_every_point_of_the_curve_is_reached_by_its_threshold(labeled: Labeled) -> None:
    scores, is_member = labeled

    curve = roc_curve(scores, is_member)

    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert len(curve.thresholds) == len(np.unique(scores)) + 1
    for fpr, tpr, threshold in zip(curve.fpr, curve.tpr, curve.thresholds, strict=True):
        assert fpr == np.mean(scores[~is_member] > threshold)
        assert tpr == np.mean(scores[is_member] > threshold)


@settings(max_examples=60, deadline=None)
@given(labeled_scores())
def test_auc_matches_scikit_learn(labeled: Labeled) -> None:
    scores, is_member = labeled

    assert auc(scores, is_member) == pytest.approx(sklearn.metrics.roc_auc_score(is_member, scores))


@settings(max_examples=60, deadline=None)
@given(labeled_scores())
def test_reversed_scores_give_the_complementary_auc(labeled: Labeled) -> None:
    scores, is_member = labeled

    assert auc(-scores, is_member) == pytest.approx(1.0 - auc(scores, is_member))


@settings(max_examples=60, deadline=None)
@given(labeled_scores(), st.floats(0.0, 1.0))
def test_tpr_at_fpr_is_the_best_of_all_thresholds(labeled: Labeled, fpr: float) -> None:
    scores, is_member = labeled

    actual = tpr_at_fpr(scores, is_member, fpr=fpr)

    allowed = [
        np.mean(scores[is_member] > t) for t in [*scores, -np.inf] if np.mean(scores[~is_member] > t) <= fpr
    ]
    assert actual == max(allowed)


@settings(max_examples=60, deadline=None)
@given(labeled_scores(), st.floats(0.0, 1.0))
def test_tpr_at_fpr_depends_on_ranks_only_and_never_on_interpolation(labeled: Labeled, fpr: float) -> None:
    scores, is_member = labeled

    actual = tpr_at_fpr(scores, is_member, fpr=fpr)

    assert actual == tpr_at_fpr(np.exp(scores), is_member, fpr=fpr)
    sk_fpr, sk_tpr, _ = sklearn.metrics.roc_curve(is_member, scores, drop_intermediate=False)
    assert actual <= max(np.interp(fpr, sk_fpr, sk_tpr), sk_tpr[sk_fpr <= fpr].max()) + 1e-12


def test_tpr_uses_all_allowed_false_positives() -> None:
    scores = np.concatenate([np.arange(100.0), [95.5, 98.5, 99.5]])
    is_member = np.arange(103) >= 100

    rates = [tpr_at_fpr(scores, is_member, fpr=fpr) for fpr in (0.0, 0.009, 0.01, 0.04)]

    assert rates == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1.0])


def test_decimal_rates_reach_their_exact_count() -> None:
    for n, k in [(100, 1), (300, 3), (700, 7), (1000, 1)]:
        is_member = np.arange(n + 1) == n
        scores = np.append(np.arange(float(n)), n - k - 0.5)

        assert tpr_at_fpr(scores, is_member, fpr=float(f"{k / n:.3f}")) == 1.0


def test_constant_scores_show_no_leakage() -> None:
    scores, is_member = np.full(20, 0.5), np.arange(20) < 10

    assert auc(scores, is_member) == 0.5
    assert membership_advantage(scores, is_member) == 0.0
    assert tpr_at_fpr(scores, is_member, fpr=0.99) == 0.0
    assert tpr_at_fpr(scores, is_member, fpr=1.0) == 1.0


def test_separated_classes_show_total_leakage() -> None:
    is_member = np.arange(20) < 10

    assert auc(is_member.astype(float), is_member) == 1.0
    assert membership_advantage(is_member.astype(float), is_member) == 1.0
    assert tpr_at_fpr(is_member.astype(float), is_member, fpr=0.0) == 1.0


@settings(max_examples=60, deadline=None)
@given(labeled_scores())
def test_advantage_is_between_chance_and_one(labeled: Labeled) -> None:
    scores, is_member = labeled

    advantage = membership_advantage(scores, is_member)

    fpr, tpr, _ = sklearn.metrics.roc_curve(is_member, scores, drop_intermediate=False)
    assert advantage == pytest.approx(np.max(tpr - fpr))
    assert 0.0 <= advantage <= 1.0


def test_classes_keep_their_order() -> None:
    by_class = split_by_class(np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, True, False]))

    assert by_class.members.tolist() == [3.0, 2.0]
    assert by_class.non_members.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("is_member", [np.array([True, True]), np.array([False, False])])
def test_missing_class_is_refused(is_member: np.ndarray) -> None:
    with pytest.raises(TooFewCanariesError, match="at least one of each"):
        auc(np.array([1.0, 2.0]), is_member)


@pytest.mark.parametrize(
    ("scores", "is_member", "message"),
    [
        (np.array([1.0, 2.0, 3.0]), np.array([True, False]), "one score and one label"),
        (np.array([[1.0, 2.0]]), np.array([[True, False]]), "one score and one label"),
        (np.array([1.0, 2.0]), np.array([1, 0]), "needs booleans"),
        (np.array([1.0, np.nan]), np.array([True, False]), "1 of 2 scores are NaN"),
        (np.array([np.inf, 1.0]), np.array([True, False]), "1 of 2 scores are NaN"),
    ],
)
def test_malformed_scores_are_refused(scores: np.ndarray, is_member: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        roc_curve(scores, is_member)


@pytest.mark.parametrize("fpr", [-0.1, 1.1, float("nan")])
def test_rate_outside_the_unit_interval_is_refused(fpr: float) -> None:
    with pytest.raises(ConfigurationError, match="false-positive rate"):
        tpr_at_fpr(np.array([1.0, 2.0]), np.array([True, False]), fpr=fpr)
