"""Real processes on one machine (gloo): the same figures as one process, one decision, no hang."""

import distributed_bodies as bodies
import numpy as np
import pytest
from processes import run_processes
from tiny import make_model

from ezmia_callbacks.distributed import can_share_records
from ezmia_callbacks.scoring.forward import deal_rows
from ezmia_callbacks.scoring.rows import TokenRow

SHARING = (bodies.audit, bodies.audit_sharded)
AGREEING = (
    bodies.audit_wrapped,
    bodies.audit_wrapped_in_another_module,
    bodies.run_out_of_memory,
    bodies.have_less_memory_for_a_batch_of_a_sharded_model,
    bodies.have_no_memory_at_one_audit_of_a_sharded_model,
    bodies.fail_with_a_warning,
    bodies.fail_with_an_error,
    bodies.be_changed,
    bodies.differ_in_canaries,
    bodies.keep_in_memory,
    bodies.keep_on_disk,
    bodies.keep_without_room_for_a_copy,
    bodies.fail_to_keep,
)


@pytest.fixture(scope="module")
def alone():
    """What one process finds."""
    return bodies.audit_twice(None, make_model())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_processes([*SHARING, *AGREEING], 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return run_processes(SHARING, 3, tmp_path_factory.mktemp("three"))


@pytest.fixture(params=["two", "three"])
def outcomes(request):
    return request.getfixturevalue(request.param)


def figures(outcome):
    """All of an audit but which weights it saw: those in pieces, and other buffers, are others."""
    return {name: value for name, value in outcome["result"].items() if name != "weights"}


def assert_same_figures(outcome, expected):
    assert figures(outcome) == figures(expected)
    np.testing.assert_array_equal(outcome["reference"], expected["reference"])


def test_processes_share_the_records_and_find_what_one_finds_to_the_last_bit(outcomes, alone):
    n = len(outcomes["audit"])
    for outcome in outcomes["audit"]:
        assert_same_figures(outcome, alone)
        # 12 batches for each of reference and audit, and seven passes of probes.
        assert outcome["n_forwards"] == 7 + 2 * -(-12 // n)
        assert outcome["n_lines"] == 3
    assert alone["n_forwards"] == 7 + 2 * 12


def test_a_fully_sharded_model_is_audited_and_each_process_keeps_its_part(outcomes, alone):
    n = len(outcomes["audit_sharded"])
    for outcome in outcomes["audit_sharded"]:
        assert_same_figures(outcome, alone)
        assert outcome["is_sharded_again"]
        assert outcome["is_changed"]
        assert outcome["is_back"]
        assert outcome["step"] == 3
        assert outcome["files"] == sorted(
            name for rank in range(n) for name in (f"{rank}-3-0.safetensors", f"index-{rank}.json")
        )
    assert len({outcome["n_forwards"] for outcome in outcomes["audit_sharded"]}) == 1


def test_a_data_parallel_wrapper_does_not_send_its_buffers_around(two, alone):
    for rank, outcome in enumerate(two["audit_wrapped"]):
        assert figures(outcome) == figures(alone)
        assert outcome["buffer"] == rank


def test_nor_does_one_inside_another_module_and_no_process_waits_for_it(two):
    expected = bodies.audit_twice(None, make_model(), batch_size=13)

    for rank, outcome in enumerate(two["audit_wrapped_in_another_module"]):
        assert figures(outcome) == figures(expected)
        assert outcome["buffer"] == rank
        assert outcome["sends"]


def test_all_halve_their_batch_when_one_runs_out_of_memory(two):
    expected = bodies.audit_twice(None, make_model(), batch_size=bodies.BATCH_SIZE // 2)

    for outcome in two["run_out_of_memory"]:
        assert_same_figures(outcome, expected)
        assert outcome["result"]["batch_size"] == bodies.BATCH_SIZE // 2


def test_all_halve_the_batch_of_a_sharded_model_before_a_pass_when_one_has_no_memory_for_it(two):
    expected = bodies.audit_twice(None, make_model(), batch_size=bodies.BATCH_SIZE // 2)

    for outcome in two["have_less_memory_for_a_batch_of_a_sharded_model"]:
        assert_same_figures(outcome, expected)
        assert outcome["result"]["batch_size"] == outcome["largest_batch"] == bodies.BATCH_SIZE // 2


def test_a_record_that_one_process_has_no_memory_for_fails_an_audit_of_all_and_breaks_nothing(two):
    for outcome in two["have_no_memory_at_one_audit_of_a_sharded_model"]:
        assert outcome["statuses"] == ["ok", "failed", "ok"]
        assert "One canary at a time is too much" in outcome["error"]


def test_a_failure_on_one_process_is_a_failed_audit_on_all(two):
    first, second = two["fail_with_a_warning"]

    assert first["status"] == second["status"] == "failed"
    assert "failed on process 1: NonFiniteLogitsError" in first["error"]
    assert second["error"].startswith("NonFiniteLogitsError")


def test_a_failure_on_one_process_is_raised_on_all(two):
    first, second = two["fail_with_an_error"]

    assert first["raised"].startswith("AuditError: The audit failed on process 1: NonFiniteLogitsError")
    assert second["raised"].startswith("NonFiniteLogitsError")


def test_a_model_changed_on_one_process_ends_training_on_all(two):
    first, second = two["be_changed"]

    assert first["status"] == second["status"] == "failed"
    assert first["raised"].startswith("AuditError: The audit failed on process 1: ModelChangedError")
    assert second["raised"].startswith("ModelChangedError: An audit has changed `transformer.wte.weight`")


def test_processes_with_different_canaries_are_refused(two):
    for message in two["differ_in_canaries"]:
        assert "same seed in every process" in message


@pytest.mark.parametrize(
    ("body", "files"),
    [
        ("keep_in_memory", []),
        ("keep_on_disk", ["0-1-0.safetensors", "index-0.json"]),
        ("keep_without_room_for_a_copy", ["0-1-0.safetensors", "index-0.json"]),
    ],
)
def test_the_main_process_keeps_replicated_weights_for_all(body, files, two):
    for outcome in two[body]:
        assert outcome["step"] == 1
        assert outcome["is_back"]
        assert outcome["files"] == files


def test_a_write_that_takes_longer_than_a_process_group_waits_breaks_nothing(tmp_path):
    """In a group of its own, which loses patience early: weights, history, weights over the budget."""
    outcomes = run_processes([bodies.keep_on_a_slow_disk], 2, tmp_path)["keep_on_a_slow_disk"]

    assert [(outcome["step"], outcome["is_back"]) for outcome in outcomes] == [(1, True)] * 2


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """In groups of their own, which they break."""
    bodies_of_one = (bodies.fail_between_passes_of_a_sharded_model, bodies.fail_in_a_pass_of_a_sharded_model)
    return run_processes(bodies_of_one, 2, tmp_path_factory.mktemp("failing"))


def test_a_process_that_fails_between_passes_of_a_sharded_model_makes_the_others_with_all(failing):
    outcomes = failing["fail_between_passes_of_a_sharded_model"]

    assert [outcome["statuses"] for outcome in outcomes] == [["failed", "ok"]] * 2
    told = [outcome["error"] for outcome in outcomes]
    assert "on process 1: NonFiniteLogitsError" in told[0]
    assert told[1].startswith("NonFiniteLogitsError")


def test_a_process_that_fails_in_a_pass_of_a_sharded_model_ends_all_with_its_message(failing):
    outcomes = failing["fail_in_a_pass_of_a_sharded_model"]

    for outcome in outcomes:
        assert outcome["told"].startswith("BrokenPassError: A pass through the sharded model broke off on ")
        assert "process 1 (ValueError in distributed_bodies.fail, line " in outcome["told"]
        assert outcome["status"] == "failed"
        assert outcome["seconds"] < 60


def test_a_disk_full_on_one_process_leaves_the_older_weights_of_all(two):
    outcomes = two["fail_to_keep"]

    assert [outcome["raised"] for outcome in outcomes] == ["AuditError", "OSError"]
    assert [(outcome["step"], outcome["weight"]) for outcome in outcomes] == [(1, 0.0), (1, 1.0)]


def rows_of_lengths(*lengths):
    return [TokenRow(np.arange(n), np.arange(n)) for n in lengths]


@pytest.mark.parametrize("n_shares", [1, 2, 3, 4])
def test_every_row_is_dealt_once(n_shares):
    rows = rows_of_lengths(*(2 + (7 * i) % 11 for i in range(37)))

    shares = deal_rows(rows, batch_size=4, n_shares=n_shares)

    assert sorted(i for share in shares for i in share) == list(range(37))
    assert max(map(len, shares)) - min(map(len, shares)) <= 4


def test_with_fewer_batches_than_processes_the_first_is_repeated():
    assert deal_rows(rows_of_lengths(2, 4, 3), batch_size=2, n_shares=4) == [[1, 2], [0], [1, 2], [1, 2]]


def test_tensor_parallel_processes_score_the_same_records():
    model = make_model()
    assert can_share_records(model)
    model._tp_size = 2
    assert not can_share_records(model)
