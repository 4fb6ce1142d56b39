"""Preference pairs under real training: DPO trains the contrast, and the margin sees it."""

import copy

import numpy as np
import pytest
import torch
from lightning_tiny import make_trainer, pl
from peft import LoraConfig, get_peft_model
from tiny import WORDS, make_model, make_texts, make_tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from ezmia_callbacks import (
    CanarySet,
    LeakageBudget,
    LightningPrivacyAuditCallback,
    PrivacyAuditCallback,
    PrivacyAuditor,
    hold_out_canaries,
)
from ezmia_callbacks.canaries.files import load_canaries, save_canaries
from ezmia_callbacks.errors import ConfigurationError, ReferenceMismatchError
from ezmia_callbacks.post_hoc import audit_checkpoints, find_checkpoints
from ezmia_callbacks.scoring.rows import encode_canaries

# PEFT asks transformers 5 by the old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
    # Lightning names what a small example leaves out.
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*isinstance.treespec.*",
)

N_PROMPT = 4
# Token ids of words: the tiny vocabulary has no others.
FIRST, N_IDS = 3, len(WORDS)


def make_pairs(n=100, *, seed=0, n_answer=24):
    """Tokenized pairs that differ in one token."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        ids = rng.integers(FIRST, FIRST + N_IDS, N_PROMPT + n_answer).tolist()
        rejected = list(ids)
        at = N_PROMPT + int(rng.integers(n_answer))
        rejected[at] = int((ids[at] - FIRST + rng.integers(1, N_IDS)) % N_IDS + FIRST)
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * N_PROMPT + ids[N_PROMPT:],
                "rejected_input_ids": rejected,
                "rejected_labels": [-100] * N_PROMPT + rejected[N_PROMPT:],
            }
        )
    return rows


def log_probs(model, ids):
    """Log-probability of each answer, (n_rows,)."""
    ids = torch.tensor(ids)
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, ids[:, 1:, None])[:, N_PROMPT - 1 :, 0].sum(1)


def dpo_loss(model, reference, rows):
    ids = [row["input_ids"] for row in rows] + [row["rejected_input_ids"] for row in rows]
    with torch.no_grad():
        before = log_probs(reference, ids)
    shifts = log_probs(model, ids) - before
    margins = shifts[: len(rows)] - shifts[len(rows) :]
    return (-torch.nn.functional.logsigmoid(0.1 * margins)).mean()


class Dpo:
    """A hand-written loop of DPO."""

    def __init__(self, rows, model=None, *, lr=1e-3):
        self.rows = rows
        self.model = model or make_model(n_embd=64)
        self.model.train()
        self.reference = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        self.rng = np.random.default_rng(0)

    def epoch(self):
        for numbers in np.array_split(self.rng.permutation(len(self.rows)), len(self.rows) // 8):
            rows = [self.rows[i] for i in numbers]
            dpo_loss(self.model, self.reference, rows).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def draw(n=100):
    kept, canaries = hold_out_canaries(make_pairs(n), n_members=n // 2, n_non_members=n // 2, seed=0)
    return kept, canaries


def audited(auditor, loop, n_epochs):
    auditor.begin(loop.model)
    for epoch in range(n_epochs):
        loop.epoch()
        auditor.audit(loop.model, epoch=epoch + 1)
    return auditor.history[-1]


def assert_same(actual, expected):
    np.testing.assert_array_equal(actual.log_probs, expected.log_probs)
    np.testing.assert_array_equal(actual.rejected.log_probs, expected.rejected.log_probs)


def test_the_margin_sees_what_the_chosen_side_alone_does_not():
    kept, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.8), score="margin", n_audits=3)

    result = audited(auditor, Dpo(kept), 3)

    others = {name: figure.value for name, figure in result.auc_by_score.items()}
    assert result.metrics["auc"].value > 0.98
    assert others["ez"] < 0.7
    assert max(others.values()) < 0.8
    assert result.decision.is_within_budget is False
    assert result.n_members_seen == 50
    assert auditor.history[0].metrics["auc"].value == 0.5


def test_the_margin_stands_beside_the_score_that_decides():
    kept, canaries = draw()

    result = audited(PrivacyAuditor(canaries, score="ez"), Dpo(kept), 2)

    assert result.auc_by_score["margin"].value > 0.9 > result.metrics["auc"].value


def test_the_margin_is_judged_with_the_others_and_decides():
    """What EZ on the chosen side lets pass is over budget by the margin."""
    budget = LeakageBudget(limit=0.8)
    kept, canaries = draw()

    by_ez = audited(PrivacyAuditor(canaries, budget=budget, score="ez", n_audits=2), Dpo(kept), 2)
    result = audited(PrivacyAuditor(canaries, budget=budget, n_audits=2), Dpo(kept), 2)

    assert by_ez.decision.is_within_budget
    assert result.decision.is_within_budget is False
    assert result.decided_by == "margin"
    assert set(result.judged) == {"ez", "loss_difference", "wbc", "loss", "margin"}


def test_the_margin_is_that_of_the_training():
    kept, canaries = draw(40)
    loop = Dpo(kept)
    auditor = PrivacyAuditor(canaries, score="margin")

    result = audited(auditor, loop, 1)

    loop.model.eval()
    with torch.no_grad():
        chosen, rejected = (
            log_probs(loop.model, ids) - log_probs(loop.reference, ids)
            for ids in (
                [row["input_ids"] for row in canaries.records],
                [row["rejected_input_ids"] for row in canaries.records],
            )
        )
    np.testing.assert_allclose(result.scores, (chosen - rejected).numpy(), atol=1e-4)


@pytest.mark.slow
def test_both_sides_are_compared_with_the_base_under_its_adapter():
    kept, canaries = draw()
    base = make_model(n_embd=64)
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=8, target_modules=["c_attn"], lora_alpha=32, fan_in_fan_out=True)
    )
    auditor = PrivacyAuditor(canaries, score="margin", reference="adapter")
    of_base = PrivacyAuditor(canaries, score="margin")

    result = audited(auditor, Dpo(kept, model, lr=3e-3), 6)
    of_base.begin(base)

    assert result.metrics["auc"].value > 0.9
    np.testing.assert_allclose(
        auditor.reference.rejected.log_probs, of_base.reference.rejected.log_probs, atol=1e-5
    )


def test_text_pairs_are_scored_on_both_sides_in_a_loop_of_ones_own():
    words = "river stone field cloud winter garden letter road house window harbor lantern".split()
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": " ".join(rng.choice(words, 5)), "chosen": f" {a} {b}", "rejected": f" {b} {a}"}
        for a, b in (rng.choice(words, 2, replace=False) for _ in range(200))
    ]
    _, canaries = hold_out_canaries(rows, n_members=20, n_non_members=20, seed=0)
    auditor = PrivacyAuditor(canaries, tokenizer=make_tokenizer(), assume_seen=True)

    result = auditor.begin(make_model())

    assert auditor.encoded.has_pairs
    assert auditor.target.rejected.n_records == 40
    assert result.judged["margin"]["auc"].value == 0.5


def test_a_score_that_needs_pairs_is_refused_before_the_first_step():
    rows = [{"input_ids": row["input_ids"]} for row in make_pairs(60)]
    _, canaries = hold_out_canaries(rows, n_members=20, n_non_members=20, seed=0)

    with pytest.raises(ConfigurationError, match="The margin compares the two sides of preference pairs"):
        PrivacyAuditor(canaries, score="margin").begin(make_model())


def test_batches_and_their_size_change_nothing():
    _, canaries = draw(40)
    first, second = (PrivacyAuditor(canaries, batch_size=size) for size in (4, 64))
    model = make_model()

    first.begin(model)
    second.begin(model)

    np.testing.assert_allclose(
        first.reference.rejected.log_probs, second.reference.rejected.log_probs, atol=1e-5
    )


def test_a_subset_keeps_both_sides(tmp_path):
    kept, canaries = draw(400)
    loop = Dpo(kept)
    auditor = PrivacyAuditor(canaries, score="margin", max_overhead=1e-6, n_audits=2)

    result = audited(auditor, loop, 1)

    assert result.share < 1.0
    assert auditor.encoded.has_pairs
    assert auditor.reference.rejected.n_records == len(auditor.encoded.rows) == len(result.scores)


def test_canaries_are_cut_on_both_sides_where_training_cuts_its_records():
    kept, canaries = draw()
    cut = [{name: values[:16] for name, values in row.items()} for row in kept]
    auditor = PrivacyAuditor(canaries, score="margin")

    result = audited(auditor, Dpo(cut), 2)

    assert {len(side.input_ids) for row in auditor.encoded.rows for side in row.sides} == {16}
    assert auditor.reference.rejected.n_tokens == len(auditor.encoded.rows) * 12
    assert np.isfinite(result.scores).all()


# Going on with an interrupted run.


def test_a_resumed_state_has_the_rejected_sides_of_the_reference():
    kept, canaries = draw()
    loop = Dpo(kept)
    auditor, resumed = (PrivacyAuditor(canaries, score="margin") for _ in range(2))
    audited(auditor, loop, 2)

    resumed.load_state_dict(auditor.state_dict())
    resumed.begin(loop.model)
    loop.epoch()

    assert_same(resumed.reference, auditor.reference)
    assert resumed.audit(loop.model).metrics["auc"].value > 0.8


def test_a_resumed_folder_has_them_too(tmp_path):
    kept, canaries = draw()
    loop = Dpo(kept)
    auditor, resumed = (PrivacyAuditor(canaries, score="margin", output_dir=tmp_path) for _ in range(2))
    audited(auditor, loop, 1)

    resumed.resume(loop.model, auditor.history.to_dicts(), step=1)

    assert_same(resumed.reference, auditor.reference)


def chosen_alone(canaries):
    """The canaries as they were before both sides were scored."""
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in canaries.records]
    return CanarySet(
        records=tuple(rows),
        is_member=canaries.is_member,
        record_ids=canaries.record_ids,
        provenance=canaries.provenance,
    )


def test_a_run_that_scored_one_side_is_not_gone_on_with(tmp_path):
    kept, canaries = draw(60)
    loop = Dpo(kept)
    old = PrivacyAuditor(chosen_alone(canaries), output_dir=tmp_path)
    audited(old, loop, 1)

    with pytest.raises(ReferenceMismatchError, match="start again from the original weights"):
        PrivacyAuditor(canaries, output_dir=tmp_path).resume(loop.model, old.history.to_dicts(), step=1)
    with pytest.raises(ReferenceMismatchError, match="start again from the original weights"):
        PrivacyAuditor(canaries).load_state_dict(old.state_dict())


def test_pairs_go_into_a_file_of_canaries_and_back(tmp_path):
    _, canaries = draw(60)

    save_canaries(canaries, tmp_path / "canaries.json")

    loaded = load_canaries(tmp_path / "canaries.json")
    assert encode_canaries(loaded).fingerprint == encode_canaries(canaries).fingerprint


# The shells.


class DpoModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make_model(n_embd=64)
        # In a list it is no part of the module.
        self.reference = [copy.deepcopy(self.model).eval()]

    def training_step(self, rows, _):
        return dpo_loss(self.model, self.reference[0], rows)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_a_module_of_lightning_that_trains_pairs_is_audited_on_both_sides(tmp_path, caplog):
    kept, canaries = draw()
    audit = LightningPrivacyAuditCallback(canaries, score="margin", every="epoch")
    loader = torch.utils.data.DataLoader(kept, batch_size=8, collate_fn=list, shuffle=True)

    make_trainer(tmp_path, [audit], max_epochs=2).fit(DpoModule(), loader)

    last = audit.history[-1]
    assert last.metrics["auc"].value > 0.9
    assert last.n_members_seen == 50
    assert "both sides are scored as they were given" in caplog.text


@pytest.mark.parametrize("is_text", [True, False])
def test_a_plain_trainer_that_would_lose_a_side_is_refused(tmp_path, is_text):
    kept, canaries = draw(60)
    if is_text:
        texts = make_texts(60)
        rows = [
            {"prompt": "the ", "chosen": a, "rejected": b} for a, b in zip(texts, texts[::-1], strict=True)
        ]
        canaries = CanarySet.from_lists(rows[:30], rows[30:])
    trainer = Trainer(
        make_model(),
        TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=[{"input_ids": row["input_ids"]} for row in kept],
        processing_class=make_tokenizer(),
        data_collator=DataCollatorForLanguageModeling(make_tokenizer(), mlm=False),
        callbacks=[PrivacyAuditCallback(canaries)],
    )

    with pytest.raises(ConfigurationError, match="preference pairs, and the run's collator makes one row"):
        trainer.train()

    assert trainer.state.global_step == 0


@pytest.mark.parametrize("is_text", [True, False])
def test_checkpoints_are_audited_on_both_sides(tmp_path, is_text):
    tokenizer = make_tokenizer()
    kept, canaries = draw(40)
    loop = Dpo(kept)
    loop.model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    auditor = PrivacyAuditor(canaries, score="margin", n_audits=2)
    auditor.begin(loop.model)
    for epoch in range(2):
        loop.epoch()
        auditor.audit(loop.model, step=epoch + 1)
        loop.model.save_pretrained(tmp_path / "run" / f"checkpoint-{epoch + 1}")
    if is_text:
        canaries = canaries.select(
            range(len(canaries)), records=[as_text(row, tokenizer) for row in canaries.records]
        )
    save_canaries(canaries, tmp_path / "canaries.json")

    history = audit_checkpoints(
        find_checkpoints(tmp_path / "run"),
        load_canaries(tmp_path / "canaries.json"),
        base=tmp_path / "base",
        score="margin",
        device="cpu",
    )

    assert [result.metrics for result in history] == [result.metrics for result in auditor.history]
    np.testing.assert_allclose(history[-1].scores, auditor.history[-1].scores, atol=1e-5)


def as_text(row, tokenizer):
    """The same pair before it was tokenized."""
    prompt, chosen, rejected = (
        tokenizer.convert_ids_to_tokens(ids)
        for ids in (
            row["input_ids"][:N_PROMPT],
            row["input_ids"][N_PROMPT:],
            row["rejected_input_ids"][N_PROMPT:],
        )
    )
    return {
        "prompt": " ".join(prompt),
        "chosen": " " + " ".join(chosen),
        "rejected": " " + " ".join(rejected),
    }
