import json
import logging
import math
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_tiny import (
    NEVER_CROSSED,
    StopAfter,
    draw,
    make_trainer,
    stop_without_a_verdict,
    without_timing,
)
from new_console import console_of_a_new_process
from safetensors.torch import load_file, save_file
from tiny import make_model, make_rows, make_texts, make_tokenizer
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from ezmia_callbacks import (
    AuditHistory,
    CanarySet,
    LeakageBudget,
    PrivacyAuditCallback,
    hold_out_canaries,
)
from ezmia_callbacks.audit.weights import AuditedWeights
from ezmia_callbacks.errors import (
    AuditError,
    CanaryError,
    ConfigurationError,
    OverlappingCanariesError,
    ReferenceMismatchError,
    TooFewCanariesError,
    UnsupportedModelError,
)
from ezmia_callbacks.huggingface.callback import _refuse_unsupported

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
    # Renamed in transformers 5; the old name works on every supported version.
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
)


class Recorder(TrainerCallback):
    """What the surroundings of every hook look like."""

    def __init__(self):
        self.seen = []
        self.logs = []

    def note(self, model):
        self.seen.append(
            (
                [module.training for module in model.modules()],
                [parameter.requires_grad for parameter in model.parameters()],
                torch.get_rng_state().sum().item(),
                np.random.get_state()[1].sum(),
            )
        )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.note(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.note(model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.note(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"eval_strategy": "epoch"},
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_training_is_the_same_to_the_last_bit(tmp_path, arguments):
    rows, canaries = draw()
    texts = make_rows(make_texts(20, seed=8))
    outcomes = []
    for name, callbacks in (
        ("without", []),
        ("with", [PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.99, rule="point"), every=3)]),
    ):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path / name,
            rows,
            [*callbacks, recorder],
            model=make_model(dropout=0.2),
            eval_dataset=texts,
            **arguments,
        )
        trainer.train()
        outcomes.append((trainer, recorder))

    (plain, plain_seen), (audited, audited_seen) = outcomes
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, audited.model.state_dict()[name]), name
    assert plain_seen.seen == audited_seen.seen
    assert without_timing(plain.state.log_history) == without_timing(audited.state.log_history)
    assert vars(plain.processing_class)["init_kwargs"] == vars(audited.processing_class)["init_kwargs"]
    assert audited.processing_class.padding_side == plain.processing_class.padding_side


def test_a_memorizing_run_stops_and_ends_with_the_last_good_weights(tmp_path):
    rows, canaries = draw()
    kept = {}

    class KeepWeights(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = {name: t.clone() for name, t in model.state_dict().items()}

    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.6), every="epoch")
    trainer = make_trainer(tmp_path, rows, [KeepWeights(), audit], num_train_epochs=30)

    trainer.train()

    good = audit.history.last_within_budget
    assert audit.history.stopped is audit.history[-1]
    assert audit.history.stopped.metrics["auc"].band.lower > 0.6
    assert trainer.state.global_step == audit.history.stopped.step < trainer.state.max_steps
    assert good.step > 0
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, kept[good.step][name]), name


def test_leakage_rises_above_095_when_nothing_stops_it(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries)

    make_trainer(tmp_path, rows, [audit], num_train_epochs=30).train()

    assert audit.history[-1].metrics["auc"].value > 0.95
    assert audit.history.stopped is None


def test_a_learning_rate_of_zero_reads_chance_at_every_epoch(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.6), every="epoch")

    make_trainer(tmp_path, rows, [audit], learning_rate=0.0, bf16=True).train()

    assert [result.metrics["auc"].value for result in audit.history] == [0.5] * 4
    assert audit.history.stopped is None


