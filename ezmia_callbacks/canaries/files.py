"""A canary set as one JSON file, so that the split outlives the process that drew it.

How membership was drawn travels with the records: an audit of a finished run can claim for its figures
exactly what the split can claim, and no more.
"""

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ezmia_callbacks.canaries.sets import CanarySet
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.files import write_atomically
from ezmia_callbacks.typed_rows import parse_json, read_rest, read_value

__all__: list[str] = []

# Of the file; another schema is refused, not guessed at. The fingerprint of the first one covered less.
_SCHEMA = 2


def save_canaries(canaries: CanarySet, path: str | Path) -> None:
    """Write a canary set to a JSON file, whole or not at all; one record a line.

    The file holds the records' text or tokens: it is as confidential as the training set.

    Args:
        canaries: The canary set.
        path: File to write; its folder is created.

    Raises:
        ConfigurationError: if a record holds something that JSON has no word for.
        OSError: if the file cannot be written.
    """
    content = {"schema": _SCHEMA, "fingerprint": canaries.fingerprint}
    content |= {
        entry.name: _plain(getattr(canaries, entry.name)) for entry in fields(CanarySet) if entry.compare
    }
    try:
        lines = [f"{json.dumps(name)}: {_lines(value)}" for name, value in content.items()]
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"The canaries cannot be written as JSON: {error}.") from error
    write_atomically(Path(path), "{\n" + ",\n".join(lines) + "\n}\n")


def load_canaries(path: str | Path) -> CanarySet:
    """The canary set that `save_canaries` wrote.

    Raises:
        ConfigurationError: if the file is missing, is not such a file, or was changed since.
    """
    try:
        content = read_rest(parse_json(Path(path).read_text(encoding="utf-8")), schema=_SCHEMA)
        fingerprint = read_value(str, content.pop("fingerprint", None), name="fingerprint")
        canaries = read_value(CanarySet, content, newer={"details", "groups"})
    # A path that no file can have is a ValueError; so is a file that is no UTF-8.
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{str(path)!r} is not a file of canaries: {_reason(error)}.") from error
    if canaries.fingerprint != fingerprint:
        raise ConfigurationError(
            f"{str(path)!r} was changed since it was saved: records, membership, ids, groups or how the "
            "split was drawn do not match its fingerprint. Split again, or restore the file."
        )
    return canaries


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _lines(value: Any) -> str:
    """JSON of one attribute: of a list one item a line, for a reader and for `diff`."""
    if not isinstance(value, list):
        return json.dumps(value, allow_nan=False)
    return "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error).rstrip(".")
