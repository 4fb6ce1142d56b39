"""Canaries in the very form in which a run feeds its model: through its own preparation and collator.

Template, truncation, end-of-sequence tokens and label mask are then those of the training, in every
framework: each says what it feeds from as a `Feed`, and nothing here knows which one it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.canaries.batch_inputs import BatchInputs
from ezmia_callbacks.canaries.records import (
    FURTHER_INPUTS,
    INPUTS_DIGEST,
    Record,
    is_empty,
    is_pair,
    record_kind,
    record_text,
)
from ezmia_callbacks.canaries.sets import RowsByNumber
from ezmia_callbacks.canaries.validity.blocks import cut_from_running_text
from ezmia_callbacks.distributed import is_main_process
from ezmia_callbacks.errors import (
    CanaryError,
    ConfigurationError,
    OverlappingCanariesError,
    TooFewCanariesError,
)
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.scoring.rows import Tokenizer, encode_canaries
from ezmia_callbacks.shells.collated import (
    BORDERS,
    Collate,
    FedRow,
    Row,
    digest_of,
    fed_batch,
    fed_row,
    made_for_batch,
)
from ezmia_callbacks.shells.membership_check import check_membership, is_indexable, keys_of
from ezmia_callbacks.shells.stored_rows import AsStored, columns_of

__all__: list[str] = []

logger = get_logger(__name__)

# Training rows of which it is looked what the collator returns for them.
_N_ROWS_TRIED = 4

ADVICE = (
    "Draw canaries yourself with `train_dataset, canaries = hold_out_canaries(train_dataset)`, train on what "
    "it returns, and pass `PrivacyAuditCallback(canaries=canaries)`."
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
        batch_size: Rows in a training batch, which are padded to one length.
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
    batch_size: int = 8

    def read(self, row: Row) -> Row:
        """A row as the collator gets it."""
        return row if self.columns is None else {k: v for k, v in row.items() if k in self.columns}

    @property
    def first_row(self) -> Any:
        """The first training row; None if there is none, or if it is a stream."""
        dataset = self.training.rows
        return dataset[0] if is_indexable(dataset) and len(dataset) else None

    @property
    def row_columns(self) -> frozenset[str]:
        """The columns of the training rows, as far as they are known."""
        return columns_of(self.training.rows, self.first_row)

    def as_stored(self, records: Sequence[Row], taken_from: Sequence[Any] | None) -> Sequence[Row]:
        """Records as rows of the training set, in its types and with its columns; see `AsStored`."""
        first = self.first_row
        return AsStored(
            records,
            taken_from,
            training=self.training.rows,
            first=first if isinstance(first, Mapping) else None,
        )


class _DrawnRow(NamedTuple):
    """Which row of a dataset it is, by what it is found there, and as the collator hands it to the model."""

    number: int
    keys: Sequence[bytes]
    as_fed: FedRow


class _FedRows(NamedTuple):
    """Rows in the form in which they are scored."""

    records: Sequence[dict[str, Any]]
    batch_names: frozenset[str]
    lacking: frozenset[str]

    def batch_inputs(self, feed: Feed, rows: Sequence[Row], record_ids: Sequence[str]) -> BatchInputs | None:
        """How the inputs of batches are made, of rows as stored; None if there are none, and none lack."""
        if not (self.batch_names or self.lacking):
            return None
        index_of = {record_id: i for i, record_id in enumerate(record_ids)}

        def make(wanted: Sequence[str]) -> Mapping[str, object]:
            return made_for_batch((feed.read(rows[index_of[name]]) for name in wanted), feed.collate)

        return BatchInputs(self.batch_names, make, self.lacking)


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
    record_ids = list(drawn)
    sources = {name: feed.training.rows for name in members} | {name: evaluation.rows for name in non_members}
    stored = [RowsByNumber(sources[name], [row.number]) for name, row in drawn.items()]
    rows: Sequence[Row] = _Flattened(stored)
    fed = _in_scored_form(feed, rows, [row.as_fed for row in drawn.values()])
    try:
        canaries = CanarySet.from_lists(
            fed.records[: len(members)],
            fed.records[len(members) :],
            record_ids=record_ids,
            method="trainer_datasets",
        )
    except OverlappingCanariesError as error:
        raise OverlappingCanariesError(
            f"`{feed.training.name}` and `{evaluation.name}` share records ({error}). Records trained on "
            "cannot be non-members: deduplicate before splitting."
        ) from error
    except TooFewCanariesError as error:
        raise TooFewCanariesError(f"{error} " + ADVICE) from error
    _report_membership(feed, canaries, {name: row.keys for name, row in drawn.items()})
    _report_blocks(feed, fed.records)
    return replace(canaries, rows=None, batch_inputs=fed.batch_inputs(feed, rows, record_ids))


def canaries_as_fed(feed: Feed, canaries: CanarySet, *, max_length: int | None) -> CanarySet:
    """The same canaries as token rows, with the labels that the run's collator gives them.

    Records of which nothing is trained, and records that have become equal, are left out: neither choice
    depends on membership, so a random split stays one.

    Args:
        feed: How the run feeds its model.
        canaries: The canaries.
        max_length: Truncation of raw text, in tokens.

    Raises:
        ConfigurationError: if no rows can be made of the canaries, or preference pairs would lose a side.
        TooFewCanariesError: if too few records are left.
        OverlappingCanariesError: if a non-member is among the training rows.
    """
    prepared = _prepared(feed, canaries, max_length=max_length)
    fed = _in_scored_form(feed, prepared.rows, [_as_fed(feed, row) for row in prepared.rows])
    if any(map(is_pair, canaries.records)) and not all(map(is_pair, fed.records)):
        raise ConfigurationError(
            "The canaries are preference pairs, and the run's collator makes one row of tokens of each, "
            "without the rejected side: pass them to the callback of a DPOTrainer; or call PrivacyAuditor, "
            "which scores both sides, from a loop or a callback of your own; or map them to 'prompt' and "
            "'completion'."
        )
    identities = [_identity(row) for row in fed.records]
    n_copies = Counter(identities)
    usable = [i for i, row in enumerate(fed.records) if not is_empty(row) and n_copies[identities[i]] == 1]
    kept = [prepared.kept[i] for i in usable]
    left_out = (
        f"{len(canaries) - len(kept)} of {len(canaries)} canaries are left out: as the trainer prepares them "
        "(template, label mask, truncation to `max_length`), no token of theirs carries loss, or they are "
        "the same as another."
    )
    try:
        as_fed = canaries.select(kept, records=[fed.records[i] for i in usable])
    except TooFewCanariesError as error:
        raise TooFewCanariesError(f"{left_out} {error}") from error
    if len(kept) < len(canaries) and is_main_process():
        logger.warning("%s", left_out)
    keys = {canaries.record_ids[prepared.kept[i]]: keys_of(prepared.rows[i]) for i in usable}
    _report_membership(feed, as_fed, keys)
    _report_blocks(feed, [fed.records[i] for i in usable])
    record_ids = [canaries.record_ids[i] for i in prepared.kept]
    return replace(as_fed, rows=None, batch_inputs=fed.batch_inputs(feed, prepared.rows, record_ids))


def as_row(record: Record, *, text_field: str) -> dict[str, Any]:
    """A record as a row of a dataset, with its text where the trainer reads text."""
    if record_kind(record) == "text":
        return {text_field: record_text(record)}
    return dict(record) if isinstance(record, Mapping) else {}


class _Flattened(Sequence[Any]):
    """Rows of several datasets, each read when it is asked for."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        return self._parts[index][0]


