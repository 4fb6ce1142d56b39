"""What all pictures share: colors, sizes, words on axes; matplotlib loads when one is drawn."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ezmia_callbacks.errors import MissingDependencyError
from ezmia_callbacks.safe_text import for_document

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.axes import Axes

__all__: list[str] = []

INK, QUIET = "#222222", "#666666"
LABEL_SIZE, NOTE_SIZE = 10.5, 9.0
# Inches; on a phone's 390 pixels the smallest words then are 9 pixels high.
FIGURE_WIDTH = 5.2
# Points from the lower edge of the axes to the caption: past tick labels and the axis's own.
CAPTION_DROP = 39.0


@dataclass(frozen=True)
class Style:
    """Color, marker and line of one curve, the same in every panel; each alone tells the curves apart."""

    color: str
    marker: str
    line: Any


# Okabe and Ito's colors, which stay apart for color-blind readers; markers and lines do so in grey.
STYLES = (
    Style("#D55E00", "o", "-"),
    Style("#0072B2", "s", (0, (5, 1.6))),
    Style("#009E73", "^", (0, (5, 1.5, 1, 1.5))),
    Style("#CC79A7", "D", (0, (1.5, 1.2))),
    Style("#E69F00", "v", (0, (8, 2))),
    Style("#56B4E9", "P", (0, (3, 1, 1, 1, 1, 1))),
)


def pyplot() -> ModuleType:
    """The module `matplotlib.pyplot`.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as module
    except ImportError:
        raise MissingDependencyError('Plots need matplotlib: pip install "ezmia-callbacks[report]"') from None
    return module


def annotate(
    ax: Axes, text: str, x: float, y: float, *, offset: tuple[float, float], ha: str, va: str
) -> None:
    """Write beside a point of the data, readable on top of lines; `offset` is in points."""
    from matplotlib import patheffects

    ax.annotate(
        text,
        xy=(x, y),
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        color=INK,
        fontsize=NOTE_SIZE,
        linespacing=1.0,
        zorder=6,
        path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
        # Between letters the stroke alone would leave pieces of a line that read as a dash.
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.6},
    )


def label_line(ax: Axes, y: float, text: str, *, above: bool) -> None:
    """Write beside the axes, where no curve runs; the budget lies above chance, and so does its label."""
    ax.annotate(
        text,
        xy=(1.0, y),
        xycoords=ax.get_yaxis_transform(),
        xytext=(4, -3 if above else 3),
        textcoords="offset points",
        va="bottom" if above else "top",
        color=INK if above else QUIET,
        fontsize=NOTE_SIZE,
    )


def for_picture(text: str) -> str:
    """The text as matplotlib has to get it to show it as it is, not as a formula."""
    return for_document(text).replace("$", r"\$")


def legend_above(ax: Axes, *, n_columns: int = 3) -> None:
    """A legend on top of the axes, if a curve has a label."""
    labels = ax.get_legend_handles_labels()[1]
    if labels:
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=min(n_columns, len(labels)),
            frameon=False,
            fontsize=LABEL_SIZE,
            borderaxespad=0.2,
            handlelength=2.6,
        )


def short(value: float) -> str:
    """Two decimals, or three where two would hide something."""
    return f"{value:.2f}" if abs(value - round(value, 2)) < 5e-4 else f"{value:.3f}"


def width_in_points(ax: Axes) -> float:
    """Width of the axes as they are now, in points (1/72 inch)."""
    figure = ax.get_figure()
    dpi = figure.dpi if figure is not None else 100.0
    return float(ax.get_window_extent().width / dpi * 72)


def write_caption(ax: Axes, text: str, *, drop: float = CAPTION_DROP) -> None:
    """Write `drop` points below the axes, broken to their width."""
    # A character of the default font is about half as wide as it is high.
    n_characters = max(30, int(width_in_points(ax) / (0.5 * NOTE_SIZE)))
    ax.annotate(
        textwrap.fill(text, n_characters),
        xy=(0.0, 0.0),
        xycoords="axes fraction",
        xytext=(0, -drop),
        textcoords="offset points",
        va="top",
        color=QUIET,
        fontsize=NOTE_SIZE,
        annotation_clip=False,
    )
