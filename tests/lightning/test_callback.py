import json
import logging
import math
import pickle
import sys
import textwrap
import types
from datetime import timedelta
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from huggingface_tiny import stop_without_a_verdict
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning_tiny import (
    N_STEPS_IN_EPOCH,
    Bare,
    BareModule,
    DataModule,
    TinyModule,
    assert_same_weights,
    bare_logits,
    differs,
    draw,
    make_loader,
    make_trainer,
    seed_everything,
    validation_loader,
    weights,
)
from new_console import console_of_a_new_process
from restoring import make_adapted_model
from safetensors.torch import load_file, save_file
from tiny import make_model, make_rows, make_texts, make_tokenizer

import ezmia_callbacks
from ezmia_callbacks import AuditHistory, LeakageBudget, PrivacyAuditor, hold_out_canaries
from ezmia_callbacks.audit.judge import Judge
from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError, ReferenceMismatchError
from ezmia_callbacks.functional import Decision
from ezmia_callbacks.lightning import PrivacyAuditCallback
from ezmia_callbacks.lightning.trainer import language_model_in
from ezmia_callbacks.lightning.trainer_access import callback_classes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*isinstance.treespec, LeafSpec.*",
    "ignore:.*no `val_dataloader`.*",
    "ignore:.*callbacks used to create the checkpoint.*:UserWarning",
    "ignore:.*was called without a model.*:UserWarning",
    "ignore:.*there is no last checkpoint available.*:UserWarning",
    "ignore:.*smaller than the logging interval.*",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*is not empty.*:UserWarning",
    "ignore:.*dataloader is not resumable.*:UserWarning",
    "ignore:.*Could not find a config file.*:UserWarning",
    "ignore:.*in eval mode at the start.*:UserWarning",
    # peft reads a name that transformers 5 renamed.
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
)

NEVER_CROSSED = LeakageBudget(limit=0.99, rule="point")
# Crossed after the first epoch, and a good while before the last.
BUDGET = {"limit": 0.97, "rule": "point"}


class Witness(Callback):
    """Weights, modes and random state as every step ends, before anything is restored."""

    def __init__(self):
        self.weights = {}
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.weights[trainer.global_step] = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights[trainer.global_step] = weights(pl_module)
        modes = [module.training for module in pl_module.modules()]
        self.seen.append((torch.get_rng_state().sum().item(), modes, torch.is_grad_enabled()))


def fit(path, callbacks, *, module=None, validation=None, ckpt_path=None, seed=3, **arguments):
    rows, _ = draw()
    module = BareModule() if module is None else module
    trainer = make_trainer(path, callbacks, **arguments)
    seed_everything(seed)
    trainer.fit(module, make_loader(rows, is_shuffled=True), validation, ckpt_path=ckpt_path)
    return trainer, module


def make_audit(**arguments):
    return PrivacyAuditCallback(draw()[1], **arguments)


def bare_audit(**arguments):
    return make_audit(logits_fn=bare_logits, **arguments)


def in_budget(history):
    return [result.step for result in history if result.decision.is_within_budget]


def figures(history):
    return [{**result.to_dict(), "seconds": None, "overhead": None} for result in history]


def figures_of_all(history):
    """Of runs that fed every member by their first audit; without who was fed when, and names of tensors."""
    left_out = dict.fromkeys(("n_members_seen", "auc_recent", "weights"))
    return [{**row, **left_out} for row in figures(history)]


def adapted_module():
    return TinyModule(make_adapted_model(dropout=0.3), learning_rate=3e-2)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: TinyModule(make_model(dropout=0.2)), {}),
        (lambda: TinyModule(make_model(dropout=0.2)), {"precision": "bf16-mixed"}),
        (lambda: TinyModule(make_model(dropout=0.2)), {"accumulate_grad_batches": 3}),
        (lambda: TinyModule(make_model(dropout=0.2)), {"val_check_interval": 0.5, "num_sanity_val_steps": 2}),
        (adapted_module, {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "val_check_interval": 3}),
    ],
    ids=["plain", "bf16", "accumulation", "validation", "adapters"],
)
def test_training_is_the_same_to_the_last_bit(tmp_path, make, arguments):
    outcomes = []
    for name in ("without", "with"):
        audit = make_audit(budget=NEVER_CROSSED, every=2)
        witness = Witness()
        callbacks = [witness, ModelCheckpoint(tmp_path / name, every_n_train_steps=3, save_top_k=-1)]
        trainer, module = fit(
            tmp_path / name,
            [*callbacks, *([audit] if name == "with" else [])],
            module=make(),
            validation=validation_loader() if "val_check_interval" in arguments else None,
            enable_checkpointing=True,
            max_epochs=2,
            **arguments,
        )
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("privacy/")}
        outcomes.append((module, witness, metrics, trainer, audit))

    (plain, plain_seen, plain_metrics, *_), (audited, seen, metrics, trainer, audit) = outcomes
    assert len(audit.history.audits_after_baseline) > 2
    assert audit.history.n_failed == 0
    assert_same_weights(audited, plain.state_dict())
    assert seen.seen == plain_seen.seen
    assert metrics == plain_metrics


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_figures_are_those_of_an_auditor_called_by_hand(tmp_path, precision):
    witness, audit = Witness(), make_audit(batch_size=16)
    trainer, module = fit(tmp_path, [witness, audit], module=TinyModule(), precision=precision)

    auditor = PrivacyAuditor(
        audit.auditor.canaries,
        n_audits=3,
        tokenizer=None,
        batch_size=16,
        autocast=trainer.precision_plugin.forward_context,
        assume_seen=True,
    )
    for step in (0, 8, 16, 24):
        module.load_state_dict(witness.weights[step])
        if step == 0:
            auditor.begin(module.model, epoch=0.0)
        else:
            auditor.audit(module.model, step=step, epoch=step / N_STEPS_IN_EPOCH)
    assert figures_of_all(audit.history) == figures_of_all(auditor.history)
    assert auditor.history[-1].metrics["auc"].value != 0.5


