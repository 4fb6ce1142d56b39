"""A second callback, after all others: what they do when training ends is seen, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ezmia_callbacks.huggingface.trainer_access import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

if TYPE_CHECKING:
    from ezmia_callbacks.huggingface.callback import PrivacyAuditCallback

__all__: list[str] = []


class LastWord(TrainerCallback):  # type: ignore[misc]  # skipped import
    """Has an audit say its last word once every other callback has ended.

    Args:
        owner: The audit.
    """

    def __init__(self, owner: PrivacyAuditCallback) -> None:
        self.owner = owner

    @classmethod
    def put_last(cls, trainer: Trainer, owner: PrivacyAuditCallback) -> None:
        """Stand behind all callbacks that the trainer has, for one training."""
        callbacks = trainer.callback_handler.callbacks
        # Of a training that an error ended.
        callbacks[:] = [c for c in callbacks if not (isinstance(c, cls) and c.owner is owner)]
        callbacks.append(cls(owner))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand over."""
        self.owner.say_last_word(args, state, **kwargs)