def test_the_stopped_epoch_is_not_saved(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.6))
    trainer = make_trainer(tmp_path, rows, [audit], num_train_epochs=30, save_strategy="epoch")

    trainer.train()

    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    good = audit.history.last_within_budget
    assert saved[-1] == good.step
    loaded = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{good.step}")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_weights_that_cannot_be_judged_any_more_are_not_kept(tmp_path, monkeypatch, caplog):
    rows, canaries = draw()
    stop_without_a_verdict(monkeypatch, after=2)
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.8), every="epoch")
    trainer = make_trainer(tmp_path, rows, [audit], num_train_epochs=5, save_strategy="epoch")

    trainer.train()

    assert [result.step for result in audit.history] == [0, 8, 16, 24]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-8"]
    loaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-16").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trainer.model.state_dict().items())
    assert "Stopped at step 24: leakage could no longer be judged against the budget" in caplog.text
    assert "Restored the weights of step 16" in caplog.text


def test_weights_that_cannot_be_judged_and_cannot_be_replaced_may_be_over_budget(
    tmp_path, monkeypatch, caplog
):
    rows, canaries = draw()
    stop_without_a_verdict(monkeypatch, after=1)
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.8), every="epoch")

    def fail(self, model, *, optimizer=None):
        raise AuditError("nothing was kept.")

    monkeypatch.setattr(AuditedWeights, "restore", fail)
    trainer = make_trainer(tmp_path, rows, [audit], num_train_epochs=5, save_strategy="epoch")

    trainer.train()

    assert "Stopped at step 16: leakage could no longer be judged against the budget" in caplog.text
    assert "may be OVER BUDGET" in caplog.text
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_the_best_checkpoint_that_is_loaded_at_the_end_is_within_budget(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.6))
    trainer = make_trainer(
        tmp_path,
        rows,
        [audit],
        num_train_epochs=30,
        eval_dataset=make_rows(make_texts(20, seed=8)),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )

    trainer.train()

    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best <= audit.history.last_within_budget.step
    assert audit.history.stopped is not None


def test_a_leakage_figure_can_choose_the_best_model(tmp_path):
    rows, canaries = draw()
    trainer = make_trainer(
        tmp_path,
        rows,
        [PrivacyAuditCallback(canaries)],
        eval_dataset=make_rows(make_texts(20, seed=8)),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_privacy_auc",
        greater_is_better=False,
    )

    trainer.train()

    assert trainer.state.best_metric == min(
        row["privacy/auc"] for row in trainer.state.log_history if row.get("privacy/auc") and row["step"]
    )


def test_the_first_audit_over_budget_puts_back_the_starting_weights_and_says_so(tmp_path, caplog):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.6), every=300)
    model = make_model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    make_trainer(tmp_path, rows, [audit], model=model, num_train_epochs=40).train()

    assert audit.history.stopped is not None
    assert audit.history.last_within_budget.is_baseline
    assert "Restored the starting weights" in caplog.text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]), name


def test_a_stop_without_weights_to_put_back_says_so_and_ends_cleanly(tmp_path, caplog):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.6))

    class LoseWeights(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            audit.auditor._weights._kept.discard()

    trainer = make_trainer(tmp_path, rows, [audit, LoseWeights()], num_train_epochs=30)
    trainer.train()

    # The weights of each epoch are kept, then lost before the next: none are there at the stop.
    assert audit.history.stopped is not None
    assert "Earlier weights could not be restored" in caplog.text
    assert "OVER BUDGET" in caplog.text


def test_restore_can_be_declined(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.6), restore=False)
    trainer = make_trainer(tmp_path, rows, [audit], num_train_epochs=30, save_strategy="epoch")

    trainer.train()

    assert audit.history.stopped is not None
    assert (tmp_path / f"checkpoint-{audit.history.stopped.step}").exists()
    assert not list((tmp_path / "_privacy_audit").glob("last_within_budget"))


def test_the_trainers_own_loss_rows_survive_and_the_figures_are_beside_them(tmp_path):
    rows, canaries = draw()
    trainer = make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries, every=4)])

    trainer.train()

    losses = [row["step"] for row in trainer.state.log_history if "loss" in row]
    audits = [row["step"] for row in trainer.state.log_history if "privacy/auc" in row]
    # 60 rows left in training after 60 non-members were held out: 8 steps an epoch
    assert losses == [4, 8, 12, 16, 20, 24]
    assert audits == [0, 4, 8, 12, 16, 20, 24]


