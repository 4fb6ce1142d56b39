"""What a trainer's checkpoints mean for the audit: when one may follow, and where an unaudited one goes.

Under a budget every checkpoint is audited before it is written, so that none on the disk is over it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ezmia_callbacks.errors import ConfigurationError

__all__ = [
    "Interval",
    "checkpoint_intervals",
    "checkpoints_in",
    "evaluation_intervals",
    "is_best_by_leakage",
    "may_save_next",
    "n_planned_audits",
    "set_aside",
    "step_of",
    "steps_between",
]

Interval = Literal["epoch"] | int | float
"""Every epoch, every so many optimizer steps, or every fraction of an epoch in (0, 1)."""

# Streams report their number of epochs as a huge integer.
_MANY_EPOCHS = 10_000
_PREFIX = "checkpoint-"


def is_best_by_leakage(args: Any) -> bool:
    """Whether a figure of the audit chooses the best checkpoint."""
    name = str(args.metric_for_best_model or "").removeprefix("eval_")
    return name.startswith("privacy_")


def may_save_next(args: Any, control: Any) -> bool:
    """Whether the trainer will write a checkpoint right after this hook, or may after its evaluation."""
    return bool(control.should_save or (control.should_evaluate and args.save_strategy == "best"))


def checkpoint_intervals(args: Any, state: Any) -> list[Interval]:
    """How often `may_save_next` will be true; empty for never."""
    if args.save_strategy == "best":
        return evaluation_intervals(args, state)
    return _intervals(args.save_strategy, state.save_steps)


def evaluation_intervals(args: Any, state: Any) -> list[Interval]:
    """How often the trainer will evaluate; empty for never."""
    return _intervals(args.eval_strategy, state.eval_steps)


def _intervals(strategy: str, steps: int | None) -> list[Interval]:
    if strategy == "epoch":
        return ["epoch"]
    return [int(steps)] if strategy == "steps" and steps else []


def steps_between(every: Interval, state: Any) -> int | None:
    """Optimizer steps from one audit to the next; None for the ends of epochs.

    Raises:
        ConfigurationError: for a fraction of an epoch of unknown length.
    """
    if isinstance(every, int):
        return every
    if not isinstance(every, float):
        return None
    if state.num_train_epochs >= _MANY_EPOCHS:
        raise ConfigurationError(
            f"every={every} is a fraction of an epoch, and the length of an epoch is unknown: give a number "
            "of steps."
        )
    return max(1, round(every * int(state.max_steps) / int(state.num_train_epochs)))


def n_planned_audits(intervals: list[Interval], state: Any) -> int | None:
    """Number of audits that a run will make after the baseline, the last step included; None if unknown.

    Audits that several intervals ask for at one step count once.
    """
    n_steps, n_epochs = int(state.max_steps), int(state.num_train_epochs)
    steps = {n_steps}
    for every in intervals:
        interval = steps_between(every, state)
        if interval is not None:
            steps.update(range(interval, n_steps, interval))
        elif n_epochs >= _MANY_EPOCHS:
            return None
        else:
            steps.update(round(n_steps * epoch / n_epochs) for epoch in range(1, n_epochs))
    return len(steps)


def step_of(checkpoint: str | Path | None) -> int | None:
    """Optimizer steps of a checkpoint, from its folder's name.

    >>> step_of("run/checkpoint-300")
    300
    """
    name = "" if checkpoint is None else Path(checkpoint).name
    number = name.removeprefix(_PREFIX)
    return int(number) if name.startswith(_PREFIX) and number.isdigit() else None


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
        into.mkdir(parents=True, exist_ok=True)
        target = into / path.name
        n_taken = 1
        while target.exists():
            n_taken += 1
            target = into / f"{path.name}.{n_taken}"
        moved.append(Path(shutil.move(path, target)))
    return moved
