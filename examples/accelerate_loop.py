"""A loop with Accelerate that is interrupted after its first epoch, and goes on with the same curve.

`register_for_checkpointing(auditor)` puts reference and history into every saved state: trained weights are
never taken for the reference.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import MAX_LENGTH, output_dir_argument, print_outcome, private_texts, small_base_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from ezmia_callbacks import AuditHistory, LeakageBudget, PrivacyAuditor, hold_out_canaries

N_EPOCHS = 6


def train(base: str, texts: list[str], output_dir: Path, *, first_epoch: int, end_epoch: int) -> AuditHistory:
    """Train from one epoch to another; all but the first go on from the state of the epoch before."""
    set_seed(first_epoch)
    accelerator = Accelerator(cpu=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [dict(tokenizer(text, truncation=True, max_length=MAX_LENGTH)) for text in texts]
    # The same seed in every process and in every part of the run: the same canaries.
    train_rows, canaries = hold_out_canaries(rows, n_members=150, n_non_members=250, seed=0)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    model = AutoModelForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(train_rows, batch_size=8, shuffle=True, collate_fn=collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    auditor = PrivacyAuditor(
        canaries,
        budget=LeakageBudget(metric="auc", limit=0.70),
        n_audits=N_EPOCHS,
        batch_size=32,
        output_dir=output_dir / "_privacy_audit",
        autocast=accelerator.autocast,
    )
    accelerator.register_for_checkpointing(auditor)
    if first_epoch > 0:
        accelerator.load_state(str(output_dir / "state"))

    auditor.begin(model)
    for epoch in range(first_epoch, end_epoch):
        model.train()
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        result = auditor.audit(model, step=(epoch + 1) * len(loader), epoch=epoch + 1)
        if result.decision.stop:
            auditor.restore_within_budget(model, optimizer)
            break
        accelerator.save_state(str(output_dir / "state"))
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        output_dir / "final", is_main_process=accelerator.is_main_process
    )
    if end_epoch == N_EPOCHS or auditor.history.stopped is not None:
        auditor.finish(model)
    return auditor.history


def main() -> None:
    output_dir = output_dir_argument(__doc__)
    base = small_base_model(output_dir)  # yours: "meta-llama/Llama-3.2-1B"
    texts = private_texts()  # yours
    history = train(base, texts, output_dir, first_epoch=0, end_epoch=1)
    if history.stopped is None:
        print("Interrupted after epoch 1; going on from the saved state.")
        history = train(base, texts, output_dir, first_epoch=1, end_epoch=N_EPOCHS)

    print_outcome(history)
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    main()
