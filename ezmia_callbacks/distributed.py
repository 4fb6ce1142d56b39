"""One decision for all processes: taken on the main process, sent to the others."""

from typing import TypeVar

import torch.distributed as dist

__all__ = ["broadcast_from_main", "gather", "is_main_process", "rank"]

T = TypeVar("T")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process among all, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def broadcast_from_main(value: T) -> T:
    """The main process's value, on every process; each of them must call this.

    Kernels may round differently from rank to rank, and ranks that disagree on a stop hang.
    """
    if not _is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; each of them must call this."""
    if not _is_distributed():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
