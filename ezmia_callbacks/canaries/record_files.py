"""Files of training records: JSONL, CSV and Parquet, read whole and written back without some rows.

Of text files every kept row is written as the bytes that it was read as: a training set that lost its
non-members differs from the original in nothing else.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ezmia_callbacks.canaries.records import Record, record_kind
from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError

__all__: list[str] = []

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RecordFile:
    """A file of records, in memory.

    Attributes:
        path: Where it was read.
        rows: One mapping from column to value per record, in the file's order.
        content_of: Bytes of a file of the same format that holds only the rows with these indices.
    """

    path: Path
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)
    content_of: Callable[[Sequence[int]], bytes] = field(repr=False)

    def records(self, *, text_column: str | None = None) -> list[Record]:
        """The rows as records.

        Args:
            text_column: Column that holds the text; by default the columns are recognized by their names
                (`text`, `messages`, `prompt` and `completion`, `chosen` and `rejected`, `input_ids`).

        Raises:
            ConfigurationError: naming the row that is no such record, and the columns it has.
        """
        if text_column is not None:
            return [self._text(i, text_column) for i in range(len(self.rows))]
        for number, row in enumerate(self.rows, start=1):
            try:
                record_kind(row)
            except ConfigurationError:
                raise ConfigurationError(
                    f"{str(self.path)!r}, row {number}: no column 'text', 'messages', 'prompt' and "
                    f"'completion', 'chosen' and 'rejected', or 'input_ids'; it has {sorted(row)}. Name the "
                    "column that holds the text: --text-column NAME."
                ) from None
        return list(self.rows)

    def _text(self, index: int, column: str) -> str:
        row = self.rows[index]
        if column not in row:
            raise ConfigurationError(
                f"{str(self.path)!r}, row {index + 1}: no column {column!r}; it has {sorted(row)}."
            )
        text = row[column]
        if not isinstance(text, str):
            raise ConfigurationError(
                f"{str(self.path)!r}, row {index + 1}: column {column!r} holds a {type(text).__name__}; "
                "text is needed."
            )
        return text


def read_record_file(path: str | Path) -> RecordFile:
    r"""The records of a `.jsonl`, `.csv` or `.parquet` file.

    Raises:
        ConfigurationError: if the file is missing, has another ending, is damaged (naming the line), or holds
            no record.
        MissingDependencyError: if it is a Parquet file and pyarrow is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "notes.jsonl"
    ...     _ = path.write_text('{"text": "one"}\n{"text":   "two"}\n')
    ...     file = read_record_file(path)
    >>> file.records(), file.content_of([1])
    ([{'text': 'one'}, {'text': 'two'}], b'{"text":   "two"}\n')
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise ConfigurationError(
            f"A file of records must end in .jsonl, .csv or .parquet, got {str(path)!r}: convert it."
        )
    try:
        content = path.read_bytes()
    # No file can have a path with NUL in it.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"Cannot read {str(path)!r}: {reason}.") from error
    file = readers[path.suffix.lower()](path, content)
    if not file.rows:
        raise ConfigurationError(f"{str(path)!r} contains no records.")
    return file


def json_line(line: str | bytes, *, path: Path, number: int) -> Any:
    """The value that a line of a file holds as JSON.

    Args:
        line: The line.
        path: The file, for the error.
        number: Number of the line in it, from 1.

    Raises:
        ConfigurationError: if the line is not JSON.

    >>> json_line('{"text": "one"}', path=Path("notes.jsonl"), number=1)
    {'text': 'one'}
    """
    try:
        return json.loads(line)
    # Nested too deeply; of numbers with more digits than Python converts a ValueError has no `msg`.
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "it is nested too deeply, or a number in it is too long")
        raise ConfigurationError(
            f"{str(path)!r}, line {number}: not JSON ({reason}): write one object per line."
        ) from error


def _read_jsonl(path: Path, content: bytes) -> RecordFile:
    mark, _text = _decoded(path, content)
    # Not `splitlines`: JSON strings may hold U+2028 and its like unescaped.
    lines = content[len(mark) :].split(b"\n")
    lines = [line + b"\n" for line in lines[:-1]] + lines[-1:]
    rows: list[Mapping[str, Any]] = []
    pieces: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = json_line(line, path=path, number=number)
        if not isinstance(row, dict):
            raise ConfigurationError(
                f"{str(path)!r}, line {number}: a JSON {type(row).__name__}; an object is needed."
            )
        rows.append(row)
        pieces.append(line)
    return RecordFile(path, tuple(rows), lambda kept: mark + b"".join(pieces[i] for i in kept))


def _read_csv(path: Path, content: bytes) -> RecordFile:
    mark, text = _decoded(path, content)
    # Lines with their own endings; a quoted field may run over several.
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, strict=True)
    rows: list[Mapping[str, Any]] = []
    pieces: list[bytes] = []
    header: list[str] | None = None
    head = mark
    n_read = 0
    with _fields_of_any_length():
        try:
            for fields in reader:
                first, n_read = n_read, reader.line_num
                piece = "".join(lines[first:n_read]).encode()
                if not fields:
                    continue
                if header is None:
                    header, head = _checked_header(path, fields), mark + piece
                    continue
                if len(fields) != len(header):
                    raise ConfigurationError(
                        f"{str(path)!r}, line {first + 1}: {len(fields)} fields, but the header names "
                        f"{len(header)} columns."
                    )
                rows.append(dict(zip(header, fields, strict=True)))
                pieces.append(piece)
        except csv.Error as error:
            raise ConfigurationError(f"{str(path)!r}, line {n_read + 1}: not CSV ({error}).") from error
    return RecordFile(path, tuple(rows), lambda kept: head + b"".join(pieces[i] for i in kept))


def _read_parquet(path: Path, content: bytes) -> RecordFile:
    try:
        import pyarrow  # type: ignore[import-untyped]  # it has no stubs
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError(
            f"Reading {str(path)!r} needs pyarrow: pip install pyarrow, or convert the file to .jsonl."
        ) from None
    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
        rows = tuple(table.to_pylist())
    # Among them dates that Python does not know, and texts that are no UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ConfigurationError(f"{str(path)!r} is not a Parquet file: {_first_line(error)}") from error

    def content_of(kept: Sequence[int]) -> bytes:
        sink = io.BytesIO()
        parquet.write_table(table.take(pyarrow.array(kept, type=pyarrow.int64())), sink)
        return sink.getvalue()

    return RecordFile(path, rows, content_of)


def _decoded(path: Path, content: bytes) -> tuple[bytes, str]:
    """The byte order mark, if there is one, and the text after it."""
    mark = _BYTE_ORDER_MARK if content.startswith(_BYTE_ORDER_MARK) else b""
    try:
        return mark, content[len(mark) :].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{str(path)!r} is not UTF-8 text (byte {len(mark) + error.start}): save it as UTF-8."
        ) from error


def _checked_header(path: Path, names: list[str]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigurationError(f"{str(path)!r}: the header names {repeated} more than once.")
    return names


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the limit of 131072 characters a field, which documents exceed; it is global to the module."""
    # Not sys.maxsize: the limit is a C long, which is shorter on Windows.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
