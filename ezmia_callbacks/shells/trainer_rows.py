"""Canaries in the very form in which a Hugging Face trainer feeds its model.

A leaf used by the Hugging Face callback alone. It works on the trainer's attributes and imports no framework:
rows go through the trainer's own dataset preparation (TRL) and its own collator, so that template,
truncation, end-of-sequence tokens and label mask are those of the training.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.canaries.records import IGNORED_LABEL, is_empty, record_kind
from ezmia_callbacks.distributed import is_main_process
from ezmia_callbacks.errors import (
    CanaryError,
    ConfigurationError,
    OverlappingCanariesError,
    TooFewCanariesError,
)
from ezmia_callbacks.scoring.rows import Tokenizer, encode_canaries
from ezmia_callbacks.shells.membership_check import check_membership, is_indexable, keys_of
from ezmia_callbacks.shells.trl_rows import (
    PreparedRows,
    as_row,
    is_cut_by_packing,
    is_packed,
    is_trl,
    prepared_by_trl,
    prepares_rows,
)

__all__ = ["as_trained", "draw_from_trainer"]

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

_ADVICE = (
    "Draw canaries yourself with `train_dataset, canaries = hold_out_canaries(train_dataset, ...)` "
    "and pass them as PrivacyAuditCallback(canaries, ...)."
)


class DrawnRow(NamedTuple):
    """A row as the trainer's dataset has it, and as the collator hands it to the model."""

    as_stored: Row
    as_fed: Row


def draw_from_trainer(trainer: Any, *, n_members: int, n_non_members: int, seed: int) -> CanarySet:
    """Canaries from the trainer's own data: members it trains on, non-members it evaluates on.

    The split was the user's, not drawn by this library: the figures include any difference between the
    two sets.

    Raises:
        CanaryError: if a set is missing or cannot be indexed, is packed, or has too few distinct records.
        OverlappingCanariesError: if a record of the evaluation set is trained on.
    """
    if trainer.eval_dataset is None:
        raise CanaryError(
            "No canaries were given and the trainer has no `eval_dataset` to draw non-members from. "
            + _ADVICE
        )
    if isinstance(trainer.eval_dataset, Mapping):
        raise CanaryError(
            f"No canaries were given and the trainer has {len(trainer.eval_dataset)} evaluation sets: it is "
            "not clear which one matches the training set. " + _ADVICE
        )
    rng = np.random.default_rng(seed)
    members = _drawn(trainer, "train_dataset", n_members, rng=rng)
    non_members = _drawn(trainer, "eval_dataset", n_non_members, rng=rng)
    drawn = members | non_members
    try:
        canaries = CanarySet.from_lists(
            [row.as_fed for row in members.values()],
            [row.as_fed for row in non_members.values()],
            record_ids=list(drawn),
            method="trainer_datasets",
        )
    except OverlappingCanariesError as error:
        raise OverlappingCanariesError(
            f"`train_dataset` and `eval_dataset` share records ({error}). Records trained on cannot be "
            "non-members: deduplicate before splitting."
        ) from error
    except TooFewCanariesError as error:
        raise TooFewCanariesError(f"{error} " + _ADVICE) from error
    _report_membership(trainer, canaries, {name: row.as_stored for name, row in drawn.items()})
    return canaries


def as_trained(trainer: Any, canaries: CanarySet, *, max_length: int | None) -> CanarySet:
    """The same canaries as token rows, with the labels that the trainer's collator gives them.

    Records go through the preparation of a TRL trainer where there is one; elsewhere raw text goes through
    the trainer's tokenizer. Records of which nothing is trained, and records that have become equal, are
    left out: neither choice looks at membership, so a random split stays one.

    Raises:
        ConfigurationError: if the trainer cannot make rows of the canaries.
        TooFewCanariesError: if too few records are left.
        OverlappingCanariesError: if a non-member is among the training rows.
    """
    prepared = _prepared(trainer, canaries, max_length=max_length)
    fed = [collated(trainer, row) for row in prepared.rows]
    n_copies = Counter(tuple(row["input_ids"]) for row in fed)
    usable = [i for i, row in enumerate(fed) if not is_empty(row) and n_copies[tuple(row["input_ids"])] == 1]
    kept = [prepared.kept[i] for i in usable]
    record_ids = tuple(canaries.record_ids[i] for i in kept)
    left_out = (
        f"{len(canaries) - len(kept)} of {len(canaries)} canaries are left out: as the trainer prepares them "
        "(template, label mask, truncation to `max_length`), no token of theirs carries loss, or they are "
        "the same as another."
    )
    try:
        as_fed = canaries.select(kept, records=[fed[i] for i in usable])
    except TooFewCanariesError as error:
        raise TooFewCanariesError(f"{left_out} {error}") from error
    if len(kept) < len(canaries) and is_main_process():
        logger.warning("%s", left_out)
    _report_membership(
        trainer, as_fed, dict(zip(record_ids, (prepared.rows[i] for i in usable), strict=True))
    )
    return as_fed


