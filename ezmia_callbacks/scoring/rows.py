"""Canaries as token rows with a label mask, the form in which they are scored.

Score what was trained: a row that was tokenized for training (labels, masks and all) is taken as it is. Raw
text is tokenized in the plainest way, which is right for plain language modeling; a script that does
anything else to its records should draw its canaries after tokenization.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ezmia_callbacks.canaries.batch_inputs import BatchInputs
from ezmia_callbacks.canaries.records import (
    FURTHER_INPUTS,
    IGNORED_LABEL,
    INPUTS_DIGEST,
    LOSS_MASKS,
    REJECTED_IDS,
    REJECTED_LABELS,
    Record,
    is_pair,
    record_kind,
    record_text,
)
from ezmia_callbacks.canaries.sets import CanarySet
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.planning import MINIMUM_PER_CLASS
from ezmia_callbacks.typed_rows import parse_json

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64

__all__: list[str] = []

MINIMUM_SCORED_TOKENS = 2
MASK = "attention_mask"


class Tokenizer(Protocol):
    """What is borrowed of a Hugging Face tokenizer; nothing of it is ever changed."""

    def __call__(self, text: str, **kwargs: Any) -> Mapping[str, Any]:
        """Token ids of a text, under `input_ids`."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Token ids of a conversation."""

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        """Text of token ids."""


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One record as the model sees it.

    Attributes:
        input_ids: int64, (length,), with the padding that belongs to the row.
        labels: int64, (length,): the input ids where they carry loss, -100 elsewhere.
        inputs: Further inputs of the model, by name, one value per token. The attention mask is among them
            only where padding belongs to the row, as it does on the left of absolute positions.
        batch_inputs: Inputs that are made for whole batches, such as images; None if there are none.
        record_id: The name by which these are made.
        rejected: The rejected side of a preference pair, whose chosen side this row is; None for others.
    """

    input_ids: Int64[np.ndarray, " length"]
    labels: Int64[np.ndarray, " length"]
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    batch_inputs: BatchInputs | None = None
    record_id: str = ""
    rejected: TokenRow | None = None

    def __repr__(self) -> str:
        # Not the tokens: they are the record's text.
        return f"TokenRow({self.record_id!r}, {self.n_tokens} tokens)"

    @property
    def sides(self) -> tuple[TokenRow, ...]:
        """What is scored of the record: the row, and the rejected side where there is one."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def has_enough_tokens(self) -> bool:
        """Whether it can be scored: two tokens carry loss, and one on the rejected side of a pair."""
        return self.n_scored >= MINIMUM_SCORED_TOKENS and all(side.n_scored for side in self.sides)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, with the padding that belongs to the row; of a pair those of the longer side."""
        return max(len(side.input_ids) for side in self.sides)

    @property
    def attention_mask(self) -> Int64[np.ndarray, " length"]:
        """1 for tokens, 0 for padding that belongs to the row."""
        own = self.inputs.get(MASK)
        return np.ones(len(self.input_ids), dtype=np.int64) if own is None else own

    @property
    def has_further_inputs(self) -> bool:
        """Whether token ids alone are not what the model is trained on."""
        return bool(self.inputs) or self.batch_inputs is not None

    @property
    def is_scored(self) -> Bool[np.ndarray, " length_minus_1"]:
        """Which of the predicted positions 1, 2, ... carry loss; the first token is never predicted."""
        is_scored: Bool[np.ndarray, " length_minus_1"] = self.labels[1:] != IGNORED_LABEL
        return is_scored

    @property
    def n_scored(self) -> int:
        """Number of scored tokens."""
        return int(self.is_scored.sum())

    def cut(self, n_tokens: int) -> TokenRow:
        """The record without what comes after so many tokens."""
        return replace(
            self,
            input_ids=self.input_ids[:n_tokens],
            labels=self.labels[:n_tokens],
            rejected=None if self.rejected is None else self.rejected.cut(n_tokens),
        )

    def as_record(self) -> dict[str, Any]:
        """The same as a tokenized record; what is made for whole batches is not in it."""
        record: dict[str, Any] = {"input_ids": self.input_ids.tolist(), "labels": self.labels.tolist()}
        if self.inputs:
            record[FURTHER_INPUTS] = {name: values.tolist() for name, values in self.inputs.items()}
        if self.rejected is not None:
            record[REJECTED_IDS] = self.rejected.input_ids.tolist()
            record[REJECTED_LABELS] = self.rejected.labels.tolist()
        return record


def sides_of(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """All that is scored of the rows: themselves, then the rejected sides of pairs, in the same order.

    Raises:
        ConfigurationError: if some of them are preference pairs and others are not.
    """
    rejected = [row.rejected for row in rows if row.rejected is not None]
    if rejected and len(rejected) < len(rows):
        raise ConfigurationError(
            f"{len(rejected)} of {len(rows)} canaries are preference pairs and the others are not: no score "
            "compares the two. Audit pairs alone, or map them to 'prompt' and 'completion'."
        )
    return [*rows, *rejected]


@dataclass(frozen=True, eq=False)
class EncodedCanaries:
    """A canary set as token rows.

    Attributes:
        rows: The records that have at least two scored tokens; preference pairs by their chosen side, with
            the rejected one as its `rejected`.
        is_member: bool, (n_records,).
        record_ids: Their ids, in the same order.
        n_dropped: Records left out because fewer than two of their tokens carry loss.
        n_compressed_bytes: int64, (n_records,): zlib size of each text; None where text is unknown.
    """

    rows: tuple[TokenRow, ...]
    is_member: Bool[np.ndarray, " n_records"]
    record_ids: tuple[str, ...]
    n_dropped: int
    n_compressed_bytes: Int64[np.ndarray, " n_records"] | None

    def __repr__(self) -> str:
        return f"EncodedCanaries({self.n_members} members, {self.n_non_members} non-members)"

    @property
    def n_members(self) -> int:
        """Number of member rows."""
        return int(self.is_member.sum())

    @property
    def n_non_members(self) -> int:
        """Number of non-member rows."""
        return int((~self.is_member).sum())

    @property
    def has_pairs(self) -> bool:
        """Whether the records are preference pairs, of which both sides are scored."""
        return any(row.rejected is not None for row in self.rows)

    def select(self, is_chosen: Bool[np.ndarray, " n_records"]) -> EncodedCanaries:
        """Some of the records, in their order."""
        kept = np.flatnonzero(is_chosen)
        n_bytes = self.n_compressed_bytes
        return replace(
            self,
            rows=tuple(self.rows[i] for i in kept),
            is_member=self.is_member[kept],
            record_ids=tuple(self.record_ids[i] for i in kept),
            n_compressed_bytes=None if n_bytes is None else n_bytes[kept],
        )

    def cut(self, n_tokens: int) -> EncodedCanaries:
        """The same records without what comes after so many tokens."""
        return replace(self, rows=tuple(row.cut(n_tokens) for row in self.rows))

    @cached_property
    def input_names(self) -> frozenset[str]:
        """The further inputs that scoring hands to the model, besides token ids and attention mask."""
        found = {name for row in self.rows for name in row.inputs} - {MASK}
        return frozenset(found.union(*(row.batch_inputs.names for row in self.rows if row.batch_inputs)))

    @cached_property
    def padding_side(self) -> Literal["right", "left"]:
        """Where padding stands: on the left only where the model may tell by its positions."""
        return (
            "left" if any(len(row.input_ids) and not row.attention_mask[0] for row in self.rows) else "right"
        )

    def is_constant(self, name: str) -> bool:
        """Whether a further input of single tokens has one value throughout."""
        values = [row.inputs[name] for row in self.rows if name in row.inputs]
        return bool(values) and len(np.unique(np.concatenate([value.ravel() for value in values]))) == 1

    @property
    def lacking_inputs(self) -> frozenset[str]:
        """Inputs that training rows have, and of which the canaries have none."""
        return frozenset().union(*(row.batch_inputs.lacking for row in self.rows if row.batch_inputs))

    def without_inputs(self, names: frozenset[str]) -> EncodedCanaries:
        """The same records, and the same fingerprint, without some of the further inputs."""
        rows = []
        for row in self.rows:
            of_batch = None if row.batch_inputs is None else row.batch_inputs.without(names)
            rows.append(
                replace(
                    row,
                    inputs={name: values for name, values in row.inputs.items() if name not in names},
                    batch_inputs=of_batch if of_batch is not None and of_batch.names else None,
                )
            )
        stripped = replace(self, rows=tuple(rows))
        vars(stripped)["fingerprint"] = self.fingerprint
        return stripped

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any token, label, further input or membership."""
        digest = hashlib.sha256(self.is_member.tobytes())
        for row in sides_of(self.rows):
            digest.update(len(row.input_ids).to_bytes(8, "little"))
            digest.update(row.input_ids.tobytes())
            digest.update(row.labels.tobytes())
            for name, values in sorted(row.inputs.items()):
                digest.update(name.encode() + values.tobytes())
        return digest.hexdigest()[:16]


