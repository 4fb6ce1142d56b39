"""Whole training runs of several processes, for `test_distributed_training.py`."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_tiny import draw, make_trainer
from lightning import pytorch as pl
from lightning_tiny import TinyModule, make_loader
from lightning_tiny import make_trainer as make_lightning_trainer
from tiny import make_model, make_rows, make_texts
from torch.utils.data import DataLoader

from ezmia_callbacks import (
    LeakageBudget,
    LightningPrivacyAuditCallback,
    PrivacyAuditCallback,
    PrivacyAuditor,
)
from ezmia_callbacks.errors import CanaryError, ConfigurationError

NEVER_CROSSED = LeakageBudget(limit=0.99, rule="point")
SOON_CROSSED = LeakageBudget(limit=0.8, rule="point")


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def are_same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def make_ddp_trainer(folder: Path, rows, callbacks=(), **arguments):
    return make_trainer(folder, rows, callbacks, ddp_backend="gloo", **arguments)


def trainer_is_neutral(rank: int, folder: Path) -> dict[str, Any]:
    """Dropout, accumulation and evaluation, with and without the callback; members drawn in one line."""
    rows = make_rows(make_texts(121))
    weights, logs = [], []
    for name in ("without", "with"):
        audit = PrivacyAuditCallback(budget=NEVER_CROSSED, every=3, n_members=31, n_non_members=40)
        trainer = make_ddp_trainer(
            folder / name,
            rows,
            [audit] if name == "with" else [],
            model=make_model(dropout=0.2),
            eval_dataset=make_rows(make_texts(60, seed=8)),
            eval_strategy="epoch",
            gradient_accumulation_steps=2,
            num_train_epochs=2,
        )
        trainer.train()
        weights.append(weights_of(trainer.model))
        logs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    return {
        "is_same": are_same(*weights),
        "logs": logs,
        "audits": [row["metrics"]["auc"]["value"] for row in audit.history.to_dicts()],
        "n_failed": audit.history.n_failed,
        "world_size": trainer.args.world_size,
        "exposures": audit.auditor.exposures.n_times[audit.auditor.encoded.is_member].tolist(),
    }


def trainer_stops_and_puts_back(rank: int, folder: Path) -> dict[str, Any]:
    rows, canaries = draw()
    within = {}
    audit = PrivacyAuditCallback(canaries, budget=SOON_CROSSED, every=2)
    keep = audit._audit

    def spy(state, control, *, model, **kwargs):
        before = weights_of(model)
        keep(state, control, model=model, **kwargs)
        if audit.history[-1].decision.is_within_budget:
            within[state.global_step] = before

    audit._audit = spy
    trainer = make_ddp_trainer(
        folder / "run",
        rows,
        [audit],
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        num_train_epochs=20,
    )
    starting = weights_of(trainer.model)
    trainer.train()
    last = audit.history.last_within_budget
    # The main process removes the kept weights when it comes to that.
    torch.distributed.barrier()
    return {
        "stopped_at": trainer.state.global_step,
        "kept": last.step,
        "is_back": are_same(weights_of(trainer.model), within.get(last.step, starting)),
        "weights": weights_of(trainer.model),
        "checkpoints": sorted(int(p.name.split("-")[1]) for p in (folder / "run").glob("checkpoint-*")),
        "kept_files": sorted(p.name for p in (folder / "run").rglob("last_within_budget*")),
    }


def trainer_holds_out(rank: int, folder: Path) -> dict[str, Any]:
    """Each process draws for itself."""
    audit = PrivacyAuditCallback("hold_out")
    trainer = make_ddp_trainer(folder, make_rows(make_texts(160)), [audit], num_train_epochs=1)
    trainer.train()
    is_member = audit.auditor.encoded.is_member
    return {
        "canaries": audit.canaries.fingerprint,
        "rows": trainer.train_dataset,
        "audits": [row["metrics"]["auc"]["value"] for row in audit.history.to_dicts()],
        "fed": audit.auditor.exposures.n_times[is_member].tolist(),
        "n_non_members_fed": int(audit.auditor.exposures.n_times[~is_member].sum()),
    }


def trainer_cannot_prepare_on_one(rank: int, folder: Path) -> str:
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries)
    if rank == 1:

        def fail(trainer):
            raise CanaryError("the tokenizer's cache is missing here")

        audit._prepare_canaries = fail
    try:
        make_ddp_trainer(folder, rows, [audit]).train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not raised"


def train_with_accelerate(folder: Path, *, is_audited: bool, budget, n_epochs: int = 3, lr: float = 1e-2):
    """A loop as users write it."""
    rows, canaries = draw()
    accelerator = Accelerator(cpu=True)
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(ids, batch_size=4, shuffle=True, generator=generator, collate_fn=torch.stack)
    torch.manual_seed(5)
    model = make_model(dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    auditor = PrivacyAuditor(canaries, budget=budget, n_audits=n_epochs, output_dir=folder)
    within = {}
    if is_audited:
        within[0] = weights_of(accelerator.unwrap_model(model))
        auditor.begin(model)
    for epoch in range(n_epochs):
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if not is_audited:
            continue
        before = weights_of(accelerator.unwrap_model(model))
        result = auditor.audit(model, epoch=epoch + 1)
        if result.decision.is_within_budget:
            within[result.step] = before
        if result.decision.stop:
            auditor.restore_within_budget(model)
            break
    return weights_of(accelerator.unwrap_model(model)), auditor, within


def accelerate_is_neutral(rank: int, folder: Path) -> dict[str, Any]:
    plain, _, _ = train_with_accelerate(folder / "plain", is_audited=False, budget=None)
    audited, auditor, _ = train_with_accelerate(folder / "audited", is_audited=True, budget=NEVER_CROSSED)
    return {"is_same": are_same(plain, audited), "n_looks": len(auditor.history.audits_after_baseline)}


def accelerate_stops_and_puts_back(rank: int, folder: Path) -> dict[str, Any]:
    weights, auditor, within = train_with_accelerate(
        folder, is_audited=True, budget=SOON_CROSSED, n_epochs=20, lr=5e-3
    )
    kept = auditor.history.last_within_budget.step
    return {
        "stopped": auditor.history.stopped is not None,
        "stopped_at": auditor.history[-1].step,
        "kept": kept,
        "is_back": are_same(weights, within[kept]),
        "weights": weights,
    }


def fit(folder: Path, callbacks, *, n_epochs: int = 3, lr: float = 1e-2):
    rows, _ = draw()
    torch.manual_seed(5)
    module = TinyModule(make_model(dropout=0.1), learning_rate=lr)
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
    trainer = make_lightning_trainer(folder, callbacks, devices=2, strategy=strategy, max_epochs=n_epochs)
    trainer.fit(module, make_loader(rows, is_shuffled=True))
    return module.model, trainer


def lightning_is_neutral(rank: int, folder: Path) -> dict[str, Any]:
    _, canaries = draw()
    audit = LightningPrivacyAuditCallback(canaries, budget=NEVER_CROSSED, every="epoch")
    plain, _ = fit(folder / "plain", [])
    audited, trainer = fit(folder / "audited", [audit])
    return {
        "is_same": are_same(weights_of(plain), weights_of(audited)),
        "n_looks": len(audit.history.audits_after_baseline),
        "world_size": trainer.world_size,
    }


def lightning_stops_and_puts_back(rank: int, folder: Path) -> dict[str, Any]:
    _, canaries = draw()
    audit = LightningPrivacyAuditCallback(canaries, budget=SOON_CROSSED, every=2)
    model, trainer = fit(folder, [audit], n_epochs=20)
    kept, weights = audit.history.last_within_budget, weights_of(model)
    again = PrivacyAuditor(canaries, batch_size=8)
    again.begin(model)
    return {
        "stopped_at": trainer.global_step,
        "kept": kept.step,
        "is_back": again.history[0].member_loss == kept.member_loss,
        "weights": weights,
    }


class ShardedModule(TinyModule):
    """As a user writes it for a strategy that leaves the sharding to the module."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def lightning_in_pieces_is_refused(rank: int, folder: Path) -> str:
    """The one sharded strategy of Lightning's that runs without a GPU."""
    rows, canaries = draw()
    strategy = pl.strategies.ModelParallelStrategy(process_group_backend="gloo")
    callbacks = [LightningPrivacyAuditCallback(canaries, restore=False)]
    trainer = make_lightning_trainer(folder, callbacks, devices=2, strategy=strategy)
    module = ShardedModule()
    try:
        trainer.fit(module, make_loader(rows))
    except ConfigurationError as error:
        return f"step {trainer.global_step}: {error}"
    return "not refused"
