"""Leakage curves as matplotlib axes; nothing is shown, saved, or set globally."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.report.curve import (
    LeakageCurve,
    Losses,
    Point,
    has_epochs,
    leakage_curve,
    limits_by_label,
    loss_curve,
)
from ezmia_callbacks.report.document import report_view
from ezmia_callbacks.report.drawing import (
    FIGURE_WIDTH,
    INK,
    LABEL_SIZE,
    NOTE_SIZE,
    QUIET,
    STYLES,
    Style,
    annotate,
    for_picture,
    label_line,
    legend_above,
    pyplot,
    short,
    write_caption,
)
from ezmia_callbacks.report.labels import chance_of, metric_label, over_budget_is, percent
from ezmia_callbacks.report.view import RunView
from ezmia_callbacks.results.history import AuditHistory

if TYPE_CHECKING:
    from jaxtyping import Float64
    from matplotlib.axes import Axes

__all__: list[str] = []


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
    plt = pyplot()
    runs = _runs(histories)
    _check_metric(runs, metric)
    if ax is None:
        _, ax = plt.subplots(figsize=(7.0, 4.8), layout="constrained")
    by_epoch = has_epochs(runs)
    curves = [leakage_curve(run, metric, by_epoch=by_epoch) for run in runs]
    for style, run, curve in zip(_styles(runs), runs, curves, strict=True):
        _draw_leakage(ax, curve, label=run.label, style=style)
    _draw_limits(ax, runs, metric)
    _mark_events(ax, curves, _styles(runs))
    _finish(ax, y_label=_leakage_label(runs, metric), by_epoch=by_epoch)
    write_caption(ax, _leakage_caption(runs, metric))
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
    plt = pyplot()
    runs = _runs(histories)
    _check_metric(runs, "auc")
    if axes is None:
        figure, axes = plt.subplots(1, 2, figsize=(10.0, 4.0), sharex=True, layout="constrained")
        figure.get_layout_engine().set(wspace=0.04)
    if len(axes) != 2:
        raise ConfigurationError(f"Two axes are needed, got {len(axes)}: try `pyplot.subplots(1, 2)[1]`.")
    left, right = axes
    plot_leakage_curve(histories, ax=left)
    by_epoch = has_epochs(runs)
    for style, run in zip(_styles(runs), runs, strict=True):
        _draw_losses(right, run, style=style, by_epoch=by_epoch)
    for label, filled in (("members (trained on)", True), ("held out", False)):
        right.plot([], [], label=label, **_loss_look(Style(INK, "o", "-"), filled=filled))
    _finish(right, y_label="loss (nats per token)", by_epoch=by_epoch)
    right.set_xlim(left.get_xlim())
    write_caption(right, f"Mean loss over the canaries' tokens: {_counts(runs)}.")
    return left, right


def plot_leakage_and_utility(
    histories: AuditHistory | Mapping[str, AuditHistory], *, metric: str = "auc", ax: Axes | None = None
) -> Axes:
    """Axes with the path of each run: held-out loss across, leakage upward, one dot an audit.

    Of two runs the better one is left (useful) and low (private). Bars are the bands, or the audit's own
    interval where there is no band. An audit without either figure is a gap.

    Args:
        histories: The audits of one run, or of several by label, e.g. full fine-tuning and LoRA ranks.
        metric: Name of a metric of the audits, e.g. `"auc"`.
        ax: Axes to draw on; by default those of a new figure.

    Raises:
        ConfigurationError: if there is no history, one has no audits, or no audit has `metric`, or a
            held-out loss.
        MissingDependencyError: if matplotlib is not installed.
    """
    plt = pyplot()
    runs = _runs(histories)
    _check_metric(runs, metric)
    if all(audit.non_member_loss is None for run in runs for audit in run.audits):
        raise ConfigurationError("No audit has a held-out loss (`non_member_loss`) to draw leakage against.")
    if ax is None:
        _, ax = plt.subplots(figsize=(FIGURE_WIDTH, 4.9), layout="constrained")
    by_epoch = has_epochs(runs)
    for style, run in zip(_styles(runs), runs, strict=True):
        _draw_path(ax, run, metric, style=style, by_epoch=by_epoch)
    _draw_limits(ax, runs, metric)
    ax.set_xlabel("held-out loss (nats per token)", fontsize=LABEL_SIZE)
    ax.set_ylabel(_leakage_label(runs, metric), fontsize=LABEL_SIZE)
    ax.tick_params(labelsize=LABEL_SIZE - 0.5)
    ax.margins(x=0.1, y=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    legend_above(ax)
    of_dots = "Numbers: epochs. " if by_epoch else "Numbers: optimizer steps. "
    write_caption(ax, of_dots + "Left is useful, low leaks less. " + _leakage_caption(runs, metric, "Bars"))
    return ax


def _check_metric(runs: Sequence[RunView], metric: str) -> None:
    """Raise if no audit resolves the metric: empty axes would read as "no leakage"."""
    measured = [audit.metrics for run in runs for audit in run.audits]
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


def _styles(runs: Sequence[RunView]) -> list[Style]:
    return [STYLES[index % len(STYLES)] for index in range(len(runs))]


def _columns(points: Sequence[Point]) -> Float64[np.ndarray, "n_audits 4"]:
    """Position, value and ends of each point; NaN for what is missing, which matplotlib draws as a gap."""
    rows = [(point.x, point.value, point.lower, point.upper) for point in points]
    return np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=np.float64)


def _runs(histories: AuditHistory | Mapping[str, AuditHistory]) -> tuple[RunView, ...]:
    """The runs, under names that matplotlib shows as they are."""
    return tuple(
        replace(
            run,
            label=for_picture(run.label),
            score=replace(run.score, label=for_picture(run.score.label)),
        )
        for run in report_view(histories).runs
    )


def _draw_leakage(ax: Axes, curve: LeakageCurve, *, label: str, style: Style) -> None:
    x, values, lower, upper = _columns(curve.points).T
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


def _leakage_label(runs: Sequence[RunView], metric: str) -> str:
    scores = {run.score.label for run in runs}
    attack = f"the {scores.pop()} attack" if len(scores) == 1 else "the attack"
    return f"{metric_label(metric)} of {attack}"


def _draw_path(ax: Axes, run: RunView, metric: str, *, style: Style, by_epoch: bool) -> None:
    curve = leakage_curve(run, metric, by_epoch=by_epoch)
    x = _columns(loss_curve(run, "non_member_loss", by_epoch=by_epoch))[:, 1]
    _, values, lower, upper = _columns(curve.points).T
    is_known = ~(np.isnan(x) | np.isnan(values))
    ax.vlines(x, lower, upper, color=style.color, alpha=0.45, linewidth=1.2, zorder=2)
    ax.plot(
        np.where(is_known, x, np.nan),
        np.where(is_known, values, np.nan),
        color=style.color,
        linestyle=style.line,
        linewidth=1.8,
        marker=style.marker,
        markersize=7,
        label=run.label or "_nolegend_",
        zorder=3,
    )
    known = np.flatnonzero(is_known)
    for before, after in pairwise(known):
        if after == before + 1:
            _draw_arrow(ax, (x[before], values[before]), (x[after], values[after]), style)
    for i in known.tolist():
        text = f"{curve.points[i].x:.3g}"
        if curve.points[i] == curve.stopped:
            text += " stopped"
            _draw_stop(ax, float(x[i]), float(values[i]), style)
        annotate(ax, text, float(x[i]), float(values[i]), offset=(6, 3), ha="left", va="bottom")


def _draw_arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], style: Style) -> None:
    """A head halfway along the line between two dots."""
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    ax.annotate(
        "",
        xy=middle,
        xytext=start,
        arrowprops={
            "arrowstyle": "-|>",
            "mutation_scale": 20,
            "color": style.color,
            "linewidth": 0,
            "shrinkA": 0,
            "shrinkB": 0,
        },
        zorder=3,
    )


def _draw_limits(ax: Axes, runs: Sequence[RunView], metric: str) -> None:
    by_label = limits_by_label(runs, metric)
    limits = set(by_label.values())
    for limit in sorted(limits):
        names = [label for label, own in by_label.items() if own == limit and len(limits) > 1]
        ax.axhline(limit, color=INK, linestyle="--", linewidth=1.4, zorder=1.5, label="_budget")
        label_line(ax, limit, "\n".join([f"budget {short(limit)}", *names]), above=True)
    chance = chance_of(metric)
    if chance is not None:
        ax.axhline(chance, color=QUIET, linestyle="-", linewidth=0.8, zorder=0.5, label="_chance")
        label_line(ax, chance, f"chance {short(chance)}", above=False)


def _mark_events(ax: Axes, curves: Sequence[LeakageCurve], styles: Sequence[Style]) -> None:
    positions = [point.x for curve in curves for point in curve.points]
    middle = (min(positions) + max(positions)) / 2
    for style, curve in zip(styles, curves, strict=True):
        _mark_stop(ax, curve, style)
        failed = [point.x for point in curve.points if point.is_failed]
        if failed:
            _mark_failed(ax, failed, style, middle=middle)


def _mark_stop(ax: Axes, curve: LeakageCurve, style: Style) -> None:
    stopped, kept = curve.stopped, curve.kept
    if stopped is not None and stopped.value is not None:
        _draw_stop(ax, stopped.x, stopped.value, style)
        annotate(ax, "stopped", stopped.x, stopped.value, offset=(-11, 4), ha="right", va="bottom")
    if kept is not None and kept.value is not None:
        ax.plot(
            [kept.x],
            [kept.value],
            marker="o",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor=INK,
            markeredgewidth=1.5,
            linestyle="none",
            label="_last within budget",
            zorder=4,
        )
        # The run's own curve rises to the stop, so below and to the right is free of it.
        annotate(ax, "last within\nbudget", kept.x, kept.value, offset=(9, -4), ha="left", va="top")


def _draw_stop(ax: Axes, x: float, y: float, style: Style) -> None:
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


def _mark_failed(ax: Axes, failed: Sequence[float], style: Style, *, middle: float) -> None:
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
        color=INK,
        fontsize=NOTE_SIZE,
    )


def _draw_losses(ax: Axes, run: RunView, *, style: Style, by_epoch: bool) -> None:
    which: tuple[tuple[bool, Losses], ...] = ((True, "member_loss"), (False, "non_member_loss"))
    for filled, losses in which:
        x, y, _, _ = _columns(loss_curve(run, losses, by_epoch=by_epoch)).T
        ax.plot(x, y, label="_nolegend_", zorder=3, **_loss_look(style, filled=filled))


def _loss_look(style: Style, *, filled: bool) -> dict[str, Any]:
    return {
        "color": style.color,
        "linestyle": style.line,
        "linewidth": 2.2 if filled else 1.3,
        "marker": style.marker,
        "markersize": 7,
        "markerfacecolor": style.color if filled else "white",
        "markeredgewidth": 1.6,
    }


def _finish(ax: Axes, *, y_label: str, by_epoch: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("epoch" if by_epoch else "optimizer steps", fontsize=LABEL_SIZE)
    ax.set_ylabel(y_label, fontsize=LABEL_SIZE)
    ax.tick_params(labelsize=LABEL_SIZE - 0.5)
    ax.margins(x=0.06, y=0.12)
    # Fractions of an epoch are real audits; with several epochs they are no ticks.
    spread = ax.dataLim.width
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=spread >= 2))
    ax.spines[["top", "right"]].set_visible(False)
    legend_above(ax)


def _counts(runs: Sequence[RunView]) -> str:
    """The records of all runs, once if they are the same."""
    lines = {run.label: f"{run.n_members} members, {run.n_non_members} non-members" for run in runs}
    if len(set(lines.values())) == 1:
        return next(iter(lines.values()))
    return "; ".join(f"{label}: {line}" for label, line in lines.items())


def _percents(confidences: Iterable[float]) -> str:
    return " / ".join(dict.fromkeys(percent(confidence) for confidence in confidences))


def _leakage_caption(runs: Sequence[RunView], metric: str, shape: str = "Bands") -> str:
    at_bands = _percents(run.band_confidence for run in runs)
    at_intervals = _percents(run.confidence for run in runs)
    figures = [
        audit.metrics[metric]
        for run in runs
        for audit in run.audits_after_baseline
        if metric in audit.metrics
    ]
    text = f"{_counts(runs)}. "
    if any(figure.band is not None for figure in figures):
        text += f"{shape} hold for all audits of a run together at {at_bands} (baseline: interval)"
        if any(figure.band is None and figure.interval is not None for figure in figures):
            text += "; where none is resolved, the interval of that audit alone"
        text += "."
    elif any(figure.interval is not None for figure in figures):
        alone = "Shaded" if shape == "Bands" else shape
        text += f"{alone}: interval of each audit alone at {at_intervals}."
    budgets = [run.budget for run in runs]
    over = over_budget_is([b.rule for b in budgets if b is not None and b.metric == metric])
    if over:
        text += f" {over}"
    n_failed = sum(run.n_failed for run in runs)
    if n_failed:
        n_audits = sum(run.n_audits for run in runs)
        text += f" {n_failed} of {n_audits} audits failed: leakage there is unknown."
    return text
