"""What a user reads on the console of a run, under every shell: captured as it came, bars and all."""

import logging
import re
import statistics
import sys
from functools import partial
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import lightning_tiny
import own_loop
import pytest
import torch
from huggingface_tiny import draw, make_trainer
from script_logging import script_logging
from tiny import make_model
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl_tiny import make_sft
from verdicts import judge_by_number

from ezmia_callbacks import (
    LeakageBudget,
    LightningPrivacyAuditCallback,
    PrivacyAuditCallback,
    PrivacyAuditor,
)
from ezmia_callbacks.audit import kept_weights
from ezmia_callbacks.audit.judge import Judge
from ezmia_callbacks.errors import AuditError
from ezmia_callbacks.functional.budget import Decision
from ezmia_callbacks.scoring.scorer import Scorer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # TRL deprecates one of its own options each minor release.
    pytest.mark.filterwarnings("ignore:.*will be removed in.*:FutureWarning"),
]

BUDGET = LeakageBudget(limit=0.65, rule="point")
NOTHING = "NOTHING OF THIS TRAINING WAS KEPT"
AUDIT_LINE = re.compile(r"(?:baseline|within budget|over budget, STOP|not judged|failed): .*; audit ")
N_STEPS_IN_EPOCH = 8


# Runs of at most three epochs with an audit after each, which return the audit's owner.


def with_trainer(path, *, callbacks=(), **arguments):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    make_trainer(path, rows, [audit, *callbacks], **arguments).train()
    return audit.auditor


def with_sft(path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    from datasets import Dataset

    config = {"max_steps": -1, "num_train_epochs": 3, "disable_tqdm": False}
    make_sft(path, Dataset.from_list(list(rows)), [audit], config=config).train()
    return audit.auditor


def with_lightning(path, **arguments):
    rows, canaries = lightning_tiny.draw()
    audit = LightningPrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = lightning_tiny.make_trainer(path, [audit], **arguments)
    trainer.fit(lightning_tiny.TinyModule(), lightning_tiny.make_loader(rows))
    return audit.auditor


def with_own_loop(path, *, obeys=True):
    rows, canaries = own_loop.draw()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=3, output_dir=path)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    auditor.begin(model)
    for epoch in range(1, 4):
        own_loop.train_one_epoch(model, rows, optimizer)
        step = epoch * N_STEPS_IN_EPOCH
        if auditor.audit(model, step=step, epoch=epoch).decision.stop and obeys:
            try:
                auditor.restore_within_budget(model, optimizer)
            except AuditError:
                logging.getLogger("script").debug("as a script that goes on to save what it has")
            break
    auditor.finish(model)
    return auditor


SHELLS = {
    "Trainer": with_trainer,
    "Lightning": with_lightning,
    "own loop": with_own_loop,
}
CONSOLES = {
    **SHELLS,
    "Trainer with bars": partial(with_trainer, disable_tqdm=False),
    "SFTTrainer": with_sft,
    "Lightning with bars": partial(with_lightning, enable_progress_bar=True),
}


def lines_of(captured):
    """Lines as a terminal shows them, without the bars, which a user's handler writes behind."""
    text = re.sub(r"[^\r\n]*\d+/\d+ \[[^\]\r\n]*\]|\x1b\[A", "", f"{captured.out}\n{captured.err}")
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def ours(lines):
    """The package's own lines, without the dictionaries that trainers print."""
    return [line for line in lines if not line.startswith("{")]


@pytest.mark.parametrize("level", [None, "WARNING", "INFO"])
@pytest.mark.parametrize("shell", CONSOLES)
def test_each_audit_has_one_short_line_whatever_the_script_has_done_about_logging(
    tmp_path, monkeypatch, capsys, shell, level
):
    if shell == "SFTTrainer" and not find_spec("trl"):
        pytest.skip("TRL is not there on Python 3.10")
    judge_by_number(monkeypatch, 2)

    with script_logging(level):
        auditor = CONSOLES[shell](tmp_path)

    captured = capsys.readouterr()
    found = [line for line in ours(lines_of(captured)) if AUDIT_LINE.search(line)]
    assert [AUDIT_LINE.search(line)[0].split(":")[0] for line in found] == [
        "baseline",
        "within budget",
        "over budget, STOP",
    ]
    assert max(map(len, found)) <= 100
    text = captured.out + captured.err
    assert "'privacy/" not in text
    assert "{'epoch': '1'}" not in text
    assert text.count("Stopped at step 16") == 1
    assert text.count("Restored the weights of step 8") == 1
    assert text.count("Privacy audits (") == 1
    assert text.count(auditor.history.table()) == 1
    assert text.count("The model holds the weights of step 8: within budget.") == 1


