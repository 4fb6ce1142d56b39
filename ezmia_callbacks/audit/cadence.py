"""When audits come: what `every` may be, the early ones of `"auto"`, and the plan of a whole run."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__: list[str] = []

Cadence: TypeAlias = Literal["auto", "epoch"] | int | float
"""Early and every epoch, every epoch, every so many optimizer steps, or every fraction of an epoch."""

# Up to half of the first epoch can be kept; every further look would take its part of the error rate.
_EARLY_SHARES = (0.125, 0.25, 0.5)


def ends_epochs(every: Cadence) -> bool:
    """Whether there is an audit at the end of each epoch."""
    return every in ("auto", "epoch")


def early_steps(every: Cadence, *, n_steps: int | None) -> frozenset[int]:
    """Steps of the early audits of `"auto"`: an eighth, a quarter and half of the first epoch.

    Args:
        every: The cadence; there are none for any other than `"auto"`.
        n_steps: Optimizer steps in the first epoch, or in the run if that is shorter; None if unknown: then
            there are none.

    >>> sorted(early_steps("auto", n_steps=100))
    [12, 25, 50]
    >>> sorted(early_steps("auto", n_steps=3))
    [1, 2]
    """
    if every != "auto" or n_steps is None:
        return frozenset()
    return frozenset(max(1, round(share * n_steps)) for share in _EARLY_SHARES)


@dataclass(frozen=True)
class AuditPlan:
    """The steps at which a run will be audited after the baseline, as far as they are known beforehand.

    Attributes:
        steps: Optimizer steps, each once, in order; the first of each cadence where the run has no known end.
        is_complete: Whether there will be no others, nor fewer unless the run is stopped.
        steps_per_epoch: Optimizer steps in an epoch; None if unknown.
    """

    steps: tuple[int, ...]
    is_complete: bool
    steps_per_epoch: int | None = None

    @property
    def n_audits(self) -> int | None:
        """Number of audits after the baseline, among which the error rate is shared; None if unknown."""
        return len(self.steps) if self.is_complete else None


def plan_audits(
    steps: Iterable[int],
    intervals: Iterable[int | None],
    *,
    n_steps: int | None,
    steps_per_epoch: int | None,
) -> AuditPlan:
    """The plan of a run, its last step included; what several reasons ask for at one step counts once.

    Args:
        steps: Steps with an audit of their own.
        intervals: Steps from one audit to the next, for each reason there is; None for a length that is
            unknown.
        n_steps: Steps of the run; None if it has no known end.
        steps_per_epoch: Steps in an epoch; None if unknown.

    >>> plan_audits([1, 2, 5], [10], n_steps=30, steps_per_epoch=10).steps
    (1, 2, 5, 10, 20, 30)
    """
    intervals = list(intervals)
    lengths = [interval for interval in intervals if interval is not None]
    if n_steps is None:
        found = {*steps, *lengths}
    else:
        found = {step for step in steps if step < n_steps} | {n_steps}
        found.update(*(range(length, n_steps, length) for length in lengths))
    return AuditPlan(
        tuple(sorted(found)), n_steps is not None and None not in intervals, steps_per_epoch=steps_per_epoch
    )
