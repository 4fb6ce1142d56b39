"""A second callback, after all others: what they do when training ends is seen, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ezmia_callbacks.huggingface.trainer_access import (
    CallbackHandler,
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
        handler: The trainer's list of callbacks.
    """

    def __init__(self, owner: PrivacyAuditCallback, handler: CallbackHandler) -> None:
        self.owner = owner
        self._handler = handler

    @classmethod
    def put_last(cls, trainer: Trainer, owner: PrivacyAuditCallback) -> None:
        """Stand behind all callbacks that the trainer has, for one training."""
        handler = trainer.callback_handler
        # Of a training that an error ended. The list itself stays: it is being walked along.
        handler.callbacks[:] = [c for c in handler.callbacks if not (isinstance(c, cls) and c.owner is owner)]
        handler.callbacks.append(cls(owner, handler))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand over, and leave."""
        self._handler.callbacks = [c for c in self._handler.callbacks if c is not self]
        self.owner.say_last_word(args, state, **kwargs)