def _as_fed(feed: Feed, row: Row) -> FedRow:
    """One row as the model gets it, in a batch of its own."""
    return fed_row(feed.read(row), feed.collate)


def _identity(record: Row) -> tuple[Any, ...]:
    """What makes a record another than the next: its tokens without padding, and its images."""
    mask = record.get(FURTHER_INPUTS, {}).get("attention_mask")
    ids = record["input_ids"]
    tokens = ids if mask is None else [token for token, is_in in zip(ids, mask, strict=True) if is_in]
    return (*tokens, record.get(INPUTS_DIGEST))


def _in_scored_form(feed: Feed, rows: Sequence[Row], alone: Sequence[FedRow]) -> _FedRows:
    """Rows as they are scored: token ids and labels where these are all that the model is trained on.

    Otherwise they carry what training gives the model besides. Padding is then that of batches of the
    training's size, drawn at random as those of training are, and stays with the row: reference and audits
    score the same, whatever the batches of an audit are.

    Args:
        feed: How the run feeds its model.
        rows: The rows as stored.
        alone: Each of them in a batch of its own.
    """
    lacking = _lacking(feed, alone)
    if all(row.is_plain for row in alone) and not _is_padded_in_batches(feed, rows, alone):
        return _FedRows([dict(row.record) for row in alone], frozenset(), lacking)
    fed = list(alone)
    order = np.random.default_rng(0).permutation(len(rows))
    for start in range(0, len(order), feed.batch_size):
        chosen = [int(i) for i in order[start : start + feed.batch_size]]
        batch = fed_batch([feed.read(rows[i]) for i in chosen], feed.collate)
        for i, row_in_batch in zip(chosen, batch or [], strict=batch is not None):
            fed[i] = row_in_batch
    # A name that is not a value of tokens everywhere is so nowhere.
    batch_names = frozenset[str]().union(*(row.batch_names for row in (*fed, *alone)))
    records = [_without(row.padded, batch_names) for row in fed]
    if batch_names:
        for record, row in zip(records, rows, strict=True):
            made = made_for_batch([feed.read(row)], feed.collate)
            of_row = {name: value for name, value in made.items() if name in batch_names}
            record[INPUTS_DIGEST] = digest_of(of_row)
    return _FedRows(records, batch_names, lacking)


