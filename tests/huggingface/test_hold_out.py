"""Canaries that the callback draws itself when the trainer is made."""

import logging
import pickle
import re

import pytest
import torch
from datasets import Dataset
from huggingface_tiny import make_trainer
from supervised_tiny import (
    LazyRows,
    RowsWithImages,
    SupervisedRows,
    collate_supervised,
    collate_with_images,
)
from tiny import make_model, make_rows, make_texts
from torch.utils.data import IterableDataset
from transformers import default_data_collator

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback, hold_out_canaries
from ezmia_callbacks.errors import (
    CanaryError,
    ConfigurationError,
    OverlappingCanariesError,
    ReferenceMismatchError,
    TooFewCanariesError,
)

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
)

N_ROWS = 160
# A tenth of them leaves, and twice as many are members.
N_LEFT, N_NON_MEMBERS, N_MEMBERS = 144, 16, 32


def make_texts_of_two_lengths(n=N_ROWS):
    return [text if i % 2 else text.rpartition(" ")[0] for i, text in enumerate(make_texts(n))]


def ids_of(rows):
    return [tuple(torch.as_tensor(rows[i]["input_ids"]).tolist()) for i in range(len(rows))]


def test_the_callback_takes_the_non_members_out_of_the_training_set_and_says_what_is_left(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ezmia_callbacks")
    rows = make_rows(make_texts(N_ROWS))
    audit = PrivacyAuditCallback("hold_out", seed=7)

    trainer = make_trainer(tmp_path, rows, [audit], max_steps=1)

    remaining, canaries = hold_out_canaries(rows, seed=7)
    assert trainer.train_dataset == remaining
    assert len(rows) == N_ROWS
    assert (
        f"{N_NON_MEMBERS} of {N_ROWS} rows, drawn at random with seed 7, are non-members. Training has "
        f"{N_LEFT} rows left, and {N_MEMBERS} of them are members"
    ) in caplog.text
    trainer.train()
    assert audit.canaries.fingerprint == canaries.fingerprint
    assert audit.canaries.provenance.is_randomized
    assert audit.history.n_failed == 0
    assert "not found" not in caplog.text


def test_nobody_who_did_not_ask_loses_a_row(tmp_path):
    rows = make_rows(make_texts(N_ROWS))

    trainer = make_trainer(tmp_path, rows[:100], [PrivacyAuditCallback()], eval_dataset=rows[100:])

    assert trainer.train_dataset == rows[:100]


@pytest.mark.parametrize(
    ("make", "collate"),
    [
        pytest.param(SupervisedRows, collate_supervised, id="supervised"),
        pytest.param(LazyRows, default_data_collator, id="lazy"),
    ],
)
def test_scripts_whose_rows_are_tensors_are_audited_without_an_evaluation_set(
    tmp_path, make, collate, caplog
):
    dataset = make(make_texts_of_two_lengths())
    audit = PrivacyAuditCallback("hold_out", budget=LeakageBudget(limit=0.99, rule="point"))

    trainer = make_trainer(
        tmp_path, dataset, [audit], collator=collate, eval_dataset=None, num_train_epochs=1
    )
    trainer.train()

    assert len(trainer.train_dataset) == N_LEFT
    n_times = audit.auditor.exposures.n_times
    is_member = audit.auditor.encoded.is_member
    assert (n_times[is_member] == 1).all()
    assert not n_times[~is_member].any()
    assert audit.history[-1].decision.is_within_budget
    assert "not found" not in caplog.text


def test_a_lazy_dataset_still_says_what_it_says_of_each_row(tmp_path):
    dataset = RowsWithImages(make_texts_of_two_lengths())
    audit = PrivacyAuditCallback("hold_out")

    trainer = make_trainer(tmp_path, dataset, [audit], collator=collate_with_images)

    rest = trainer.train_dataset
    numbers = [dataset.modality_lengths[i] for i in rest.indices]
    assert rest.modality_lengths == numbers
    assert len(numbers) == N_LEFT
    assert len(pickle.loads(pickle.dumps(rest))) == N_LEFT
    assert not hasattr(rest, "column_names")


def test_what_a_lazy_dataset_does_with_all_rows_is_refused_by_name(tmp_path):
    class Shuffling(SupervisedRows):
        def shuffle(self):
            raise AssertionError("all rows")

    trainer = make_trainer(
        tmp_path,
        Shuffling(make_texts_of_two_lengths()),
        [PrivacyAuditCallback("hold_out")],
        collator=collate_supervised,
    )

    with pytest.raises(AttributeError, match="'shuffle' of Shuffling is for all of them"):
        trainer.train_dataset.shuffle()


def test_a_lazy_dataset_is_still_told_its_epoch(tmp_path):
    class Counting(SupervisedRows):
        def set_epoch(self, epoch):
            self.epoch = epoch

    dataset = Counting(make_texts_of_two_lengths())
    trainer = make_trainer(tmp_path, dataset, [PrivacyAuditCallback("hold_out")], collator=collate_supervised)

    # As new loaders do; old ones tell a dataset whose rows have numbers nothing.
    trainer.train_dataset.set_epoch(3)

    assert dataset.epoch == 3


def test_training_is_that_on_the_rows_that_are_left_to_the_last_bit(tmp_path):
    rows = make_rows(make_texts(N_ROWS))
    remaining, _ = hold_out_canaries(rows, seed=0)
    audited = make_trainer(tmp_path / "a", rows, [PrivacyAuditCallback("hold_out")], max_steps=4)
    plain = make_trainer(tmp_path / "b", remaining, max_steps=4)

    for trainer in (audited, plain):
        trainer.train()

    for one, other in zip(audited.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_stream_is_refused_when_the_trainer_is_made(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(make_rows(make_texts(N_ROWS)))

    with pytest.raises(ConfigurationError, match=r"a stream \(Stream\).*docs/how-to/streams.md"):
        make_trainer(tmp_path, Stream(), [PrivacyAuditCallback("hold_out")], max_steps=1)


def test_rows_that_were_packed_by_hand_are_refused(tmp_path):
    rows = [{**row, "seq_lengths": [6, 6]} for row in make_rows(make_texts(N_ROWS))]

    with pytest.raises(CanaryError, match="is packed: a row holds several records"):
        make_trainer(tmp_path, rows, [PrivacyAuditCallback("hold_out")], max_steps=1)


def test_too_few_rows_are_refused_with_a_split_that_can_be_drawn(tmp_path):
    with pytest.raises(TooFewCanariesError, match=r"n_members=.*before the trainer is made"):
        make_trainer(tmp_path, make_rows(make_texts(60)), [PrivacyAuditCallback("hold_out")])


def test_a_resumed_run_has_the_same_canaries_and_one_on_other_data_is_refused(
    tmp_path, checkpoints_of_old_releases
):
    settings = {"save_strategy": "steps", "save_steps": 9, "max_steps": 27}
    rows = Dataset.from_list(make_rows(make_texts(N_ROWS)))
    first = PrivacyAuditCallback("hold_out", every=9)
    make_trainer(tmp_path, rows, [first], **settings).train()

    again = PrivacyAuditCallback("hold_out", every=9)
    make_trainer(tmp_path, rows, [again], **settings).train(str(tmp_path / "checkpoint-9"))

    assert again.auditor.encoded.fingerprint == first.auditor.encoded.fingerprint
    assert [result.step for result in again.history] == [0, 9, 18, 27]
    assert again.history[-1].to_metrics()["auc"] == first.history[-1].to_metrics()["auc"]

    others = Dataset.from_list(make_rows(make_texts(N_ROWS, seed=1)))
    for data, seed in ((others, 0), (rows, 1)):
        trainer = make_trainer(tmp_path, data, [PrivacyAuditCallback("hold_out", seed=seed)], **settings)
        with pytest.raises(ReferenceMismatchError):
            trainer.train(str(tmp_path / "checkpoint-9"))


def test_a_callback_added_later_draws_where_it_is_given_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(make_texts(N_ROWS)), max_steps=1)

    audit = PrivacyAuditCallback("hold_out", trainer=trainer)
    trainer.add_callback(audit)
    trainer.train()

    assert len(trainer.train_dataset) == N_LEFT
    assert len(audit.history) == 2


def test_a_callback_added_later_without_the_trainer_is_refused_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(make_texts(N_ROWS)), max_steps=1)
    trainer.add_callback(PrivacyAuditCallback("hold_out"))

    with pytest.raises(ConfigurationError, match=r"made without the callback.*trainer=trainer") as raised:
        trainer.train()

    typed = re.search(r"`(trainer\.add_callback\(.*?\))`", str(raised.value))[1]
    other = make_trainer(tmp_path / "other", make_rows(make_texts(N_ROWS)), max_steps=1)
    eval(typed, {"trainer": other, "PrivacyAuditCallback": PrivacyAuditCallback})
    other.train()
    assert len(other.train_dataset) == N_LEFT


def test_a_trainer_without_a_training_set_can_be_made(tmp_path):
    trainer = make_trainer(tmp_path, None, [PrivacyAuditCallback("hold_out")])

    assert trainer.train_dataset is None


def test_each_trainer_of_one_callback_has_canaries_of_its_own(tmp_path):
    audit = PrivacyAuditCallback("hold_out")
    trainers = [
        make_trainer(tmp_path / str(seed), make_rows(make_texts(N_ROWS, seed=seed)), [audit], max_steps=1)
        for seed in range(2)
    ]

    for trainer in trainers:
        trainer.train()
        members = [
            tuple(record["input_ids"])
            for record, is_in in zip(audit.canaries.records, audit.canaries.is_member, strict=True)
            if is_in
        ]
        assert set(members) <= set(ids_of(trainer.train_dataset))

    assert len(audit.histories) == 2


def two_callbacks(tmp_path, *, seed):
    return [
        PrivacyAuditCallback("hold_out", score="ez"),
        PrivacyAuditCallback("hold_out", prefix="other/", output_dir=tmp_path / "other", seed=seed),
    ]


def test_two_callbacks_of_a_trainer_share_what_is_held_out(tmp_path):
    first, second = two_callbacks(tmp_path, seed=0)

    trainer = make_trainer(tmp_path, make_rows(make_texts(N_ROWS)), [first, second], max_steps=1)
    trainer.train()

    assert len(trainer.train_dataset) == N_LEFT
    assert first.canaries is second.canaries


def test_two_callbacks_of_a_trainer_with_other_seeds_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="with the seeds 0 and 1"):
        make_trainer(tmp_path, make_rows(make_texts(N_ROWS)), two_callbacks(tmp_path, seed=1))


