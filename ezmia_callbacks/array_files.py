"""Files of named arrays with metadata and a digest, written whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ezmia_callbacks.files import write_atomically
from ezmia_callbacks.typed_rows import parse_json, read_mapping

__all__: list[str] = []

UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError)
"""What `load_arrays` raises, and reading its result: the file is missing, damaged or of another kind."""

# The file's one entry of metadata.
_KEY = "ezmia"


@dataclass(frozen=True, eq=False)
class ArrayFile:
    """What a file holds.

    Attributes:
        arrays: The arrays that were asked for, by name.
        metadata: What `save_arrays` was given, and the digest as `"sha256"`.
    """

    arrays: dict[str, np.ndarray]
    metadata: Mapping[str, Any]

    def is_intact(self, *, digested: Sequence[str] = ()) -> bool:
        """Whether arrays and metadata have the digest that was written with them.

        Args:
            digested: Names of the metadata that the digest covers, as `save_arrays` got them.
        """
        covered = {name: self.metadata[name] for name in digested}
        return bool(self.metadata["sha256"] == digest_of(self.arrays, covered))


def save_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any], *, digested: Sequence[str] = ()
) -> None:
    """Write a safetensors file of arrays and metadata, whole or not at all.

    Args:
        path: File to write; its folder is created.
        arrays: What to write, by name.
        metadata: What else to write, as JSON holds it.
        digested: Names of the metadata that the digest covers besides the arrays.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    digest = digest_of(arrays, {name: metadata[name] for name in digested})
    content = save(arrays, metadata={_KEY: json.dumps({**metadata, "sha256": digest})})
    write_atomically(path, content)


def load_arrays(
    path: Path,
    names: Sequence[str],
    *,
    optional: Sequence[str] = (),
    more: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _: (),
) -> ArrayFile:
    """The arrays with these names, and the metadata, of a file that `save_arrays` wrote.

    Ask `ArrayFile.is_intact` before the arrays are used; what is wrong with the file is often told better by
    its metadata.

    Args:
        path: File to read.
        names: Names of the arrays, in the order in which they were written.
        optional: Names of those after them that are read if the file has them.
        more: Names of those after these, which the metadata tells.

    Raises:
        UNREADABLE: if the file is missing, or no such file.
    """
    with safe_open(path, framework="numpy") as file:
        metadata = read_mapping(parse_json((file.metadata() or {})[_KEY]))
        found = [*names, *(name for name in optional if name in set(file.keys())), *more(metadata)]
        return ArrayFile({name: file.get_tensor(name) for name in found}, metadata)


def digest_of(arrays: Mapping[str, np.ndarray], covered: Mapping[str, Any] = MappingProxyType({})) -> str:
    """SHA-256, as hexadecimal digits, of arrays, their names, types and shapes, and of texts beside them.

    Args:
        arrays: The arrays, by name; the order counts.
        covered: What else it covers, as JSON holds it.
    """
    digest = hashlib.sha256(json.dumps(covered).encode() if covered else b"")
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
