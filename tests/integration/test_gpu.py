"""What only a GPU can show; run with `make test-gpu` on a machine that has one."""

import pytest
import torch
from huggingface_tiny import NEVER_CROSSED, draw, make_trainer
from restoring import assert_same_weights
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback, PrivacyAuditor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def train(path, *, audit=None, **arguments):
    torch.use_deterministic_algorithms(True, warn_only=True)
    rows, _ = draw()
    trainer = make_trainer(
        path,
        rows,
        [] if audit is None else [audit],
        model=make_model(dropout=0.2),
        eval_dataset=make_rows(make_texts(20, seed=8)),
        use_cpu=False,
        **arguments,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "arguments",
    [{}, {"fp16": True}, {"bf16": True}, {"bf16": True, "torch_compile": True}],
    ids=["float32", "fp16", "bf16", "bf16 compiled"],
)
def test_training_on_a_gpu_ends_with_the_same_bits(tmp_path, arguments):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=NEVER_CROSSED, every=3)

    audited = train(tmp_path / "with", audit=audit, **arguments)
    plain = train(tmp_path / "without", **arguments)

    assert next(audited.model.parameters()).is_cuda
    assert audit.history.n_failed == 0
    assert audit.history[0].metrics["auc"].value == 0.5
    assert_same_weights(audited.model, plain.model.state_dict())


def test_a_stop_on_a_gpu_puts_the_audited_weights_back(tmp_path):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.8, rule="point"), every=2)

    trainer = train(tmp_path, audit=audit, num_train_epochs=20, bf16=True)

    assert audit.history.stopped is not None
    kept = audit.history.last_within_budget
    assert kept.step < audit.history.stopped.step
    # The same audit of what is in the model now finds what it found then.
    now = audit.auditor.audit(trainer.model, step=1000)
    assert now.metrics["auc"].value == kept.metrics["auc"].value
    assert now.member_loss == kept.member_loss


def test_figures_on_a_gpu_are_those_of_the_cpu_up_to_rounding():
    _, canaries = draw()
    results = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        auditor = PrivacyAuditor(canaries, n_audits=1)
        auditor.begin(model)
        with torch.no_grad():
            model.transformer.wte.weight.mul_(1.05)
        results.append(auditor.audit(model).metrics["auc"].value)

    assert results[0] == pytest.approx(results[1], abs=0.01)


def test_an_audit_holds_one_batch_of_logits_at_most():
    vocabulary, length, batch_size = 64, 13, 16
    _, canaries = draw(n=600, n_members=200, n_non_members=300)
    model = make_model().cuda()
    auditor = PrivacyAuditor(canaries, n_audits=1, batch_size=batch_size)
    auditor.begin(model)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    auditor.audit(model)

    logits = batch_size * length * vocabulary * 4
    assert torch.cuda.memory_allocated() <= before + logits
    # Hidden states of a tiny model and one batch of logits with their float32 copies.
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


def test_a_real_out_of_memory_error_halves_the_batch():
    _, canaries = draw()
    model = make_model().cuda()
    inner, room = model.forward, 4

    def forward(input_ids, **kwargs):
        if len(input_ids) > room:
            torch.empty(2**50, device="cuda")
        return inner(input_ids=input_ids, **kwargs)

    model.forward = forward
    auditor = PrivacyAuditor(canaries, n_audits=1, batch_size=16)

    assert auditor.begin(model).batch_size == room
