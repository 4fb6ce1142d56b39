"""Whether token rows are records, or blocks cut from running text as `run_clm.py` cuts them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

__all__: list[str] = []

Row: TypeAlias = Sequence[int] | np.ndarray | Mapping[str, Any]
"""Token ids, alone or under `input_ids` with or without `attention_mask`."""

# With fewer or shorter rows chance alone makes what looks like blocks.
_FEWEST_ROWS, _SHORTEST_BLOCK = 20, 16
# The last block of a split may be shorter, if it is kept at all.
_EQUAL_SHARE = 0.95
# Blocks of long texts hold few ends of text; texts that name the token, or are cut behind it, hardly any.
_FEWEST_WITH_END_INSIDE, _SHARE_WITH_END_INSIDE = 3, 0.05
# Records end with the end of text, or begin alike: with a token of beginning, or with that of a template.
_SHARE_AS_RECORDS = 0.5


def cut_from_running_text(rows: Sequence[Row], *, end_of_text: int | Sequence[int] | None) -> str | None:
    """What to say of rows that are blocks cut from running text; None where nothing shows that.

    Blocks all have one length and no padding, and texts end inside of them. Records that were cut to one
    length have no end inside; chats have, and all begin alike. Text that was joined without a token between
    its records cannot be told from such records, and nothing is said of it.

    Args:
        rows: Token rows.
        end_of_text: The id, or ids, of the tokens with which a text ends; None if unknown.

    >>> text = ([5, 6, 7, 8, 9, 2] * 200)[:1000]
    >>> blocks = [text[i : i + 20] for i in range(0, 1000, 20)]
    >>> cut_from_running_text(blocks, end_of_text=2)[:58]
    'All 50 rows have 20 tokens, no padding, and on average 3 e'
    """
    ends = _ids(end_of_text)
    if len(rows) < _FEWEST_ROWS or not len(ends) or any(_is_padded(row) for row in rows):
        return None
    tokens = [_tokens(row) for row in rows]
    ((length, n_equal),) = Counter(map(len, tokens)).most_common(1)
    if length < _SHORTEST_BLOCK or n_equal < _EQUAL_SHARE * len(rows):
        return None
    blocks = np.stack([row for row in tokens if len(row) == length])
    is_end = np.isin(blocks, ends)
    # A run at a border may be padding without a mask, or a token of beginning that is the same.
    is_inside = _between_others(~is_end)
    n_inside = (is_end & is_inside).sum(axis=1)
    n_with_end = int((n_inside > 0).sum())
    first = Counter(blocks[:, 0].tolist()).most_common(1)[0][1]
    is_of_records = max(first, int(is_end[:, -1].sum())) > _SHARE_AS_RECORDS * n_equal
    if n_with_end < max(_FEWEST_WITH_END_INSIDE, _SHARE_WITH_END_INSIDE * n_equal) or is_of_records:
        return None
    how_many = f"All {len(rows)}" if n_equal == len(rows) else f"{n_equal} of {len(rows)}"
    return (
        f"{how_many} rows have {length} tokens, no padding, and on average {n_inside.mean():.2g} end-of-text "
        "tokens inside: they are blocks cut from running text, not records. What is measured is leakage of "
        "blocks, each of which holds parts of several records, and says little of any one record. Draw the "
        "canaries from the records, before `group_texts`, and train on rows of one record each."
    )


def _ids(end_of_text: int | Sequence[int] | None) -> np.ndarray:
    return np.atleast_1d(np.asarray([] if end_of_text is None else end_of_text, dtype=np.int64))


def _tokens(row: Row) -> np.ndarray:
    return np.asarray(row["input_ids"] if isinstance(row, Mapping) else row, dtype=np.int64).reshape(-1)


def _is_padded(row: Row) -> bool:
    mask = row.get("attention_mask") if isinstance(row, Mapping) else None
    return mask is not None and not np.asarray(mask).all()


def _between_others(is_other: np.ndarray) -> np.ndarray:
    """Where there is one of the others both before and after in the row."""
    before = np.logical_or.accumulate(is_other, axis=1)
    after = np.logical_or.accumulate(is_other[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(before & after)