def _without(record: Row, names: frozenset[str]) -> dict[str, Any]:
    inputs = {name: v for name, v in record.get(FURTHER_INPUTS, {}).items() if name not in names}
    bare = {name: value for name, value in record.items() if name != FURTHER_INPUTS}
    return bare | ({FURTHER_INPUTS: inputs} if inputs else {})


def _is_padded_in_batches(feed: Feed, rows: Sequence[Row], alone: Sequence[FedRow]) -> bool:
    """Whether rows of different lengths are padded so that it changes what the model learns from them."""
    lengths = [len(row.record["input_ids"]) for row in alone]
    if len(set(lengths)) < 2:
        return False
    batch = [rows[int(np.argmin(lengths))], rows[int(np.argmax(lengths))]]
    if any("chosen_ids" in row for row in batch):
        return False
    fed = fed_batch([feed.read(row) for row in batch], feed.collate)
    return fed is not None and not all(row.is_plain for row in fed)


def _lacking(feed: Feed, alone: Sequence[FedRow]) -> frozenset[str]:
    """Further inputs that training rows have and the canaries do not, which then are fed otherwise."""
    dataset = feed.training.rows
    if feed.training.is_packed or not is_indexable(dataset):
        return frozenset()
    found = frozenset[str]()
    for index in range(min(_N_ROWS_TRIED, len(dataset))):
        row = dataset[index]
        if not isinstance(row, Mapping) or "seq_lengths" in row:
            continue
        try:
            fed = _as_fed(feed, row)
        except ConfigurationError:
            # Rows of another shape than the canaries' are not to be compared with.
            continue
        found |= frozenset() if fed.is_plain else _names(fed)
    # Where several records stand in a row, positions begin anew with each; a canary has its row for itself.
    return found.difference(BORDERS, {"position_ids"}, *(_names(row) for row in alone))


def _names(row: FedRow) -> frozenset[str]:
    return row.batch_names | (frozenset(row.padded.get(FURTHER_INPUTS, {})) - {"attention_mask"})


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
        if not is_empty(as_fed.record):
            rows[f"{source.name}-{index}"] = _DrawnRow(int(index), keys_of(row), as_fed)
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
    return PreparedRows(feed.as_stored(rows, canaries.rows), range(len(canaries)))


def _tokenized(feed: Feed, canaries: CanarySet, *, max_length: int | None) -> PreparedRows:
    if feed.tokenizer is None:
        raise ConfigurationError(
            f"The canaries are text and there is no tokenizer: pass {feed.tokenizer_advice}, or draw the "
            "canaries from the tokenized dataset."
        )
    encoded = encode_canaries(canaries, feed.tokenizer, max_length=max_length)
    kept = canaries.indices_of(encoded.record_ids)
    has_labels = "labels" in feed.row_columns
    rows: list[dict[str, Any]] = []
    for row, index in zip(encoded.rows, kept, strict=True):
        fields = {"input_ids": row.input_ids.tolist(), "attention_mask": [1] * len(row.input_ids)}
        if has_labels:
            fields["labels"] = row.labels.tolist()
        rows.append(fields | _token_types(feed, canaries.records[index], len(row.input_ids)))
    return PreparedRows(feed.as_stored(rows, None), kept)


def _token_types(feed: Feed, record: Record, length: int) -> dict[str, Any]:
    """What else the tokenizer says of each token of a text, where training rows have it, too."""
    if "token_type_ids" not in feed.row_columns or record_kind(record) != "text" or feed.tokenizer is None:
        return {}
    found = feed.tokenizer(str(record_text(record))).get("token_type_ids")
    return {} if found is None else {"token_type_ids": list(found)[:length]}


def _report_membership(feed: Feed, canaries: CanarySet, keys: Mapping[str, Sequence[bytes]]) -> None:
    if feed.cuts_records:
        problems = [
            "Packing with the strategy 'wrapped' cuts training records: it cannot be checked that members "
            "are among them and non-members are not. The strategy 'bfd' keeps records whole."
        ]
    else:
        own = {name: keys[name][0] for name in canaries.record_ids if keys[name]}
        problems = check_membership(feed.training.rows, canaries, own)
    if is_main_process():
        for problem in problems:
            logger.warning("%s", problem)


def _report_blocks(feed: Feed, rows: Sequence[Row]) -> None:
    """Say so where the rows, as they are fed, are no records."""
    problem = cut_from_running_text(rows, end_of_text=getattr(feed.tokenizer, "eos_token_id", None))
    if problem is not None and is_main_process():
        logger.warning("%s", problem)
