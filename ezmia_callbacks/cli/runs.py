"""`ezmia report` and `ezmia compare`: what audits found, from the histories that they wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ezmia_callbacks.cli.terminal import JsonOption, say, say_json, say_table
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.files import FOR_OTHERS, write_atomically
from ezmia_callbacks.report.view import MeasuredView, RunView, Subject
from ezmia_callbacks.results.consistency import CONTRADICTION, judged_anew
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.results.tables import loss
from ezmia_callbacks.safe_text import get_logger

__all__: list[str] = []

logger = get_logger(__name__)

_FILE = "history.jsonl"
_FORMATS = ".html, .md, .json, .png, .svg or .pdf"

OutputOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--output", "-o", help=f"File to write; its extension picks the format: {_FORMATS}. Can be repeated."
    ),
]


ModelNameOption = Annotated[
    str, typer.Option("--model-name", help="How the report is to name the model; by default as the run does.")
]
DataNameOption = Annotated[str, typer.Option("--data-name", help="How it is to name the training data.")]
AuthorOption = Annotated[str, typer.Option("--author", help="Who writes the report.")]


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help=f"A {_FILE}, or the folder of the run that holds it.")
    ],
    outputs: OutputOption = None,
    model_name: ModelNameOption = "",
    data_name: DataNameOption = "",
    author: AuthorOption = "",
    is_json: JsonOption = False,
) -> None:
    """Write what the audits of a run found: as a web page, for a model card, as data, or as a picture.

    Without --output the Markdown goes to standard output. Verdicts are those that the figures lead to; where
    the file says something else, the report says so.
    """
    history = _load(run)
    _check_formats(outputs or [])
    subject = Subject(model_name, data_name, author)
    for path in outputs or []:
        _write(history, path, subject)
    if is_json:
        _say_document(history, subject)
    elif not outputs:
        from ezmia_callbacks.report.markdown import summarize

        typer.echo(summarize(history, subject=subject), nl=False)
    else:
        say(f"Written: {', '.join(map(str, outputs))}")


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN ...", help=f"Two or more runs: folders or {_FILE} files.")
    ],
    outputs: OutputOption = None,
    data_name: DataNameOption = "",
    author: AuthorOption = "",
    is_json: JsonOption = False,
) -> None:
    """Put several runs side by side: what the model that each has left leaks, and at what held-out loss.

    Runs whose models are within budget come first, by their held-out loss. With --output the curves are drawn
    over each other. Verdicts are those that the figures lead to.
    """
    from ezmia_callbacks.report.document import report_view

    _check_distinct(runs)
    _check_formats(outputs or [])
    histories = {label: _load(run) for label, run in zip(_labels(runs), runs, strict=True)}
    empty = [label for label, history in histories.items() if not len(history)]
    if empty:
        raise ConfigurationError(f"The history of {empty[0]!r} has no audits.")
    subject = Subject(data=data_name, author=author)
    for path in outputs or []:
        _write(histories, path, subject)
    if is_json:
        _say_document(histories, subject)
        return
    view = report_view(histories, subject=subject)
    if view.comparison is not None:
        say(f"{view.comparison.text}\n")
        by_label = {run.label: run for run in view.runs}
        say_table(
            ("run", "state", "kept", "AUC [band]", "held-out loss", "stopped at", "audits", "canaries"),
            [_row(by_label[label]) for label in view.comparison.ranking],
        )
        if view.comparison.differs_in:
            say(f"\n{view.comparison.note}")
    for label, history in histories.items():
        for moment, text in _contradictions(history):
            say(f"\n{label}, {moment}: {text}")
    if outputs:
        say(f"\nWritten: {', '.join(map(str, outputs))}")


def _labels(runs: list[Path]) -> list[str]:
    """The parts of the paths in which the runs differ: short enough for a picture's legend."""
    paths = [list(run.resolve().parts) for run in runs]
    for end in (0, -1):
        while all(len(parts) > 1 for parts in paths) and len({parts[end] for parts in paths}) == 1:
            for parts in paths:
                del parts[end]
    return ["/".join(parts) for parts in paths]


