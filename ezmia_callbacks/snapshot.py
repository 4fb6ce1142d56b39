"""The weights of the last audit inside the budget, kept so that they can be put back."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ezmia_callbacks.errors import AuditError

__all__ = ["WeightSnapshot"]


class WeightSnapshot:
    """Everything of a model that training changes, at one point of the training.

    That is every trainable parameter and every persistent buffer; with an adapter, a few megabytes. Held in
    a file if a path is given, so that it survives the process and costs no memory; else in CPU memory.

    Args:
        path: File to hold the weights; None for memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tensors: dict[str, Tensor] | None = None

    @property
    def exists(self) -> bool:
        """Whether there are weights to put back."""
        return self._tensors is not None or (self._path is not None and self._path.exists())

    def save(self, model: nn.Module) -> None:
        """Keep the model's present weights; what was kept before is lost only once this succeeded.

        Raises:
            OSError: if the file cannot be written.
        """
        if self._path is None:
            self._tensors = {name: t.detach().cpu().clone() for name, t in _changing(model)}
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save({name: tensor.detach() for name, tensor in _changing(model)}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self, model: nn.Module) -> None:
        """Write the kept weights back into the model, in place.

        Raises:
            AuditError: if nothing was kept, or the model trains weights that were not kept.
        """
        kept = self._tensors
        if self._path is not None and self._path.exists():
            kept = torch.load(self._path, map_location="cpu", weights_only=True)
        if kept is None:
            raise AuditError("There are no weights to put back: no audit inside the budget kept any.")
        missing = sorted(dict(_changing(model)).keys() - kept.keys())
        if missing:
            raise AuditError(
                f"{len(missing)} trainable weights were not trainable when the weights were kept (first: "
                f"{missing[0]}): the model was changed during training and cannot be put back."
            )
        # All that was kept goes back, also what was frozen since: it may have been trained in between.
        present = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in kept.items():
                present[name].copy_(tensor)

    def discard(self) -> None:
        """Forget the kept weights and remove their file."""
        self._tensors = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
