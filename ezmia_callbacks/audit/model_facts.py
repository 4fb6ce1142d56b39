"""What a model is called and how large it is, for whoever reads of the run later."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

__all__: list[str] = []


def name_of(model: nn.Module) -> str:
    """The name that it was loaded by, of a folder its last part; else the name of its class."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    names = [getattr(config, "_name_or_path", None) for config in configs]
    name = next((name for name in names if isinstance(name, str) and name), None)
    if name is None:
        return type(model).__name__
    # Where a folder lies is nobody's business who reads a report.
    is_path = Path(name).is_absolute() or os.path.exists(name)  # noqa: PTH110 - raises for no name
    return Path(name).name if is_path else name


def parameters_of(model: nn.Module) -> str:
    """How many parameters it has, and how many of them are trained.

    >>> parameters_of(nn.Linear(2, 3))
    '9, all trained'
    """
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    n_all, n_trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    return f"{n_all:,}, all trained" if n_all == n_trained else f"{n_all:,}, of which {n_trained:,} trained"


def _size(parameter: nn.Parameter) -> int:
    """Numbers in it: of the whole parameter, where a process holds a part, and where several are packed."""
    partitioned = getattr(parameter, "ds_numel", None)
    if isinstance(partitioned, int):
        return partitioned
    # bitsandbytes packs two four-bit numbers into a byte.
    n_packed = 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1
    return parameter.numel() * n_packed