def test_forward_passes_run_in_the_precision_of_training(tmp_path):
    seen = []

    class Watched(TinyModule):
        def __init__(self):
            super().__init__()
            self.model.register_forward_hook(lambda m, i, o: seen.append((m.training, o.logits.dtype)))

    fit(tmp_path, [make_audit()], module=Watched(), precision="bf16-mixed", max_epochs=1)

    assert {dtype for is_training, dtype in seen if not is_training} == {torch.bfloat16}


def test_a_memorizing_run_stops_and_ends_with_the_last_good_weights(tmp_path, caplog):
    witness, audit = Witness(), make_audit(budget=LeakageBudget(limit=0.6))

    trainer, module = fit(tmp_path, [witness, audit], module=TinyModule(), max_epochs=30)

    good = audit.history.last_within_budget
    assert audit.history.stopped is audit.history[-1]
    assert trainer.global_step == audit.history.stopped.step < 30 * N_STEPS_IN_EPOCH
    assert 0 < good.step < audit.history.stopped.step
    assert_same_weights(module, witness.weights[good.step])
    assert differs(module, witness.weights[audit.history.stopped.step])
    assert f"Restored the weights of step {good.step}, the last audit within it" in caplog.text
    assert AuditHistory.load(tmp_path / "_privacy_audit" / "history.jsonl").results == audit.history.results
    assert not list((tmp_path / "_privacy_audit").glob("last_within_budget"))


class SaveOften(Callback):
    """What a user's own callback may do at any time."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 3 == 1:
            trainer.save_checkpoint(self.folder / f"own-{trainer.global_step}.ckpt")


class OwnCheckpoint(Checkpoint):
    """A checkpoint callback of the user's that knows no veto."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"own-{trainer.global_step}.ckpt")


SAVES = {
    "default": (lambda folder: ModelCheckpoint(folder), {}),
    "each epoch": (lambda folder: ModelCheckpoint(folder, save_top_k=-1, save_last=True), {}),
    "steps": (lambda folder: ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=3), {}),
    "steps, rare audits": (
        lambda folder: ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=5),
        {"every": 200},
    ),
    "weights alone": (
        lambda folder: ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=3, save_weights_only=True),
        {},
    ),
    "best by loss": (lambda folder: ModelCheckpoint(folder, monitor="val_loss", save_top_k=2), {}),
    "best by leakage": (lambda folder: ModelCheckpoint(folder, monitor="privacy/auc", save_top_k=3), {}),
    "after validation": (
        lambda folder: ModelCheckpoint(folder, save_top_k=-1),
        {"val_check_interval": 3, "every": 7},
    ),
    "after validation, weights alone": (
        lambda folder: ModelCheckpoint(folder, save_top_k=-1, save_weights_only=True),
        {"val_check_interval": 0.5},
    ),
    "any time": (
        # Less than a step takes; old releases read 0 as "never".
        lambda folder: ModelCheckpoint(folder, save_top_k=-1, train_time_interval=timedelta(microseconds=1)),
        {"every": 5},
    ),
    "accumulating": (
        lambda folder: ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1),
        {"accumulate_grad_batches": 3},
    ),
    "by hand": (SaveOften, {}),
    "own callback": (OwnCheckpoint, {}),
}


WITH_PATIENCE = ("weights alone", "by hand", "own callback")


@pytest.mark.parametrize(
    ("case", "patience"), [*((case, 0) for case in SAVES), *((case, 1) for case in WITH_PATIENCE)]
)
def test_every_checkpoint_that_is_left_is_within_budget(tmp_path, case, patience):
    make_callback, settings = SAVES[case]
    arguments = dict(settings)
    witness = Witness()
    # Steps of 24 rows show so much of each member that the bare model's first verdict is "over".
    is_slow = case == "accumulating"
    audit = (make_audit if is_slow else bare_audit)(
        budget=LeakageBudget(limit=0.9 if is_slow else 0.985, rule="point", patience=patience),
        every=arguments.pop("every", "epoch"),
    )
    folder = tmp_path / "checkpoints"

    trainer, module = fit(
        tmp_path,
        [make_callback(folder), audit, witness],
        module=TinyModule(learning_rate=2e-2) if is_slow else BareModule(learning_rate=1e-3),
        validation=validation_loader(),
        max_epochs=24,
        enable_checkpointing=True,
        **arguments,
    )

    good = in_budget(audit.history)
    assert audit.history.stopped is not None
    assert good[-1] > 0
    assert_same_weights(module, witness.weights[good[-1]])
    # Saved while too few members had been fed for a verdict: no other weights would do instead.
    unjudged = {result.step for result in audit.history if audit.history.is_unjudged(result)}
    saved = sorted(folder.glob("*.ckpt"))
    assert saved
    for path in saved:
        checkpoint = torch.load(path, weights_only=True)
        if checkpoint["global_step"] in unjudged:
            continue
        within = min(checkpoint["global_step"], good[-1])
        step = max(s for s in good if s <= within)
        if "own" not in path.name and case != "any time":
            assert checkpoint["global_step"] in good
        assert_same_weights(checkpoint["state_dict"], witness.weights[step])
    for callback in trainer.checkpoint_callbacks:
        best = getattr(callback, "best_model_path", None)
        if best:
            step = torch.load(best, weights_only=True)["global_step"]
            assert case == "any time" or step in good


def test_the_trained_weights_go_on_after_a_save_while_over_budget(tmp_path):
    outcomes = []
    for name, callbacks in (("without", []), ("with", [OwnCheckpoint(tmp_path)])):
        witness = Witness()
        audit = bare_audit(budget=LeakageBudget(**BUDGET, patience=2))
        fit(tmp_path / name, [witness, audit, *callbacks], max_epochs=24, enable_checkpointing=name == "with")
        outcomes.append((witness, audit))

    (plain, plain_audit), (saving, audit) = outcomes
    assert audit.history.stopped.decision.n_over_in_a_row == 3
    assert figures(audit.history) == figures(plain_audit.history)
    for step, expected in plain.weights.items():
        assert_same_weights(saving.weights[step], expected)


