"""Writing files: a killed process leaves old content or new, and others cannot read what is private.

Only `append` can leave a piece of what is new, at the end: whoever reads the file has to know its last line.
"""

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

__all__: list[str] = []

# Modes of files, as far as the process's umask lets them.
PRIVATE, FOR_OTHERS = 0o600, 0o666

_PREFIX, _SUFFIX = ".ezmia-", ".tmp"
_N_BYTES = 16


def write_atomically(path: Path, content: bytes | str, *, mode: int = PRIVATE) -> None:
    """Write a file through a temporary neighbor and a rename; the folder is created.

    A link in its place is replaced, and what it names stays as it is.

    Args:
        path: File to write.
        content: Bytes, or text to be written as UTF-8.
        mode: Who may read it, as far as the process's umask lets them; never more than could read what was
            there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_PREFIX}{secrets.token_hex(_N_BYTES)}{_SUFFIX}")
    file = _new_file(temporary, PRIVATE | FOR_OTHERS & mode & _mode_of(path))
    try:
        with file:
            # Halves of characters, as in paths that are no UTF-8, are written as escapes.
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append(path: Path, content: str) -> None:
    """Write at the end of a file that is there: all or, unless the process is killed, nothing.

    Args:
        path: File to write to.
        content: Text to be written as UTF-8.
    """
    left = memoryview(content.encode(errors="backslashreplace"))
    # Without a buffer: what failed must not be written again when the file is cut or closed.
    with path.open("r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise


def open_private(path: Path) -> BinaryIO:
    """A new file, open for writing, that its owner alone can read; one of that name is lost.

    Args:
        path: File to write.
    """
    # A file that is there keeps its mode, and who has it open keeps reading.
    path.unlink(missing_ok=True)
    return _new_file(path, PRIVATE)


def copy_private(source: Path, path: Path) -> None:
    """Copy a file to a new one that its owner alone can read; one of that name is lost.

    Args:
        source: File to copy.
        path: File to write; what was written of it is removed if that fails.
    """
    try:
        with source.open("rb") as original, open_private(path) as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def private_folder(path: Path) -> Path:
    """The folder, made for its owner alone if it is not there; one that is there stays as it is.

    Args:
        path: Folder to make; folders above it follow the process's umask.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote into a folder; none may be writing now.

    Args:
        folder: Folder to look in, not below; it need not be there.
    """
    for path in folder.glob(f"{_PREFIX}{'[0-9a-f]' * 2 * _N_BYTES}{_SUFFIX}"):
        path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OSError, saying what to do, unless files can be written in the folder.

    Args:
        folder: Folder to try; if it is not there it is made, for its owner alone.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=private_folder(folder), prefix=_PREFIX):
            pass
    except OSError as error:
        raise OSError(
            f"The audit cannot write to {folder} ({error}): pass an `output_dir` that is writable and has "
            "free space."
        ) from error


def _new_file(path: Path, mode: int) -> BinaryIO:
    # Exclusive: neither a file that is there is opened, nor a link followed.
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode), "wb")


def _mode_of(path: Path) -> int:
    """The mode of a file, or of what a link names; that for others if there is none."""
    try:
        return path.stat().st_mode
    except OSError:
        return FOR_OTHERS


# Windows would change line ends.
_BINARY: int = getattr(os, "O_BINARY", 0)
