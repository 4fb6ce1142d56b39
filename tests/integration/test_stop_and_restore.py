"""Whatever is saved, evaluated, rotated or loaded: what is left of a stopped run is inside its budget."""

import itertools
import math
import os

import pytest
import torch
from huggingface_tiny import SAVES_BEST, StopAfter, draw, make_trainer
from restoring import (
    N_STEPS_IN_EPOCH,
    LastWitness,
    Witness,
    assert_same_weights,
    checkpoints,
    in_budget_steps,
    make_adapted_model,
    weights,
)
from tiny import make_model, make_rows, make_texts
from transformers import TrainerCallback

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback, PrivacyAuditor
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.huggingface.checkpoints import planned_audits
from ezmia_callbacks.shells.checkpoint_folders import checkpoints_in, set_aside, step_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    # peft reads a name that transformers 5 renamed.
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    # LoRA on random weights that were never saved under a name.
    "ignore:.*Could not find a config file.*:UserWarning",
)

SAVE_STRATEGIES = ("no", "steps", "epoch", "best") if SAVES_BEST else ("no", "steps", "epoch")


def loaded_weights(checkpoint, model):
    from peft import PeftModel
    from safetensors.torch import load_file

    if isinstance(model, PeftModel):
        fresh = make_adapted_model()
        fresh.load_adapter(checkpoint, "default")
        return fresh.state_dict()
    return load_file(checkpoint / "model.safetensors")


# Crossed in mid-run, with adapters earlier; in which epoch depends on the release that shuffles and trains.
BUDGET = {"limit": 0.65, "rule": "point"}


def run(path, *, patience=0, is_adapted=False, every="epoch", callbacks=(), n_epochs=16, **arguments):
    rows, canaries = draw()
    witness, after = Witness(), LastWitness()
    budget = LeakageBudget(**BUDGET, patience=patience)
    audit = PrivacyAuditCallback(canaries, budget=budget, every=every, score="ez")
    trainer = make_trainer(
        path,
        rows,
        [witness, audit, after, *callbacks],
        model=make_adapted_model() if is_adapted else make_model(),
        eval_dataset=make_rows(make_texts(20, seed=8)),
        num_train_epochs=n_epochs,
        **{
            "learning_rate": 2e-2 if is_adapted else 5e-3,
            "lr_scheduler_type": "constant",
            **arguments,
        },
    )
    return trainer, audit, witness, after


@pytest.fixture(scope="session")
def step_over(tmp_path_factory):
    """The end of the first epoch over `BUDGET`, which is the same in every run."""
    trainer, audit, _, _ = run(tmp_path_factory.mktemp("step_over"))
    trainer.train()
    step = audit.history.stopped.step
    assert step % N_STEPS_IN_EPOCH == 0
    # Two epochs inside the budget come first, and the plan goes on after it.
    assert 2 * N_STEPS_IN_EPOCH < step < trainer.state.max_steps
    return step


def settings():
    """Every valid combination, as arguments of `run`."""
    cadences = {"epoch": "epoch", "steps": 5, "fraction": 0.5}
    for save, evaluation, load_best, limit, patience, is_adapted, every in itertools.product(
        SAVE_STRATEGIES,
        ("no", "steps", "epoch"),
        (False, True),
        (None, 1, 2),
        (0, 2),
        (False, True),
        cadences,
    ):
        if save == "best" and evaluation == "no":
            continue
        if load_best and (save == "no" or evaluation == "no" or save not in (evaluation, "best")):
            continue
        if save == "no" and limit is not None:
            continue
        arguments = {
            "save_strategy": save,
            "eval_strategy": evaluation,
            "load_best_model_at_end": load_best,
            "save_total_limit": limit,
        }
        # 3 lies between audits of every 4, 5 and 8 steps.
        if save == "steps":
            arguments["save_steps"] = 3
        if evaluation == "steps":
            arguments["eval_steps"] = 3
        if save == "best":
            arguments["metric_for_best_model"] = "eval_loss"
        yield {
            **arguments,
            "patience": patience,
            "is_adapted": is_adapted,
            "every": cadences[every],
        }


