"""How many canaries an audit can afford, and which: a part of them that stays the same in a run."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.intervals import hanley_mcneil_standard_error

if TYPE_CHECKING:
    from jaxtyping import Bool

    from ezmia_callbacks.canaries.sets import CanarySet

__all__ = ["Stopwatch", "affordable_share", "check_max_overhead", "describe_part", "part_of"]


@dataclass
class Stopwatch:
    """Wall-clock time of audits, and of the training between them, in this process.

    Attributes:
        audit_seconds: Time in audits that have ended, the baseline among them.
        training_seconds: Time between audits.
        last_interval: Time since the audit before, seconds; 0 at the first.
    """

    audit_seconds: float = 0.0
    training_seconds: float = 0.0
    last_interval: float = 0.0
    _started: float = 0.0
    _ended: float | None = None

    @contextmanager
    def audit(self) -> Iterator[None]:
        """Count what happens inside as an audit."""
        self._started = time.perf_counter()
        self.last_interval = 0.0 if self._ended is None else self._started - self._ended
        self.training_seconds += self.last_interval
        try:
            yield
        finally:
            self._ended = time.perf_counter()
            self.audit_seconds += self._ended - self._started

    @property
    def overhead(self) -> float | None:
        """Time of audits, the present one as far as it has come, over that of training; None before any."""
        if not self.training_seconds:
            return None
        return (self.audit_seconds + time.perf_counter() - self._started) / self.training_seconds


def check_max_overhead(max_overhead: float | None) -> None:
    """Refuse what is no share of the training time.

    Raises:
        ConfigurationError: if it does not lie in (0, 1).
    """
    if max_overhead is not None and not 0.0 < max_overhead < 1.0:
        raise ConfigurationError(
            f"`max_overhead` must lie in (0, 1), a share of the training time such as 0.05, or be None, got "
            f"{max_overhead!r}."
        )


def affordable_share(
    max_overhead: float,
    *,
    training_seconds: float,
    scoring_seconds: float,
    other_seconds: float,
    spent_seconds: float,
    n_audits: int | None,
) -> float:
    """Share of the canaries that keeps all audits of a run under a share of its training time.

    Args:
        max_overhead: Share of the training time, in (0, 1).
        training_seconds: Time of training between two audits.
        scoring_seconds: Time in which the model scores all canaries.
        other_seconds: Time of an audit that does not depend on their number.
        spent_seconds: Time that was spent before the first step.
        n_audits: Audits that will be made; None if unknown: then what was spent is not won back.

    Returns:
        A share, at most 1; 0 or less where even an audit of nothing takes too long.

    >>> affordable_share(
    ...     0.05,
    ...     training_seconds=100.0,
    ...     scoring_seconds=8.0,
    ...     other_seconds=0.5,
    ...     spent_seconds=5.0,
    ...     n_audits=10,
    ... )
    0.5
    """
    allowed = max_overhead * training_seconds
    if n_audits is not None:
        allowed -= spent_seconds / n_audits
    return min(1.0, (allowed - other_seconds) / max(scoring_seconds, 1e-9))


def part_of(canaries: CanarySet, share: float, *, seed: int) -> Bool[np.ndarray, " n_records"]:
    """Which records belong to a part of the canaries; smaller parts lie inside larger ones.

    Groups and pairs stay whole, and every side, tier and family keeps its share. Where coins decided on
    membership the part is drawn without a look at it, so that the coins in it are fair.

    Args:
        canaries: All canaries.
        share: Share of the units of each kind, in (0, 1]; rounded down, but to no less than one.
        seed: Of the order in which records are taken.
    """
    has_coins = canaries.provenance.has_independent_coins
    kinds: dict[Hashable, dict[Hashable, list[int]]] = {}
    for i in range(len(canaries)):
        detail = None if canaries.details is None else canaries.details[i]
        unit: Hashable = canaries.record_ids[i]
        if canaries.groups is not None:
            unit = canaries.groups[i]
        elif detail is not None and detail.pair_id is not None:
            unit = ("pair", detail.pair_id)
        kind = (
            None if has_coins else bool(canaries.is_member[i]),
            None if detail is None else (detail.n_repeats, detail.family),
        )
        kinds.setdefault(kind, {}).setdefault(unit, []).append(i)
    rng = np.random.default_rng(seed)
    is_chosen = np.zeros(len(canaries), dtype=np.bool_)
    for units in kinds.values():
        members = list(units.values())
        # Rounded before it is rounded down: 0.29 of 100 is 29.
        n = max(1, math.floor(round(share * len(members), 9)))
        for position in rng.permutation(len(members))[:n]:
            is_chosen[members[position]] = True
    return is_chosen


def describe_part(is_member: Bool[np.ndarray, " n_part"], whole_is_member: Bool[np.ndarray, " n_all"]) -> str:
    """What a part of the canaries costs in certainty, in one sentence.

    Args:
        is_member: Membership in the part.
        whole_is_member: Membership in all canaries.

    >>> describe_part(np.arange(100) % 2 == 0, np.arange(1000) % 2 == 0)  # doctest: +ELLIPSIS
    'Audits score 50 members and 50 non-members from here on: an AUC of 0.5 is then known to ±0.114 at ...'
    """
    sizes = [(int(sides.sum()), int((~sides).sum())) for sides in (is_member, whole_is_member)]
    widths = [1.96 * hanley_mcneil_standard_error(0.5, n_members=m, n_non_members=n) for m, n in sizes]
    return (
        f"Audits score {sizes[0][0]} members and {sizes[0][1]} non-members from here on: an AUC of 0.5 is "
        f"then known to ±{widths[0]:.3f} at 95 % confidence; all canaries would make it ±{widths[1]:.3f}."
    )
