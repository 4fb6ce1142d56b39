"""Lengths, cadences and models, from plain values; runs are in test_callback.py."""

import math
from types import SimpleNamespace

import pytest
from tiny import make_model
from torch import nn

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.lightning.trainer import (
    epochs_done,
    first_epoch_in_steps,
    intervals_in_steps,
    language_model_in,
    planned_audits,
)


def make_trainer(**settings):
    """Ten batches an epoch, three epochs."""
    n_batches_done = settings.pop("n_batches_done", 0)
    return SimpleNamespace(
        fit_loop=SimpleNamespace(total_batch_idx=n_batches_done - 1),
        **{
            "accumulate_grad_batches": 1,
            "checkpoint_callbacks": [],
            "current_epoch": 0,
            "max_epochs": 3,
            "max_steps": -1,
            "num_training_batches": 10,
            "val_check_batch": 10,
        }
        | settings,
    )


@pytest.mark.parametrize(
    ("every", "settings", "expected"),
    [
        ("epoch", {}, []),
        ("auto", {}, []),
        (4, {}, [4]),
        (0.5, {}, [5]),
        (0.5, {"accumulate_grad_batches": 3}, [2]),
        (0.01, {}, [1]),
    ],
    ids=["epochs", "early", "steps", "half", "half of accumulated steps", "never less than a step"],
)
def test_a_cadence_becomes_a_number_of_steps(every, settings, expected):
    assert intervals_in_steps(make_trainer(**settings), every, is_saving_guarded=False) == expected


def test_saves_by_steps_are_audited_where_they_are_guarded():
    savers = [SimpleNamespace(_every_n_train_steps=n) for n in (6, 0)]
    trainer = make_trainer(checkpoint_callbacks=savers)

    assert intervals_in_steps(trainer, 4, is_saving_guarded=True) == [4, 6]
    assert intervals_in_steps(trainer, 4, is_saving_guarded=False) == [4]


def test_a_fraction_of_a_stream_is_refused():
    trainer = make_trainer(num_training_batches=math.inf)

    with pytest.raises(ConfigurationError, match="length of an epoch is unknown: give a number of steps"):
        intervals_in_steps(trainer, 0.5, is_saving_guarded=False)


@pytest.mark.parametrize(
    ("settings", "steps", "early", "at_epoch_end", "at_validation", "n"),
    [
        ({}, [], [], False, False, 1),
        ({}, [], [], True, False, 3),
        ({}, [4], [], False, False, 8),
        ({}, [4], [], True, False, 9),
        ({"max_steps": 15}, [], [], True, False, 2),
        ({"val_check_batch": 5}, [], [], True, True, 6),
        ({"val_check_batch": None}, [], [], True, True, 3),
        ({"accumulate_grad_batches": 4}, [], [], True, False, 3),
        ({}, [], [1, 2, 5], True, False, 6),
        ({}, [5], [1, 2, 5], True, False, 8),
        ({"val_check_batch": 5}, [], [1, 2, 5], True, True, 8),
    ],
)
def test_audits_at_one_step_count_once_and_the_last_step_always(
    settings, steps, early, at_epoch_end, at_validation, n
):
    plan = planned_audits(
        make_trainer(**settings),
        steps,
        early=early,
        is_at_epoch_end=at_epoch_end,
        is_at_validation=at_validation,
    )

    assert plan.n_audits == n


@pytest.mark.parametrize(
    "settings", [{"max_epochs": -1}, {"num_training_batches": math.inf}], ids=["no end", "stream"]
)
def test_a_run_without_a_known_end_cannot_be_planned(settings):
    plan = planned_audits(
        make_trainer(**settings), [4], early=[], is_at_epoch_end=False, is_at_validation=False
    )

    assert plan.n_audits is None
    assert plan.steps == (4,)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 10),
        ({"accumulate_grad_batches": 3}, 4),
        ({"max_steps": 6}, 6),
        ({"max_steps": 25}, 10),
        ({"num_training_batches": math.inf, "max_steps": 40}, 40),
        ({"num_training_batches": math.inf}, None),
    ],
    ids=["epochs", "accumulation", "less than an epoch", "more", "stream", "stream without an end"],
)
def test_the_first_epoch_is_at_most_the_run(settings, expected):
    assert first_epoch_in_steps(make_trainer(**settings)) == expected


def test_epochs_are_counted_in_batches_where_their_length_is_known():
    assert epochs_done(make_trainer(n_batches_done=25)) == 2.5
    stream = make_trainer(n_batches_done=25, num_training_batches=math.inf, current_epoch=1)
    assert epochs_done(stream) == 1.0


def test_the_one_language_model_of_a_module_is_found():
    model = make_model()

    assert language_model_in(nn.Sequential(nn.Linear(2, 2), model)) is model


@pytest.mark.parametrize("n", [0, 2])
def test_none_or_several_language_models_need_a_function_for_the_logits(n):
    module = nn.ModuleList([make_model() for _ in range(n)])

    with pytest.raises(ConfigurationError, match=r"exactly one .* pass `logits_fn="):
        language_model_in(module)