def test_tensorboard_holds_the_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.99, rule="point"), every="epoch")
    logs = tmp_path / "logs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(logs))
        make_trainer(tmp_path, rows, [audit], report_to="tensorboard").train()

    accumulators = [EventAccumulator(str(path.parent)) for path in tmp_path.rglob("events.out*")]
    assert len(accumulators) == 1
    accumulators[0].Reload()
    curve = accumulators[0].Scalars("train/privacy/auc")
    assert [event.step for event in curve] == [result.step for result in audit.history]
    np.testing.assert_allclose(
        [event.value for event in curve], [r.metrics["auc"].value for r in audit.history], rtol=1e-6
    )
    assert [event.value for event in accumulators[0].Scalars("train/privacy/budget")] == pytest.approx(
        [0.99] * 3
    )


def test_the_json_lines_file_is_the_history(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries)

    make_trainer(tmp_path, rows, [audit]).train()

    assert (
        AuditHistory.load(tmp_path / "_privacy_audit" / "history.jsonl").to_dicts()
        == audit.history.to_dicts()
    )


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ("epoch", [0, 8, 16, 24]),
        (10, [0, 10, 20, 24]),
        (0.5, [0, 4, 8, 12, 16, 20, 24]),
        (1000, [0, 24]),
    ],
)
def test_audits_come_when_they_were_asked_for_and_at_the_very_end(tmp_path, every, steps):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, every=every)

    make_trainer(tmp_path, rows, [audit]).train()

    assert [result.step for result in audit.history] == steps
    audits = audit.history.audits_after_baseline
    shares = [len(r.judged) * (1 - r.metrics["auc"].band.confidence) for r in audits]
    assert sum(shares) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"num_train_epochs": 1}, [1, 2, 4, 8]),
        ({}, [1, 2, 4, 8, 16, 24]),
        ({"per_device_train_batch_size": 30}, [1, 2, 4, 6]),
        ({"max_steps": 5}, [1, 2, 5]),
        ({"max_steps": 11}, [1, 2, 4, 8, 11]),
        ({"gradient_accumulation_steps": 2}, [1, 2, 4, 8, 12]),
        ({"save_strategy": "steps", "save_steps": 6}, [1, 2, 4, 6, 8, 12, 16, 18, 24]),
    ],
    ids=["one epoch", "epochs", "few steps", "less than an epoch", "steps", "accumulation", "checkpoints"],
)
def test_under_a_budget_the_first_epoch_is_looked_at_early_and_all_looks_are_planned(
    tmp_path, caplog, arguments, steps
):
    caplog.set_level(logging.INFO, logger="ezmia_callbacks")
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=NEVER_CROSSED)

    make_trainer(tmp_path, rows, [audit], **arguments).train()

    assert [result.step for result in audit.history.audits_after_baseline] == steps
    assert audit.history.run_metadata.n_planned_audits == len(steps)
    announced = [message for message in caplog.messages if message.startswith("First audit")]
    assert len(announced) == 1
    assert announced[0].startswith("First audit at step 1 (epoch ")
    assert announced[0].endswith("only the starting weights would be left.")


def test_without_a_budget_audits_come_at_the_ends_of_epochs_by_default(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ezmia_callbacks")
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries)

    make_trainer(tmp_path, rows, [audit]).train()

    assert [result.step for result in audit.history] == [0, 8, 16, 24]
    assert "First audit" not in caplog.text


def test_the_looks_at_a_stream_are_parts_of_its_steps(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=NEVER_CROSSED)

    make_trainer(tmp_path, Stream(), [audit], max_steps=12).train()

    # An epoch of 8 steps ends where no length told it.
    assert [result.step for result in audit.history] == [0, 2, 3, 6, 8, 12]
    assert audit.history.run_metadata.n_planned_audits == "unknown"


