"""What the commands share of a terminal: results on standard output, all else on standard error.

In a pipe there are no bars and no colors, tables are as wide as they need, and with `--json` standard output
holds one JSON object and nothing else.
"""

import ctypes
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from enum import IntEnum
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ezmia_callbacks.cli.options import in_options
from ezmia_callbacks.safe_text import for_terminal

__all__: list[str] = []

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object to standard output, and nothing else.")
]

_PACKAGE = logging.getLogger("ezmia_callbacks")
# Wide enough for any table: in a pipe nothing is to be wrapped.
_PIPE_WIDTH = 500


class ExitCode(IntEnum):
    """What the command tells a script."""

    OK = 0
    OVER_BUDGET = 1
    BAD_INPUT = 2
    FAILED = 3


def say(text: str = "", *, style: str = "") -> None:
    """Print a paragraph to standard output."""
    _console().print(for_terminal(text), style=style, highlight=False, markup=False, soft_wrap=True)


def say_json(content: object) -> None:
    """Print one JSON object to standard output."""
    typer.echo(json.dumps(content, indent=1, allow_nan=False))


def say_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(_literal(column))
    for row in rows:
        table.add_row(*map(_literal, row))
    console = _console()
    with console.capture() as captured:
        console.print(table, highlight=False)
    # Cells are padded to their column's width, the last one for nothing.
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def fail(message: str, code: ExitCode) -> int:
    """Print one line to standard error, with options for arguments; returns the exit code."""
    typer.echo(f"ezmia: {_line(message)}", err=True)
    return int(code)


def show_progress() -> bool:
    """Whether somebody sits in front of standard error."""
    return sys.stderr.isatty()


def says_all() -> bool:
    """Whether errors are to be shown with all that they say, which may quote records."""
    return _PACKAGE.isEnabledFor(logging.DEBUG)


def say_all() -> None:
    """From here on, inside `messages_on_standard_error`, show all that errors say."""
    _PACKAGE.setLevel(logging.DEBUG)


@contextmanager
def messages_on_standard_error() -> Iterator[None]:
    """Show the package's own warnings as one line each."""
    handler, level = _Handler(), _PACKAGE.level
    _PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        _PACKAGE.removeHandler(handler)
        _PACKAGE.setLevel(level)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let transformers and its like say nothing, ask nothing, and show bars only to a person.

    What they print all the same goes to standard error.
    """
    with _own_standard_output(), _no_standard_input(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from transformers.utils import logging as library
        except ImportError:
            yield
            return
        verbosity, has_bars = library.get_verbosity(), library.is_progress_bar_enabled()
        library.set_verbosity_error()
        if not show_progress():
            library.disable_progress_bar()
        try:
            yield
        finally:
            library.set_verbosity(verbosity)
            if has_bars:
                library.enable_progress_bar()


@contextmanager
def _own_standard_output() -> Iterator[None]:
    """Standard output is for results: what others print there goes to standard error, from C as well."""
    sys.stdout.flush()
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        if sys.__stdout__ is not None and sys.__stderr__ is not None:
            # Closed or replaced streams have no descriptor to redirect.
            with suppress(OSError, ValueError):
                out, err = sys.__stdout__.fileno(), sys.__stderr__.fileno()
                stack.callback(_put_back, os.dup(out), out)
                os.dup2(err, out)
        yield


def _put_back(saved: int, descriptor: int) -> None:
    # What C has printed may still wait in its buffer.
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
    os.dup2(saved, descriptor)
    os.close(saved)


@contextmanager
def _no_standard_input() -> Iterator[None]:
    """Nothing that asks gets an answer, or waits for one."""
    before = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


class _Handler(logging.Handler):
    """One line a message, and a traceback where one was asked for."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or says_all():
            typer.echo(f"ezmia: {record.levelname.lower()}: {_line(record.getMessage())}", err=True)
            if record.exc_text:
                typer.echo(record.exc_text, err=True)


def _line(message: str) -> str:
    return for_terminal(in_options(" ".join(message.split())))


def _console() -> Console:
    # Made anew each time: standard output may have been replaced since.
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def _literal(text: str) -> Text:
    """Text in which brackets are brackets, not styles."""
    return Text(for_terminal(text))
