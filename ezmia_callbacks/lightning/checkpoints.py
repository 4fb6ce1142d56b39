"""The checkpoint files of a Lightning run: which there are, and where one over budget goes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ezmia_callbacks.files import private_folder
from ezmia_callbacks.lightning.trainer_access import LightningTrainer
from ezmia_callbacks.safe_text import get_logger

__all__: list[str] = []

logger = get_logger(__name__)


def checkpoints_of(trainer: LightningTrainer) -> dict[Path, float]:
    """Every checkpoint file where the trainer's callbacks save, with the time of its last change."""
    folders = {str(getattr(callback, "dirpath", None) or "") for callback in trainer.checkpoint_callbacks}
    paths = (path for folder in folders - {""} for path in Path(folder).rglob("*.ckpt"))
    return {path: path.stat().st_mtime for path in paths}


def set_aside(trainer: LightningTrainer, *, after_step: int, into: Path, older: Mapping[Path, float]) -> None:
    """Move away what this run saved of later steps, and have no callback name it any more.

    Args:
        trainer: The trainer.
        after_step: Checkpoints of later steps are moved, the others stay.
        into: Folder to move them to.
        older: What `checkpoints_of` found before the run: what did not change since is another run's.
    """
    for path, changed_at in checkpoints_of(trainer).items():
        if older.get(path) == changed_at:
            continue
        try:
            # Read lazily; the run itself has just written the file.
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
            if saved["global_step"] <= after_step:
                continue
            private_folder(into)
            moved = shutil.move(path, into / f"step-{saved['global_step']}-{path.name}")
        except Exception as error:  # torch has no common parent for what a damaged file raises
            logger.error("The checkpoint %s may be OVER BUDGET and was not moved: %s", path, error)
            continue
        for callback in trainer.checkpoint_callbacks:
            _forget(callback, path)
        logger.warning(
            "A checkpoint newer than the last audit within the budget was moved to %s: its audit failed "
            "and it may be OVER BUDGET.",
            moved,
        )


def _forget(callback: Any, path: Path) -> None:
    """Have a `ModelCheckpoint` no longer name a file."""
    getattr(callback, "best_k_models", {}).pop(str(path), None)
    for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
        if getattr(callback, name, None) == str(path):
            setattr(callback, name, "")