def test_one_line_per_audit_reaches_the_console_of_a_plain_script(tmp_path, caplog):
    rows, canaries = draw()

    with caplog.at_level("INFO", logger="ezmia_callbacks"):
        make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries)]).train()

    lines = [record.message for record in caplog.records if "; audit " in record.message]
    assert len(lines) == 4
    assert lines[1].startswith("not judged: no budget, AUC 0.")
    assert lines[1].endswith("; audit at step 8, epoch 1")


def test_one_line_in_a_script_draws_canaries_from_the_trainers_own_data(tmp_path):
    texts = make_texts(200)
    audit = PrivacyAuditCallback(n_members=40, n_non_members=50)
    trainer = make_trainer(
        tmp_path, make_rows(texts[:100]), [audit], eval_dataset=make_rows(texts[100:]), num_train_epochs=40
    )

    trainer.train()

    canaries = audit.auditor.canaries
    assert (canaries.n_members, canaries.n_non_members) == (40, 50)
    assert not canaries.provenance.is_randomized
    assert "no epsilon" in audit.history.about
    assert audit.history[-1].metrics["auc"].value > 0.95


def test_one_line_without_an_evaluation_set_is_refused_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(make_texts(60)), [PrivacyAuditCallback()])

    with pytest.raises(CanaryError, match="no `eval_dataset` to draw non-members from"):
        trainer.train()

    assert trainer.state.global_step == 0


def test_one_line_with_an_evaluation_set_that_is_trained_on_is_refused(tmp_path):
    rows = make_rows(make_texts(100))
    trainer = make_trainer(tmp_path, rows[:80], [PrivacyAuditCallback()], eval_dataset=rows[60:])

    with pytest.raises(OverlappingCanariesError, match="share records"):
        trainer.train()


def test_training_on_the_set_from_before_the_hold_out_is_refused(tmp_path):
    everything = make_rows(make_texts(120))
    _, canaries = hold_out_canaries(everything, n_members=30, n_non_members=60, seed=0)
    trainer = make_trainer(tmp_path, everything, [PrivacyAuditCallback(canaries)])

    with pytest.raises(OverlappingCanariesError, match="60 of 60 non-members are in the training set"):
        trainer.train()

    assert trainer.state.global_step == 0


def group_texts(rows, block_size):
    """As `run_clm.py` does it, of texts that end."""
    joined = [token for row in rows for token in [*row["input_ids"], make_tokenizer().eos_token_id]]
    n = len(joined) // block_size * block_size
    blocks = [joined[i : i + block_size] for i in range(0, n, block_size)]
    return [{"input_ids": block, "attention_mask": [1] * len(block), "labels": block} for block in blocks]


def reported_blocks(caplog):
    return [record for record in caplog.records if "blocks cut from running text" in record.getMessage()]


@pytest.mark.parametrize("is_drawn_by_callback", [False, True])
def test_blocks_of_running_text_are_no_records_and_that_is_said_once(tmp_path, caplog, is_drawn_by_callback):
    blocks = group_texts(make_rows(make_texts(300)), block_size=24)
    if is_drawn_by_callback:
        rows, canaries, evaluation = blocks[:80], None, blocks[80:]
    else:
        (rows, canaries), evaluation = hold_out_canaries(blocks, n_members=30, n_non_members=60), None
    audit = PrivacyAuditCallback(canaries)
    trainer = make_trainer(
        tmp_path,
        rows,
        [audit],
        collator=default_data_collator,
        eval_dataset=evaluation,
        num_train_epochs=1,
    )

    trainer.train()

    (report,) = reported_blocks(caplog)
    assert report.levelname == "WARNING"
    assert re.match(
        r"All \d+ rows have 24 tokens, no padding, and on average 1.[78]\d* end", report.getMessage()
    )


