"""Texts from files and errors, made safe for where they are shown: one function for each medium.

A label, a record's id or an error's text may hold what steers a terminal, turns a line around, or is no
character at all. What is shown says so in plain letters.
"""

import logging
import re
from pathlib import PurePath
from typing import Any

__all__: list[str] = []

_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
_NO_CHARACTERS = r"\ud800-\udfff\ufdd0-\ufdef" + "".join(
    f"{chr(plane * 0x10000 + 0xFFFE)}{chr(plane * 0x10000 + 0xFFFF)}" for plane in range(17)
)
# They reorder or hide what stands around them; U+2028 and U+2029 break lines.
_REORDERING = r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f"

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


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, whose arguments go through `for_terminal`, whoever shows them."""
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
    return for_terminal(str(value)) if is_shown_as_text else value


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
