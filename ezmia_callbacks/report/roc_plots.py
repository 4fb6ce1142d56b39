"""ROC curves and score histograms as matplotlib axes; nothing is shown, saved, or set globally."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.intervals import tpr_at_fpr_interval
from ezmia_callbacks.functional.roc import ScoresByClass, auc, roc_curve, split_by_class
from ezmia_callbacks.report.drawing import (
    FIGURE_WIDTH,
    INK,
    LABEL_SIZE,
    NOTE_SIZE,
    QUIET,
    STYLES,
    Style,
    for_picture,
    legend_above,
    pyplot,
    width_in_points,
    write_caption,
)
from ezmia_callbacks.report.labels import moment, percent, score_label
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64
    from matplotlib.axes import Axes

__all__: list[str] = []

_N_CURVES = 4
_N_RATES = 40
# A value that this share of a class has in common is a tie that a reader should see.
_TIED_SHARE = 0.02
_N_TIES_NAMED = 3


def plot_roc(
    scores: AuditHistory | Mapping[str, Float[np.ndarray, " n"]] | Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Axes with the ROC of each audit on logarithmic scales, and what the canaries certify of the last.

    The curves are the operating points that the records reach, without interpolation. Shaded is the exact
    interval at each false-positive rate alone (`functional.tpr_at_fpr_interval`), for the last curve, from
    the lowest rate that this many non-members can certify; the curve itself is biased upward there and may
    lie above it. Rates under 1 / n_non_members are hatched: no threshold of these records has one.

    Args:
        scores: Membership scores of the records; of several audits by label, in their order; or a history
            of this process, of which at most 4 audits are drawn, evenly from the first to the last.
        is_member: True where the record was in the training set.
        confidence: Coverage of the shaded interval at each rate alone, in (0, 1).
        ax: Axes to draw on; by default those of a new figure.

    Raises:
        ConfigurationError: if there are no scores, arrays do not match, a score is not finite, or
            `confidence` is outside its range.
        TooFewCanariesError: if there are no members, or no non-members.
        MissingDependencyError: if matplotlib is not installed.
    """
    plt = pyplot()
    curves = _scores_by_label(scores)
    by_class = [split_by_class(values, is_member) for values in curves.values()]
    n_members, n_non_members = len(by_class[0].members), len(by_class[0].non_members)
    lower, upper, rates = _certified(list(curves.values())[-1], is_member, confidence=confidence)
    if ax is None:
        _, ax = plt.subplots(figsize=(FIGURE_WIDTH, 5.0), layout="constrained")

    first = 1.0 / n_non_members
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(first / 3, 1.0)
    ax.set_ylim(min(first, 1.0 / n_members) / 1.5, 1.15)
    styles = _styles_to(len(curves))
    ax.fill_between(rates, lower, upper, color=styles[-1].color, alpha=0.18, linewidth=0, zorder=1)
    for style, (label, values) in zip(styles, curves.items(), strict=True):
        x, y = _staircase(values, is_member, first=first)
        ax.plot(
            x,
            y,
            drawstyle="steps-post",
            color=style.color,
            linestyle=style.line,
            linewidth=2.2,
            label=f"{label}{': ' if label else ''}AUC {auc(values, is_member):.3f}",
            zorder=3,
        )
    ends = np.array([first / 3, 1.0])
    ax.plot(ends, ends, color=QUIET, linewidth=0.8, label="_chance", zorder=0.5)
    _mark_unresolved(ax, first, n_non_members)
    _label_axes(ax, "false-positive rate", "true-positive rate")
    legend_above(ax, n_columns=2 if width_in_points(ax) > 300 else 1)
    write_caption(ax, _roc_caption(scores, curves, by_class[0], rates, confidence))
    return ax