def _row(run: RunView) -> tuple[str, ...]:
    left = run.left
    auc = run.headline
    failed = f", {run.n_failed} FAILED" if run.n_failed else ""
    return (
        run.label,
        run.outcome.kind,
        "-" if left is None else left.moment,
        f"{auc.value:.3f} [{auc.lower:.3f}, {auc.upper:.3f}]"
        if isinstance(auc, MeasuredView)
        else auc.title.lower(),
        loss(None if left is None else left.non_member_loss),
        "-" if run.stopped is None else run.stopped.moment,
        f"{len(run.audits_after_baseline)}{failed}",
        f"{run.n_members} + {run.n_non_members}",
    )


def _moment(result: AuditResult) -> str:
    return f"step {result.step}" if result.epoch is None else f"epoch {result.epoch:.3g}"


def _load(run: Path) -> AuditHistory:
    """The history of a run, with the verdicts that its figures lead to."""
    path = _file_of(run)
    history = judged_anew(AuditHistory.load(path))
    for moment, text in _contradictions(history):
        logger.warning("%s, %s: %s", path, moment, text)
    return history


def _contradictions(history: AuditHistory) -> list[tuple[str, str]]:
    """What the file says otherwise than its figures, with the moments of the audits."""
    return [
        (_moment(result), finding.text)
        for result in history
        for finding in result.findings
        if finding.name == CONTRADICTION
    ]


def _file_of(run: Path) -> Path:
    """The history file of a run, wherever in its folder it is."""
    if not run.is_dir():
        return run
    for place in (run / _FILE, run / "_privacy_audit" / _FILE):
        if place.is_file():
            return place
    found = sorted(run.rglob(_FILE))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigurationError(
            f"There is no {_FILE} in {str(run)!r}: the callback writes one during training, `ezmia audit "
            "--output-dir` afterwards."
        )
    raise ConfigurationError(
        f"There are {len(found)} histories in {str(run)!r}, such as {str(found[0])!r}: name one, or compare "
        "them with `ezmia compare`."
    )


def _check_distinct(runs: list[Path]) -> None:
    if len(runs) < 2:
        raise ConfigurationError("Comparing needs at least two runs; `ezmia report` shows one.")
    resolved = [run.resolve() for run in runs]
    if len(set(resolved)) < len(resolved):
        raise ConfigurationError("The same run was given twice.")


def _check_formats(outputs: list[Path]) -> None:
    for path in outputs:
        if path.suffix.lower() not in {".html", ".md", ".json", ".png", ".svg", ".pdf"}:
            raise ConfigurationError(f"{str(path)!r} must end in {_FORMATS}.")


def _write(histories: AuditHistory | Mapping[str, AuditHistory], path: Path, subject: Subject) -> None:
    suffix = path.suffix.lower()
    if suffix == ".html":
        from ezmia_callbacks.report.html import write_report

        write_report(histories, path, subject=subject)
    elif suffix == ".json":
        from ezmia_callbacks.report.document import write_json

        write_json(histories, path, subject=subject)
    elif suffix == ".md":
        from ezmia_callbacks.report.markdown import summarize

        write_atomically(path, summarize(histories, subject=subject), mode=FOR_OTHERS)
    else:
        _draw(histories, path)


def _draw(histories: AuditHistory | Mapping[str, AuditHistory], path: Path) -> None:
    import io

    from ezmia_callbacks.report.plots import plot_leakage_and_loss

    axes, _ = plot_leakage_and_loss(histories)
    picture = io.BytesIO()
    # The axes are the figure's own: no sub-figure is in between.
    axes.figure.savefig(  # type: ignore[union-attr]
        picture, format=path.suffix[1:].lower(), dpi=140
    )
    write_atomically(path, picture.getvalue(), mode=FOR_OTHERS)


def _say_document(histories: AuditHistory | Mapping[str, AuditHistory], subject: Subject) -> None:
    from ezmia_callbacks.report.document import to_document

    say_json(to_document(histories, subject=subject))