def test_a_checkpoint_whose_audit_failed_is_set_aside_when_the_run_ends_over_budget(tmp_path, caplog):
    audit = bare_audit(budget=LeakageBudget(**BUDGET), every="epoch")
    folder = tmp_path / "checkpoints"

    saver = ModelCheckpoint(folder, save_top_k=-1)
    seen = []

    class SeeMonitor(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["privacy/auc"].item())

    class ThenLeak(Callback):
        """One failed audit, then a very leaky epoch."""

        def on_train_epoch_start(self, trainer, pl_module):
            # No batch is of this size.
            audit.auditor._scorer.batch_size = 0 if trainer.current_epoch == 2 else 8
            if trainer.current_epoch == 3:
                trainer.optimizers[0].param_groups[0]["lr"] = 0.1

    fit(
        tmp_path,
        [audit, ThenLeak(), SeeMonitor(), saver],
        max_epochs=24,
        enable_checkpointing=True,
    )

    moved = list((tmp_path / "_privacy_audit" / "over_budget").glob("*.ckpt"))
    left = sorted(torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt"))
    assert [result.status for result in audit.history] == ["ok", "ok", "ok", "failed", "ok"]
    assert audit.history.stopped.step == 32
    assert [path.name for path in moved] == ["step-24-epoch=2-step=24.ckpt"]
    assert "was moved to" in caplog.text
    assert left == [8, 16]
    assert saver.best_model_path == ""
    assert math.isnan(seen[2])
    assert not any(math.isnan(value) for value in (*seen[:2], *seen[3:]))


@pytest.mark.parametrize("limits", [{"min_epochs": 14}, {"min_steps": 100}], ids=str)
def test_a_minimum_that_overrides_the_stop_is_announced_and_undone(tmp_path, caplog, limits):
    witness, audit = Witness(), bare_audit(budget=LeakageBudget(**BUDGET))
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)

    trainer, module = fit(
        tmp_path, [witness, audit, saver], max_epochs=24, enable_checkpointing=True, **limits
    )

    good = audit.history.last_within_budget.step
    assert "OVERRIDES the leakage budget" in caplog.text
    assert audit.history.stopped is audit.history[-1]
    assert trainer.global_step > audit.history.stopped.step
    assert_same_weights(module, witness.weights[good])
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["global_step"] <= good


def test_no_warning_without_a_minimum(tmp_path, caplog):
    fit(tmp_path, [bare_audit(budget=NEVER_CROSSED)], max_epochs=1)

    assert "OVERRIDES" not in caplog.text


def test_restore_can_be_declined(tmp_path):
    witness, audit = Witness(), bare_audit(budget=LeakageBudget(**BUDGET), restore=False)
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)

    trainer, module = fit(tmp_path, [witness, audit, saver], max_epochs=24, enable_checkpointing=True)

    assert trainer.global_step == audit.history.stopped.step
    assert_same_weights(module, witness.weights[trainer.global_step])
    assert torch.load(saver.best_model_path, weights_only=True)["global_step"] == trainer.global_step


def test_weights_that_cannot_be_judged_any_more_are_not_kept(tmp_path, monkeypatch, caplog):
    stop_without_a_verdict(monkeypatch, after=2)
    witness, audit = Witness(), make_audit(budget=LeakageBudget(limit=0.8), every="epoch")
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)

    _, module = fit(
        tmp_path, [witness, audit, saver], module=TinyModule(), max_epochs=5, enable_checkpointing=True
    )

    steps = [result.step for result in audit.history]
    assert steps == [n * N_STEPS_IN_EPOCH for n in range(4)]
    assert_same_weights(module, witness.weights[steps[2]])
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"step={step}.ckpt" for step in steps[1:3]}
    assert f"Stopped at step {steps[3]}: leakage could no longer be judged against the budget" in caplog.text