def plot_score_histograms(
    scores: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    score: str = "",
    n_bins: int = 30,
    ax: Axes | None = None,
) -> Axes:
    """Axes with the scores of members and of non-members in the same bins, as shares of each class.

    A value that 2 % of a class or more have in common stands as a spike of its own: ties help no attacker,
    and a bin would hide them.

    Args:
        scores: Membership scores of the records, finite.
        is_member: True where the record was in the training set.
        score: Name of the score, for the axis, e.g. `"ez"`.
        n_bins: Number of bins, >= 1.
        ax: Axes to draw on; by default those of a new figure.

    Raises:
        ConfigurationError: if arrays do not match, a score is not finite, or `n_bins` is not positive.
        TooFewCanariesError: if there are no members, or no non-members.
        MissingDependencyError: if matplotlib is not installed.
    """
    plt = pyplot()
    by_class = split_by_class(scores, is_member)
    if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
        raise ConfigurationError(f"`n_bins` must be an integer >= 1, got {n_bins!r}.")
    edges = np.histogram_bin_edges(np.concatenate(by_class), bins=n_bins)
    if ax is None:
        _, ax = plt.subplots(figsize=(FIGURE_WIDTH, 4.4), layout="constrained")

    tied: dict[float, list[str]] = {}
    for name, values, style, is_filled in (
        ("members", by_class.members, STYLES[0], True),
        ("non-members", by_class.non_members, STYLES[1], False),
    ):
        shares = np.histogram(values, edges)[0] / len(values)
        # The classes overlap: one is an area, the other an outline.
        ax.stairs(
            shares,
            edges,
            fill=is_filled,
            color=style.color,
            alpha=0.35 if is_filled else None,
            linestyle="-" if is_filled else style.line,
            linewidth=0 if is_filled else 1.9,
            label=f"{name} ({len(values)})",
            zorder=2 if is_filled else 3,
        )
        for value, share in _ties(values):
            _draw_spike(ax, value, share, style, is_filled=is_filled)
            tied.setdefault(value, []).append(f"{100 * share:.3g} % of {name}")
    ax.set_ylim(bottom=0.0)
    _label_axes(ax, f"{score_label(score)} score".strip(), "share of the class")
    legend_above(ax, n_columns=2)
    write_caption(ax, _ties_caption(tied))
    return ax


def _scores_by_label(
    scores: AuditHistory | Mapping[str, Float[np.ndarray, " n"]] | Float[np.ndarray, " n"],
) -> dict[str, Float64[np.ndarray, " n"]]:
    if isinstance(scores, AuditHistory):
        kept = [result for result in scores if result.scores is not None]
        if not kept:
            raise ConfigurationError(
                "The history holds no record's score: those are never saved, so pass the history of the "
                "process that trained, or the scores themselves."
            )
        shown = np.unique(np.linspace(0, len(kept) - 1, min(_N_CURVES, len(kept))).round().astype(int))
        return {_curve_of(kept[i]): np.asarray(kept[i].scores, dtype=np.float64) for i in shown}
    by_label = dict(scores) if isinstance(scores, Mapping) else {"": scores}
    if not by_label:
        raise ConfigurationError("Got no scores: at least those of one audit are needed.")
    return {for_picture(label): np.asarray(values, dtype=np.float64) for label, values in by_label.items()}


def _curve_of(result: AuditResult) -> str:
    """When the audit was made, and of which score its curve is, where several are judged."""
    by = f" ({score_label(result.decided_by)})" if result.judged_beside else ""
    return moment(result) + by


def _styles_to(n: int) -> list[Style]:
    """The styles of `n` curves; the last curve, which carries the band, always has the first style."""
    return [STYLES[(n - 1 - i) % len(STYLES)] for i in range(n)]


