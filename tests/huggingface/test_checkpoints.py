"""What a trainer's settings mean for the audit, from plain values; runs are in tests/integration."""

from types import SimpleNamespace

import pytest

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.huggingface.checkpoints import (
    checkpoint_intervals,
    evaluation_intervals,
    is_best_by_leakage,
    may_save_next,
    planned_audits,
    set_aside_unaudited,
    steps_between,
    steps_per_epoch,
)


def make_args(**settings):
    return SimpleNamespace(
        **{
            "save_strategy": "no",
            "eval_strategy": "no",
            "metric_for_best_model": None,
            "max_steps": -1,
            "num_train_epochs": 3.0,
            "gradient_accumulation_steps": 1,
        }
        | settings
    )


def make_state(**settings):
    return SimpleNamespace(
        **{"max_steps": 30, "num_train_epochs": 3, "save_steps": 7, "eval_steps": 4} | settings
    )


@pytest.mark.parametrize(
    ("every", "expected"), [(5, 5), ("epoch", None), ("auto", None), (0.5, 5), (0.25, 2), (0.01, 1)], ids=str
)
def test_a_cadence_becomes_a_number_of_steps(every, expected):
    assert steps_between(every, make_state()) == expected


def test_a_fraction_of_a_stream_is_refused():
    with pytest.raises(ConfigurationError, match="length of an epoch is unknown: give a number of steps"):
        steps_between(0.5, make_state(num_train_epochs=2**60))


@pytest.mark.parametrize(
    ("intervals", "early", "n"),
    [
        ([], [], 1),
        (["epoch"], [], 3),
        ([10], [], 3),
        ([7], [], 5),
        (["epoch", 10], [], 3),
        (["epoch", 0.5], [], 6),
        (["auto"], [1, 2, 5], 6),
        (["auto", 5], [1, 2, 5], 8),
        (["auto", "epoch"], [1, 2, 5], 6),
    ],
    ids=str,
)
def test_audits_at_one_step_count_once_and_the_last_step_always(intervals, early, n):
    assert planned_audits(intervals, make_state(), early=early, per_epoch=10).n_audits == n


def test_epochs_of_a_stream_cannot_be_planned():
    stream = make_state(num_train_epochs=2**60)

    plan = planned_audits(["auto"], stream, early=[4, 8, 15], per_epoch=None)

    assert plan.n_audits is None
    assert plan.steps == (4, 8, 15, 30)


@pytest.mark.parametrize(
    ("settings", "state", "n_batches", "expected"),
    [
        ({"num_train_epochs": 3.0}, {}, 10, 10),
        ({"num_train_epochs": 3.0, "gradient_accumulation_steps": 4}, {"max_steps": 9}, 10, 3),
        ({"num_train_epochs": 1.5}, {"max_steps": 11, "num_train_epochs": 2}, 7, 7),
        ({"num_train_epochs": 0.3}, {"max_steps": 4, "num_train_epochs": 1}, 11, 11),
        ({"max_steps": 15}, {"max_steps": 15, "num_train_epochs": 2}, 14, 14),
        ({"max_steps": 6, "gradient_accumulation_steps": 3}, {"max_steps": 6}, 10, 4),
        ({"max_steps": 15}, {"max_steps": 15, "num_train_epochs": 2**60}, None, None),
    ],
    ids=[
        "epochs",
        "accumulation",
        "one and a half",
        "a part of one",
        "steps",
        "accumulated steps",
        "stream",
    ],
)
def test_the_length_of_an_epoch_is_found_however_the_run_is_given(settings, state, n_batches, expected):
    assert steps_per_epoch(make_args(**settings), make_state(**state), n_batches) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"save_strategy": "epoch"}, ["epoch"]),
        ({"save_strategy": "steps"}, [7]),
        ({"save_strategy": "best", "eval_strategy": "steps"}, [4]),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, ["epoch"]),
    ],
    ids=["never", "epochs", "steps", "best of steps", "best of epochs"],
)
def test_checkpoints_come_as_the_trainer_saves(settings, expected):
    assert checkpoint_intervals(make_args(**settings), make_state()) == expected


def test_evaluations_come_as_the_trainer_evaluates():
    assert evaluation_intervals(make_args(eval_strategy="steps"), make_state()) == [4]
    assert evaluation_intervals(make_args(), make_state()) == []


@pytest.mark.parametrize(
    ("should_save", "should_evaluate", "strategy", "expected"),
    [
        (True, False, "steps", True),
        (False, True, "steps", False),
        (False, True, "best", True),
        (False, False, "best", False),
    ],
)
def test_a_save_may_follow_a_request_or_an_evaluation_that_picks_the_best(
    should_save, should_evaluate, strategy, expected
):
    control = SimpleNamespace(should_save=should_save, should_evaluate=should_evaluate)

    assert may_save_next(make_args(save_strategy=strategy), control) is expected


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("privacy_auc", True), ("eval_privacy_auc", True), ("loss", False), ("eval_loss", False), (None, False)],
)
def test_the_best_is_chosen_by_leakage_where_the_metric_is_one_of_the_audit(metric, expected):
    assert is_best_by_leakage(make_args(metric_for_best_model=metric)) is expected


def test_later_checkpoints_of_this_run_are_moved_and_named(tmp_path, caplog):
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    of_another_run = {tmp_path / "checkpoint-12": (tmp_path / "checkpoint-12").stat().st_mtime}

    set_aside_unaudited(tmp_path, after_step=4, into=tmp_path / "aside", older=of_another_run)

    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-4"]
    assert (tmp_path / "aside" / "checkpoint-8").is_dir()
    assert f"was moved to {tmp_path / 'aside' / 'checkpoint-8'}" in caplog.text
    assert "may be OVER BUDGET" in caplog.text


def test_a_checkpoint_that_cannot_be_moved_is_said_to_be_where_it_was(tmp_path, caplog):
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "aside").write_text("a file in the way")

    set_aside_unaudited(tmp_path, after_step=4, into=tmp_path / "aside", older={})

    assert (tmp_path / "checkpoint-8").is_dir()
    assert "Checkpoints newer than step 4 may be OVER BUDGET and could not be moved" in caplog.text
