"""Blocks of running text are told from records, from rows of plain numbers."""

import numpy as np
import pytest

from ezmia_callbacks.canaries.validity.blocks import cut_from_running_text

END = 2


def make_records(n=400, *, shortest=5, longest=60, ends=True, begins_with=(), seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, size=n)
    return [[*begins_with, *rng.integers(5, 60, size=k).tolist(), *([END] if ends else [])] for k in lengths]


def group_texts(records, block_size=32):
    """As `run_clm.py` does it."""
    joined = [token for record in records for token in record]
    n = len(joined) // block_size * block_size
    return [joined[i : i + block_size] for i in range(0, n, block_size)]


def as_rows(tokens):
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": list(row)} for row in tokens]


@pytest.mark.parametrize("form", [list, as_rows, lambda rows: [np.array(row) for row in rows]])
def test_blocks_are_found_in_every_form_of_rows(form):
    rows = group_texts(make_records())

    found = cut_from_running_text(form(rows), end_of_text=END)

    n_inside = np.mean([sum(token == END for token in row[1:-1]) for row in rows])
    assert found.startswith(
        f"All {len(rows)} rows have 32 tokens, no padding, and on average {n_inside:.2g} end-of-text"
    )
    assert "before `group_texts`" in found


def test_blocks_of_long_texts_hold_few_ends_and_are_found():
    rows = group_texts(make_records(60, shortest=150, longest=450), block_size=32)

    assert "blocks cut from running text" in cut_from_running_text(rows, end_of_text=END)


def test_a_last_block_that_was_kept_hides_nothing():
    rows = [*group_texts(make_records()), [5, 6, 7]]

    found = cut_from_running_text(rows, end_of_text=END)

    assert found.startswith(f"{len(rows) - 1} of {len(rows)} rows have 32 tokens")


def test_any_of_several_tokens_ends_a_text():
    assert cut_from_running_text(group_texts(make_records()), end_of_text=[1, END]) is not None


def padded(records, length, *, has_mask, side="right"):
    rows = []
    for record in records:
        kept, n_pad = record[:length], max(0, length - len(record))
        ids, mask = [kept, [END] * n_pad], [[1] * len(kept), [0] * n_pad]
        if side == "left":
            ids, mask = ids[::-1], mask[::-1]
        row = {"input_ids": [*ids[0], *ids[1]], "attention_mask": [*mask[0], *mask[1]]}
        rows.append(row if has_mask else row["input_ids"])
    return rows


RECORDS = {
    "of various length": make_records(),
    "cut to a maximum": [record[:32] for record in make_records()],
    "all cut": [record[:32] for record in make_records(shortest=40)],
    "all cut, beginning with the end": [[END, *record][:32] for record in make_records(shortest=40)],
    "padded with the end, and a mask": padded(make_records(), 64, has_mask=True),
    "padded with the end, no mask": padded(make_records(), 64, has_mask=False),
    "padded on the left, no mask": padded(make_records(), 64, has_mask=False, side="left"),
    "of one length": make_records(shortest=31, longest=31),
    "chats of one length": [
        [3, *one, 3, *other][:32]
        for one, other in zip(make_records(100, longest=20), make_records(100, shortest=40), strict=True)
    ],
    "few": group_texts(make_records())[:19],
    "short": group_texts(make_records(), block_size=15),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_are_not_taken_for_blocks(case):
    assert cut_from_running_text(RECORDS[case], end_of_text=END) is None


@pytest.mark.parametrize("end_of_text", [None, []])
def test_without_a_known_end_nothing_is_said(end_of_text):
    assert cut_from_running_text(group_texts(make_records()), end_of_text=end_of_text) is None


def test_text_joined_without_an_end_cannot_be_told_from_cut_records():
    assert cut_from_running_text(group_texts(make_records(ends=False)), end_of_text=END) is None


def test_a_set_without_rows_is_no_set_of_blocks():
    assert cut_from_running_text([], end_of_text=END) is None
