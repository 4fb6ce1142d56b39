"""Canaries under real TRL trainers: what is scored is what their own data loader hands to the model."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from packaging.version import Version
from peft import LoraConfig
from tiny import WORDS, make_model
from transformers import TrainerCallback
from trl_tiny import (
    make_chat_tokenizer,
    make_dataset,
    make_dpo,
    make_other,
    make_sentences,
    make_sft,
    scored_rows,
    scored_texts,
    trained_rows,
)

from ezmia_callbacks import (
    CanarySet,
    LeakageBudget,
    PrivacyAuditCallback,
    PrivacyAuditor,
    hold_out_canaries,
)
from ezmia_callbacks.errors import (
    CanaryError,
    ConfigurationError,
    OverlappingCanariesError,
    TooFewCanariesError,
)

trl = pytest.importorskip("trl")

JOINS_PAIRS = Version(trl.__version__) >= Version("0.29")
PACKING = {"packing": True, "packing_strategy": "bfd"}
needs_joined_pairs = pytest.mark.skipif(not JOINS_PAIRS, reason="this version of TRL is refused")

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
    # TRL deprecates one of its own options each minor release; the numbers do not depend on it.
    "ignore:.*will be removed in.*:FutureWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
    # The tiny models have no flash attention; each record keeps its own positions all the same.
    "ignore:Padding-free training is enabled.*:UserWarning",
    "ignore:Using `DataCollatorWithFlattening`.*:UserWarning",
    # TRL sets itself what it asks for.
    "ignore:When using DPODataCollatorWithPadding.*:UserWarning",
    "ignore:You have different amounts of desirable.*:UserWarning",
)


def hold_out(dataset, *, n_members=15, n_non_members=20):
    return hold_out_canaries(dataset, n_members=n_members, n_non_members=n_non_members)


def audited(make, path, dataset, *, config=None, **arguments):
    """One step of training, and the audit of it."""
    kept, canaries = hold_out(dataset)
    audit = PrivacyAuditCallback(canaries)
    trainer = make(path, kept, [audit], config=config, **arguments)
    trainer.train()
    return trainer, audit


def assert_scored_as_trained(trainer, audit, *, n_members=15, n_non_members=20):
    trained = trained_rows(trainer)
    members, non_members = (scored_rows(audit, members=side) for side in (True, False))
    assert (len(members), len(non_members)) == (n_members, n_non_members)
    assert members <= trained
    assert not {ids for ids, _ in non_members} & {ids for ids, _ in trained}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("text", {}),
        ("text", {"max_length": 9}),
        ("text", {"max_length": 9, "truncation_mode": "keep_end"}),
        ("text", {"pad_to_multiple_of": 8}),
        ("text", {"remove_unused_columns": False}),
        ("text", {"shuffle_dataset": True}),
        ("prompt_completion", {}),
        ("prompt_completion", {"completion_only_loss": True}),
        ("prompt_completion", {"completion_only_loss": False}),
        ("prompt_completion", {"max_length": 10}),
        ("chat_completion", {}),
        ("chat_completion", {"completion_only_loss": False}),
        ("chat_completion", {"assistant_only_loss": True}),
        ("messages", {}),
        ("messages", {"assistant_only_loss": True}),
        ("messages", {"assistant_only_loss": True, "max_length": 14}),
        ("tools", {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*keep_end.*")
def test_sft_scores_what_it_trains(tmp_path, caplog, kind, config):
    trainer, audit = audited(make_sft, tmp_path, make_dataset(kind), config=config)

    assert_scored_as_trained(trainer, audit)
    assert "not found" not in caplog.text


def test_optional_columns_that_the_first_canary_does_not_have_are_kept(tmp_path, caplog):
    """`Dataset.from_list` takes its columns from the first row, and the tools would be gone."""
    kept, canaries = hold_out(make_dataset("tools"))
    without_first = sorted(range(len(canaries)), key=lambda i: "tools" in canaries.records[i])
    records = [canaries.records[i] for i in without_first]
    is_member = canaries.is_member[without_first]
    canaries = CanarySet(tuple(records), is_member, canaries.record_ids, canaries.provenance)
    audit = PrivacyAuditCallback(canaries)
    trainer = make_sft(tmp_path, kept, [audit])

    trainer.train()

    assert "tools" not in records[0]
    assert "tools" in records[-1]
    assert_scored_as_trained(trainer, audit)
    assert "not found" not in caplog.text


def test_the_end_of_sequence_token_that_trl_appends_is_scored(tmp_path):
    dataset = make_dataset("text")

    trainer, audit = audited(make_sft, tmp_path, dataset)

    tokenizer = trainer.processing_class
    for record_id, text in scored_texts(audit, tokenizer).items():
        record = dataset[int(record_id.removeprefix("row-"))]["text"]
        assert text == record.split(" ", 1)[1] + " <eos>"


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("prompt_completion", {}, "{b} <eos>"),
        ("chat_completion", {}, "{b} <end>"),
        ("messages", {"assistant_only_loss": True}, "{b} <end>"),
        ("messages", {}, "{a} <end> <assistant> {b} <end>"),
    ],
    ids=str,
)
def test_only_the_completion_is_scored_where_only_it_is_trained(tmp_path, kind, config, expected):
    first, second = make_sentences(60, seed=0), make_sentences(60, seed=1)

    trainer, audit = audited(make_sft, tmp_path, make_dataset(kind), config=config)

    tokenizer = trainer.processing_class
    for record_id, text in scored_texts(audit, tokenizer).items():
        i = int(record_id.removeprefix("row-"))
        assert text == expected.format(a=first[i], b=second[i])


def test_completions_cut_to_one_token_are_too_few_to_score(tmp_path):
    kept, canaries = hold_out(make_dataset("prompt_completion"))
    trainer = make_sft(tmp_path, kept, [PrivacyAuditCallback(canaries)], config={"max_length": 5})

    with pytest.raises(TooFewCanariesError, match="max_length"):
        trainer.train()

    assert trainer.state.global_step == 0


def test_records_without_a_trained_token_after_truncation_are_left_out_and_counted(tmp_path, caplog):
    dataset = make_dataset("prompt_completion", n=120)
    kept, canaries = hold_out(dataset, n_members=50, n_non_members=60)
    audit = PrivacyAuditCallback(canaries)
    trainer = make_sft(tmp_path, kept, [audit], config={"max_length": 7})
    n_lost = sum(len(record["prompt"].split()) >= 7 for record in canaries.records)

    trainer.train()

    assert n_lost > 20
    assert f"{n_lost} of 110 canaries are left out" in caplog.text
    assert "not found" not in caplog.text
    assert scored_rows(audit, members=True) <= trained_rows(trainer)


def test_records_that_truncation_makes_equal_are_left_out_on_both_sides(tmp_path, caplog):
    """A non-member whose beginning is that of a member is trained on: it says nothing about either."""
    beginnings = make_sentences(45, longest=4)
    members = [f"{text} old river" for text in beginnings[:25]]
    non_members = [f"{text} small stone" for text in beginnings[20:]]
    canaries = CanarySet.from_lists(members, non_members)
    audit = PrivacyAuditCallback(canaries)
    rows = Dataset.from_list([{"text": text} for text in members])

    make_sft(tmp_path, rows, [audit], config={"max_length": 4}).train()

    assert "10 of 50 canaries are left out" in caplog.text
    assert (audit.auditor.encoded.n_members, audit.auditor.encoded.n_non_members) == (20, 20)


def test_formatting_func_is_applied_to_canaries(tmp_path, caplog):
    def formatting_func(example):
        return "keeps " + example["text"] + " silent"

    trainer, audit = audited(make_sft, tmp_path, make_dataset("text"), formatting_func=formatting_func)

    if not hasattr(trainer, "_formatting_func"):
        # TRL once forgot the function after use.
        assert "15 of 15 members were not found among the training rows" in caplog.text
        return
    assert_scored_as_trained(trainer, audit)
    assert all(
        text.endswith("silent <eos>") for text in scored_texts(audit, trainer.processing_class).values()
    )
    assert "not found" not in caplog.text


def test_a_formatting_func_that_needs_other_columns_is_refused_with_advice(tmp_path):
    dataset = make_dataset("text").add_column("title", make_sentences(60, seed=9))
    kept, canaries = hold_out(dataset)
    trainer = make_sft(
        tmp_path,
        kept,
        [PrivacyAuditCallback(canaries)],
        formatting_func=lambda row: row["title"] + row["text"],
    )
    if not hasattr(trainer, "_formatting_func"):
        pytest.skip("this version of TRL forgets the function after use")

    with pytest.raises(ConfigurationError, match=r"columns 'text': KeyError in .*formatting_func") as refused:
        trainer.train()

    assert "title" in str(refused.value.__cause__)

    assert trainer.state.global_step == 0


def test_text_canaries_go_where_the_trainer_reads_text(tmp_path, caplog):
    texts, canaries = hold_out([row["text"] for row in make_dataset("text")])
    rows = Dataset.from_list([{"story": text} for text in texts])
    audit = PrivacyAuditCallback(canaries)

    trainer = make_sft(tmp_path, rows, [audit], config={"dataset_text_field": "story"})
    trainer.train()

    assert_scored_as_trained(trainer, audit)
    assert "not found" not in caplog.text


def packed(path, dataset, callbacks, **config):
    return make_sft(path, dataset, callbacks, config={**PACKING, "max_length": 30, **config})


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("text", {}),
        ("text", {"packing_strategy": "bfd_split"}),
        ("text", {"max_length": 9}),
        ("prompt_completion", {"shuffle_dataset": True}),
        ("messages", {}),
    ],
    ids=str,
)
def test_packed_records_are_scored_one_by_one_and_found_in_their_rows(tmp_path, caplog, kind, config):
    kept, canaries = hold_out(make_dataset(kind))
    audit = PrivacyAuditCallback(canaries)
    trainer = packed(tmp_path, kept, [audit], **config)

    trainer.train()

    assert len(trainer.train_dataset) < len(kept) or config.get("max_length") == 9
    assert scored_rows(audit, members=True) <= trained_rows(trainer)
    assert "not found" not in caplog.text


@pytest.mark.filterwarnings("ignore:.*keep_end.*")
def test_packing_cuts_the_end_whatever_the_truncation_mode(tmp_path, caplog):
    """BFD packing keeps the start of a long record even where `truncation_mode` says the end."""
    kept, canaries = hold_out(make_dataset("text"))
    audit = PrivacyAuditCallback(canaries)
    trainer = packed(tmp_path, kept, [audit], max_length=9, truncation_mode="keep_end")

    trainer.train()

    assert scored_rows(audit, members=True) <= trained_rows(trainer)
    assert "not found" not in caplog.text


def test_a_non_member_inside_a_packed_row_is_refused(tmp_path):
    dataset = make_dataset("text")
    _, canaries = hold_out(dataset)
    trainer = packed(tmp_path, dataset, [PrivacyAuditCallback(canaries)])

    with pytest.raises(OverlappingCanariesError, match="20 of 20 non-members are in the training set"):
        trainer.train()

    assert trainer.state.global_step == 0


def test_wrapped_packing_is_said_to_leave_nothing_to_check(tmp_path, caplog):
    kept, canaries = hold_out(make_dataset("text"))
    audit = PrivacyAuditCallback(canaries)

    packed(tmp_path, kept, [audit], packing_strategy="wrapped").train()

    assert "cannot be checked" in caplog.text
    assert "wrapped" in caplog.text
    assert len(audit.history) == 2


@pytest.mark.parametrize("config", [{}, {"packing_strategy": "wrapped"}, {"eval_packing": False}], ids=str)
def test_one_line_with_packed_rows_is_refused_with_advice(tmp_path, config):
    trainer = make_sft(
        tmp_path,
        make_dataset("text"),
        [PrivacyAuditCallback()],
        config={"packing": True, "max_length": 30, **config},
        eval_dataset=make_dataset("text", seed=1),
    )

    with pytest.raises(CanaryError, match=r"`train_dataset` is packed.*hold_out_canaries"):
        trainer.train()

    assert trainer.state.global_step == 0


def test_one_line_with_a_packed_evaluation_set_is_refused(tmp_path):
    trainer = make_sft(
        tmp_path,
        make_dataset("text"),
        [PrivacyAuditCallback()],
        config={"eval_packing": True, "max_length": 30},
        eval_dataset=make_dataset("text", seed=1),
    )

    with pytest.raises(CanaryError, match="`eval_dataset` is packed"):
        trainer.train()


@pytest.mark.parametrize("config", [{}, {"pad_to_multiple_of": 8}], ids=str)
def test_padding_free_batches_are_scored_record_by_record(tmp_path, caplog, config):
    trainer, audit = audited(
        make_sft,
        tmp_path,
        make_dataset("prompt_completion"),
        config={"padding_free": True, "max_length": None, **config},
    )

    members = scored_rows(audit, members=True)
    if config:  # the padding of the whole batch stands behind its last record
        assert all(0 not in ids for ids, _ in members)
    else:
        assert members <= trained_rows(trainer)
    assert "not found" not in caplog.text


@pytest.mark.parametrize("kind", ["text", "prompt_completion", "messages"])
def test_one_line_draws_from_the_trainers_prepared_rows(tmp_path, caplog, kind):
    audit = PrivacyAuditCallback(n_members=15, n_non_members=20)
    trainer = make_sft(tmp_path, make_dataset(kind), [audit], eval_dataset=make_dataset(kind, seed=1))

    trainer.train()

    assert_scored_as_trained(trainer, audit)
    assert "not found" not in caplog.text


@pytest.mark.parametrize(
    ("make", "kind", "config"),
    [
        (make_sft, "text", {}),
        (make_sft, "text", {"max_length": 9, "shuffle_dataset": True}),
        (make_sft, "prompt_completion", {}),
        (make_sft, "messages", {"assistant_only_loss": True}),
        pytest.param(make_dpo, "preference", {}, marks=needs_joined_pairs),
        pytest.param(make_dpo, "chat_preference", {}, marks=needs_joined_pairs),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_rows_are_held_out_after_trls_preparation_without_an_evaluation_set(
    tmp_path, caplog, make, kind, config
):
    dataset = make_dataset(kind, n=120)
    audit = PrivacyAuditCallback("hold_out")

    trainer = make(tmp_path, dataset, [audit], config=config)
    trainer.train()

    assert trainer.args.eval_strategy == "no"
    assert len(trainer.train_dataset) == 120 - audit.canaries.n_non_members == 108
    assert_scored_as_trained(trainer, audit, n_members=24, n_non_members=12)
    assert audit.canaries.provenance.is_randomized
    assert "not found" not in caplog.text


@pytest.mark.parametrize("config", [{}, {"packing_strategy": "wrapped"}], ids=str)
def test_packed_rows_are_not_held_out(tmp_path, config):
    config = {"packing": True, "max_length": 30, **config}

    with pytest.raises(CanaryError, match=r"is packed.*before the trainer is made.*packing=False"):
        make_sft(tmp_path, make_dataset("text"), [PrivacyAuditCallback("hold_out")], config=config)


def test_one_line_with_an_evaluation_set_that_is_trained_on_is_refused(tmp_path):
    dataset = make_dataset("text", n=100)
    trainer = make_sft(
        tmp_path,
        dataset.select(range(80)),
        [PrivacyAuditCallback(n_members=10, n_non_members=15)],
        eval_dataset=dataset.select(range(60, 100)),
    )

    with pytest.raises(OverlappingCanariesError):
        trainer.train()


def tokenized(kind, column):
    """Rows as a script's own `map` would leave them: token ids, and a mask of what is to be learned."""
    tokenizer = make_chat_tokenizer()
    rows = []
    for row in make_dataset(kind):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        n_prompt = len(row["prompt"].split())
        mask = [0] * n_prompt + [1] * (len(ids) - n_prompt)
        labels = [token if bit else -100 for token, bit in zip(ids, mask, strict=True)]
        extra = {"labels": labels, "completion_mask": mask}[column]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), column: extra})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("column", ["labels", "completion_mask"])