def encode_canaries(
    canaries: CanarySet, tokenizer: Tokenizer | None = None, *, max_length: int | None = None
) -> EncodedCanaries:
    """The canaries as token rows, without those that have fewer than two scored tokens.

    Args:
        canaries: The canary set.
        tokenizer: Needed for raw text, prompt/completion and messages; used as it is, never changed.
        max_length: Truncation of raw records, in tokens; give what training uses. Tokenized rows are
            never cut.

    Raises:
        ConfigurationError: if a tokenizer is needed and missing, a row's labels are not its tokens, or the
            images that it was trained with are not there; or if some records are preference pairs and
            others are not.
        TooFewCanariesError: if too few records of a class have two scored tokens.
    """
    rows = [
        _encode(record, tokenizer, max_length=max_length, record_id=record_id)
        for record, record_id in zip(canaries.records, canaries.record_ids, strict=True)
    ]
    if canaries.batch_inputs is None:
        n_without = sum(isinstance(r, Mapping) and r.get(INPUTS_DIGEST) is not None for r in canaries.records)
        if n_without:
            raise ConfigurationError(
                f"{n_without} canaries were trained on with images, or other inputs that are no tokens, and "
                "they are gone, for example in a file of canaries: audit with the callback, during training."
            )
    else:
        rows = [
            replace(row, batch_inputs=canaries.batch_inputs, record_id=record_id)
            for row, record_id in zip(rows, canaries.record_ids, strict=True)
        ]
    has_pairs = len(sides_of(rows)) > len(rows)
    needed = (
        f"{MINIMUM_SCORED_TOKENS} tokens that carry loss{', one of a rejected side' if has_pairs else ''}"
    )
    is_kept = np.array([row.has_enough_tokens for row in rows], dtype=np.bool_)
    is_member = canaries.is_member[is_kept]
    for name, n_kept in (("members", int(is_member.sum())), ("non-members", int((~is_member).sum()))):
        if n_kept < MINIMUM_PER_CLASS:
            raise TooFewCanariesError(
                f"Only {n_kept} {name} have at least {needed}; "
                f"{MINIMUM_PER_CLASS} are needed: check the label mask and the truncation, or add records."
            )
    kept = np.flatnonzero(is_kept)
    return EncodedCanaries(
        rows=tuple(rows[i] for i in kept),
        is_member=is_member,
        record_ids=tuple(canaries.record_ids[i] for i in kept),
        n_dropped=int((~is_kept).sum()),
        n_compressed_bytes=_compressed_sizes(
            [canaries.records[i] for i in kept], [rows[i] for i in kept], tokenizer
        ),
    )


