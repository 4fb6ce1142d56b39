"""The leakage curve after the fact: each checkpoint of a finished run, held against the base model.

Nothing of this package took part in the training. Needed are the base, the checkpoints, records that were
trained on, and records of the same kind that were not.
"""

from pathlib import Path

from common import MAX_LENGTH, output_dir_argument, print_curve, private_texts, small_base_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ezmia_callbacks import CanarySet, LeakageBudget, PrivacyAuditor


def finished_run(base: str, texts: list[str], run: Path) -> None:
    """What somebody did earlier: two epochs of 25 steps, a checkpoint every 10."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    Trainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=TrainingArguments(
            output_dir=str(run),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            save_strategy="steps",
            save_steps=10,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[dict(tokenizer(text, truncation=True, max_length=MAX_LENGTH)) for text in texts],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).train()


def main() -> None:
    output_dir = output_dir_argument(__doc__)
    base, run = small_base_model(output_dir), output_dir / "run"  # yours: the model and the run's folder
    texts = private_texts()  # yours
    trained_on, held_out = texts[:200], texts[200:500]
    finished_run(base, trained_on, run)

    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    auditor = PrivacyAuditor(
        CanarySet.from_lists(trained_on, held_out),
        budget=LeakageBudget(metric="auc", limit=0.70),
        restore=False,  # there is no run to put weights back into
        assume_seen=True,  # nor batches to look at
        n_audits=len(checkpoints),
        tokenizer=AutoTokenizer.from_pretrained(base),
        max_length=MAX_LENGTH,  # what the run trained with
        batch_size=32,
        output_dir=output_dir / "_privacy_audit",
    )
    auditor.begin(AutoModelForCausalLM.from_pretrained(base))
    for checkpoint in checkpoints:
        step = int(checkpoint.name.split("-")[1])
        auditor.audit(AutoModelForCausalLM.from_pretrained(checkpoint), step=step)

    print_curve(auditor.history)
    last = auditor.history.last_within_budget
    print(f"Last checkpoint within the budget: {'none' if last.is_baseline else f'checkpoint-{last.step}'}")
    print(auditor.history.about)
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    main()
