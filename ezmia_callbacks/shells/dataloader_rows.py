"""Canaries in the very form in which a dataloader feeds its model.

A leaf used by the Lightning callback alone. It imports no framework: a loader's dataset and collator stand in
for those of a Hugging Face trainer, so that both shells draw, check and refuse alike.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.canaries.records import record_kind
from ezmia_callbacks.distributed import is_main_process
from ezmia_callbacks.errors import CanaryError, ConfigurationError
from ezmia_callbacks.scoring.rows import Tokenizer
from ezmia_callbacks.shells.membership_check import is_indexable
from ezmia_callbacks.shells.trainer_rows import as_trained, draw_from_trainer

__all__ = ["as_fed", "draw_from_dataloaders"]

logger = logging.getLogger(__name__)

_ADVICE = (
    "Draw canaries yourself with `train_dataset, canaries = hold_out_canaries(train_dataset, ...)` and pass "
    "them as PrivacyAuditCallback(canaries, ...)."
)


@dataclass(frozen=True)
class _Feed:
    """A pair of loaders under the names that a Hugging Face trainer gives to their parts."""

    train_dataset: Any
    eval_dataset: Any
    # Also for the non-members: they are scored as they would have been trained.
    data_collator: Callable[[list[Any]], Any]
    processing_class: Tokenizer | None = None
    args: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(remove_unused_columns=False))


def draw_from_dataloaders(
    train: Any, validation: Any, *, n_members: int, n_non_members: int, seed: int
) -> CanarySet:
    """Canaries from a run's own data: members from the training loader, non-members from the validation one.

    The split was the user's, not drawn by this library: the figures include any difference between the
    two sets.

    Args:
        train: The training dataloader, alone or in a list or mapping.
        validation: The validation dataloader, likewise.
        n_members: Members drawn, at most.
        n_non_members: Non-members drawn, at most.
        seed: Seed of the draw.

    Raises:
        CanaryError: if there is not one loader of each kind, or its records cannot be drawn.
        OverlappingCanariesError: if a record of the validation set is trained on.
        ConfigurationError: if the collator returns no token ids and labels.
    """
    loaders = {"training": _loaders(train), "validation": _loaders(validation)}
    for name, found in loaders.items():
        if len(found) != 1:
            raise CanaryError(
                f"No canaries were given, and one {name} dataloader is needed to draw them from, got "
                f"{len(found)}. (Loaders that Lightning has not made at the start of training do not count.) "
                + _ADVICE
            )
        dataset = getattr(found[0], "dataset", None)
        if not is_indexable(dataset):
            raise CanaryError(
                f"No canaries were given, and the {name} dataloader reads a stream "
                f"({type(dataset).__name__}) that cannot be drawn from. " + _ADVICE
            )
        if not _has_rows(dataset):
            raise CanaryError(
                f"No canaries were given, and the rows of the {name} dataset are not mappings with "
                "`input_ids`. " + _ADVICE
            )
    (training,), (validating,) = loaders.values()
    feed = _Feed(training.dataset, validating.dataset, training.collate_fn)
    return draw_from_trainer(feed, n_members=n_members, n_non_members=n_non_members, seed=seed)


def as_fed(
    train: Any, canaries: CanarySet, *, tokenizer: Tokenizer | None, max_length: int | None
) -> CanarySet:
    """The same canaries as token rows, with the labels that the training loader's collator gives them.

    Where the loader's rows are not mappings there is nothing to compare with, and the canaries are scored as
    they were given.

    Args:
        train: The training dataloader, alone or in a list or mapping.
        canaries: The canaries.
        tokenizer: Tokenizer of raw text.
        max_length: Truncation of raw text, in tokens.

    Raises:
        ConfigurationError: if the canaries are text and there is no tokenizer, or the collator fails on them.
        TooFewCanariesError: if too few records are left.
        OverlappingCanariesError: if a non-member is among the training rows.
    """
    found = _loaders(train)
    dataset: Any = getattr(found[0], "dataset", None) if len(found) == 1 else None
    is_stream = dataset is not None and not is_indexable(dataset)
    if not (is_stream or _has_rows(dataset)):
        if is_main_process():
            logger.warning(
                "The training data are not one dataset of mappings with `input_ids`: the canaries are scored "
                "as they were given, and it cannot be checked that members are trained on and non-members "
                "are not."
            )
        return canaries
    is_tokenized = all(record_kind(record) == "tokenized" for record in canaries.records)
    is_tokenized_later = not is_stream and "input_ids" not in dataset[0]
    if not (is_tokenized or is_tokenized_later) and tokenizer is None:
        raise ConfigurationError(
            "The canaries are text and there is no tokenizer: pass `tokenizer=`, give the LightningModule a "
            "`tokenizer` attribute, or draw the canaries from the tokenized dataset."
        )
    feed = _Feed(dataset, None, found[0].collate_fn, tokenizer)
    return as_trained(feed, canaries, max_length=max_length)


def _loaders(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    is_several = isinstance(loaders, Sequence) and not hasattr(loaders, "dataset")
    return list(loaders) if is_several else [loaders]


def _has_rows(dataset: Any) -> bool:
    return is_indexable(dataset) and len(dataset) > 0 and isinstance(dataset[0], Mapping)
