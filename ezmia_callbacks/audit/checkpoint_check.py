"""Whether a checkpoint that the trainer has written holds the weights that were audited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ezmia_callbacks.audit.imprint import Imprint, named_tensors
from ezmia_callbacks.audit.weight_files import Form
from ezmia_callbacks.reference.sources import adapter_names
from ezmia_callbacks.scoring.checksums import checksums

__all__: list[str] = []

# Of weights; optimizers and random states are saved beside them.
_SAFETENSORS, _PICKLED = "*.safetensors", ("pytorch_model*.bin", "adapter_model.bin")


def other_weights_in(checkpoint: Path, model: nn.Module, audited: Imprint) -> list[str]:
    """Names of the model's tensors that a checkpoint holds with other bits than the audited ones.

    Savers of the user's own write averages, or what another callback has just put into the model. Tensors of
    another type or shape, and under names that the model does not have, say nothing.

    Args:
        checkpoint: Folder of the checkpoint.
        model: The model.
        audited: Its weights as they were audited.
    """
    names, forms = _names_in_files(model), {name: Form.of(tensor) for name, tensor in named_tensors(model)}
    differing = set()
    for name, tensor in _tensors_in(checkpoint):
        own = names.get(name)
        if own is None or forms[own] != Form.of(tensor):
            continue
        if checksums({own: tensor})[own] != audited.checksums.get(own):
            differing.add(own)
    return sorted(differing)


def _names_in_files(model: nn.Module) -> dict[str, str]:
    """The names that tensors may have in files, with those that they have in the model."""
    own = [name for name, _ in named_tensors(model)]
    # PEFT leaves out the names of adapters, and that a module is a trained copy.
    without = [".modules_to_save", *(f".{adapter}" for adapter in adapter_names(model))]
    shortened = {}
    for name in own:
        short = f"{name}."
        for part in without:
            short = short.replace(f"{part}.", ".")
        shortened[short.removesuffix(".")] = name
    return {**shortened, **{name: name for name in own}}


def _tensors_in(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all weight files that can be read, one at a time."""
    for path in sorted(checkpoint.glob(_SAFETENSORS)):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError):
            continue
    for path in sorted(found for pattern in _PICKLED for found in checkpoint.glob(pattern)):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # torch has no common parent for what a file of another kind raises
            continue
        for name, value in saved.items() if isinstance(saved, dict) else ():
            if isinstance(value, Tensor):
                yield name, value
