"""Whole runs of two processes that divide each layer, without a GPU: Trainer, Accelerate, own loops."""

from importlib.metadata import version

import numpy as np
import pytest
import tensor_parallel_bodies as bodies
from packaging.version import Version
from processes import run_processes

DIVIDES_AS_IT_LOADS = Version(version("transformers")) >= Version("5.0")

LOOPS = [bodies.a_loop_divided_by_torch]
if DIVIDES_AS_IT_LOADS:
    LOOPS += [bodies.a_loop_divided_by_transformers, bodies.a_loop_of_accelerate]
BY_TRAINER = [bodies.by_trainer] if DIVIDES_AS_IT_LOADS else []

# What several processes add up is rounded otherwise, and training carries that on.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    run = [*LOOPS, bodies.a_loop_with_lora, bodies.fed_differently]
    found = run_processes(run, 2, tmp_path_factory.mktemp("loops"))
    return found | (run_processes(BY_TRAINER, 2, tmp_path_factory.mktemp("trainer")) if BY_TRAINER else {})


each_loop = pytest.mark.parametrize("case", [body.__name__ for body in LOOPS])
each_loop_or_lora = pytest.mark.parametrize("case", [*(body.__name__ for body in LOOPS), "a_loop_with_lora"])
each_case = pytest.mark.parametrize("case", [body.__name__ for body in (*LOOPS, *BY_TRAINER)])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds that has the model whole, as far as it goes."""
    in_loop = bodies.a_loop_alone()
    found = {body.__name__: in_loop for body in LOOPS}
    return found | {"by_trainer": bodies.by_trainer_alone(tmp_path_factory.mktemp("alone"))}


@each_case
def test_audits_of_divided_layers_find_what_one_process_finds_in_the_whole_model(two, alone, case):
    expected = alone[case]
    n_audits = len(expected["aucs"])

    for outcome in two[case]:
        assert outcome["n_failed"] == 0
        np.testing.assert_allclose(outcome["aucs"][:n_audits], expected["aucs"], atol=2e-3)
        for name, scores in expected["scores"].items():
            np.testing.assert_allclose(outcome["scores"][name][:n_audits], scores, atol=TOLERANCE)
    first, second = two[case]
    assert first["aucs"] == second["aucs"]
    assert first["stopped_at"] == second["stopped_at"]


@each_loop_or_lora
def test_a_record_that_all_processes_compute_together_was_fed_once(two, case):
    for outcome in two[case]:
        # Each epoch feeds each member once.
        assert set(outcome["n_times"].tolist()) == {0, outcome["stopped_at"]}
        # What was fed before the interruption is not lost, and not counted twice.
        assert set(outcome["n_times_resumed"].tolist()) == {0, outcome["kept_step"] + 1}


@pytest.mark.skipif(not DIVIDES_AS_IT_LOADS, reason="this transformers divides no model as it loads it")
def test_trainer_feeds_a_record_once_to_all_processes(two):
    for outcome in two["by_trainer"]:
        assert outcome["n_times"].max() <= -(-outcome["stopped_at"] // bodies.N_STEPS_IN_EPOCH)
        assert outcome["n_times"].max() >= outcome["stopped_at"] // bodies.N_STEPS_IN_EPOCH


@each_case
def test_a_stop_of_divided_layers_leaves_the_kept_weights_in_memory_and_after_a_step(two, case):
    for outcome in two[case]:
        assert outcome["are_divided"] >= 6
        assert 0 < outcome["kept_step"] < outcome["stopped_at"]
        assert outcome["over"] > 1e-3
        assert outcome["memory"] == outcome["stepped"] == 0.0


@pytest.mark.skipif(not DIVIDES_AS_IT_LOADS, reason="this transformers divides no model as it loads it")
def test_trainer_saves_the_kept_weights_of_divided_layers_and_they_are_loaded_as_they_were(two):
    for outcome in two["by_trainer"]:
        places = ("saved", "loaded", "checkpoint")
        assert {place: outcome[place] for place in places} == dict.fromkeys(places, 0.0)
        assert outcome["newest_checkpoint"] == outcome["kept_step"]
        assert outcome["rejected"] == 0.0
        assert outcome["n_moments_before"] > 100
        assert outcome["n_moments"] == 0


@each_loop_or_lora
def test_a_loop_over_divided_layers_goes_on_where_it_was_interrupted(two, case):
    for outcome in two[case]:
        assert outcome["resumed_at"][-2:] == [outcome["kept_step"], outcome["kept_step"] + 1]
        assert outcome["status_resumed"] == "ok"
        assert outcome["moved"] > 1e-3
        assert outcome["restored_again"] == 0.0


@each_case
def test_what_is_divided_each_process_keeps_in_part_and_all_else_is_kept_once(two, case):
    first, second = two[case]
    replicated, n_bytes_of_header = first["n_bytes_replicated"], 130 * 40
    kept = [sum(outcome["n_bytes_kept"]) for outcome in (first, second)]

    assert first["n_bytes"] <= kept[0] < first["n_bytes"] + n_bytes_of_header
    assert second["n_bytes"] - replicated <= kept[1]
    # Both hold as much of what is divided.
    assert 0 < replicated <= kept[0] - kept[1]
    if case == "a_loop_divided_by_torch":
        # There that is most of the model.
        assert replicated > first["n_bytes"] / 2


def test_adapters_that_all_processes_hold_alike_are_kept_once(two):
    first, second = two["a_loop_with_lora"]

    assert first["memory"] == second["memory"] == 0.0
    # The frozen weights, in part divided, are not kept.
    assert first["n_bytes_trained"] <= sum(first["n_bytes_kept"]) < first["n_bytes_trained"] + 130 * 40
    assert sum(second["n_bytes_kept"]) < 100


def test_leakage_is_unknown_where_processes_that_compute_together_are_fed_different_batches(two):
    for outcome in two["fed_differently"]:
        assert "within budget" not in outcome["message"]
        assert any("were fed different ones" in text for text in outcome["findings"])
