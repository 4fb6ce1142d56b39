"""Lightning Fabric: your own loop, with Fabric's model, optimizer and loader."""

import torch
from common import MAX_LENGTH, output_dir_argument, print_outcome, private_texts, small_base_model
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from ezmia_callbacks import LeakageBudget, PrivacyAuditor, hold_out_canaries

N_EPOCHS = 6


def main() -> None:
    output_dir = output_dir_argument(__doc__)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    base = small_base_model(output_dir)  # yours: "meta-llama/Llama-3.2-1B"
    texts = private_texts()  # yours
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [dict(tokenizer(text, truncation=True, max_length=MAX_LENGTH)) for text in texts]

    # In every process the same ones, before Fabric divides the rows among them.
    train_rows, canaries = hold_out_canaries(rows, n_members=150, n_non_members=250, seed=0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = fabric.setup_dataloaders(DataLoader(train_rows, batch_size=8, shuffle=True, collate_fn=collator))
    auditor = PrivacyAuditor(
        canaries,
        budget=LeakageBudget(metric="auc", limit=0.70),
        n_audits=N_EPOCHS,
        batch_size=32,
        output_dir=output_dir / "_privacy_audit",
    )

    auditor.begin(model)
    step = 0
    for epoch in range(N_EPOCHS):
        model.train()
        for batch in loader:
            loss = model(**batch).loss
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        result = auditor.audit(model, step=step, epoch=epoch + 1)
        if result.decision.stop:
            auditor.restore_within_budget(model, optimizer)
            break
    auditor.finish(model)
    fabric.save(output_dir / "final.ckpt", {"model": model})

    if fabric.is_global_zero:
        print_outcome(auditor.history)
        print(f"Files: {output_dir}")


if __name__ == "__main__":
    main()