def test_weights_that_cannot_be_put_back_are_reported(tmp_path, caplog):
    audit = bare_audit(budget=LeakageBudget(**BUDGET))

    class LoseWeights(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            audit.auditor._weights._kept.discard()

    fit(tmp_path, [audit, LoseWeights()], max_epochs=24)

    assert audit.history.stopped is not None
    assert "Earlier weights could not be restored" in caplog.text
    assert "OVER BUDGET" in caplog.text


class SeeMetrics(Callback):
    def __init__(self):
        self.at_epoch_end = []
        self.after_validation = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.at_epoch_end.append((trainer.global_step, trainer.callback_metrics["privacy/auc"].item()))

    def on_validation_end(self, trainer, pl_module):
        self.after_validation.append((trainer.global_step, trainer.callback_metrics["privacy/auc"].item()))


class SeeScores(EarlyStopping):
    """What early stopping reads, whenever it does."""

    def __init__(self, **arguments):
        super().__init__("privacy/auc", patience=100, **arguments)
        self.scores = []

    def _evaluate_stopping_criteria(self, current):
        self.scores.append(round(current.item(), 5))
        return super()._evaluate_stopping_criteria(current)


def curve(history, *, steps=None):
    return [
        round(r.metrics["auc"].value, 5)
        for r in history.audits_after_baseline
        if steps is None or r.step in steps
    ]


def test_early_stopping_and_checkpoints_see_the_value_of_their_own_epoch(tmp_path):
    audit, stopping = bare_audit(), SeeScores()
    saver = ModelCheckpoint(tmp_path / "checkpoints", monitor="privacy/auc", mode="max", save_top_k=-1)

    fit(tmp_path, [stopping, saver, audit], max_epochs=4, enable_checkpointing=True)

    assert stopping.scores == curve(audit.history)
    assert [round(score.item(), 5) for score in saver.best_k_models.values()] == curve(audit.history)


@pytest.mark.parametrize("every", ["epoch", 5], ids=str)
def test_early_stopping_after_mid_epoch_validation_sees_the_value_of_that_moment(tmp_path, every):
    audit, stopping = bare_audit(every=every), SeeScores(check_on_train_epoch_end=False)

    fit(
        tmp_path,
        [stopping, audit],
        validation=validation_loader(),
        val_check_interval=0.5,
        num_sanity_val_steps=2,
    )

    assert stopping.scores == curve(audit.history, steps=range(0, 25, 4))
    assert len(stopping.scores) == 6


def test_early_stopping_on_leakage_ends_the_run(tmp_path):
    stopping = EarlyStopping("privacy/auc", mode="min", stopping_threshold=None, patience=0)

    trainer, _ = fit(tmp_path, [bare_audit(), stopping], max_epochs=24)

    assert 0 < trainer.global_step < 24 * N_STEPS_IN_EPOCH


def test_every_logger_holds_the_curve(tmp_path):
    loggers = [CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two")]
    audit = bare_audit(every=4, prefix="leak/")

    fit(tmp_path, [audit], logger=loggers)

    for name in ("one", "two"):
        lines = (tmp_path / name / "version_0" / "metrics.csv").read_text().splitlines()
        columns = lines[0].split(",")
        rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
        found = [(int(row["step"]), float(row["leak/auc"])) for row in rows if row["leak/auc"]]
        assert found == [(r.step, r.metrics["auc"].value) for r in audit.history]
        assert any(row["train_loss"] for row in rows)


@pytest.mark.parametrize(
    ("every", "arguments", "steps"),
    [
        ("epoch", {}, [8, 16, 24]),
        (5, {}, [5, 10, 15, 20, 24]),
        (0.5, {}, [4, 8, 12, 16, 20, 24]),
        (0.3, {"max_epochs": 1}, [2, 4, 6, 8]),
        (100, {"max_steps": 11, "max_epochs": -1}, [11]),
        ("epoch", {"accumulate_grad_batches": 3}, [3, 6, 9]),
        (2, {"accumulate_grad_batches": 3, "max_epochs": 2}, [2, 4, 6]),
        ("epoch", {"limit_train_batches": 5}, [5, 10, 15]),
    ],
    ids=str,
)
def test_audits_come_when_asked_for_and_are_planned(tmp_path, every, arguments, steps):
    audit = bare_audit(every=every)

    fit(tmp_path, [audit], **arguments)

    assert [result.step for result in audit.history.audits_after_baseline] == steps
    assert audit.auditor._judge.n_audits == len(steps)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"max_epochs": 1}, [1, 2, 4, 8]),
        ({}, [1, 2, 4, 8, 16, 24]),
        ({"limit_train_batches": 2}, [1, 2, 4, 6]),
        ({"max_steps": 5, "max_epochs": -1}, [1, 2, 5]),
        ({"max_steps": 11, "max_epochs": -1}, [1, 2, 4, 8, 11]),
        ({"accumulate_grad_batches": 2}, [1, 2, 4, 8, 12]),
    ],
    ids=["one epoch", "epochs", "few steps", "less than an epoch", "steps", "accumulation"],
)
def test_under_a_budget_the_first_epoch_is_looked_at_early_and_all_looks_are_planned(
    tmp_path, caplog, arguments, steps
):
    caplog.set_level(logging.INFO, logger="ezmia_callbacks")
    audit = bare_audit(budget=NEVER_CROSSED, every="auto")

    fit(tmp_path, [audit], **arguments)

    assert [result.step for result in audit.history.audits_after_baseline] == steps
    assert audit.history.run_metadata.n_planned_audits == len(steps)
    announced = [message for message in caplog.messages if message.startswith("First audit")]
    assert len(announced) == 1
    assert announced[0].startswith("First audit at step 1 (epoch ")
    assert announced[0].endswith("only the starting weights would be left.")


@pytest.mark.parametrize(
    ("arguments", "steps", "first"),
    [
        ({}, [8, 16, 24], "First audit at the end of the first epoch;"),
        ({"max_steps": 12, "max_epochs": -1}, [2, 3, 6, 8, 12], "First audit at step 2 at the latest;"),
    ],
    ids=["epochs", "steps"],
)
def test_a_stream_is_looked_at_early_where_its_steps_are_known(tmp_path, caplog, arguments, steps, first):
    caplog.set_level(logging.INFO, logger="ezmia_callbacks")
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=NEVER_CROSSED)

    make_trainer(tmp_path, [audit], **arguments).fit(TinyModule(), make_loader(Stream(rows)))

    assert [result.step for result in audit.history.audits_after_baseline] == steps
    assert audit.history.run_metadata.n_planned_audits == "unknown"
    assert first in caplog.text


def test_audits_before_checkpoints_are_planned(tmp_path):
    audit = bare_audit(every=5, budget=NEVER_CROSSED)
    saver = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=3)

    fit(tmp_path, [audit, saver], enable_checkpointing=True)

    assert [r.step for r in audit.history.audits_after_baseline] == sorted(
        {*range(3, 25, 3), *range(5, 25, 5), 8, 16, 24}
    )
    assert audit.auditor._judge.n_audits == len(audit.history.audits_after_baseline)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_has_no_plan_and_no_fractions(tmp_path, caplog):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries)

    make_trainer(tmp_path, [audit]).fit(TinyModule(), make_loader(Stream(rows)))

    assert [result.step for result in audit.history.audits_after_baseline] == [8, 16, 24]
    assert audit.auditor._judge.n_audits is None
    assert "Training on a stream" in caplog.text
    with pytest.raises(ConfigurationError, match="the length of an epoch is unknown"):
        make_trainer(tmp_path, [PrivacyAuditCallback(canaries, every=0.5)]).fit(
            TinyModule(), make_loader(Stream(rows))
        )


