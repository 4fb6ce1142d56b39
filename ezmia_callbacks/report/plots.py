"""Leakage curves as matplotlib axes; nothing is shown, saved, or set globally."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.report.drawing import (
    FIGURE_WIDTH,
    INK,
    LABEL_SIZE,
    NOTE_SIZE,
    QUIET,
    STYLES,
    Style,
    annotate,
    label_line,
    legend_above,
    pyplot,
    short,
    write_caption,
)
from ezmia_callbacks.report.labels import (
    counts_line,
    histories_by_label,
    metric_label,
    over_budget_is,
    score_label,
)
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult, Measurement

if TYPE_CHECKING:
    from jaxtyping import Float64
    from matplotlib.axes import Axes

__all__ = ["plot_leakage_and_loss", "plot_leakage_and_utility", "plot_leakage_curve"]


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
    runs = histories_by_label(histories)
    _check_metric(runs, metric)
    if ax is None:
        _, ax = plt.subplots(figsize=(7.0, 4.8), layout="constrained")
    has_epochs = _has_epochs(runs)
    for style, (label, history) in zip(_styles(runs), runs.items(), strict=True):
        _draw_leakage(ax, history, metric, label=label, style=style, has_epochs=has_epochs)
    _draw_limits(ax, runs, metric)
    _mark_events(ax, runs, metric, has_epochs=has_epochs)
    _finish(ax, y_label=_leakage_label(runs, metric), has_epochs=has_epochs)
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
    runs = histories_by_label(histories)
    _check_metric(runs, "auc")
    if axes is None:
        figure, axes = plt.subplots(1, 2, figsize=(10.0, 4.0), sharex=True, layout="constrained")
        figure.get_layout_engine().set(wspace=0.04)
    if len(axes) != 2:
        raise ConfigurationError(f"Two axes are needed, got {len(axes)}: try `pyplot.subplots(1, 2)[1]`.")
    left, right = axes
    plot_leakage_curve(runs, ax=left)
    has_epochs = _has_epochs(runs)
    for style, history in zip(_styles(runs), runs.values(), strict=True):
        _draw_losses(right, history, style=style, has_epochs=has_epochs)
    for label, filled in (("members (trained on)", True), ("held out", False)):
        right.plot([], [], label=label, **_loss_look(Style(INK, "o", "-"), filled=filled))
    _finish(right, y_label="loss (nats per token)", has_epochs=has_epochs)
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
    runs = histories_by_label(histories)
    _check_metric(runs, metric)
    if all(result.non_member_loss is None for history in runs.values() for result in history):
        raise ConfigurationError("No audit has a held-out loss (`non_member_loss`) to draw leakage against.")
    if ax is None:
        _, ax = plt.subplots(figsize=(FIGURE_WIDTH, 4.9), layout="constrained")
    has_epochs = _has_epochs(runs)
    for style, (label, history) in zip(_styles(runs), runs.items(), strict=True):
        _draw_path(ax, history, metric, label=label, style=style, has_epochs=has_epochs)
    _draw_limits(ax, runs, metric)
    ax.set_xlabel("held-out loss (nats per token)", fontsize=LABEL_SIZE)
    ax.set_ylabel(_leakage_label(runs, metric), fontsize=LABEL_SIZE)
    ax.tick_params(labelsize=LABEL_SIZE - 0.5)
    ax.margins(x=0.1, y=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    legend_above(ax)
    of_dots = "Numbers: epochs. " if has_epochs else "Numbers: optimizer steps. "
    write_caption(ax, of_dots + "Left is useful, low leaks less. " + _leakage_caption(runs, metric, "Bars"))
    return ax


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


def _styles(runs: Mapping[str, AuditHistory]) -> list[Style]:
    return [STYLES[index % len(STYLES)] for index in range(len(runs))]


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
    ax: Axes, history: AuditHistory, metric: str, *, label: str, style: Style, has_epochs: bool
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


def _leakage_label(runs: Mapping[str, AuditHistory], metric: str) -> str:
    scores = {score_label(history[0].score) for history in runs.values()}
    attack = f"the {scores.pop()} attack" if len(scores) == 1 else "the attack"
    return f"{metric_label(metric)} of {attack}"


def _draw_path(
    ax: Axes, history: AuditHistory, metric: str, *, label: str, style: Style, has_epochs: bool
) -> None:
    x = np.array(
        [math.nan if result.non_member_loss is None else result.non_member_loss for result in history]
    )
    values, lower, upper = _curve(history, metric).T
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
        label=label or "_nolegend_",
        zorder=3,
    )
    known = np.flatnonzero(is_known)
    for before, after in pairwise(known):
        if after == before + 1:
            _draw_arrow(ax, (x[before], values[before]), (x[after], values[after]), style)
    for i in known:
        text = f"{_position(history[int(i)], has_epochs=has_epochs):.3g}"
        if history[int(i)].decision.stop:
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


def _draw_limits(ax: Axes, runs: Mapping[str, AuditHistory], metric: str) -> None:
    budgets = {
        label: history.budget
        for label, history in runs.items()
        if history.budget is not None and history.budget.name == metric
    }
    limits = {budget.limit for budget in budgets.values()}
    for limit in sorted(limits):
        names = [label for label, budget in budgets.items() if budget.limit == limit and len(limits) > 1]
        ax.axhline(limit, color=INK, linestyle="--", linewidth=1.4, zorder=1.5, label="_budget")
        label_line(ax, limit, "\n".join([f"budget {short(limit)}", *names]), above=True)
    chance = _chance(metric)
    if chance is not None:
        ax.axhline(chance, color=QUIET, linestyle="-", linewidth=0.8, zorder=0.5, label="_chance")
        label_line(ax, chance, f"chance {short(chance)}", above=False)


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
    style: Style,
    *,
    has_epochs: bool,
) -> None:
    x, y = _position(stopped, has_epochs=has_epochs), _ends(stopped.metrics.get(metric))[0]
    if not math.isnan(y):
        _draw_stop(ax, x, y, style)
        annotate(ax, "stopped", x, y, offset=(-11, 4), ha="right", va="bottom")
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
            markeredgecolor=INK,
            markeredgewidth=1.5,
            linestyle="none",
            label="_last within budget",
            zorder=4,
        )
        # The run's own curve rises to the stop, so below and to the right is free of it.
        annotate(ax, "last within\nbudget", x, y, offset=(9, -4), ha="left", va="top")


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


def _draw_losses(ax: Axes, history: AuditHistory, *, style: Style, has_epochs: bool) -> None:
    x = _positions(history, has_epochs=has_epochs)
    for filled, losses in (
        (True, [result.member_loss for result in history]),
        (False, [result.non_member_loss for result in history]),
    ):
        y = [float("nan") if loss is None else loss for loss in losses]
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


def _finish(ax: Axes, *, y_label: str, has_epochs: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("epoch" if has_epochs else "optimizer steps", fontsize=LABEL_SIZE)
    ax.set_ylabel(y_label, fontsize=LABEL_SIZE)
    ax.tick_params(labelsize=LABEL_SIZE - 0.5)
    ax.margins(x=0.06, y=0.12)
    # Fractions of an epoch are real audits; with several epochs they are no ticks.
    spread = ax.dataLim.width
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=spread >= 2))
    ax.spines[["top", "right"]].set_visible(False)
    legend_above(ax)


def _counts(runs: Mapping[str, AuditHistory]) -> str:
    """The records of all runs, once if they are the same."""
    lines = {label: counts_line(history) for label, history in runs.items()}
    if len(set(lines.values())) == 1:
        return next(iter(lines.values()))
    return "; ".join(f"{label}: {line}" for label, line in lines.items())


def _percents(confidences: Iterable[float]) -> str:
    return " / ".join(dict.fromkeys(f"{100 * confidence:.4g} %" for confidence in confidences))


def _leakage_caption(runs: Mapping[str, AuditHistory], metric: str, shape: str = "Bands") -> str:
    at_bands = _percents(history.band_confidence for history in runs.values())
    at_intervals = _percents(history.confidence for history in runs.values())
    looks = [
        result.metrics[metric]
        for history in runs.values()
        for result in history.audits_after_baseline
        if metric in result.metrics
    ]
    text = f"{_counts(runs)}. "
    if any(measurement.band is not None for measurement in looks):
        text += f"{shape} hold for all audits of a run together at {at_bands} (baseline: interval)"
        if any(measurement.band is None and measurement.interval is not None for measurement in looks):
            text += "; where none is resolved, the interval of that audit alone"
        text += "."
    elif any(measurement.interval is not None for measurement in looks):
        alone = "Shaded" if shape == "Bands" else shape
        text += f"{alone}: interval of each audit alone at {at_intervals}."
    budgets = [history.budget for history in runs.values()]
    over = over_budget_is([b.rule for b in budgets if b is not None and b.name == metric])
    if over:
        text += f" {over}"
    n_failed = sum(history.n_failed for history in runs.values())
    if n_failed:
        n_audits = sum(len(history) for history in runs.values())
        text += f" {n_failed} of {n_audits} audits failed: leakage there is unknown."
    return text