@pytest.mark.parametrize("arguments", [{}, {"padding": "max_length"}], ids=["any length", "padded"])
def test_records_of_a_tokenizer_are_not_taken_for_blocks(tmp_path, caplog, arguments):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    texts = [f"{text} <eos>" for n in (10, 18, 40) for text in make_texts(40, seed=n, n_words=n)]
    made = [dict(tokenizer(text, truncation=True, max_length=24, **arguments)) for text in texts]
    rows, canaries = hold_out_canaries(made, n_members=30, n_non_members=60)

    make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries)], num_train_epochs=1).train()

    assert reported_blocks(caplog) == []


def test_members_that_are_not_trained_on_are_reported(tmp_path, caplog):
    rows = make_rows(make_texts(150))
    canaries = CanarySet.from_lists(rows[:30], rows[30:60])

    make_trainer(tmp_path, rows[60:], [PrivacyAuditCallback(canaries)], max_steps=1).train()

    assert "30 of 30 members were not found among the training rows" in caplog.text


def test_text_canaries_are_tokenized_by_the_trainers_tokenizer(tmp_path, caplog):
    texts, canaries = hold_out_canaries(make_texts(120), n_members=30, n_non_members=60, seed=0)
    audit = PrivacyAuditCallback(canaries)

    make_trainer(tmp_path, make_rows(texts), [audit], max_steps=1).train()

    assert (
        audit.auditor.encoded.rows[0].input_ids.tolist() == make_rows([canaries.records[0]])[0]["input_ids"]
    )
    assert "not found" not in caplog.text


def test_only_tokens_that_carry_loss_in_training_are_scored(tmp_path):
    rows = make_rows(make_texts(120))
    for row in rows:
        row["labels"] = [-100] * 5 + row["input_ids"][5:]
    kept, canaries = hold_out_canaries(rows, n_members=30, n_non_members=60, seed=0)
    audit = PrivacyAuditCallback(canaries)

    make_trainer(
        tmp_path, kept, [audit], collator=DataCollatorForSeq2Seq(make_tokenizer()), max_steps=1
    ).train()

    assert {row.n_scored for row in audit.auditor.encoded.rows} == {7}


def test_a_token_that_the_collator_masks_is_not_scored(tmp_path):
    """With end-of-sequence as padding the collator masks the real one, too: it is never trained."""
    rows = [{"input_ids": [*row["input_ids"], 0]} for row in make_rows(make_texts(120))]
    kept, canaries = hold_out_canaries(rows, n_members=30, n_non_members=60, seed=0)
    audit = PrivacyAuditCallback(canaries)

    make_trainer(tmp_path, kept, [audit], max_steps=1).train()

    assert {row.n_scored for row in audit.auditor.encoded.rows} == {11}


def test_a_random_collator_does_not_move_the_random_state(tmp_path):
    rows, canaries = draw()
    inner = DataCollatorForLanguageModeling(make_tokenizer(), mlm=False)

    def collator(features):
        torch.rand(3)
        return inner(features)

    outcomes = []
    for name, callbacks in (("without", []), ("with", [PrivacyAuditCallback(canaries)])):
        trainer = make_trainer(
            tmp_path / name, rows, callbacks, collator=collator, model=make_model(dropout=0.2)
        )
        trainer.train()
        outcomes.append(trainer.model.state_dict())

    assert all(torch.equal(tensor, outcomes[1][name]) for name, tensor in outcomes[0].items())


def test_a_budget_that_the_set_cannot_resolve_is_refused_before_the_first_step(tmp_path):
    rows, canaries = draw()
    budget = LeakageBudget(metric="tpr_at_fpr", limit=0.1)
    trainer = make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries, budget=budget)])

    with pytest.raises(TooFewCanariesError, match=r"needs at least \d+ non-members, got 60"):
        trainer.train()

    assert trainer.state.global_step == 0


def test_an_encoder_is_refused_before_the_first_step(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    rows, canaries = draw()
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    trainer = make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries)], model=BertForMaskedLM(config))

    with pytest.raises(UnsupportedModelError, match="looks ahead"):
        trainer.train()


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "step", None])
def test_a_meaningless_interval_is_refused_when_built(every):
    with pytest.raises(ConfigurationError, match="`every` must be"):
        PrivacyAuditCallback(every=every)


