"""What one training record is, in each of the five shapes that fine-tuning scripts use."""

import hashlib
import json
import operator
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Literal, SupportsIndex, TypeAlias, cast

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.safe_text import describe_columns

__all__: list[str] = []

Record: TypeAlias = str | Mapping[str, object]
RecordKind: TypeAlias = Literal["text", "tokenized", "preference", "prompt_completion", "messages"]

LOSS_MASKS = ("completion_mask", "assistant_masks")
"""Fields of a tokenized row that are 1 where a token carries loss."""

FURTHER_INPUTS = "further_inputs"
"""Field of a row as it is fed: inputs of the model besides the token ids, by name, one value per token.

With it the row is scored as it stands, its padding included; without it padding is taken away.
"""
INPUTS_DIGEST = "inputs_digest"
"""Field of a row as it is fed: stands for inputs that are no values of tokens, such as its images."""

REJECTED_IDS, REJECTED_LABELS = "rejected_input_ids", "rejected_labels"
"""Fields of a tokenized preference pair: its rejected side, with the prompt. The row is the chosen side."""

# From the most to the least processed column: the first kind a row satisfies is what was trained.
_REQUIRED_FIELDS: dict[RecordKind, tuple[str, ...]] = {
    "tokenized": ("input_ids",),
    "preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
_OPTIONAL_FIELDS: dict[RecordKind, tuple[str, ...]] = {
    "tokenized": (
        *("labels", "attention_mask", *LOSS_MASKS, FURTHER_INPUTS, INPUTS_DIGEST),
        *(REJECTED_IDS, REJECTED_LABELS),
    ),
    # Without a prompt, it is the common beginning of both sides.
    "preference": ("prompt", "tools", "chat_template_kwargs"),
    "prompt_completion": ("tools", "chat_template_kwargs"),
    "messages": ("tools", "chat_template_kwargs"),
    "text": (),
}
RECORD_FIELDS: frozenset[str] = frozenset(
    field for fields in (*_REQUIRED_FIELDS.values(), *_OPTIONAL_FIELDS.values()) for field in fields
)
_INT64 = 2**63
IGNORED_LABEL = -100
"""Label of a token that carries no loss, as torch and transformers have it."""


def record_kind(record: Record) -> RecordKind:
    """Name the shape of a record: the most processed one whose fields are all there.

    A field that holds None counts as absent if another shape fits: rows of a `datasets.Dataset`
    have every column.

    Raises:
        ConfigurationError: if the record has none of the accepted shapes.

    >>> record_kind({"text": "a b", "input_ids": [5, 6]})
    'tokenized'
    """
    if isinstance(record, str):
        return "text"
    if isinstance(record, Mapping):
        present = {field for field, value in record.items() if value is not None}
        for fields in (present, set(record)):
            for kind, required in _REQUIRED_FIELDS.items():
                if fields.issuperset(required):
                    return kind
        got = f"a row with {describe_columns(record)}"
    else:
        got = f"a {type(record).__name__}"
    raise ConfigurationError(
        f"Got {got} as a record; a record is a string, or a mapping with 'text', 'input_ids', "
        "'prompt' and 'completion', 'chosen' and 'rejected', or 'messages': rename the columns or map the "
        "rows first."
    )


def is_pair(record: Record) -> bool:
    """Tell whether a record is a preference pair, as text or as tokens.

    Raises:
        ConfigurationError: if the record has no accepted shape.

    >>> is_pair({"input_ids": [5, 6], "rejected_input_ids": [5, 7]})
    True
    """
    kind = record_kind(record)
    has_tokens = isinstance(record, Mapping) and record.get(REJECTED_IDS) is not None
    return kind == "preference" or (kind == "tokenized" and has_tokens)


def record_text(record: Record) -> str | None:
    """Return the text of a record without template, or None where only token ids are known.

    Prompt and completion are concatenated if both are strings; chat messages are joined by
    newlines. Of a preference pair it is the prompt and the chosen side.

    Raises:
        ConfigurationError: if the record, or a field of it, has no accepted shape.

    >>> record_text({"messages": [{"role": "user", "content": "Hi"}]})
    'Hi'
    """
    if isinstance(record, str):
        return record
    kind = record_kind(record)
    if kind == "tokenized":
        return None
    fields = _scored_fields(record, kind)
    is_chat = not all(isinstance(record[field], str) for field in fields)
    return ("\n" if is_chat else "").join(_plain_text(record, field) for field in fields)


def record_key(record: Record) -> str:
    """Return the SHA-256 hex digest of the normalized content: equal for duplicates.

    Text is compared after NFKC, case folding and collapsing of white space; tokenized rows by the
    token ids that the attention mask keeps; chats by roles and contents; preference pairs by the
    prompt and the chosen side: one that is trained on with another rejected side makes the chosen side
    likelier all the same, and is no non-member. Labels, tools and template settings do not count.

    Raises:
        ConfigurationError: if the record, or a field of it, has no accepted shape.

    >>> record_key("One  record.") == record_key({"text": "one record."})
    True
    """
    kind = record_kind(record)
    content: object
    if isinstance(record, str):
        content = _normalized(record)
    elif kind == "tokenized":
        content = attended_tokens(record)
        # The same words about another image are another record.
        if record.get(INPUTS_DIGEST) is not None:
            content = [content, str(record[INPUTS_DIGEST])]
    elif kind == "text":
        content = _normalized(_plain_text(record, "text"))
    else:
        content = [_normalized_turns(record, field) for field in _scored_fields(record, kind)]
    return _digest([kind, content])


def exact_key(record: Record) -> str:
    """Return the SHA-256 hex digest of everything that decides how the record is scored.

    Unlike `record_key`, case, white space, labels, masks, tools and template settings count.

    >>> exact_key("One record.") == exact_key("one record.")
    False
    """
    return _digest(canonical_record(record))


def is_empty(record: Record) -> bool:
    """Tell whether nothing in the record could be trained on and scored.

    That is: no text but white space (in the completion or the chosen side, where there is one), no
    token that the attention mask keeps, or no label other than -100, on the rejected side of a
    tokenized pair, too.

    Raises:
        ConfigurationError: if the record, or a field of it, has no accepted shape.

    >>> is_empty({"input_ids": [5, 6], "labels": [-100, -100]})
    True
    """
    if isinstance(record, str):
        return not record.strip()
    kind = record_kind(record)
    if kind == "tokenized":
        has_tokens = bool(attended_tokens(record)) and _has_target(record, "labels")
        if is_pair(record):
            has_tokens = has_tokens and bool(_integers(record, REJECTED_IDS))
            has_tokens = has_tokens and _has_target(record, REJECTED_LABELS)
        return not has_tokens
    return not _plain_text(record, _scored_fields(record, kind)[-1]).strip()


def canonical_record(record: Record) -> Record:
    """Return the record with only the fields that matter, and token columns as plain lists.

    The result holds no array or tensor and none of the row's other columns, and it pickles.

    Raises:
        ConfigurationError: if the record has no accepted shape, or its token columns differ in
            length.

    >>> canonical_record({"input_ids": (5, 6), "text": "a b", "source": "web"})
    {'input_ids': [5, 6]}
    """
    if isinstance(record, str):
        return record
    kind = record_kind(record)
    fields = [
        field
        for field in (*_REQUIRED_FIELDS[kind], *_OPTIONAL_FIELDS[kind])
        if record.get(field) is not None or field in _REQUIRED_FIELDS[kind]
    ]
    if kind != "tokenized":
        return {field: record[field] for field in fields}
    columns = {
        field: _integers(record, field) for field in fields if field not in (FURTHER_INPUTS, INPUTS_DIGEST)
    }
    inputs = _further_inputs(record)
    lengths = {field: len(column) for field, column in (columns | inputs).items()}
    of_rejected = {lengths.pop(field) for field in (REJECTED_IDS, REJECTED_LABELS) if field in lengths}
    if len(set(lengths.values())) > 1 or len(of_rejected) > 1:
        lengths = {field: len(column) for field, column in (columns | inputs).items()}
        raise ConfigurationError(
            f"Got token columns of different lengths, {lengths}; they need one value per token: "
            "tokenize the row again."
        )
    digest = {} if record.get(INPUTS_DIGEST) is None else {INPUTS_DIGEST: str(record[INPUTS_DIGEST])}
    return columns | ({FURTHER_INPUTS: inputs} if inputs else {}) | digest


def fingerprint(keys: Iterable[str]) -> str:
    """Return 16 hex digits that stand for an ordered list of keys.

    >>> fingerprint(["a", "b"]) == fingerprint(["b", "a"])
    False
    """
    return _digest(list(keys))[:16]


def _scored_fields(record: Mapping[str, object], kind: RecordKind) -> tuple[str, ...]:
    """Return the fields that make up the scored sequence, the one that is learned last."""
    if kind != "preference":
        return _REQUIRED_FIELDS[kind]
    return ("chosen",) if record.get("prompt") is None else ("prompt", "chosen")


def _digest(content: object) -> str:
    # JSON keeps the borders between fields, and escapes the lone surrogates UTF-8 refuses.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _plain_text(record: Mapping[str, object], field: str) -> str:
    return "\n".join(content for _, content in _turns(record, field))


def _normalized_turns(record: Mapping[str, object], field: str) -> list[list[str]]:
    return [[_normalized(role), _normalized(content)] for role, content in _turns(record, field)]


def _turns(record: Mapping[str, object], field: str) -> list[tuple[str, str]]:
    """Return (role, content) pairs; a plain string is one turn without a role."""
    value = record[field]
    if value is None:
        return []
    if isinstance(value, str) and field != "messages":
        return [("", value)]
    if field != "text" and isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        messages = list(value)
        if all(isinstance(message, Mapping) and "role" in message for message in messages):
            return [(str(message["role"]), _message_text(message)) for message in messages]
    needed = {
        "text": "a string",
        "messages": "a list of {'role', 'content'} mappings",
    }.get(field, "a string or a list of {'role', 'content'} mappings")
    raise ConfigurationError(
        f"Got a {type(value).__name__} in the field '{field}' of a record, which needs {needed}: "
        "map the rows first, one record per row."
    )


def _message_text(message: Mapping[str, object]) -> str:
    content = message.get("content")
    parts = [content] if isinstance(content, str) else []
    if isinstance(content, list | tuple):
        # Content in parts: [{"type": "text", "text": ...}, {"type": "image", ...}].
        parts = [str(part["text"]) for part in content if isinstance(part, Mapping) and part.get("text")]
    if message.get("tool_calls"):
        parts.append(json.dumps(message["tool_calls"], sort_keys=True, default=str))
    return "\n".join(parts)


def attended_tokens(record: Mapping[str, object]) -> list[int]:
    """Return the token ids of a tokenized record that are no padding.

    Raises:
        ConfigurationError: if the attention mask has another length.

    >>> attended_tokens({"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]})
    [5, 6]
    """
    tokens = _integers(record, "input_ids")
    mask = _optional_integers(record, "attention_mask")
    if mask is None:
        mask = _optional_integers(_further_inputs(record), "attention_mask")
    if mask is None:
        return tokens
    if len(mask) != len(tokens):
        raise ConfigurationError(
            f"Got {len(tokens)} input_ids and {len(mask)} attention_mask values in a record, which "
            "needs one per token: tokenize the row again."
        )
    return [token for token, is_attended in zip(tokens, mask, strict=True) if is_attended]


def _has_target(record: Mapping[str, object], field: str) -> bool:
    labels = _optional_integers(record, field)
    return labels is None or any(label != IGNORED_LABEL for label in labels)


def _further_inputs(record: Mapping[str, object]) -> dict[str, list[float]]:
    """Return the further inputs, whatever arrays they came as, as plain lists."""
    inputs = record.get(FURTHER_INPUTS)
    if inputs is None:
        return {}
    needed = "a mapping from a name to one number per token"
    if not isinstance(inputs, Mapping):
        raise ConfigurationError(f"Got a {type(inputs).__name__} as `{FURTHER_INPUTS}`; {needed} is needed.")
    columns = {
        name: values.tolist() if hasattr(values, "tolist") else values for name, values in inputs.items()
    }
    for name, values in columns.items():
        is_flat = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
        if not is_flat or any(not -_INT64 <= v < _INT64 for v in values):
            raise ConfigurationError(f"Got {name!r:.40} in `{FURTHER_INPUTS}`, which is not {needed}.")
    return {name: list(values) for name, values in columns.items()}


def _optional_integers(record: Mapping[str, object], field: str) -> list[int] | None:
    return None if record.get(field) is None else _integers(record, field)


def _integers(record: Mapping[str, object], field: str) -> list[int]:
    """Return a token column as a list, whatever array or tensor it came as."""
    value = record[field]
    if value is None:
        return []
    values = value.tolist() if hasattr(value, "tolist") else value
    try:
        integers = [operator.index(item) for item in cast(Iterable[SupportsIndex], values)]
        if integers and not -_INT64 <= min(integers) <= max(integers) < _INT64:
            raise TypeError
        return integers
    except TypeError:
        raise ConfigurationError(
            f"Got a {type(value).__name__} in the field '{field}' that is not a flat sequence of "
            "integers of 64 bits; a record is one row without a batch dimension: index or flatten it first."
        ) from None
