"""Canaries in the very form in which a run's dataset has its rows: its types, and all of its columns.

Collators are written for the rows of their own dataset. Many take tensors alone, as `pad_sequence` does, and
many read columns that are no part of a record.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ezmia_callbacks.canaries.sets import RowsByNumber

__all__: list[str] = []

Row = Mapping[str, Any]


class AsStored(Sequence[Row]):
    """Records as the rows of a training set, each made when it is asked for.

    A value is a tensor, an array or a list where that of the first training row is, of the same data type.
    The collator gets of canaries the columns that it gets of training rows, and no more.

    Args:
        records: The records as rows.
        taken_from: The rows that they were taken from, with all their columns; None if unknown.
        training: The training set.
        first: Its first row; None if there is none, or if it is a stream.
    """

    def __init__(
        self, records: Sequence[Row], taken_from: Sequence[Any] | None, *, training: Any, first: Row | None
    ) -> None:
        self._records = records
        self._taken_from = taken_from
        self._first = first or {}
        self._columns = _columns_known(taken_from, training, first)
        known = {name for record in records for name in record}
        # A lazy dataset would make each row anew.
        self._is_read = self._columns is None or not (self._first and self._columns <= known)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        record, stored = self._records[index], self._stored(index)
        columns = self._columns
        others = {k: v for k, v in stored.items() if columns is None or k in columns}
        forms = {**stored, **{name: value for name, value in self._first.items() if value is not None}}
        return {name: _like(value, forms.get(name)) for name, value in {**others, **record}.items()}

    def _stored(self, index: int) -> Row:
        if self._taken_from is None or not self._is_read:
            return {}
        stored = self._taken_from[index]
        return stored if isinstance(stored, Mapping) else {}


def columns_of(training: Any, first: Any) -> frozenset[str]:
    """The columns of a training set, as far as they are known.

    Args:
        training: The training set.
        first: Its first row; None if it is unknown.
    """
    names = first if isinstance(first, Mapping) else getattr(training, "column_names", None)
    return frozenset(names or ())


def _columns_known(
    taken_from: Sequence[Any] | None, training: Any, first: Row | None
) -> frozenset[str] | None:
    """The columns that reach the collator of training rows; None if these are all that a row has."""
    is_own = isinstance(taken_from, RowsByNumber) and _is_part_of(training, taken_from.dataset)
    # Rows of a dataset of the user's need not have the same columns.
    has_columns = hasattr(training, "column_names")
    return None if is_own and not has_columns else columns_of(training, first)


def _is_part_of(rows: Any, dataset: Any) -> bool:
    while rows is not dataset and hasattr(rows, "dataset"):
        rows = rows.dataset
    return rows is dataset


def _like(value: Any, other: Any) -> Any:
    """Numbers in the type of others: as a tensor, an array, a list or a tuple; all else as it is."""
    if not isinstance(value, int | float | list | tuple | np.ndarray | torch.Tensor):
        return value
    if isinstance(other, torch.Tensor):
        return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=other.dtype)
    if isinstance(other, np.ndarray):
        return np.asarray(value, dtype=other.dtype)
    if isinstance(other, list | tuple):
        values = value if isinstance(value, int | float | list | tuple) else value.tolist()
        return type(other)(values) if isinstance(values, list | tuple) else values
    return value
