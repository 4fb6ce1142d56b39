"""By what a canary is recognized in a batch: windows of tokens that no other canary has.

A window is known by a 64-bit hash, computed alike by NumPy for the canaries and by torch for the batches, on
the model's own device: products and sums that wrap around, so that every bit is the same on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.scoring.rows import TokenRow

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64

__all__: list[str] = []

WINDOW = 8
"""Tokens in a window."""

# Of a longer record so many are looked for, at equal distances: a table of 1,500 records stays below 5 MB.
_MAX_WINDOWS = 128

# Odd numbers without a pattern.
_MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x2E7D7B1D3DF1B3A3
_BASE = 0x2545F4914F6CDD1D
_BASE_INVERSE = pow(_BASE, -1, 2**64)


@dataclass(frozen=True, eq=False)
class WindowTable:
    """What to look for in batches.

    Attributes:
        hashes: int64, (n_windows,), sorted: of windows that occur once in one canary and in no other.
        owners: int64, (n_windows,): the canary of each.
        starts: int64, (n_windows,): where in it the window begins.
        keys: int64, (n_windows,): a random number for each, that makes the windows of a record add up to
            `sums` only if each was there as often as the others.
        n_windows: int64, (n_canaries,): windows of each canary; 0 if it has none of its own.
        sums: int64, (n_canaries,): sum of the keys of its windows, wrapped.
        row_hashes: int64, (n_rows,), sorted: of the whole rows of canaries without a window.
        row_owners: int64, (n_rows,): the canary of each.
        n_tokens: int64, (n_canaries,): tokens of each canary.
    """

    hashes: Int64[np.ndarray, " n_windows"]
    owners: Int64[np.ndarray, " n_windows"]
    starts: Int64[np.ndarray, " n_windows"]
    keys: Int64[np.ndarray, " n_windows"]
    n_windows: Int64[np.ndarray, " n_canaries"]
    sums: Int64[np.ndarray, " n_canaries"]
    row_hashes: Int64[np.ndarray, " n_rows"]
    row_owners: Int64[np.ndarray, " n_rows"]
    n_tokens: Int64[np.ndarray, " n_canaries"]


def window_table(rows: Sequence[TokenRow]) -> WindowTable:
    """What to look for in batches so as to find these rows.

    All windows up to the last token that carries loss are looked for, those of a prompt among them: a short
    answer alone is no record's own. Rows that are equal cannot be told apart, and are never found.

    Args:
        rows: The canaries, as training feeds them.
    """
    found = [_windows(row) for row in rows]
    hashes = np.concatenate([each[0] for each in found])
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    is_unique = counts[inverse] == 1
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    at = 0
    for own_hashes, is_trained in found:
        own = np.flatnonzero(is_trained & is_unique[at : at + len(own_hashes)])
        at += len(own_hashes)
        if len(own) > _MAX_WINDOWS:
            own = own[np.linspace(0, len(own) - 1, _MAX_WINDOWS).round().astype(np.int64)]
        kept.append((own_hashes[own], own))
    n_windows = np.array([len(own) for _, own in kept], dtype=np.int64)
    owners = np.repeat(np.arange(len(rows)), n_windows)
    hashes = np.concatenate([each for each, _ in kept])
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=len(hashes), dtype=np.int64)
    sums = np.zeros(len(rows), dtype=np.int64)
    np.add.at(sums, owners, keys)
    order = np.argsort(hashes)
    row_hashes, row_owners = _whole_rows(rows, n_windows == 0)
    return WindowTable(
        hashes=hashes[order],
        owners=owners[order],
        starts=np.concatenate([own for _, own in kept])[order],
        keys=keys[order],
        n_windows=n_windows,
        sums=sums,
        row_hashes=row_hashes,
        row_owners=row_owners,
        n_tokens=np.array([int(row.attention_mask.sum()) for row in rows], dtype=np.int64),
    )


def end_is_uncertain_by(n_tokens: Int64[np.ndarray, " n_canaries"]) -> Int64[np.ndarray, " n_canaries"]:
    """Tokens by which the end of what was fed of a record is uncertain: not all windows are looked for."""
    return WINDOW + -(-n_tokens // _MAX_WINDOWS)


def mixed(ids: Any) -> Any:
    """Token ids, of NumPy or torch, as numbers without a pattern."""
    ids = (ids + 1) * _MIX_1
    ids = (ids ^ (ids >> 31)) * _MIX_2
    return ids ^ (ids >> 29)


def powers(n: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """The first powers of the base, and those of its inverse, wrapped."""
    return _powers(_BASE, n), _powers(_BASE_INVERSE, n)


def _powers(base: int, n: int) -> Int64[np.ndarray, " n"]:
    with np.errstate(over="ignore"):
        factors = np.full(n, base % 2**64, dtype=np.uint64)
        factors[:1] = 1
        return np.cumprod(factors, dtype=np.uint64).view(np.int64)


def prefix_sums(ids: Int64[np.ndarray, " length"]) -> Int64[np.ndarray, " length_plus_1"]:
    """Sums of mixed tokens, each times a power of the base; hashes are differences of them."""
    with np.errstate(over="ignore"):
        terms = mixed(ids) * powers(len(ids))[0]
        return np.concatenate([[0], np.cumsum(terms, dtype=np.int64)]).astype(np.int64)


def _windows(row: TokenRow) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Hash of every window of a row, and whether it ends no later than the last token that carries loss."""
    ids, is_trained = _attended(row)
    n = len(ids) - WINDOW + 1
    if n <= 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
    sums = prefix_sums(ids)
    with np.errstate(over="ignore"):
        hashes = (sums[WINDOW:] - sums[:-WINDOW]) * powers(n)[1]
    return hashes, is_trained[WINDOW - 1 :]


def _attended(row: TokenRow) -> tuple[Int64[np.ndarray, " length"], Bool[np.ndarray, " length"]]:
    """The tokens of a row without its padding, and which come no later than the last that carries loss."""
    is_attended = row.attention_mask != 0
    is_trained = np.concatenate([[False], row.is_scored])[is_attended]
    is_until_last = np.logical_or.accumulate(is_trained[::-1])[::-1]
    return row.input_ids[is_attended], is_until_last


def _whole_rows(
    rows: Sequence[TokenRow], is_without: Bool[np.ndarray, " n_canaries"]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    owners = np.flatnonzero(is_without)
    hashes = np.array([prefix_sums(_attended(rows[i])[0])[-1] for i in owners.tolist()], dtype=np.int64)
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    is_unique = counts[inverse] == 1
    owners, hashes = owners[is_unique], hashes[is_unique]
    order = np.argsort(hashes)
    return hashes[order], owners[order]
