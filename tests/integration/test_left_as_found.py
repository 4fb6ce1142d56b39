"""Models that write to themselves in evaluation mode train to the same bits with and without audits."""

import pytest
import torch
from huggingface_tiny import NEVER_CROSSED, draw, make_trainer
from lightning_tiny import TinyModule, make_loader, seed_everything
from lightning_tiny import make_trainer as make_lightning_trainer
from own_loop import train_one_epoch
from tiny import make_model
from transformers import TrainerCallback
from writing_models import WRITING, assert_same_bits, bits, past_everything, times

from ezmia_callbacks import PrivacyAuditCallback, PrivacyAuditor
from ezmia_callbacks.errors import ModelChangedError
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


@pytest.mark.parametrize("run", SHELLS.values(), ids=SHELLS)
def test_a_model_that_cannot_be_left_as_found_is_refused_before_the_first_step(tmp_path, run):
    rows, canaries = draw()
    model, trained = make_model(), []
    model.transformer.wte.register_forward_pre_hook(past_everything)
    model.register_forward_pre_hook(lambda module, args: trained.append(1) if module.training else None)

    with pytest.raises(ModelChangedError, match=r"transformer\.wte\.weight`.*could not put it back"):
        run(model, rows, canaries, tmp_path, is_audited=True)

    assert not trained


class WritesLater(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            model.transformer.wte.register_forward_pre_hook(times(0.5))


def test_a_model_that_an_audit_changed_is_not_trained_on_whatever_errors_are_to_do(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, every=3, on_error="warn")
    trainer = make_trainer(tmp_path, rows, [WritesLater(), audit], max_steps=10)

    with pytest.raises(ModelChangedError, match=r"`transformer\.wte\.weight`.*overwritten in place"):
        trainer.train()

    assert trainer.state.global_step == 6
    assert [result.status for result in audit.history] == ["ok", "ok", "failed"]
    assert "ModelChangedError" in audit.history[-1].error


def test_an_interrupted_run_checks_every_bit_again():
    canaries = draw()[1]
    first = PrivacyAuditor(canaries, budget=NEVER_CROSSED)
    first.begin(make_model())
    resumed, model = PrivacyAuditor(canaries, budget=NEVER_CROSSED), make_model()
    resumed.load_state_dict(first.state_dict())
    model.transformer.wte.register_forward_pre_hook(past_everything)

    with pytest.raises(ModelChangedError, match="could not put it back"):
        resumed.begin(model)
