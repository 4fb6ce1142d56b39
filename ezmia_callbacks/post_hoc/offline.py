"""No library asks a hub while the files of others are read, which may name anything there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__: list[str] = []

_NAME = "HF_HUB_OFFLINE"


@contextmanager
def no_hub() -> Iterator[None]:
    """Let the libraries believe that there is no hub; as before afterwards."""
    from huggingface_hub import constants

    # PEFT reads these two; transformers is also told by an option of its own.
    before, was_offline = os.environ.get(_NAME), constants.HF_HUB_OFFLINE
    os.environ[_NAME] = "1"
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        if before is None:
            del os.environ[_NAME]
        else:
            os.environ[_NAME] = before
