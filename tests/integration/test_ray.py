"""Ray Train with a group of two workers, and Ray Tune with two trials; `make test-engines` runs them."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray_bodies as bodies
import torch
from huggingface_tiny import NEVER_CROSSED, draw, make_trainer
from launched import ROOT, with_path
from safetensors.torch import load_file
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import AuditHistory, LeakageBudget, PrivacyAuditCallback

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray, which `make test-engines` brings along"),
    # Ray's own.
    pytest.mark.filterwarnings("ignore"),
]

NONE, FAST = 0.0, 5e-3


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    import ray

    # The paths of Ray's sockets have to be short.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray-") as short:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("PYTHONPATH", with_path(ROOT, ROOT / "tests" / "support"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=short)
        yield
        ray.shutdown()


def history_of(folder):
    return AuditHistory.load(folder / "history.jsonl")


def assert_same_weights(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_group_that_loses_a_worker_goes_on_and_stops_with_the_kept_weights(tmp_path):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    _, canaries = draw()
    budget = LeakageBudget(limit=0.70, rule="point")
    audit = PrivacyAuditCallback(canaries, budget=budget, every="epoch", score="ez")

    result = TorchTrainer(
        bodies.train_in_a_group,
        train_loop_config={"audit": audit, "folder": tmp_path},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            storage_path=str(tmp_path / "ray"), name="group", failure_config=FailureConfig(max_failures=1)
        ),
    ).fit()

    history = history_of(tmp_path / "run" / "_privacy_audit")
    kept, stopped = history.last_within_budget, history.stopped
    assert (tmp_path / "died").exists()
    assert history.is_complete
    assert [each.step for each in history] == list(range(0, stopped.step + 1, 8))
    assert 0 < kept.step < stopped.step < 96
    # What Ray was told of last is what is left, and nothing newer.
    assert result.metrics["step"] == kept.step
    assert_same_weights(tmp_path / "final", tmp_path / "run" / f"checkpoint-{kept.step}")
    assert_same_weights(tmp_path / "final", Path(result.checkpoint.path) / "checkpoint")


def test_of_two_trials_that_write_to_one_folder_one_is_refused(tmp_path):
    from ray import tune

    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=NEVER_CROSSED)

    results = tune.Tuner(
        tune.with_parameters(bodies.train_in_one_folder, audit=audit, folder=tmp_path),
        param_space={"number": tune.grid_search([0, 1])},
        run_config=tune.RunConfig(storage_path=str(tmp_path / "ray"), name="one_folder", verbose=0),
    ).fit()

    (refused,) = results.errors
    (other,) = [result for result in results if result.error is None]
    assert "ConfigurationError: Another run writes to" in str(refused)
    assert "give each run an `output_dir` of its own" in str(refused)
    assert other.metrics["verdict"] == "within budget"
    assert history_of(tmp_path / "run" / "_privacy_audit").is_complete


def test_each_trial_of_a_search_by_the_trainer_has_its_own_folder_and_stop(tmp_path):
    from ray import tune

    rows, canaries = draw()
    budget = LeakageBudget(limit=0.65, rule="point")
    audit = PrivacyAuditCallback(canaries, budget=budget, every="epoch", score="ez")
    trainer = make_trainer(
        tmp_path / "run",
        rows,
        [audit],
        model_init=lambda: make_model(),
        eval_dataset=make_rows(make_texts(20, seed=8)),
        eval_strategy="epoch",
        save_strategy="epoch",
        lr_scheduler_type="constant",
        num_train_epochs=8,
    )

    best = trainer.hyperparameter_search(
        hp_space=lambda _: {"learning_rate": tune.grid_search([NONE, FAST])},
        n_trials=1,
        direction="minimize",
        backend="ray",
        storage_path=str(tmp_path / "ray"),
        name="search",
        verbose=0,
    )

    for trial in best.run_summary.trials:
        history = history_of(tmp_path / "run" / "_privacy_audit" / f"run-{trial.trial_id}")
        kept = history.last_within_budget
        assert history.is_complete
        assert (history.stopped is None) == (trial.config["learning_rate"] == NONE)
        # The last checkpoint that Ray was given is within the budget.
        assert [path.name for path in Path(trial.checkpoint.path).iterdir()] == [f"checkpoint-{kept.step}"]
    assert list(tmp_path.rglob("last_within_budget*")) == []
