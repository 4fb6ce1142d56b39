"""Ways to divide a model that are refused, each with the real objects, for `test_divisions.py`."""

from pathlib import Path

import torch
import torch.distributed as dist
from adapted_llama import make_llama
from distributed_bodies import make_canaries
from engine_runs import run_engines_on_cpu
from tiny import make_model
from torch import nn

from ezmia_callbacks import PrivacyAuditor
from ezmia_callbacks.errors import AuditError


def told(model: object) -> str:
    """What an audit says to the model before the first step."""
    try:
        PrivacyAuditor(make_canaries(), n_audits=1).begin(model)
    except AuditError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def hybrid_sharding(rank: int, folder: Path) -> str:
    """Replicated over one dimension of the mesh, sharded over the other."""
    return told(_sharded((1, dist.get_world_size()), ("replicate", "shard")))


def sharding_in_each_process_alone(rank: int, folder: Path) -> str:
    """A mesh that leaves out the other process."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    meshes = [DeviceMesh("cpu", [each]) for each in range(dist.get_world_size())]
    model = make_model()
    fully_shard(model, mesh=meshes[rank])
    return told(model)


def pipeline_of_transformers(rank: int, folder: Path) -> str:
    from tensor_parallel_bodies import load_divided

    run_engines_on_cpu()
    return told(load_divided(_saved(folder), pp_size=2))


def pipeline_stage_of_torch(rank: int, folder: Path) -> str:
    from torch.distributed.pipelining import PipelineStage

    return told(PipelineStage(_layers_of(rank), rank, 2, torch.device("cpu"), torch.ones(1, 4, 32)))


def pipeline_schedule_of_torch(rank: int, folder: Path) -> str:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(_layers_of(rank), rank, 2, torch.device("cpu"), torch.ones(1, 4, 32))
    return told(ScheduleGPipe(stage, n_microbatches=1))


def layers_of_one_stage(rank: int, folder: Path) -> str:
    """The module in a stage, or what anybody takes apart by hand."""
    return told(_layers_of(rank))


def context_parallelism_of_accelerate(rank: int, folder: Path) -> str:
    """In a loop of one's own, where no trainer tells of it."""
    run_engines_on_cpu()
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    try:
        Accelerator(parallelism_config=ParallelismConfig(cp_size=2), fsdp_plugin=plugin)
        return told(make_model())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _sharded(shape: tuple[int, ...], names: tuple[str, ...]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model


def _layers_of(rank: int) -> nn.Module:
    """Half of a model, as each process of a pipeline has it."""
    model = make_model()
    halves = (
        nn.ModuleDict({"embed": model.transformer.wte, "first": model.transformer.h[0]}),
        nn.ModuleDict({"second": model.transformer.h[1], "head": model.lm_head}),
    )
    return halves[rank]


def _saved(folder: Path) -> Path:
    if dist.get_rank() == 0:
        make_llama().save_pretrained(folder / "whole")
    dist.barrier()
    return folder / "whole"
