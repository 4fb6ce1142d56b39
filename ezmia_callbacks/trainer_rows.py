"""Canaries in the very form in which a Hugging Face trainer feeds its model.

A leaf used by the Hugging Face callback alone. It works on the trainer's attributes and imports no framework:
rows go through the trainer's own dataset preparation (TRL) and its own collator, so that template,
truncation, end-of-sequence tokens and label mask are those of the training.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.canaries.records import Record, is_empty, record_kind, record_text
from ezmia_callbacks.encoding import Tokenizer, encode_canaries
from ezmia_callbacks.errors import (
    CanaryError,
    ConfigurationError,
    OverlappingCanariesError,
    TooFewCanariesError,
)

__all__ = ["as_trained", "check_against_training_rows", "draw_from_trainer"]

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

# Reading every training row of a huge set would cost more than the audit it protects.
_MAX_ROWS_CHECKED = 200_000


def draw_from_trainer(trainer: Any, *, n_members: int, n_non_members: int, seed: int) -> CanarySet:
    """Canaries from the trainer's own data: members it trains on, non-members it evaluates on.

    The split was the user's, not drawn by this library: the figures include any difference between the
    two sets.

    Raises:
        CanaryError: if a set is missing or cannot be indexed, or has too few distinct records.
    """
    advice = (
        "Draw canaries yourself with `train_dataset, canaries = hold_out_canaries(train_dataset, ...)` "
        "and pass them as PrivacyAuditCallback(canaries, ...)."
    )
    if trainer.eval_dataset is None:
        raise CanaryError(
            "No canaries were given and the trainer has no `eval_dataset` to draw non-members from. " + advice
        )
    if isinstance(trainer.eval_dataset, Mapping):
        raise CanaryError(
            f"No canaries were given and the trainer has {len(trainer.eval_dataset)} evaluation sets: it is "
            "not clear which one matches the training set. " + advice
        )
    rng = np.random.default_rng(seed)
    sides: list[list[Row]] = []
    for name, dataset, n_wanted in (
        ("train_dataset", trainer.train_dataset, n_members),
        ("eval_dataset", trainer.eval_dataset, n_non_members),
    ):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise CanaryError(
                f"No canaries were given and `{name}` is a stream that cannot be drawn from. " + advice
            )
        side: list[Row] = []
        for index in rng.permutation(len(dataset)):
            row = dataset[int(index)]
            if "seq_lengths" in row:
                raise CanaryError(f"`{name}` is packed: one row holds several records. " + advice)
            row = collated(trainer, row)
            if not is_empty(row):
                side.append(row)
            if len(side) == n_wanted:
                break
        sides.append(side)
    try:
        return CanarySet.from_lists(*sides, method="trainer_datasets")
    except OverlappingCanariesError as error:
        raise OverlappingCanariesError(
            f"`train_dataset` and `eval_dataset` share records ({error}). Records trained on cannot be "
            "non-members: deduplicate before splitting."
        ) from error
    except TooFewCanariesError as error:
        raise TooFewCanariesError(f"{error} " + advice) from error


def as_trained(trainer: Any, canaries: CanarySet, *, max_length: int | None) -> CanarySet:
    """The same canaries as token rows, with the labels that the trainer's collator gives them.

    Raw records go through the preparation of a TRL trainer where there is one, else through the
    trainer's tokenizer.

    Raises:
        ConfigurationError: if the trainer has no tokenizer and the canaries are not tokenized.
        TooFewCanariesError: if the preparation drops too many records.
    """
    is_tokenized = all(record_kind(record) == "tokenized" for record in canaries.records)
    kept: Sequence[int] = range(len(canaries))
    rows: Sequence[Row]
    if is_tokenized:
        rows = [record for record in canaries.records if isinstance(record, Mapping)]
    elif hasattr(trainer, "_prepare_dataset"):
        rows, kept = _prepared_by_trl(trainer, canaries.records)
    else:
        rows = _tokenized(trainer, canaries, max_length=max_length)
    return CanarySet(
        records=tuple(collated(trainer, row) for row in rows),
        is_member=canaries.is_member[list(kept)],
        record_ids=tuple(canaries.record_ids[i] for i in kept),
        provenance=canaries.provenance,
    )


def collated(trainer: Any, row: Row) -> Row:
    """One row as the collator hands it to the model: input ids and labels, without padding.

    Raises:
        ConfigurationError: if the collator fails on the row, or returns no labels for it.
    """
    if getattr(trainer.args, "remove_unused_columns", True):
        trainer._set_signature_columns_if_needed()
        row = {name: value for name, value in row.items() if name in trainer._signature_columns}
    try:
        batch = trainer.data_collator([dict(row)])
    except Exception as error:
        raise ConfigurationError(
            f"The trainer's collator cannot make a batch of one canary with the columns {sorted(row)}: "
            f"{error}. Draw the canaries from the dataset that the trainer is given."
        ) from error
    labels = batch.get("labels")
    if labels is None:
        raise ConfigurationError(
            f"The trainer's collator returns no `labels` (got {sorted(batch)}): without them there is no "
            "telling which tokens are trained. Use DataCollatorForLanguageModeling(tokenizer, mlm=False), "
            "or give every row a `labels` column."
        )
    ids = _as_array(batch["input_ids"])
    mask = batch.get("attention_mask")
    is_attended = np.ones(len(ids), dtype=np.bool_) if mask is None else _as_array(mask) != 0
    return {
        "input_ids": ids[is_attended].tolist(),
        "labels": _as_array(labels)[is_attended].tolist(),
    }


def check_against_training_rows(trainer: Any, canaries: CanarySet) -> None:
    """Hold canaries against the rows that will be trained on, token for token.

    The mistake that this catches reads as "no leakage": keeping the training set that one had before
    `hold_out_canaries`, so that the non-members are trained on as well.

    Raises:
        OverlappingCanariesError: if a non-member is among the training rows.
    """
    dataset = trainer.train_dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        logger.warning("Training on a stream: it cannot be checked that non-members are absent from it.")
        return
    if len(dataset) > _MAX_ROWS_CHECKED:
        logger.warning(
            "Only the first %d of %d training rows are checked for canaries.",
            _MAX_ROWS_CHECKED,
            len(dataset),
        )
    id_of = {
        _key(record["input_ids"]): i
        for i, record in enumerate(canaries.records)
        if isinstance(record, Mapping)
    }
    found = {
        id_of[key] for ids in islice(_token_ids(dataset), _MAX_ROWS_CHECKED) if (key := _key(ids)) in id_of
    }
    trained_on = sorted(i for i in found if not canaries.is_member[i])
    if trained_on:
        examples = ", ".join(canaries.record_ids[i] for i in trained_on[:3])
        raise OverlappingCanariesError(
            f"{len(trained_on)} of {canaries.n_non_members} non-members are in the training set (first: "
            f"{examples}): leakage would read far too low. Train on the dataset that `hold_out_canaries` "
            "returned, not on the one it was given."
        )
    n_found = len(found)
    if n_found < canaries.n_members and len(dataset) <= _MAX_ROWS_CHECKED:
        logger.warning(
            "%d of %d members were not found among the training rows, token for token. If they are packed "
            "or processed on the fly that is expected; otherwise they are not trained on, and leakage will "
            "read too low.",
            canaries.n_members - n_found,
            canaries.n_members,
        )


def _key(ids: Any) -> bytes:
    return _as_array(ids).astype(np.int64).tobytes()


def _token_ids(dataset: Any) -> Iterator[Any]:
    """Input ids of every row; a dataset with columns is read without its other columns."""
    if "input_ids" in (getattr(dataset, "column_names", None) or ()):
        yield from (row["input_ids"] for row in dataset.select_columns(["input_ids"]).with_format(None))
        return
    for index in range(len(dataset)):
        row = dataset[index]
        if not (isinstance(row, Mapping) and "input_ids" in row):
            return
        yield row["input_ids"]


def _as_array(values: Any) -> np.ndarray:
    """A row of a batch of one, or a bare row, from a list, an array or a tensor."""
    array = np.asarray(values.tolist() if hasattr(values, "tolist") else values)
    return array[0] if array.ndim == 2 and len(array) == 1 else array


def _tokenized(trainer: Any, canaries: CanarySet, *, max_length: int | None) -> list[Row]:
    tokenizer: Tokenizer | None = getattr(trainer, "processing_class", None) or getattr(
        trainer, "tokenizer", None
    )
    if tokenizer is None:
        raise ConfigurationError(
            "The canaries are text and the trainer has no tokenizer: pass `processing_class=tokenizer` to "
            "the trainer, or draw the canaries from the tokenized dataset."
        )
    encoded = encode_canaries(canaries, tokenizer, max_length=max_length)
    first = trainer.train_dataset[0] if hasattr(trainer.train_dataset, "__getitem__") else {}
    has_labels = isinstance(first, Mapping) and "labels" in first
    rows: list[Row] = []
    for row in encoded.rows:
        fields = {"input_ids": row.input_ids.tolist(), "attention_mask": [1] * len(row.input_ids)}
        if has_labels:
            fields["labels"] = row.labels.tolist()
        rows.append(fields)
    return rows


def _prepared_by_trl(trainer: Any, records: Sequence[Record]) -> tuple[list[Row], list[int]]:
    """Rows made by the trainer's own preparation, and which records they are: it may drop some."""
    from datasets import Dataset

    fields = [
        dict(record) if isinstance(record, Mapping) else {"text": record_text(record)} for record in records
    ]
    dataset = Dataset.from_list([{**row, "canary": i} for i, row in enumerate(fields)])
    prepared = trainer._prepare_dataset(
        dataset,
        trainer.processing_class,
        trainer.args,
        False,
        getattr(trainer, "_formatting_func", None),
        "canary",
    )
    rows = sorted(prepared, key=lambda row: int(row["canary"]))
    return rows, [int(row["canary"]) for row in rows]
