"""After an audit a model is what it was: every bit of its tensors, every attribute of its modules.

Forward passes write more than one expects: counters, caches, weights that are scaled for evaluation. What
they replace is put back by keeping the old object, which costs nothing. What they overwrite in place has to
be copied first: all that is small, and of the large tensors those that a short trial pass was seen to
overwrite. Then it is checked: the first time by the bits of every tensor, later by autograd's counters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from ezmia_callbacks.distributed import reshard
from ezmia_callbacks.errors import ModelChangedError
from ezmia_callbacks.scoring.checksums import checksums
from ezmia_callbacks.scoring.module_state import is_managed_elsewhere, is_small, model_state

__all__: list[str] = []

_N_NAMES_SHOWN = 3


@dataclass
class Traces:
    """What is known of the traces that the forward passes of one model leave; they add to it themselves.

    Attributes:
        names: Large tensors that are overwritten in place, by name: copied before a pass, and put back.
        is_restless: Whether a pass changes anything at all, so that the next one may say something else.
        is_proven: Whether a whole pass was found to leave every bit as it was.
    """

    names: set[str] = field(default_factory=set)
    is_restless: bool = False
    is_proven: bool = False


@contextmanager
def left_as_found(
    model: nn.Module, traces: Traces, *, by_bits: bool = False, copies_on_write: bool = False
) -> Iterator[Callable[[], None]]:
    """Put back whatever changes in a model meanwhile, and check that it is back.

    Args:
        model: The model.
        traces: What is known of it; what is found out is added.
        by_bits: Compare the bits of every tensor, which reads each twice; else autograd's counters, which
            kernels of the user's own may pass by.
        copies_on_write: Copy each tensor just before an operation first writes to it. Every operation pays
            for that, and what is compiled runs uncompiled.

    Yields:
        What puts everything back already, so that the next pass does not depend on those before it.

    Raises:
        ModelChangedError: if a tensor has changed and could not be put back; names it.
    """
    state = model_state(model)
    copies = _Copies(state.tensors)
    for name, tensor in state.tensors.items():
        if name in traces.names or is_small(tensor):
            copies.keep(name)
    before = _bits(state.tensors) if by_bits else {}
    versions = {name: _version(tensor) for name, tensor in state.tensors.items()}
    moved: set[str] = set()

    def put_back() -> None:
        reshard(model)
        is_changed = state.put_back()
        # Before copies are put back, which sets their counters back, too.
        just_moved = {name for name, tensor in state.tensors.items() if _version(tensor) != versions[name]}
        copies.put_back()
        moved.update(just_moved)
        traces.is_restless |= is_changed or bool(just_moved)

    try:
        with _copying_on_write(copies) if copies_on_write else nullcontext():
            yield put_back
    finally:
        put_back()
        if by_bits:
            after = _bits(state.tensors)
            changed = {name for (name, i), value in before.items() if after.get((name, i)) != value}
            traces.names |= {name for name in moved if not is_small(state.tensors[name])}
        else:
            changed = moved - copies.names
        if changed:
            raise ModelChangedError(_explanation(model, changed, by_bits=by_bits))


def can_copy_on_write(model: nn.Module) -> bool:
    """Whether operations can be watched without leaving something in the compiler's caches."""
    is_eager = hasattr(torch.compiler, "set_stance") or not is_compiled(model)
    return is_eager and not is_managed_elsewhere(model)


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has a hand in the model or a part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _explanation(model: nn.Module, changed: Collection[str], *, by_bits: bool) -> str:
    names = sorted(changed)
    others = f" and {len(names) - _N_NAMES_SHOWN} more" if len(names) > _N_NAMES_SHOWN else ""
    listed = ", ".join(f"`{name}`" for name in names[:_N_NAMES_SHOWN]) + others
    reason = (
        "in evaluation mode its forward pass overwrites them where that cannot be seen beforehand (compiled "
        "code, a kernel of its own)"
        if by_bits
        else "they were overwritten in place, which they were not when it was tried before the first step"
    )
    return (
        f"An audit has changed {listed} of {type(model).__name__} and could not put it back: {reason}. "
        "Training on would train another model: load the weights anew, keep the forward pass from writing "
        "to them while `model.training` is False, or audit checkpoints afterwards."
    )


