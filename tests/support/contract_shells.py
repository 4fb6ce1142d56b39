"""One and the same training under every shell: `test_contract.py` holds them to the same figures."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_tiny import make_trainer as make_hf_trainer
from lightning import pytorch as pl
from lightning_tiny import TinyModule
from lightning_tiny import make_trainer as make_lightning_trainer
from tiny import make_model, make_rows, make_texts
from torch.utils.data import DataLoader
from transformers import Trainer

from ezmia_callbacks import (
    AuditHistory,
    LeakageBudget,
    LightningPrivacyAuditCallback,
    PrivacyAuditCallback,
    PrivacyAuditor,
    hold_out_canaries,
)
from ezmia_callbacks.errors import AuditError

logger = logging.getLogger(__name__)

LEARNING_RATE = 0.3
BATCH_SIZE = 8
N_STEPS_IN_EPOCH = 12


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: one history for each audit, and the weights."""

    histories: tuple[AuditHistory, ...]
    weights: Mapping[str, torch.Tensor]


def draw():
    """96 training rows, 12 steps an epoch."""
    return hold_out_canaries(make_rows(make_texts(156)), n_members=40, n_non_members=60, seed=0)


def collate(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def make_loader(rows):
    return DataLoader(rows, batch_size=BATCH_SIZE, shuffle=False, collate_fn=collate)


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)


def outcome(model, histories) -> Outcome:
    return Outcome(tuple(histories), {k: v.clone() for k, v in model.state_dict().items()})


# What judges the runs; a test whose limits fit one score's figures sets it.
SCORE = "strongest"


def _options(canaries, budget, resuming: Mapping[str, Any]) -> dict[str, Any]:
    """What an audit is made with; a run that resumes may have others."""
    others = {name: value for name, value in resuming.items() if name != "meanwhile"}
    return {"canaries": canaries, "budget": budget, "score": SCORE, **others}


def _meanwhile(folder: Path, resuming: Mapping[str, Any]) -> None:
    """What happens in the folder of the first audit before the run resumes."""
    if "meanwhile" in resuming:
        resuming["meanwhile"](folder / "0")


class PlainTrainer(Trainer):
    """No shuffling, no clipping, the model's own loss: what the other loops do."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(make_loader(self.train_dataset))

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model(**inputs).loss


def with_huggingface(
    folder: Path,
    budgets: list[LeakageBudget | None],
    *,
    n_epochs: int,
    interrupt_after: int | None = None,
    **resuming: Any,
) -> Outcome:
    rows, canaries = draw()

    def run(n_run: int, *, resumes: bool):
        callbacks = [
            PrivacyAuditCallback(
                **_options(canaries, b, resuming if resumes else {}),
                every="epoch",
                batch_size=BATCH_SIZE,
                prefix=f"{i}/",
                output_dir=folder / str(i),
            )
            for i, b in enumerate(budgets)
        ]
        model = make_model()
        optimizer = make_optimizer(model)
        trainer = make_hf_trainer(
            folder,
            rows,
            callbacks,
            model=model,
            trainer_class=PlainTrainer,
            num_train_epochs=n_epochs,
            per_device_train_batch_size=BATCH_SIZE,
            max_grad_norm=0.0,
            save_strategy="epoch",
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        )
        if n_run < n_epochs:
            trainer.add_callback(_interrupting(n_run))
        trainer.train(resume_from_checkpoint=resumes or None)
        return outcome(trainer.model, [c.history for c in callbacks])

    if interrupt_after is not None:
        run(interrupt_after, resumes=False)
        _meanwhile(folder, resuming)
    return run(n_epochs, resumes=interrupt_after is not None)


def _interrupting(n_epochs: int):
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = round(state.epoch) >= n_epochs

    return Interrupt()


class PlainModule(TinyModule):
    """The same optimizer, and the model's own loss."""

    def configure_optimizers(self):
        return make_optimizer(self.model)