def test_the_sanity_check_and_plain_validation_are_not_audited(tmp_path):
    audit = bare_audit(budget=NEVER_CROSSED, every=8)
    saver = ModelCheckpoint(tmp_path / "checkpoints")

    trainer, module = fit(
        tmp_path,
        [audit, saver],
        validation=validation_loader(),
        num_sanity_val_steps=2,
        enable_checkpointing=True,
    )
    steps = [result.step for result in audit.history]
    trainer.validate(module, validation_loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")

    assert steps == [0, 8, 16, 24]
    assert [result.step for result in audit.history] == steps


def test_fast_dev_run_makes_no_audit_and_says_so(tmp_path, caplog):
    audit = bare_audit(budget=LeakageBudget(limit=0.6))
    caplog.set_level(logging.INFO, logger="ezmia_callbacks")

    fit(tmp_path, [audit], fast_dev_run=True)

    assert len(audit.history) == 0
    assert caplog.text.count("no privacy audit is made") == 1
    assert not (tmp_path / "_privacy_audit").exists()


def interrupted(tmp_path, *, audit=None, **arguments):
    """A run that was ended after two of four epochs, and its checkpoint."""
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)
    callbacks = [saver] if audit is None else [saver, audit]
    fit(tmp_path, callbacks, max_epochs=2, enable_checkpointing=True, **arguments)
    return saver.best_model_path


def fit_in_order(path, callbacks, *, ckpt_path=None, max_epochs=4):
    """Without shuffling, so that a resumed run sees the same batches."""
    rows, _ = draw()
    module = BareModule()
    trainer = make_trainer(path, callbacks, max_epochs=max_epochs, enable_checkpointing=True)
    trainer.fit(module, make_loader(rows), ckpt_path=ckpt_path)
    return trainer, module


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(tmp_path):
    def savers(name):
        return ModelCheckpoint(tmp_path / name / "checkpoints", save_top_k=-1)

    def audits(name):
        return bare_audit(output_dir=tmp_path / name / "audit", budget=NEVER_CROSSED, every="epoch")

    whole, saver = audits("whole"), savers("whole")
    _, expected = fit_in_order(tmp_path, [whole, saver])
    first, saver = audits("cut"), savers("cut")
    fit_in_order(tmp_path, [first, saver], max_epochs=2)
    # The plan of a run counts in its bands: the second half knows the same total.
    resumed = audits("cut")

    _, module = fit_in_order(tmp_path, [resumed, savers("cut")], ckpt_path=saver.best_model_path)

    state = torch.load(saver.best_model_path, weights_only=True)["callbacks"][first.state_key]
    assert [row["step"] for row in state["history"]] == [0, 8, 16]
    assert json.loads(json.dumps(state)) == state
    assert_same_weights(module, expected.state_dict())
    assert [r.step for r in resumed.history] == [0, 8, 16, 24, 32]
    assert figures(resumed.history)[3:] == figures(whole.history)[3:]
    values = [r.metrics["auc"].value for r in resumed.history]
    assert values == [r.metrics["auc"].value for r in whole.history]


def cross_at_once(monkeypatch):
    """Every audit from here on is over the budget, which is the same one: what it judged before stays."""
    over = Decision(True, False, "over budget", n_over_in_a_row=1)
    monkeypatch.setattr(Judge, "decide", lambda *figures, **of_feeding: over)


def test_a_resumed_run_goes_back_to_the_checkpoint_if_it_crosses_the_budget_at_once(tmp_path, monkeypatch):
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)
    # The limit is one that EZ does not cross in two epochs.
    within = bare_audit(budget=LeakageBudget(**BUDGET), score="ez")
    fit_in_order(tmp_path, [within, saver], max_epochs=2)
    checkpoint = torch.load(saver.best_model_path, weights_only=True)
    cross_at_once(monkeypatch)
    audit = bare_audit(budget=LeakageBudget(**BUDGET), every=1, score="ez")

    trainer, module = fit_in_order(tmp_path, [audit], ckpt_path=saver.best_model_path)

    assert trainer.global_step == audit.history.stopped.step == 17
    assert_same_weights(module, checkpoint["state_dict"])


def test_resuming_a_stopped_run_starts_from_the_weights_that_were_put_back(tmp_path, monkeypatch):
    audit = bare_audit(budget=LeakageBudget(**BUDGET))
    trainer, module = fit_in_order(tmp_path, [audit], max_epochs=24)
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    good, stopped = audit.history.last_within_budget.step, trainer.global_step
    cross_at_once(monkeypatch)
    again = bare_audit(budget=LeakageBudget(**BUDGET), every=1)

    _, resumed = fit_in_order(tmp_path, [again], ckpt_path=tmp_path / "final.ckpt", max_epochs=26)

    assert good < stopped
    assert [r.step for r in again.history if r.step <= good] == [
        r.step for r in audit.history if r.step <= good
    ]
    assert again.history[-1].step == stopped + 1
    assert again.history.stopped is again.history[-1]
    assert_same_weights(resumed, module.state_dict())


def test_a_checkpoint_without_the_callback_is_refused(tmp_path):
    path = interrupted(tmp_path)

    with pytest.raises(ReferenceMismatchError, match=r"made without this callback.*without `ckpt_path`"):
        fit(tmp_path, [bare_audit()], ckpt_path=path, max_epochs=4)


def test_a_reference_that_is_missing_or_anothers_is_refused(tmp_path):
    path = interrupted(tmp_path, audit=bare_audit())

    fit(tmp_path, [bare_audit()], module=BareModule(seed=5), max_epochs=1)
    with pytest.raises(ReferenceMismatchError, match=r"are those of another run .*: pass the `output_dir`"):
        fit(tmp_path, [bare_audit()], ckpt_path=path, max_epochs=4)
    with pytest.raises(ReferenceMismatchError):
        fit(tmp_path, [bare_audit(output_dir=tmp_path / "none")], ckpt_path=path, max_epochs=4)


def test_a_second_fit_of_the_same_module_keeps_the_reference(tmp_path, caplog):
    audit = bare_audit(budget=NEVER_CROSSED, every="epoch")
    _, module = fit(tmp_path, [audit])
    before = audit.auditor.reference.log_probs.copy()
    trained = audit.history[-1].metrics["auc"].value

    fit(tmp_path, [audit], module=module, max_epochs=1)

    assert "Training starts again" in caplog.text
    assert (audit.auditor.reference.log_probs == before).all()
    assert [result.step for result in audit.history] == [0, 8]
    assert audit.history[-1].metrics["auc"].value > 0.9
    assert trained > 0.9


