"""One record's tokens as matplotlib axes: the only picture that shows text, and only when asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.scores import ez_score
from ezmia_callbacks.report.drawing import (
    FIGURE_WIDTH,
    INK,
    LABEL_SIZE,
    NOTE_SIZE,
    QUIET,
    pyplot,
    width_in_points,
    write_caption,
)
from ezmia_callbacks.scoring.statistics import TokenStatistics

if TYPE_CHECKING:
    from jaxtyping import Float64
    from matplotlib.axes import Axes

__all__: list[str] = []

# Of the monospaced font, relative to its height.
_CHARACTER_WIDTH = 0.602
_LINE_HEIGHT = 29.0
_SHIFT_SIZE = NOTE_SIZE - 1.0
# Orange up and blue down: apart for color-blind readers; in grey the signed numbers tell.
_UP, _DOWN = (213, 94, 0), (0, 114, 178)
_MARKS = {"\n": "↵", "\r": "↵", "\t": "→"}


def plot_tokens(
    tokens: Sequence[str],
    target: TokenStatistics,
    reference: TokenStatistics,
    *,
    record: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Axes with the text of one record, its error-zone tokens colored by how far training moved them.

    The error zone is what the EZ score reads: tokens that the target model predicts wrongly. Each has its
    shift below it, target minus reference log-probability in nats, and is orange if it moved up and blue if
    it moved down. The other tokens are grey.

    This picture shows text of the record, which may be private. Nothing in the package draws it by itself.

    Args:
        tokens: The record's scored tokens as text, in order.
        target: Token statistics under the fine-tuned model.
        reference: Token statistics of the same tokens under the reference.
        record: Which record of the statistics it is, e.g. the one with the highest score.
        ax: Axes to draw on; by default those of a new figure that is high enough.

    Raises:
        ConfigurationError: if the statistics do not belong together, have no such record, or `tokens` are
            not as many as its scored tokens.
        MissingDependencyError: if matplotlib is not installed.
    """
    plt = pyplot()
    span = _span(tokens, target, reference, record)
    shifts = target.log_probs[span].astype(np.float64) - reference.log_probs[span]
    is_error = ~target.is_correct[span]
    score = ez_score(
        target.log_probs[span], reference.log_probs[span], target.is_correct[span], reference.is_correct[span]
    )
    shown = [_visible(token) for token in tokens]
    character = _CHARACTER_WIDTH * LABEL_SIZE
    if ax is None:
        n_lines = len(_break(shown, int((FIGURE_WIDTH - 0.4) * 72 / character)))
        height = (n_lines * _LINE_HEIGHT + 75.0) / 72
        figure, ax = plt.subplots(figsize=(FIGURE_WIDTH, height))
        figure.subplots_adjust(left=0.2 / FIGURE_WIDTH, right=1 - 0.2 / FIGURE_WIDTH)
        figure.subplots_adjust(bottom=60.0 / 72 / height, top=1 - 10.0 / 72 / height)
    ax.set_axis_off()
    largest = float(np.abs(shifts[is_error]).max(initial=1e-9))
    lines = _break(shown, int(width_in_points(ax) / character))
    for row, line in enumerate(lines):
        for index, column in line:
            shift = float(shifts[index]) if is_error[index] else None
            _draw_token(ax, shown[index], column * character, row * _LINE_HEIGHT, shift, largest)
    write_caption(ax, _caption(shifts[is_error], float(score[0])), drop=4.0)
    return ax


def _span(tokens: Sequence[str], target: TokenStatistics, reference: TokenStatistics, record: int) -> slice:
    if not np.array_equal(target.offsets, reference.offsets):
        raise ConfigurationError(
            f"The statistics are of other records: the target's are {target.n_records} with "
            f"{target.n_tokens} tokens, the reference's {reference.n_records} with {reference.n_tokens}."
        )
    if isinstance(record, bool) or not 0 <= record < target.n_records:
        raise ConfigurationError(f"`record` must lie in 0 .. {target.n_records - 1}, got {record!r}.")
    span = slice(int(target.offsets[record]), int(target.offsets[record + 1]))
    if isinstance(tokens, str) or len(tokens) != span.stop - span.start:
        got = "one string" if isinstance(tokens, str) else f"{len(tokens)} tokens"
        raise ConfigurationError(
            f"Record {record} has {span.stop - span.start} scored tokens, got {got}: pass the text of each "
            "token that carries loss, e.g. `tokenizer.convert_ids_to_tokens(input_ids)[1:]`."
        )
    return span


def _visible(token: str) -> str:
    """A token in which every character takes one place on a line."""
    return "".join(_MARKS.get(character, character) for character in token) or "∅"


def _break(tokens: Sequence[str], n_columns: int) -> list[list[tuple[int, int]]]:
    """Lines of (index, column); a token is as wide as its text, or as the shift below it."""
    lines: list[list[tuple[int, int]]] = [[]]
    column = 0
    for index, token in enumerate(tokens):
        width = max(len(token), 4) + 1
        if lines[-1] and column + width > n_columns:
            lines.append([])
            column = 0
        lines[-1].append((index, column))
        column += width
    return lines


def _draw_token(ax: Axes, token: str, x: float, y: float, shift: float | None, largest: float) -> None:
    style: dict[str, Any] = {
        "xy": (0.0, 1.0),
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "va": "top",
        "family": "monospace",
        "annotation_clip": False,
        # Text of a record is no formula.
        "parse_math": False,
    }
    if shift is None:
        ax.annotate(token, xytext=(x, -y), color=QUIET, fontsize=LABEL_SIZE, **style)
        return
    color = _color(shift, largest)
    box = {"facecolor": color, "edgecolor": INK, "linewidth": 0.5, "pad": 1.6}
    ax.annotate(token, xytext=(x, -y), color=INK, fontsize=LABEL_SIZE, bbox=box, **style)
    ax.annotate(f"{shift:+.1f}", xytext=(x, -y - 14.0), color=INK, fontsize=_SHIFT_SIZE, **style)


def _color(shift: float, largest: float) -> tuple[float, float, float]:
    """White at no shift; at the largest a tint on which black words can still be read."""
    strength = 0.7 * min(1.0, abs(shift) / largest)
    red, green, blue = _UP if shift > 0 else _DOWN
    return tuple(1 - strength * (1 - part / 255) for part in (red, green, blue))  # type: ignore[return-value]


def _caption(shifts: Float64[np.ndarray, " n_errors"], score: float) -> str:
    up, down = shifts[shifts > 0], shifts[shifts < 0]
    return (
        f"EZ score {score:.3f}. Boxed: the {len(shifts)} tokens predicted wrongly, with their shift in nats; "
        f"{len(up)} moved up by {up.sum():.1f} in all, {len(down)} down by {-down.sum():.1f}."
    )