def collated(trainer: Any, row: Row) -> Row:
    """One row as the collator hands it to the model: input ids and labels, without padding.

    Of a preference pair it is the prompt, without loss, and the chosen side.

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
    columns = batch if isinstance(batch, Mapping) else {}
    mask_name = "completion_mask" if "chosen_ids" in row else "labels"
    if "input_ids" not in columns or columns.get(mask_name) is None:
        raise ConfigurationError(
            f"The trainer's collator returns no `labels` (got {sorted(columns)}): without them there is no "
            "telling which tokens are trained. Use DataCollatorForLanguageModeling(tokenizer, mlm=False), "
            "or give every row a `labels` column. Of TRL's trainers, SFTTrainer (TRL 0.17 or newer) "
            "and DPOTrainer (TRL 0.29 or newer) can be audited."
        )
    n_rows = 2 if mask_name == "completion_mask" else 1
    ids, labels = (_first(columns[name], n_rows=n_rows) for name in ("input_ids", mask_name))
    if mask_name == "completion_mask":
        labels = np.where(labels != 0, ids, IGNORED_LABEL)
    if columns.get("attention_mask") is not None:
        is_attended = _first(columns["attention_mask"], n_rows=n_rows) != 0
    else:
        # Without a mask, padding can only be what the row did not have.
        is_attended = np.arange(len(ids)) < len(row.get("input_ids", ids))
    return {"input_ids": ids[is_attended].tolist(), "labels": labels[is_attended].tolist()}


def _drawn(
    trainer: Any, name: Literal["train_dataset", "eval_dataset"], n: int, *, rng: np.random.Generator
) -> dict[str, DrawnRow]:
    """At most `n` rows of one of the trainer's datasets of which something is trained, by their names."""
    dataset = getattr(trainer, name)
    if not is_indexable(dataset):
        raise CanaryError(
            f"No canaries were given and `{name}` is a stream that cannot be drawn from. " + _ADVICE
        )
    rows: dict[str, DrawnRow] = {}
    for index in rng.permutation(len(dataset)):
        row = dataset[int(index)]
        if is_packed(trainer, name) or "seq_lengths" in row:
            raise CanaryError(
                f"No canaries were given and `{name}` is packed: a row is not a record. " + _ADVICE
            )
        as_fed = collated(trainer, row)
        if not is_empty(as_fed):
            rows[f"{name}-{index}"] = DrawnRow(row, as_fed)
        if len(rows) == n:
            break
    return rows


def _prepared(trainer: Any, canaries: CanarySet, *, max_length: int | None) -> PreparedRows:
    """Rows such as the trainer's dataset has."""
    if prepares_rows(trainer):
        return prepared_by_trl(trainer, canaries.records)
    is_tokenized = all(record_kind(record) == "tokenized" for record in canaries.records)
    if not (is_tokenized or is_trl(trainer) or _is_tokenized_later(trainer)):
        return _tokenized(trainer, canaries, max_length=max_length)
    text_field = getattr(trainer.args, "dataset_text_field", "text")
    rows = [as_row(record, text_field=text_field) for record in canaries.records]
    return PreparedRows(rows, range(len(canaries)))


def _is_tokenized_later(trainer: Any) -> bool:
    """Whether the collator gets raw records."""
    first = _first_training_row(trainer)
    return isinstance(first, Mapping) and bool(first) and "input_ids" not in first


def _first_training_row(trainer: Any) -> Any:
    dataset = trainer.train_dataset
    return dataset[0] if is_indexable(dataset) and len(dataset) else None


def _tokenized(trainer: Any, canaries: CanarySet, *, max_length: int | None) -> PreparedRows:
    tokenizer: Tokenizer | None = getattr(trainer, "processing_class", None) or getattr(
        trainer, "tokenizer", None
    )
    if tokenizer is None:
        raise ConfigurationError(
            "The canaries are text and the trainer has no tokenizer: pass `processing_class=tokenizer` to "
            "the trainer, or draw the canaries from the tokenized dataset."
        )
    encoded = encode_canaries(canaries, tokenizer, max_length=max_length)
    first = _first_training_row(trainer)
    has_labels = isinstance(first, Mapping) and "labels" in first
    rows: list[dict[str, Any]] = []
    for row in encoded.rows:
        fields = {"input_ids": row.input_ids.tolist(), "attention_mask": [1] * len(row.input_ids)}
        if has_labels:
            fields["labels"] = row.labels.tolist()
        rows.append(fields)
    index_of = {record_id: i for i, record_id in enumerate(canaries.record_ids)}
    return PreparedRows(rows, [index_of[record_id] for record_id in encoded.record_ids])


def _report_membership(trainer: Any, canaries: CanarySet, rows: Mapping[str, Row]) -> None:
    if is_cut_by_packing(trainer):
        problems = [
            "Packing with the strategy 'wrapped' cuts training records: it cannot be checked that members "
            "are among them and non-members are not. The strategy 'bfd' keeps records whole."
        ]
    else:
        keys = {record_id: keys_of(rows[record_id]) for record_id in canaries.record_ids}
        problems = check_membership(
            trainer.train_dataset, canaries, {name: found[0] for name, found in keys.items() if found}
        )
    if is_main_process():
        for problem in problems:
            logger.warning("%s", problem)


def _first(values: Any, *, n_rows: int) -> np.ndarray:
    """The first row of a batch, or a bare row, from a list, an array or a tensor."""
    array = np.asarray(values.tolist() if hasattr(values, "tolist") else values)
    if array.ndim == 2 and len(array) == n_rows:
        return np.asarray(array[0])
    if array.ndim == 1:
        return array
    raise ConfigurationError(
        f"The trainer's collator makes an array of shape {array.shape} of one record, and {n_rows} rows of "
        "tokens are needed: audit checkpoints with PrivacyAuditor and tokenized canaries instead."
    )
