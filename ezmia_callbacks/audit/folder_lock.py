"""One writer for each folder: runs that write into one another's files make figures of neither."""

from __future__ import annotations

import json
import os
import platform
import weakref
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.files import private_folder, write_atomically
from ezmia_callbacks.safe_text import get_logger

__all__: list[str] = []

logger = get_logger(__name__)

_FILE = ".lock"


class FolderLock:
    """The right of one run to write into a folder.

    The operating system holds it for the process and gives it back when the process ends, however it ends:
    what a crash leaves behind locks nobody out. Within a process the run that began last has it, for a
    notebook whose cell was interrupted still holds the run before.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._can_lock = True
        weakref.finalize(self, _give_back, self._folder, weakref.ref(self))

    def take(self) -> None:
        """Begin to write, also where an earlier run of this process has not ended.

        Raises:
            ConfigurationError: if another process writes there.
        """
        held = _held_here(self._folder)
        if held is None and self._can_lock:
            held = _lock(self._folder)
            self._can_lock = held is not None
        if held is not None:
            held.owner = weakref.ref(self)

    def hold(self) -> None:
        """Go on writing, also after `release`.

        Raises:
            ConfigurationError: if another run writes there, of this process or of another one.
        """
        if self.is_lost:
            raise ConfigurationError(
                f"A later run of this process writes to {self._folder}, so that this one cannot go on: give "
                "each run an `output_dir` of its own."
            )
        if self._owner is self and not (self._folder / _FILE).exists():
            # The folder was removed, and another one made in its place is locked by nobody.
            self.release()
        if self._owner is None:
            self.take()

    @property
    def is_lost(self) -> bool:
        """Whether a later run of this process has taken the folder."""
        return self._owner is not None and self._owner is not self

    def release(self) -> None:
        """Let another run write there."""
        _give_back(self._folder, weakref.ref(self))

    @property
    def _owner(self) -> FolderLock | None:
        held = _held_here(self._folder)
        return None if held is None or held.owner is None else held.owner()


@dataclass
class _Held:
    """A lock of this process.

    Attributes:
        lock: The operating system's.
        owner: The run that has it; None until it takes it.
        process: Number of the process that took it: one that was forked from it has not.
    """

    lock: FileLock
    owner: weakref.ref[FolderLock] | None
    process: int


_HELD: dict[Path, _Held] = {}


def _held_here(folder: Path) -> _Held | None:
    held = _HELD.get(folder)
    return held if held is not None and held.process == os.getpid() else None


def _lock(folder: Path) -> _Held | None:
    """The lock of a folder; None, with a warning, where the file system has none."""
    # A lock that is only a file would stay behind where a process on another machine is killed.
    lock = FileLock(
        private_folder(folder) / _FILE, timeout=0, mode=0o600, thread_local=False, fallback_to_soft=False
    )
    try:
        lock.acquire()
    except Timeout:
        raise ConfigurationError(
            f"Another run writes to {folder}{_told(folder)}: give each run an `output_dir` of its own, or "
            "wait until it ends. If it hangs, end its process: the folder is free then."
        ) from None
    # Of network file systems.
    except (NotImplementedError, OSError) as error:
        logger.warning(
            "The file system of %s cannot lock it (%s): take care that no other run writes there.",
            folder,
            error,
        )
        return None
    held = _HELD[folder] = _Held(lock, None, os.getpid())
    writer = {
        "process": os.getpid(),
        "machine": platform.node(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_atomically(folder / ".writer.json", json.dumps(writer) + "\n")
    return held


def _told(folder: Path) -> str:
    """Who writes there, as far as it has said so."""
    try:
        writer = json.loads((folder / ".writer.json").read_text(encoding="utf-8"))
        return f" (process {writer['process']} on {writer['machine']}, since {writer['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _give_back(folder: Path, owner: weakref.ref[FolderLock]) -> None:
    held = _held_here(folder)
    # A dead owner's reference still equals itself.
    if held is not None and held.owner is owner:
        del _HELD[folder]
        # No training ends for what cannot be removed.
        with suppress(OSError):
            (folder / ".writer.json").unlink(missing_ok=True)
        held.lock.release()
