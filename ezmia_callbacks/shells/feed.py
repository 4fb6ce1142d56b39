"""Canaries in the very form in which a run feeds its model: through its own preparation and collator.

Template, truncation, end-of-sequence tokens and label mask are then those of the training, in every
framework: each says what it feeds from as a `Feed`, and nothing here knows which one it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.canaries.records import Record, is_empty, record_kind, record_text
from ezmia_callbacks.distributed import is_main_process
from ezmia_callbacks.errors import (
    CanaryError,
    ConfigurationError,
    OverlappingCanariesError,
    TooFewCanariesError,
)
from ezmia_callbacks.scoring.rows import Tokenizer, encode_canaries
from ezmia_callbacks.shells.collated import Collate, Row, collated
from ezmia_callbacks.shells.membership_check import check_membership, is_indexable, keys_of

__all__: list[str] = []

logger = logging.getLogger(__name__)

ADVICE = (
    "Draw canaries yourself with `train_dataset, canaries = hold_out_canaries(train_dataset, ...)` "
    "and pass them as PrivacyAuditCallback(canaries, ...)."
)


class PreparedRows(NamedTuple):
    """Rows as the collator takes them, and which records they are: some may have been dropped."""

    rows: Sequence[Row]
    kept: Sequence[int]


@dataclass(frozen=True)
class Source:
    """A dataset that a run reads.

    Attributes:
        name: What the user calls it.
        rows: The dataset: rows by number, or a stream.
        is_packed: Whether one of its rows holds several records.
    """

    name: str
    rows: Any
    is_packed: bool = False


@dataclass(frozen=True)
class Feed:
    """How a run feeds its model.

    Attributes:
        training: What is trained on.
        collate: Makes a batch of rows, as the model gets it.
        columns: Columns that reach the collator; None for all.
        prepare: Makes rows of records as the trainer made its own; None where rows are fed as stored.
        takes_raw_records: Whether raw records go to the collator as they are, which tokenizes them.
        tokenizer: Tokenizer of raw text.
        tokenizer_advice: What to do where there is none, to follow "pass".
        text_field: Column of the text where the trainer reads text.
        cuts_records: Whether packing cut records wherever a row was full, so that none can be found again.
    """

    training: Source
    collate: Collate
    columns: frozenset[str] | None = None
    prepare: Callable[[Sequence[Record]], PreparedRows] | None = None
    takes_raw_records: bool = False
    tokenizer: Tokenizer | None = None
    tokenizer_advice: str = "`tokenizer=`"
    text_field: str = "text"
    cuts_records: bool = False

    @property
    def first_row(self) -> Any:
        """The first training row; None if there is none, or if it is a stream."""
        dataset = self.training.rows
        return dataset[0] if is_indexable(dataset) and len(dataset) else None


class _DrawnRow(NamedTuple):
    """A row as the dataset has it, and as the collator hands it to the model."""

    as_stored: Row
    as_fed: Row


def draw_canaries(
    feed: Feed, evaluation: Source, *, n_members: int, n_non_members: int, seed: int
) -> CanarySet:
    """Canaries from a run's own data: members it trains on, non-members it evaluates on.

    The split was the user's, not drawn by this library: the figures include any difference between the
    two sets.

    Args:
        feed: How the run feeds its model; also for the non-members, scored as they would have been trained.
        evaluation: What is evaluated on.
        n_members: Members drawn, at most.
        n_non_members: Non-members drawn, at most.
        seed: Seed of the draw.

    Raises:
        CanaryError: if a set cannot be indexed, is packed, or has too few distinct records.
        OverlappingCanariesError: if a record of the evaluation set is trained on.
        ConfigurationError: if the collator returns no token ids and labels.
    """
    rng = np.random.default_rng(seed)
    members = _drawn(feed, feed.training, n_members, rng=rng)
    non_members = _drawn(feed, evaluation, n_non_members, rng=rng)
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
            f"`{feed.training.name}` and `{evaluation.name}` share records ({error}). Records trained on "
            "cannot be non-members: deduplicate before splitting."
        ) from error
    except TooFewCanariesError as error:
        raise TooFewCanariesError(f"{error} " + ADVICE) from error
    _report_membership(feed, canaries, {name: row.as_stored for name, row in drawn.items()})
    return canaries


def canaries_as_fed(feed: Feed, canaries: CanarySet, *, max_length: int | None) -> CanarySet:
    """The same canaries as token rows, with the labels that the run's collator gives them.

    Records of which nothing is trained, and records that have become equal, are left out: neither choice
    depends on membership, so a random split stays one.

    Args:
        feed: How the run feeds its model.
        canaries: The canaries.
        max_length: Truncation of raw text, in tokens.

    Raises:
        ConfigurationError: if no rows can be made of the canaries.
        TooFewCanariesError: if too few records are left.
        OverlappingCanariesError: if a non-member is among the training rows.
    """
    prepared = _prepared(feed, canaries, max_length=max_length)
    fed = [_as_fed(feed, row) for row in prepared.rows]
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
    _report_membership(feed, as_fed, dict(zip(record_ids, (prepared.rows[i] for i in usable), strict=True)))
    return as_fed


def as_row(record: Record, *, text_field: str) -> dict[str, Any]:
    """A record as a row of a dataset, with its text where the trainer reads text."""
    if record_kind(record) == "text":
        return {text_field: record_text(record)}
    return dict(record) if isinstance(record, Mapping) else {}


def _as_fed(feed: Feed, row: Row) -> Row:
    """One row as the model gets it."""
    if feed.columns is not None:
        row = {name: value for name, value in row.items() if name in feed.columns}
    return collated(row, feed.collate)


def _drawn(feed: Feed, source: Source, n: int, *, rng: np.random.Generator) -> dict[str, _DrawnRow]:
    """At most `n` rows of a dataset of which something is trained, by their names."""
    dataset = source.rows
    if not is_indexable(dataset):
        raise CanaryError(
            f"No canaries were given and `{source.name}` is a stream that cannot be drawn from. " + ADVICE
        )
    rows: dict[str, _DrawnRow] = {}
    for index in rng.permutation(len(dataset)):
        row = dataset[int(index)]
        if source.is_packed or "seq_lengths" in row:
            raise CanaryError(
                f"No canaries were given and `{source.name}` is packed: a row is not a record. " + ADVICE
            )
        as_fed = _as_fed(feed, row)
        if not is_empty(as_fed):
            rows[f"{source.name}-{index}"] = _DrawnRow(row, as_fed)
        if len(rows) == n:
            break
    return rows


def _prepared(feed: Feed, canaries: CanarySet, *, max_length: int | None) -> PreparedRows:
    """Rows such as the training dataset has."""
    if feed.prepare is not None:
        return feed.prepare(canaries.records)
    first = feed.first_row
    is_tokenized = all(record_kind(record) == "tokenized" for record in canaries.records)
    is_tokenized_later = isinstance(first, Mapping) and bool(first) and "input_ids" not in first
    if not (is_tokenized or is_tokenized_later or feed.takes_raw_records):
        return _tokenized(feed, canaries, max_length=max_length)
    rows = [as_row(record, text_field=feed.text_field) for record in canaries.records]
    return PreparedRows(rows, range(len(canaries)))


def _tokenized(feed: Feed, canaries: CanarySet, *, max_length: int | None) -> PreparedRows:
    if feed.tokenizer is None:
        raise ConfigurationError(
            f"The canaries are text and there is no tokenizer: pass {feed.tokenizer_advice}, or draw the "
            "canaries from the tokenized dataset."
        )
    encoded = encode_canaries(canaries, feed.tokenizer, max_length=max_length)
    first = feed.first_row
    has_labels = isinstance(first, Mapping) and "labels" in first
    rows: list[dict[str, Any]] = []
    for row in encoded.rows:
        fields = {"input_ids": row.input_ids.tolist(), "attention_mask": [1] * len(row.input_ids)}
        if has_labels:
            fields["labels"] = row.labels.tolist()
        rows.append(fields)
    return PreparedRows(rows, canaries.indices_of(encoded.record_ids))


def _report_membership(feed: Feed, canaries: CanarySet, rows: Mapping[str, Row]) -> None:
    if feed.cuts_records:
        problems = [
            "Packing with the strategy 'wrapped' cuts training records: it cannot be checked that members "
            "are among them and non-members are not. The strategy 'bfd' keeps records whole."
        ]
    else:
        keys = {record_id: keys_of(rows[record_id]) for record_id in canaries.record_ids}
        problems = check_membership(
            feed.training.rows, canaries, {name: found[0] for name, found in keys.items() if found}
        )
    if is_main_process():
        for problem in problems:
            logger.warning("%s", problem)