def test_canaries_of_another_type_are_refused_when_built():
    with pytest.raises(ConfigurationError, match="must be a CanarySet, or 'hold_out', got list"):
        PrivacyAuditCallback(["a", "b"])


def test_a_model_that_diverges_leaves_a_gap_and_training_goes_on(tmp_path, caplog):
    rows, canaries = draw()

    class Diverge(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 10:
                with torch.no_grad():
                    model.transformer.ln_f.weight.fill_(math.nan)

    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.6), every="epoch")
    trainer = make_trainer(tmp_path, rows, [Diverge(), audit])

    trainer.train()

    assert [result.status for result in audit.history] == ["ok", "ok", "failed", "failed"]
    failed = [row for row in trainer.state.log_history if "privacy/failed" in row]
    assert [set(row) for row in failed] == [{"privacy/failed", "epoch", "step"}] * 2
    assert "2 of 3 privacy audits failed" in caplog.text
    assert trainer.state.global_step == 24


def test_a_second_train_keeps_the_first_reference(tmp_path, caplog):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries)
    trainer = make_trainer(tmp_path, rows, [audit], num_train_epochs=5)
    trainer.train()
    reference, first_run = audit.auditor.reference, audit.history

    trainer.train()

    assert audit.auditor.reference is reference
    assert "the reference taken before the first step is kept" in caplog.text
    assert [result.step for result in audit.history] == [0, 8, 16, 24, 32, 40]
    assert audit.history[-1].metrics["auc"].value > first_run[-1].metrics["auc"].value


def test_a_trial_with_a_fresh_model_gets_a_fresh_reference(tmp_path):
    """As a hyperparameter search does it: one trainer, one callback, a new model for every trial."""
    rows, canaries = draw()
    seeds = iter([0, 7, 7])  # Trainer builds one model when it is made, and one for every training
    audit = PrivacyAuditCallback(canaries)
    trainer = make_trainer(tmp_path, rows, [audit], model_init=lambda: make_model(seed=next(seeds)))
    trainer.train()
    first = audit.auditor.reference

    trainer.train()

    assert audit.history[0].is_baseline
    assert audit.history[0].metrics["auc"].value == 0.5
    np.testing.assert_array_equal(audit.auditor.reference.log_probs, first.log_probs)
    assert [result.step for result in audit.history] == [0, 8, 16, 24]


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_a_resumed_run_continues_its_curve_with_the_original_reference(tmp_path):
    rows, canaries = draw()
    straight = PrivacyAuditCallback(canaries)
    make_trainer(tmp_path / "straight", rows, [straight], num_train_epochs=4, save_strategy="epoch").train()
    first = PrivacyAuditCallback(canaries)
    broken = make_trainer(tmp_path / "broken", rows, [first], num_train_epochs=4, save_strategy="epoch")
    broken.add_callback(StopAfter(16))
    broken.train()

    second = PrivacyAuditCallback(canaries)
    make_trainer(tmp_path / "broken", rows, [second], num_train_epochs=4, save_strategy="epoch").train(
        resume_from_checkpoint=True
    )

    assert [r.step for r in second.history] == [0, 8, 16, 24, 32]
    assert [r.metrics["auc"].value for r in second.history] == [
        r.metrics["auc"].value for r in straight.history
    ]


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_resuming_without_the_reference_file_is_refused(tmp_path):
    rows, canaries = draw()
    make_trainer(
        tmp_path, rows, [PrivacyAuditCallback(canaries), StopAfter(8)], save_strategy="epoch"
    ).train()
    (tmp_path / "_privacy_audit" / "reference.safetensors").unlink()

    second = make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries)], save_strategy="epoch")
    with pytest.raises(ReferenceMismatchError, match="No reference statistics"):
        second.train(resume_from_checkpoint=True)


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_a_checkpoint_made_without_the_callback_is_refused(tmp_path):
    """Whatever the folder holds: here the reference of a run that had the callback."""
    rows, canaries = draw()
    make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries)], max_steps=1).train()
    make_trainer(tmp_path, rows, [StopAfter(8)], model=make_model(seed=5), save_strategy="epoch").train()

    second = make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries)], save_strategy="epoch")
    with pytest.raises(ReferenceMismatchError, match="made without this callback"):
        second.train(resume_from_checkpoint=True)

    assert second.state.global_step == 8


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_a_run_whose_notes_are_lost_resumes_with_its_history(tmp_path, caplog):
    rows, canaries = draw()
    first = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path, rows, [first, StopAfter(16)], save_strategy="epoch").train()
    for note in (tmp_path / "_privacy_audit" / "checkpoints").iterdir():
        note.unlink()

    second = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path, rows, [second], save_strategy="epoch").train(resume_from_checkpoint=True)

    assert "What the checkpoint of step 16 was fed is lost" in caplog.text
    assert [result.step for result in second.history] == [0, 8, 16, 24]
    assert second.history.to_dicts()[:3] == first.history.to_dicts()
    # All were fed again in the epoch that was left.
    assert set(second.auditor.exposures.n_times[second.auditor.encoded.is_member]) == {1}


