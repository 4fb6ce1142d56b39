"""Running out of memory, and trying again with less."""

import gc
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from ezmia_callbacks.distributed import gather, on_all_ranks
from ezmia_callbacks.errors import AuditMemoryError
from ezmia_callbacks.safe_text import get_logger

__all__: list[str] = []

logger = get_logger(__name__)

_Result = TypeVar("_Result")

# What allocators say; only some of them raise a type of their own.
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def fit_into_memory(run: Callable[[int], _Result], *, batch_size: int) -> tuple[_Result, int]:
    """What `run(batch_size)` returns at the first size that fits into memory, and that size.

    When memory runs out the batch is halved and the run made again from its start, so that all of its
    batches have one size. Every process must call this: they halve together.

    Args:
        run: The run, given a batch size; leaves nothing behind when it fails.
        batch_size: Size to try first.

    Raises:
        AuditMemoryError: if a batch of one does not fit.

    >>> fit_into_memory(lambda size: "done", batch_size=8)
    ('done', 8)
    """
    while True:
        outcome = on_all_ranks(partial(_attempt, run, batch_size))
        reasons = gather(outcome.reason if isinstance(outcome, _OutOfMemory) else None)
        if not isinstance(outcome, _OutOfMemory) and not any(reasons):
            return outcome, batch_size
        del outcome
        if batch_size == 1:
            raise AuditMemoryError(
                "One canary at a time is too much for the memory that is left "
                f"({next(filter(None, reasons))}): pass shorter canaries (`max_length=`), or leave more of "
                "the memory to the audit."
            )
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        logger.warning(
            "The audit ran out of memory with %d records in a batch; from here on it takes %d.",
            batch_size,
            batch_size // 2,
        )
        batch_size //= 2


def take_and_give_back(n_bytes: int, device: torch.device) -> None:
    """See that there is so much memory on a device.

    Raises:
        RuntimeError: if there is not.
    """
    torch.empty(n_bytes, dtype=torch.uint8, device=device)


class _OutOfMemory(NamedTuple):
    reason: str


def _attempt(run: Callable[[int], _Result], batch_size: int) -> _Result | _OutOfMemory:
    try:
        return run(batch_size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Not kept: its frames hold the tensors, and its message makes trainers shrink their batch.
        return _OutOfMemory(type(error).__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator said that there is no memory left."""
    is_by_name = isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    return is_by_name or isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
