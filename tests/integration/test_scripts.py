"""Scripts as people write them, with the callback added as one line.

They are run in a process of their own, with nothing of the test suite in sight.
"""

import json
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
from tiny import make_model, make_texts, make_tokenizer

# The pattern of transformers' own language-modeling example: tokenize, concatenate, cut into blocks.
CAUSAL_LM_SCRIPT = """
    import sys
    from itertools import chain
    from datasets import load_dataset
    from transformers import (
        AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator, set_seed,
    )
    from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback

    model_path, train_file, validation_file, output_dir = sys.argv[1:]
    set_seed(1)
    raw = load_dataset("text", data_files={"train": train_file, "validation": validation_file})
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)

    def group(examples, block_size=16):
        joined = {name: list(chain(*rows)) for name, rows in examples.items()}
        total = len(joined["input_ids"]) // block_size * block_size
        blocks = {
            name: [ids[i : i + block_size] for i in range(0, total, block_size)]
            for name, ids in joined.items()
        }
        blocks["labels"] = blocks["input_ids"].copy()
        return blocks

    tokenized = raw.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"])
    blocks = tokenized.map(group, batched=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir, num_train_epochs=40, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
            report_to="none", save_strategy="epoch", save_total_limit=1, eval_strategy="epoch",
        ),
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[PrivacyAuditCallback(budget=LeakageBudget(metric="auc", limit=0.60))],
    )
    trainer.train()
    trainer.save_model()
"""

# The pattern of TRL's supervised fine-tuning example, with LoRA.
SFT_SCRIPT = """
    import sys
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
    from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback

    model_path, train_file, validation_file, output_dir = sys.argv[1:]
    dataset = load_dataset("text", data_files={"train": train_file, "validation": validation_file})
    trainer = SFTTrainer(
        model=model_path,
        args=SFTConfig(
            output_dir, num_train_epochs=60, per_device_train_batch_size=8, learning_rate=3e-3, use_cpu=True,
            report_to="none", save_strategy="epoch", save_total_limit=1, max_length=16, bf16=False,
        ),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        peft_config=LoraConfig(
            r=32, lora_alpha=256, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM"
        ),
        callbacks=[PrivacyAuditCallback(budget=LeakageBudget(metric="auc", limit=0.60))],
    )
    trainer.train()
    trainer.save_model()
"""


def run_script(script, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    texts = make_texts(120, n_words=16)
    (tmp_path / "train.txt").write_text("\n".join(texts[:60]))
    (tmp_path / "validation.txt").write_text("\n".join(texts[60:]))
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    arguments = [tmp_path / name for name in ("script.py", "model", "train.txt", "validation.txt", "out")]
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(CAUSAL_LM_SCRIPT, id="causal_lm"),
        pytest.param(
            SFT_SCRIPT,
            id="sft",
            marks=pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed here"),
        ),
    ],
)
def test_one_line_in_a_real_script_stops_it_and_leaves_a_curve(script, tmp_path):
    outcome = run_script(script, tmp_path)

    assert outcome.returncode == 0, outcome.stderr[-3000:]
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "_privacy_audit" / "history.jsonl").read_text().splitlines()[1:]
    ]
    assert rows[0]["is_baseline"]
    assert rows[-1]["decision"]["stop"]
    assert rows[-1]["metrics"]["auc"]["band"]["lower"] > 0.6
    # One readable line an audit, and the stop, reach the console of a script that configured nothing.
    shown = f"{outcome.stdout}\n{outcome.stderr}"
    lines = [line for line in shown.splitlines() if "; audit " in line]
    assert len(lines) == len(rows)
    assert all(len(line) <= 100 for line in lines)
    assert "leakage exceeded the budget." in shown
    assert "Restored the" in shown
    assert "membership was not randomized" in shown