def test_the_same_trainer_can_go_on_and_testing_between_changes_nothing(tmp_path):
    rows, _ = draw()
    audit = bare_audit(budget=NEVER_CROSSED, every="epoch")
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)
    trainer, module = fit(tmp_path, [audit, saver], max_epochs=2, enable_checkpointing=True)
    before = audit.auditor.reference.log_probs.copy()

    trainer.validate(module, validation_loader(), ckpt_path=saver.best_model_path, verbose=False)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, make_loader(rows))

    assert (audit.auditor.reference.log_probs == before).all()
    assert [result.step for result in audit.history] == [0, 8, 16, 24, 32]


def test_another_module_gets_a_reference_of_its_own(tmp_path):
    audit = bare_audit()
    fit(tmp_path, [audit], max_epochs=1)
    before = audit.auditor.reference.log_probs.copy()

    fit(tmp_path, [audit], module=BareModule(seed=9), max_epochs=1)

    assert (audit.auditor.reference.log_probs != before).any()
    assert audit.history[0].metrics["auc"].value == 0.5


def test_an_error_in_mid_run_leaves_a_valid_history_and_an_audited_checkpoint(tmp_path):
    witness, audit = Witness(), bare_audit(budget=LeakageBudget(limit=0.501, rule="point"), every=100)

    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                raise KeyError("broken")

    saver = OnExceptionCheckpoint(tmp_path, filename="broken")
    with pytest.raises(KeyError):
        fit(tmp_path, [witness, audit, saver, Break()], enable_checkpointing=True, max_epochs=5)

    saved = AuditHistory.load(tmp_path / "_privacy_audit" / "history.jsonl")
    good = audit.history.last_within_budget.step
    checkpoint = torch.load(tmp_path / "broken.ckpt", weights_only=True)
    assert saved.results == audit.history.results
    assert_same_weights(checkpoint["state_dict"], witness.weights[good])
    assert checkpoint["callbacks"][audit.state_key]["weights_step"] == good


def test_ctrl_c_leaves_a_valid_history(tmp_path):
    audit = bare_audit()

    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 12:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(tmp_path, [audit, Interrupt()])

    saved = AuditHistory.load(tmp_path / "_privacy_audit" / "history.jsonl")
    assert [result.step for result in saved] == [0, 8]


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_failed_audit_is_a_gap_or_an_end(tmp_path, on_error, caplog):
    audit = bare_audit(on_error=on_error)
    seen = []

    class Diverge(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            # No batch is of this size.
            audit.auditor._scorer.batch_size = 0 if trainer.current_epoch == 1 else 8

        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["privacy/auc"].item())

    if on_error == "raise":
        with pytest.raises(ValueError, match="must not be zero"):
            fit(tmp_path, [audit, Diverge()])
        return
    fit(tmp_path, [audit, Diverge()])
    assert [result.status for result in audit.history] == ["ok", "ok", "failed", "ok"]
    assert [math.isnan(value) for value in seen] == [False, True, False]
    assert "1 of 3 privacy audits failed" in caplog.text


def test_adapters_are_found_inside_and_can_be_the_reference(tmp_path):
    auto, adapter = (
        make_audit(prefix="a/"),
        make_audit(prefix="b/", reference="adapter", output_dir=tmp_path / "b"),
    )

    fit(tmp_path, [auto, adapter], module=TinyModule(make_adapted_model(), learning_rate=3e-2))

    assert [r.metrics["auc"].value for r in auto.history] == [r.metrics["auc"].value for r in adapter.history]
    assert auto.history[-1].metrics["auc"].value != 0.5


def test_a_frozen_copy_and_a_module_are_references_like_any_other(tmp_path):
    values = []
    for name, reference in (("auto", "auto"), ("copy", "copy"), ("module", make_model())):
        audit = make_audit(reference=reference)
        fit(tmp_path / name, [audit], module=TinyModule())
        values.append([result.metrics["auc"].value for result in audit.history])

    assert values[0] == values[1] == values[2]


