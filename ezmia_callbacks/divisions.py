"""Divisions of a model, or of its records, among processes that no audit was seen to score and restore right.

They are refused by name before the first step. Recognized are objects and settings of torch, transformers,
Accelerate, DeepSpeed and Megatron, and whatever leaves different layers to different processes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from ezmia_callbacks.distributed import gather, n_processes, on_all_ranks
from ezmia_callbacks.errors import ConfigurationError

__all__: list[str] = []

_PIPELINE, _EXPERTS = "Pipeline parallelism", "Expert parallelism"

# By name: none of these libraries needs to be there.
_CLASSES = {
    "_PipelineStageBase": _PIPELINE,  # torch
    "_PipelineSchedule": _PIPELINE,
    "PipelineIdentityLayer": _PIPELINE,  # transformers, where other processes hold the layer
    "PipelineModule": _PIPELINE,  # DeepSpeed
    "PipelineEngine": _PIPELINE,
    "TensorParallel_Layer": "DeepSpeed's tensor parallelism",
}

# Of a model's configuration: of transformers, and of Megatron.
_SIZES = {
    "pp_size": _PIPELINE,
    "pipeline_model_parallel_size": _PIPELINE,
    "ep_size": _EXPERTS,
    "expert_model_parallel_size": _EXPERTS,
    "tensor_model_parallel_size": "Megatron's tensor parallelism",
    "context_parallel_size": "Context parallelism",
}

_INSTEAD = "train without it, or audit its checkpoints afterwards, with `ezmia audit`."


def refuse_divisions(model: object) -> None:
    """Refuse what is divided in a way in which no audit was seen right; every process must call it.

    Args:
        model: What is to be audited.

    Raises:
        ConfigurationError: if it is; names the way.
        AuditError: if another process refuses it.
    """
    on_all_ranks(lambda: _refuse_here(model))
    if n_processes() > 1 and isinstance(model, nn.Module):
        names = [name for name, _ in model.named_parameters()]
        if any(other != names for other in gather(names)):
            raise ConfigurationError(
                "The processes hold different layers of the model, as in pipeline parallelism, where no "
                f"audit was ever seen right: {_INSTEAD}"
            )


def refuse_split_records(parallelism: object) -> None:
    """Refuse to audit where each process gets a part of every record.

    Args:
        parallelism: Accelerate's `ParallelismConfig`; None if there is none.

    Raises:
        ConfigurationError: if it is so.
    """
    if getattr(parallelism, "cp_enabled", False) or getattr(parallelism, "sp_enabled", False):
        raise ConfigurationError(
            "Context and sequence parallelism split a record over processes, which the audit cannot score: "
            "switch them off or audit checkpoints afterwards."
        )


def _refuse_here(model: object) -> None:
    for kind, sign in _signs(model):
        raise ConfigurationError(
            f"{kind} ({sign}) was never seen to be scored and restored right: {_INSTEAD}"
        )
    refuse_split_records(_parallelism_of_accelerate())
    if isinstance(model, nn.Module):
        _refuse_meshes(model)


def _signs(model: object) -> Iterator[tuple[str, str]]:
    """Each sign of a division by which it is known, and the division's name."""
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    for part in parts:
        for base in type(part).__mro__:
            if base.__name__ in _CLASSES:
                yield _CLASSES[base.__name__], f"`{type(part).__name__}`"
    config = getattr(model, "config", None)
    for owner in (config, getattr(config, "distributed_config", None)):
        for name, kind in _SIZES.items():
            size = getattr(owner, name, None)
            if isinstance(size, int) and size > 1:
                yield kind, f"`{name}: {size}`"


def _parallelism_of_accelerate() -> object:
    """What this process's Accelerator was told; None without one."""
    state = sys.modules.get("accelerate.state")
    if n_processes() == 1 or state is None or not state.is_initialized():
        return None
    return getattr(state.AcceleratorState(), "parallelism_config", None)


def _refuse_meshes(model: nn.Module) -> None:
    """Refuse weights that are divided in more than one way at once, or among some of the processes."""
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    n_dimensions = max((mesh.ndim for mesh in meshes), default=1)
    if n_dimensions > 1:
        raise ConfigurationError(
            f"The model's weights lie on a mesh of {n_dimensions} dimensions, as with HSDP or with tensor "
            "parallelism and FSDP, which audits were never seen to score and restore right: shard it "
            "over one dimension, or audit its checkpoints afterwards, with `ezmia audit`."
        )
    smallest = min((mesh.size() for mesh in meshes), default=n_processes())
    if smallest != n_processes():
        raise ConfigurationError(
            f"The model's weights lie on a mesh of {smallest} of the {n_processes()} processes, as with "
            "tensor parallelism inside of data parallelism, which audits were never seen to score and "
            "restore right: divide it among all of them, or audit its checkpoints afterwards, with "
            "`ezmia audit`."
        )
