"""Many processes, one audit: records are dealt out, errors and decisions are everybody's.

Without `torch.distributed` every function does what one process alone would do.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ezmia_callbacks.errors import AuditError
from ezmia_callbacks.safe_text import describe_error

__all__: list[str] = []

T = TypeVar("T")


def n_processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among all, from 0."""
    return dist.get_rank() if n_processes() > 1 else 0


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def broadcast_from_main(value: T) -> T:
    """The main process's value, on every process; each of them must call this.

    Kernels may round differently from rank to rank, and ranks that disagree on a stop hang.
    """
    if n_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensors_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, in place, with the main process's; each of them must call this with its own."""
    if n_processes() == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; each of them must call this."""
    if n_processes() == 1:
        return [value]
    values: list[T] = [value] * n_processes()
    dist.all_gather_object(values, value)
    return values


def on_all_ranks(run: Callable[[], T]) -> T:
    """What `run` returns here, once it has succeeded on every process; each of them must call this.

    An error on one process is an error on all: none may wait for another that will not come.

    Args:
        run: What to do; may fail here and not there, and therefore must not wait for other processes
            itself, except inside the model's forward pass.

    Raises:
        Exception: what `run` raised here.
        AuditError: if it failed on another process; says which, and why, in words that quote no record.
    """
    value, own_error = None, None
    try:
        value = run()
    except Exception as error:  # told to the other processes before it is raised here
        own_error = error
    failures = gather("" if own_error is None else describe_error(own_error))
    if own_error is not None:
        raise own_error
    for process, failure in enumerate(failures):
        if failure:
            raise AuditError(f"The audit failed on process {process}: {failure}")
    return value  # type: ignore[return-value]  # set where nothing failed


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper, whose own forward pass would overwrite buffers."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


def can_share_records(model: nn.Module) -> bool:
    """Whether each process may score other records than its neighbors.

    Not where processes compute one batch together, as tensor parallelism does: there each process scores
    all records. Distributed tensors that are not plainly those of fully sharded data parallelism count
    as such, too.
    """
    if max(getattr(model, "tp_size", None) or 1, getattr(model, "_tp_size", None) or 1) > 1:
        return False
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    is_fully_sharded = any(map(_is_fully_sharded, model.modules()))
    return not meshes or (is_fully_sharded and all(mesh.ndim == 1 for mesh in meshes))


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass is a collective operation: each process holds a part of the weights."""
    if max(getattr(model, "tp_size", None) or 1, getattr(model, "_tp_size", None) or 1) > 1:
        return True
    # Distributed tensors, and those of DeepSpeed's third stage.
    if any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters()):
        return True
    names = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    return not names.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def reshard(model: nn.Module) -> None:
    """Give back the whole weights that a forward pass without a backward pass has left in each process.

    FSDP2 leaves those of the outermost module: what is written into them then is lost later.
    """
    for module in model.modules():
        if _is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]  # a method of FSDPModule


def _is_fully_sharded(module: nn.Module) -> bool:
    # By name: the class has moved between releases of torch.
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
