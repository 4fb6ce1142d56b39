"""Geometry of the curves on a page: from a report's view to lines, marks and labels that a template draws."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ezmia_callbacks.report.curve import (
    LeakageCurve,
    Losses,
    Point,
    has_epochs,
    leakage_curve,
    limits_by_label,
    loss_curve,
    position,
)
from ezmia_callbacks.report.labels import metric_label, over_budget_is, percent
from ezmia_callbacks.report.shown import numbers_shown
from ezmia_callbacks.report.view import AuditView, IntervalView, MeasuredView, RunView

__all__: list[str] = []

# Units of the drawing; a phone shows them a fifth smaller, a desk a fifth larger.
_WIDTH, _HEIGHT = 440.0, 292.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 430.0, 14.0, 250.0
_INSET = 14.0
_TIP_LINE, _TIP_CHARACTER = 16.0, 6.3
_N_LOOKS = 6
_MOST_TIP_LINES = 12
# In rates or in nats per token: less than this is no change to look at.
_LEAST_SPAN = 0.2


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what is written there."""

    at: float
    label: str


@dataclass(frozen=True)
class Level:
    """A horizontal line across the plot; `kind` is `"budget"` or `"chance"`."""

    y: float
    label: str
    kind: str


@dataclass(frozen=True)
class Series:
    """One curve: `look` picks color, dash and marker, `kind` is `"leakage"`, `"member"` or `"held-out"`."""

    look: int
    kind: str
    bands: tuple[str, ...]
    whiskers: str
    lines: str
    markers: str
    unknown: str


@dataclass(frozen=True)
class Mark:
    """An event on a curve: `kind` is `"stop"` or `"kept"`."""

    x: float
    y: float
    kind: str
    look: int
    label: str


@dataclass(frozen=True)
class Column:
    """All that was measured at one moment, shown when it is pointed at or reached by keyboard."""

    x: float
    left: float
    width: float
    label: str
    lines: tuple[str, ...]
    dots: tuple[tuple[float, float], ...]
    tip_x: float
    tip_y: float
    tip_width: float
    tip_height: float


@dataclass(frozen=True)
class Chart:
    """A drawing of `width` by `height` units; y grows downwards."""

    name: str
    title: str
    description: str
    caption: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    levels: tuple[Level, ...]
    gaps: tuple[tuple[float, float], ...]
    series: tuple[Series, ...]
    marks: tuple[Mark, ...]
    columns: tuple[Column, ...]
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM


@dataclass(frozen=True)
class Forest:
    """Where a figure and its interval lie on a strip of 120 units that starts at `low` and ends at `high`."""

    value: float
    lower: float
    upper: float
    chance: float


@dataclass(frozen=True)
class _Curve:
    """All points of a curve, and the numbers of those that are drawn."""

    look: int
    kind: str
    name: str
    points: tuple[Point, ...]
    numbers: Sequence[int]

    @property
    def drawn(self) -> list[Point]:
        return [self.points[i] for i in self.numbers]


