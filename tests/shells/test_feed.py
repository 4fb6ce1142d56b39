"""Canaries in the form of training, from a plain list of rows and a plain function: no framework."""

import numpy as np
import pytest
import torch
from supervised_tiny import (
    LazyRows,
    RowsWithImages,
    SupervisedRows,
    collate_supervised,
    collate_with_images,
)
from tiny import make_rows, make_texts, make_tokenizer
from transformers import default_data_collator

from ezmia_callbacks import CanarySet, hold_out_canaries
from ezmia_callbacks.errors import (
    CanaryError,
    ConfigurationError,
    OverlappingCanariesError,
    TooFewCanariesError,
)
from ezmia_callbacks.shells.feed import (
    Feed,
    PreparedRows,
    Source,
    as_row,
    canaries_as_fed,
    draw_canaries,
)

SIZES = {"n_members": 15, "n_non_members": 20, "seed": 0}


def without_first_loss(rows):
    """Pads on the right; the first two tokens carry no loss."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = np.zeros((len(rows), length), dtype=int)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = row["input_ids"]
        mask[i, : len(row["input_ids"])] = 1
    labels = np.where((mask == 1) & (np.arange(length) >= 2), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_feed(rows, **options):
    return Feed(Source("train_dataset", rows), without_first_loss, **options)


def hold_out(rows):
    return hold_out_canaries(rows, n_members=15, n_non_members=20, seed=0)


def test_labels_are_those_of_the_collator_and_padding_is_gone():
    rows, canaries = hold_out(make_rows(make_texts(60)))

    fed = canaries_as_fed(make_feed(rows), canaries, max_length=None)

    assert fed.record_ids == canaries.record_ids
    for record, row in zip(canaries.records, fed.records, strict=True):
        assert row == {
            "input_ids": record["input_ids"],
            "labels": [-100, -100, *record["input_ids"][2:]],
        }


def test_only_the_columns_that_the_run_feeds_reach_the_collator():
    rows, canaries = hold_out(make_rows(make_texts(60)))
    seen = set()

    def collate(rows):
        seen.update(rows[0])
        return without_first_loss(rows)

    canaries_as_fed(
        Feed(Source("train_dataset", rows), collate, columns=frozenset({"input_ids"})),
        canaries,
        max_length=None,
    )

    assert "attention_mask" in rows[0]
    assert seen == {"input_ids"}


def test_text_becomes_rows_by_the_tokenizer_of_the_run():
    texts, canaries = hold_out(make_texts(60))
    tokenizer = make_tokenizer()

    feed = make_feed(make_rows(texts), tokenizer=tokenizer)
    fed = canaries_as_fed(feed, canaries, max_length=6)

    assert [row["input_ids"] for row in fed.records] == [
        tokenizer(text)["input_ids"][:6] for text in canaries.records
    ]


def test_text_without_a_tokenizer_is_refused_with_what_to_pass():
    texts, canaries = hold_out(make_texts(60))

    feed = make_feed(make_rows(texts), tokenizer_advice="`processing_class=`")

    with pytest.raises(ConfigurationError, match="there is no tokenizer: pass `processing_class=`, or draw"):
        canaries_as_fed(feed, canaries, max_length=None)


def test_records_go_through_the_runs_own_preparation_and_what_it_drops_is_left_out(caplog):
    rows, canaries = hold_out(make_rows(make_texts(60)))

    def prepare(records):
        made = [{"input_ids": [*record["input_ids"], 1]} for record in records]
        return PreparedRows(made[1:], range(1, len(made)))

    trained_on = [{"input_ids": [*row["input_ids"], 1]} for row in rows]
    fed = canaries_as_fed(make_feed(trained_on, prepare=prepare), canaries, max_length=None)

    assert fed.record_ids == canaries.record_ids[1:]
    assert {row["input_ids"][-1] for row in fed.records} == {1}
    assert "1 of 35 canaries are left out" in caplog.text


def test_raw_records_go_to_a_collator_that_takes_them():
    _, canaries = hold_out(make_texts(60))
    tokenizer = make_tokenizer()

    def collate(rows):
        return without_first_loss([dict(tokenizer(row["story"])) for row in rows])

    feed = Feed(Source("train_dataset", []), collate, takes_raw_records=True, text_field="story")

    fed = canaries_as_fed(feed, canaries, max_length=None)

    assert fed.records[0]["input_ids"] == tokenizer(canaries.records[0])["input_ids"]


def test_a_non_member_that_is_trained_on_is_refused():
    rows, canaries = hold_out(make_rows(make_texts(60)))
    non_members = [r for r, is_in in zip(canaries.records, canaries.is_member, strict=True) if not is_in]

    with pytest.raises(OverlappingCanariesError):
        canaries_as_fed(make_feed([*rows, non_members[0]]), canaries, max_length=None)


def test_members_that_are_not_trained_on_are_named(caplog):
    rows, canaries = hold_out(make_rows(make_texts(60)))
    members = [
        record["input_ids"]
        for record, is_member in zip(canaries.records, canaries.is_member, strict=True)
        if is_member
    ]
    others = [row for row in rows if row["input_ids"] not in members]

    canaries_as_fed(make_feed(others), canaries, max_length=None)

    assert "15 of 15 members were not found among the training rows" in caplog.text


def test_records_that_packing_has_cut_cannot_be_found_which_is_said(caplog):
    rows, canaries = hold_out(make_rows(make_texts(60)))

    canaries_as_fed(make_feed(rows, cuts_records=True), canaries, max_length=None)

    assert "Packing with the strategy 'wrapped' cuts training records" in caplog.text


def test_too_few_with_any_loss_are_refused_with_the_reason():
    rows, canaries = hold_out(make_rows(make_texts(60, n_words=2)))

    with pytest.raises(TooFewCanariesError, match="no token of theirs carries loss"):
        canaries_as_fed(make_feed(rows), canaries, max_length=None)


def test_members_are_drawn_from_training_and_non_members_from_evaluation():
    rows, others = make_rows(make_texts(40)), make_rows(make_texts(40, seed=5))

    drawn = draw_canaries(make_feed(rows), Source("eval_dataset", others), **SIZES)

    assert (drawn.n_members, drawn.n_non_members) == (15, 20)
    members = [r for r, is_in in zip(drawn.records, drawn.is_member, strict=True) if is_in]
    trained_on = [row["input_ids"] for row in rows]
    assert all(row["input_ids"] in trained_on for row in members)
    assert {name.rsplit("-", 1)[0] for name in drawn.record_ids} == {"train_dataset", "eval_dataset"}


def test_one_record_on_both_sides_is_refused():
    rows = make_rows(make_texts(40))

    with pytest.raises(OverlappingCanariesError, match="`train_dataset` and `eval_dataset` share records"):
        draw_canaries(make_feed(rows), Source("eval_dataset", rows), **SIZES)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("eval_dataset", iter([])), "`eval_dataset` is a stream that cannot be drawn from"),
        (Source("eval_dataset", make_rows(make_texts(20)), is_packed=True), "`eval_dataset` is packed"),
        (Source("eval_dataset", [{"input_ids": [1, 2], "seq_lengths": [1, 1]}]), "`eval_dataset` is packed"),
    ],
)
def test_what_holds_no_records_one_by_one_is_refused(source, message):
    with pytest.raises(CanaryError, match=message):
        draw_canaries(make_feed(make_rows(make_texts(40, seed=3))), source, **SIZES)


def test_a_text_stands_where_the_trainer_reads_text():
    assert as_row("river stone", text_field="story") == {"story": "river stone"}
    pair = {"prompt": "a", "completion": "b"}
    assert as_row(pair, text_field="story") == pair


def test_a_split_of_the_users_stays_one():
    texts = make_texts(60)
    canaries = CanarySet.from_lists(texts[:20], texts[20:])

    feed = make_feed(make_rows(texts[:20]), tokenizer=make_tokenizer())
    fed = canaries_as_fed(feed, canaries, max_length=None)

    assert fed.provenance == canaries.provenance


def left_padded(rows):
    """Pads on the left, as absolute positions see it."""
    batch = without_first_loss(rows)
    for i, row in enumerate(rows):
        n = len(batch["input_ids"][i]) - len(row["input_ids"])
        for name in ("input_ids", "attention_mask"):
            batch[name][i] = np.roll(batch[name][i], n)
    batch["labels"] = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    return batch


def mixed_rows():
    return [row for n in (5, 8, 12) for row in make_rows(make_texts(30, seed=n, n_words=n))]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_padding_that_counts_is_that_of_batches_of_the_trainings_size(batch_size):
    rows, canaries = hold_out(mixed_rows())

    feed = Feed(Source("train_dataset", rows), left_padded, batch_size=batch_size)
    fed = canaries_as_fed(feed, canaries, max_length=None)

    lengths = [
        (len(row["input_ids"]), len(raw["input_ids"]))
        for row, raw in zip(fed.records, canaries.records, strict=True)
    ]
    assert all(padded >= own for padded, own in lengths)
    assert any(padded > own for padded, own in lengths) == (batch_size > 1)
    assert fed.fingerprint == canaries_as_fed(feed, canaries, max_length=None).fingerprint


def test_columns_that_training_rows_do_not_have_do_not_reach_the_collator():
    rows, canaries = hold_out([row | {"source": "web"} for row in make_rows(make_texts(60))])
    seen = set()

    def collate(rows):
        seen.update(*rows)
        return without_first_loss(rows)

    stripped = [{name: value for name, value in row.items() if name != "source"} for row in rows]
    canaries_as_fed(Feed(Source("train_dataset", stripped), collate), canaries, max_length=None)

    assert seen == {"input_ids", "attention_mask"} | (set(rows[0]) - {"source"})


def varied_texts(n=60):
    return [text if i % 2 else text.rpartition(" ")[0] for i, text in enumerate(make_texts(n))]


def in_batches(dataset, collate):
    """Attended token ids and labels of each row of a dataset, as its own collator makes them."""
    found = set()
    for index in range(len(dataset)):
        batch = collate([dataset[index]])
        is_attended = batch["attention_mask"][0].bool()
        found.add(tuple(tuple(batch[name][0][is_attended].tolist()) for name in ("input_ids", "labels")))
    return found


@pytest.mark.parametrize(
    ("make", "collate"),
    [
        (SupervisedRows, collate_supervised),
        (LazyRows, default_data_collator),
        (RowsWithImages, collate_with_images),
    ],
)
def test_rows_of_tensors_reach_the_collator_as_tensors(make, collate, caplog):
    dataset = make(varied_texts())
    remaining, canaries = hold_out(dataset)

    fed = canaries_as_fed(Feed(Source("train_dataset", remaining), collate), canaries, max_length=None)

    scored = {
        (tuple(row["input_ids"]), tuple(row["labels"]))
        for row, is_member in zip(fed.records, fed.is_member, strict=True)
        if is_member
    }
    assert len(scored) == 15
    assert scored <= in_batches(remaining, collate)
    assert "not found" not in caplog.text


def kinds_of_columns(row):
    return {name: (type(value), getattr(value, "dtype", None)) for name, value in row.items()}


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(lambda ids: {"input_ids": ids, "labels": list(ids)}, id="lists"),
        pytest.param(lambda ids: {"input_ids": torch.tensor(ids, dtype=torch.int32)}, id="int32 tensors"),
        pytest.param(
            lambda ids: {"input_ids": np.array(ids), "attention_mask": np.ones(len(ids), np.bool_)},
            id="arrays",
        ),
        pytest.param(lambda ids: {"input_ids": tuple(ids), "weight": torch.tensor(0.5)}, id="a column more"),
    ],
)
@pytest.mark.parametrize("are_from_the_dataset", [True, False])
def test_canaries_have_the_types_of_the_training_rows(stored, are_from_the_dataset):
    rows = [stored(row["input_ids"]) for row in make_rows(make_texts(60))]
    kept, canaries = hold_out(rows)
    if not are_from_the_dataset:
        members = [r for r, is_in in zip(canaries.records, canaries.is_member, strict=True) if is_in]
        others = [r for r, is_in in zip(canaries.records, canaries.is_member, strict=True) if not is_in]
        canaries = CanarySet.from_lists(members, others)
    seen = []

    def collate(rows):
        seen.extend(rows)
        return without_first_loss(rows)

    canaries_as_fed(Feed(Source("train_dataset", kept), collate), canaries, max_length=None)

    expected = kinds_of_columns(kept[0])
    if not are_from_the_dataset:
        expected.pop("weight", None)  # no part of a record: a list of records does not have it
    # Training rows are looked at, too, last of all.
    assert [kinds_of_columns(row) for row in seen[: len(canaries)]] == [expected] * len(canaries)


def test_text_becomes_rows_of_the_type_of_the_training_rows():
    texts, canaries = hold_out(varied_texts())
    feed = Feed(
        Source("train_dataset", SupervisedRows(texts)), collate_supervised, tokenizer=make_tokenizer()
    )

    fed = canaries_as_fed(feed, canaries, max_length=None)

    assert len(fed) == len(canaries)


def test_an_image_that_the_first_row_lacks_goes_with_its_canary():
    remaining, canaries = hold_out(RowsWithImages(varied_texts()))

    fed = canaries_as_fed(
        Feed(Source("train_dataset", remaining), collate_with_images), canaries, max_length=None
    )

    made = fed.batch_inputs.make(fed.record_ids)["images"]
    numbers = [int(record_id.removeprefix("row-")) for record_id in fed.record_ids]
    assert made[:, 0, 0, 0].tolist() == [float(number) if number % 2 else 0.0 for number in numbers]