def test_a_trainer_that_was_sent_to_another_process_has_its_canaries(tmp_path):
    audit = PrivacyAuditCallback("hold_out")
    trainer = make_trainer(tmp_path, make_rows(make_texts(N_ROWS)), [audit], max_steps=1)

    copy = pickle.loads(pickle.dumps(audit))
    elsewhere = make_trainer(tmp_path / "copy", trainer.train_dataset, max_steps=1)
    elsewhere.add_callback(copy)
    elsewhere.train()

    trainer.train()
    assert copy.canaries.fingerprint == audit.canaries.fingerprint


@pytest.mark.parametrize("script", ["without", "with several"])
def test_the_error_of_the_plain_line_names_a_line_that_works_as_typed(tmp_path, script):
    rows = make_rows(make_texts(N_ROWS))
    sets = None if script == "without" else {"a": rows[:20], "b": rows[20:40]}
    plain = make_trainer(tmp_path / "plain", rows, [PrivacyAuditCallback()], max_steps=1)
    plain.eval_dataset = sets

    with pytest.raises(CanaryError) as raised:
        plain.train()
    typed = re.findall(r"`([^`]*\(.*?\))`", str(raised.value))
    names = {"PrivacyAuditCallback": PrivacyAuditCallback}

    assert typed[0] == 'PrivacyAuditCallback(canaries="hold_out")'
    audit = eval(typed[0], names)
    make_trainer(tmp_path / "typed", rows, [audit], max_steps=1).train()
    assert len(audit.history) == 2
    # The other way that it names.
    by_hand = names | {"hold_out_canaries": hold_out_canaries, "train_dataset": rows}
    exec(typed[1], by_hand)
    audit = eval(typed[2], by_hand)
    make_trainer(tmp_path / "by hand", by_hand["train_dataset"], [audit], max_steps=1).train()
    assert len(audit.history) == 2


def test_rows_that_come_back_into_training_are_found(tmp_path):
    rows = make_rows(make_texts(N_ROWS))
    trainer = make_trainer(tmp_path, rows, [PrivacyAuditCallback("hold_out")], max_steps=1)
    trainer.train_dataset = rows

    with pytest.raises(OverlappingCanariesError, match="non-members are in the training set"):
        trainer.train()


def test_a_search_holds_out_once_for_all_of_its_trials(tmp_path):
    audit = PrivacyAuditCallback("hold_out")
    trainer = make_trainer(
        tmp_path, make_rows(make_texts(N_ROWS)), [audit], model_init=lambda: make_model(), max_steps=1
    )

    for _ in range(2):
        trainer.train()

    assert len(trainer.train_dataset) == N_LEFT
    assert len(audit.histories) == 2
