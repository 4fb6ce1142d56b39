"""Ray Train: the Hugging Face Trainer in a group of two workers, stopped at a leakage budget.

Workers are processes with a folder of their own, so that every folder is given as an absolute path.
"""

from typing import Any

import ray
import ray.train
from common import MAX_LENGTH, output_dir_argument, print_outcome, private_texts, small_base_model
from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ezmia_callbacks import AuditHistory, LeakageBudget, PrivacyAuditCallback, hold_out_canaries


def train_on_each_worker(config: dict[str, Any]) -> None:
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(config["base"])
    rows = [dict(tokenizer(text, truncation=True, max_length=MAX_LENGTH)) for text in config["texts"]]

    # The same rows and the same seed on every worker: the same canaries.
    train_dataset, canaries = hold_out_canaries(rows, n_members=150, n_non_members=250, seed=0)
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(metric="auc", limit=0.70), batch_size=32)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(config["base"]),
        args=TrainingArguments(
            output_dir=str(config["run"]),
            num_train_epochs=6,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            save_strategy="epoch",
            logging_strategy="epoch",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=train_dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        # In this order: what is over the budget is never reported to Ray.
        callbacks=[audit, RayTrainReportCallback()],
    )
    trainer = prepare_trainer(trainer)
    trainer.train()
    trainer.save_model(str(config["final"]))


def main() -> None:
    output_dir = output_dir_argument(__doc__).resolve()
    config = {
        "base": small_base_model(output_dir),  # yours: "meta-llama/Llama-3.2-1B"
        "texts": private_texts(),  # yours
        "run": output_dir / "run",
        "final": output_dir / "final",
    }
    ray.init(num_cpus=2)
    result = TorchTrainer(
        train_on_each_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(output_dir / "ray"), name="train"),
    ).fit()

    history = AuditHistory.load(output_dir / "run" / "_privacy_audit" / "history.jsonl")
    print_outcome(history)
    (audit,) = [audit for audit in history if audit.step == result.metrics["step"]]
    print(f"Ray's last checkpoint: step {audit.step}, AUC {audit.metrics['auc'].value:.3f}, {audit.verdict}")
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    main()