class SavesAt(TrainerCallback):
    """A callback that comes after the audit and saves on its own account."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step == 11


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_a_checkpoint_of_another_callback_goes_on_with_what_was_fed_by_then(tmp_path):
    rows, canaries = draw()
    settings = {"num_train_epochs": 2}
    whole = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path / "whole", rows, [whole], **settings).train()
    first = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path / "parts", rows, [first, SavesAt(), StopAfter(12)], **settings).train()

    second = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path / "parts", rows, [second], **settings).train(resume_from_checkpoint=True)

    assert second.auditor.exposures.to_dict() == whole.auditor.exposures.to_dict()


def test_a_checkpoint_can_be_the_reference(tmp_path):
    rows, canaries = draw()
    make_model(seed=7).save_pretrained(tmp_path / "base")
    audit = PrivacyAuditCallback(canaries, reference=tmp_path / "base")
    started = PrivacyAuditCallback(canaries)
    make_trainer(tmp_path / "a", rows, [started], model=make_model(seed=7), max_steps=1).train()

    make_trainer(tmp_path / "b", rows, [audit], max_steps=1).train()

    np.testing.assert_array_equal(audit.auditor.reference.log_probs, started.auditor.reference.log_probs)
    assert audit.history[0].metrics["auc"].value != 0.5


def test_a_checkpoint_with_missing_weights_is_no_reference(tmp_path):
    rows, canaries = draw()
    make_model().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    trainer = make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries, reference=tmp_path / "base")])

    with pytest.raises(ConfigurationError, match=r"weights are missing: .*h\.1\.mlp"):
        trainer.train()

    assert trainer.state.global_step == 0


@pytest.mark.parametrize("content", [b"half of a file", b""])
def test_a_damaged_checkpoint_is_refused_by_name(content, tmp_path):
    rows, canaries = draw()
    make_model().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    trainer = make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries, reference=tmp_path / "base")])

    with pytest.raises(ConfigurationError, match=r"reference='.*base' is neither 'auto'"):
        trainer.train()


def test_a_checkpoint_that_is_not_there_is_refused_before_the_first_step(tmp_path):
    rows, canaries = draw()
    trainer = make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries, reference="no/such-model")])

    with pytest.raises(ConfigurationError, match="reference='no/such-model' is neither 'auto'"):
        trainer.train()

    assert trainer.state.global_step == 0


def test_two_callbacks_audit_side_by_side(tmp_path):
    rows, canaries = draw()
    first = PrivacyAuditCallback(canaries, output_dir=tmp_path / "one")
    second = PrivacyAuditCallback(canaries, output_dir=tmp_path / "two", score="wbc", prefix="wbc/")
    trainer = make_trainer(tmp_path, rows, [first, second])

    trainer.train()

    logged = {name for row in trainer.state.log_history for name in row}
    assert {"privacy/auc", "wbc/auc"} <= logged
    assert [r.step for r in first.history] == [r.step for r in second.history]


@pytest.mark.parametrize("different", [{}, {"prefix": "other/"}, {"output_dir": "elsewhere"}])
def test_two_callbacks_that_would_overwrite_each_other_are_refused(tmp_path, different):
    rows, canaries = draw()
    callbacks = [PrivacyAuditCallback(canaries), PrivacyAuditCallback(canaries, **different)]
    trainer = make_trainer(tmp_path, rows, callbacks)

    with pytest.raises(ConfigurationError, match="share a `prefix` or an `output_dir`"):
        trainer.train()


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_two_callbacks_resume_each_with_its_own_curve(tmp_path):
    rows, canaries = draw()

    def callbacks():
        return [
            PrivacyAuditCallback(canaries, output_dir=tmp_path / "one"),
            PrivacyAuditCallback(canaries, output_dir=tmp_path / "two", score="wbc", prefix="wbc/"),
        ]

    first = callbacks()
    make_trainer(tmp_path, rows, [*first, StopAfter(8)], save_strategy="epoch").train()
    second = callbacks()
    make_trainer(tmp_path, rows, second, save_strategy="epoch", max_steps=9).train(
        resume_from_checkpoint=True
    )

    for before, after in zip(first, second, strict=True):
        assert after.history[1].to_dict() == before.history[1].to_dict()


def test_the_callback_pickles_before_and_after_training(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.9, rule="point"))
    pickle.loads(pickle.dumps(audit))
    make_trainer(tmp_path, rows, [audit], max_steps=2).train()

    copy = pickle.loads(pickle.dumps(audit))

    assert copy.settings == audit.settings
    assert copy.canaries.fingerprint == canaries.fingerprint


def test_a_callback_that_came_by_pickle_shows_its_audits(tmp_path, capsys):
    rows, canaries = draw()
    pickled = pickle.dumps(PrivacyAuditCallback(canaries))

    with console_of_a_new_process():
        make_trainer(tmp_path, rows, [pickle.loads(pickled)], max_steps=2).train()

    assert "; audit at step 2" in capsys.readouterr().out


def test_figures_in_the_log_are_plain_numbers(tmp_path):
    rows, canaries = draw()
    trainer = make_trainer(tmp_path, rows, [PrivacyAuditCallback(canaries)], max_steps=2)

    trainer.train()

    for row in trainer.state.log_history:
        assert all(type(value) in (float, int) for value in row.values()), row
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_weights_that_deepspeed_keeps_where_they_were_never_restored_are_refused():
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2, config={"fp16": {"enabled": True}})
    accelerator = SimpleNamespace(parallelism_config=None)
    trainer = SimpleNamespace(accelerator=accelerator, model_wrapped=engine)

    with pytest.raises(ConfigurationError, match=r"`fp16.enabled: true` .* `restore=False`"):
        _refuse_unsupported(trainer, restore=True)
    _refuse_unsupported(trainer, restore=False)
    engine.config["fp16"]["enabled"] = False
    _refuse_unsupported(trainer, restore=True)


class OwnModel(nn.Module):
    """A model of the user's own: it is called with tokens alone, and returns logits and nothing else."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


class OwnTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(inputs["input_ids"])
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def test_a_model_of_the_users_own_is_called_as_the_user_says(tmp_path):
    rows, canaries = draw()
    settings = {"model": OwnModel(), "trainer_class": OwnTrainer, "remove_unused_columns": False}
    audit = PrivacyAuditCallback(canaries, logits_fn=lambda model, ids, mask: model(ids))

    make_trainer(tmp_path / "told", rows, [audit], **settings).train()
    refused = make_trainer(tmp_path / "untold", rows, [PrivacyAuditCallback(canaries)], **settings)

    assert audit.history.n_failed == 0
    assert audit.auditor.exposures.n_batches > 0
    assert audit.history[-1].to_metrics()["auc"] > 0.6
    with pytest.raises(UnsupportedModelError, match="logits_fn"):
        refused.train()
