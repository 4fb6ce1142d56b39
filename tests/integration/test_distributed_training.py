"""Whole runs in two real processes (DDP on gloo) under Trainer, Lightning and Accelerate."""

import pytest
import torch
import training_bodies as bodies
from processes import run_processes

BODIES = (
    bodies.trainer_is_neutral,
    bodies.trainer_stops_and_puts_back,
    bodies.trainer_holds_out,
    bodies.trainer_cannot_prepare_on_one,
    bodies.accelerate_is_neutral,
    bodies.accelerate_stops_and_puts_back,
    bodies.lightning_is_neutral,
    bodies.lightning_stops_and_puts_back,
    bodies.lightning_in_pieces_is_refused,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_processes(BODIES, 2, tmp_path_factory.mktemp("runs"))


def assert_same_weights(outcomes):
    first, second = (outcome["weights"] for outcome in outcomes)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_trainer_ends_with_the_same_bits_with_and_without_the_callback(outcomes):
    first, second = outcomes["trainer_is_neutral"]
    for outcome in (first, second):
        assert outcome["world_size"] == 2
        assert outcome["is_same"]
        assert outcome["n_failed"] == 0
        assert len(outcome["audits"]) > 3
        without, with_callback = outcome["logs"]
        assert without
        assert without == with_callback
    assert first["audits"] == second["audits"]
    # 31 members in two epochs; what a process lacks for its last batch is read once more.
    assert first["exposures"] == second["exposures"]
    assert 62 <= sum(first["exposures"]) < 80
    assert min(first["exposures"]) == 2


def test_trainer_stops_all_processes_at_one_step_with_the_same_weights_put_back(outcomes):
    for outcome in outcomes["trainer_stops_and_puts_back"]:
        assert outcome["is_back"]
        assert 0 < outcome["kept"] < outcome["stopped_at"] < 100
        assert max(outcome["checkpoints"]) <= outcome["kept"]
        assert outcome["kept_files"] == []
    assert len({outcome["stopped_at"] for outcome in outcomes["trainer_stops_and_puts_back"]}) == 1
    assert_same_weights(outcomes["trainer_stops_and_puts_back"])


def test_all_processes_hold_out_the_same_rows(outcomes):
    first, second = outcomes["trainer_holds_out"]
    assert first == second
    assert len(first["rows"]) == 144
    assert min(first["fed"]) == 1
    assert first["n_non_members_fed"] == 0


def test_canaries_that_cannot_be_prepared_on_one_process_end_the_run_on_all(outcomes):
    first, second = outcomes["trainer_cannot_prepare_on_one"]
    assert first == (
        "AuditError: The audit failed on process 1: CanaryError: the tokenizer's cache is missing here"
    )
    assert second == "CanaryError: the tokenizer's cache is missing here"


def test_an_accelerate_loop_ends_with_the_same_bits_with_and_without_the_audit(outcomes):
    for outcome in outcomes["accelerate_is_neutral"]:
        assert outcome["is_same"]
        assert outcome["n_looks"] == 3


def test_an_accelerate_loop_stops_with_the_same_weights_put_back(outcomes):
    for outcome in outcomes["accelerate_stops_and_puts_back"]:
        assert outcome["stopped"]
        assert outcome["is_back"]
        assert 0 < outcome["kept"] < outcome["stopped_at"] < 20
    assert_same_weights(outcomes["accelerate_stops_and_puts_back"])


def test_lightning_ends_with_the_same_bits_with_and_without_the_callback(outcomes):
    for outcome in outcomes["lightning_is_neutral"]:
        assert outcome["world_size"] == 2
        assert outcome["is_same"]
        assert outcome["n_looks"] == 3


def test_lightning_stops_all_processes_with_the_same_weights_put_back(outcomes):
    first, second = outcomes["lightning_stops_and_puts_back"]
    for outcome in (first, second):
        assert outcome["is_back"]
        assert 0 < outcome["kept"] < outcome["stopped_at"] < 100
    assert first["stopped_at"] == second["stopped_at"]
    assert_same_weights([first, second])


def test_a_module_that_lightning_shards_is_refused_before_the_first_step(outcomes):
    message = (
        "step 0: ModelParallelStrategy holds the weights in pieces, which the audit cannot read yet: train "
        "with one device or 'ddp', or audit checkpoints with PrivacyAuditor."
    )

    assert outcomes["lightning_in_pieces_is_refused"] == [message] * 2
