"""Checkpoint folders of a Hugging Face run: whose step they are, and where an unaudited one goes.

Works on names and times alone, so that finished runs can be read without a framework.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ezmia_callbacks.files import private_folder

__all__: list[str] = []

_PREFIX = "checkpoint-"


def step_of(checkpoint: str | Path | None) -> int | None:
    """Optimizer steps of a checkpoint, from its folder's name.

    >>> step_of("run/checkpoint-300")
    300
    """
    name = "" if checkpoint is None else Path(checkpoint).name
    number = name.removeprefix(_PREFIX)
    return int(number) if name.startswith(_PREFIX) and number.isdigit() else None


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the trainer saves a step.

    >>> checkpoint_folder(Path("run"), 300).as_posix()
    'run/checkpoint-300'
    """
    return run / f"{_PREFIX}{step}"


def checkpoints_in(folder: Path) -> dict[Path, float]:
    """The checkpoints in a folder, each with the time of its last change as its file system tells it."""
    return {path: path.stat().st_mtime for path in folder.glob(f"{_PREFIX}*") if path.is_dir()}


def set_aside(
    folder: Path, *, after_step: int, into: Path, older: Mapping[Path, float] | None = None
) -> list[Path]:
    """New places of this run's checkpoints of later steps, moved so that none is taken for the newest.

    Args:
        folder: Folder that holds the checkpoints.
        after_step: Checkpoints of later steps are moved, the others stay.
        into: Folder to move them to.
        older: What `checkpoints_in` found before the run: what did not change since is another run's and
            stays.

    Raises:
        OSError: if one cannot be moved.
    """
    changed = [
        path for path, changed_at in checkpoints_in(folder).items() if (older or {}).get(path) != changed_at
    ]
    later = sorted(
        (step, path) for path in changed if (step := step_of(path)) is not None and step > after_step
    )
    moved = []
    for _, path in later:
        private_folder(into)
        target = into / path.name
        n_taken = 1
        while target.exists():
            n_taken += 1
            target = into / f"{path.name}.{n_taken}"
        moved.append(Path(shutil.move(path, target)))
    return moved
