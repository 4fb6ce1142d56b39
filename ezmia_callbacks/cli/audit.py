"""`ezmia audit`: the leakage of finished checkpoints."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.canaries.files import load_canaries
from ezmia_callbacks.canaries.record_files import ENDINGS, ending_of, read_record_file
from ezmia_callbacks.cli.budget import (
    ConfidenceOption,
    FprOption,
    MaxAucOption,
    MaxTprOption,
    Rule,
    RuleOption,
    ScoreOption,
    budget_of,
    check_score,
)
from ezmia_callbacks.cli.figures import epoch_of, verdict_of
from ezmia_callbacks.cli.terminal import (
    ExitCode,
    JsonOption,
    quiet_libraries,
    say,
    say_json,
    say_table,
    show_progress,
)
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import LeakageBudget, metric_name
from ezmia_callbacks.functional.judged import STRONGEST
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.tables import figure, loss

if TYPE_CHECKING:
    from ezmia_callbacks.post_hoc import Checkpoint

__all__: list[str] = []

_CANARIES, _MODEL = "Canaries", "Model"


class Precision(str, Enum):
    """Of the weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    BFLOAT16_MIXED = "bfloat16-mixed"
    FLOAT16_MIXED = "float16-mixed"


def audit(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="Folder of one saved model or PEFT adapter, or of a run with checkpoint-STEP folders: then "
            "all of them are audited, in step order.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Path or hub id of the model that the run started from. Without it a PEFT adapter is "
            "compared with the base that it names, if that is on this machine; with it, an adapter that "
            "names another is refused.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    allow_other_base: Annotated[
        bool,
        typer.Option(
            "--allow-other-base",
            help="Take --base although an adapter names another base, as for a copy of the same model.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    allow_download: Annotated[
        bool,
        typer.Option(
            "--allow-download",
            help="Fetch from the hub what an adapter names as its base, if it is not on this machine.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code that comes with models and tokenizers, which are refused without it.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    canaries: Annotated[
        Path | None,
        typer.Option(
            "--canaries",
            help="The canaries.json that `ezmia split` (or `save_canaries`) wrote before training.",
            rich_help_panel=_CANARIES,
        ),
    ] = None,
    members: Annotated[
        Path | None,
        typer.Option(
            "--members",
            help=f"Instead: records that the model was trained on, as {ENDINGS}.",
            rich_help_panel=_CANARIES,
        ),
    ] = None,
    non_members: Annotated[
        Path | None,
        typer.Option(
            "--non-members",
            help="And similar records that it was never trained on.",
            rich_help_panel=_CANARIES,
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            "--text-column",
            help="Column of the two files that holds the text, if it is not called `text`.",
            rich_help_panel=_CANARIES,
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=2,
            help="Truncate records to this many tokens: use the value from training.",
            rich_help_panel=_CANARIES,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="base|checkpoint|PATH",
            help="What reads canaries that are text: the base's tokenizer, the checkpoint's own, whose files "
            "then decide what is measured, or that of a folder. By default the base's, and exit code 2 if "
            "the checkpoint's own makes other tokens of the canaries.",
            rich_help_panel=_CANARIES,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="cpu, cuda, cuda:1, mps; by default a GPU if there is one.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    dtype: Annotated[
        Precision,
        typer.Option(
            "--dtype",
            help="Precision of the weights; auto: as saved; mixed: as saved, computed under autocast, as a "
            "trainer with bf16=True or fp16=True does.",
            rich_help_panel=_MODEL,
        ),
    ] = Precision.AUTO,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            min=1,
            help="Records in a forward pass; halved automatically when memory runs out.",
            rich_help_panel=_MODEL,
        ),
    ] = 16,
    score: ScoreOption = STRONGEST,
    max_auc: MaxAucOption = None,
    max_tpr: MaxTprOption = None,
    fpr: FprOption = 0.01,
    rule: RuleOption = Rule.LOWER,
    confidence: ConfidenceOption = 0.95,
    allow_shift: Annotated[
        bool,
        typer.Option(
            "--allow-shift",
            help="Judge even if members and non-members can be told apart without the model; the figures "
            "then include that difference.",
            rich_help_panel=_CANARIES,
        ),
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Folder for history.jsonl, which `ezmia report` reads."),
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Measure how much finished checkpoints give away about the records they were trained on.

    The model that training started from is the reference: where a checkpoint predicts wrongly, how far did
    training move the right token up, compared with records that were not trained on? One forward pass over
    the canaries for the base and for each checkpoint; nothing is trained.

    Example: ezmia audit runs/mine --base gpt2 --canaries split/canaries.json --max-auc 0.6

    Exit codes: 0 within budget, or none was given; 1 a checkpoint is over budget; 2 bad input, such as a
    checkpoint whose tokenizer reads the canaries otherwise or whose adapter names another base: nothing was
    judged; 3 an audit failed or could not be judged, so that leakage is unknown.
    """
    budget = budget_of(max_auc=max_auc, max_tpr=max_tpr, fpr=fpr, rule=rule, confidence=confidence)
    check_score(score)
    with quiet_libraries():
        drawn = _canaries(canaries, members, non_members, text_column=text_column)
        from ezmia_callbacks.post_hoc import audit_checkpoints, find_checkpoints

        checkpoints = find_checkpoints(run)
        history = audit_checkpoints(
            checkpoints,
            drawn,
            base=base,
            tokenizer=tokenizer,
            budget=budget,
            score=score,
            confidence=confidence,
            max_length=max_length,
            batch_size=batch_size,
            device=device,
            dtype=dtype.value,
            output_dir=output_dir,
            allow_shift=allow_shift,
            allow_other_base=allow_other_base,
            allow_download=allow_download,
            trust_remote_code=trust_remote_code,
            show_progress=show_progress(),
        )
    code = _exit_code(history)
    if is_json:
        say_json(_as_json(checkpoints, history, code))
    else:
        _show(checkpoints, history, budget, output_dir)
    raise typer.Exit(code)


def _canaries(
    file: Path | None, members: Path | None, non_members: Path | None, *, text_column: str | None
) -> CanarySet:
    if file is not None and members is None and non_members is None:
        return _load_canaries(file)
    if file is not None or members is None or non_members is None:
        raise ConfigurationError(
            "Give either --canaries FILE, or both --members FILE and --non-members FILE: `ezmia split` makes "
            "the first before training."
        )
    return CanarySet.from_lists(
        read_record_file(members).records(text_column=text_column),
        read_record_file(non_members).records(text_column=text_column),
    )


def _load_canaries(file: Path) -> CanarySet:
    """The canaries of a file; one of records is told where it goes."""
    advice = (
        f"{str(file)!r} is a file of records, which does not say what was trained on: give it as --members, "
        "and one of similar records that were not trained on as --non-members, or draw canaries before "
        "training with `ezmia split`."
    )
    if file.is_file() and ending_of(file) not in ("", ".json"):
        raise ConfigurationError(advice)
    try:
        return load_canaries(file)
    except ConfigurationError:
        if _holds_records(file):
            raise ConfigurationError(advice) from None
        raise


def _holds_records(file: Path) -> bool:
    try:
        return bool(read_record_file(file).records())
    except ConfigurationError:
        return False


def _exit_code(history: AuditHistory) -> ExitCode:
    if _over(history):
        return ExitCode.OVER_BUDGET
    return ExitCode.FAILED if history.n_failed or _unjudged(history) else ExitCode.OK


def _over(history: AuditHistory) -> list[int]:
    """Numbers of the checkpoints that are over budget."""
    return [
        i for i, audit in enumerate(history.audits_after_baseline) if audit.decision.is_within_budget is False
    ]


def _unjudged(history: AuditHistory) -> list[int]:
    """Numbers of the checkpoints that have figures and no verdict."""
    return [i for i, audit in enumerate(history.audits_after_baseline) if history.is_unjudged(audit)]


def _as_json(checkpoints: Sequence["Checkpoint"], history: AuditHistory, code: ExitCode) -> dict[str, Any]:
    from ezmia_callbacks.report.document import to_document

    return {
        "verdict": _verdict(history, code),
        "exit_code": int(code),
        "checkpoints": [
            {
                "path": str(checkpoint.path),
                "step": audit.step,
                "is_within_budget": audit.decision.is_within_budget,
            }
            for checkpoint, audit in zip(checkpoints, history.audits_after_baseline, strict=True)
        ],
        "skipped": [
            {"path": str(twin), "same_as": str(checkpoint.path)}
            for checkpoint in checkpoints
            for twin in checkpoint.twins
        ],
        "report": to_document(history),
    }


def _verdict(history: AuditHistory, code: ExitCode) -> str:
    if code == ExitCode.OK:
        return "no_budget" if history.budget is None else "within_budget"
    if code == ExitCode.OVER_BUDGET:
        return "over_budget"
    return "failed" if history.n_failed else "unknown"


def _show(
    checkpoints: Sequence["Checkpoint"],
    history: AuditHistory,
    budget: LeakageBudget | None,
    output_dir: Path | None,
) -> None:
    from ezmia_callbacks.post_hoc.curves import NOT_AUDITED_TWICE

    names = [checkpoint.name for checkpoint in checkpoints]
    fpr = budget.fpr if budget is not None and budget.metric == "tpr_at_fpr" else 0.01
    percent = f"{100 * history.band_confidence:g} %"
    columns = (
        "model",
        "epoch",
        f"AUC [{percent} band]",
        f"TPR at {100 * fpr:g} % FPR [{percent}]",
        "held-out loss",
        "verdict",
    )
    rows = [
        (
            name,
            epoch_of(result),
            figure(result.metrics.get("auc")),
            figure(result.metrics.get(metric_name("tpr_at_fpr", fpr=fpr))),
            loss(result.non_member_loss),
            verdict_of(result),
        )
        for name, result in zip(["base model", *names], history, strict=True)
    ]
    say(f"Canaries: {history.about}")
    if history.caveat:
        say(f"Caution: {history.caveat}")
    say()
    say_table(columns, rows)
    for finding in history.findings:
        if finding.name == NOT_AUDITED_TWICE:
            say(f"Skipped: {finding.text}")
    say()
    say(_conclusion(names, history), style="bold")
    if output_dir is not None:
        say(f"History: {output_dir / 'history.jsonl'} (ezmia report {output_dir} -o report.html)")


def _conclusion(names: Sequence[str], history: AuditHistory) -> str:
    over, n_failed = _over(history), history.n_failed
    sentences = []
    if over:
        within = [
            i for i, audit in enumerate(history.audits_after_baseline) if audit.decision.is_within_budget
        ]
        last = f"the last within it is {names[within[-1]]}" if within else "none is within it"
        sentences.append(f"OVER BUDGET: {', '.join(names[i] for i in over)}; {last}.")
    if n_failed:
        sentences.append(
            f"{n_failed} of {len(names)} checkpoints could not be audited: leakage there is unknown, not "
            "absent."
        )
    unjudged = [names[i] for i in _unjudged(history)]
    if unjudged:
        sentences.append(f"No verdict on {', '.join(unjudged)}, which does not mean within budget.")
    if not sentences and history.budget is None:
        return "No budget was given (--max-auc 0.6): figures only, no verdict."
    if not sentences:
        which = "The checkpoint is" if len(names) == 1 else f"All {len(names)} checkpoints are"
        sentences.append(f"{which} within budget. That does not prove privacy: another attack may find more.")
    return " ".join(sentences)
