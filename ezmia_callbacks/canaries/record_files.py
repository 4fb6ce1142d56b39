"""Files of training records, read whole and written back without some rows.

Of text files every kept row is written as the bytes that it was read as: a training set that lost its
non-members differs from the original in nothing else.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from ezmia_callbacks.canaries.records import (
    RECORD_FIELDS,
    REJECTED_IDS,
    Record,
    canonical_record,
    is_empty,
    record_kind,
)
from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError
from ezmia_callbacks.safe_text import describe_columns

__all__: list[str] = []

ENDINGS = ".jsonl, .json, .txt, .csv or .parquet, also with .gz"
"""Of files that can be read, in words."""

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
            ConfigurationError: naming the row that is no such record, or holds what cannot be read as text or
                tokens: halves of characters, NaN, negative token ids.
        """
        if text_column is not None:
            texts = [self._text(i, text_column) for i in range(len(self.rows))]
            for number, text in enumerate(texts, start=1):
                self._refuse({text_column: _fault(text)}, number)
            return list(texts)
        for number, row in enumerate(self.rows, start=1):
            try:
                record_kind(row)
            except ConfigurationError:
                raise ConfigurationError(
                    f"{self._place(number)}: no column 'text', 'messages', 'prompt' and "
                    f"'completion', 'chosen' and 'rejected', or 'input_ids'; it has {describe_columns(row)}. "
                    "Rename the columns, or name the one that holds the text: --text-column NAME."
                    f"{self._hint}"
                ) from None
            try:
                is_empty(row)
                record = canonical_record(row)
            except ConfigurationError as error:
                self._refuse({name: _fault(row[name]) for name in row if name in RECORD_FIELDS}, number)
                raise ConfigurationError(f"{self._place(number)}: {error}") from error
            self._refuse(_faults(record), number)
        return list(self.rows)

    def _place(self, number: int) -> str:
        return f"{str(self.path)!r}, row {number}"

    def _refuse(self, faults: Mapping[str, str], number: int) -> None:
        for name, fault in faults.items():
            if fault:
                raise ConfigurationError(
                    f"{self._place(number)}: {name!r} holds {fault}: repair the row, or leave it out."
                )

    @property
    def _hint(self) -> str:
        is_csv = ending_of(self.path).removesuffix(".gz") == ".csv"
        return " The first line of a CSV file names its columns." if is_csv else ""

    def _text(self, index: int, column: str) -> str:
        row = self.rows[index]
        if column not in row:
            raise ConfigurationError(
                f"{self._place(index + 1)}: no column {column!r}; it has {describe_columns(row)}.{self._hint}"
            )
        text = row[column]
        if not isinstance(text, str):
            raise ConfigurationError(
                f"{self._place(index + 1)}: column {column!r} holds a {type(text).__name__}; text is needed."
            )
        return text


def ending_of(path: Path) -> str:
    """The ending by which a file of records is read, in lower case; "" if it has none of them.

    >>> ending_of(Path("notes.JSONL.gz")), ending_of(Path("notes.v2.csv")), ending_of(Path("notes.doc"))
    ('.jsonl.gz', '.csv', '')
    """
    name = path.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    return inner + name.removeprefix(name.removesuffix(".gz")) if inner in _READERS else ""


