"""LoRA on chat messages with TRL's SFTTrainer, the loss on the assistant's words alone, under a budget.

The callback scores canaries as TRL trains them: its chat template, its truncation, its label mask.
"""

from common import MAX_LENGTH, output_dir_argument, print_outcome, private_chats, small_base_model
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback, hold_out_canaries


def main() -> None:
    output_dir = output_dir_argument(__doc__)
    base = small_base_model(output_dir)  # yours: "Qwen/Qwen3-0.6B"
    dataset = Dataset.from_list(private_chats())  # yours: rows with "messages"

    train_dataset, canaries = hold_out_canaries(dataset, n_members=150, n_non_members=250, seed=0)
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(metric="auc", limit=0.60), batch_size=32)
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(output_dir / "run"),
            num_train_epochs=8,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            max_length=MAX_LENGTH,
            assistant_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="epoch",
            save_total_limit=1,
            logging_strategy="epoch",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=train_dataset,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[audit],
    )
    trainer.train()
    trainer.save_model(str(output_dir / "final"))

    print_outcome(audit.history)
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    main()
