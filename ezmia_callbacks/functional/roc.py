"""Exact operating points of a membership score: ROC, AUC, TPR at low FPR, advantage.

One rule throughout: a record is called a member if its score is strictly greater than the
threshold, so that constant scores never look like a perfect attack. The ROC is a step function
and nothing is interpolated: each rate is attained by a real threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64

__all__: list[str] = []


class ScoresByClass(NamedTuple):
    """The scores of members and of non-members, each finite and non-empty."""

    members: Float64[np.ndarray, " n_members"]
    non_members: Float64[np.ndarray, " n_non_members"]


@dataclass(frozen=True, eq=False)
class RocCurve:
    """The operating points that a score can reach, from calling no record a member to all.

    Attributes:
        fpr: False-positive rate of each point, in [0, 1], nondecreasing from 0 to 1.
        tpr: True-positive rate of each point, in [0, 1], nondecreasing from 0 to 1.
        thresholds: The point calls a record a member if its score is > this; the distinct scores
            in decreasing order, then minus infinity.
    """

    fpr: Float64[np.ndarray, " n_points"]
    tpr: Float64[np.ndarray, " n_points"]
    thresholds: Float64[np.ndarray, " n_points"]


def split_by_class(scores: Float[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"]) -> ScoresByClass:
    """Validated scores of members and of non-members, as float64, in their given order.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.

    Raises:
        ConfigurationError: if the arrays do not match, or a score is not finite.
        TooFewCanariesError: if either class is empty.

    >>> split_by_class(np.array([2.0, 1.0]), np.array([True, False])).members.tolist()
    [2.0]
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(is_member)
    if values.ndim != 1 or values.shape != labels.shape:
        raise ConfigurationError(
            f"`scores` has shape {values.shape} and `is_member` {labels.shape}, but both need "
            "shape (n_records,): pass one score and one label per record."
        )
    if labels.dtype != np.bool_:
        raise ConfigurationError(
            f"`is_member` has type {labels.dtype}, but it needs booleans: use `.astype(bool)`."
        )
    n_bad = int(np.count_nonzero(~np.isfinite(values)))
    if n_bad:
        raise ConfigurationError(
            f"{n_bad} of {len(values)} scores are NaN or infinite, but a rank needs finite scores: "
            "use the bounded score, or find the record whose model outputs overflow."
        )
    members, non_members = values[labels], values[~labels]
    if len(members) == 0 or len(non_members) == 0:
        raise TooFewCanariesError(
            f"Got {len(members)} members and {len(non_members)} non-members, but at least one of "
            "each is needed: add canaries of the missing class."
        )
    return ScoresByClass(members, non_members)


def roc_curve(scores: Float[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"]) -> RocCurve:
    """All operating points of the rule "score > threshold", one per distinct score and (1, 1).

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.

    Raises:
        ConfigurationError: if the arrays do not match, or a score is not finite.
        TooFewCanariesError: if either class is empty.

    Source: Fawcett 2006, "An introduction to ROC analysis", algorithm 1 (ties in one step).

    >>> curve = roc_curve(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]))
    >>> curve.fpr.tolist(), curve.tpr.tolist(), curve.thresholds.tolist()
    ([0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0], [3.0, 2.0, 1.0, -inf])
    """
    members, non_members = split_by_class(scores, is_member)
    distinct = np.unique(np.concatenate([members, non_members]))
    thresholds = np.concatenate([distinct[::-1], [-np.inf]])
    return RocCurve(
        fpr=_rates_above(thresholds, non_members),
        tpr=_rates_above(thresholds, members),
        thresholds=thresholds,
    )


def auc(scores: Float[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"]) -> float:
    """Probability that a member outscores a non-member, a tie counting one half, in [0, 1].

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.

    Raises:
        ConfigurationError: if the arrays do not match, or a score is not finite.
        TooFewCanariesError: if either class is empty.

    Source: Mann-Whitney U by mid-ranks, divided by n_members * n_non_members.

    >>> auc(np.array([3.0, 5.0, 2.0, 2.0]), np.array([True, True, True, False]))
    0.8333333333333334
    """
    members, non_members = split_by_class(scores, is_member)
    n_members, n_non_members = len(members), len(non_members)
    ranks = scipy.stats.rankdata(np.concatenate([members, non_members]))
    n_wins = float(ranks[:n_members].sum()) - n_members * (n_members + 1) / 2
    return n_wins / (n_members * n_non_members)


def tpr_at_fpr(scores: Float[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"], *, fpr: float) -> float:
    """Largest true-positive rate reachable with false-positive rate at most `fpr`.

    Both rates are those of these records. With few records the value is biased upward as an
    estimate for new ones: report it with `intervals.tpr_at_fpr_interval`. Constant scores give
    0 below `fpr` 1.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.
        fpr: Allowed false-positive rate, in [0, 1].

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or `fpr` is
            outside [0, 1].
        TooFewCanariesError: if either class is empty.

    Source: Carlini et al. 2022, arXiv:2112.03570 (TPR at low FPR as the headline metric).

    >>> tpr_at_fpr(np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, False, True, False]), fpr=0.0)
    0.5
    """
    if not 0 <= fpr <= 1:
        raise ConfigurationError(
            f"`fpr` is {fpr}, but a false-positive rate lies in [0, 1]: use 0.01 for 1 %."
        )
    curve = roc_curve(scores, is_member)
    # Both rates are nondecreasing along the curve, so the last allowed point is the best one.
    return float(curve.tpr[np.searchsorted(curve.fpr, fpr, side="right") - 1])


def membership_advantage(scores: Float[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"]) -> float:
    """Largest true-positive rate minus false-positive rate over all thresholds, in [0, 1].

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.

    Raises:
        ConfigurationError: if the arrays do not match, or a score is not finite.
        TooFewCanariesError: if either class is empty.

    Source: Yeom et al. 2018, arXiv:1709.01604, definition 4, maximized over thresholds.

    >>> membership_advantage(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]))
    0.5
    """
    curve = roc_curve(scores, is_member)
    return float(np.max(curve.tpr - curve.fpr))


def _rates_above(
    thresholds: Float64[np.ndarray, " n_points"], values: Float64[np.ndarray, " n_values"]
) -> Float64[np.ndarray, " n_points"]:
    n_above = len(values) - np.searchsorted(np.sort(values), thresholds, side="right")
    return n_above / len(values)
