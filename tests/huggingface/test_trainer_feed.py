"""Canaries under a plain Trainer; those of TRL have a file of their own."""

import pytest
import torch
from huggingface_tiny import make_trainer
from tiny import make_rows, make_texts, make_tokenizer

from ezmia_callbacks import CanarySet, PrivacyAuditCallback, hold_out_canaries
from ezmia_callbacks.errors import CanaryError
from ezmia_callbacks.huggingface.trainer_feed import draw_from_trainer, feed_of

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
)


def hold_out(rows):
    return hold_out_canaries(rows, n_members=15, n_non_members=20)


def test_text_canaries_are_found_among_padded_rows(tmp_path, caplog):
    texts, canaries = hold_out(make_texts(60))
    tokenizer = make_tokenizer()
    rows = [dict(tokenizer(text, padding="max_length", max_length=16)) for text in texts]
    audit = PrivacyAuditCallback(canaries)

    make_trainer(tmp_path, rows, [audit], max_steps=1).train()

    assert {row.n_scored for row in audit.auditor.encoded.rows} == {11}
    assert "not found" not in caplog.text


def test_text_canaries_beside_a_streamed_training_set(tmp_path, caplog):
    texts, canaries = hold_out(make_texts(60))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_rows(texts))

    audit = PrivacyAuditCallback(canaries)
    make_trainer(tmp_path, Stream(), [audit], max_steps=1).train()

    assert len(audit.history) == 2
    assert "cannot be checked" in caplog.text


def test_text_too_short_to_score_is_left_out_and_counted(tmp_path, caplog):
    texts = [*make_texts(40), "river"]
    canaries = CanarySet.from_lists(texts[:20], texts[20:])
    audit = PrivacyAuditCallback(canaries)

    make_trainer(tmp_path, make_rows(texts[:20]), [audit], max_steps=1).train()

    assert "1 of 41 canaries are left out" in caplog.text
    assert audit.auditor.encoded.record_ids == canaries.record_ids[:-1]


def test_a_collator_that_tokenizes_gets_the_raw_canaries(tmp_path, caplog):
    tokenizer = make_tokenizer()

    def collator(rows):
        batch = tokenizer([row["text"] + " <eos>" for row in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    kept, canaries = hold_out([{"text": text} for text in make_texts(60)])
    audit = PrivacyAuditCallback(canaries)

    make_trainer(tmp_path, kept, [audit], collator=collator, remove_unused_columns=False, max_steps=1).train()

    assert {row.input_ids.tolist()[-1] for row in audit.auditor.encoded.rows} == {tokenizer.eos_token_id}
    assert "not found" not in caplog.text


def test_a_trainer_feeds_the_columns_that_its_model_reads(tmp_path):
    rows = [{**row, "title": "of no use"} for row in make_rows(make_texts(20))]

    pruned = feed_of(make_trainer(tmp_path, rows))
    whole = feed_of(make_trainer(tmp_path, rows, remove_unused_columns=False))

    assert "input_ids" in pruned.columns
    assert "title" not in pruned.columns
    assert whole.columns is None
    assert (pruned.prepare, pruned.takes_raw_records, pruned.training.is_packed) == (None, False, False)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (None, "the trainer has no `eval_dataset`"),
        ({"a": make_rows(make_texts(20)), "b": make_rows(make_texts(20))}, "has 2 evaluation sets"),
    ],
)
def test_an_evaluation_set_that_does_not_match_the_training_is_refused(tmp_path, evaluation, message):
    trainer = make_trainer(tmp_path, make_rows(make_texts(20)))
    trainer.eval_dataset = evaluation

    with pytest.raises(CanaryError, match=message):
        draw_from_trainer(trainer, n_members=10, n_non_members=10, seed=0)
