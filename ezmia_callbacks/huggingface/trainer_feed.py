"""What a Hugging Face trainer feeds from, as a `Feed`."""

from collections.abc import Mapping
from functools import partial

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.errors import CanaryError
from ezmia_callbacks.huggingface.trainer_access import Trainer, columns_kept, is_trl, tokenizer_of
from ezmia_callbacks.huggingface.trl import (
    is_cut_by_packing,
    is_packed,
    prepared_by_trl,
    prepares_rows,
    refuse_other_trainers,
)
from ezmia_callbacks.shells.feed import ADVICE, Feed, Source, canaries_as_fed, draw_canaries
from ezmia_callbacks.shells.membership_check import sample_training_rows

__all__: list[str] = []

_HOLD_OUT_ADVICE = (
    'Have them drawn from the training set at random, by `PrivacyAuditCallback(canaries="hold_out")`, which '
    f"takes at most a tenth of its rows out of training. Or: {ADVICE[0].lower()}{ADVICE[1:]}"
)


def feed_of(trainer: Trainer) -> Feed:
    """How a trainer feeds its model: through its preparation, if it is one of TRL's, and its collator.

    Raises:
        ConfigurationError: if it is one of TRL's that is not audited.
    """
    refuse_other_trainers(trainer)
    return Feed(
        Source("train_dataset", trainer.train_dataset, is_packed(trainer, "train_dataset")),
        trainer.data_collator,
        columns=columns_kept(trainer),
        prepare=partial(prepared_by_trl, trainer) if prepares_rows(trainer) else None,
        takes_raw_records=is_trl(trainer),
        tokenizer=tokenizer_of(trainer),
        tokenizer_advice="`processing_class=tokenizer` to the trainer",
        text_field=getattr(trainer.args, "dataset_text_field", "text"),
        cuts_records=is_cut_by_packing(trainer),
        batch_size=trainer.args.per_device_train_batch_size,
    )


def draw_from_trainer(trainer: Trainer, *, n_members: int, n_non_members: int, seed: int) -> CanarySet:
    """Canaries from the trainer's own data: members it trains on, non-members it evaluates on.

    Args:
        trainer: The trainer.
        n_members: Members drawn, at most.
        n_non_members: Non-members drawn, at most.
        seed: Seed of the draw.

    Raises:
        CanaryError: if a set is missing or cannot be indexed, is packed, or has too few distinct records.
        OverlappingCanariesError: if a record of the evaluation set is trained on.
    """
    evaluation = trainer.eval_dataset
    if evaluation is None:
        raise CanaryError(
            "No canaries were given and the trainer has no `eval_dataset` to draw non-members from. "
            f"{_HOLD_OUT_ADVICE}"
        )
    if isinstance(evaluation, Mapping):
        raise CanaryError(
            f"No canaries were given and the trainer has {len(evaluation)} evaluation sets: it is "
            f"not clear which one matches the training set. {_HOLD_OUT_ADVICE}"
        )
    return draw_canaries(
        feed_of(trainer),
        Source("eval_dataset", evaluation, is_packed(trainer, "eval_dataset")),
        n_members=n_members,
        n_non_members=n_non_members,
        seed=seed,
    )


def as_fed_by_trainer(trainer: Trainer, canaries: CanarySet, *, max_length: int | None) -> CanarySet:
    """The same canaries in the form in which the trainer feeds its model; see `canaries_as_fed`."""
    return canaries_as_fed(feed_of(trainer), canaries, max_length=max_length)


def training_records(trainer: Trainer) -> list[dict[str, list[int]]] | None:
    """Training rows in which near copies of canaries can be looked for; None if a row is no record."""
    if is_packed(trainer, "train_dataset"):
        return None
    return sample_training_rows(trainer.train_dataset)
