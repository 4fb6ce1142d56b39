"""One line per audit on the console of a script that configured no logging.

Python shows warnings only, by default, and a progress bar would be torn by a plain handler. As soon as the
user has a handler of their own, theirs is used and this does nothing.
"""

import logging
import sys

from tqdm import tqdm

from ezmia_callbacks.safe_text import for_terminal

__all__: list[str] = []


class _TqdmHandler(logging.Handler):
    """Writes above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record to standard error."""
        try:
            tqdm.write(for_terminal(self.format(record)), file=sys.stderr)
        except Exception:  # logging must never end a training run
            self.handleError(record)


def show_audit_lines() -> None:
    """Let the package's INFO lines reach the console, unless logging was configured already."""
    package = logging.getLogger("ezmia_callbacks")
    if package.handlers or logging.getLogger().handlers:
        return
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package.addHandler(handler)
    # A level that was chosen stays: DEBUG is how all that errors say is asked for.
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
