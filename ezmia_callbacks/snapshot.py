"""The weights of the last audit inside the budget, kept so that they can be put back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from ezmia_callbacks.errors import AuditError

__all__ = ["WeightSnapshot"]


class _Kept(TypedDict):
    step: int
    tensors: dict[str, Tensor]


class WeightSnapshot:
    """Everything of a model that training changes, at one point of the training.

    That is every trainable parameter and every persistent buffer; with an adapter, a few megabytes. Held in
    a file if a path is given, so that it survives the process and costs no memory; else in CPU memory.

    Args:
        path: File to hold the weights; None for memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._in_memory: _Kept | None = None

    @property
    def exists(self) -> bool:
        """Whether there are weights to put back."""
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
        tensors = {name: tensor.detach() for name, tensor in _changing(model)}
        if self._path is None:
            self._in_memory = {"step": step, "tensors": {k: t.cpu().clone() for k, t in tensors.items()}}
            return
        self._write(self._path, {"step": step, "tensors": tensors})

    def relabel(self, *, step: int) -> None:
        """Count the kept weights as those of another step; for a run that starts over with them.

        Args:
            step: Optimizer steps that the kept weights shall be said to have seen.

        Raises:
            OSError: if the file cannot be written.
            AuditError: if there is nothing to relabel, or the file is damaged.
        """
        kept = self._load()
        if kept is None:
            raise AuditError("There are no kept weights to relabel.")
        if self._path is None:
            self._in_memory = {**kept, "step": step}
            return
        self._write(self._path, {**kept, "step": step})

    def _write(self, path: Path, kept: _Kept) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary(path)
        try:
            with temporary.open("wb") as file:
                try:
                    torch.save(kept, file)
                except RuntimeError as error:  # torch's name for a failed write, e.g. on a full disk
                    raise OSError(f"The weights cannot be written to {path}: {error}") from error
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self, model: nn.Module) -> int:
        """Write the kept weights back into the model, in place; returns the step they are from.

        Raises:
            AuditError: if nothing was kept, the file is damaged, or the model's weights are others now.
        """
        loaded = self._load()
        if loaded is None:
            raise AuditError("There are no weights to put back: no audit inside the budget kept any.")
        kept = loaded["tensors"]
        missing = sorted(dict(_changing(model)).keys() - kept.keys())
        if missing:
            raise AuditError(
                f"{len(missing)} trainable weights were not trainable when the weights were kept (first: "
                f"{missing[0]}): the model was changed during training and cannot be put back."
            )
        # All that was kept goes back, also what was frozen since: it may have been trained in between.
        present = dict(_everything(model))
        lost = sorted(kept.keys() - present.keys())
        if lost:
            raise AuditError(
                f"{len(lost)} kept weights are no longer in the model (first: {lost[0]}): the model was "
                "changed during training and cannot be put back."
            )
        with torch.no_grad():
            for name, tensor in kept.items():
                present[name].copy_(tensor)
        return loaded["step"]

    def discard(self) -> None:
        """Forget the kept weights and remove their file."""
        self._in_memory = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._temporary(self._path).unlink(missing_ok=True)

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