@dataclass(frozen=True)
class _Frame:
    """Maps data to the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        span = self.x_high - self.x_low or 1.0
        return round(_LEFT + _INSET + (value - self.x_low) / span * (_RIGHT - _LEFT - 2 * _INSET), 2)

    def y(self, value: float) -> float:
        return round(_BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_BOTTOM - _TOP), 2)


def leakage_chart(runs: Sequence[RunView], metric: str) -> Chart | None:
    """The curve of one metric for all runs of a document; None if no audit resolves it.

    Args:
        runs: The runs of a report.
        metric: Name of a metric.
    """
    by_epoch = has_epochs(runs)
    leakage = [leakage_curve(run, metric, by_epoch=by_epoch) for run in runs]
    curves = [
        _Curve(index % _N_LOOKS, "leakage", _cut(run.label, 24), curve.points, numbers_shown(run))
        for index, (run, curve) in enumerate(zip(runs, leakage, strict=True))
    ]
    limits = limits_by_label(runs, metric)
    chance = next((m.chance for run in runs for m in run.metrics if m.name == metric), None)
    values = [value for curve in curves for value in _values(curve)]
    if not values:
        return None
    extra = [*limits.values(), *([] if chance is None else [chance])]
    frame = _frame(curves, low=min(values + extra), high=max(values + extra), ceiling=1.0)
    score = {run.score.label for run in runs}
    attack = f"the {score.pop()} attack" if len(score) == 1 else "the attack"
    return Chart(
        name=f"leakage-{metric.replace('.', '-')}",
        title=f"{metric_label(metric)} of {attack}",
        description=_describe(curves, limits),
        caption=_caption(runs, metric),
        x_label="epoch" if by_epoch else "optimizer steps",
        y_label=metric_label(metric),
        x_ticks=_x_ticks(frame),
        y_ticks=_y_ticks(frame),
        levels=tuple(_levels(frame, limits, chance)),
        gaps=tuple(_gaps(curves, frame)),
        series=tuple(_series(curve, frame) for curve in curves),
        marks=tuple(_marks(leakage, frame)),
        columns=_columns(runs, curves, frame, metric_label(metric), by_epoch=by_epoch),
    )


def loss_chart(runs: Sequence[RunView]) -> Chart | None:
    """The losses over members and non-members of all runs of a document; None if none is known.

    Args:
        runs: The runs of a report.
    """
    by_epoch = has_epochs(runs)
    which: tuple[tuple[str, str, Losses], ...] = (
        ("member", "members", "member_loss"),
        ("held-out", "held out", "non_member_loss"),
    )
    curves = [
        _Curve(
            look=index % _N_LOOKS,
            kind=kind,
            name=" ".join(filter(None, [_cut(run.label, 24), label])),
            points=loss_curve(run, losses, by_epoch=by_epoch),
            numbers=numbers_shown(run),
        )
        for index, run in enumerate(runs)
        for kind, label, losses in which
    ]
    values = [value for curve in curves for value in _values(curve)]
    if not values:
        return None
    frame = _frame(curves, low=min(values), high=max(values), ceiling=math.inf)
    return Chart(
        name="loss",
        title="Member and held-out loss",
        description=_describe(curves, {}),
        caption="Mean loss over the canaries' scored tokens. Filled marks: members, which were trained on; "
        "hollow: non-members, the held-out loss.",
        x_label="epoch" if by_epoch else "optimizer steps",
        y_label="nats per token",
        x_ticks=_x_ticks(frame),
        y_ticks=_y_ticks(frame),
        levels=(),
        gaps=tuple(_gaps(curves[:1] if len(runs) == 1 else curves, frame)),
        series=tuple(_series(curve, frame) for curve in curves),
        marks=(),
        columns=_columns(runs, curves, frame, "loss", by_epoch=by_epoch),
    )


def forest(value: float | None, ends: IntervalView | MeasuredView | None, *, low: float) -> Forest | None:
    """Where an AUC with its interval lies on a strip from `low` to 1; None without either.

    Args:
        value: The AUC.
        ends: What has its `lower` and its `upper` end.
        low: Left end of the strip, below 1.
    """
    if value is None or ends is None:
        return None

    def at(value: float) -> float:
        return round(4 + 112 * (value - low) / (1.0 - low), 1)

    return Forest(at(value), at(ends.lower), at(ends.upper), at(0.5))


def _values(curve: _Curve) -> list[float]:
    every = (end for point in curve.points for end in (point.value, point.lower, point.upper))
    return [end for end in every if end is not None]


def _frame(curves: Sequence[_Curve], *, low: float, high: float, ceiling: float) -> _Frame:
    """Axes with some air around the data; a flat curve stays flat instead of filling the height."""
    positions = [point.x for curve in curves for point in curve.points]
    air = 0.12 * (high - low) + max(0.0, _LEAST_SPAN - (high - low)) / 2
    return _Frame(min(positions), max(positions), max(0.0, low - air), min(ceiling, high + air))


def _steps(low: float, high: float, *, n_most: int) -> tuple[list[float], float]:
    """Round numbers inside a range, and their distance."""
    raw = (high - low) / n_most or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)], step


def _x_ticks(frame: _Frame) -> tuple[Tick, ...]:
    values, _ = _steps(frame.x_low, frame.x_high, n_most=7)
    # Fractions of an epoch are real audits; with several epochs they are no ticks.
    if frame.x_high - frame.x_low >= 2:
        values = [value for value in values if float(value).is_integer()]
    return tuple(Tick(frame.x(value), f"{value:g}") for value in values)


def _y_ticks(frame: _Frame) -> tuple[Tick, ...]:
    values, step = _steps(frame.y_low, frame.y_high, n_most=6)
    n_decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return tuple(Tick(frame.y(value), f"{value:.{n_decimals}f}") for value in values)


def _levels(frame: _Frame, limits: Mapping[str, float], chance: float | None) -> Iterator[Level]:
    if chance is not None:
        yield Level(frame.y(chance), f"chance {_short(chance)}", "chance")
    labels: dict[float, list[str]] = {}
    for label, limit in limits.items():
        labels.setdefault(limit, []).append(label)
    for limit in sorted(labels):
        of = f" ({_cut(', '.join(labels[limit]), 24)})" if len(labels) > 1 else ""
        yield Level(frame.y(limit), f"budget {_short(limit)}{of}", "budget")


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value - round(value, 2)) < 5e-4 else f"{value:.3f}"


def _gaps(curves: Sequence[_Curve], frame: _Frame) -> Iterator[tuple[float, float]]:
    """Start and width of the stretches where a single run is unknown; several runs would hide each other."""
    if len(curves) != 1:
        return
    points = curves[0].points
    for index in curves[0].numbers:
        point = points[index]
        if point.value is not None:
            continue
        before, after = points[max(index - 1, 0)].x, points[min(index + 1, len(points) - 1)].x
        left, right = frame.x((before + point.x) / 2), frame.x((point.x + after) / 2)
        left = left if index else left - _INSET / 2
        right = right if index < len(points) - 1 else right + _INSET / 2
        yield left, round(right - left, 2)


def _stretches(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The measured points, broken wherever one is missing."""
    stretch: list[Point] = []
    for point in points:
        if point.value is None:
            if stretch:
                yield stretch
            stretch = []
        else:
            stretch.append(point)
    if stretch:
        yield stretch