def _encode(
    record: Record, tokenizer: Tokenizer | None, *, max_length: int | None, record_id: str
) -> TokenRow:
    kind = record_kind(record)
    if kind == "tokenized":
        return _tokenized_row(record, record_id=record_id)  # type: ignore[arg-type]  # a mapping by kind
    if tokenizer is None:
        raise ConfigurationError(
            f"Canaries of kind {kind!r} need a tokenizer: pass `tokenizer=`, or tokenized rows "
            "with `input_ids`."
        )
    _refuse_lone_surrogates(record, record_id=record_id)
    if kind == "text":
        ids = _ids(tokenizer(str(record_text(record))), max_length=max_length)
        return TokenRow(ids, ids)
    fields: Mapping[str, Any] = record  # type: ignore[assignment]  # a mapping by kind
    options = _template_options(fields)
    if kind == "messages":
        ids = _template_ids(tokenizer, fields["messages"], options, max_length=max_length)
        return TokenRow(ids, ids)
    if kind == "prompt_completion":
        prompt, *answers = fields["prompt"], fields["completion"]
    else:
        prompt, *answers = _pair(fields)
    if any(isinstance(prompt, str) != isinstance(answer, str) for answer in answers):
        names = "prompt and completion" if kind == "prompt_completion" else "prompt, chosen and rejected"
        raise ConfigurationError(
            f"Record {record_id}: of {names} one is text and one a list of messages: make all of them the "
            "same."
        )
    chosen, *rejected = (
        _answer_row(prompt, answer, tokenizer, options, max_length=max_length) for answer in answers
    )
    return replace(chosen, rejected=rejected[0]) if rejected else chosen


