import pytest
import torch
from lightning_tiny import collator, draw, make_loader, validation_loader
from tiny import make_rows, make_texts, make_tokenizer
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import DataCollatorForSeq2Seq

from ezmia_callbacks import CanarySet, hold_out_canaries
from ezmia_callbacks.errors import CanaryError, ConfigurationError, OverlappingCanariesError
from ezmia_callbacks.lightning.loaders import as_fed_by_loaders, draw_from_loaders

SIZES = {"n_members": 30, "n_non_members": 15, "seed": 0}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(draw()[0])


def tuples():
    return DataLoader(TensorDataset(torch.zeros(20, 4, dtype=torch.long)))


def test_members_come_from_training_and_non_members_from_validation():
    rows, _ = draw()
    validation = validation_loader()

    drawn = draw_from_loaders(make_loader(rows), {"one": validation}, **SIZES)

    members = {tuple(row["input_ids"]) for row in rows}
    held_out = {tuple(row["input_ids"]) for row in validation.dataset}
    found = [tuple(record["input_ids"]) for record in drawn.records]
    assert (drawn.n_members, drawn.n_non_members) == (30, 15)
    assert all(
        ids in (members if is_in else held_out) for ids, is_in in zip(found, drawn.is_member, strict=True)
    )
    assert drawn.provenance.method == "trainer_datasets"


def test_the_draw_depends_on_the_seed_alone():
    rows, _ = draw()
    once, again, other = (
        draw_from_loaders(make_loader(rows, is_shuffled=True), validation_loader(), **{**SIZES, "seed": s})
        for s in (0, 0, 1)
    )

    assert once.record_ids == again.record_ids != other.record_ids


def test_labels_are_those_of_the_training_collator():
    rows = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in make_rows(make_texts(60))]
    collate = DataCollatorForSeq2Seq(make_tokenizer(), pad_to_multiple_of=16)
    train = DataLoader(Subset(rows, range(40)), batch_size=8, collate_fn=collate)

    drawn = draw_from_loaders(train, DataLoader(rows[40:], collate_fn=collate), **SIZES)

    assert {record["labels"][0] for record in drawn.records} == {-100}
    assert {len(record["input_ids"]) for record in drawn.records} == {12}


def test_validation_rows_that_are_trained_on_are_refused():
    rows = make_rows(make_texts(60))

    with pytest.raises(OverlappingCanariesError, match=r"share records|are in the training set"):
        draw_from_loaders(make_loader(rows), make_loader(rows[30:50]), **SIZES)


@pytest.mark.parametrize(
    ("train", "validation", "match"),
    [
        (lambda: make_loader(draw()[0]), lambda: None, "one validation dataloader is needed .* got 0"),
        (lambda: make_loader(draw()[0]), lambda: [validation_loader()] * 2, "one validation .* got 2"),
        (lambda: {"a": tuples(), "b": tuples()}, validation_loader, "one training dataloader .* got 2"),
        (lambda: make_loader(Stream()), validation_loader, "the training dataloader reads a stream"),
        (lambda: iter(()), validation_loader, "the training dataloader reads a stream"),
        (tuples, validation_loader, "the rows of the training dataset are not mappings"),
    ],
    ids=["none", "two validation", "two training", "stream", "no loader", "tuples"],
)
def test_what_cannot_be_drawn_from_is_refused_with_the_way_out(train, validation, match):
    with pytest.raises(CanaryError, match=f"{match}.*hold_out_canaries"):
        draw_from_loaders(train(), validation(), **SIZES)


def test_given_canaries_go_through_the_collator():
    rows, canaries = draw()

    fed = as_fed_by_loaders([make_loader(rows)], canaries, tokenizer=None, max_length=None)

    assert fed.record_ids == canaries.record_ids
    assert all(record["labels"] == record["input_ids"] for record in fed.records)
    assert fed.provenance == canaries.provenance


def test_non_members_that_are_trained_on_are_refused():
    _, canaries = draw()

    with pytest.raises(OverlappingCanariesError, match="60 of 60 non-members are in the training set"):
        as_fed_by_loaders(make_loader(make_rows(make_texts(120))), canaries, tokenizer=None, max_length=None)


def test_text_becomes_rows_like_those_of_training():
    train, canaries = hold_out_canaries(make_texts(120), n_members=30, n_non_members=60, seed=0)
    loader = make_loader(make_rows(train))

    fed = as_fed_by_loaders(loader, canaries, tokenizer=make_tokenizer(), max_length=5)

    assert {len(record["input_ids"]) for record in fed.records} == {5}
    with pytest.raises(ConfigurationError, match="pass `tokenizer=`, give the LightningModule a `tokenizer`"):
        as_fed_by_loaders(loader, canaries, tokenizer=None, max_length=None)


def test_text_that_the_collator_tokenizes_needs_no_tokenizer():
    train, canaries = hold_out_canaries(
        [{"text": text} for text in make_texts(120)], n_members=30, n_non_members=60, seed=0
    )
    tokenizer, collate = make_tokenizer(), collator()
    loader = DataLoader(train, collate_fn=lambda rows: collate([tokenizer(row["text"]) for row in rows]))

    fed = as_fed_by_loaders(loader, canaries, tokenizer=None, max_length=None)

    assert {len(record["input_ids"]) for record in fed.records} == {12}


@pytest.mark.parametrize(
    "loader", [tuples, lambda: [tuples(), tuples()], lambda: iter(())], ids=["tuples", "two", "no loader"]
)
def test_unreadable_training_rows_leave_canaries_as_given_and_say_so(loader, caplog):
    _, canaries = draw()

    fed = as_fed_by_loaders(loader(), canaries, tokenizer=None, max_length=None)

    assert fed is canaries
    assert "scored as they were given" in caplog.text


def test_a_stream_is_fed_from_but_cannot_be_checked(caplog):
    _, canaries = draw()

    fed = as_fed_by_loaders(make_loader(Stream()), canaries, tokenizer=None, max_length=None)

    assert len(fed) == len(canaries)
    assert "Training on a stream" in caplog.text


def test_a_collator_without_labels_is_refused():
    rows, _ = draw()
    canaries = CanarySet.from_lists(rows[:20], make_rows(make_texts(15, seed=5)))
    loader = DataLoader(rows, collate_fn=lambda batch: {"input_ids": torch.tensor([batch[0]["input_ids"]])})

    with pytest.raises(ConfigurationError, match="returns no `labels`"):
        as_fed_by_loaders(loader, canaries, tokenizer=None, max_length=None)