def _series(curve: _Curve, frame: _Frame) -> Series:
    drawn = curve.drawn
    measured = [point for point in drawn if point.value is not None]
    certain = [point for point in measured if point.lower is not None]
    return Series(
        look=curve.look,
        kind=curve.kind,
        bands=tuple(_band(stretch, frame) for stretch in _stretches(drawn)),
        whiskers=" ".join(
            f"M{frame.x(p.x)} {frame.y(p.lower or 0.0)}V{frame.y(p.upper or 0.0)}" for p in certain
        ),
        lines=" ".join(_line(stretch, frame) for stretch in _stretches(drawn)),
        markers=" ".join(
            marker_path(curve.look, frame.x(point.x), frame.y(point.value or 0.0)) for point in measured
        ),
        unknown=" ".join(_cross(frame.x(point.x), _BOTTOM - 9) for point in drawn if point.value is None),
    )


def _line(points: Sequence[Point], frame: _Frame) -> str:
    return "M" + "L".join(f"{frame.x(point.x)} {frame.y(point.value or 0.0)}" for point in points)


def _band(points: Sequence[Point], frame: _Frame) -> str:
    """Outline of the area between the ends; empty where a stretch has no ends to speak of."""
    inside = [(frame.x(p.x), p.lower, p.upper) for p in points]
    upper = [f"{x} {frame.y(high)}" for x, _, high in inside if high is not None]
    lower = [f"{x} {frame.y(low)}" for x, low, _ in inside if low is not None]
    if len(upper) < 2:
        return ""
    return f"M{'L'.join([*upper, *reversed(lower)])}Z"


def marker_path(look: int, x: float, y: float) -> str:
    """A shape of its own for each look, so that color is never needed to tell runs apart."""
    r = 4.0
    shapes = (
        f"M{x - r} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        f"M{x - 3.6:g} {y - 3.6:g}h7.2v7.2h-7.2Z",
        f"M{x} {y - 5:g}L{x + 4.6:g} {y + 3.6:g}H{x - 4.6:g}Z",
        f"M{x} {y - 5:g}L{x + 5:g} {y}L{x} {y + 5:g}L{x - 5:g} {y}Z",
        f"M{x} {y + 5:g}L{x + 4.6:g} {y - 3.6:g}H{x - 4.6:g}Z",
        f"M{x - 1.6:g} {y - 5:g}h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4Z",
    )
    return shapes[look]


def _cross(x: float, y: float) -> str:
    return f"M{x - 4:g} {y - 4:g}l8 8M{x + 4:g} {y - 4:g}l-8 8"


def _marks(curves: Sequence[LeakageCurve], frame: _Frame) -> Iterator[Mark]:
    for index, curve in enumerate(curves):
        for kind, point, label in (("kept", curve.kept, "kept"), ("stop", curve.stopped, "stopped")):
            if point is not None and point.value is not None:
                yield Mark(frame.x(point.x), frame.y(point.value), kind, index % _N_LOOKS, label)


def _columns(
    runs: Sequence[RunView],
    curves: Sequence[_Curve],
    frame: _Frame,
    what: str,
    *,
    by_epoch: bool,
) -> tuple[Column, ...]:
    points: dict[float, list[tuple[_Curve, Point]]] = {}
    for curve in curves:
        for point in curve.drawn:
            points.setdefault(point.x, []).append((curve, point))
    audits: dict[float, list[AuditView]] = {}
    for run in runs:
        for audit in run.audits:
            audits.setdefault(position(audit, by_epoch=by_epoch), []).append(audit)
    positions = sorted(points)
    edges = [_LEFT, *(frame.x((a + b) / 2) for a, b in pairwise(positions)), _RIGHT]
    columns = []
    for index, at in enumerate(positions):
        here = points[at]
        lines = [_heading(audits[at], at, by_epoch=by_epoch)]
        lines += [_read(curve, point, what) for curve, point in here[:_MOST_TIP_LINES]]
        if len(here) > _MOST_TIP_LINES:
            lines.append(f"and {len(here) - _MOST_TIP_LINES} more, in the tables below")
        if len(runs) == 1:
            lines += _verdicts(audits[at])
        dots = tuple((frame.x(p.x), frame.y(p.value)) for _, p in here if p.value is not None)
        columns.append(_column(frame.x(at), edges[index], edges[index + 1], lines, dots))
    return tuple(columns)


