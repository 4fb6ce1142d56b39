"""What a collator makes of one row: it is a plain function here, and no framework is needed."""

import numpy as np
import pytest

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.shells.collated import collated


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
        ({"input_ids": [[1, 2]]}, r"returns no `labels` \(got \['input_ids'\]\)"),
        ({"input_ids": [[1, 2]] * 3, "labels": [[1, 2]] * 3}, r"array of shape \(3, 2\) of one record"),
    ],
)
def test_a_collator_that_does_not_make_one_labeled_row_is_refused(batch, message):
    with pytest.raises(ConfigurationError, match=message):
        collated({"input_ids": [1, 2]}, lambda rows: batch)


def test_a_collator_that_fails_is_named_with_the_columns():
    def collate(rows):
        raise KeyError("pixels")

    with pytest.raises(ConfigurationError, match=r"with the columns \['input_ids'\]: 'pixels'"):
        collated({"input_ids": [1, 2]}, collate)


def test_of_a_preference_pair_the_chosen_side_is_fed_and_the_prompt_carries_no_loss():
    batch = {
        "input_ids": [[5, 6, 7, 8], [5, 6, 9, 0]],
        "completion_mask": [[0, 0, 1, 1], [0, 0, 1, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
    }

    row = collated({"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}, lambda rows: batch)

    assert row == {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
