"""What a model holds, by identity: its tensors, and what its modules and their containers hold.

Keeping a second reference costs next to nothing, and brings back whatever a forward pass replaces, adds or
deletes. What it overwrites in place is not brought back by that.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ezmia_callbacks.distributed import is_in_fsdp1

__all__: list[str] = []

_DICTIONARIES = (dict, OrderedDict, defaultdict, Counter)
_SEQUENCES = (list, deque)

# Longer ones are somebody's data, not what a forward pass remembers.
_LONGEST_CONTAINER = 4096

# Elements of a buffer that is copied at each audit without being asked for.
_SMALL = 2**16

# FSDP2 registers hooks for checkpoints at its first forward pass, and needs them.
_NOT_OURS = "state_dict"

# What holds nothing, and is the most of what modules hold.
_PLAIN = frozenset({type(None), bool, int, float, str, FunctionType, MethodType, torch.dtype, torch.device})

_MISSING = object()


class ModelState(NamedTuple):
    """What a model held at some moment.

    Attributes:
        tensors: Parameters, buffers and tensors in attributes, by name, each once.
        holdings: How each of these tensors was held.
        contents: What was in modules, configurations and containers.
        empty: Containers in which nothing was: most dictionaries of hooks.
    """

    tensors: dict[str, Tensor]
    holdings: list[_Holding]
    contents: list[_Contents]
    empty: list[Any]

    def put_back(self) -> bool:
        """Undo what was replaced, added or deleted since; whether anything was."""
        held: list[_Contents | _Holding] = [*self.contents, *self.holdings]
        changed = [each for each in held if each.is_changed()]
        for each in changed:
            each.put_back()
        filled = [container for container in self.empty if container]
        for container in filled:
            container.clear()
        return bool(changed or filled)


def model_state(model: nn.Module) -> ModelState:
    """What a model holds now.

    Engines that swap the weights themselves, with books of their own, are left alone: of their models only
    the buffers are listed.
    """
    walk = _Walk()
    if is_managed_elsewhere(model):
        for name, buffer in model.named_buffers():
            walk.see(buffer, name)
        return ModelState(walk.tensors, [], [], [])
    for name, module in model.named_modules():
        walk.see_module(module, f"{name}." if name else "")
    return ModelState(walk.tensors, walk.holdings, walk.contents, walk.empty)


def is_managed_elsewhere(model: nn.Module) -> bool:
    """Whether the weights are swapped by DeepSpeed's third stage or the first FSDP."""
    return is_in_fsdp1(model) or any(hasattr(p, "ds_id") for p in model.parameters())


def is_small(tensor: Tensor) -> bool:
    """Whether it is no weight, and a copy of it costs nothing that counts."""
    return not isinstance(tensor, nn.Parameter) and tensor.numel() <= _SMALL


class _Holding(NamedTuple):
    """A tensor, and another one with the same memory, shape and strides."""

    tensor: Tensor
    alias: Tensor
    needs_gradient: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Holding:
        return cls(tensor, tensor.detach(), tensor.requires_grad)

    def is_changed(self) -> bool:
        return self.tensor.requires_grad != self.needs_gradient or not self._is_in_place()

    def put_back(self) -> None:
        if not self._is_in_place():
            self.tensor.data = self.alias
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.needs_gradient)

    def _is_in_place(self) -> bool:
        # Wrappers have no memory of their own; what is inside them is not replaced.
        return hasattr(self.tensor, "__tensor_flatten__") or _is_alike(self.tensor, self.alias)


def _is_alike(tensor: Tensor, alias: Tensor) -> bool:
    is_same = tensor.shape == alias.shape and tensor.dtype == alias.dtype and tensor.device == alias.device
    if not is_same or tensor.is_meta or tensor.layout != alias.layout:
        return is_same
    return tensor.data_ptr() == alias.data_ptr() and tensor.stride() == alias.stride()


class _Contents(NamedTuple):
    """A container, and what was in it."""

    container: Any
    before: Any

    def is_changed(self) -> bool:
        container, before = self.container, self.before
        if isinstance(container, dict):
            # All of it in compiled code: there are some for each module.
            return not (_identities(container) == _identities(before) and _keys(container) == _keys(before))
        if isinstance(container, set):
            return bool(container != before)
        return len(container) != len(before) or any(
            a is not b for a, b in zip(container, before, strict=True)
        )

    def put_back(self) -> None:
        container, before = self.container, self.before
        if not isinstance(container, dict):
            container.clear()
            (container.update if isinstance(container, set) else container.extend)(before)
            return
        for key in [key for key in container if key not in before]:
            del container[key]
        for key, value in before.items():
            if container.get(key, _MISSING) is not value:
                container[key] = value
        # The order of modules is that in which they are called.
        if list(container) != list(before):
            container.clear()
            container.update(before)


def _identities(dictionary: dict[Any, Any]) -> list[int]:
    return list(map(id, dictionary.values()))


def _keys(dictionary: dict[Any, Any]) -> list[Any]:
    return list(dictionary)


class _Walk:
    """Goes through what modules hold, and sees each thing once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.holdings: list[_Holding] = []
        self.contents: list[_Contents] = []
        self.empty: list[Any] = []
        self._known: set[int] = set()

    def see_module(self, module: nn.Module, prefix: str) -> None:
        held = vars(module)
        self._remember(held)
        for name, value in held.items():
            kind = type(value)
            if kind in _PLAIN or _NOT_OURS in name:
                continue
            if kind in _DICTIONARIES and not value:
                self.empty.append(value)
                continue
            if name in ("_parameters", "_buffers", "_modules"):
                # Compiled scripts have mappings of their own.
                if kind in _DICTIONARIES:
                    self._remember(value)
                for own_name, item in value.items():
                    self.see(item, f"{prefix}{own_name}")
            else:
                self.see(value, f"{prefix}{name}")

    def see(self, value: Any, name: str) -> None:
        """A value that a module holds, directly or not; modules are seen by themselves."""
        if type(value) in _PLAIN:
            return
        if isinstance(value, Tensor):
            self._see_tensor(value, name)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                self.see(item, f"{name}[{i}]")
        elif type(value) in _DICTIONARIES or type(value) in _SEQUENCES or type(value) is set:
            if len(value) <= _LONGEST_CONTAINER and self._remember(value):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in items:
                    self.see(item, f"{name}[{key}]")
        elif _is_record(value) and self._remember(vars(value)):
            for key, item in vars(value).items():
                self.see(item, f"{name}.{key}")

    def _see_tensor(self, tensor: Tensor, name: str) -> None:
        if id(tensor) in self._known or is_lazy(tensor):
            return
        self._known.add(id(tensor))
        self.tensors[name] = tensor
        self.holdings.append(_Holding.of(tensor))
        # Quantized weights carry what they are decoded with.
        if attributes := vars(tensor):
            self._remember(attributes)

    def _remember(self, container: Any) -> bool:
        """Take down what is in a container; whether it was not known yet."""
        if id(container) in self._known:
            return False
        self._known.add(id(container))
        if container:
            self.contents.append(_Contents(container, _copied(container)))
        else:
            self.empty.append(container)
        return True


def _copied(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _is_record(value: Any) -> bool:
    """Whether an object only holds values: a configuration, a dataclass; never a trainer or a tokenizer."""
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    is_plain = isinstance(value, SimpleNamespace) or dataclasses.is_dataclass(value)
    return is_plain or type(value).__name__.endswith("Config")