def _staircase(
    scores: Float64[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"], *, first: float
) -> tuple[Float64[np.ndarray, " n_points"], Float64[np.ndarray, " n_points"]]:
    """Largest true-positive rate at each false-positive rate reached, from `first` on."""
    curve = roc_curve(scores, is_member)
    x = np.unique(np.concatenate([[first], curve.fpr[curve.fpr > 0]]))
    return x, curve.tpr[np.searchsorted(curve.fpr, x, side="right") - 1]


def _certified(
    scores: Float64[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"], *, confidence: float
) -> tuple[Float64[np.ndarray, " n_rates"], Float64[np.ndarray, " n_rates"], Float64[np.ndarray, " n_rates"]]:
    """Lower ends, upper ends, and the false-positive rates that the non-members can certify."""
    n_non_members = int(np.count_nonzero(~np.asarray(is_member)))
    rates, lower, upper = [], [], []
    for rate in np.geomspace(min(0.5, 1.0 / n_non_members), 0.99, _N_RATES):
        try:
            interval = tpr_at_fpr_interval(scores, is_member, fpr=float(rate), confidence=confidence)
        except TooFewCanariesError:
            continue
        rates.append(float(rate))
        lower.append(interval.lower)
        upper.append(interval.upper)
    return np.array(lower), np.array(upper), np.array(rates)


def _mark_unresolved(ax: Axes, first: float, n_non_members: int) -> None:
    ax.axvspan(
        first / 3,
        first,
        facecolor="none",
        edgecolor=QUIET,
        hatch="////",
        alpha=0.35,
        linewidth=0,
        label="_unresolved",
        zorder=0.4,
    )
    ax.annotate(
        f"not resolved by {n_non_members} non-members",
        xy=(first / np.sqrt(3), 0.5),
        xycoords=ax.get_xaxis_transform(),
        ha="center",
        va="center",
        rotation=90,
        color=INK,
        fontsize=NOTE_SIZE,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )


def _roc_caption(
    scores: object,
    curves: Mapping[str, object],
    by_class: ScoresByClass,
    rates: Float64[np.ndarray, " n_rates"],
    confidence: float,
) -> str:
    text = f"{len(by_class.members)} members, {len(by_class.non_members)} non-members. "
    if isinstance(scores, AuditHistory) and len(curves) < len(scores):
        text += f"{len(curves)} of {len(scores)} audits shown. "
    last = list(curves)[-1]
    whose = f"Shaded ({last}): " if len(curves) > 1 else "Shaded: "
    if len(rates):
        text += whose + f"exact {percent(confidence)} interval at each rate alone, "
        return text + f"from {100 * rates[0]:.2g} % FPR, the lowest that is certified. Thin line: chance."
    return text + "No rate is certified: too few non-members. Thin line: chance."


def _ties(values: Float64[np.ndarray, " n"]) -> list[tuple[float, float]]:
    """Values that several records share, with their share of the class, if that is large enough to see."""
    distinct, counts = np.unique(values, return_counts=True)
    is_shown = (counts >= 2) & (counts >= _TIED_SHARE * len(values))
    return [
        (float(value), float(count / len(values)))
        for value, count in zip(distinct[is_shown], counts[is_shown], strict=True)
    ]


def _draw_spike(ax: Axes, value: float, share: float, style: Style, *, is_filled: bool) -> None:
    ax.plot(
        [value, value],
        [0.0, share],
        color=style.color,
        linestyle="-" if is_filled else style.line,
        linewidth=1.6,
        marker=style.marker,
        markevery=[1],
        markersize=7,
        markerfacecolor=style.color if is_filled else "white",
        markeredgewidth=1.6,
        label="_tied",
        zorder=4,
    )


def _ties_caption(tied: Mapping[float, list[str]]) -> str:
    if not tied:
        return "No value is shared by 2 % of a class."
    named = [f"{value:.3g}: {', '.join(shares)}" for value, shares in sorted(tied.items())]
    text = "Spikes: records tied at one value (" + "; ".join(named[:_N_TIES_NAMED])
    n_more = len(named) - _N_TIES_NAMED
    return text + (f"; {n_more} values more)." if n_more > 0 else ").")


def _label_axes(ax: Axes, x_label: str, y_label: str) -> None:
    ax.set_xlabel(x_label, fontsize=LABEL_SIZE)
    ax.set_ylabel(y_label, fontsize=LABEL_SIZE)
    ax.tick_params(labelsize=LABEL_SIZE - 0.5)
    ax.spines[["top", "right"]].set_visible(False)