def test_a_checkpoint_folder_can_be_the_reference(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    audit, plain = make_audit(reference=tmp_path / "base"), make_audit()

    fit(tmp_path / "a", [audit], module=TinyModule())
    fit(tmp_path / "b", [plain], module=TinyModule())

    assert curve(audit.history) == curve(plain.history)
    with pytest.raises(ConfigurationError, match="nor a checkpoint that can be loaded"):
        fit(tmp_path / "c", [make_audit(reference=str(tmp_path / "missing"))], module=TinyModule())


def test_a_checkpoint_with_missing_weights_is_no_reference(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(ConfigurationError, match=r"weights are missing: .*h\.1\.mlp"):
        fit(tmp_path / "run", [make_audit(reference=tmp_path / "base")], module=TinyModule())


def test_a_model_of_ones_own_is_audited_through_its_logits(tmp_path):
    audit = bare_audit(reference="copy")

    fit(tmp_path, [audit], max_epochs=2)

    assert [result.status for result in audit.history] == ["ok"] * 3
    assert audit.history[-1].member_loss < audit.history[0].member_loss


class Two(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second


def test_the_language_model_is_the_one_outermost(tmp_path):
    model, adapted = make_model(), make_adapted_model()

    assert language_model_in(TinyModule(model)) is model
    assert language_model_in(model) is model
    assert language_model_in(TinyModule(adapted)) is adapted
    assert language_model_in(Two(model, model)) is model
    assert language_model_in(Two(model, torch.nn.Linear(2, 2))) is model
    # Encoders and the inner part of a causal model have no output embeddings.
    assert language_model_in(Two(make_model().transformer, model)) is model
    compiled = torch.compile(model)
    assert language_model_in(Two(compiled, torch.nn.Linear(2, 2))) is compiled


@pytest.mark.parametrize(
    ("module", "got"),
    [(BareModule(), "none"), (Two(make_model(), make_model()), "GPT2LMHeadModel, GPT2LMHeadModel")],
    ids=["none", "two"],
)
def test_no_language_model_or_several_ask_for_logits_fn(module, got):
    with pytest.raises(ConfigurationError, match=f"got {got}: pass `logits_fn="):
        language_model_in(module)


def test_canaries_that_the_model_cannot_take_are_refused(tmp_path):
    rows = make_rows(make_texts(120, n_words=40))
    canaries = hold_out_canaries(rows, n_members=30, n_non_members=60, seed=0)[1]

    with pytest.raises(ConfigurationError, match="A canary has 40 tokens, the model takes 32"):
        fit(tmp_path, [PrivacyAuditCallback(canaries)], module=TinyModule())


def test_text_takes_the_modules_tokenizer(tmp_path):
    train, canaries = hold_out_canaries(make_texts(120), n_members=30, n_non_members=60, seed=0)
    module = TinyModule()
    module.tokenizer = make_tokenizer()
    by_module, by_argument = (
        PrivacyAuditCallback(canaries),
        PrivacyAuditCallback(canaries, tokenizer=make_tokenizer()),
    )

    for audit, chosen in ((by_module, module), (by_argument, TinyModule())):
        make_trainer(tmp_path, [audit], max_epochs=1).fit(chosen, make_loader(make_rows(train)))

    assert figures(by_module.history) == figures(by_argument.history)
    with pytest.raises(ConfigurationError, match="pass `tokenizer=`"):
        make_trainer(tmp_path, [PrivacyAuditCallback(canaries)]).fit(
            TinyModule(), make_loader(make_rows(train))
        )


def test_canaries_are_drawn_from_the_dataloaders(tmp_path):
    audit = PrivacyAuditCallback(n_members=40, n_non_members=15)

    fit(tmp_path, [audit], module=TinyModule(), validation=validation_loader(), num_sanity_val_steps=2)

    assert audit.auditor.encoded.n_members == 40
    assert audit.auditor.encoded.n_non_members == 15
    assert not audit.auditor.canaries.provenance.is_randomized
    assert len(audit.history.audits_after_baseline) == 3


def test_averages_of_weights_are_refused_under_a_budget(tmp_path):
    def averaging():
        return StochasticWeightAveraging(swa_lrs=1e-3)

    with pytest.raises(ConfigurationError, match="StochasticWeightAveraging replaces the model's weights"):
        fit(tmp_path, [bare_audit(budget=NEVER_CROSSED), averaging()])
    fit(tmp_path, [bare_audit(), averaging()])


def test_weights_saved_alone_at_any_time_are_refused_under_a_budget(tmp_path):
    saver = ModelCheckpoint(tmp_path, train_time_interval=timedelta(hours=1), save_weights_only=True)

    with pytest.raises(ConfigurationError, match="use `every_n_train_steps`"):
        fit(tmp_path, [bare_audit(budget=NEVER_CROSSED), saver], enable_checkpointing=True)


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy"])
def test_strategies_that_shard_are_refused_by_name(name):
    """Lightning itself lets none but the second begin without a GPU."""
    trainer = SimpleNamespace(strategy=getattr(import_module("lightning.pytorch.strategies"), name)())

    with pytest.raises(ConfigurationError, match=f"^{name} holds the weights in pieces"):
        make_audit()._refuse_unsupported(trainer)


def test_two_callbacks_must_keep_apart(tmp_path):
    with pytest.raises(ConfigurationError, match="share an `output_dir`"):
        fit(tmp_path, [bare_audit(), bare_audit(prefix="other/")])
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(tmp_path, [bare_audit(), bare_audit(output_dir=tmp_path / "other")])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"every": 0}, "`every` must be"),
        ({"every": 1.5}, "`every` must be"),
        ({"every": True}, "`every` must be"),
        ({"score": "best"}, "Unknown score"),
        ({"budget": 0.6}, "`budget` must be a LeakageBudget"),
        ({"canaries": ["a"]}, "`canaries` must be a CanarySet"),
        ({"canaries": "hold_out"}, r"hold_out_canaries\(train_dataset\)`, make the loader"),
    ],
    ids=str,
)
def test_arguments_that_can_never_work_are_refused(arguments, match):
    with pytest.raises(ConfigurationError, match=match):
        PrivacyAuditCallback(**arguments)


def test_the_arguments_are_those_of_the_hugging_face_callback():
    import inspect

    def arguments(callback):
        parameters = inspect.signature(callback.__init__).parameters
        return {name: p.default for name, p in parameters.items()}

    own, other = arguments(PrivacyAuditCallback), arguments(ezmia_callbacks.PrivacyAuditCallback)

    # A Hugging Face trainer has a tokenizer; a Lightning one hands itself over.
    assert {k: v for k, v in own.items() if k != "tokenizer"} == {
        k: v for k, v in other.items() if k != "trainer"
    }


def test_the_callback_can_be_pickled_before_and_after(tmp_path):
    audit = bare_audit(budget=NEVER_CROSSED)
    again = pickle.loads(pickle.dumps(audit))
    fit(tmp_path, [again], max_epochs=1)

    after = pickle.loads(pickle.dumps(again))

    assert again.history[-1].step == 8
    assert after.auditor is None
    assert after.settings == audit.settings


def test_a_callback_that_came_by_pickle_shows_its_audits(tmp_path, capsys):
    pickled = pickle.dumps(bare_audit())

    with console_of_a_new_process():
        fit(tmp_path, [pickle.loads(pickled)], max_epochs=1)

    assert "; audit at step 8" in capsys.readouterr().out


