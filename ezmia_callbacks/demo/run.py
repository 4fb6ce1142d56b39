"""`ezmia demo`: fine-tune one small model twice under one leakage budget, and show both curves.

Full weights, then LoRA, on the same records with the same canaries. The figures are honest and small: a
tiny model on a few hundred records shows how to read the curve, not what a large model would leak.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ezmia_callbacks.canaries import CanarySet, hold_out_canaries
from ezmia_callbacks.demo.base_model import train_base_model
from ezmia_callbacks.demo.corpus import package_docstrings, records_from_file, standard_library_docstrings
from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError, TooFewCanariesError
from ezmia_callbacks.functional.budget import Decision, LeakageBudget
from ezmia_callbacks.functional.planning import MINIMUM_PER_CLASS
from ezmia_callbacks.report.html import write_report
from ezmia_callbacks.report.markdown import summarize
from ezmia_callbacks.report.plots import plot_leakage_and_loss
from ezmia_callbacks.safe_text import for_terminal

try:
    import peft
    import transformers
    from rich.console import Console
    from tqdm import tqdm
except ImportError as error:
    raise MissingDependencyError(
        f'The demo needs {error.name}: pip install "ezmia-callbacks[huggingface,report]"'
    ) from None

from ezmia_callbacks.huggingface import PrivacyAuditCallback
from ezmia_callbacks.reference.pretrained import load_pretrained

if TYPE_CHECKING:
    from ezmia_callbacks.results.history import AuditHistory
    from ezmia_callbacks.results.result import AuditResult, Measurement

__all__: list[str] = []

FULL, LORA = "full fine-tuning", "LoRA"
PICTURE, PAGE, SUMMARY = "leakage.png", "report.html", "summary.md"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; the defaults take some five minutes on two CPU cores.

    Attributes:
        model: Name or path of a causal language model; None trains the small base model.
        data: A .txt or .jsonl file of records; None takes the documentation of installed packages.
        output_dir: Folder for the picture, the page, the summary and the audit histories.
        limit: Leakage budget on AUC.
        n_epochs: Epochs of each run, at most.
        seed: Seed of everything.
        n_train: Records trained on, members included, at most.
        n_members: Member canaries, at most.
        n_non_members: Non-member canaries, at most.
        max_length: Truncation, in tokens.
        batch_size: Records per step.
        full_learning_rate: Learning rate with full weights.
        lora_learning_rate: Learning rate with LoRA, customarily higher.
        lora_rank: Rank of the adapter, on all linear layers.
    """

    model: str | None = None
    data: Path | None = None
    output_dir: Path = Path("ezmia-demo")
    limit: float = 0.75
    n_epochs: int = 4
    seed: int = 0
    n_train: int = 600
    n_members: int = 300
    n_non_members: int = 500
    max_length: int = 128
    batch_size: int = 8
    full_learning_rate: float = 5e-4
    lora_learning_rate: float = 2e-3
    lora_rank: int = 8


class _Base(NamedTuple):
    load: Callable[[], Any]
    tokenizer: Any
    name: str


class _Corpus(NamedTuple):
    train_dataset: list[dict[str, Any]]
    canaries: CanarySet


def run_demo(settings: DemoSettings, *, console: Console | None = None) -> dict[str, AuditHistory]:
    """Run the demo; returns the audit history of each run by its name.

    Raises:
        AuditError: if the model cannot be loaded or the data cannot be used.
    """
    console = console or Console()
    # What is kept is shown to keep the limit, instead of not being shown to exceed it.
    budget = LeakageBudget(limit=settings.limit, metric="auc", rule="upper")
    # A wrong file name costs no training.
    texts = _texts(settings)
    with _quiet():
        histories = _train_twice(texts, budget, settings, console)
    for name, history in histories.items():
        _say(console, f"\n{_conclusion(name, history)}", style="bold")
    files = ", ".join(str(settings.output_dir / name) for name in (PICTURE, PAGE, SUMMARY))
    _say(console, f"\nFiles: {files}")
    return histories


