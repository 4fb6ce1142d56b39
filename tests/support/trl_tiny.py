"""Tiny TRL trainers, and what they really train on: read from their own data loader.

TRL is imported where it is used: it is not there on Python 3.10, and this file is still collected.
"""

import dataclasses
import importlib

import numpy as np
import pytest
from datasets import Dataset
from tiny import WORDS, make_model, make_tokenizer

CHAT_TEMPLATE = (
    "{% if tools %}lantern {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant> "
    "{% generation %}{{ message['content'] }} <end> {% endgeneration %}"
    "{% else %}<user> {{ message['content'] }} <end> {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SETTINGS = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 3,
}


def make_chat_tokenizer(template=CHAT_TEMPLATE):
    """The tiny tokenizer with a chat template that marks what the assistant says."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<end>"]})
    tokenizer.chat_template = template
    return tokenizer


def configured(config_class, path, options):
    """The settings of a run; a test of options that this version of TRL does not have is skipped."""
    options = options or {}
    unknown = set(options) - {field.name for field in dataclasses.fields(config_class)}
    if unknown:
        pytest.skip(f"{config_class.__name__} of this version of TRL has no {sorted(unknown)}")
    return config_class(output_dir=str(path), **SETTINGS | options)


def make_sft(path, rows, callbacks=(), *, model=None, tokenizer=None, config=None, **arguments):
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model or make_model(),
        configured(SFTConfig, path, config),
        train_dataset=rows,
        processing_class=tokenizer or make_chat_tokenizer(),
        callbacks=list(callbacks),
        **arguments,
    )


def make_dpo(path, rows, callbacks=(), *, model=None, tokenizer=None, config=None, **arguments):
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model or make_model(),
        args=configured(DPOConfig, path, config),
        train_dataset=rows,
        processing_class=tokenizer or make_chat_tokenizer(),
        callbacks=list(callbacks),
        **{"ref_model": make_model(), **arguments},
    )


def make_other(name, path, rows, callbacks=(), *, model=None, config=None, **arguments):
    """One of TRL's other trainers, wherever this version has it; a test of one that it has not is skipped."""
    places = ("trl", *(f"trl.experimental.{place}" for place in ("kto", "orpo", "cpo", "bco")))
    for place in places:
        try:
            module = importlib.import_module(place)
            trainer_class, config_class = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
        except (ImportError, AttributeError):
            continue
        return trainer_class(
            model=model or make_model(),
            args=configured(config_class, path, config),
            train_dataset=rows,
            processing_class=make_chat_tokenizer(),
            callbacks=list(callbacks),
            **arguments,
        )
    pytest.skip(f"this version of TRL has no {name}Trainer")


def make_sentences(n, *, seed=0, shortest=4, longest=8):
    """Distinct sentences of different lengths."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(shortest, longest + 1))) for _ in range(n)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def make_dataset(kind, n=60, *, seed=0):
    """Records of one kind, each with two or three different sentences."""
    first, second, third = (make_sentences(n, seed=3 * seed + i) for i in range(3))
    rows = {
        "text": lambda a, b, c: {"text": f"{a} {b}"},
        "prompt_completion": lambda a, b, c: {"prompt": f"{a} ", "completion": b},
        "chat_completion": lambda a, b, c: {"prompt": [user(a)], "completion": [assistant(b)]},
        "messages": lambda a, b, c: {"messages": [user(a), assistant(b)]},
        "tools": lambda a, b, c: {
            "messages": [user(a), assistant(b)],
            "tools": '[{"name": "harbor"}]' if len(c) > 30 else None,
        },
        "preference": lambda a, b, c: {"prompt": f"{a} ", "chosen": b, "rejected": c},
        "chat_preference": lambda a, b, c: {
            "prompt": [user(a)],
            "chosen": [assistant(b)],
            "rejected": [assistant(c)],
        },
        "implicit_preference": lambda a, b, c: {
            "chosen": [user(a), assistant(b)],
            "rejected": [user(a), assistant(c)],
        },
    }[kind]
    return Dataset.from_list([rows(*texts) for texts in zip(first, second, third, strict=True)])


def trained_rows(trainer):
    """(token ids, labels of all but the first) of every record in the trainer's own batches."""
    found = set()
    for batch in trainer.get_train_dataloader():
        ids, labels = batch["input_ids"], batch.get("labels")
        if labels is None:  # preference: the first half of the batch is the chosen side
            n_chosen = len(ids) // 2
            labels = ids.masked_fill(batch["completion_mask"] == 0, -100)
            ids, labels = ids[:n_chosen], labels[:n_chosen]
        for i in range(len(ids)):
            if "position_ids" in batch:
                starts = (batch["position_ids"][i] == 0).nonzero().flatten().tolist()
                pieces = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
            else:
                pieces = [batch["attention_mask"][i].bool()]
            found |= {
                (tuple(ids[i][piece].tolist()), tuple(labels[i][piece].tolist()[1:])) for piece in pieces
            }
    return found


def scored_rows(audit, *, members):
    """(token ids, labels of all but the first) of the records that the audit scores."""
    encoded = audit.auditor.encoded
    return {
        (tuple(row.input_ids.tolist()), tuple(row.labels.tolist()[1:]))
        for row, is_member in zip(encoded.rows, encoded.is_member, strict=True)
        if is_member == members
    }


def scored_texts(audit, tokenizer):
    """The scored tokens of each record as text, by record id."""
    encoded = audit.auditor.encoded
    return {
        record_id: tokenizer.decode(row.input_ids[1:][row.is_scored].tolist())
        for row, record_id in zip(encoded.rows, encoded.record_ids, strict=True)
    }
