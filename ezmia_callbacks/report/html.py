"""One self-contained page about one or several runs; Jinja loads when a page is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ezmia_callbacks.errors import MissingDependencyError
from ezmia_callbacks.files import FOR_OTHERS, PRIVATE, write_atomically
from ezmia_callbacks.report.charts import Chart, Forest, forest, leakage_chart, loss_chart, marker_path
from ezmia_callbacks.report.document import Document, report_view
from ezmia_callbacks.report.labels import percent
from ezmia_callbacks.report.shown import shown, what_is_left_out
from ezmia_callbacks.report.view import (
    AnyFigure,
    ComparisonView,
    MeasuredView,
    NamedFigureView,
    ReportView,
    RunView,
    Subject,
    from_plain,
)
from ezmia_callbacks.results.history import AuditHistory

if TYPE_CHECKING:
    from jinja2 import Environment

    from ezmia_callbacks.results.trajectories import ExposedRecords

__all__: list[str] = []

_NOTHING = "–"  # noqa: RUF001 - a dash, not a minus sign


@dataclass(frozen=True)
class _Column:
    """The AUC of one score, or of one group, at every audit; None where it was not measured."""

    label: str
    figures: list[AnyFigure | None]

    @property
    def last(self) -> AnyFigure | None:
        """The latest figure."""
        return next((figure for figure in reversed(self.figures) if figure is not None), None)

    @property
    def notes(self) -> list[str]:
        """What has to be said of the figures, each once."""
        return _distinct(self.figures)


def write_report(
    histories: AuditHistory | Mapping[str, AuditHistory],
    path: str | Path,
    *,
    title: str | None = None,
    subject: Subject | None = None,
    exposed: ExposedRecords | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a report on one or several runs as a single HTML file, whole or not at all.

    The file loads nothing, runs no script, and names no record unless told to.

    Args:
        histories: The audits of one run, or of several by label: their curves share the axes.
        path: File to write.
        title: Title of the report.
        subject: Model, data and author, as the report is to name them.
        exposed: Records to name, as `most_exposed` found them; by default no record is named.
        texts: Texts by record id, shown beside `exposed`; by default no text is shown.

    Raises:
        ConfigurationError: if there is no history, one has no audits, `exposed` is given for several runs, or
            `texts` without `exposed`.
        MissingDependencyError: if Jinja is not installed.
    """
    view = report_view(histories, title=title, subject=subject, exposed=exposed, texts=texts)
    # With records named it says who was in the training set.
    write_atomically(Path(path), _render(view), mode=FOR_OTHERS if exposed is None else PRIVATE)


def render_report(document: Document) -> str:
    """The page of a document: nothing on it comes from elsewhere.

    Args:
        document: What `to_document` made, or `write_json` saved.

    Raises:
        ConfigurationError: if the document has another schema than this release writes.
        MissingDependencyError: if Jinja is not installed.
    """
    return _render(from_plain(document))


def _render(view: ReportView) -> str:
    template = _environment().get_template("report.html.jinja")
    return template.render(document=view, charts=_charts(view.runs), nothing=_NOTHING)


def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise MissingDependencyError('Reports need Jinja: pip install "ezmia-callbacks[report]"') from None
    environment = Environment(
        loader=PackageLoader("ezmia_callbacks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_keep_percents_together,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(rate=_rate, percent=percent, amount=_amount, count="{:,}".format)
    environment.globals.update(
        forest=forest,
        forest_low=_forest_low,
        forest_of=_forest_of,
        compared_columns=_compared_columns,
        marker_path=marker_path,
        n_remarks=_n_remarks,
        note_of=_note_of,
        notes_of=_notes_of,
        ranked=_ranked,
        shown=shown,
        what_is_left_out=what_is_left_out,
    )
    return environment


def _keep_percents_together(value: Any) -> Any:
    """No line break between a number and its per cent sign."""
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if isinstance(value, str) else value


def _charts(runs: Sequence[RunView]) -> list[Chart]:
    """A curve of each metric that decides, then of the AUC, then the losses."""
    metrics = dict.fromkeys([*(run.decides for run in runs), "auc"])
    drawn = [*(leakage_chart(runs, metric) for metric in metrics), loss_chart(runs)]
    return [chart for chart in drawn if chart is not None]


def _rate(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"


def _amount(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _compared_columns(run: RunView, field: Literal["auc_by_score", "auc_by_group"]) -> list[_Column]:
    """Each score, those that are judged first, or each group: its AUC at every audit."""
    named: list[tuple[NamedFigureView, ...]] = [getattr(audit, field) for audit in run.audits]
    tables: list[dict[str, AnyFigure]] = [{figure.name: figure for figure in figures} for figures in named]
    labels = {figure.name: figure.label for figures in named for figure in figures}
    if not labels:
        return []
    if field == "auc_by_score" and len(run.judged) > 1:
        judged = {name.name for name in run.judged}
        labels = {name: label + (" (judged)" if name in judged else "") for name, label in labels.items()}
    elif field == "auc_by_score":
        own = run.score.name
        labels = {own: run.score.label + " (decides)", **labels}
        for table, audit in zip(tables, run.audits, strict=True):
            if "auc" in audit.metrics:
                table[own] = audit.metrics["auc"]
    return [_Column(label, [table.get(name) for table in tables]) for name, label in labels.items()]


def _n_remarks(run: RunView) -> int:
    """Number of things that single audits found."""
    return sum(finding.is_flagged for audit in run.audits for finding in audit.findings)


def _notes_of(run: RunView, metrics: Sequence[str]) -> list[str]:
    """What has to be said of the figures of some metrics, each once."""
    return _distinct([audit.metrics.get(name) for name in metrics for audit in run.audits])


def _distinct(figures: Sequence[AnyFigure | None]) -> list[str]:
    return list(dict.fromkeys(note for figure in figures if figure and (note := _note_of(figure))))


def _note_of(figure: AnyFigure) -> str:
    """Why a figure lacks something, as a footnote; empty if it lacks nothing."""
    note = figure.note
    if figure.value is None:
        return f"Not resolved: {note or 'no reason was recorded'}."
    if figure.certain is None:
        return f"No interval: {note or 'none was computed'}."
    return f"Interval of this audit alone: {note}." if note and figure.band is None else ""


def _forest_of(stated: MeasuredView) -> Forest | None:
    """A headline on a strip from never to always; of the score turned around where that is what is told."""
    if not stated.is_reversed:
        return forest(stated.value, stated, low=0.0)
    turned = replace(stated, value=1 - stated.value, lower=1 - stated.upper, upper=1 - stated.lower)
    return forest(turned.value, turned, low=0.0)


def _ranked(runs: Sequence[RunView], comparison: ComparisonView) -> list[RunView]:
    return sorted(runs, key=lambda run: comparison.ranking.index(run.label))


def _forest_low(figures: Sequence[AnyFigure | None]) -> float:
    """Left end of a strip that holds all figures and chance, on a round tenth."""
    certain = [figure.certain for figure in figures if figure is not None]
    ends = [interval.lower for interval in certain if interval is not None]
    return max(0.0, int(10 * min([0.45, *ends])) / 10)
