"""What a run's collator makes of one row: the tokens that the model gets, and which of them are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ezmia_callbacks.canaries.records import IGNORED_LABEL
from ezmia_callbacks.errors import ConfigurationError

__all__: list[str] = []

Row = Mapping[str, Any]
Collate = Callable[[list[dict[str, Any]]], Any]


def collated(row: Row, collate: Collate) -> Row:
    """One row as the collator hands it to the model: input ids and labels, without padding.

    Of a preference pair it is the prompt, without loss, and the chosen side.

    Raises:
        ConfigurationError: if the collator fails on the row, or returns no labels for it.
    """
    try:
        batch = collate([dict(row)])
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
