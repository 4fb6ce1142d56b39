"""What a collator makes of one row: it is a plain function here, and no framework is needed."""

import numpy as np
import pytest
import torch

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.shells.collated import digest_of, fed_batch, fed_row, made_for_batch


def collated(row, collate):
    return fed_row(row, collate).record


@pytest.mark.parametrize("as_array", [list, np.asarray], ids=["lists", "arrays"])
def test_padding_is_gone_and_the_labels_are_the_collators(as_array):
    batch = {
        "input_ids": as_array([[0, 5, 6, 7]]),
        "labels": as_array([[-100, -100, 6, 7]]),
        "attention_mask": as_array([[0, 1, 1, 1]]),
    }

    row = collated({"input_ids": [5, 6, 7]}, lambda rows: batch)

    assert row == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


def test_without_a_mask_padding_is_what_the_row_did_not_have():
    batch = {"input_ids": [[5, 6, 7, 0]], "labels": [[5, 6, 7, -100]]}

    row = collated({"input_ids": [5, 6, 7]}, lambda rows: batch)

    assert row == {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}


def test_a_row_that_is_not_in_a_batch_is_taken_as_it_is():
    row = collated({"input_ids": [5, 6]}, lambda rows: {"input_ids": [5, 6], "labels": [-100, 6]})

    assert row == {"input_ids": [5, 6], "labels": [-100, 6]}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([{"input_ids": [1, 2]}], "returns no `labels`"),
        ({"input_ids": [[1, 2]]}, r"returns no `labels` \(got the columns 'input_ids'\)"),
        ({"input_ids": [[1, 2]] * 3, "labels": [[1, 2]] * 3}, r"array of shape \(3, 2\) of one record"),
    ],
)
def test_a_collator_that_does_not_make_one_labeled_row_is_refused(batch, message):
    with pytest.raises(ConfigurationError, match=message):
        collated({"input_ids": [1, 2]}, lambda rows: batch)


def test_a_collator_that_fails_is_named_with_what_the_row_held_and_no_value_of_it():
    def collate(rows):
        raise KeyError("pixels")

    row = {
        "input_ids": [4711, 4712],
        "labels": torch.tensor([4711, 4712], dtype=torch.int32),
        "pixel_values": np.full((3, 4, 4), 0.815, np.float32),
        "text": "my secret",
        "messages": [{"role": "user"}] * 3,
        "my secret": 4711,
    }

    with pytest.raises(ConfigurationError) as raised:
        collated(row, collate)

    assert (
        "a batch of one canary with 'input_ids': a list of 2 integers; 'labels': a tensor of shape (2,), "
        "torch.int32; 'messages': a list of 3 mappings; 'pixel_values': an array of shape (3, 4, 4), "
        "float32; 'text': a string; a column with a name of its own: an integer. KeyError in "
    ) in str(raised.value)
    assert not any(value in str(raised.value) for value in ("4711", "secret", "0.815", "pixels"))


def test_of_a_preference_pair_both_sides_are_fed_and_the_prompt_carries_no_loss():
    batch = {
        "input_ids": [[5, 6, 7, 8], [5, 6, 9, 0]],
        "completion_mask": [[0, 0, 1, 1], [0, 0, 1, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
    }

    row = collated({"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}, lambda rows: batch)

    assert row == {
        "input_ids": [5, 6, 7, 8],
        "labels": [-100, -100, 7, 8],
        "rejected_input_ids": [5, 6, 9],
        "rejected_labels": [-100, -100, 9],
    }


def padded_batch(rows, *, side, **further):
    length = max(len(row["input_ids"]) for row in rows)
    ids = np.zeros((len(rows), length), dtype=int)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        where = slice(length - n, length) if side == "left" else slice(0, n)
        ids[i, where], mask[i, where] = row["input_ids"], 1
    labels = np.where(mask == 1, ids, -100)
    made = {name: make(ids, mask) for name, make in further.items()}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **made}


ROWS = [{"input_ids": [5, 6]}, {"input_ids": [5, 6, 7]}]


def test_padding_on_the_left_stays_with_the_row():
    short, long = fed_batch(ROWS, lambda rows: padded_batch(rows, side="left"))

    assert short.padded == {
        "input_ids": [0, 5, 6],
        "labels": [-100, 5, 6],
        "further_inputs": {"attention_mask": [0, 1, 1]},
    }
    assert (short.is_plain, long.is_plain) == (False, True)


def test_padding_on_the_right_does_not():
    fed = fed_batch(ROWS, lambda rows: padded_batch(rows, side="right"))

    assert [row.padded for row in fed] == [{**row, "labels": row["input_ids"]} for row in ROWS]
    assert all(row.is_plain for row in fed)


@pytest.mark.parametrize(("first", "is_plain"), [(0, True), (1, False)], ids=["from 0", "from elsewhere"])
def test_positions_that_count_from_the_start_of_the_record_say_nothing(first, is_plain):
    def positions(ids, mask):
        return (mask.cumsum(1) - 1 + first).clip(0)

    fed = fed_batch(ROWS, lambda rows: padded_batch(rows, side="left", position_ids=positions))

    assert [row.is_plain for row in fed] == [is_plain, is_plain]


def test_inputs_that_are_no_values_of_tokens_are_named_apart():
    def collate(rows):
        return padded_batch(
            rows,
            side="right",
            token_type_ids=lambda ids, mask: mask * 2,
            pixel_values=lambda ids, mask: np.ones((len(ids), 3, 4)),
            weights=lambda ids, mask: np.ones(len(ids)),
            sources=lambda ids, mask: ["a file"] * len(ids),
        )

    short, _ = fed_batch(ROWS, collate)

    assert short.padded["further_inputs"] == {"token_type_ids": [2, 2]}
    assert short.batch_names == {"pixel_values", "weights", "sources"}


def test_a_collator_that_makes_one_row_of_all_records_is_asked_for_each_alone():
    def flatten(rows):
        ids = [[token for row in rows for token in row["input_ids"]]]
        positions = [[i for row in rows for i in range(len(row["input_ids"]))]]
        borders = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
        return {"input_ids": ids, "labels": ids, "position_ids": positions, "cu_seq_lens_q": borders}

    assert fed_batch(ROWS, flatten) is None
    assert fed_row(ROWS[0], flatten).is_plain


def test_the_trainer_of_pairs_takes_its_batch_apart_itself():
    batch = {
        "input_ids": [[5, 6, 7], [5, 6, 9]],
        "completion_mask": [[0, 0, 1], [0, 0, 1]],
        "attention_mask": [[1, 1, 1], [1, 1, 1]],
        "ref_chosen_logps": [0.5],
    }

    assert fed_row({"prompt_ids": [5, 6], "chosen_ids": [7]}, lambda rows: batch).is_plain


def test_what_is_made_for_a_batch_is_made_the_same_each_time():
    def collate(rows):
        return padded_batch(rows, side="right", noise=lambda ids, mask: np.random.rand(2, 2))

    first, second = (made_for_batch(ROWS, collate)["noise"] for _ in range(2))

    np.testing.assert_array_equal(first, second)


def test_a_digest_tells_images_apart():
    image = torch.arange(6.0).reshape(2, 3)

    assert digest_of({"pixel_values": image}) == digest_of({"pixel_values": image.clone()})
    assert digest_of({"pixel_values": image}) != digest_of({"pixel_values": image + 1})
    assert digest_of({"pixel_values": image}) != digest_of({"pixel_values": image.T})
    assert digest_of(["a", None, 1]) != digest_of(["a", None, 2])