class _Copy(NamedTuple):
    """Bytes of a tensor as they were, where they belong, and what sets autograd's counter back."""

    places: list[Tensor]
    contents: list[Tensor]
    counter: AbstractContextManager[None]


class _Copies:
    """Copies of tensors, by name, each made at most once."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self._copies: dict[str, _Copy] = {}

    @property
    def names(self) -> set[str]:
        return set(self._copies)

    def keep(self, name: str) -> None:
        if name not in self._copies:
            tensor = self.tensors[name]
            places = bytes_of(tensor)
            self._copies[name] = _Copy(places, [place.clone() for place in places], _same_version(tensor))

    def put_back(self) -> None:
        # Of memory that tensors share the first copy is the oldest.
        for copy in reversed(self._copies.values()):
            for place, content in zip(copy.places, copy.contents, strict=True):
                place.copy_(content)
            copy.counter.__exit__(None, None, None)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same_version(tensor: Tensor) -> AbstractContextManager[None]:
    """Sets the counter back, when it is left, to what it is now.

    Else an optimizer step would be noticed where there was none, and a graph that waits for its backward pass
    would be refused.
    """
    if tensor.is_inference():
        return nullcontext()
    guard: AbstractContextManager[None] = torch.autograd.grad_mode._unsafe_preserve_version_counter(tensor)
    return guard


def bytes_of(tensor: Tensor) -> list[Tensor]:
    """The memory of a tensor as views of bytes; of a distributed tensor that of the part held here.

    Empty where there is none: on `meta`, in pieces that are elsewhere, in layouts without strides. Gaps
    between the elements are included, so that any strides will do.
    """
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return []
    if hasattr(tensor, "__tensor_flatten__"):
        # Some name more than tensors.
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [view for part in parts if isinstance(part, Tensor) for view in bytes_of(part)]
    if not tensor.numel():
        return []
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, n_bytes = tensor.storage_offset() * tensor.itemsize, span * tensor.itemsize
    storage = tensor.untyped_storage()
    if storage.nbytes() < start + n_bytes:
        return []
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return [empty.set_(storage, start, (n_bytes,), (1,))]


def _bits(tensors: dict[str, Tensor]) -> dict[tuple[str, int], int]:
    """A number for the bits of each tensor, or of each part of a tensor that wraps others."""
    views = {(name, i): view for name, tensor in tensors.items() for i, view in enumerate(bytes_of(tensor))}
    found = checksums({f"{name} {i}": view for (name, i), view in views.items()})
    return dict(zip(views, found.values(), strict=True))


@contextmanager
def _copying_on_write(copies: _Copies) -> Iterator[None]:
    with _eagerly(), _CopyOnWrite(copies):
        yield


def _eagerly() -> AbstractContextManager[None]:
    """What is compiled runs uncompiled, and nothing is compiled: the caches stay training's."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


class _CopyOnWrite(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Sees every operation, and copies tensors of the model before one first writes into their memory."""

    supports_higher_order_operators = True

    def __init__(self, copies: _Copies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._copies = copies
        # By address of the storage, which stays: the tensors hold it.
        self._spans: dict[int, list[tuple[str, int, int]]] = {}
        for name, tensor in copies.tensors.items():
            for view in bytes_of(tensor):
                self._spans.setdefault(_address(view), []).append((name, *_span(view)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, name in _written_arguments(func):
            self._before_write(args[position] if position < len(args) else kwargs.get(name))
        return func(*args, **kwargs)

    def _before_write(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            for item in value:
                self._before_write(item)
        elif isinstance(value, Tensor):
            for view in bytes_of(value):
                start, end = _span(view)
                for name, own_start, own_end in self._spans.get(_address(view), ()):
                    if start < own_end and own_start < end:
                        self._copies.keep(name)


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes to."""
    arguments = getattr(getattr(func, "_schema", None), "arguments", ())
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _address(view: Tensor) -> int:
    return view.untyped_storage().data_ptr()


def _span(view: Tensor) -> tuple[int, int]:
    """First byte within the storage, and the one after the last."""
    start = int(view.storage_offset())
    return start, start + len(view)
