"""Files of weights in the safetensors format, written in the background, for the owner alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ezmia_callbacks.errors import AuditError
from ezmia_callbacks.files import open_private
from ezmia_callbacks.scoring.checksums import own_part

__all__: list[str] = []

_PIECE = 64 * 2**20  # bytes

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Form(NamedTuple):
    """Type and shape of a tensor.

    Attributes:
        dtype: Name of its type.
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Those of the part of a tensor that this process holds."""
        part = own_part(tensor)
        return cls(str(part.dtype).removeprefix("torch."), tuple(part.shape))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a new file of tensors, readable by the owner alone, and wait until it is on the disk.

    Types that the format does not know are written as bytes.

    Args:
        path: File to write; its folder exists and it does not.
        tensors: The tensors, by name. Those on another device are copied one at a time.

    Raises:
        OSError: if it cannot be written; what was written of it is removed.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        part = own_part(tensor)
        n_bytes = part.numel() * part.element_size()
        is_known = part.dtype in _NAMES
        header[name] = {
            "dtype": _NAMES.get(part.dtype, "U8"),
            "shape": list(part.shape) if is_known else [n_bytes],
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    try:
        with open_private(path) as file:
            _write(file.write, len(head).to_bytes(8, "little") + head)
            for tensor in tensors.values():
                _write(file.write, _bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write(write: Callable[[memoryview], int | None], content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        # Other threads run while the system writes; in pieces, so that they need not wait for a cached write.
        left = left[write(left[:_PIECE]) or 0 :]


def _bytes(tensor: Tensor) -> memoryview:
    part = own_part(tensor).cpu()
    if part.is_complex():
        part = torch.view_as_real(part)
    content: memoryview = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content


def read_tensors(paths: Iterable[Path], names: Iterable[str], use: Callable[[str, Tensor], None]) -> None:
    """Hand the tensors of these names over, one after the other.

    Args:
        paths: The files.
        names: Names of the tensors, each in one of the files.
        use: Gets each name and its tensor.

    Raises:
        AuditError: if a file is missing or damaged, or has not all of them.
    """
    wanted = set(names)
    for path in paths:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in sorted(wanted & set(file.keys())):
                    use(name, file.get_tensor(name))
                    wanted.discard(name)
        except (SafetensorError, OSError) as error:
            raise AuditError(f"The kept weights at {path} are damaged: {error}") from error
    if wanted:
        raise AuditError(f"The kept weights lack {len(wanted)} tensors (first: {min(wanted)}).")


def forms_in(path: Path) -> dict[str, Form]:
    """Type and shape of each tensor in a file; empty if it cannot be read."""
    types = {name: str(dtype).removeprefix("torch.") for dtype, name in _NAMES.items()}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 — not a dict
            return {
                name: Form(types.get(each.get_dtype(), ""), tuple(each.get_shape()))
                for name, each in slices.items()
            }
    except (SafetensorError, OSError):
        return {}


def as_form(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that was read, in the type and shape of another; types that the format lacks come as bytes."""
    return tensor if tensor.dtype == like.dtype else tensor.view(like.dtype).view(like.shape)


def of_form(tensor: Tensor, form: Form) -> Tensor:
    """A tensor that was read, as it was written; what is of another form stays as it is.

    Args:
        tensor: The tensor.
        form: Type and shape of the one that was written.
    """
    dtype = getattr(torch, form.dtype, None)
    if not isinstance(dtype, torch.dtype) or dtype in _NAMES or tensor.dtype != torch.uint8:
        return tensor
    is_whole = tensor.numel() == math.prod(form.shape) * dtype.itemsize
    return tensor.view(dtype).view(form.shape) if is_whole else tensor


class Background:
    """Does one thing at a time beside the training; what fails is raised when it is waited for."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._future: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; `wait` must have been called for what was begun before."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="ezmia-weights")
        self._future = self._executor.submit(work)

    def join(self) -> None:
        """Wait until it is done; what it raised is still to be raised by `wait`."""
        if self._future is not None:
            wait([self._future])

    def wait(self) -> None:
        """Wait until it is done, and raise what it raised; nothing if nothing was begun."""
        future = self._future
        if future is None:
            return
        # Whoever interrupts the waiting does not end the work: it can still be waited for.
        wait([future])
        self._future = None
        future.result()


def has_memory_for(n_bytes: int) -> bool:
    """Whether a copy of this size would take less than half of the memory left, as far as is known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return True
    return n_bytes < left / 2
