"""How a canary becomes a training row: in the shape of the other rows, on the side that carries loss."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezmia_callbacks.canaries.records import IGNORED_LABEL, LOSS_MASKS, Record, RecordKind, record_text
from ezmia_callbacks.errors import ConfigurationError

__all__: list[str] = []


@dataclass(frozen=True)
class TokenFrame:
    """What surrounds the canary's tokens in a tokenized row.

    Attributes:
        prompt: Token ids that carry no loss, before the canary.
        first: Token id before the canary that does, such as a begin-of-text token.
        last: Token id behind it, such as an end-of-text token.
        row_length: Length of every row, if all are equally long.
        padding: Token id that fills rows up to that length; None where rows are full.
        is_padded_left: Whether it stands before the others.
    """

    prompt: tuple[int, ...]
    first: int | None
    last: int | None
    row_length: int | None
    padding: int | None
    is_padded_left: bool

    def n_content(self, length: int) -> int:
        """Number of tokens that a canary of so many tokens can have in these rows.

        Raises:
            ConfigurationError: if the rows leave no room.
        """
        if self.row_length is None:
            return length
        room = self.row_length - len(self.prompt) - (self.first is not None) - (self.last is not None)
        if room < 2:
            raise ConfigurationError(
                f"Training rows of {self.row_length} tokens leave room for only {room} canary tokens after "
                f"{len(self.prompt)} tokens without loss; 2 are needed: use longer rows."
            )
        # Full rows, as packing makes them, have no token that could fill the rest.
        return room if self.padding is None else min(length, room)


def learned_units(record: Record, kind: RecordKind) -> list[str] | list[int]:
    """Return the words, or token ids, of a training row that carry loss."""
    if kind == "tokenized":
        row = _tokens(record)
        ids: list[int] = row.ids[row.is_learned].tolist()
        return ids
    if isinstance(record, str):
        return record.split()
    field = {"prompt_completion": "completion", "preference": "chosen"}.get(kind, kind)
    value: Any = record[field]
    if not isinstance(value, str):
        turns = [turn for turn in value if turn["role"] == "assistant"]
        value = record_text({"messages": turns[-1:]})
    return str(value).split()


def text_row(host: Any, kind: RecordKind, text: str, *, other_text: str, prompt: str) -> Any:
    """Return a row like `host` whose trained side is the text.

    Args:
        host: Any training row. Columns without a part in the record, such as a source or a weight, are
            copied from it.
        kind: Its shape, not `tokenized`.
        text: What the canary says.
        other_text: What the rejected side of a preference pair says.
        prompt: What the canary answers to, where rows have a prompt.

    Raises:
        ConfigurationError: if a conversation of `host` has no assistant turn.
    """
    if isinstance(host, str):
        return _spaced_like(text, host)
    row = dict(host)
    if row.get("tools") is not None:
        row["tools"] = None
    if kind == "text":
        return row | {"text": _spaced_like(text, host["text"])}
    if kind == "messages":
        return row | {"messages": _conversation(host["messages"], prompt, text)}
    answer = {"prompt_completion": ("completion",), "preference": ("chosen", "rejected")}[kind]
    has_prompt = host.get("prompt") is not None
    if has_prompt:
        is_text = isinstance(host["prompt"], str)
        like = host["prompt"]
        row["prompt"] = _spaced_like(prompt, like) if is_text else [_turn(_first_user(like), prompt)]
    for field, said in zip(answer, (text, other_text), strict=False):
        like = host[field]
        if isinstance(like, str):
            row[field] = _spaced_like(said if has_prompt else f"{prompt} {said}", like)
        else:
            turns = _conversation(like, prompt, said)
            row[field] = turns[-1:] if has_prompt else turns
    return row


def token_frame(rows: Sequence[Record]) -> TokenFrame:
    """Return what tokenized training rows have around their learned tokens.

    The first and the last learned token belong to the frame if more than half of the rows share them. The
    shortest prompt among the rows becomes that of all canaries.
    """
    parts = [_tokens(row) for row in rows]
    learned = [part.ids[part.is_learned] for part in parts if part.is_learned.any()]
    prompts = [
        part.ids[part.is_attended & (np.cumsum(part.is_learned) == 0)]
        for part in parts
        if part.is_learned.any()
    ]
    if not learned:
        raise ConfigurationError(
            "No token of the training rows carries loss: canaries would not be learned. Check labels and "
            "masks."
        )
    lengths = {len(part.ids) for part in parts}
    padded = [part for part in parts if not part.is_attended.all()]
    return TokenFrame(
        prompt=tuple(min(prompts, key=len).tolist()),
        first=_common([int(ids[0]) for ids in learned]),
        last=_common([int(ids[-1]) for ids in learned]),
        row_length=lengths.pop() if len(lengths) == 1 else None,
        padding=int(padded[0].ids[~padded[0].is_attended][0]) if padded else None,
        is_padded_left=bool(padded) and not padded[0].is_attended[0],
    )


def token_row(host: Mapping[str, Any], content: Sequence[int], frame: TokenFrame) -> dict[str, Any]:
    """Return a tokenized row like `host`, with its columns and their types, that holds the content.

    Raises:
        ConfigurationError: if a column holds a value per token and is not known.
    """
    learned = [token for token in (frame.first, *content, frame.last) if token is not None]
    n_padding = (
        0
        if frame.padding is None or frame.row_length is None
        else (frame.row_length - len(frame.prompt) - len(learned))
    )

    def filled(prompt: Sequence[int], body: Sequence[int], padding: int) -> list[int]:
        rest = [padding] * n_padding
        return [*rest, *prompt, *body] if frame.is_padded_left else [*prompt, *body, *rest]

    n_prompt = len(frame.prompt)
    mask = filled([0] * n_prompt, [1] * len(learned), 0)
    ids = filled(frame.prompt, learned, frame.padding or 0)
    values: dict[str, list[int] | int] = {
        "input_ids": ids,
        "labels": filled([IGNORED_LABEL] * n_prompt, learned, IGNORED_LABEL),
        "attention_mask": filled([1] * n_prompt, [1] * len(learned), 0),
        **dict.fromkeys(LOSS_MASKS, mask),
        "token_type_ids": [0] * len(ids),
        "special_tokens_mask": [0] * len(ids),
        "position_ids": list(range(len(ids))),
        "seq_lengths": [len(ids)],
        "length": len(ids),
    }
    row = dict(host)
    for name, example in host.items():
        if name in values and example is not None:
            row[name] = _like(values[name], example)
        elif (
            name not in values and not isinstance(example, str) and _length(example) == len(host["input_ids"])
        ):
            raise ConfigurationError(
                f"The column '{name}' seems to hold one value per token, and which values a canary needs is "
                "unknown: remove the column, or insert the canaries before it is added."
            )
    return row


@dataclass(frozen=True, eq=False)
class _Tokens:
    ids: NDArray[np.int64]
    is_attended: NDArray[np.bool_]
    is_learned: NDArray[np.bool_]


def _tokens(record: Any) -> _Tokens:
    ids = np.asarray(record["input_ids"], dtype=np.int64)
    mask = record.get("attention_mask")
    is_attended = np.ones(len(ids), np.bool_) if mask is None else np.asarray(mask).astype(np.bool_)
    is_learned = is_attended.copy()
    if record.get("labels") is not None:
        is_learned &= np.asarray(record["labels"]) != IGNORED_LABEL
    for name in LOSS_MASKS:
        if record.get(name) is not None:
            is_learned &= np.asarray(record[name]).astype(np.bool_)
    return _Tokens(ids, is_attended, is_learned)


def _common(tokens: Sequence[int]) -> int | None:
    token, n_rows = Counter(tokens).most_common(1)[0]
    return token if 2 * n_rows > len(tokens) else None


def _like(values: list[int] | int, example: Any) -> Any:
    """Return the values in the container and the element type of the example."""
    if hasattr(example, "new_tensor"):
        return example.new_tensor(values)
    if isinstance(example, np.ndarray):
        return np.asarray(values, dtype=example.dtype)
    if isinstance(values, int):
        return values
    if isinstance(example, list | tuple):
        of_type = bool if len(example) and isinstance(example[0], bool) else int
        return type(example)(of_type(value) for value in values)
    return values


def _length(value: Any) -> int | None:
    return len(value) if hasattr(value, "__len__") and not isinstance(value, Mapping) else None


def _conversation(like: Any, prompt: str, text: str) -> list[dict[str, Any]]:
    assistants = [turn for turn in like if turn["role"] == "assistant"]
    if not assistants:
        raise ConfigurationError(
            f"Got a conversation of {len(like)} turns, none with the role 'assistant'; a canary is placed in "
            "the last one that has it: rename the roles."
        )
    return [_turn(_first_user(like), prompt), _turn(assistants[-1], text)]


def _first_user(turns: Any) -> Mapping[str, Any]:
    users = [turn for turn in turns if turn["role"] not in ("assistant", "system")]
    return users[0] if users else {**turns[0], "role": "user"}


def _turn(like: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return a turn of the same role and keys; what is neither role nor content stays empty."""
    content = like.get("content")
    said: Any = text
    if isinstance(content, list | tuple):
        part = next((part for part in content if part.get("text")), {"type": "text"})
        said = [{**dict.fromkeys(part), "type": "text", "text": text}]
    return {**dict.fromkeys(like), "role": like["role"], "content": said}


def _spaced_like(text: str, example: str) -> str:
    """Return the text with the white space that the example begins and ends with."""
    body = example.strip()
    if not body:
        return text
    begin = example.index(body)
    return example[:begin] + text + example[begin + len(body) :]
