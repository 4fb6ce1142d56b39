"""Canaries under a plain Trainer; those of TRL have a file of their own."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_tiny import make_trainer
from tiny import make_rows, make_texts, make_tokenizer

from ezmia_callbacks import CanarySet, PrivacyAuditCallback, hold_out_canaries
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.shells.trainer_rows import collated

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


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([{"input_ids": [1, 2]}], "returns no `labels`"),
        ({"input_ids": [[1, 2]]}, r"returns no `labels` \(got \['input_ids'\]\)"),
        ({"input_ids": [[1, 2]] * 3, "labels": [[1, 2]] * 3}, r"array of shape \(3, 2\) of one record"),
    ],
)
def test_a_collator_that_does_not_make_one_labeled_row_is_refused(batch, message):
    trainer = SimpleNamespace(
        args=SimpleNamespace(remove_unused_columns=False), data_collator=lambda rows: batch
    )

    with pytest.raises(ConfigurationError, match=message):
        collated(trainer, {"input_ids": [1, 2]})