def _train_twice(
    texts: Sequence[str], budget: LeakageBudget, settings: DemoSettings, console: Console
) -> dict[str, AuditHistory]:
    base = _base_model(settings, console)
    corpus = _corpus(texts, settings, base.tokenizer)
    _say(
        console,
        f"\nEach run trains on {len(corpus.train_dataset)} records; {corpus.canaries.n_members} of them "
        f"(members) and {corpus.canaries.n_non_members} records that are never trained on (non-members) "
        f"were drawn at random. Budget: {budget.describe()}.",
    )
    histories = {name: _fine_tune(name, base, corpus, budget, settings, console) for name in (FULL, LORA)}

    figure: Any = plot_leakage_and_loss(histories)[0].figure
    figure.savefig(settings.output_dir / PICTURE, dpi=140)
    write_report(histories, settings.output_dir / PAGE, title="ezmia demo")
    summary = f"# ezmia demo\n\nModel: {base.name}\n\n{summarize(histories)}\n"
    (settings.output_dir / SUMMARY).write_text(summary, encoding="utf-8")
    return histories


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the table speak alone: no library messages, and none of the callback's own lines."""
    package, verbosity = logging.getLogger("ezmia_callbacks"), transformers.logging.get_verbosity()
    level = package.level
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            package.setLevel(logging.ERROR)
            yield
    finally:
        package.setLevel(level)
        transformers.logging.set_verbosity(verbosity)


def _base_model(settings: DemoSettings, console: Console) -> _Base:
    if settings.model is None:
        texts = standard_library_docstrings()
        _say(
            console, f"Training a small base model on {len(texts)} passages of Python's own documentation ..."
        )
        trained = train_base_model(texts, seed=settings.seed, show_progress=console.is_terminal)
        state = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}

        def fresh() -> Any:
            model = type(trained.model)(trained.model.config)
            model.load_state_dict(state)
            return model

        n_parameters = trained.model.num_parameters()
        return _Base(fresh, trained.tokenizer, f"trained by the demo, {n_parameters / 1e6:.1f} M weights")
    try:
        # Said, not left out: where it is left out transformers asks on the terminal.
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
        transformers.AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"No causal language model with a tokenizer at {settings.model!r}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    name = settings.model
    return _Base(lambda: load_pretrained(name), tokenizer, name)


def _texts(settings: DemoSettings) -> list[str]:
    if settings.data is None:
        return package_docstrings("scipy", "sklearn", "numpy")
    texts = records_from_file(settings.data)
    if len(texts) < 3 * MINIMUM_PER_CLASS:
        raise TooFewCanariesError(
            f"{settings.data} holds {len(texts)} records, at least {3 * MINIMUM_PER_CLASS} are needed, and "
            "some hundreds for figures that say anything."
        )
    return texts


def _corpus(texts: Sequence[str], settings: DemoSettings, tokenizer: Any) -> _Corpus:
    order = np.random.default_rng(settings.seed).permutation(len(texts))
    pool = [texts[i] for i in order[: settings.n_train + settings.n_non_members]]
    # A user's file may be small: the canaries then take four fifths of it.
    share = min(1.0, 0.8 * len(pool) / (settings.n_members + settings.n_non_members))
    rows = [dict(tokenizer(text, truncation=True, max_length=settings.max_length)) for text in pool]
    train_dataset, canaries = hold_out_canaries(
        rows,
        n_members=max(MINIMUM_PER_CLASS, int(share * settings.n_members)),
        n_non_members=max(MINIMUM_PER_CLASS, int(share * settings.n_non_members)),
        seed=settings.seed,
    )
    return _Corpus(train_dataset, canaries)


def _fine_tune(
    name: str,
    base: _Base,
    corpus: _Corpus,
    budget: LeakageBudget,
    settings: DemoSettings,
    console: Console,
) -> AuditHistory:
    transformers.set_seed(settings.seed)
    model = base.load()
    learning_rate = settings.full_learning_rate
    if name == LORA:
        learning_rate = settings.lora_learning_rate
        config = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, config)
    audit = PrivacyAuditCallback(corpus.canaries, budget=budget, every="epoch", batch_size=32)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(settings.output_dir / name.split()[0].lower()),
            num_train_epochs=settings.n_epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=learning_rate,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=settings.seed,
        ),
        train_dataset=corpus.train_dataset,
        processing_class=base.tokenizer,
        data_collator=transformers.DataCollatorForLanguageModeling(base.tokenizer, mlm=False),
        callbacks=[audit],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_LiveTable(audit, console))
    _say(console, f"\n{name}, learning rate {learning_rate:g}", style="bold")
    trainer.train()
    return audit.history