def test_the_same_numbers_under_the_other_package(tmp_path, monkeypatch):
    import pytorch_lightning as other

    # It is built on the packages that are loaded when it is imported, and old releases insist on their class.
    monkeypatch.setattr(ezmia_callbacks, "lightning", ezmia_callbacks.lightning)
    for module in ("ezmia_callbacks.lightning", "ezmia_callbacks.lightning.callback"):
        monkeypatch.delitem(sys.modules, module)
    callback = import_module("ezmia_callbacks.lightning").PrivacyAuditCallback
    assert issubclass(callback, other.Callback)

    class OtherModule(Bare, other.LightningModule):
        pass

    rows, _ = draw()
    plain = bare_audit(budget=LeakageBudget(**BUDGET), every="epoch")
    audit = callback(plain.canaries, budget=plain.settings.budget, every="epoch", logits_fn=bare_logits)
    saver = other.callbacks.ModelCheckpoint(tmp_path / "checkpoints", monitor="privacy/auc", save_top_k=-1)
    stopping = other.callbacks.EarlyStopping("privacy/auc", patience=100)
    module = OtherModule()

    fit(tmp_path / "one", [plain], max_epochs=24)
    trainer = make_trainer(
        tmp_path / "two",
        [saver, stopping, audit],
        package=other,
        max_epochs=24,
        enable_checkpointing=True,
    )
    seed_everything()
    trainer.fit(module, make_loader(rows, is_shuffled=True))

    assert audit.history.stopped is not None
    values = [round(result.metrics["auc"].value, 9) for result in plain.history]
    assert [round(result.metrics["auc"].value, 9) for result in audit.history] == values
    good = in_budget(audit.history)
    saved = [torch.load(path, weights_only=True) for path in (tmp_path / "checkpoints").glob("*.ckpt")]
    assert sorted(checkpoint["global_step"] for checkpoint in saved) == good[1:]


@pytest.mark.parametrize(
    ("absent", "packages"),
    [
        (["pytorch_lightning"], ["lightning"]),
        (["lightning.pytorch"], ["pytorch_lightning"]),
        ([], ["lightning", "pytorch_lightning"]),
        (["lightning.pytorch", "pytorch_lightning"], ["lightning", "pytorch_lightning"]),
    ],
    ids=str,
)
def test_the_callback_is_built_on_the_packages_in_use(monkeypatch, absent, packages):
    import pytorch_lightning  # noqa: F401

    for name in absent:
        monkeypatch.delitem(sys.modules, name)

    classes = callback_classes()

    assert [base.__module__.partition(".")[0] for base in classes] == packages


def test_without_lightning_the_extra_is_named(monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(MissingDependencyError, match=r'pip install "ezmia-callbacks\[lightning\]"'):
        callback_classes()


def test_a_broken_lightning_is_shown_as_what_it_is(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise ImportError("cannot import name 'Tensor' from 'torch'")

    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", Broken("lightning.pytorch"))

    with pytest.raises(MissingDependencyError, match=r"lightning\.pytorch is installed and cannot be"):
        callback_classes()


# Old releases of Lightning call what new jsonargparse has renamed.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
@pytest.mark.parametrize(
    "name",
    ["ezmia_callbacks.LightningPrivacyAuditCallback", "ezmia_callbacks.lightning.PrivacyAuditCallback"],
)
def test_the_command_line_of_lightning_takes_the_callback_from_a_file(tmp_path, monkeypatch, name):
    from lightning.pytorch.cli import LightningCLI

    config = f"""
        seed_everything: 3
        trainer:
          default_root_dir: {tmp_path}
          accelerator: cpu
          devices: 1
          max_epochs: 24
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          enable_model_summary: false
          callbacks:
            - class_path: {name}
              init_args:
                budget: {{limit: 0.8, rule: point, patience: 1}}
                every: 0.5
                reference: copy
                fpr_levels: [0.1]
                n_members: 40
                n_non_members: 15
                output_dir: {tmp_path / "audit"}
                logits_fn: lightning_tiny.bare_logits
        """
    (tmp_path / "given.yaml").write_text(textwrap.dedent(config))
    # Lightning calls what its argument parser has deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["train", "fit", "--config", str(tmp_path / "given.yaml")])

    cli = LightningCLI(BareModule, DataModule)

    (audit,) = (c for c in cli.trainer.callbacks if isinstance(c, PrivacyAuditCallback))
    assert audit.settings.budget == LeakageBudget(limit=0.8, rule="point", patience=1)
    assert audit.settings.every == 0.5
    assert audit.history.stopped is not None
    assert len(AuditHistory.load(tmp_path / "audit" / "history.jsonl")) == len(audit.history)


class WriteDown(Callback):
    """What each process ends with."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        (audit,) = (c for c in trainer.callbacks if isinstance(c, PrivacyAuditCallback))
        outcome = {
            "step": trainer.global_step,
            "history": audit.history.to_dicts(),
            "weights": {name: tensor.tolist() for name, tensor in pl_module.state_dict().items()},
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(outcome))


@pytest.mark.slow
def test_two_processes_stop_at_one_step_with_the_same_weights(tmp_path):
    audit = bare_audit(budget=LeakageBudget(**BUDGET))
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)

    fit(
        tmp_path,
        [audit, saver, WriteDown(tmp_path)],
        strategy="ddp_spawn",
        devices=2,
        max_epochs=24,
        enable_checkpointing=True,
    )

    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["history"][-1]["decision"]["stop"]
    good = [row["step"] for row in first["history"] if row["decision"]["is_within_budget"]]
    assert 0 < good[-1] < first["step"] < 24 * N_STEPS_IN_EPOCH // 2
    saved = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    checkpoints = {c["global_step"]: c for c in (torch.load(path, weights_only=True) for path in saved)}
    assert sorted(checkpoints) == good[1:]
    for name, tensor in checkpoints[good[-1]]["state_dict"].items():
        assert torch.equal(tensor, torch.tensor(first["weights"][name]))


def test_blocks_of_running_text_in_the_loaders_are_said_to_be_no_records(tmp_path, caplog):
    tokenizer = make_tokenizer()
    text = [
        token for row in make_rows(make_texts(300)) for token in [*row["input_ids"], tokenizer.eos_token_id]
    ]
    blocks = [{"input_ids": text[i : i + 24], "attention_mask": [1] * 24} for i in range(0, 3600, 24)]
    audit = PrivacyAuditCallback(tokenizer=tokenizer)
    module = TinyModule()

    make_trainer(tmp_path, [audit], max_epochs=1).fit(
        module, make_loader(blocks[:80]), make_loader(blocks[80:])
    )

    reports = [message for message in caplog.messages if "blocks cut from running text" in message]
    assert len(reports) == 1
    assert reports[0].startswith("All 150 rows have 24 tokens, no padding")
