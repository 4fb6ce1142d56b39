"""A real search by optuna: each trial has its own start, its own curve, its own folder, and its own stop."""

import warnings

import pytest
import torch
from huggingface_tiny import draw, make_trainer
from tiny import make_model, make_rows, make_texts
from transformers import TrainerCallback

from ezmia_callbacks import AuditHistory, LeakageBudget, PrivacyAuditCallback

optuna = pytest.importorskip("optuna")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
)

# Crossed in mid-run by a model that learns, never by one that does not.
BUDGET = LeakageBudget(limit=0.65, rule="point")
WIDE_BUDGET = LeakageBudget(limit=0.99, rule="point")
NONE, FAST = 0.0, 5e-3


class Witness(TrainerCallback):
    """The model of each trial as it was after training, and what an evaluation would choose by."""

    def __init__(self):
        self.at_begin, self.at_end = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.at_begin.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.at_end.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


class PruneTrial(optuna.pruners.BasePruner):
    """Prunes one trial at its first evaluation."""

    def __init__(self, number):
        self.number = number

    def prune(self, study, trial):
        return trial.number == self.number


def search(path, audit, *, rates=(NONE, FAST), pruner=None, objective=None, hp_name=None, **arguments):
    """Trainer, witness and study of a search in which each trial starts from other weights."""
    rows, _ = draw()
    # Trainer builds one model when it is made, and one for every trial.
    seeds = iter(range(100))
    witness = Witness()
    trainer = make_trainer(
        path,
        rows,
        [witness, audit],
        model_init=lambda: make_model(seed=next(seeds)),
        eval_dataset=make_rows(make_texts(20, seed=8)),
        **{"eval_strategy": "epoch", "lr_scheduler_type": "constant", "num_train_epochs": 12} | arguments,
    )
    studies = []

    def create_study(**options):
        studies.append(optuna.study.create_study(**options))
        return studies[-1]

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Optuna calls some of its own arguments experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        patch.setattr(optuna, "create_study", create_study)
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
            compute_objective=objective,
            n_trials=len(rates),
            direction="minimize",
            backend="optuna",
            hp_name=hp_name,
            sampler=optuna.samplers.GridSampler({"learning_rate": rates}, seed=0),
            pruner=pruner,
        )
    return trainer, witness, studies[0]


def rates_of(study):
    return [trial.params["learning_rate"] for trial in study.trials]


def history_of(folder):
    return AuditHistory.load(folder / "history.jsonl")


def test_each_trial_has_its_own_reference_and_its_own_history(tmp_path):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries, every=8)

    _, witness, study = search(tmp_path, audit, num_train_epochs=2)

    assert not torch.equal(*(weights["lm_head.weight"] for weights in witness.at_begin))
    references = {(tmp_path / f"_privacy_audit/run-{i}/reference.safetensors").read_bytes() for i in range(2)}
    assert len(references) == 2
    for trial in study.trials:
        history = history_of(tmp_path / "_privacy_audit" / f"run-{trial.number}")
        assert [result.step for result in history] == [0, 8, 16]
        assert [result.is_baseline for result in history] == [True, False, False]
        assert history[0].metrics["auc"].value == 0.5
    # Nothing of the search lies where a run of its own would look for something to resume.
    assert not (tmp_path / "_privacy_audit" / "history.jsonl").exists()
    # Of names that begin with an underscore those right in the trainer's folder alone are not pushed.
    assert list(tmp_path.glob("run-*/*privacy_audit")) == []


def test_trials_share_no_folder_when_the_user_names_one(tmp_path):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries, output_dir=tmp_path / "audits")

    search(tmp_path / "run", audit, num_train_epochs=1, hp_name=lambda trial: f"trial_{trial.number}")

    written = sorted(path.parent.name for path in tmp_path.glob("audits/*/history.jsonl"))
    assert written == ["trial_0", "trial_1"]