@pytest.mark.parametrize(
    "config",
    [{}, {"completion_only_loss": True}, {"max_length": 12}, {**PACKING, "max_length": 30}],
    ids=str,
)
def test_tokenized_canaries_take_the_trainers_mask_and_truncation(tmp_path, caplog, column, config):
    """TRL ignores `completion_mask` in tokenized rows unless `completion_only_loss=True`."""
    kept, canaries = hold_out(tokenized("prompt_completion", column))
    audit = PrivacyAuditCallback(canaries)
    trainer = make_sft(tmp_path, kept, [audit], config=config)

    trainer.train()

    assert scored_rows(audit, members=True) <= trained_rows(trainer)
    assert "not found" not in caplog.text


@needs_joined_pairs
@pytest.mark.parametrize("kind", ["preference", "chat_preference", "implicit_preference"])
@pytest.mark.parametrize("config", [{}, {"max_length": 13}, {"precompute_ref_log_probs": True}], ids=str)
def test_dpo_scores_both_sides_after_their_prompt(tmp_path, caplog, kind, config):
    dataset = make_dataset(kind)
    second = make_sentences(60, seed=1)

    trainer, audit = audited(make_dpo, tmp_path, dataset, config=config)

    assert_scored_as_trained(trainer, audit)
    assert "not found" not in caplog.text
    if "max_length" not in config:
        end = "<eos>" if kind == "preference" else "<end>"
        for record_id, text in scored_texts(audit, trainer.processing_class).items():
            assert text == f"{second[int(record_id.removeprefix('row-'))]} {end}"