def _pair(fields: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected answer; without a prompt it is their common beginning, as in TRL."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    if fields.get("prompt") is not None:
        return fields["prompt"], chosen, rejected
    n_same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    n_prompt = min(len(chosen), len(rejected)) if n_same is None else n_same
    # A space belongs to the word after it.
    if isinstance(chosen, str) and chosen[:n_prompt].endswith(" "):
        n_prompt -= 1
    return chosen[:n_prompt], chosen[n_prompt:], rejected[n_prompt:]


def _answer_row(
    prompt: Any,
    completion: Any,
    tokenizer: Tokenizer,
    options: Mapping[str, Any],
    *,
    max_length: int | None,
) -> TokenRow:
    """What is said after a prompt, which carries no loss."""
    if isinstance(prompt, str):
        prompt_ids = _ids(tokenizer(prompt), max_length=max_length)
        ids = _ids(tokenizer(prompt + completion), max_length=max_length)
    else:
        prompt_ids = _template_ids(
            tokenizer, prompt, {"add_generation_prompt": True, **options}, max_length=max_length
        )
        ids = _template_ids(tokenizer, [*prompt, *completion], options, max_length=max_length)
    labels = ids.copy()
    labels[: len(prompt_ids)] = IGNORED_LABEL
    return TokenRow(ids, labels)


def _refuse_lone_surrogates(record: Record, *, record_id: str) -> None:
    """JSON can hold halves of characters, which no tokenizer reads."""
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"Record {record_id}: its text holds halves of characters (lone surrogates): it was cut or "
            "decoded wrongly; read it again as UTF-8, or leave it out."
        ) from None


def _ids(encoded: Mapping[str, Any], *, max_length: int | None) -> Int64[np.ndarray, " length"]:
    return np.asarray(encoded["input_ids"], dtype=np.int64)[:max_length]


def _template_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat says about its template; as in TRL tools may be JSON, and an empty list is none."""
    tools = record.get("tools")
    tools = parse_json(tools) if isinstance(tools, str) else tools
    settings = record.get("chat_template_kwargs") or {}
    if not isinstance(settings, Mapping):
        raise ConfigurationError(
            f"Got a {type(settings).__name__} as `chat_template_kwargs`; a mapping is needed."
        )
    return ({"tools": tools} if tools else {}) | dict(settings)


def _template_ids(
    tokenizer: Tokenizer, messages: Any, options: Mapping[str, Any], *, max_length: int | None
) -> Int64[np.ndarray, " length"]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return _ids(encoded, max_length=max_length)


def _tokenized_row(record: Mapping[str, Any], *, record_id: str) -> TokenRow:
    ids = np.asarray(record["input_ids"], dtype=np.int64)
    if ids.ndim != 1:
        raise ConfigurationError(
            f"Record {record_id}: `input_ids` must be one-dimensional, got shape {ids.shape}."
        )
    labels = ids if record.get("labels") is None else np.asarray(record["labels"], dtype=np.int64)
    for name in LOSS_MASKS:
        if record.get(name) is not None:
            labels = np.where(np.asarray(record[name], dtype=np.bool_), labels, IGNORED_LABEL)
    if labels.shape != ids.shape:
        raise ConfigurationError(
            f"Record {record_id}: {len(ids)} input ids and {labels.shape} labels: they must match."
        )
    inputs = {
        name: np.asarray(values, dtype=_dtype_of(values))
        for name, values in (record.get(FURTHER_INPUTS) or {}).items()
    }
    if record.get("attention_mask") is not None:
        if inputs:
            raise ConfigurationError(
                f"Record {record_id}: got an `attention_mask` beside `{FURTHER_INPUTS}`: put it among them."
            )
        attended = np.asarray(record["attention_mask"], dtype=np.bool_)
        ids, labels = ids[attended], labels[attended]
    if ids.size and ids.min() < 0:
        raise ConfigurationError(
            f"Record {record_id}: the token id {ids.min()}; ids count from 0: tokenize it again, or leave it "
            "out."
        )
    if is_pair(record):
        rejected = {"input_ids": record[REJECTED_IDS], "labels": record.get(REJECTED_LABELS)}
        of_rejected = _tokenized_row(rejected, record_id=f"{record_id} (rejected side)")
    else:
        of_rejected = None
    if np.any((labels != IGNORED_LABEL) & (labels != ids)):
        raise ConfigurationError(
            f"Record {record_id}: labels differ from the input ids where they are not "
            f"{IGNORED_LABEL}. A causal language model is trained on its own input; labels must not be "
            "shifted, and masked language models cannot be audited."
        )
    return TokenRow(ids, labels, inputs, rejected=of_rejected)


def _dtype_of(values: Any) -> type[np.generic]:
    kind = np.asarray(values).dtype.kind
    if kind == "b":
        return np.bool_
    return np.float32 if kind == "f" else np.int64


def _compressed_sizes(
    records: Sequence[Record], rows: Sequence[TokenRow], tokenizer: Tokenizer | None
) -> Int64[np.ndarray, " n_records"] | None:
    sizes = []
    for record, row in zip(records, rows, strict=True):
        text = record_text(record)
        if text is None:
            if tokenizer is None:
                return None
            text = tokenizer.decode(row.input_ids[row.attention_mask != 0].tolist())
        sizes.append(len(zlib.compress(text.encode("utf-8"))))
    return np.array(sizes, dtype=np.int64)
