"""Rotary positions that grow with the longest row seen: no row of an audit may depend on the ones before it.

The forward pass of a model with dynamic scaling changes its frequencies at a row longer than any before, and
keeps them for the rows that follow. What training's rows left is put back by `left_as_found`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__: list[str] = []

_LENGTH = "max_seq_len_cached"
_FREQUENCIES = "inv_freq"


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