class _LiveTable(transformers.TrainerCallback):  # type: ignore[misc]  # skipped import
    """One table row an epoch, as soon as its training loss is known, and a bar in between."""

    _COLUMNS = (
        "epoch",
        "train loss",
        "held-out loss",
        "AUC [95 % band]",
        "TPR at 1 % FPR [95 %]",
        "lower bound of AUC",
    )
    _WIDTHS = (5, 10, 13, 20, 21, 0)

    def __init__(self, audit: PrivacyAuditCallback, console: Console) -> None:
        self._audit = audit
        self._console = console
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the head of the table and the baseline."""
        self._print(self._COLUMNS)
        self._print(_cells(self._audit.history[0], train_loss=None))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show a bar on a terminal."""
        n_steps = state.max_steps // max(1, int(state.num_train_epochs))
        self._bar = tqdm(total=n_steps, leave=False, disable=not self._console.is_terminal)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._bar.update()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self._bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the row of the epoch that was just trained and audited."""
        if logs and "loss" in logs:
            self._print(_cells(self._audit.history[-1], train_loss=logs["loss"]))

    def _print(self, cells: Sequence[str]) -> None:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, self._WIDTHS, strict=True))
        style = "bold red" if line.endswith("STOP") else ("bold" if cells is self._COLUMNS else "")
        _say(self._console, line.rstrip(), style=style)


def _say(console: Console, text: str, *, style: str = "") -> None:
    console.print(for_terminal(text), style=style, highlight=False, markup=False, soft_wrap=True)


def _cells(result: AuditResult, *, train_loss: float | None) -> tuple[str, ...]:
    epoch = f"{result.epoch:g}" if result.epoch is not None else "?"
    loss = "" if train_loss is None else f"{train_loss:.3f}"
    if result.status == "failed":
        return (epoch, loss, "", "audit failed", "", "leakage unknown")
    return (
        epoch,
        loss,
        f"{result.non_member_loss:.3f}",
        _figure(result.metrics["auc"]),
        _figure(result.metrics["tpr_at_fpr_0.01"]),
        "baseline" if result.is_baseline else _verdict(result.decision),
    )


def _verdict(decision: Decision) -> str:
    """Short, so that a row fits on a screen; the column's head says what is held against the limit."""
    if decision.compared is None or decision.limit is None:
        return decision.message
    sign, word = ("<=", "within") if decision.is_within_budget else (">", "OVER")
    text = f"{word}: {decision.compared:.3f} {sign} {decision.limit:.3f}"
    return text + (" -> STOP" if decision.stop else "")


def _figure(measurement: Measurement) -> str:
    if measurement.value is None:
        return f"({measurement.note})"
    bounds = measurement.band or measurement.interval
    if bounds is None:
        return f"{measurement.value:.3f} ({measurement.note})"
    return f"{measurement.value:.3f} [{bounds.lower:.3f}, {bounds.upper:.3f}]"


def _conclusion(name: str, history: AuditHistory) -> str:
    last, kept, n_failed = history[-1], history.last_within_budget, history.n_failed
    where = (
        "the starting weights" if kept is None or kept.is_baseline else f"the weights of epoch {kept.epoch:g}"
    )
    auc = "" if last.status == "failed" else f" AUC {_figure(last.metrics['auc'])}"
    if history.stopped is not None:
        outcome = f"was stopped after epoch {last.epoch:g} at{auc}; {where} were restored."
    elif last.decision.is_within_budget:
        outcome = f"{'ended' if n_failed else 'stayed'} within the budget:{auc} after epoch {last.epoch:g}."
    else:
        outcome = "ended without a verdict."
    if n_failed:
        of_all = f"{n_failed} of {len(history.audits_after_baseline)}"
        outcome += f" {of_all} audits failed; at those points leakage is unknown, not absent."
    return f"{name} {outcome}"