def covering_pairs(rows):
    """A few of the combinations, in which every pair of values that occurs together still occurs."""

    def pairs(row):
        return set(itertools.combinations(sorted((name, str(value)) for name, value in row.items()), 2))

    missing = set().union(*(pairs(row) for row in rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def name_of(arguments):
    return "-".join(f"{value}" for value in arguments.values())


ALL = list(settings())
PAIRS = covering_pairs(ALL)


def check_what_is_left(path, arguments):
    trainer, audit, before, after = run(path, **arguments)
    trainer.train()

    good = audit.history.last_within_budget
    over = [result.step for result in audit.history if result.decision.is_within_budget is False]
    assert over, "the run was meant to cross its budget"
    # Only audited weights inside the budget were ever saved, whatever was asked for.
    assert set(before.saved) <= set(in_budget_steps(audit.history))
    left = checkpoints(path)
    assert not left or left[-1] <= good.step
    assert not (path / "_privacy_audit" / "over_budget").exists()
    best = step_of(trainer.state.best_model_checkpoint)
    assert best is None or best in in_budget_steps(audit.history)
    if arguments["load_best_model_at_end"] and best is not None:
        candidates = {
            step: metrics["eval_loss"] for step, metrics in after.evaluated.items() if step in before.saved
        }
        assert best == min(candidates, key=candidates.get)
        assert trainer.state.best_metric == candidates[best]
        assert_same_weights(trainer.model, before.weights[best])
    else:
        assert_same_weights(trainer.model, before.weights[good.step])
    for step in left:
        for name, tensor in loaded_weights(path / f"checkpoint-{step}", trainer.model).items():
            assert torch.equal(tensor, before.weights[step][name]), (step, name)


@pytest.mark.parametrize("arguments", PAIRS, ids=name_of)
def test_what_a_stopped_run_leaves_is_inside_its_budget(tmp_path, arguments):
    check_what_is_left(tmp_path, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [row for row in ALL if row not in PAIRS], ids=name_of)
def test_what_a_stopped_run_leaves_is_inside_its_budget_in_every_combination(tmp_path, arguments):
    check_what_is_left(tmp_path, arguments)


@pytest.mark.parametrize("strategy", [name for name in SAVE_STRATEGIES if name in ("epoch", "best")])
@pytest.mark.parametrize("greater_is_better", [True, False])
def test_a_leakage_figure_chooses_among_the_epochs_inside_the_budget(tmp_path, strategy, greater_is_better):
    trainer, audit, before, _ = run(
        tmp_path,
        eval_strategy="epoch",
        save_strategy=strategy,
        load_best_model_at_end=True,
        metric_for_best_model="eval_privacy_auc",
        greater_is_better=greater_is_better,
    )

    trainer.train()

    aucs = {
        r.step: r.metrics["auc"].value
        for r in audit.history.audits_after_baseline
        if r.decision.is_within_budget
    }
    best = (max if greater_is_better else min)(aucs, key=aucs.get)
    assert audit.history.stopped is not None
    assert trainer.state.best_metric == aucs[best]
    assert_same_weights(trainer.model, before.weights[best])


def test_a_leakage_figure_is_measured_anew_at_every_evaluation(tmp_path):
    trainer, audit, _, after = run(
        tmp_path,
        patience=100,
        n_epochs=2,
        every=1000,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="privacy_auc",
        greater_is_better=False,
    )

    trainer.train()

    measured = {result.step: result.metrics["auc"].value for result in audit.history}
    steps = [step for step in after.evaluated if step in measured]
    assert steps[:3] == [3, 6, 9]
    assert [after.evaluated[s]["eval_privacy_auc"] for s in steps[:3]] == [measured[s] for s in (3, 6, 9)]


def test_a_failed_audit_is_never_the_best_and_does_not_end_training(tmp_path, monkeypatch):
    trainer, audit, _, after = run(
        tmp_path,
        n_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="privacy_auc",
        greater_is_better=True,
    )
    break_audits(monkeypatch, audit, at_steps={16})

    trainer.train()

    assert [result.status for result in audit.history] == ["ok", "ok", "failed"]
    assert math.isnan(after.evaluated[16]["eval_privacy_auc"])
    assert step_of(trainer.state.best_model_checkpoint) == 8


def break_audits(monkeypatch, audit, *, at_steps):
    measure = PrivacyAuditor._measure

    def broken(self, model, moment):
        if moment.step in at_steps:
            raise RuntimeError("the audit broke")
        return measure(self, model, moment)

    monkeypatch.setattr(PrivacyAuditor, "_measure", broken)


def test_a_checkpoint_of_a_failed_audit_is_moved_aside_at_the_stop(tmp_path, monkeypatch, caplog, step_over):
    unknown = step_over - N_STEPS_IN_EPOCH
    trainer, audit, before, _ = run(tmp_path / "run", save_strategy="epoch")
    break_audits(monkeypatch, audit, at_steps={unknown})

    trainer.train()

    aside = tmp_path / "run" / "_privacy_audit" / "over_budget"
    assert audit.history.stopped.step == step_over
    assert checkpoints(aside) == [unknown]
    assert max(checkpoints(tmp_path / "run"), default=0) <= audit.history.last_within_budget.step < unknown
    assert "was moved to" in caplog.text
    assert "never audited and may be OVER BUDGET" in caplog.text
    assert_same_weights(trainer.model, before.weights[audit.history.last_within_budget.step])


class SaveAt(TrainerCallback):
    """A user's callback that comes after the audit and saves on its own account."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True


def test_a_checkpoint_that_another_callback_forced_is_audited_and_moved_aside(tmp_path, step_over):
    trainer, audit, before, _ = run(tmp_path / "run", callbacks=[SaveAt(step_over - 1)])

    trainer.train()

    assert audit.history.stopped.step == step_over - 1
    assert_same_weights(trainer.model, before.weights[audit.history.last_within_budget.step])
    assert checkpoints(tmp_path / "run") == []
    assert checkpoints(tmp_path / "run" / "_privacy_audit" / "over_budget") == [step_over - 1]


def test_a_best_checkpoint_that_was_never_audited_is_not_loaded(tmp_path, step_over):

    class ForceBest(SaveAt):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                state.best_model_checkpoint = str(tmp_path / "run" / f"checkpoint-{self.step}")

    trainer, audit, before, _ = run(
        tmp_path / "run",
        callbacks=[ForceBest(step_over - 1)],
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )

    trainer.train()

    assert trainer.state.best_model_checkpoint is None
    assert_same_weights(trainer.model, before.weights[audit.history.last_within_budget.step])


def test_moving_aside_overwrites_nothing(tmp_path):
    for step in (8, 16, 24):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "aside" / "checkpoint-16").mkdir(parents=True)
    (tmp_path / "checkpoint-best").mkdir()

    moved = set_aside(tmp_path, after_step=8, into=tmp_path / "aside")

    assert [path.name for path in moved] == ["checkpoint-16.2", "checkpoint-24"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", "checkpoint-8", "checkpoint-best"]


def test_checkpoints_of_an_earlier_run_in_the_folder_stay_where_they_are(tmp_path):
    for step in (16, 24):
        (tmp_path / f"checkpoint-{step}").mkdir()
    older = checkpoints_in(tmp_path)
    os.utime(tmp_path / "checkpoint-16", (0, 0))  # written anew by this run

    moved = set_aside(tmp_path, after_step=8, into=tmp_path / "aside", older=older)

    assert [path.name for path in moved] == ["checkpoint-16"]
    assert (tmp_path / "checkpoint-24").exists()


def test_checkpoints_that_cannot_be_moved_are_reported(tmp_path, monkeypatch, caplog, step_over):
    trainer, _, _, _ = run(tmp_path / "run", callbacks=[SaveAt(step_over - 1)])

    def refuse(*_args):
        raise OSError("Read-only file system")

    monkeypatch.setattr("ezmia_callbacks.shells.checkpoint_folders.shutil.move", refuse)
    trainer.train()

    assert "may be OVER BUDGET and could not be moved" in caplog.text


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_resuming_a_stopped_run_stops_again_at_the_same_weights(tmp_path):
    trainer, audit, _, _ = run(tmp_path, save_strategy="epoch")
    trainer.train()
    good = audit.history.last_within_budget

    again, second, _, _ = run(tmp_path, save_strategy="epoch")
    again.train(resume_from_checkpoint=True)

    assert [r.step for r in second.history] == [r.step for r in audit.history]
    assert second.history.stopped.step == audit.history.stopped.step
    assert_same_weights(again.model, weights(trainer.model))
    assert checkpoints(tmp_path)[-1] == good.step


def test_the_model_saved_after_a_stop_is_the_one_inside_the_budget(tmp_path):
    trainer, audit, before, _ = run(tmp_path / "run")
    trainer.train()

    trainer.save_model(str(tmp_path / "final"))

    good = before.weights[audit.history.last_within_budget.step]
    for name, tensor in loaded_weights(tmp_path / "final", trainer.model).items():
        assert torch.equal(tensor, good[name]), name


def test_the_optimizer_forgets_the_steps_that_were_undone(tmp_path):
    trainer, audit, _, _ = run(tmp_path)

    trainer.train()

    assert audit.history.stopped is not None
    assert len(trainer.optimizer.state) == 0


def test_training_that_ends_over_budget_before_patience_runs_out_is_put_back(tmp_path, caplog, step_over):
    n_epochs = step_over // N_STEPS_IN_EPOCH
    trainer, audit, before, _ = run(tmp_path / "run", patience=2, n_epochs=n_epochs)

    trainer.train()

    assert audit.history[-1].decision.is_within_budget is False
    assert audit.history.stopped is None
    assert "Training ended at step" in caplog.text
    assert "leakage exceeded the budget." in caplog.text
    assert "Restored the weights of step" in caplog.text
    # Trackers come first and may upload the model when training ends.
    assert_same_weights(trainer.model, before.at_end)
    assert_same_weights(trainer.model, before.weights[audit.history.last_within_budget.step])


class StopAtEvaluation(TrainerCallback):
    """As early stopping does it: the audit's last hook is over by then."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def test_steps_after_the_last_audit_are_audited_when_another_callback_ends_training(tmp_path, step_over):
    trainer, audit, before, _ = run(
        tmp_path,
        every=1000,
        callbacks=[StopAtEvaluation(step_over)],
        eval_strategy="epoch",
    )

    trainer.train()

    assert trainer.state.global_step == step_over < trainer.state.max_steps
    assert [result.step for result in audit.history] == [0, step_over]
    assert audit.history[-1].decision.is_within_budget is False
    assert_same_weights(trainer.model, before.weights[0])


def test_a_second_train_after_a_stop_can_be_stopped_and_put_back_too(tmp_path, step_over):
    trainer, audit, before, _ = run(tmp_path)
    trainer.train()
    good = weights(trainer.model)
    assert audit.history.stopped.step == step_over

    trainer.train()

    last = audit.history.last_within_budget
    assert audit.history.stopped is not None
    assert_same_weights(trainer.model, good if last.is_baseline else before.weights[last.step])


def test_a_run_broken_off_and_started_again_keeps_the_weights_inside_the_budget(tmp_path):
    class Break(TrainerCallback):
        is_armed = True

        def on_epoch_begin(self, args, state, control, **kwargs):
            if self.is_armed and state.global_step == N_STEPS_IN_EPOCH:
                self.is_armed = False
                raise KeyboardInterrupt

    trainer, audit, before, _ = run(tmp_path, callbacks=[Break()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert audit.history.last_within_budget.step == N_STEPS_IN_EPOCH
    good = weights(trainer.model)

    trainer.train()

    assert audit.history.stopped is not None
    last = audit.history.last_within_budget
    assert_same_weights(trainer.model, good if last.is_baseline else before.weights[last.step])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_restart_has_weights_to_put_back(tmp_path, in_memory, is_finished):
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(
        canaries, budget=LeakageBudget(**BUDGET), output_dir=None if in_memory else tmp_path
    )
    auditor.begin(model)
    auditor.audit(model, step=8)
    kept = weights(model)
    if is_finished:
        auditor.finish()
    else:
        shift(model)  # steps that were never audited before the run was broken off

    auditor.restart(model, n_audits=3)
    shift(model)
    restored = auditor.restore_within_budget(model)

    assert restored.step == 0
    assert_same_weights(model, kept)


def shift(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def test_an_over_budget_evaluation_is_logged_as_it_is(tmp_path):
    trainer, audit, _, after = run(
        tmp_path,
        patience=2,
        eval_strategy="epoch",
        save_strategy="best" if SAVES_BEST else "epoch",
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
    )

    trainer.train()

    logged = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert logged == {step: metrics["eval_loss"] for step, metrics in after.evaluated.items()}
    assert not math.isnan(trainer.state.best_metric)
    assert step_of(trainer.state.best_model_checkpoint) in in_budget_steps(audit.history)


def test_no_figures_are_offered_for_an_evaluation_outside_training(tmp_path):
    trainer, _, _, _ = run(tmp_path)
    trainer.train()

    metrics = trainer.evaluate()

    assert not [name for name in metrics if "privacy" in name]


@pytest.mark.parametrize("every", ["epoch", 5, 0.5])
def test_audits_before_checkpoints_are_in_the_plan(tmp_path, every):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(
        canaries, budget=LeakageBudget(limit=0.9, rule="point"), every=every, score="ez"
    )
    trainer = make_trainer(tmp_path, rows, [audit], save_strategy="steps", save_steps=3)

    trainer.train()

    assert set(range(3, 25, 3)) <= {result.step for result in audit.history}
    shares = [1 - r.metrics["auc"].band.confidence for r in audit.history.audits_after_baseline]
    assert sum(shares) == pytest.approx(0.05)


class Plan:
    def __init__(self, max_steps, num_train_epochs):
        self.max_steps, self.num_train_epochs = max_steps, num_train_epochs


@pytest.mark.parametrize(
    ("intervals", "max_steps", "n_epochs", "expected"),
    [
        (["epoch"], 24, 3, 3),
        (["epoch", "epoch"], 24, 3, 3),
        (["epoch", 3], 24, 3, 10),
        ([10], 24, 3, 3),
        ([0.5, "epoch"], 24, 3, 6),
        ([10], 25, 10**9, 3),
        (["epoch"], 24, 10**9, None),
    ],
)
def test_audits_that_several_intervals_ask_for_count_once(intervals, max_steps, n_epochs, expected):
    per_epoch = max_steps // n_epochs or None

    plan = planned_audits(intervals, Plan(max_steps, n_epochs), early=(), per_epoch=per_epoch)

    assert plan.n_audits == expected


def test_a_fraction_of_an_epoch_of_unknown_length_is_refused():
    with pytest.raises(ConfigurationError, match="the length of an epoch is unknown"):
        planned_audits([0.5], Plan(10, 10**9), early=(), per_epoch=None)


def test_stopping_by_hand_in_mid_epoch_is_audited_before_the_save(tmp_path):
    trainer, audit, before, _ = run(tmp_path, save_strategy="steps", save_steps=4, callbacks=[StopAfter(6)])

    trainer.train()

    assert [result.step for result in audit.history] == [0, 4, 6]
    assert before.saved == [4]
