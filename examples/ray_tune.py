"""Ray Tune: a sweep under a leakage budget; the best trial is picked among those within it."""

from pathlib import Path
from typing import Any

import ray
from common import MAX_LENGTH, output_dir_argument, private_texts, small_base_model
from ray import tune
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback, hold_out_canaries


def fine_tune(config: dict[str, Any], *, base: str, texts: list[str], output_dir: Path) -> None:
    """One trial; the same data, canaries and seed for each."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [dict(tokenizer(text, truncation=True, max_length=MAX_LENGTH)) for text in texts]
    train_dataset, canaries = hold_out_canaries(rows, n_members=150, n_non_members=250, seed=0)
    # A trial over the budget ends there and is not chosen: there is nothing to put back.
    audit = PrivacyAuditCallback(
        canaries, budget=LeakageBudget(metric="auc", limit=0.65), restore=False, batch_size=32
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=TrainingArguments(
            # One for each trial; the audit's is in it.
            output_dir=str(output_dir / f"trial_{tune.get_context().get_trial_id()}"),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=config["learning_rate"],
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=train_dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[audit],
    )
    trainer.train()
    last = audit.history[-1]
    if last.verdict == "within budget":
        trainer.save_model()
    tune.report(
        {
            "epochs": last.epoch,
            "auc": last.metrics["auc"].value,
            "verdict": last.verdict,
            "held_out_loss": last.non_member_loss,
        }
    )


def main() -> None:
    output_dir = output_dir_argument(__doc__).resolve()
    base = small_base_model(output_dir)  # yours: "meta-llama/Llama-3.2-1B"
    texts = private_texts()  # yours
    ray.init(num_cpus=2)
    results = tune.Tuner(
        tune.with_parameters(fine_tune, base=base, texts=texts, output_dir=output_dir),
        param_space={"learning_rate": tune.grid_search([5e-5, 1e-4, 1e-3])},
        run_config=tune.RunConfig(storage_path=str(output_dir / "ray"), name="sweep", verbose=0),
    ).fit()

    print("\nlearning rate  epochs    AUC  held-out loss  verdict")
    for trial in results:
        found = trial.metrics
        print(
            f"{trial.config['learning_rate']:13g}  {found['epochs']:6.2f}  {found['auc']:.3f}  "
            f"{found['held_out_loss']:13.3f}  {found['verdict']}"
        )
    within = [trial for trial in results if trial.metrics["verdict"] == "within budget"]
    if within:
        best = min(within, key=lambda trial: trial.metrics["held_out_loss"])
        print(f"Best within the budget: learning rate {best.config['learning_rate']:g}")
    else:
        print("Best within the budget: none")
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    main()