@needs_joined_pairs
def test_one_line_works_with_dpo(tmp_path, caplog):
    audit = PrivacyAuditCallback(n_members=15, n_non_members=20)
    trainer = make_dpo(
        tmp_path, make_dataset("preference"), [audit], eval_dataset=make_dataset("preference", seed=1)
    )

    trainer.train()

    assert_scored_as_trained(trainer, audit)


@pytest.mark.skipif(JOINS_PAIRS, reason="this version of TRL is audited")
def test_pairs_that_trl_joins_only_in_the_forward_pass_are_refused(tmp_path):
    kept, canaries = hold_out(make_dataset("preference"))
    trainer = make_dpo(tmp_path, kept, [PrivacyAuditCallback(canaries)])

    with pytest.raises(ConfigurationError, match=r"use TRL 0\.29 or newer"):
        trainer.train()

    assert trainer.state.global_step == 0


@needs_joined_pairs
def test_dpo_records_whose_prompt_fills_the_length_are_left_out_and_counted(tmp_path, caplog):
    kept, canaries = hold_out(make_dataset("preference", n=120), n_members=50, n_non_members=60)
    audit = PrivacyAuditCallback(canaries)
    trainer = make_dpo(tmp_path, kept, [audit], config={"max_length": 7})
    n_lost = sum(len(record["prompt"].split()) >= 7 for record in canaries.records)

    trainer.train()

    assert f"{n_lost} of 110 canaries are left out" in caplog.text
    assert scored_rows(audit, members=True) <= trained_rows(trainer)


