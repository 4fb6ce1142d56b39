"""The weights of the last audit within the budget, kept so that they can be restored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from ezmia_callbacks.distributed import (
    broadcast_from_main,
    broadcast_tensors_from_main,
    gather,
    is_main_process,
    n_processes,
    on_all_ranks,
)
from ezmia_callbacks.errors import AuditError

__all__: list[str] = []


class _Kept(TypedDict):
    step: int
    is_whole: bool
    tensors: dict[str, Tensor]


class KeptWeights:
    """Everything of a model that training changes, at one point of the training.

    That is every trainable parameter and every persistent buffer; with an adapter, a few megabytes. Held in
    a file if a path is given, so that it survives the process and costs no memory; else in CPU memory.

    Of several processes that hold the same weights the main one keeps them for all; where each holds its own
    part of the model, as in fully sharded training, each keeps its part. `save` and `restore` must be called
    by all.

    Args:
        path: File to hold the weights, another one in each process; None for memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._in_memory: _Kept | None = None
        self._prepared: _Kept | None = None

    @property
    def exists(self) -> bool:
        """Whether there are weights to restore."""
        return self._in_memory is not None or (self._path is not None and self._path.exists())

    @property
    def step(self) -> int | None:
        """Optimizer steps that the kept weights had seen; None if there are none.

        Raises:
            AuditError: if the file is damaged.
        """
        kept = self._load()
        return None if kept is None else kept["step"]

    def save(self, model: nn.Module, *, step: int) -> None:
        """Keep the model's present weights; what was kept before is lost only once this succeeded.

        Args:
            model: The model.
            step: Optimizer steps done.

        Raises:
            OSError: if the file cannot be written.
        """
        tensors = {name: _own_part(tensor) for name, tensor in _changing(model)}
        is_whole = _is_same_everywhere(model)
        kept: _Kept = {"step": step, "is_whole": is_whole, "tensors": tensors}
        is_needed = is_main_process() or not is_whole
        try:
            # Only once all have written theirs, so that no mixture of old and new parts is left.
            on_all_ranks(lambda: self._prepare(kept) if is_needed else None)
            if is_needed:
                self._commit()
            else:
                self.discard()
        finally:
            self._forget_prepared()

    def relabel(self, *, step: int) -> None:
        """Count the kept weights, if any, as those of another step; for a run that starts over with them.

        Args:
            step: Optimizer steps that the kept weights shall be said to have seen.

        Raises:
            OSError: if the file cannot be written.
            AuditError: if the file is damaged.
        """
        kept = self._load()
        if kept is None:
            return
        try:
            self._prepare({**kept, "step": step})
            self._commit()
        finally:
            self._forget_prepared()

    def discard_after(self, step: int) -> None:
        """Forget weights of a later step: they belong to a future that a resumed run will not have.

        Args:
            step: Optimizer steps that the run resumes from.

        Raises:
            AuditError: if the file is damaged.
        """
        if (broadcast_from_main(self.step) or 0) > step:
            self.discard()

    def _prepare(self, kept: _Kept) -> None:
        """Have the weights ready, beside those kept so far."""
        if self._path is None:
            self._prepared = {**kept, "tensors": {k: t.cpu().clone() for k, t in kept["tensors"].items()}}
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._temporary(self._path).open("wb") as file:
            try:
                torch.save(kept, file)
            except RuntimeError as error:  # torch's name for a failed write, e.g. on a full disk
                raise OSError(f"The weights cannot be written to {self._path}: {error}") from error
            file.flush()
            os.fsync(file.fileno())

    def _commit(self) -> None:
        if self._path is None:
            self._in_memory = self._prepared
        else:
            self._temporary(self._path).replace(self._path)

    def _forget_prepared(self) -> None:
        self._prepared = None
        if self._path is not None:
            self._temporary(self._path).unlink(missing_ok=True)

    def restore(self, model: nn.Module) -> int:
        """Write the kept weights back into the model, in place; returns the step they are from.

        Raises:
            AuditError: if nothing was kept, the file is damaged, or the model's weights are others now.
        """
        loaded = on_all_ranks(self._load)
        known = broadcast_from_main(None if loaded is None else (loaded["step"], loaded["is_whole"]))
        if known is None:
            raise AuditError("There are no weights to restore: no audit within the budget kept any.")
        step, is_whole = known
        is_needed = is_main_process() or not is_whole
        on_all_ranks(lambda: _put_back(loaded, model, step=step) if is_needed else None)
        if is_whole:
            names = broadcast_from_main([] if loaded is None else sorted(loaded["tensors"]))
            present = dict(_everything(model))
            broadcast_tensors_from_main(present[name] for name in names)
        return int(step)

    def discard(self) -> None:
        """Forget the kept weights and remove their file."""
        self._in_memory = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._forget_prepared()

    @staticmethod
    def _temporary(path: Path) -> Path:
        # One name for all processes: what a killed one left is overwritten, not left for good.
        return path.with_name(f".{path.name}.tmp")

    def _load(self) -> _Kept | None:
        if self._path is None or not self._path.exists():
            return self._in_memory
        try:
            kept: _Kept = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no common parent for what a damaged file raises
            raise AuditError(f"The kept weights at {self._path} are damaged: {error}") from error
        return kept


def _put_back(kept: _Kept | None, model: nn.Module, *, step: int) -> None:
    if kept is None or kept["step"] != step:
        raise AuditError(f"This process's part of the weights of step {step} was not kept.")
    missing = sorted(dict(_changing(model)).keys() - kept["tensors"].keys())
    if missing:
        raise AuditError(
            f"{len(missing)} trainable weights were not trainable when the weights were kept (first: "
            f"{missing[0]}): the model was changed during training and cannot be restored."
        )
    # All that was kept goes back, also what was frozen since: it may have been trained in between.
    present = dict(_everything(model))
    lost = sorted(kept["tensors"].keys() - present.keys())
    if lost:
        raise AuditError(
            f"{len(lost)} kept weights are no longer in the model (first: {lost[0]}): the model was "
            "changed during training and cannot be restored."
        )
    with torch.no_grad():
        for name, tensor in kept["tensors"].items():
            _own_part(present[name]).copy_(tensor)


def _own_part(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that this process holds, in its memory; else the tensor itself."""
    tensor = tensor.detach()
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _is_same_everywhere(model: nn.Module) -> bool:
    """Whether all processes hold the same trainable weights: seen from their values, not guessed from types.

    Buffers may differ: data-parallel training takes the main process's.
    """
    if n_processes() == 1:
        return True
    sums = [
        (name, *part.shape, part.sum(dtype=torch.float64).item(), part.abs().sum(dtype=torch.float64).item())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for part in [_own_part(parameter)]
    ]
    digests = gather(hashlib.sha256(repr(sums).encode()).hexdigest())
    return len(set(digests)) == 1


def _everything(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
