"""The console of a process in which nobody has configured logging, as a worker of Ray has it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def console_of_a_new_process() -> Iterator[None]:
    package = logging.getLogger("ezmia_callbacks")
    level = package.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "handlers", [])
        patch.setattr(logging.getLogger(), "handlers", [])
        package.setLevel(logging.NOTSET)
        try:
            yield
        finally:
            package.setLevel(level)
