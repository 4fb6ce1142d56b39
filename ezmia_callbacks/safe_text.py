"""Texts from files and errors, made safe for where they are shown: one function for each medium.

A label, a record's id or an error's text may hold what steers a terminal, turns a line around, or is no
character at all. What is shown says so in plain letters.
"""

import logging
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from ezmia_callbacks.errors import AuditError

__all__: list[str] = []

_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
_NO_CHARACTERS = r"\ud800-\udfff\ufdd0-\ufdef" + "".join(
    f"{chr(plane * 0x10000 + 0xFFFE)}{chr(plane * 0x10000 + 0xFFFF)}" for plane in range(17)
)
# They reorder or hide what stands around them; U+2028 and U+2029 break lines.
_REORDERING = r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f"

# None of them tells one person's data from another's.
# fmt: off
_COMMON_COLUMNS = frozenset({
    "answer", "attention_mask", "author", "body", "caption", "category", "chosen",
    "chosen_input_ids", "code", "comment", "completion", "completion_mask", "content", "context",
    "conversation", "conversations", "date", "description", "dialog", "dialogue", "document",
    "file_name", "id", "image", "images", "index", "input", "input_ids", "instruction", "instructions",
    "label", "labels", "language", "message", "messages", "metadata", "name", "output", "pixel_values",
    "position_ids", "prompt", "query", "question", "rating", "rejected", "rejected_input_ids",
    "response", "review", "score", "sentence", "source", "split", "summary", "system", "target", "text",
    "texts", "timestamp", "title", "token_type_ids", "tokens", "tools", "topic", "url", "user", "user_id",
})
# fmt: on

_NOUNS: Mapping[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    dict: "mapping",
    tuple: "list",
}

_UNSAFE_IN_TERMINALS = re.compile(f"[{_CONTROLS}{_NO_CHARACTERS}{_REORDERING}]")
_INVALID_IN_DOCUMENTS = re.compile(f"[{_CONTROLS}{_NO_CHARACTERS}]")


def for_terminal(text: str) -> str:
    r"""The text for a terminal or a log: what would steer it is written as an escape, `\x1b`.

    Line breaks and tabs stay.

    >>> print(for_terminal("a\x1b[31mb\u202e"))
    a\x1b[31mb\u202e
    """
    if text.isascii() and text.isprintable():
        return text
    return _UNSAFE_IN_TERMINALS.sub(_escape, text.replace("\r\n", "\n"))


def for_document(text: str) -> str:
    r"""The text for a page, a JSON document or a picture: what is no character there becomes U+FFFD.

    >>> for_document("a\x00b\ud800") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    True
    """
    if text.isascii() and text.isprintable():
        return text
    return _INVALID_IN_DOCUMENTS.sub("\N{REPLACEMENT CHARACTER}", text)


def describe_columns(names: Iterable[object]) -> str:
    """The columns of a row for an error: those that many datasets have by their names, others counted.

    Other names may say what nobody asked for: of a file without a header they are its first record.

    >>> describe_columns(["prompt", "My number is"])
    "the columns 'prompt' and 1 with a name of its own"
    """
    every = list(names)
    common = sorted({str(name) for name in every} & _COMMON_COLUMNS)
    n_others = len(every) - len(common)
    others = f"{n_others} with {'a name of its own' if n_others == 1 else 'names of their own'}"
    if not every:
        return "no columns"
    if not common:
        return others.replace(" with", " column with" if n_others == 1 else " columns with")
    return f"the columns {', '.join(map(repr, common))}{f' and {others}' if n_others else ''}"


def describe_row(row: Mapping[str, Any]) -> str:
    """What a row holds, for an error: of each column the type and the shape, and no value.

    Names are told as by `describe_columns`.

    >>> print(describe_row({"input_ids": [5, 6], "text": "My number is", "My number is": None}))
    'input_ids': a list of 2 integers; 'text': a string; a column with a name of its own: None
    """
    columns = sorted(row.items(), key=lambda column: (column[0] not in _COMMON_COLUMNS, str(column[0])))
    return "; ".join(
        f"{repr(name) if name in _COMMON_COLUMNS else 'a column with a name of its own'}: {_kind(value)}"
        for name, value in columns
    )


def _kind(value: Any) -> str:
    """A value's type and shape, in words."""
    if value is None:
        return "None"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        is_tensor = type(value).__module__.partition(".")[0] == "torch"
        return f"{'a tensor' if is_tensor else 'an array'} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, list | tuple):
        nouns = {_noun(item) for item in value}
        return f"a list of {len(value)} {f'{nouns.pop()}s' if len(nouns) == 1 else 'items'}"
    noun = _noun(value)
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _noun(value: Any) -> str:
    return _NOUNS.get(type(value), type(value).__name__)


def describe_error(error: BaseException) -> str:
    """What went wrong, in words that quote no record: for what is kept, shown to others, or passed on.

    Errors of this package say what they say. Those of tokenizers, templates, collators, models and the user's
    own functions may quote what they stumbled over: of them it is the type, and the place in the code.

    >>> describe_error(OSError(28, "My number is"))
    'OSError: No space left on device'
    """
    name = type(error).__name__
    if isinstance(error, AuditError):
        return f"{name}: {error}"
    # Of the operating system's own errors there is a list.
    if isinstance(error, OSError) and isinstance(error.errno, int):
        return f"{name}: {os.strerror(error.errno)}"
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return name
    frame, line = frames[-1]
    return f"{name} in {frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}, line {line}"


def log_error(
    logger: logging.Logger,
    message: str,
    *arguments: object,
    error: Exception,
    level: int = logging.WARNING,
) -> None:
    """Log that something failed; all that the error says, which may quote a record, only at level DEBUG.

    Args:
        logger: The logger of a module.
        message: The line; its last `%s` is for what `describe_error` says.
        arguments: What goes in before.
        error: What went wrong.
        level: Level of the line.
    """
    says_all = isinstance(error, AuditError) and error.__cause__ is None
    described = describe_error(error).removesuffix(".")
    if not says_all and not logger.isEnabledFor(logging.DEBUG):
        described += "; the logger `ezmia_callbacks` has the rest at level DEBUG"
    logger.log(level, message, *arguments, described, stacklevel=2)
    if not says_all:
        logger.debug("All of that error:", exc_info=error, stacklevel=2)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, whose arguments are one line each and steer nothing, whoever shows them."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, _SafeArguments) for each in logger.filters):
        logger.addFilter(_SafeArguments())
    return logger


class _SafeArguments(logging.Filter):
    """Leaves the message, by which log readers group, and makes what is put into it safe."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(map(_safe_argument, record.args))
        if record.exc_info and not record.exc_text:
            # Formatters take this text, and make their own only where there is none.
            record.exc_text = for_terminal(logging.Formatter().formatException(record.exc_info))
        return True


def _safe_argument(value: Any) -> Any:
    is_shown_as_text = isinstance(value, str | BaseException | PurePath)
    # With a line break in it a text could pass for a line of its own.
    return for_terminal(str(value)).replace("\n", "\\n") if is_shown_as_text else value


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
