"""Sizes of a canary set from the number of rows, and what an audit finds out with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.budget import LeakageBudget, alpha_for_audit, end_shares
from ezmia_callbacks.functional.judged import STRONGEST, judged_scores
from ezmia_callbacks.functional.planning import (
    MINIMUM_PER_CLASS,
    decision_power,
    minimum_detectable_value,
)

__all__: list[str] = []

# Twice as many would narrow an interval by three tenths, and cost every audit twice the time.
MOST_MEMBERS, MOST_NON_MEMBERS = 500, 1000
ROWS_PER_NON_MEMBER = 10
# They cost a forward pass and no training data; more of them would narrow the interval by a hair.
_MEMBERS_PER_NON_MEMBER = 2

_USEFUL_AUC, _POWER = 0.8, 0.8


class CanarySizes(NamedTuple):
    """Numbers of canaries; of groups, where whole groups are drawn."""

    n_members: int
    n_non_members: int

    def __str__(self) -> str:
        return f"n_members={self.n_members}, n_non_members={self.n_non_members}"


def sizes_for(n_rows: int, *, n_drawable: int | None = None, unit: str = "row") -> CanarySizes:
    """Sizes that take at most a tenth of the rows out of training.

    Non-members are a tenth of the rows, and members, which stay, twice as many; at most 1000 and 500.

    Args:
        n_rows: Rows of the training set, or its groups, where whole groups are drawn.
        n_drawable: Those among them that can be canaries; all, by default.
        unit: What is counted, for the error.

    Raises:
        ConfigurationError: if there are no rows.
        TooFewCanariesError: if that leaves fewer than 10 non-members, with sizes that would do.

    >>> sizes_for(1500)
    CanarySizes(n_members=300, n_non_members=150)
    >>> sizes_for(1_000_000)
    CanarySizes(n_members=500, n_non_members=1000)
    """
    if n_rows < 1:
        raise ConfigurationError(f"Got {n_rows} {unit}s; at least 1 is needed.")
    n_drawable = n_rows if n_drawable is None else n_drawable
    sizes = _tenth(n_rows, n_drawable)
    if min(sizes) < MINIMUM_PER_CLASS:
        drawable = "" if n_drawable == n_rows else f", of which {n_drawable} can be drawn"
        raise TooFewCanariesError(
            f"Got {n_rows} {unit}s{drawable}: too few for an audit that takes at most a tenth of them out of "
            f"training, for it needs {MINIMUM_PER_CLASS} members and {MINIMUM_PER_CLASS} non-members. "
            f"{way_out(n_rows, n_drawable, unit=unit)}"
        )
    return sizes


def useful_sizes(n_rows: int, n_drawable: int) -> CanarySizes | None:
    """Sizes that can be drawn: a tenth, or the fewest with which an audit is of use; None if there are none.

    Args:
        n_rows: Rows of the training set, or its groups.
        n_drawable: Those among them that can be canaries.

    >>> useful_sizes(1000, 1000), useful_sizes(60, 60)
    (CanarySizes(n_members=200, n_non_members=100), CanarySizes(n_members=38, n_non_members=19))
    """
    sizes = None
    tenth = _tenth(n_rows, n_drawable).n_non_members
    for n in range(max(MINIMUM_PER_CLASS, tenth), n_drawable // 2 + 1):
        sizes = CanarySizes(min(MOST_MEMBERS, _MEMBERS_PER_NON_MEMBER * n, n_drawable - n), n)
        if _is_useful(sizes):
            break
    return sizes


def way_out(n_rows: int, n_drawable: int, *, unit: str = "row") -> str:
    """What to do where sizes do not fit: others that can be drawn, or other records.

    Args:
        n_rows: Rows of the training set, or its groups.
        n_drawable: Those among them that can be canaries.
        unit: What is counted.

    >>> way_out(60, 60)
    'A split with n_members=38, n_non_members=19 can be drawn, which takes 19 rows out of training.'
    """
    sizes = useful_sizes(n_rows, n_drawable)
    if sizes is None:
        return (
            f"No split can be drawn from fewer than {2 * MINIMUM_PER_CLASS} {unit}s: add different records, "
            "or put synthetic canaries in (insert_canaries)."
        )
    return f"A split with {sizes} can be drawn, which takes {sizes.n_non_members} {unit}s out of training."


def _tenth(n_rows: int, n_drawable: int) -> CanarySizes:
    """Sizes that take a tenth of the rows out of training, however few that is."""
    n_non_members = min(MOST_NON_MEMBERS, n_rows // ROWS_PER_NON_MEMBER, n_drawable // 2)
    n_members = min(MOST_MEMBERS, _MEMBERS_PER_NON_MEMBER * n_non_members, n_drawable - n_non_members)
    return CanarySizes(n_members, n_non_members)


def _is_useful(sizes: CanarySizes) -> bool:
    power = decision_power(
        _ANY_LEAKAGE,
        expected=_USEFUL_AUC,
        n_members=sizes.n_members,
        n_non_members=sizes.n_non_members,
        failure_probability=1.0 - _ANY_LEAKAGE.confidence,
        n_scores=len(judged_scores(STRONGEST)),
    )
    return power >= _POWER


# Whatever lies above chance is over it.
_ANY_LEAKAGE = LeakageBudget(limit=math.nextafter(0.5, 1.0))


@dataclass(frozen=True)
class AuditReach:
    """What one audit can find out with so many canaries.

    Attributes:
        n_members: Members, or their groups.
        n_non_members: Non-members, likewise.
        n_audits: Audits that share the error rate.
        auc: Least true AUC at which leakage is found with 80 % probability, if the scores of both classes
            spread alike; None if no AUC is.
        auc_at_worst: The same however they spread.
        fpr: Smallest false-positive rate at which the true-positive rate has bounds, in (0, 1).
        is_useful: Whether an AUC of 0.8 is found.
    """

    n_members: int
    n_non_members: int
    n_audits: int
    auc: float | None
    auc_at_worst: float | None
    fpr: float

    @property
    def is_useful(self) -> bool:
        """Whether leakage that one can call plain, an AUC of 0.8, is found."""
        return self.auc is not None and self.auc <= _USEFUL_AUC

    def describe(self) -> str:
        """What is found, in one sentence."""
        audit = "an audit" if self.n_audits == 1 else f"each of {self.n_audits} audits"
        text = f"With {self.n_members} members and {self.n_non_members} non-members {audit} "
        if self.auc is None:
            text += "finds no leakage, however large, with 80 % probability"
        else:
            text += (
                "finds leakage with 80 % probability once the true AUC reaches "
                f"{self.auc:.3f} (0.5 is guessing)"
            )
            if self.auc_at_worst is not None:
                text += (
                    " if the scores of members and non-members spread alike, and at "
                    f"{self.auc_at_worst:.3f} however they spread"
                )
        return f"{text}; the smallest false-positive rate that it resolves is {100 * self.fpr:.2g} %."


def audit_reach(
    n_members: int, n_non_members: int, *, n_audits: int = 1, confidence: float = 0.95, score: str = STRONGEST
) -> AuditReach:
    """What one audit can find out with so many canaries, whatever the budget.

    Args:
        n_members: Number of members, >= 1; of groups, where whole groups were drawn.
        n_non_members: Number of non-members, likewise.
        n_audits: Audits of the run, which share the error rate, >= 1.
        confidence: Joint confidence of them all, in (0, 1).
        score: What decides: several scores together, or one.

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: `minimum_detectable_value` for a limit just above chance; the order statistics of
    `n_non_members_needed`, solved for the rate: 1 - piece^(1/n).

    >>> print(audit_reach(200, 100).describe())  # doctest: +NORMALIZE_WHITESPACE
    With 200 members and 100 non-members an audit finds leakage with 80 % probability once the true AUC
    reaches 0.625 (0.5 is guessing) if the scores of members and non-members spread alike, and at 0.675
    however they spread; the smallest false-positive rate that it resolves is 5.6 %.
    """
    n_scores = len(judged_scores(score))
    share = alpha_for_audit(n_audits, n_planned=n_audits, failure_probability=1.0 - confidence)

    def least_found(*, is_worst_case: bool) -> float | None:
        return minimum_detectable_value(
            _ANY_LEAKAGE,
            n_members=n_members,
            n_non_members=n_non_members,
            failure_probability=share,
            n_scores=n_scores,
            power=_POWER,
            is_worst_case=is_worst_case,
        )

    # Of the share of a lower end the threshold has half.
    piece = end_shares(_ANY_LEAKAGE, failure_probability=share, n_scores=n_scores).lower / 2.0
    return AuditReach(
        n_members=n_members,
        n_non_members=n_non_members,
        n_audits=n_audits,
        auc=least_found(is_worst_case=False),
        auc_at_worst=least_found(is_worst_case=True),
        fpr=-math.expm1(math.log(piece) / n_non_members),
    )
