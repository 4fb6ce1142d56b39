"""Many processes, one audit: records are dealt out, errors and decisions are everybody's.

Without `torch.distributed` every function does what one process alone would do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ezmia_callbacks.errors import AuditError, BrokenPassError
from ezmia_callbacks.safe_text import describe_error, get_logger

__all__: list[str] = []

logger = get_logger(__name__)

T = TypeVar("T")

# Longer than any default group waits: what broke a pass is told after that.
_SIDE_PATIENCE = timedelta(hours=2)

# Seconds; the default patience of process groups is ten minutes or more.
_TURN = 30.0


# The default group, and the one that answers for it.
_side_group: tuple[object, dist.ProcessGroup] | None = None


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
    dist.broadcast_object_list(box, src=0, group=_group())
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
    dist.all_gather_object(values, value, group=_group())
    return values


def talk_beside_the_model(model: nn.Module) -> None:
    """Have the processes of a sharded model agree in a group of their own; each of them must call this.

    Its forward pass is made of collectives. One process that fails in the middle of it would meet the others'
    exchange of weights with its exchange of errors, which ends all of them.

    Args:
        model: The model.
    """
    global _side_group
    if n_processes() > 1 and is_sharded(model) and _group() is None:
        _side_group = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=_SIDE_PATIENCE))


def _group() -> dist.ProcessGroup | None:
    """The group in which processes agree; None for the default one."""
    # A default group that was made anew has another.
    if _side_group is None or _side_group[0] is not dist.group.WORLD:
        return None
    return _side_group[1]


class _Failure(NamedTuple):
    """An error of one process; the first one is the smallest."""

    seconds: float
    process: int
    text: str
    is_broken_pass: bool

    @classmethod
    def of(cls, error: Exception | None) -> _Failure | None:
        if error is None:
            return None
        is_broken_pass = isinstance(error, BrokenPassError)
        text = str(error) if is_broken_pass else describe_error(error)
        return cls(time.time(), rank(), text, is_broken_pass)


def on_all_ranks(run: Callable[[], T]) -> T:
    """What `run` returns here, once it has succeeded on every process; each of them must call this.

    An error on one process is an error on all: none may wait for another that will not come.

    Args:
        run: What to do; may fail here and not there, and therefore must not wait for other processes
            itself, except inside the model's forward pass.

    Raises:
        Exception: what `run` raised here.
        AuditError: if it failed on another process; says which, and why, in words that quote no record.
        BrokenPassError: if it was in the middle of a pass through a sharded model, whose processes do not
            agree any more.
    """
    value, own_error = None, None
    try:
        value = run()
    except Exception as error:  # told to the other processes before it is raised here
        own_error = error
        if isinstance(error, BrokenPassError):
            # The others may be ended, by a watchdog, before they can hear of it.
            logger.error("A pass through the sharded model broke off on process %d (%s).", rank(), error)
    failures = [each for each in gather(_Failure.of(own_error)) if each is not None]
    if any(each.is_broken_pass for each in failures):
        # The others were left alone in the middle of it, and noticed only later.
        first = min(failures)
        raise BrokenPassError(
            f"A pass through the sharded model broke off on process {first.process} ({first.text}): training "
            "cannot go on with these processes. Resume from the last checkpoint; if memory ran out, pass a "
            "smaller `batch_size` to the audit."
        ) from own_error
    if own_error is not None:
        raise own_error
    for each in failures:
        raise AuditError(f"The audit failed on process {each.process}: {each.text}")
    return value  # type: ignore[return-value]  # set where nothing failed


def on_all_ranks_in_turns(run: Callable[[], T]) -> T:
    """`on_all_ranks` for what may take as long as a disk takes: nobody waits for it in a collective.

    A process group gives up after some minutes, and large weights can take longer. What is done here is done
    in a thread of its own, while all processes tell each other twice a minute that it is not over yet.

    Args:
        run: What to do; must not wait for other processes itself.

    Raises:
        Exception: what `run` raised here.
        AuditError: if it failed on another process; says which, and why.
    """
    if n_processes() == 1:
        return run()
    with ThreadPoolExecutor(1, thread_name_prefix="ezmia-files") as executor:
        future = executor.submit(run)
        while not all(gather(not wait([future], timeout=_TURN).not_done)):
            pass
        return on_all_ranks(future.result)


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
    return is_in_fsdp1(model) or any(map(_is_fully_sharded, model.modules()))


def is_in_fsdp1(model: nn.Module) -> bool:
    """Whether the first FSDP holds the weights, in flat parameters of its own."""
    return any(_is_a(module, "FullyShardedDataParallel") for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Give back the whole weights that a forward pass without a backward pass has left in each process.

    FSDP2 leaves those of the outermost module: what is written into them then is lost later.
    """
    for module in model.modules():
        if _is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]  # a method of FSDPModule


def _is_fully_sharded(module: nn.Module) -> bool:
    return _is_a(module, "FSDPModule")


def _is_a(module: nn.Module, name: str) -> bool:
    # By name: the classes have moved between releases of torch.
    return any(base.__name__ == name for base in type(module).__mro__)
