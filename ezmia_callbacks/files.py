"""Writing files: a killed process leaves old content or new, and others cannot read what is private.

Only `append` can leave a piece of what is new, at the end: whoever reads the file has to know its last line.
"""

import os
from pathlib import Path
from typing import BinaryIO

__all__: list[str] = []


def write_atomically(path: Path, content: bytes | str, *, is_for_others: bool = False) -> None:
    """Write a file through a temporary neighbor and a rename; the folder is created.

    Args:
        path: File to write.
        content: Bytes, or text to be written as UTF-8.
        is_for_others: Whether others may read it, as far as the process's umask lets them: a report. By
            default the file is its owner's alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for all processes: what a killed one left is overwritten, not left for good.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") if is_for_others else open_private(temporary) as file:
            # Halves of characters, as in paths that are no UTF-8, are written as escapes.
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o600), "wb")


def private_folder(path: Path) -> Path:
    """The folder, made for its owner alone if it is not there; one that is there stays as it is.

    Args:
        path: Folder to make; folders above it follow the process's umask.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def check_writable(folder: Path) -> None:
    """Raise OSError, saying what to do, unless files can be written in the folder.

    Args:
        folder: Folder to try; if it is not there it is made, for its owner alone.
    """
    probe = folder / ".writable"
    try:
        private_folder(folder)
        write_atomically(probe, "")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"The audit cannot write to {folder} ({error}): pass an `output_dir` that is writable and has "
            "free space."
        ) from error


# Windows would change line ends.
_BINARY: int = getattr(os, "O_BINARY", 0)
