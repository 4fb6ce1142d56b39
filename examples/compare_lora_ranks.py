"""LoRA ranks under one leakage budget: how much learning does each one buy before it is stopped?

Prints a table and saves the curves as a picture, with `ezmia_callbacks.report`.
"""

from pathlib import Path

from common import MAX_LENGTH, output_dir_argument, private_texts, small_base_model
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ezmia_callbacks import AuditHistory, LeakageBudget, PrivacyAuditCallback, hold_out_canaries
from ezmia_callbacks.report import plot_leakage_and_loss, summarize

RANKS = (1, 8, 64)


def fine_tune(base: str, texts: list[str], output_dir: Path, *, rank: int) -> AuditHistory:
    """One run; the same data, canaries and seed for every rank."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [dict(tokenizer(text, truncation=True, max_length=MAX_LENGTH)) for text in texts]
    train_dataset, canaries = hold_out_canaries(rows, n_members=150, n_non_members=250, seed=0)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(metric="auc", limit=0.60), batch_size=32)
    Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora),
        args=TrainingArguments(
            output_dir=str(output_dir),
            num_train_epochs=3,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=train_dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[audit],
    ).train()
    return audit.history


def main() -> None:
    output_dir = output_dir_argument(__doc__)
    base = small_base_model(output_dir)  # yours: "meta-llama/Llama-3.2-1B"
    texts = private_texts()  # yours
    histories = {
        f"LoRA rank {rank}": fine_tune(base, texts, output_dir / f"rank_{rank}", rank=rank) for rank in RANKS
    }

    figure = plot_leakage_and_loss(histories)[0].get_figure()
    figure.savefig(output_dir / "ranks.png", dpi=140)
    (output_dir / "summary.md").write_text(summarize(histories), encoding="utf-8")
    print("\n              AUC at the end [band]  held-out loss kept  outcome")
    for name, history in histories.items():
        last, kept = history[-1], history.last_within_budget
        auc = last.metrics["auc"]
        outcome = "stayed within" if history.stopped is None else f"stopped at epoch {last.epoch:g}"
        print(
            f"{name:12}  {auc.value:.3f} [{auc.band.lower:.3f}, {auc.band.upper:.3f}]   "
            f"{kept.non_member_loss:18.3f}  {outcome}"
        )
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    main()
