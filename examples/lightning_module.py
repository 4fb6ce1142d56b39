"""A LightningModule around a causal language model, stopped at a leakage budget.

The callback finds the language model inside the module; for a model of your own making pass `logits_fn=`.
Runs in one process or, as in launch/lightning_multi_node.sh, on several nodes.
"""

import os

import torch
from common import MAX_LENGTH, output_dir_argument, print_outcome, private_texts, small_base_model
from lightning import pytorch as pl
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from ezmia_callbacks import LeakageBudget, hold_out_canaries
from ezmia_callbacks.lightning import PrivacyAuditCallback


class LanguageModel(pl.LightningModule):
    """Plain causal language modeling with full weights."""

    def __init__(self, base: str, learning_rate: float) -> None:
        super().__init__()
        # Lightning leaves the mode alone, and loaded models are in evaluation mode.
        self.model = AutoModelForCausalLM.from_pretrained(base).train()
        self.learning_rate = learning_rate

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main() -> None:
    output_dir = output_dir_argument(__doc__)
    pl.seed_everything(0)
    base = small_base_model(output_dir)  # yours: "meta-llama/Llama-3.2-1B"
    texts = private_texts()  # yours
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [dict(tokenizer(text, truncation=True, max_length=MAX_LENGTH)) for text in texts]

    train_rows, canaries = hold_out_canaries(rows, n_members=150, n_non_members=250, seed=0)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    audit = PrivacyAuditCallback(
        canaries, budget=LeakageBudget(metric="auc", limit=0.60), every=0.5, batch_size=32
    )
    trainer = pl.Trainer(
        default_root_dir=output_dir,
        max_epochs=6,
        num_nodes=int(os.environ.get("SLURM_NNODES", "1")),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[audit, pl.callbacks.ModelCheckpoint(dirpath=output_dir / "checkpoints")],
    )
    trainer.fit(
        LanguageModel(base, learning_rate=2e-3),
        DataLoader(train_rows, batch_size=8, shuffle=True, collate_fn=collator),
    )
    trainer.save_checkpoint(output_dir / "final.ckpt")

    if trainer.is_global_zero:
        print_outcome(audit.history)
        print(f"Files: {output_dir}")


if __name__ == "__main__":
    main()
