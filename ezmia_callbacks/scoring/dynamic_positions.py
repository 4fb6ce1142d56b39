"""Rotary positions that grow with the longest row seen: what they remember is training's, and no audit's.

The forward pass of a model with dynamic scaling changes its frequencies at a row longer than any before, and
keeps them for the rows that follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

__all__: list[str] = []

_LENGTH = "max_seq_len_cached"
_FREQUENCIES = "inv_freq"
_SCALING = "attention_scaling"


class Memory(NamedTuple):
    """What one module remembers, by name."""

    module: nn.Module
    buffers: dict[str, Any]
    attributes: dict[str, Any]


def remembered(model: nn.Module) -> list[Memory]:
    """What the positions of a model remember of the rows that it has seen; empty for most models."""
    return [
        Memory(
            module,
            {name: value for name, value in module._buffers.items() if name.endswith(_FREQUENCIES)},
            {name: value for name, value in vars(module).items() if name.endswith((_LENGTH, _SCALING))},
        )
        for module in _dynamic(model)
    ]


def restore(memories: list[Memory]) -> None:
    """Let positions remember again what they did."""
    for memory in memories:
        memory.module._buffers.update(memory.buffers)
        for name in [name for name in vars(memory.module) if name.endswith(_LENGTH)]:
            if name not in memory.attributes:
                delattr(memory.module, name)
        for name, value in memory.attributes.items():
            setattr(memory.module, name, value)


def forget(model: nn.Module) -> None:
    """Let the positions of a model start anew, so that a batch does not depend on the ones before it."""
    for module in _dynamic(model):
        known: Any = module
        for name in [name for name in vars(module) if name.endswith(_LENGTH)]:
            prefix = name.removesuffix(_LENGTH)
            original = getattr(module, f"{prefix}original_{_FREQUENCIES}", None)
            frequencies = module._buffers.get(f"{prefix}{_FREQUENCIES}")
            if original is not None and frequencies is not None:
                module._buffers[f"{prefix}{_FREQUENCIES}"] = original.to(frequencies.device)
                setattr(module, name, known.original_max_seq_len)


def _dynamic(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if _LENGTH in vars(module) and "dynamic" in str(getattr(module, "rope_type", "")):
            yield module