def test_a_budget_stop_ends_one_trial_and_leaves_the_others_alone(tmp_path):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch", score="ez")

    _, witness, study = search(tmp_path, audit, save_strategy="epoch")

    assert {trial.state for trial in study.trials} == {optuna.trial.TrialState.COMPLETE}
    for trial, weights in zip(study.trials, witness.at_end, strict=True):
        folder = tmp_path / f"run-{trial.number}"
        audits = tmp_path / "_privacy_audit" / folder.name
        history = history_of(audits)
        over = [result for result in history if result.decision.is_within_budget is False]
        saved = sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))
        good = history.last_within_budget
        if trial.params["learning_rate"] == FAST:
            assert history.stopped is not None
            assert 8 <= good.step < history.stopped.step < 12 * 8
            assert max(saved) == good.step
        else:
            assert over == []
            assert max(saved) == good.step == history[-1].step == 12 * 8
        assert_is_checkpoint(folder / f"checkpoint-{good.step}", weights)
        assert list(audits.glob("last_within_budget")) == []


def assert_is_checkpoint(folder, weights):
    from safetensors.torch import load_file

    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


class SaveAt(TrainerCallback):
    """A user's callback that comes after the audit and saves on its own account."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or state.global_step == self.step


def test_an_unaudited_checkpoint_of_a_trial_is_moved_aside_in_its_own_folder(tmp_path):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every=96)
    rows, _ = draw()
    trainer = make_trainer(
        tmp_path,
        rows,
        [audit, SaveAt(90)],
        model_init=lambda: make_model(),
        num_train_epochs=12,
        lr_scheduler_type="constant",
        eval_dataset=make_rows(make_texts(20, seed=8)),
    )

    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": FAST}, n_trials=2, direction="minimize", backend="optuna"
    )

    for run in ("run-0", "run-1"):
        aside = tmp_path / "_privacy_audit" / run / "over_budget"
        assert sorted(path.name for path in aside.iterdir()) == ["README.md", "checkpoint-90"]
        assert list((tmp_path / run).glob("checkpoint-*")) == []


@pytest.mark.parametrize("pruned", [0, 1])
def test_a_pruned_trial_leaves_a_whole_history_and_no_kept_weights(tmp_path, pruned):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=WIDE_BUDGET, every="epoch")

    _, _, study = search(tmp_path, audit, pruner=PruneTrial(pruned), num_train_epochs=2)

    states = {trial.number: trial.state.name for trial in study.trials}
    assert states == {pruned: "PRUNED", 1 - pruned: "COMPLETE"}
    assert [result.step for result in history_of(tmp_path / f"_privacy_audit/run-{pruned}")] == [0, 8]
    assert [result.step for result in history_of(tmp_path / f"_privacy_audit/run-{1 - pruned}")] == [0, 8, 16]
    assert list(tmp_path.rglob("last_within_budget*")) == []


def test_the_default_objective_stays_the_evaluation_loss(tmp_path):
    """Transformers sums up whatever else is among the metrics, and the loss would not be a part of it."""
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries)

    trainer, _, study = search(tmp_path, audit, num_train_epochs=1)

    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert study.trials[-1].value == losses[-1]


def test_an_objective_of_the_users_can_weigh_leakage(tmp_path):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries)

    _, _, study = search(
        tmp_path, audit, num_train_epochs=12, objective=lambda metrics: metrics["eval_privacy_auc"]
    )

    for trial in study.trials:
        last = history_of(tmp_path / f"_privacy_audit/run-{trial.number}")[-1]
        assert trial.value == last.metrics["auc"].value
    assert study.best_trial.params["learning_rate"] == NONE


def test_leakage_that_chooses_the_checkpoint_is_offered_to_the_default_objective_alone(tmp_path):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries)

    _, _, study = search(
        tmp_path,
        audit,
        num_train_epochs=2,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="privacy_auc",
        greater_is_better=False,
    )

    for trial in study.trials:
        last = history_of(tmp_path / f"_privacy_audit/run-{trial.number}")[-1]
        assert trial.value == last.metrics["auc"].value


def test_training_after_a_search_is_a_run_of_its_own(tmp_path):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries)
    trainer, _, _ = search(tmp_path, audit, num_train_epochs=1)
    kept = [(tmp_path / f"_privacy_audit/run-{i}/history.jsonl").read_bytes() for i in range(2)]

    trainer.train()

    assert [result.step for result in history_of(tmp_path / "_privacy_audit")] == [0, 8]
    assert [(tmp_path / f"_privacy_audit/run-{i}/history.jsonl").read_bytes() for i in range(2)] == kept
