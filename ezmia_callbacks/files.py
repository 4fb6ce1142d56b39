"""Writing files so that a killed process leaves the old content or the new, never half of either."""

import os
from pathlib import Path

__all__: list[str] = []


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file through a temporary neighbor and a rename; the folder is created.

    Args:
        path: File to write.
        content: Bytes, or text to be written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for all processes: what a killed one left is overwritten, not left for good.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OSError, saying what to do, unless files can be written in the folder; it is created.

    Args:
        folder: Folder to try.
    """
    probe = folder / ".writable"
    try:
        write_atomically(probe, "")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"The audit cannot write to {folder} ({error}): pass an `output_dir` that is writable and has "
            "free space."
        ) from error
