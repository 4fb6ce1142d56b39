"""What a run's collator makes of rows: the tokens that the model gets, what else, and which are trained."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ezmia_callbacks.canaries.records import FURTHER_INPUTS, IGNORED_LABEL, REJECTED_IDS, REJECTED_LABELS
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.safe_text import describe_columns, describe_error, describe_row

__all__: list[str] = []

Row = Mapping[str, Any]
Collate = Callable[[list[dict[str, Any]]], Any]

MASK = "attention_mask"

# Of a batch, what says which tokens are trained, or how many; the model reads the records without.
_TRAINING_ONLY = frozenset(
    {
        "input_ids",
        MASK,
        "labels",
        "completion_mask",
        "assistant_masks",
        "loss_mask",
        "shift_labels",
        "num_items_in_batch",
        "length",
        "return_loss",
        "use_cache",
    }
)

# Where batches are one row of all records, what says where each begins: of one record alone it says nothing.
BORDERS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


class FedRow(NamedTuple):
    """One row as the collator hands it to the model.

    Attributes:
        record: Input ids and labels without padding.
        padded: The same with the padding that it was given, and further inputs of its tokens.
        is_plain: Whether `record` is all that the model learns from, so that it can be scored alone.
        batch_names: Further inputs that are no values of tokens.
    """

    record: Row
    padded: Row
    is_plain: bool
    batch_names: frozenset[str]


def fed_row(row: Row, collate: Collate) -> FedRow:
    """One row as the collator hands it to the model in a batch of its own.

    Of a preference pair both sides are, each after the prompt, which carries no loss.

    Raises:
        ConfigurationError: if the collator fails on the row, or returns no labels for it.
    """
    columns = _columns([row], collate)
    is_pair = "chosen_ids" in row
    mask_name = "completion_mask" if is_pair else "labels"
    if "input_ids" not in columns or columns.get(mask_name) is None:
        raise ConfigurationError(
            f"The trainer's collator returns no `labels` (got {describe_columns(columns)}): without them "
            "there is no telling which tokens are trained. Use DataCollatorForLanguageModeling(tokenizer, "
            "mlm=False), or give every row a `labels` column. Of TRL's trainers, SFTTrainer (TRL 0.17 or "
            "newer) and DPOTrainer (TRL 0.29 or newer) can be audited."
        )
    if is_pair:
        # The trainer takes the batch apart, and what else is in it is its own.
        sides = _side(columns, 0) + _side(columns, 1)
        record = dict(zip(("input_ids", "labels", REJECTED_IDS, REJECTED_LABELS), sides, strict=True))
        return FedRow(record, record, True, frozenset())
    ids, labels = (_only(columns[name]) for name in ("input_ids", "labels"))
    if columns.get(MASK) is not None:
        is_attended = _only(columns[MASK]) != 0
    else:
        # Without a mask, padding can only be what the row did not have.
        is_attended = np.arange(len(ids)) < len(row.get("input_ids", ids))
    return _fed(ids, labels, is_attended, columns, shape=_shape(columns["input_ids"]), index=0)


def fed_batch(rows: Sequence[Row], collate: Collate) -> list[FedRow] | None:
    """Several rows as the collator hands them to the model in one batch; None if it makes one row of them.

    Raises:
        ConfigurationError: if the collator fails on the rows.
    """
    columns = _columns(rows, collate)
    shape = _shape(columns["input_ids"])
    if len(shape) != 2 or shape[0] != len(rows) or columns.get(MASK) is None:
        return None
    ids, labels, masks = (np.asarray(_list_of(columns[name])) for name in ("input_ids", "labels", MASK))
    return [_fed(ids[i], labels[i], masks[i] != 0, columns, shape=shape, index=i) for i in range(len(rows))]


def made_for_batch(rows: Iterable[Row], collate: Collate) -> dict[str, Any]:
    """The token ids of a batch and its further inputs, as the collator makes them; each time the same.

    Collators and datasets may draw random numbers, as image augmentation does: from the same seed for every
    batch, for what is compared has to be made alike. To be called where random states are put back.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    # Of the processor alone: `torch.manual_seed` would reach generators that nobody puts back.
    torch.default_generator.manual_seed(0)
    columns = _columns(list(rows), collate)
    return {name: columns[name] for name in ["input_ids", *_further(columns)]}