def test_the_median_line_of_a_run_is_short(tmp_path, monkeypatch, capsys):
    judge_by_number(monkeypatch, 3)
    with script_logging():
        with_trainer(tmp_path)

    lengths = [len(line) for line in ours(lines_of(capsys.readouterr()))]

    median = statistics.median(lengths)
    with capsys.disabled():
        sys.stdout.write(f"\nmedian console line length: {median:g} characters, the longest {max(lengths)}\n")
    assert median <= 90


# No echo.


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_nothing_echoes_the_figures_wherever_callbacks_stand_and_others_get_them_all(tmp_path, capsys):
    rows, canaries = draw()
    audit, before, after = PrivacyAuditCallback(canaries), Recorder(), Recorder()

    class OwnBar(ProgressCallback):
        """A user's own, derived from the library's."""

    trainer = make_trainer(tmp_path, rows, [before], max_steps=8)
    for callback in (audit, after, PrinterCallback(), OwnBar()):
        trainer.add_callback(callback)
    handler = trainer.callback_handler
    callbacks = list(handler.callbacks)
    trainer.train()

    captured = capsys.readouterr()
    assert "'loss'" in captured.out
    assert "privacy/" not in captured.out + captured.err
    for recorder in (before, after):
        assert sum("privacy/auc_loss" in logs for logs in recorder.logs) == len(audit.history)
    assert sum("privacy/auc" in row for row in trainer.state.log_history) == len(audit.history)
    assert handler.callbacks == callbacks


def test_a_notebook_keeps_its_table_and_gets_the_lines(tmp_path, monkeypatch, capsys):
    shown = []
    handle = SimpleNamespace(update=lambda html: shown.append(html.data))
    display = ModuleType("IPython.display")
    display.HTML = lambda data: SimpleNamespace(data=data)
    display.display = lambda html, display_id=None: shown.append(html.data) or handle
    package = ModuleType("IPython")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    monkeypatch.delitem(sys.modules, "transformers.utils.notebook")
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, every="epoch")
    trainer = make_trainer(
        tmp_path, rows, [audit], num_train_epochs=2, eval_strategy="epoch", eval_dataset=rows
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(NotebookProgressCallback())
    with script_logging():
        trainer.train()

    out = capsys.readouterr().out
    assert len(AUDIT_LINE.findall(out)) == 3
    assert "Validation Loss" in shown[-1]


def test_one_level_silences_a_run(tmp_path, monkeypatch, capsys):
    judge_by_number(monkeypatch, 2)
    with script_logging():
        logging.getLogger("ezmia_callbacks").setLevel(logging.ERROR)
        with_own_loop(tmp_path)

    assert capsys.readouterr() == ("", "")


# However a run ends, it says what became of the training.


def run(shell, path, capsys):
    with script_logging("WARNING"):
        auditor = SHELLS[shell](path)
    captured = capsys.readouterr()
    return auditor, captured.out + captured.err


@pytest.mark.parametrize("shell", SHELLS)
def test_a_stop_at_the_first_audit_keeps_nothing(tmp_path, monkeypatch, capsys, shell):
    judge_by_number(monkeypatch, 1)

    _, text = run(shell, tmp_path, capsys)

    assert f"{NOTHING}: no audit was within the budget. Restored the starting weights." in text
    assert "To keep a part of it, audit more often" in text
    assert text.rstrip().endswith(f"{NOTHING}: the model holds the starting weights.")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_stop_after_a_full_disk_keeps_nothing(tmp_path, monkeypatch, capsys, shell):
    judge_by_number(monkeypatch, 3)
    write = kept_weights.write_tensors

    def fill_up(path, tensors):
        if "-0-" not in path.name:
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(kept_weights, "write_tensors", fill_up)

    _, text = run(shell, tmp_path, capsys)

    assert text.count("Weights could not be kept, and a stop would restore older ones") == 1
    assert f"{NOTHING}: the weights of step 16, within it, could not be kept." in text
    assert f"{NOTHING}: the model holds the starting weights." in text


@pytest.mark.parametrize("shell", SHELLS)
def test_a_restore_that_fails_keeps_nothing_within_the_budget(tmp_path, monkeypatch, capsys, shell):
    judge_by_number(monkeypatch, 2)

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(kept_weights.KeptWeights, "restore", fail)

    _, text = run(shell, tmp_path, capsys)

    assert text.count(f"{NOTHING} within the budget: the model is OVER BUDGET.") == 1
    assert "Earlier weights could not be restored: Writing the kept weights into the model failed" in text
    assert "The model holds the weights of step 16: it is OVER BUDGET." in text


@pytest.mark.parametrize("shell", SHELLS)
def test_a_run_whose_audits_all_failed_says_that_nobody_knows(tmp_path, monkeypatch, capsys, shell):
    statistics_of, n_passes = Scorer.statistics, []

    def fail(self, model, rows):
        n_passes.append(len(rows))
        # The baseline, and the rows by which kept weights are known again.
        if n_passes.count(len(rows)) > 1 and len(rows) > 20:
            raise RuntimeError("CUDA error")
        return statistics_of(self, model, rows)

    monkeypatch.setattr(Scorer, "statistics", fail)

    auditor, text = run(shell, tmp_path, capsys)

    assert auditor.history.n_failed == 3
    assert text.count("The audit at step 8 failed, and training goes on") == 1
    assert "The audit at step 16 failed" not in text
    assert len(re.findall(r"^failed: leakage unknown, RuntimeError", text, re.MULTILINE)) == 3
    assert "3 of 3 privacy audits failed" in text
    assert "Training ended without a verdict, so that the model may be OVER BUDGET" in text


@pytest.mark.parametrize("shell", SHELLS)
def test_a_run_that_was_never_judged_says_so(tmp_path, monkeypatch, capsys, shell):
    decide = Judge.decide

    def judge(self, metrics, history, *, is_baseline=False, **of_feeding):
        if is_baseline:
            return decide(self, metrics, history, is_baseline=True)
        return Decision(False, None, "not judged yet: members fed: 0", limit=0.65)

    monkeypatch.setattr(Judge, "decide", judge)

    _, text = run(shell, tmp_path, capsys)

    assert text.count("not judged: members fed: 0") == 3
    assert "without a verdict, so that the model may be OVER BUDGET: not judged yet: members fed: 0." in text


# A loop of one's own.


def train_after_the_last_audit(path, *, looks):
    rows, canaries = own_loop.draw()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=1, output_dir=path)
    model = own_loop.run(auditor, rows, n_epochs=1)
    own_loop.train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    auditor.finish(model if looks else None)


