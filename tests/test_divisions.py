"""What divides a model or its records in a way that no test has seen right is refused, by its name."""

from importlib.metadata import version
from types import SimpleNamespace

import division_bodies as bodies
import pytest
from packaging.version import Version
from processes import run_processes
from tiny import make_model
from torch import nn

from ezmia_callbacks.divisions import refuse_divisions, refuse_split_records
from ezmia_callbacks.errors import ConfigurationError

OF_TORCH = [
    bodies.hybrid_sharding,
    bodies.sharding_in_each_process_alone,
    bodies.pipeline_stage_of_torch,
    bodies.pipeline_schedule_of_torch,
    bodies.layers_of_one_stage,
]
OF_NEW_RELEASES = [bodies.context_parallelism_of_accelerate, bodies.pipeline_of_transformers]
HAS_NEW_RELEASES = Version(version("transformers")) >= Version("5.20")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    run = OF_TORCH + (OF_NEW_RELEASES if HAS_NEW_RELEASES else [])
    return run_processes(run, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("hybrid_sharding", "mesh of 2 dimensions, as with HSDP"),
        ("sharding_in_each_process_alone", "mesh of 1 of the 2 processes"),
        ("pipeline_stage_of_torch", "Pipeline parallelism (`PipelineStage`)"),
        ("pipeline_schedule_of_torch", "Pipeline parallelism (`ScheduleGPipe`)"),
        ("layers_of_one_stage", "different layers of the model, as in pipeline parallelism"),
        ("context_parallelism_of_accelerate", "Context and sequence parallelism split a record"),
        ("pipeline_of_transformers", "Pipeline parallelism (`PipelineIdentityLayer`)"),
    ],
)
def test_a_division_that_no_test_has_seen_right_is_refused_before_the_first_step(two, case, words):
    if not HAS_NEW_RELEASES and case not in two:
        pytest.skip("these releases of transformers and accelerate do not have it")
    for told in two[case]:
        assert told.startswith("ConfigurationError: ")
        assert words in told


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("PipelineModule", "Pipeline parallelism"),
        ("PipelineEngine", "Pipeline parallelism"),
        ("TensorParallel_Layer", "DeepSpeed's tensor parallelism"),
    ],
)
def test_divisions_by_deepspeed_are_known_by_the_names_of_its_classes(name, words):
    model = make_model()
    model.inner = type("OfTheUser", (type(name, (nn.Module,), {}),), {})()

    with pytest.raises(ConfigurationError, match=rf"{words} \(`OfTheUser`\)"):
        refuse_divisions(model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pp_size", "Pipeline parallelism"),
        ("ep_size", "Expert parallelism"),
        ("pipeline_model_parallel_size", "Pipeline parallelism"),
        ("tensor_model_parallel_size", "Megatron's tensor parallelism"),
        ("context_parallel_size", "Context parallelism"),
        ("expert_model_parallel_size", "Expert parallelism"),
    ],
)
@pytest.mark.parametrize("is_inside", [False, True])
def test_divisions_are_known_by_a_size_in_the_configuration(name, words, is_inside):
    model, own = make_model(), SimpleNamespace(**{name: 2})
    model.config = SimpleNamespace(distributed_config=own) if is_inside else own

    with pytest.raises(ConfigurationError, match=rf"{words} \(`{name}: 2`\)"):
        refuse_divisions(model)


def test_a_size_of_one_divides_nothing():
    model = make_model()
    model.config.distributed_config = SimpleNamespace(pp_size=1, ep_size=1, tp_size=2)

    refuse_divisions(model)


@pytest.mark.parametrize("name", ["cp_enabled", "sp_enabled"])
def test_records_that_lie_on_several_processes_are_refused(name):
    with pytest.raises(ConfigurationError, match="switch them off or audit checkpoints afterwards"):
        refuse_split_records(SimpleNamespace(**{name: True}))
    refuse_split_records(SimpleNamespace(cp_enabled=False, sp_enabled=False))
    refuse_split_records(None)
