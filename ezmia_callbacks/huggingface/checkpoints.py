"""What a trainer's checkpoints mean for the audit: when one may follow, and where one over budget goes.

Under a budget every checkpoint is audited before it is written, so that none on the disk is over it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ezmia_callbacks.audit.cadence import AuditPlan, Cadence, ends_epochs, plan_audits
from ezmia_callbacks.audit.rejected import describe_folder
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.huggingface.trainer_access import TrainerControl, TrainerState, TrainingArguments
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.shells.checkpoint_folders import set_aside

__all__: list[str] = []

logger = get_logger(__name__)

# Streams report their number of epochs as a huge integer.
_MANY_EPOCHS = 10_000


def is_best_by_leakage(args: TrainingArguments) -> bool:
    """Whether a figure of the audit chooses the best checkpoint."""
    name = str(args.metric_for_best_model or "").removeprefix("eval_")
    return name.startswith("privacy_")


def may_save_next(args: TrainingArguments, control: TrainerControl) -> bool:
    """Whether the trainer will write a checkpoint right after this hook, or may after its evaluation."""
    return bool(control.should_save or (control.should_evaluate and args.save_strategy == "best"))


def checkpoint_intervals(args: TrainingArguments, state: TrainerState) -> list[Cadence]:
    """How often `may_save_next` will be true; empty for never."""
    if args.save_strategy == "best":
        return evaluation_intervals(args, state)
    return _intervals(args.save_strategy, state.save_steps)


def evaluation_intervals(args: TrainingArguments, state: TrainerState) -> list[Cadence]:
    """How often the trainer will evaluate; empty for never."""
    return _intervals(args.eval_strategy, state.eval_steps)


def _intervals(strategy: str, steps: int | None) -> list[Cadence]:
    if strategy == "epoch":
        return ["epoch"]
    return [int(steps)] if strategy == "steps" and steps else []


def steps_between(every: Cadence, state: TrainerState) -> int | None:
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


def steps_per_epoch(args: TrainingArguments, state: TrainerState, n_batches: int | None) -> int | None:
    """Optimizer steps in an epoch; None for a stream.

    Args:
        args: The trainer's settings.
        state: Its state, when training begins.
        n_batches: Length of the training dataloader; None if unknown.
    """
    if state.num_train_epochs >= _MANY_EPOCHS:
        return None
    if args.max_steps <= 0 and args.num_train_epochs >= 1:
        # The run is the epochs asked for, rounded up to a step; what remains of accumulation is in it.
        return max(1, math.floor(state.max_steps / args.num_train_epochs + 1e-6))
    if n_batches is not None:
        return max(1, math.ceil(n_batches / args.gradient_accumulation_steps))
    return max(1, math.ceil(state.max_steps / state.num_train_epochs))


def planned_audits(
    intervals: Iterable[Cadence], state: TrainerState, *, early: Collection[int], per_epoch: int | None
) -> AuditPlan:
    """When a run will be audited after the baseline, as far as that is known.

    Args:
        intervals: How often, for each reason there is.
        state: The trainer's state, when training begins.
        early: Steps of early audits.
        per_epoch: As `steps_per_epoch` gives it.
    """
    lengths = [per_epoch if ends_epochs(every) else steps_between(every, state) for every in intervals]
    return plan_audits(early, lengths, n_steps=int(state.max_steps), steps_per_epoch=per_epoch)


def set_aside_unaudited(folder: Path, *, after_step: int, into: Path, older: Mapping[Path, float]) -> None:
    """Move away what was saved without an audit: one had failed, or another callback asked for it.

    Args:
        folder: Folder that holds the checkpoints.
        after_step: Checkpoints of later steps are moved, the others stay.
        into: Folder to move them to.
        older: What `checkpoints_in` found before the run: what did not change since is another run's.
    """
    try:
        moved = set_aside(folder, after_step=after_step, into=into, older=older)
    except OSError as error:
        logger.error(
            "Checkpoints newer than step %d may be OVER BUDGET and could not be moved to %s: %s",
            after_step,
            into,
            error,
        )
        return
    if moved:
        describe_folder(into)
    for path in moved:
        logger.warning(
            "A checkpoint newer than the last audit within the budget was moved to %s: it was never "
            "audited and may be OVER BUDGET.",
            path,
        )