@needs_joined_pairs
def test_a_preference_pair_that_is_trained_on_is_no_non_member(tmp_path):
    dataset = make_dataset("chat_preference")
    _, canaries = hold_out(dataset)
    trainer = make_dpo(tmp_path, dataset, [PrivacyAuditCallback(canaries)])

    with pytest.raises(OverlappingCanariesError, match="20 of 20 non-members"):
        trainer.train()


@pytest.mark.parametrize(
    ("make", "kind", "other"), [(make_dpo, "preference", "text"), (make_sft, "text", "preference")]
)
def test_canaries_of_another_shape_than_the_trainers_rows_are_refused(tmp_path, make, kind, other):
    _, canaries = hold_out(make_dataset(other))
    trainer = make(tmp_path, make_dataset(kind), [PrivacyAuditCallback(canaries)])

    with pytest.raises(ConfigurationError, match="preparation cannot process"):
        trainer.train()

    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("make", "kind"),
    [(make_sft, "text"), pytest.param(make_dpo, "preference", marks=needs_joined_pairs)],
)
def test_trl_metrics_stay_in_the_loss_rows(tmp_path, make, kind):
    kept, canaries = hold_out(make_dataset(kind))
    config = {"max_steps": 8, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    other = make_dataset(kind, n=8, seed=1)
    logs = []
    for callbacks in ([], [PrivacyAuditCallback(canaries, every=1)]):
        trainer = make(tmp_path, kept, callbacks, config=config, eval_dataset=other)
        trainer.train()
        logs.append(trainer.state.log_history)

    plain, beside = ([set(row) for row in rows if "loss" in row or "eval_loss" in row] for rows in logs)
    assert "mean_token_accuracy" in plain[0] or "rewards/chosen" in plain[0]
    assert beside == plain
    audits = [row for row in logs[1] if "privacy/overhead" in row or "privacy/auc" in row]
    assert len(audits) == 9
    assert all(name.startswith("privacy/") or name in ("epoch", "step") for row in audits for name in row)


@needs_joined_pairs
def test_dpo_is_the_same_to_the_last_bit_with_and_without_an_audit(tmp_path):
    kept, canaries = hold_out(make_dataset("chat_preference"))
    outcomes = []
    for callbacks in ([], [PrivacyAuditCallback(canaries, every=2)]):
        model = make_model(dropout=0.2)
        trainer = make_dpo(tmp_path, kept, callbacks, model=model, config={"max_steps": 6})
        trainer.train()
        outcomes.append(trainer.model.state_dict())

    assert all(torch.equal(tensor, outcomes[1][name]) for name, tensor in outcomes[0].items())


@pytest.mark.parametrize(
    "setup",
    [
        {},
        {"config": {"bf16": True}},
        {"config": {"gradient_checkpointing": True}},
        {"config": {"packing": True, "max_length": 30}},
        {"peft_config": True},
    ],
    ids=str,
)
def test_sft_is_the_same_to_the_last_bit_with_and_without_an_audit(tmp_path, setup):
    kept, canaries = hold_out(make_dataset("messages"))
    budget = LeakageBudget(limit=0.99, rule="point")
    outcomes = []
    for callbacks in ([], [PrivacyAuditCallback(canaries, budget=budget, every=2)]):
        torch.manual_seed(0)  # TRL once made adapters before it set the seed
        lora = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
        trainer = make_sft(
            tmp_path,
            kept,
            callbacks,
            model=make_model(dropout=0.2),
            config={"max_steps": 6} | setup.get("config", {}),
            **({"peft_config": lora} if "peft_config" in setup else {}),
        )
        trainer.train()
        outcomes.append(trainer.model.state_dict())

    plain, with_audit = outcomes
    assert plain.keys() == with_audit.keys()
    assert all(torch.equal(tensor, with_audit[name]) for name, tensor in plain.items())


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_a_resumed_sft_run_finds_its_canaries_and_reference_again(tmp_path):
    kept, canaries = hold_out(make_dataset("messages"))
    config = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "packing": True}
    first = PrivacyAuditCallback(canaries)
    make_sft(tmp_path, kept, [first], config={**config, "max_length": 30}).train()
    second = PrivacyAuditCallback(canaries)
    trainer = make_sft(tmp_path, kept, [second], config={**config, "max_length": 30, "num_train_epochs": 2})

    trainer.train(resume_from_checkpoint=True)

    assert [result.epoch for result in second.history] == [0.0, 1.0, 2.0]
    assert second.history[1].to_dict() == first.history[1].to_dict()


