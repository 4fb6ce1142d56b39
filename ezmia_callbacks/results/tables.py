"""A history as a table: for a terminal, for a notebook, and for whoever goes on with the figures."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from ezmia_callbacks.errors import MissingDependencyError
from ezmia_callbacks.results.result import AuditResult, Measurement
from ezmia_callbacks.safe_text import for_terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

__all__: list[str] = []

_LONGEST_NAME = len("loss_difference")
_COLUMNS = ("epoch", "step", "AUC", "by", "members seen", "held-out loss", "verdict")


def plain_table(results: Sequence[AuditResult]) -> str:
    """One line an audit, under a line of names."""
    rows = [_COLUMNS, *([for_terminal(cell) for cell in _cells(result)] for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def html_table(results: Sequence[AuditResult], *, caption: str) -> str:
    """The same for a notebook.

    Args:
        results: The audits.
        caption: What stands above it.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in _COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(result)) + "</tr>"
        for result in results
    )
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def data_frame(results: Sequence[AuditResult]) -> pd.DataFrame:
    """One row an audit, with the figures that trackers get.

    Raises:
        MissingDependencyError: if pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError("A data frame needs pandas: pip install pandas") from error
    rows: list[dict[str, Any]] = [
        {
            "step": result.step,
            "epoch": result.epoch,
            "verdict": result.verdict,
            "decided_by": result.decided_by,
            **result.to_metrics(),
        }
        for result in results
    ]
    return pd.DataFrame(rows)


def _cells(result: AuditResult) -> tuple[str, ...]:
    seen = result.n_members if result.n_members_seen is None else result.n_members_seen
    has_figures = result.status == "ok"
    return (
        "-" if result.epoch is None else f"{result.epoch:.3g}",
        str(result.step),
        figure(result.metrics.get("auc")),
        _cut(result.decided_by) if has_figures else "-",
        f"{seen} of {result.n_members}" if has_figures else "-",
        loss(result.non_member_loss),
        result.verdict,
    )


def _cut(name: str) -> str:
    """A score's name, as long as the longest of the built-in ones: a table has to fit on a terminal."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def figure(measurement: Measurement | None) -> str:
    """A figure with its band, or why there is none; never a bare number without one."""
    if measurement is None:
        return "-"
    if measurement.value is None:
        return "not resolved"
    bounds = measurement.band or measurement.interval
    if bounds is None:
        return f"{measurement.value:.3f} (no interval)"
    return f"{measurement.value:.3f} [{bounds.lower:.3f}, {bounds.upper:.3f}]"


def loss(value: float | None) -> str:
    """A loss in nats per token."""
    return "-" if value is None else f"{value:.3f}"