def read_record_file(path: str | Path) -> RecordFile:
    r"""The records of a `.jsonl`, `.json`, `.txt`, `.csv` or `.parquet` file, also with `.gz`.

    A `.json` file holds a list of objects, or one object a line. A `.txt` file holds one record a paragraph
    where it has blank lines, else one a line; its rows have the column `text`.

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
    ending = ending_of(path)
    if not ending:
        raise ConfigurationError(f"A file of records must end in {ENDINGS}, got {str(path)!r}: convert it.")
    try:
        content = path.read_bytes()
    # No file can have a path with NUL in it.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"Cannot read {str(path)!r}: {reason}.") from error
    is_compressed = ending.endswith(".gz")
    file = _READERS[ending.removesuffix(".gz")](path, _unpacked(path, content) if is_compressed else content)
    if not file.rows:
        raise ConfigurationError(f"{str(path)!r} contains no records.")
    if not is_compressed:
        return file
    # Without a time, so that the same rows make the same file.
    return RecordFile(path, file.rows, lambda kept: gzip.compress(file.content_of(kept), mtime=0))


def _json_line(line: bytes, *, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{str(path)!r}, line {number}: not JSON ({_reason(error)}): write one object per line."
        ) from error


def _reason(error: Exception) -> str:
    # Of numbers with more digits than Python converts a ValueError has no `msg`.
    return getattr(error, "msg", "it is nested too deeply, or a number in it is too long")


def _unpacked(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{str(path)!r} is not a whole gzip file: pack it again.") from error


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
        rows.append(_object(_json_line(line, path=path, number=number), f"{str(path)!r}, line {number}"))
        pieces.append(line)
    return RecordFile(path, tuple(rows), lambda kept: mark + b"".join(pieces[i] for i in kept))


def _read_json(path: Path, content: bytes) -> RecordFile:
    mark, text = _decoded(path, content)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Many tools write one object a line under this name, too.
        if text.lstrip()[:1] == "{":
            return _read_jsonl(path, content)
        line = getattr(error, "lineno", 1)
        raise ConfigurationError(f"{str(path)!r}, line {line}: not JSON ({_reason(error)}).") from error
    if not isinstance(values, list):
        is_canaries = isinstance(values, dict) and "fingerprint" in values
        kind = "canaries, which `ezmia audit` takes as --canaries" if is_canaries else "one JSON value"
        raise ConfigurationError(
            f"{str(path)!r} holds {kind}; a list of objects, or one object a line, is needed."
        )
    rows = tuple(_object(value, f"{str(path)!r}, row {i}") for i, value in enumerate(values, start=1))
    pieces = list(_texts_of_items(text))
    return RecordFile(
        path, rows, lambda kept: mark + ("[\n" + ",\n".join(pieces[i] for i in kept) + "\n]\n").encode()
    )


def _texts_of_items(text: str) -> Iterator[str]:
    """Each item of a JSON list as it is written; the text must be known to be one."""
    decoder, blank = json.JSONDecoder(), " \t\n\r"

    def skipped(position: int) -> int:
        while text[position] in blank:
            position += 1
        return position

    position = skipped(text.index("[") + 1)
    while text[position] != "]":
        _, end = decoder.raw_decode(text, position)
        yield text[position:end]
        position = skipped(end)
        if text[position] == ",":
            position = skipped(position + 1)


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{place}: a JSON {type(value).__name__}; an object is needed.")
    return value


def _read_txt(path: Path, content: bytes) -> RecordFile:
    mark, text = _decoded(path, content)
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    is_blank = [not line.strip() for line in lines]
    filled = [i for i, blank in enumerate(is_blank) if not blank]
    has_paragraphs = bool(filled) and any(is_blank[filled[0] : filled[-1]])
    starts = [i for i in filled if not has_paragraphs or i == 0 or is_blank[i - 1]]
    # Blank lines go with what stands before them.
    pieces = ["".join(lines[i:j]) for i, j in pairwise([*starts, len(lines)])]
    head = "".join(lines[: starts[0]]) if starts else ""
    rows = tuple({"text": _without_line_ends(piece)} for piece in pieces)
    return RecordFile(path, rows, lambda kept: mark + (head + "".join(pieces[i] for i in kept)).encode())


def _without_line_ends(piece: str) -> str:
    lines = piece.split("\n")
    while not lines[-1].strip():
        lines.pop()
    return "\n".join(line.removesuffix("\r") for line in lines)


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
    # Among them dates that Python does not know, and texts that are no UTF-8: messages may quote values.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ConfigurationError(
            f"{str(path)!r} is not a Parquet file that can be read ({type(error).__name__}): write it again."
        ) from error

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
    for number, name in enumerate(names, start=1):
        if (first := names.index(name) + 1) < number:
            raise ConfigurationError(
                f"{str(path)!r}: columns {first} and {number} have the same name: the first line has to name "
                "each column once."
            )
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


def _fault(value: object) -> str:
    """What in a value of a record cannot be read as text; "" if nothing."""
    if isinstance(value, str):
        return "half of a character (a surrogate)" if _has_half_characters(value) else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a number that is not finite (NaN or infinity)"
    parts: Iterable[object] = ()
    if isinstance(value, Mapping):
        parts = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        parts = value
    return next(filter(None, map(_fault, parts)), "")


def _faults(record: Record) -> dict[str, str]:
    """The fault of each field of a record as `canonical_record` returns it."""
    if not isinstance(record, Mapping):
        return {}
    if "input_ids" not in record:
        return {name: _fault(value) for name, value in record.items()}
    # Columns of whole numbers by now, too many to look at each.
    least = {
        name: min(cast(list[int], record.get(name, [0])), default=0) for name in ("input_ids", REJECTED_IDS)
    }
    return {
        name: f"the token id {value}, where ids count from 0" for name, value in least.items() if value < 0
    }


def _has_half_characters(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


_READERS: dict[str, Callable[[Path, bytes], RecordFile]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
