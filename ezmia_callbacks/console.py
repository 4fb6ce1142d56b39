"""What a run says on the console, whatever the script has done about logging.

Logging is the user's: no handler or level is touched. A line that none of its handlers shows, as where the
level is WARNING, is printed as the trainers print their own, above any progress bar. Only a level that was
set on the package's own logger silences it: `logging.getLogger("ezmia_callbacks").setLevel(logging.ERROR)`.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import suppress

from tqdm import tqdm

from ezmia_callbacks.distributed import is_main_process
from ezmia_callbacks.safe_text import for_terminal

__all__: list[str] = []


def say(logger: logging.Logger, text: str, *, level: int = logging.INFO) -> None:
    """Log a text on the main process, and print it to standard output where no log shows it on the console.

    Args:
        logger: The logger of a module.
        text: One line, or a table.
        level: Its level.
    """
    if not is_main_process():
        return
    # Without any handler Python would write what is a warning through a progress bar.
    if logger.hasHandlers():
        for line in text.splitlines():
            logger.log(level, "%s", line, stacklevel=2)
    if not _is_silenced(logger, level) and not _is_shown(logger, level):
        _print(text)


def write_warnings_above_bars() -> None:
    """Keep warnings from tearing a progress bar, unless logging was configured already."""
    package = logging.getLogger("ezmia_callbacks")
    if not package.hasHandlers():
        handler = _TqdmHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)


class _TqdmHandler(logging.Handler):
    """Writes to standard error above any bar, until the user has a handler of their own."""

    @property
    def stream(self) -> object:
        """What it writes to, under the name that handlers have for it."""
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if _is_shown(logging.getLogger(record.name), record.levelno, without=self):
                return
            tqdm.write(for_terminal(self.format(record)), file=sys.stderr)
        except Exception:  # logging must never end a training run
            self.handleError(record)


def _print(text: str) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    # A closed pipe must never end a training run.
    with suppress(Exception):
        tqdm.write(for_terminal(text).encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
        # A process that is killed at night must not take the line with it.
        sys.stdout.flush()


def _is_silenced(logger: logging.Logger, level: int) -> bool:
    """Whether the nearest level that was set below the root lets this one not pass."""
    own: logging.Logger | None = logger
    while own is not None and own.parent is not None:
        if own.level != logging.NOTSET:
            return level < own.level
        own = own.parent
    return False


def _is_shown(logger: logging.Logger, level: int, *, without: logging.Handler | None = None) -> bool:
    """Whether a handler writes lines of this level to the console."""
    return logger.isEnabledFor(level) and any(
        level >= handler.level and handler is not without and _is_console(handler)
        for handler in _handlers(logger)
    )


def _handlers(logger: logging.Logger) -> Iterator[logging.Handler]:
    each: logging.Logger | None = logger
    while each is not None:
        yield from each.handlers
        each = each.parent if each.propagate else None


def _is_console(handler: logging.Handler) -> bool:
    # Rich's handler has its stream in a console of its own.
    stream = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)
    consoles = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return stream is not None and any(stream is console for console in consoles)