def _heading(audits: Sequence[AuditView], at: float, *, by_epoch: bool) -> str:
    steps = {audit.step for audit in audits}
    if not by_epoch:
        return f"Step {at:g}"
    return f"Epoch {at:.3g}" + (f", step {steps.pop()}" if len(steps) == 1 else "")


def _read(curve: _Curve, point: Point, what: str) -> str:
    name = curve.name or what
    if point.value is None:
        return f"{name}: {'audit failed, unknown' if point.is_failed else 'not resolved, unknown'}"
    ends = "" if point.lower is None else f" [{point.lower:.3f}, {point.upper:.3f}]"
    return f"{name} {point.value:.3f}{ends}"


def _verdicts(audits: Sequence[AuditView]) -> list[str]:
    return [
        audit.decision.label
        for audit in audits
        if audit.status == "ok" and audit.decision.verdict != "no budget"
    ]


def _column(
    x: float, left: float, right: float, lines: list[str], dots: tuple[tuple[float, float], ...]
) -> Column:
    width = max(map(len, lines)) * _TIP_CHARACTER + 18
    height = len(lines) * _TIP_LINE + 10
    is_left = x + 10 + width > _RIGHT
    tip_x = max(_LEFT + 2, x - 10 - width) if is_left else x + 10
    # Away from the points, which are what one looks at.
    middle = sum(y for _, y in dots) / len(dots) if dots else _BOTTOM
    tip_y = _TOP + 4 if middle > (_TOP + _BOTTOM) / 2 else _BOTTOM - height - 4
    return Column(
        x,
        left,
        round(right - left, 2),
        ". ".join(lines),
        tuple(lines),
        dots,
        round(tip_x, 2),
        round(tip_y, 2),
        round(width, 2),
        height,
    )


def _caption(runs: Sequence[RunView], metric: str) -> str:
    """What the shading and the gaps mean."""
    audits = [audit for run in runs for audit in run.audits_after_baseline]
    figures = [audit.metrics.get(metric) for audit in audits]
    measured = [figure for figure in figures if figure is not None and figure.value is not None]
    at_bands = " / ".join(dict.fromkeys(percent(run.band_confidence) for run in runs))
    at_intervals = " / ".join(dict.fromkeys(percent(run.confidence) for run in runs))
    sentences = []
    if any(figure.band for figure in measured):
        sentences.append(
            f"Shaded: the band that holds for all audits of a run together at {at_bands}; at the baseline "
            "its own interval."
        )
    elif any(figure.interval for figure in measured):
        sentences.append(f"Shaded: the interval of each audit alone at {at_intervals}.")
    budgets = [run.budget for run in runs]
    over = over_budget_is([b.rule for b in budgets if b is not None and b.metric == metric])
    sentences += [over] if over else []
    kept = [run for run in runs if run.kept is not None]
    if kept:
        is_known = all(run.is_final_known for run in kept)
        sentences.append(
            "Ring: the weights that the model was left with."
            if is_known
            else "Ring: the last audit within budget."
        )
    if len(measured) < len(audits):
        sentences.append("Crosses mark audits without a figure: leakage there is unknown, not absent.")
    return " ".join(sentences)


def _describe(curves: Sequence[_Curve], limits: Mapping[str, float]) -> str:
    """The curves in words, for those who do not see them."""
    sentences = []
    for curve in curves:
        values = [point.value for point in curve.points if point.value is not None]
        name = f"{curve.name}: " if curve.name else ""
        if not values:
            sentences.append(f"{name}no audit gave a figure.")
            continue
        gaps = len(curve.points) - len(values)
        text = f"{name}from {values[0]:.3f} to {values[-1]:.3f}, largest {max(values):.3f}"
        sentences.append(text + (f"; {gaps} of {len(curve.points)} audits unknown." if gaps else "."))
    for limit in sorted(set(limits.values())):
        sentences.append(f"The budget lies at {limit:.3f}.")
    return " ".join(sentences)


def _cut(text: str, n_characters: int) -> str:
    return text if len(text) <= n_characters else text[: n_characters - 1] + "…"