def test_leakage_is_seen_through_trls_fused_head(tmp_path):
    """TRL puts a closure over the original model in `forward`: a copy of it would never seem to learn."""
    kept, canaries = hold_out(make_dataset("text"))
    audit = PrivacyAuditCallback(canaries)
    trainer = make_sft(tmp_path, kept, [audit], config={"max_steps": 60})

    trainer.train()

    assert audit.history[0].metrics["auc"].value == 0.5
    assert audit.history[-1].metrics["auc"].value > 0.8


def test_a_template_changed_after_the_rows_were_made_is_reported(tmp_path, caplog):
    kept, canaries = hold_out(make_dataset("messages"))
    trainer = make_sft(tmp_path, kept, [PrivacyAuditCallback(canaries)])
    trainer.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

    trainer.train()

    assert "15 of 15 members were not found among the training rows" in caplog.text


def test_training_on_the_set_from_before_the_hold_out_is_refused(tmp_path):
    dataset = make_dataset("messages")
    _, canaries = hold_out(dataset)
    trainer = make_sft(tmp_path, dataset, [PrivacyAuditCallback(canaries)])

    with pytest.raises(OverlappingCanariesError, match="20 of 20 non-members are in the training set"):
        trainer.train()

    assert trainer.state.global_step == 0


def test_a_streamed_training_set_is_said_to_be_unchecked(tmp_path, caplog):
    kept, canaries = hold_out(make_dataset("text"))
    audit = PrivacyAuditCallback(canaries)
    trainer = make_sft(tmp_path, kept.to_iterable_dataset(), [audit])

    trainer.train()

    assert "cannot be checked" in caplog.text
    assert scored_rows(audit, members=True) <= trained_rows(trainer)


SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def test_rows_that_trl_leaves_as_they_are_are_scored_as_they_are(tmp_path, caplog):
    kept, canaries = hold_out(tokenized("prompt_completion", "labels"))
    audit = PrivacyAuditCallback(canaries)
    trainer = make_sft(tmp_path, kept, [audit], config={**SKIP, "max_length": 5})

    trainer.train()

    assert_scored_as_trained(trainer, audit)
    assert "not found" not in caplog.text


def test_raw_canaries_beside_rows_that_are_not_prepared_are_refused(tmp_path):
    _, canaries = hold_out(make_dataset("prompt_completion"))
    trainer = make_sft(
        tmp_path,
        tokenized("prompt_completion", "labels"),
        [PrivacyAuditCallback(canaries)],
        config=SKIP,
    )

    with pytest.raises(ConfigurationError, match="Draw the canaries from the dataset that the tr"):
        trainer.train()

    assert trainer.state.global_step == 0


def test_a_collator_that_tokenizes_gets_the_raw_canaries(tmp_path, caplog):
    tokenizer = make_chat_tokenizer()

    def collator(rows):
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    dataset = make_dataset("text")
    kept, canaries = hold_out(dataset)
    audit = PrivacyAuditCallback(canaries)
    config = {**SKIP, "remove_unused_columns": False}
    trainer = make_sft(tmp_path, kept, [audit], config=config, tokenizer=tokenizer, data_collator=collator)
    trainer.train()
    everything = make_sft(
        tmp_path,
        dataset,
        [PrivacyAuditCallback(canaries)],
        config=config,
        tokenizer=tokenizer,
        data_collator=collator,
    )

    assert_scored_as_trained(trainer, audit)
    assert "not found" not in caplog.text
    with pytest.raises(OverlappingCanariesError, match="20 of 20 non-members"):
        everything.train()


def test_the_trainer_is_left_as_it_was(tmp_path):
    kept, canaries = hold_out(make_dataset("text"))
    trainer = make_sft(
        tmp_path, kept, [PrivacyAuditCallback(canaries)], config={"packing": True, "max_length": 30}
    )
    before = copy.deepcopy(trainer.args.to_dict())

    trainer.train()

    assert trainer.args.to_dict() == before


ONE_EPOCH = {"max_steps": -1, "num_train_epochs": 1}


def n_times(path, kind, *, make=make_sft, config=None):
    """How often training fed each member, and each non-member, in an epoch."""
    kept, canaries = hold_out(make_dataset(kind))
    audit = PrivacyAuditCallback(canaries, every="epoch")
    make(path, kept, [audit], config={**ONE_EPOCH, **(config or {})}).train()
    exposures, is_member = audit.auditor.exposures.n_times, audit.auditor.encoded.is_member
    return exposures[is_member].tolist(), exposures[~is_member].tolist(), audit


@pytest.mark.parametrize("kind", ["text", "prompt_completion", "chat_completion", "messages", "tools"])
def test_each_kind_of_record_is_recognized_in_the_batches(tmp_path, kind):
    members, others, _ = n_times(tmp_path, kind)

    assert set(members) == {1}
    assert set(others) == {0}


@needs_joined_pairs
@pytest.mark.parametrize("kind", ["preference", "chat_preference"])
def test_preference_pairs_are_recognized_by_both_of_their_sides(tmp_path, kind):
    members, others, _ = n_times(tmp_path, kind, make=make_dpo)

    assert set(members) == {1}
    assert set(others) == {0}


@pytest.mark.parametrize(
    "options", [{"packing_strategy": "bfd"}, {"padding_free": True, "packing": False, "max_length": None}]
)
def test_records_are_recognized_in_packed_rows(tmp_path, options):
    config = {"packing": True, "max_length": 30, **options}
    members, others, _ = n_times(tmp_path, "text", config=config)

    assert set(members) == {1}
    assert set(others) == {0}


def test_of_records_that_packing_cuts_the_whole_ones_count(tmp_path):
    config = {"packing": True, "max_length": 30, "packing_strategy": "wrapped"}
    members, others, audit = n_times(tmp_path, "text", config=config)

    assert set(members) == {0, 1}
    assert set(others) == {0}
    (finding,) = (f for f in audit.history[-1].findings if f.name == "members never fed")
    assert f"{members.count(0)} of 15 members" in finding.text


