"""Full fine-tuning with the Hugging Face Trainer, stopped at a leakage budget.

Only the two lines marked "yours" stand for what a real script loads. Runs in one process or, as in
launch/torchrun.sh, in several.
"""

from common import MAX_LENGTH, output_dir_argument, print_outcome, private_texts, small_base_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback, hold_out_canaries


def main() -> None:
    output_dir = output_dir_argument(__doc__)
    set_seed(0)
    args = TrainingArguments(
        output_dir=str(output_dir / "run"),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
    )

    # As for any download: one process makes the files, the others find them.
    with args.main_process_first():
        base = small_base_model(output_dir)  # yours: "meta-llama/Llama-3.2-1B"
    texts = private_texts()  # yours
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = [dict(tokenizer(text, truncation=True, max_length=MAX_LENGTH)) for text in texts]

    # Drawn after tokenization, so that canaries are scored in the very form in which they are trained on.
    train_dataset, canaries = hold_out_canaries(rows, n_members=150, n_non_members=250, seed=0)
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(metric="auc", limit=0.70), batch_size=32)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[audit],
    )
    trainer.train()
    trainer.save_model(str(output_dir / "final"))

    if trainer.is_world_process_zero():
        print_outcome(audit.history)
        print(f"Files: {output_dir}")


if __name__ == "__main__":
    main()