def digest_of(value: Any) -> str:
    """16 hexadecimal digits that stand for an image, a tensor, or whatever holds some."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()[:16]


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name, item in sorted(value.items()):
            digest.update(str(name).encode())
            _update(digest, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _update(digest, item)
    elif isinstance(value, str | bytes | int | float | None):
        digest.update(repr(value).encode())
    else:
        # Tensors of bfloat16 are no arrays.
        array = np.asarray(value.float().cpu() if isinstance(value, torch.Tensor) else value)
        digest.update(str(array.shape).encode() + array.tobytes())


def _columns(rows: Sequence[Row], collate: Collate) -> Mapping[str, Any]:
    try:
        batch = collate([dict(row) for row in rows])
    except Exception as error:
        n_canaries = "one canary" if len(rows) == 1 else f"{len(rows)} canaries"
        # Rows of different lengths, of which a batch fails, need not be told from each other further.
        held = " And another: ".join(list(dict.fromkeys(map(describe_row, rows)))[:2])
        raise ConfigurationError(
            f"The trainer's collator cannot make a batch of {n_canaries} with {held}. "
            f"{describe_error(error)}. Draw the canaries from the dataset that the trainer is given."
        ) from error
    return batch if isinstance(batch, Mapping) else {}


def _fed(
    ids: np.ndarray,
    labels: np.ndarray,
    is_attended: np.ndarray,
    columns: Mapping[str, Any],
    *,
    shape: tuple[int, ...],
    index: int,
) -> FedRow:
    attended = np.flatnonzero(is_attended)
    record = {"input_ids": ids[attended].tolist(), "labels": labels[attended].tolist()}
    further = _further(columns)
    of_tokens = {
        name: np.asarray(_list_of(columns[name])).reshape(shape[0] if len(shape) == 2 else 1, -1)[index]
        for name in further
        if _is_of_tokens(columns[name], shape)
    }
    positions = of_tokens.get("position_ids")
    counts_from_0 = positions is not None and np.array_equal(positions[attended], np.arange(len(attended)))
    # To the last token that is no padding: what follows changes nothing before it.
    n = int(attended[-1]) + 1 if len(attended) else 0
    has_own_padding = n > len(attended) and not counts_from_0
    kept = slice(0, n) if has_own_padding else attended
    inputs = {name: values[kept].tolist() for name, values in of_tokens.items()}
    if has_own_padding:
        inputs[MASK] = is_attended[kept].astype(int).tolist()
    padded = {
        "input_ids": ids[kept].tolist(),
        "labels": np.where(is_attended, labels, IGNORED_LABEL)[kept].tolist(),
        **({FURTHER_INPUTS: inputs} if inputs else {}),
    }
    batch_names = frozenset(further) - set(of_tokens)
    if counts_from_0:
        batch_names -= BORDERS
    changes_something = set(inputs) - ({"position_ids"} if counts_from_0 else set())
    return FedRow(record, padded, not (changes_something or batch_names), batch_names)


def _further(columns: Mapping[str, Any]) -> list[str]:
    return [name for name, value in columns.items() if name not in _TRAINING_ONLY and value is not None]


def _is_of_tokens(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether it is a number for each token."""
    is_array = isinstance(value, torch.Tensor | np.ndarray | list)
    return is_array and _shape(value) == shape and np.asarray(_list_of(value)).dtype.kind in "biuf"


def _shape(value: Any) -> tuple[int, ...]:
    """Its shape as an array; of lists of different lengths the empty one."""
    try:
        return tuple(value.shape) if hasattr(value, "shape") else np.shape(value)
    except ValueError:
        return ()


def _list_of(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


def _side(columns: Mapping[str, Any], index: int) -> tuple[list[int], list[int]]:
    """Input ids and labels of a side of a preference pair; the chosen one is first."""
    ids, has_loss = (_rows(columns[name], n_rows=2)[index] for name in ("input_ids", "completion_mask"))
    is_attended = np.ones_like(ids, dtype=np.bool_)
    if columns.get(MASK) is not None:
        is_attended = _rows(columns[MASK], n_rows=2)[index] != 0
    labels = np.where(has_loss != 0, ids, IGNORED_LABEL)
    return ids[is_attended].tolist(), labels[is_attended].tolist()


def _only(values: Any) -> np.ndarray:
    """The only row of a batch, or a bare row, from a list, an array or a tensor."""
    return np.asarray(_rows(values, n_rows=1)[0])


def _rows(values: Any, *, n_rows: int) -> np.ndarray:
    """The rows of a batch; a bare row is one."""
    array = np.asarray(_list_of(values))
    if array.ndim == 2 and len(array) == n_rows:
        return array
    if array.ndim == 1 and n_rows == 1:
        return array[None]
    raise ConfigurationError(
        f"The trainer's collator makes an array of shape {array.shape} of one record, and {n_rows} rows of "
        "tokens are needed: audit checkpoints with PrivacyAuditor and tokenized canaries instead."
    )