@pytest.mark.parametrize("looks", [True, False])
def test_steps_after_the_last_audit_are_not_passed_over(tmp_path, monkeypatch, capsys, looks):
    judge_by_number(monkeypatch, 2)
    with script_logging("WARNING"):
        train_after_the_last_audit(tmp_path, looks=looks)

    captured = capsys.readouterr()
    assert "does not hold the weights of any audit: its leakage is unknown" in captured.err


def test_a_loop_that_ignores_the_stop_is_told_and_loses_no_weights(tmp_path, monkeypatch, capsys):
    judge_by_number(monkeypatch, 2)

    with script_logging("WARNING"):
        auditor = with_own_loop(tmp_path, obeys=False)
        text = "".join(capsys.readouterr())
        model = make_model()
        kept = auditor.restore_within_budget(model)

    said = (
        "The audit of step 16 said STOP, and training goes on: call `restore_within_budget(model, optimizer)`"
    )
    assert text.count(said) == 1
    assert "The model holds the weights of step 24: it is OVER BUDGET." in text
    assert "The weights kept within the budget were not put back" in text
    assert kept.step == 8


def test_a_restore_is_said_though_nobody_ends_the_run(tmp_path, monkeypatch, capsys):
    judge_by_number(monkeypatch, 2)
    rows, canaries = own_loop.draw()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=3)

    with script_logging():
        model = own_loop.run(auditor, rows, n_epochs=3)
        auditor.restore_within_budget(model)
        auditor.restore_within_budget(model)

    text = "".join(capsys.readouterr())
    assert text.count("Restored the weights of step 1,") == 1
    assert "over budget, STOP" in text


def test_audits_of_a_run_that_is_over_are_left_to_the_caller(tmp_path, capsys):
    rows, canaries = own_loop.draw()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, judge_only=True)

    with script_logging():
        own_loop.run(auditor, rows, n_epochs=1)
        auditor.finish()

    assert "audit" not in capsys.readouterr().out