# Preference pairs that differ in one word: DPO trains the contrast, which the chosen side alone hardly shows.


def one_word_pairs(n=60, *, n_words=20):
    rng = np.random.default_rng(0)
    rows = []
    for prompt, words in zip(make_sentences(n), rng.choice(WORDS, size=(n, n_words)), strict=True):
        other = words.copy()
        at = int(rng.integers(n_words))
        other[at] = rng.choice([word for word in WORDS if word != words[at]])
        rows.append({"prompt": f"{prompt} ", "chosen": " ".join(words), "rejected": " ".join(other)})
    return Dataset.from_list(rows)


def dpo_on_one_word(path, *, n_epochs=2, config=None, **arguments):
    kept, canaries = hold_out(one_word_pairs(), n_members=30, n_non_members=30)
    audit = PrivacyAuditCallback(canaries, score="margin", every="epoch")
    config = {"max_steps": -1, "num_train_epochs": n_epochs, "learning_rate": 1e-3, **(config or {})}
    model = make_model(n_embd=64, n_positions=48)
    reference = None if "peft_config" in arguments else copy.deepcopy(model)
    trainer = make_dpo(path, kept, [audit], model=model, ref_model=reference, config=config, **arguments)
    trainer.train()
    return trainer, audit


def trained_pairs(trainer):
    """(token ids, labels of all but the first) of both sides of every pair in the trainer's own batches."""
    found = set()
    for batch in trainer.get_train_dataloader():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        sides = [
            (tuple(ids[mask].tolist()), tuple(own[mask].tolist()[1:]))
            for ids, own, mask in zip(batch["input_ids"], labels, batch["attention_mask"].bool(), strict=True)
        ]
        found |= set(zip(sides[: len(sides) // 2], sides[len(sides) // 2 :], strict=True))
    return found


def scored_pairs(audit, *, members):
    encoded = audit.auditor.encoded
    return {
        tuple((tuple(side.input_ids.tolist()), tuple(side.labels.tolist()[1:])) for side in row.sides)
        for row, is_member in zip(encoded.rows, encoded.is_member, strict=True)
        if is_member == members
    }


@needs_joined_pairs
def test_under_dpo_the_margin_sees_what_the_chosen_side_does_not(tmp_path):
    trainer, audit = dpo_on_one_word(tmp_path, n_epochs=3)

    last = audit.history[-1]

    assert last.metrics["auc"].value > 0.98
    assert last.auc_by_score["ez"].value < 0.8
    assert last.n_members_seen == 30
    assert audit.history[0].metrics["auc"].value == 0.5
    assert scored_pairs(audit, members=True) == trained_pairs(trainer)
    assert not scored_pairs(audit, members=False) & trained_pairs(trainer)


@needs_joined_pairs
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": "ipo"},
        {"loss_type": "hinge"},
        {"loss_type": "sigmoid_norm"},
        {"loss_type": "apo_zero"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
        {"precompute_ref_log_probs": True},
        {"max_length": 24},
        {"max_length": 24, "truncation_mode": "keep_end"},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_the_margin_is_there_whatever_the_loss_and_the_form_of_the_pairs(tmp_path, config):
    trainer, audit = dpo_on_one_word(tmp_path, n_epochs=4, config=config)

    last = audit.history[-1]

    # Where training cuts the word that differs, the sides are equal, and there is nothing to contrast.
    assert last.metrics["auc"].value > (0.75 if "max_length" in config else 0.9)
    assert last.n_members_seen == last.n_members
    assert scored_pairs(audit, members=True) <= trained_pairs(trainer)


@needs_joined_pairs
@pytest.mark.slow
def test_under_lora_both_sides_are_compared_with_the_base(tmp_path):
    lora = LoraConfig(r=8, target_modules=["c_attn"], lora_alpha=32, fan_in_fan_out=True)
    config = {"learning_rate": 1e-2}

    _, audit = dpo_on_one_word(tmp_path, n_epochs=6, peft_config=lora, config=config)

    assert audit.history[-1].metrics["auc"].value > 0.9
    assert audit.history[-1].n_members_seen == 30


@needs_joined_pairs
def test_the_margin_of_a_step_is_the_one_that_trl_reports(tmp_path):
    """`rewards/margins` of TRL are beta times the mean margin of a batch, before its step."""
    kept, canaries = hold_out(one_word_pairs(20), n_members=10, n_non_members=10)
    audit = PrivacyAuditCallback(canaries, score="margin", every=1)
    config = {"max_steps": 3, "per_device_train_batch_size": 10, "logging_steps": 1, "beta": 0.3}
    model = make_model(n_positions=48)

    trainer = make_dpo(tmp_path, kept, [audit], model=model, ref_model=copy.deepcopy(model), config=config)
    trainer.train()

    reported = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    is_member = audit.auditor.encoded.is_member
    found = [0.3 * result.scores[is_member].mean() for result in audit.history]
    np.testing.assert_allclose(found[:3], reported[:3], atol=1e-4)


@needs_joined_pairs
def test_a_pair_trained_with_another_rejected_answer_is_not_taken_for_the_canary(tmp_path, caplog):
    kept, canaries = hold_out(one_word_pairs(), n_members=30, n_non_members=30)
    others = kept.map(lambda row: {"rejected": f"{row['rejected']} stone"})
    audit = PrivacyAuditCallback(canaries, every="epoch")
    config = {"max_steps": -1, "num_train_epochs": 1}

    make_dpo(tmp_path, others, [audit], model=make_model(n_positions=48), config=config).train()

    assert audit.history[-1].n_members_seen == 0
    assert audit.history[-1].decision.is_within_budget is None


# Other trainers: refused before the first step, and what the error advises works.


class Auditing(TrainerCallback):
    """The callback of docs/how-to/chat-trl.md."""

    def __init__(self, auditor):
        self.auditor = auditor

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.auditor.begin(model)

    def on_epoch_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        result = self.auditor.audit(model, step=state.global_step, epoch=state.epoch)
        if result.decision.stop:
            control.should_training_stop = True
            self.auditor.restore_within_budget(model, optimizer)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.auditor.finish(model)


def labeled(n=80):
    """Answers of which every second one is wanted, as KTO takes them."""
    pairs = one_word_pairs(n)
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
            for i, row in enumerate(pairs)
        ]
    )


def make_rater():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(
        GPT2Config(
            **{"vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16, "num_labels": 1},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
        )
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("KTO", r"KTOTrainer cannot be audited by the callback: .*records with label True alone"),
        ("ORPO", r"ORPOTrainer cannot be audited by the callback: .*with the pairs as canaries"),
        (
            "CPO",
            r"CPOTrainer cannot be audited by the callback: .*the margin between them is among the scores",
        ),
        ("Reward", r"RewardTrainer cannot be audited by the callback: it trains a model that rates texts"),
        (
            "GRPO",
            r"GRPOTrainer cannot be audited by the callback: it trains on answers that the model samples",
        ),
    ],
)
@pytest.mark.parametrize("has_canaries", [True, False])
def test_other_trainers_of_trl_are_refused_with_what_to_do(tmp_path, name, expected, has_canaries):
    if name == "Reward" and not JOINS_PAIRS:
        pytest.skip("TRL 0.17 makes no RewardConfig once it has made one of another trainer")
    dataset = {"KTO": labeled(), "GRPO": make_dataset("prompt_completion")}.get(name, one_word_pairs())
    kept, canaries = hold_out(dataset)
    audit = PrivacyAuditCallback(canaries if has_canaries else None, n_members=15, n_non_members=20)
    arguments = {
        "KTO": {"ref_model": make_model(n_positions=48)},
        "Reward": {"model": make_rater()},
        "GRPO": {"reward_funcs": lambda completions, **_: [0.0] * len(completions)},
    }.get(name, {})
    trainer = make_other(name, tmp_path, kept, [audit], **{"model": make_model(n_positions=48), **arguments})
    if not has_canaries:
        trainer.eval_dataset = trainer.train_dataset

    with pytest.raises(ConfigurationError, match=expected):
        trainer.train()

    assert trainer.state.global_step == 0


def audited_by_hand(name, path, rows, canaries, *, score, n_epochs=3, **arguments):
    auditor = PrivacyAuditor(canaries, score=score, tokenizer=make_chat_tokenizer())
    config = {"max_steps": -1, "num_train_epochs": n_epochs, "learning_rate": 1e-3}
    make_other(name, path, rows, [Auditing(auditor)], config=config, **arguments).train()
    return auditor.history[-1]


@pytest.mark.parametrize("name", ["ORPO", "CPO"])
def test_pairs_of_other_trainers_are_audited_by_hand(tmp_path, name):
    """Their losses make the chosen side likelier, too, which other scores than the margin see better."""
    kept, canaries = hold_out(one_word_pairs(), n_members=30, n_non_members=30)
    model = make_model(n_embd=64, n_positions=48)

    last = audited_by_hand(name, tmp_path, kept, canaries, score="loss_difference", model=model)

    assert last.n_members_seen == 30
    assert last.metrics["auc"].value > 0.8
    assert last.auc_by_score["margin"].value > 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("label", "lower", "upper"), [(True, 0.75, 1.0), (False, 0.0, 0.35)])
def test_answers_of_kto_are_audited_by_hand_and_apart(tmp_path, label, lower, upper):
    wanted = labeled(160).filter(lambda row: row["label"] == label)
    others = labeled(320).select(range(160, 320)).filter(lambda row: row["label"] != label)
    kept, canaries = hold_out(wanted, n_members=40, n_non_members=40)
    model = make_model(n_embd=64, n_positions=48)

    last = audited_by_hand(
        *("KTO", tmp_path, concatenate_datasets([kept, others.select(range(40))]), canaries),
        score="loss_difference",
        n_epochs=6,
        model=model,
        ref_model=copy.deepcopy(model),
    )

    assert last.n_members_seen == 40
    assert lower < last.metrics["auc"].value < upper
