"""Second copies of the weights inside an optimizer: a model that is put back must be put back there, too.

Optimizers of mixed precision step on weights of their own, in float32, and copy them into the model
afterwards: what is put back into the model alone is gone after the next step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ezmia_callbacks.audit.zero import ZeroMaster, zero_masters
from ezmia_callbacks.scoring.checksums import own_part

__all__: list[str] = []

# Wrappers keep their optimizer, optimizers their groups and states, at most so deep.
_DEPTH = 6


@dataclass(frozen=True, eq=False)
class Master:
    """A tensor of an optimizer that holds the value of a parameter.

    Attributes:
        tensor: The optimizer's.
        parameter: The model's.
    """

    tensor: Tensor
    parameter: nn.Parameter

    def follow(self) -> None:
        """Take over the parameter's present value."""
        with torch.no_grad():
            own_part(self.tensor).copy_(own_part(self.parameter).view(self.tensor.shape))


def masters(optimizer: Any, model: nn.Module) -> Sequence[Master | ZeroMaster]:
    """The tensors of an optimizer, beside the parameters themselves, that hold the value of one.

    They are known by what they hold, not by the names that each library gives them: cast to the parameter's
    type they are the parameter, to the last bit. Call it before the model is changed.

    Args:
        optimizer: The optimizer, wrapped or not; None has none.
        model: The model that it trains.
    """
    if of_zero := zero_masters(model):
        return of_zero
    parameters = list(model.parameters())
    own = {id(parameter) for parameter in parameters}
    # Compare with few: those of the same number of values, and the same first ones.
    by_start: dict[tuple[int, str], list[nn.Parameter]] = {}
    for parameter in parameters:
        part = own_part(parameter)
        if part.is_floating_point() and part.numel() and part.device.type != "meta":
            by_start.setdefault(_start(part, part.dtype), []).append(parameter)
    types = {own_part(parameter).dtype for each in by_start.values() for parameter in each}
    found: list[Master] = []
    matched: set[int] = set()
    for tensor in _tensors(optimizer, depth=_DEPTH, seen=set()):
        part = own_part(tensor)
        if id(tensor) in own or part.is_meta or not part.is_floating_point() or not part.any():
            # Zeros are a parameter of zeros and every sum that has not begun, too.
            continue
        equal = [
            parameter
            for dtype in types
            for parameter in by_start.get(_start(part, dtype), ())
            # The same memory under another name follows by itself.
            if own_part(parameter).data_ptr() != part.data_ptr() and _holds(part, own_part(parameter))
        ]
        if equal:
            # Of parameters that are equal (norms of ones), optimizers keep the order.
            unmatched = (parameter for parameter in equal if id(parameter) not in matched)
            parameter = next(unmatched, equal[0])
            matched.add(id(parameter))
            found.append(Master(tensor, parameter))
    return found


def _holds(part: Tensor, parameter: Tensor) -> bool:
    return torch.equal(part.reshape(-1).to(parameter.device, parameter.dtype), parameter.reshape(-1))


def _start(part: Tensor, dtype: torch.dtype) -> tuple[int, str]:
    return part.numel(), f"{dtype} {part.reshape(-1)[:8].to(dtype).tolist()}"


def _tensors(owner: Any, *, depth: int, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object holds, in attributes, lists and mappings."""
    if owner is None or id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, Tensor):
        yield owner
        return
    if depth == 0 or isinstance(owner, nn.Module | str | bytes | type):
        return
    if isinstance(owner, Mapping):
        # A state's keys are the parameters; some libraries have masters there.
        parts = [*owner.keys(), *owner.values()]
    elif isinstance(owner, list | tuple | set):
        parts = list(owner)
    else:
        parts = list(getattr(owner, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, depth=depth - 1, seen=seen)
