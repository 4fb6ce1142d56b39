"""Whole runs of two real processes under FSDP2 (gloo, no GPU), by Trainer and by Accelerate."""

from importlib.metadata import version

import fsdp_bodies as bodies
import pytest
from packaging.version import Version
from processes import run_processes

pytestmark = pytest.mark.skipif(
    Version(version("accelerate")) < Version("1.6"), reason="FSDP2 came with accelerate 1.6"
)

BY_TRAINER = [
    bodies.sharded_files,
    bodies.whole_files,
    bodies.computing_in_bfloat16,
    bodies.with_lora,
    bodies.untied,
    bodies.offloaded,
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    run = [*BY_TRAINER, bodies.is_neutral, bodies.a_loop_stops_and_restores]
    return run_processes(run, 2, tmp_path_factory.mktemp("two"))


each_case = pytest.mark.parametrize("case", [body.__name__ for body in BY_TRAINER])


@each_case
def test_a_stop_leaves_the_kept_weights_wherever_a_sharded_run_has_them(two, case):
    for outcome in two[case]:
        # Without these the run may be plain data parallelism: accelerate says nothing.
        assert outcome["is_fsdp2"]
        assert outcome["are_sharded"]
        assert outcome["is_offloaded"] == (case == "offloaded")
        assert outcome["are_tied"] == (case != "untied")
        assert outcome["types"] == ["float32"]
        assert outcome["types_in_use"] == ["bfloat16" if case == "computing_in_bfloat16" else "float32"]
        assert outcome["n_failed"] == 0
        assert 0 < outcome["kept_step"] < outcome["stopped_at"] < 60
        assert outcome["over"] > 1e-3
        # In memory, as a forward pass gets them, as a saved model, after a step.
        places = ("memory", "in_use", "saved", "stepped")
        assert {place: outcome[place] for place in places} == dict.fromkeys(places, 0.0)
        # The others, where they were to be kept aside.
        assert outcome["rejected"] == 0.0
    assert len({(outcome["kept_step"], outcome["stopped_at"]) for outcome in two[case]}) == 1


@each_case
def test_what_the_optimizer_of_a_sharded_run_remembers_of_undone_steps_is_forgotten(two, case):
    for outcome in two[case]:
        assert outcome["n_moments_before"] > 100
        assert outcome["n_moments"] == 0


@each_case
def test_a_sharded_run_goes_on_from_its_last_checkpoint_and_from_one_saved_after_the_stop(two, case):
    for outcome in two[case]:
        kept = outcome["kept_step"]
        assert outcome["checkpoints"] == [kept - 2, kept]
        assert outcome["resumed_audits"] == [kept, kept + 2]
        # After the checkpoint: as the run went on that was stopped.
        places = ("resumed", "went_on", "loaded", "loaded_and_stepped")
        assert {place: outcome[place] for place in places} == dict.fromkeys(places, 0.0)


@each_case
def test_each_process_of_a_sharded_run_keeps_its_part_of_what_is_trained(two, case):
    for outcome in two[case]:
        needed, n_bytes_of_header = outcome["n_bytes_trained"], 130 * 40
        assert needed <= sum(outcome["n_bytes_kept"]) < needed + n_bytes_of_header
        if case == "with_lora":
            assert needed < outcome["n_bytes"] / 4


def test_sharded_training_ends_with_the_same_bits_with_and_without_the_callback(two):
    for outcome in two["is_neutral"]:
        assert outcome["difference"] == 0.0
        assert outcome["n_audits"] == 2
        without, with_callback = outcome["logs"]
        assert len(without) == 6
        assert without == with_callback


def test_a_sharded_loop_of_accelerate_stops_restores_saves_and_resumes(two):
    for outcome in two["a_loop_stops_and_restores"]:
        assert outcome["is_fsdp2"]
        assert outcome["are_sharded"]
        assert 0 < outcome["kept_step"] < outcome["stopped_at"] < 20
        assert outcome["stops_again"]
        assert outcome["over"] > 1e-3
        places = ("memory", "in_use", "saved", "stepped", "resumed", "restored_again", "loaded")
        assert {place: outcome[place] for place in places} == dict.fromkeys(places, 0.0)
