"""The curves of a report, computed once: a page and matplotlib draw the same points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ezmia_callbacks.report.view import AuditView, RunView

__all__: list[str] = []

Losses = Literal["member_loss", "non_member_loss"]


@dataclass(frozen=True)
class Point:
    """One audit on a curve; without a value it is a gap, where the figure is unknown.

    Attributes:
        x: Epochs done, or optimizer steps.
        value: The figure.
        lower: Lower end of its band, or of its own interval where there is no band.
        upper: The upper end.
        is_failed: Whether the audit failed; a gap may also be a figure that the canaries do not resolve.
    """

    x: float
    value: float | None
    lower: float | None = None
    upper: float | None = None
    is_failed: bool = False


@dataclass(frozen=True)
class LeakageCurve:
    """One metric of one run.

    Attributes:
        points: Its audits in order.
        limit: The budget's limit, if it is on this metric.
        stopped: The point that stopped the run, if one did.
        kept: Of a stopped run the point of the weights that it was left with, if it was put back.
    """

    points: tuple[Point, ...]
    limit: float | None
    stopped: Point | None
    kept: Point | None


def has_epochs(runs: Sequence[RunView]) -> bool:
    """Whether every audit of every run knows its epoch; else steps are the axis."""
    return all(audit.epoch is not None for run in runs for audit in run.audits)


def position(audit: AuditView, *, by_epoch: bool) -> float:
    """Where an audit stands on the axis."""
    return float(audit.epoch) if by_epoch and audit.epoch is not None else float(audit.step)


def leakage_curve(run: RunView, metric: str, *, by_epoch: bool) -> LeakageCurve:
    """The curve of one metric of a run.

    Args:
        run: The run.
        metric: Name of a metric.
        by_epoch: Whether epochs are the axis; else optimizer steps.
    """

    def point(audit: AuditView) -> Point:
        x, is_failed = position(audit, by_epoch=by_epoch), audit.status == "failed"
        figure = audit.metrics.get(metric)
        if figure is None or figure.value is None:
            return Point(x, None, is_failed=is_failed)
        certain = figure.certain
        if certain is None:
            return Point(x, figure.value)
        return Point(x, figure.value, certain.lower, certain.upper)

    stopped, kept = run.stopped, run.kept
    return LeakageCurve(
        points=tuple(point(audit) for audit in run.audits),
        limit=run.budget.limit if run.budget is not None and run.budget.metric == metric else None,
        stopped=None if stopped is None else point(stopped),
        kept=None if kept is None else point(kept),
    )


def loss_curve(run: RunView, losses: Losses, *, by_epoch: bool) -> tuple[Point, ...]:
    """The mean loss over members or non-members at each audit of a run."""
    return tuple(
        Point(position(audit, by_epoch=by_epoch), getattr(audit, losses), is_failed=audit.status == "failed")
        for audit in run.audits
    )


def limits_by_label(runs: Sequence[RunView], metric: str) -> Mapping[str, float]:
    """The limit of each run whose budget is on this metric."""
    return {
        run.label: run.budget.limit for run in runs if run.budget is not None and run.budget.metric == metric
    }
