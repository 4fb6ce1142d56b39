"""Leakage curves as matplotlib axes; nothing is shown, saved, or set globally."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError
from ezmia_callbacks.history import AuditHistory
from ezmia_callbacks.report.markdown import counts_line, histories_by_label, metric_label, score_label
from ezmia_callbacks.results import AuditResult, Measurement

if TYPE_CHECKING:
    from types import ModuleType

    from jaxtyping import Float64
    from matplotlib.axes import Axes

__all__ = ["plot_leakage_and_loss", "plot_leakage_curve"]

_INK, _QUIET = "#222222", "#666666"
_LABEL_SIZE, _NOTE_SIZE = 10.5, 9.0


@dataclass(frozen=True)
class _Style:
    """Color, marker and line of one run, the same in every panel; each alone tells the runs apart."""

    color: str
    marker: str
    line: Any


# Okabe and Ito's colors, which stay apart for color-blind readers; markers and lines do so in grey.
_STYLES = (
    _Style("#D55E00", "o", "-"),
    _Style("#0072B2", "s", (0, (5, 1.6))),
    _Style("#009E73", "^", (0, (5, 1.5, 1, 1.5))),
    _Style("#CC79A7", "D", (0, (1.5, 1.2))),
    _Style("#E69F00", "v", (0, (8, 2))),
    _Style("#56B4E9", "P", (0, (3, 1, 1, 1, 1, 1))),
)


def plot_leakage_curve(
    histories: AuditHistory | Mapping[str, AuditHistory], *, metric: str = "auc", ax: Axes | None = None
) -> Axes:
    """Axes with the leakage of one or several runs over the training, each point with its band.

    Shaded is the band that holds for all audits of a run together, or the audit's own interval where there is
    no band. A failed audit is a gap in the line and a marker at the bottom; an audit that does not
    resolve `metric` is a gap.

    Args:
        histories: The audits of one run, or of several by label.
        metric: Name of a metric of the audits, e.g. `"auc"` or `"tpr_at_fpr_0.01"`.
        ax: Axes to draw on; by default those of a new figure.

    Raises:
        ConfigurationError: if there is no history, one has no audits, or no audit resolves `metric`.
        MissingDependencyError: if matplotlib is not installed.
    """
    pyplot = _pyplot()
    runs = histories_by_label(histories)
    _check_metric(runs, metric)
    if ax is None:
        _, ax = pyplot.subplots(figsize=(7.0, 4.8), layout="constrained")
    has_epochs = _has_epochs(runs)
    for style, (label, history) in zip(_styles(runs), runs.items(), strict=True):
        _draw_leakage(ax, history, metric, label=label, style=style, has_epochs=has_epochs)
    _draw_limits(ax, runs, metric)
    _mark_events(ax, runs, metric, has_epochs=has_epochs)
    scores = {score_label(history[0].score) for history in runs.values()}
    attack = f"the {scores.pop()} attack" if len(scores) == 1 else "the attack"
    _finish(ax, y_label=f"{metric_label(metric)} of {attack}", has_epochs=has_epochs)
    _write_caption(ax, _leakage_caption(runs, metric))
    return ax


def plot_leakage_and_loss(
    histories: AuditHistory | Mapping[str, AuditHistory], *, axes: Sequence[Axes] | None = None
) -> tuple[Axes, Axes]:
    """Two axes side by side: the AUC of every run, and its member and held-out losses.

    Args:
        histories: The audits of one run, or of several by label.
        axes: Two axes to draw on; by default those of a new figure, 10 by 4 inches.

    Raises:
        ConfigurationError: if there is no history, one has no audits, none has an AUC, or `axes` are not
            two.
        MissingDependencyError: if matplotlib is not installed.
    """
    pyplot = _pyplot()
    runs = histories_by_label(histories)
    _check_metric(runs, "auc")
    if axes is None:
        figure, axes = pyplot.subplots(1, 2, figsize=(10.0, 4.0), sharex=True, layout="constrained")
        figure.get_layout_engine().set(wspace=0.04)
    if len(axes) != 2:
        raise ConfigurationError(f"Two axes are needed, got {len(axes)}: try `pyplot.subplots(1, 2)[1]`.")
    left, right = axes
    plot_leakage_curve(runs, ax=left)
    has_epochs = _has_epochs(runs)
    for style, history in zip(_styles(runs), runs.values(), strict=True):
        _draw_losses(right, history, style=style, has_epochs=has_epochs)
    for label, filled in (("members (trained on)", True), ("held out", False)):
        right.plot([], [], label=label, **_loss_look(_Style(_INK, "o", "-"), filled=filled))
    _finish(right, y_label="loss (nats per token)", has_epochs=has_epochs)
    right.set_xlim(left.get_xlim())
    _write_caption(right, f"Mean loss over the canaries' tokens: {_counts(runs)}.")
    return left, right


def _pyplot() -> ModuleType:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise MissingDependencyError('Plots need matplotlib: pip install "ezmia-callbacks[report]"') from None
    return pyplot


def _check_metric(runs: Mapping[str, AuditHistory], metric: str) -> None:
    """Raise if no audit resolves the metric: empty axes would read as "no leakage"."""
    measured = [result.metrics for history in runs.values() for result in history]
    if any(metric in metrics and metrics[metric].value is not None for metrics in measured):
        return
    names = dict.fromkeys(
        name for metrics in measured for name, found in metrics.items() if found.value is not None
    )
    available = f"available: {', '.join(names)}" if names else "no audit gave any figure"
    notes = [metrics[metric].note for metrics in measured if metric in metrics]
    if notes:
        raise ConfigurationError(f"No audit resolves {metric!r} ({notes[-1]}); {available}.")
    raise ConfigurationError(f"Unknown metric {metric!r}; {available}.")


def _styles(runs: Mapping[str, AuditHistory]) -> list[_Style]:
    return [_STYLES[index % len(_STYLES)] for index in range(len(runs))]


def _has_epochs(runs: Mapping[str, AuditHistory]) -> bool:
    return all(result.epoch is not None for history in runs.values() for result in history)


def _position(result: AuditResult, *, has_epochs: bool) -> float:
    return float(result.epoch) if has_epochs and result.epoch is not None else float(result.step)


def _positions(history: AuditHistory, *, has_epochs: bool) -> list[float]:
    return [_position(result, has_epochs=has_epochs) for result in history]


def _ends(measurement: Measurement | None) -> tuple[float, float, float]:
    """Value and ends of its band; NaN for what is missing, which matplotlib draws as a gap."""
    if measurement is None or measurement.value is None:
        return float("nan"), float("nan"), float("nan")
    certain = measurement.band or measurement.interval
    if certain is None:
        return measurement.value, float("nan"), float("nan")
    return measurement.value, certain.lower, certain.upper


def _curve(history: AuditHistory, metric: str) -> Float64[np.ndarray, "n_audits 3"]:
    return np.array([_ends(result.metrics.get(metric)) for result in history], dtype=np.float64)


def _draw_leakage(
    ax: Axes, history: AuditHistory, metric: str, *, label: str, style: _Style, has_epochs: bool
) -> None:
    x = _positions(history, has_epochs=has_epochs)
    values, lower, upper = _curve(history, metric).T
    ax.fill_between(x, lower, upper, color=style.color, alpha=0.15, linewidth=0, zorder=1)
    # An audit between two gaps has no area to shade.
    ax.vlines(x, lower, upper, color=style.color, alpha=0.55, linewidth=1.2, zorder=2)
    ax.plot(
        x,
        values,
        color=style.color,
        linestyle=style.line,
        linewidth=2.2,
        marker=style.marker,
        markersize=7,
        label=label or "_nolegend_",
        zorder=3,
    )


def _draw_limits(ax: Axes, runs: Mapping[str, AuditHistory], metric: str) -> None:
    budgets = {
        label: history.budget
        for label, history in runs.items()
        if history.budget is not None and history.budget.name == metric
    }
    limits = {budget.limit for budget in budgets.values()}
    for limit in sorted(limits):
        names = [label for label, budget in budgets.items() if budget.limit == limit and len(limits) > 1]
        ax.axhline(limit, color=_INK, linestyle="--", linewidth=1.4, zorder=1.5, label="_budget")
        _label_line(ax, limit, "\n".join([f"budget {_short(limit)}", *names]), above=True)
    chance = _chance(metric)
    if chance is not None:
        ax.axhline(chance, color=_QUIET, linestyle="-", linewidth=0.8, zorder=0.5, label="_chance")
        _label_line(ax, chance, f"chance {_short(chance)}", above=False)


def _label_line(ax: Axes, y: float, text: str, *, above: bool) -> None:
    """Write beside the axes, where no curve runs; the budget lies above chance, and so does its label."""
    ax.annotate(
        text,
        xy=(1.0, y),
        xycoords=ax.get_yaxis_transform(),
        xytext=(4, -3 if above else 3),
        textcoords="offset points",
        va="bottom" if above else "top",
        color=_INK if above else _QUIET,
        fontsize=_NOTE_SIZE,
    )


def _short(value: float) -> str:
    """Two decimals, or three where two would hide something."""
    return f"{value:.2f}" if abs(value - round(value, 2)) < 5e-4 else f"{value:.3f}"


def _chance(metric: str) -> float | None:
    if metric.startswith("tpr_at_fpr_"):
        return float(metric.removeprefix("tpr_at_fpr_"))
    return {"auc": 0.5, "advantage": 0.0}.get(metric)


def _mark_events(ax: Axes, runs: Mapping[str, AuditHistory], metric: str, *, has_epochs: bool) -> None:
    everywhere = [x for history in runs.values() for x in _positions(history, has_epochs=has_epochs)]
    middle = (min(everywhere) + max(everywhere)) / 2
    for style, history in zip(_styles(runs), runs.values(), strict=True):
        if history.stopped is not None:
            _mark_stop(ax, history, history.stopped, metric, style, has_epochs=has_epochs)
        failed = [_position(result, has_epochs=has_epochs) for result in history if result.status == "failed"]
        if failed:
            _mark_failed(ax, failed, style, middle=middle)


def _mark_stop(
    ax: Axes,
    history: AuditHistory,
    stopped: AuditResult,
    metric: str,
    style: _Style,
    *,
    has_epochs: bool,
) -> None:
    x, y = _position(stopped, has_epochs=has_epochs), _ends(stopped.metrics.get(metric))[0]
    if not math.isnan(y):
        ax.plot(
            [x],
            [y],
            marker="X",
            markersize=15,
            color=style.color,
            markeredgecolor="white",
            markeredgewidth=1.3,
            linestyle="none",
            label="_stopped",
            zorder=5,
        )
        _annotate(ax, "stopped", x, y, offset=(-11, 4), ha="right", va="bottom")
    kept = history.last_within_budget
    if kept is None:
        return
    x, y = _position(kept, has_epochs=has_epochs), _ends(kept.metrics.get(metric))[0]
    if not math.isnan(y):
        ax.plot(
            [x],
            [y],
            marker="o",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor=_INK,
            markeredgewidth=1.5,
            linestyle="none",
            label="_last within budget",
            zorder=4,
        )
        # The run's own curve rises to the stop, so below and to the right is free of it.
        _annotate(ax, "last within\nbudget", x, y, offset=(9, -4), ha="left", va="top")


def _mark_failed(ax: Axes, failed: Sequence[float], style: _Style, *, middle: float) -> None:
    ax.plot(
        failed,
        [0.035] * len(failed),
        transform=ax.get_xaxis_transform(),
        marker=style.marker,
        markersize=8,
        markerfacecolor="white",
        markeredgecolor=style.color,
        markeredgewidth=1.8,
        linestyle="none",
        label="_audit failed",
        zorder=4,
    )
    is_left = failed[0] <= middle
    ax.annotate(
        "audit failed",
        xy=(failed[0] if is_left else failed[-1], 0.035),
        xycoords=ax.get_xaxis_transform(),
        xytext=(8 if is_left else -8, 0),
        textcoords="offset points",
        ha="left" if is_left else "right",
        va="center",
        color=_INK,
        fontsize=_NOTE_SIZE,
    )


def _annotate(
    ax: Axes, text: str, x: float, y: float, *, offset: tuple[float, float], ha: str, va: str
) -> None:
    from matplotlib import patheffects

    ax.annotate(
        text,
        xy=(x, y),
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        color=_INK,
        fontsize=_NOTE_SIZE,
        linespacing=1.0,
        zorder=6,
        path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
    )


def _draw_losses(ax: Axes, history: AuditHistory, *, style: _Style, has_epochs: bool) -> None:
    x = _positions(history, has_epochs=has_epochs)
    for filled, losses in (
        (True, [result.member_loss for result in history]),
        (False, [result.non_member_loss for result in history]),
    ):
        y = [float("nan") if loss is None else loss for loss in losses]
        ax.plot(x, y, label="_nolegend_", zorder=3, **_loss_look(style, filled=filled))


def _loss_look(style: _Style, *, filled: bool) -> dict[str, Any]:
    return {
        "color": style.color,
        "linestyle": style.line,
        "linewidth": 2.2 if filled else 1.3,
        "marker": style.marker,
        "markersize": 7,
        "markerfacecolor": style.color if filled else "white",
        "markeredgewidth": 1.6,
    }


def _finish(ax: Axes, *, y_label: str, has_epochs: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("epoch" if has_epochs else "optimizer steps", fontsize=_LABEL_SIZE)
    ax.set_ylabel(y_label, fontsize=_LABEL_SIZE)
    ax.tick_params(labelsize=_LABEL_SIZE - 0.5)
    ax.margins(x=0.06, y=0.12)
    # Fractions of an epoch are real audits; with several epochs they are no ticks.
    spread = ax.dataLim.width
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=spread >= 2))
    ax.spines[["top", "right"]].set_visible(False)
    labels = ax.get_legend_handles_labels()[1]
    if labels:
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=min(3, len(labels)),
            frameon=False,
            fontsize=_LABEL_SIZE,
            borderaxespad=0.2,
            handlelength=2.6,
        )


def _counts(runs: Mapping[str, AuditHistory]) -> str:
    """The records of all runs, once if they are the same."""
    lines = {label: counts_line(history) for label, history in runs.items()}
    if len(set(lines.values())) == 1:
        return next(iter(lines.values()))
    return "; ".join(f"{label}: {line}" for label, line in lines.items())


def _percents(confidences: Iterable[float]) -> str:
    return " / ".join(dict.fromkeys(f"{100 * confidence:.4g} %" for confidence in confidences))


def _leakage_caption(runs: Mapping[str, AuditHistory], metric: str) -> str:
    at_bands = _percents(history.band_confidence for history in runs.values())
    at_intervals = _percents(history.confidence for history in runs.values())
    looks = [
        result.metrics[metric]
        for history in runs.values()
        for result in history.looks
        if metric in result.metrics
    ]
    text = f"{_counts(runs)}. "
    if any(measurement.band is not None for measurement in looks):
        text += f"Bands hold for all audits of a run together at {at_bands} (baseline: interval)"
        if any(measurement.band is None and measurement.interval is not None for measurement in looks):
            text += "; where none is resolved, the interval of that audit alone"
        text += "."
    elif any(measurement.interval is not None for measurement in looks):
        text += f"Shaded: interval of each audit alone at {at_intervals}."
    n_failed = sum(history.n_failed for history in runs.values())
    if n_failed:
        n_audits = sum(len(history) for history in runs.values())
        text += f" {n_failed} of {n_audits} audits failed: leakage there is unknown."
    return text


def _write_caption(ax: Axes, text: str) -> None:
    """Write below the x label, broken to the width of the axes."""
    figure = ax.get_figure()
    width = ax.get_window_extent().width / (figure.dpi if figure is not None else 100.0) * 72
    # A character of the default font is about half as wide as it is high.
    n_characters = max(30, int(width / (0.5 * _NOTE_SIZE)))
    ax.annotate(
        textwrap.fill(text, n_characters),
        xy=(0.0, 0.0),
        xycoords="axes fraction",
        xytext=(0, -39),
        textcoords="offset points",
        va="top",
        color=_QUIET,
        fontsize=_NOTE_SIZE,
        annotation_clip=False,
    )
