"""Models that write to themselves in evaluation mode train to the same bits with and without audits."""

import pytest
import torch
from huggingface_tiny import NEVER_CROSSED, draw, make_trainer
from lightning_tiny import TinyModule, make_loader, seed_everything
from lightning_tiny import make_trainer as make_lightning_trainer
from own_loop import train_one_epoch
from writing_models import WRITING, assert_same_bits, bits

from ezmia_callbacks import PrivacyAuditCallback, PrivacyAuditor
from ezmia_callbacks.lightning import PrivacyAuditCallback as LightningCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
    "ignore:.*does not have many workers.*",
    "ignore:.*no `val_dataloader`.*",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*isinstance.treespec.*",
)


def under_trainer(model, rows, canaries, path, *, is_audited):
    audit = PrivacyAuditCallback(canaries, budget=NEVER_CROSSED, every=3)
    trainer = make_trainer(
        path, rows, [audit] if is_audited else [], model=model, max_steps=10, save_strategy="no"
    )
    trainer.train()
    return audit.history


def logits(pl_module, input_ids, attention_mask):
    """Of the whole model: the callback alone would find the language model inside it."""
    return pl_module.model(input_ids=input_ids, attention_mask=attention_mask).logits


def under_lightning(model, rows, canaries, path, *, is_audited):
    audit = LightningCallback(canaries, budget=NEVER_CROSSED, every=3, logits_fn=logits)
    seed_everything()
    trainer = make_lightning_trainer(path, [audit] if is_audited else [], max_epochs=1)
    trainer.fit(TinyModule(model), make_loader(rows))
    return audit.history


def in_a_loop(model, rows, canaries, path, *, is_audited):
    auditor = PrivacyAuditor(canaries, budget=NEVER_CROSSED) if is_audited else None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    if auditor:
        auditor.begin(model)
    for _ in range(2):
        train_one_epoch(model, rows, optimizer)
        if auditor:
            auditor.audit(model)
    return auditor.history if auditor else None


SHELLS = {"trainer": under_trainer, "lightning": under_lightning, "loop": in_a_loop}


@pytest.mark.parametrize("run", SHELLS.values(), ids=SHELLS)
@pytest.mark.parametrize("make", WRITING.values(), ids=WRITING)
def test_training_ends_with_the_same_bits_though_the_model_writes_to_itself(tmp_path, make, run):
    rows, canaries = draw()
    plain, audited = make(), make()

    run(plain, rows, canaries, tmp_path / "without", is_audited=False)
    history = run(audited, rows, canaries, tmp_path / "with", is_audited=True)

    assert len(history.audits_after_baseline) > 1
    assert history.n_failed == 0
    assert_same_bits(bits(audited), bits(plain))
    assert any(not torch.equal(bits(plain)[0][name], tensor) for name, tensor in bits(make())[0].items())
