"""Whole runs of two real processes on DeepSpeed's engine (gloo, no GPU); `make test-engines` runs them."""

import re
from importlib.util import find_spec

import pytest
from processes import run_processes

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed, which `make test-engines` brings along"
)

WHOLE = [
    "zero_1_in_float32",
    "zero_1_in_bfloat16",
    "zero_2_in_float32",
    "zero_2_in_bfloat16",
    "zero_2_offloaded",
    "zero_2_with_an_adapter",
]
IN_PARTS = [
    "zero_3_in_float32",
    "zero_3_in_bfloat16",
    "zero_3_with_persistent_parameters",
    "zero_3_offloaded",
    "zero_3_with_an_adapter",
]

OTHERS = [
    "zero_2_is_neutral",
    "zero_3_is_neutral",
    "an_unproven_setting_is_refused",
    "a_copy_of_parts_is_refused",
    "rejected_weights_are_kept_in_parts",
    "a_loop_stops_and_puts_back",
]


def run(names, folder):
    import deepspeed_bodies as bodies

    return run_processes([getattr(bodies, name) for name in names], 2, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(WHOLE, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    return run(IN_PARTS, tmp_path_factory.mktemp("in_parts"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return run(OTHERS, tmp_path_factory.mktemp("others"))


@pytest.fixture
def outcomes(request):
    name = request.param
    return request.getfixturevalue("whole" if name in WHOLE else "in_parts")[name]


each_case = pytest.mark.parametrize("outcomes", WHOLE + IN_PARTS, indirect=True)


@each_case
def test_a_stop_leaves_the_kept_weights_wherever_the_engine_has_them(outcomes, request):
    stage = "_Stage3" if "zero_3" in request.node.name else ""
    for outcome in outcomes:
        # Without this the run may be plain data parallelism: accelerate says nothing.
        assert outcome["kind"] == "DEEPSPEED"
        assert outcome["engine"] == f"DeepSpeedEngine DeepSpeedZeroOptimizer{stage}"
        assert outcome["types"] == ["float32" if "float32" in request.node.name else "bfloat16"]
        assert outcome["n_failed"] == 0
        assert 0 < outcome["kept_step"] < outcome["stopped_at"] < 60
        assert outcome["over"] > 1e-3
        # In memory, as a forward pass gets them, saved, by DeepSpeed's script of a checkpoint, after a step.
        places = ("memory", "in_use", "saved", "converted", "stepped")
        assert {place: outcome[place] for place in places} == dict.fromkeys(places, 0.0)
    assert len({(outcome["kept_step"], outcome["stopped_at"]) for outcome in outcomes}) == 1


@each_case
def test_what_the_optimizer_remembers_of_undone_steps_is_forgotten(outcomes):
    for outcome in outcomes:
        assert outcome["n_moments_before"] > 100
        assert outcome["n_moments"] == 0


@each_case
def test_a_run_goes_on_from_its_last_checkpoint_and_from_one_saved_after_the_stop(outcomes):
    for outcome in outcomes:
        kept = outcome["kept_step"]
        assert outcome["checkpoints"] == [kept - 2, kept]
        assert outcome["resumed_audits"] == [kept, kept + 2]
        places = ("resumed", "loaded", "loaded_and_stepped")
        assert {place: outcome[place] for place in places} == dict.fromkeys(places, 0.0)


@pytest.mark.parametrize("outcomes", IN_PARTS, indirect=True)
def test_each_process_keeps_its_own_part_of_what_is_trained_and_nobody_the_whole(outcomes, request):
    for outcome in outcomes:
        needed, n_bytes_of_header = outcome["n_bytes_trained"], 130 * 40
        assert needed <= sum(outcome["n_bytes_kept"]) < needed + n_bytes_of_header
        if "adapter" in request.node.name:
            assert needed < outcome["n_bytes"] / 4


def test_a_process_that_fails_in_a_pass_of_zero_3_ends_all_with_its_message(tmp_path):
    outcomes = run(["a_process_fails_in_the_middle_of_a_pass"], tmp_path)

    for outcome in outcomes["a_process_fails_in_the_middle_of_a_pass"]:
        assert re.match(
            r"BrokenPassError: A pass through the sharded model broke off on process 1 \(ValueError in "
            r"deepspeed_bodies\.fail, line \d+\): training cannot go on with these processes. Resume from",
            outcome["raised"],
        )
        assert outcome["checkpoints"] == ["checkpoint-2", "checkpoint-4"]
        assert outcome["seconds"] < 60


@pytest.mark.parametrize("stage", [2, 3])
def test_training_ends_with_the_same_bits_with_and_without_the_callback(others, stage):
    for outcome in others[f"zero_{stage}_is_neutral"]:
        assert outcome["difference"] == 0.0
        assert outcome["n_audits"] == 2
        without, with_callback = outcome["logs"]
        assert len(without) == 6
        assert without == with_callback


def test_a_loop_that_hands_over_the_engine_alone_stops_with_the_kept_weights_everywhere(others):
    for outcome in others["a_loop_stops_and_puts_back"]:
        assert outcome["engine"] == "DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3"
        assert 0 < outcome["kept_step"] < outcome["stopped_at"] < 20
        assert outcome["over"] > 1e-3
        assert (outcome["in_use"], outcome["stepped"]) == (0.0, 0.0)


def test_what_no_test_has_put_back_is_refused_before_the_first_step_on_every_process(others):
    message = (
        "step 0: DeepSpeed with `bf16` without ZeRO keeps weights where they were never seen to be restored "
        "whole: pass `restore=False` and keep checkpoints to return to, or train without it."
    )

    assert others["an_unproven_setting_is_refused"] == [[message, message]] * 2


def test_a_copy_as_the_reference_is_refused_where_each_process_has_a_part(others):
    message = (
        "step 0: ConfigurationError: reference='copy' needs a model that can be copied, and of "
        "GPT2LMHeadModel this process holds a part alone: use reference='auto', the same start without a "
        "second model."
    )

    assert others["a_copy_of_parts_is_refused"] == [message] * 2


def test_weights_over_the_budget_are_written_by_each_process_that_has_a_part(others):
    assert others["rejected_weights_are_kept_in_parts"] == [{"difference": 0.0}] * 2