def with_lightning(
    folder: Path,
    budgets: list[LeakageBudget | None],
    *,
    n_epochs: int,
    interrupt_after: int | None = None,
    **resuming: Any,
) -> Outcome:
    rows, canaries = draw()
    checkpoint = folder / "last.ckpt"

    def run(n_run: int, *, resumes: bool):
        callbacks = [
            LightningPrivacyAuditCallback(
                **_options(canaries, b, resuming if resumes else {}),
                every="epoch",
                batch_size=BATCH_SIZE,
                prefix=f"{i}/",
                output_dir=folder / str(i),
            )
            for i, b in enumerate(budgets)
        ]
        module = PlainModule(make_model())
        saving = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
        interrupt = [] if n_run == n_epochs else [_InterruptLightning(n_run)]
        trainer = make_lightning_trainer(
            folder, [*callbacks, saving, *interrupt], max_epochs=n_epochs, enable_checkpointing=True
        )
        trainer.fit(module, make_loader(rows), ckpt_path=checkpoint if resumes else None)
        return outcome(module.model, [c.history for c in callbacks])

    if interrupt_after is not None:
        run(interrupt_after, resumes=False)
        _meanwhile(folder, resuming)
    return run(n_epochs, resumes=interrupt_after is not None)


class _InterruptLightning(pl.Callback):
    def __init__(self, n_epochs: int) -> None:
        self.n_epochs = n_epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.n_epochs


def with_own_loop(
    folder: Path,
    budgets: list[LeakageBudget | None],
    *,
    n_epochs: int,
    interrupt_after: int | None = None,
    is_accelerated: bool = False,
    **resuming: Any,
) -> Outcome:
    """A loop as users write it, plain or with Accelerate; its state goes through a file."""
    rows, canaries = draw()

    def run(n_run: int, *, resumes: bool):
        model = make_model()
        optimizer, loader = make_optimizer(model), make_loader(rows)
        auditors = [
            PrivacyAuditor(
                **_options(canaries, b, resuming if resumes else {}),
                n_audits=n_epochs,
                batch_size=BATCH_SIZE,
                output_dir=folder / str(i) if resuming else None,
            )
            for i, b in enumerate(budgets)
        ]
        accelerator = Accelerator(cpu=True) if is_accelerated else None
        if accelerator is not None:
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            accelerator.register_for_checkpointing(*auditors)
        epoch = 0
        if resumes:
            epoch = _load(folder, accelerator, model, optimizer, auditors)
        for auditor in auditors:
            auditor.begin(model)
        while epoch < n_run:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward() if accelerator is None else accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            epoch += 1
            results = [a.audit(model, step=epoch * N_STEPS_IN_EPOCH, epoch=float(epoch)) for a in auditors]
            stopping = [a for a, r in zip(auditors, results, strict=True) if r.decision.stop]
            for auditor in stopping:
                try:
                    auditor.restore_within_budget(model)
                except AuditError as error:
                    logger.error("The model stays OVER BUDGET: %s", error)
            if stopping:
                break
            _save(folder, accelerator, model, optimizer, auditors)
        if n_run == n_epochs:
            for auditor in auditors:
                auditor.finish(model)
        bare = model if accelerator is None else accelerator.unwrap_model(model)
        return outcome(bare, [a.history for a in auditors])

    if interrupt_after is not None:
        run(interrupt_after, resumes=False)
        _meanwhile(folder, resuming)
    return run(n_epochs, resumes=interrupt_after is not None)


def _save(folder, accelerator, model, optimizer, auditors) -> None:
    if accelerator is not None:
        accelerator.save_state(folder / "state")
        return
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"auditors": [auditor.state_dict() for auditor in auditors]}, folder / "state.pt")


def _load(folder, accelerator, model, optimizer, auditors) -> int:
    if accelerator is not None:
        accelerator.load_state(folder / "state")
    else:
        state = torch.load(folder / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for auditor, own in zip(auditors, state["auditors"], strict=True):
            auditor.load_state_dict(own)
    return round(auditors[0].history[-1].epoch)


def with_accelerate(folder: Path, budgets: list[LeakageBudget | None], **arguments: Any) -> Outcome:
    return with_own_loop(folder, budgets, is_accelerated=True, **arguments)


SHELLS: dict[str, Callable[..., Outcome]] = {
    "pytorch": with_own_loop,
    "accelerate": with_accelerate,
    "huggingface": with_huggingface,
    "lightning": with_lightning,
}
