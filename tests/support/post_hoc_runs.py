"""A finished run as people leave it on the disk: base, checkpoints, and the history of its callback."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tiny import WORDS, make_model, make_rows, make_texts, make_tokenizer

from ezmia_callbacks import AuditHistory, CanarySet, PrivacyAuditCallback, hold_out_canaries
from ezmia_callbacks.canaries.files import save_canaries

N_EPOCHS = 4
BATCH_SIZE = 16


@dataclass(frozen=True)
class FinishedRun:
    base: Path
    folder: Path
    canaries: CanarySet
    canaries_file: Path
    history: AuditHistory


def finish_run(path: Path, *, is_adapter: bool = False, is_mixed: bool = False) -> FinishedRun:
    """Train, with a checkpoint and an audit after each epoch."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer = make_tokenizer()
    base, folder = path / "base", path / "run"
    make_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows, canaries = hold_out_canaries(
        make_rows(make_texts(120), tokenizer), n_members=40, n_non_members=60, seed=0
    )
    callback = PrivacyAuditCallback(canaries, batch_size=BATCH_SIZE)
    model = make_model()
    if is_adapter:
        import peft

        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
            model = peft.get_peft_model(model, config)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            num_train_epochs=N_EPOCHS,
            per_device_train_batch_size=4,
            learning_rate=2e-2 if is_adapter else 1e-2,
            save_strategy="epoch",
            report_to="none",
            use_cpu=True,
            bf16=is_mixed,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model()
    save_canaries(canaries, path / "canaries.json")
    return FinishedRun(base, folder, canaries, path / "canaries.json", callback.history)


def as_texts(canaries, change=lambda text: text):
    """The canaries before they were tokenized."""
    tokenizer = make_tokenizer()
    return CanarySet(
        records=tuple(change(tokenizer.decode(record["input_ids"])) for record in canaries.records),
        is_member=canaries.is_member,
        record_ids=canaries.record_ids,
        provenance=canaries.provenance,
    )


def permute_vocabulary(folder):
    """The words of the tokenizer in a folder stand for one another: texts become other tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    shuffled = np.random.default_rng(0).permutation(len(WORDS))
    ids |= {WORDS[i]: value for i, value in enumerate([ids[WORDS[j]] for j in shuffled])}
    path.write_text(json.dumps(content))
