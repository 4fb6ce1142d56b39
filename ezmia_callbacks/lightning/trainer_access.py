"""What is borrowed of a Lightning trainer; the one file that touches what Lightning keeps private.

Every private or undocumented name stands in `PRIVATE`: whose it is, what for, the releases it was tried with
(the oldest and the newest that the tests run with) and what follows if it is missing. The protocols name the
public attributes that are read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

import torch

from ezmia_callbacks.errors import MissingDependencyError

__all__: list[str] = []

PRIVATE: Mapping[str, str] = {
    "_every_n_train_steps": (
        "ModelCheckpoint: saves every so many steps, 0 for never. Tried: Lightning 2.4.0, 2.6.6. "
        "Missing: such saves are not planned for, and with `save_weights_only=True` not audited first."
    ),
    "_last_global_step_saved": (
        "ModelCheckpoint: skips a step that it believes to have saved. Tried: Lightning 2.4.0, 2.6.6. "
        "Missing: while over budget a file is written all the same; with `save_weights_only=True` of the "
        "weights over budget."
    ),
    "_train_time_interval": (
        "ModelCheckpoint: saves every so often, None for never. Tried: Lightning 2.4.0, 2.6.6. "
        "Missing: weights saved by the clock are not refused."
    ),
    "fit_loop.total_batch_idx": (
        "Trainer: number of batches fed so far, less one. Tried: Lightning 2.4.0, 2.6.6. "
        "Missing: the first audit after the baseline fails, and training with it."
    ),
    "precision_plugin.forward_context": (
        "Trainer: the context under which training runs its forward pass. Tried: Lightning 2.4.0, 2.6.6. "
        "Missing: no training begins."
    ),
    "strategy.restore_checkpoint_after_setup": (
        "Trainer: true of strategies that hold weights in pieces. Tried: Lightning 2.4.0, 2.6.6. "
        "Missing: no training begins."
    ),
    "val_check_batch": (
        "Trainer: validates every so many batches, None where that is not by batches; 2.4.0 has it only once "
        "training begins. Tried: Lightning 2.4.0, 2.6.6. "
        "Missing: no training begins where there are audits at validations."
    ),
}

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_ADVICE = 'The Lightning callback needs lightning: pip install "ezmia-callbacks[lightning]"'


class LightningTrainer(Protocol):
    """The parts of a trainer that are read; `should_stop` and the logged metrics are written too."""

    accumulate_grad_batches: int
    callback_metrics: MutableMapping[str, torch.Tensor]
    callbacks: Sequence[Any]
    checkpoint_callbacks: Sequence[Any]
    current_epoch: int
    default_root_dir: str
    fast_dev_run: bool
    global_step: int
    logged_metrics: MutableMapping[str, torch.Tensor]
    loggers: Sequence[Any]
    max_epochs: int
    max_steps: int
    min_epochs: int | None
    min_steps: int | None
    num_training_batches: float
    optimizers: Sequence[Any]
    progress_bar_callback: Any
    should_stop: bool
    train_dataloader: Any
    val_dataloaders: Any


def callback_classes() -> tuple[type, ...]:
    """Lightning's base class, from every package that the script uses, else from every one installed.

    The two packages share no class, and `LightningCLI` insists on its own.

    Raises:
        MissingDependencyError: if neither is installed, or can be imported.
    """
    loaded = [name for name in _PACKAGES if name in sys.modules]
    classes: list[type] = []
    failures: list[MissingDependencyError] = []
    for name in loaded or _PACKAGES:
        try:
            classes.append(import_module(name).Callback)
        except Exception as error:  # whatever a broken installation raises
            failures.append(MissingDependencyError.because(error, name, _ADVICE))
    if not classes:
        # One that is broken says more than one that is not there.
        raise max(failures, key=lambda failure: str(failure) != _ADVICE)
    return tuple(classes)


def forward_context(trainer: LightningTrainer) -> Callable[[], AbstractContextManager[object]]:
    """Makes the context under which training runs its forward pass."""
    owner: Any = trainer
    context: Callable[[], AbstractContextManager[object]] = owner.precision_plugin.forward_context
    return context


def n_batches_done(trainer: LightningTrainer) -> int:
    """Batches fed so far, of all epochs."""
    owner: Any = trainer
    return int(owner.fit_loop.total_batch_idx) + 1


def batches_between_validations(trainer: LightningTrainer) -> int | None:
    """Batches from one validation to the next; None where that is not by batches."""
    owner: Any = trainer
    found: int | None = owner.val_check_batch
    return found


def strategy_in_pieces(trainer: LightningTrainer) -> str | None:
    """Name of the strategy if it holds the weights in pieces; None if it does not."""
    owner: Any = trainer
    return type(owner.strategy).__name__ if owner.strategy.restore_checkpoint_after_setup else None


def saving_intervals(trainer: LightningTrainer) -> Iterator[int]:
    """Steps between the checkpoints of each `ModelCheckpoint` that saves by steps."""
    for callback in trainer.checkpoint_callbacks:
        interval = getattr(callback, "_every_n_train_steps", 0)
        if interval:
            yield int(interval)


def skip_this_save(trainer: LightningTrainer) -> None:
    """Have every `ModelCheckpoint` skip the present step."""
    for callback in trainer.checkpoint_callbacks:
        callback._last_global_step_saved = trainer.global_step


def saves_by_the_clock(callback: Any) -> bool:
    """Whether a `ModelCheckpoint` saves at times that are not known beforehand."""
    return getattr(callback, "_train_time_interval", None) is not None
