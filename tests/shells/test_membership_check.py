import pytest
import torch
from datasets import Dataset

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.errors import OverlappingCanariesError
from ezmia_callbacks.shells.membership_check import check_membership, is_indexable, keys_of

ROWS = [{"input_ids": [i, i + 1, i + 2, *range(i % 3)]} for i in range(40)]


@pytest.fixture
def canaries():
    """Rows 0 to 9 are members, rows 10 to 21 are not."""
    return CanarySet.from_lists(ROWS[:10], ROWS[10:22])


@pytest.fixture
def keys(canaries):
    return {name: keys_of(row)[0] for name, row in zip(canaries.record_ids, canaries.records, strict=True)}


TRAINING = ROWS[:10] + ROWS[22:]
EVERYTHING = ROWS


def packed(rows, n=5):
    """Several records a row, as TRL's best-fit packing leaves them."""
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    return [
        {
            "input_ids": [token for row in group for token in row["input_ids"]],
            "seq_lengths": [len(row["input_ids"]) for row in group],
        }
        for group in groups
    ]


def padded(rows):
    return [
        {
            "input_ids": row["input_ids"] + [0] * (6 - len(row["input_ids"])),
            "attention_mask": [1] * len(row["input_ids"]) + [0] * (6 - len(row["input_ids"])),
        }
        for row in rows
    ]


def tensors(rows):
    return [{name: torch.tensor(values) for name, values in row.items()} for row in rows]


FORMS = {
    "list": list,
    "tensors": tensors,
    "datasets": Dataset.from_list,
    "torch format": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "padded": padded,
    "padded datasets": lambda rows: Dataset.from_list(padded(rows)),
    "packed": packed,
    "packed datasets": lambda rows: Dataset.from_list(packed(rows)),
    "equal rows": lambda rows: Dataset.from_list(packed(rows, n=1)),
    "read through a transform": lambda rows: Dataset.from_list(rows).with_transform(
        lambda batch: {"input_ids": [ids for ids in batch["input_ids"]]}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_canaries_in_their_places_leave_nothing_to_report(canaries, keys, form):
    assert check_membership(FORMS[form](TRAINING), canaries, keys) == []


@pytest.mark.parametrize("form", FORMS)
def test_non_members_among_the_training_rows_are_refused(canaries, keys, form):
    with pytest.raises(OverlappingCanariesError, match="12 of 12 non-members are in the training set"):
        check_membership(FORMS[form](EVERYTHING), canaries, keys)


@pytest.mark.parametrize("form", FORMS)
def test_missing_members_are_counted(canaries, keys, form):
    (problem,) = check_membership(FORMS[form](TRAINING[4:]), canaries, keys)

    assert problem.startswith("4 of 10 members were not found among the training rows")


def test_a_pair_is_found_by_its_prompt_and_chosen_side():
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}

    assert keys_of(pair) == keys_of({"input_ids": [1, 2, 3]})
    assert keys_of(pair) == keys_of(pair | {"rejected_ids": [5]})


def test_rows_that_are_tokenized_later_are_compared_as_text():
    assert keys_of({"text": "One  record"}) == keys_of({"text": "one record", "source": "web"})


@pytest.mark.parametrize("row", [(1, 2), {"body": "a"}, "a"])
def test_an_unreadable_row_has_no_key(row):
    assert keys_of(row) == []


def test_rows_that_cannot_be_read_are_reported_as_such(canaries, keys):
    (problem,) = check_membership([(1, 2)] * 5, canaries, keys)

    assert "cannot be checked" in problem


def test_a_mask_that_was_not_cut_with_its_tokens_is_not_read():
    assert keys_of({"input_ids": [1, 2], "attention_mask": [1, 1, 1]}) == keys_of({"input_ids": [1, 2]})


def test_only_so_many_rows_are_read_and_that_is_said(canaries, keys, monkeypatch):
    monkeypatch.setattr("ezmia_callbacks.shells.membership_check._MAX_ROWS_CHECKED", 12)

    (problem,) = check_membership(TRAINING, canaries, keys)

    assert problem == "Only the first 12 of 28 training rows were checked for canaries."


def test_streams_cannot_be_indexed():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(TRAINING)

        def __len__(self):
            return len(TRAINING)

    assert is_indexable(TRAINING)
    assert not is_indexable(Stream())
    assert not is_indexable(Dataset.from_list(TRAINING).to_iterable_dataset())


@pytest.mark.parametrize("form", [list, Dataset.from_list], ids=["list", "datasets"])
def test_the_same_words_about_another_image_are_not_trained_on(form):
    def with_image(row, value):
        return {**row, "image": [[float(value), 0.5], [0.25, 1.0]]}

    members, others = [with_image(row, 1) for row in ROWS[:10]], [with_image(row, 2) for row in ROWS[:12]]
    canaries = CanarySet.from_lists(ROWS[:10], ROWS[10:22])
    keys = {name: keys_of(row)[0] for name, row in zip(canaries.record_ids, [*members, *others], strict=True)}

    assert check_membership(form(members), canaries, keys) == []
    with pytest.raises(OverlappingCanariesError):
        check_membership(form([*members, others[0]]), canaries, keys)


def test_one_image_has_one_key_in_whatever_form_it_is_stored():
    pixels = torch.arange(6).reshape(2, 3)

    found = {
        keys_of({"input_ids": [5, 6], "pixel_values": image})[0]
        for image in (pixels, pixels.numpy(), pixels.tolist(), pixels.float())
    }

    assert len(found) == 1
