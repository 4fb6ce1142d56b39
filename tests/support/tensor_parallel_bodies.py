"""Runs of two processes that divide each layer (tensor parallelism), for `test_tensor_parallel.py`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adapted_llama import LORA, make_llama
from engine_runs import (
    Watched,
    difference,
    held_parts,
    n_bytes_of,
    n_moments_of,
    own_parts,
    run_engines_on_cpu,
)
from huggingface_tiny import draw, make_trainer
from peft import LoraConfig, get_peft_model
from torch import nn

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback, PrivacyAuditor
from ezmia_callbacks.distributed import gather

BUDGET = LeakageBudget(limit=0.8, rule="point")
N_EPOCHS = 12
N_STEPS_IN_EPOCH = 8
# Of audits: each pass is made of exchanges, in which processes wait for each other.
BATCH_SIZE = 64
SETTINGS = {
    "learning_rate": 2e-2,
    "lr_scheduler_type": "constant",
    "num_train_epochs": N_EPOCHS,
}


def divided_by_transformers(folder: Path) -> nn.Module:
    """A Llama, as `from_pretrained(..., tp_plan="auto")` gives it to each process."""
    if dist.get_rank() == 0 and not folder.exists():
        make_llama().save_pretrained(folder)
    dist.barrier()
    return load_divided(folder)


def load_divided(folder: Path, **sizes: int) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**sizes or {"tp_plan": "auto"})
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def divided_by_torch(folder: Path | None = None) -> nn.Module:
    """A Llama of which the feed-forward layers are divided; all else each process has whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = make_llama()
    plan = {
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    }
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def divided_under_lora() -> nn.Module:
    """The same, frozen, with adapters on the attention, which each process has whole."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(divided_by_torch(), LoraConfig(r=8, **LORA))


def in_full(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the whole parameters."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def n_bytes_replicated(model: nn.Module) -> int:
    return n_bytes_of(p for p in model.parameters() if not hasattr(p, "device_mesh"))


def what_audits_found(auditor: PrivacyAuditor) -> dict[str, Any]:
    """Figures, scores and counts that do not depend on the number of processes."""
    return {
        "aucs": [result.metrics["auc"].value for result in auditor.history],
        "scores": {name: auditor.trajectories.of_score(name) for name in auditor.trajectories.score_names},
        "n_times": auditor.exposures.n_times,
        "n_failed": auditor.history.n_failed,
        "stopped_at": auditor.history[-1].step,
    }


def step_at_rate_zero(model: nn.Module, optimizer: Any, rows) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, rows[:8])


def train(model: nn.Module, optimizer: Any, rows) -> None:
    """One epoch; every process is fed the same batches."""
    model.train()
    for start in range(0, len(rows), 8):
        ids = torch.tensor([row["input_ids"] for row in rows[start : start + 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_trainer(rank: int, folder: Path) -> dict[str, Any]:
    """Trainer writes no checkpoint to resume from; what it saves is loaded instead."""
    run_engines_on_cpu()
    from safetensors.torch import load_file

    rows, canaries = draw()
    watched = Watched(canaries, budget=BUDGET, every=8, batch_size=BATCH_SIZE, keep_rejected=True)
    trainer = make_trainer(
        folder / "run",
        rows,
        [watched.callback],
        model=divided_by_transformers(folder / "whole"),
        use_cpu=False,
        ddp_backend="gloo",
        save_strategy="steps",
        save_steps=8,
        save_only_model=True,
        **SETTINGS,
    )
    trainer.train()
    model, auditor = trainer.model, watched.callback.auditor
    kept_step = auditor.history.last_within_budget.step
    kept = watched.within[kept_step]
    found = what_audits_found(auditor) | {
        "are_divided": sum(hasattr(p, "device_mesh") for p in model.parameters()),
        "kept_step": kept_step,
        "n_bytes": n_bytes_of(held_parts(model).values()),
        "n_bytes_replicated": n_bytes_replicated(model),
        "n_bytes_kept": watched.n_bytes_kept,
        "n_moments_before": watched.n_moments,
        "n_moments": n_moments_of(trainer.optimizer),
        "over": difference(watched.over, kept),
        "memory": difference(own_parts(model), kept),
    }
    (rejected,) = auditor.rejected_folder.glob(f"*-{rank}.safetensors")
    of_rank = load_file(rejected)
    found["rejected"] = difference(of_rank, watched.over)
    found["n_rejected"] = len(of_rank)
    trainer.save_model(str(folder / "saved"))
    dist.barrier()
    saved = load_file(folder / "saved" / "model.safetensors")
    found["saved"] = difference(saved, in_full(model))
    step_at_rate_zero(model, trainer.optimizer, rows)
    found["stepped"] = difference(own_parts(model), kept)
    found["loaded"] = difference(own_parts(load_divided(folder / "saved")), kept)
    checkpoint = folder / "run" / f"checkpoint-{kept_step}"
    found["checkpoint"] = difference(own_parts(load_divided(checkpoint)), kept)
    found["newest_checkpoint"] = max(
        int(path.name.split("-")[1]) for path in checkpoint.parent.glob("check*")
    )
    return found


def by_trainer_alone(folder: Path) -> dict[str, Any]:
    """The same run of one process, with the model whole, as far as a few audits."""
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every=8, batch_size=BATCH_SIZE)
    make_trainer(folder, rows, [audit], model=make_llama(), max_steps=8, **SETTINGS).train()
    return what_audits_found(audit.auditor)


def a_loop_stops_restores_and_goes_on(
    folder: Path, make, prepare=lambda *objects: objects, *, limit=0.8
) -> dict[str, Any]:
    """A loop of one's own, audited each epoch, and a second one that goes on from what the first one kept."""
    rows, canaries = draw()
    budget = LeakageBudget(limit=limit, rule="point")

    def begun(name: str):
        # Torch steps on parameters of both kinds one at a time only.
        model = make()
        model, optimizer = prepare(model, torch.optim.AdamW(model.parameters(), lr=2e-2, foreach=False))
        auditor = PrivacyAuditor(
            canaries, budget=budget, n_audits=N_EPOCHS, batch_size=BATCH_SIZE, output_dir=folder / name
        )
        return model, optimizer, auditor

    model, optimizer, auditor = begun("audit")
    auditor.begin(model)
    auditor.watch(model)
    within, states = {}, {}
    for epoch in range(1, N_EPOCHS + 1):
        train(model, optimizer, rows)
        before = own_parts(model)
        result = auditor.audit(model, epoch=epoch)
        if result.decision.stop:
            break
        within[result.step], states[result.step] = before, auditor.state_dict()
        auditor._weights.wait()
    kept_step = auditor.restore_within_budget(model, optimizer).step
    kept = within[kept_step]
    gather(None)
    (file,) = (folder / "audit" / "last_within_budget").glob(f"{dist.get_rank()}-{kept_step}-*.safetensors")
    found = what_audits_found(auditor) | {
        "are_divided": sum(hasattr(p, "device_mesh") for p in model.parameters()),
        "kept_step": kept_step,
        "n_bytes": n_bytes_of(held_parts(model).values()),
        "n_bytes_trained": n_bytes_of(held_parts(model, is_trained=True).values()),
        "n_bytes_replicated": n_bytes_replicated(model),
        "n_bytes_kept": [file.stat().st_size],
        "over": difference(before, kept),
        "memory": difference(own_parts(model), kept),
    }
    step_at_rate_zero(model, optimizer, rows)
    found["stepped"] = difference(own_parts(model), kept)

    again, optimizer, resumed = begun("resumed")
    with torch.no_grad():
        for name, tensor in held_parts(again).items():
            tensor.copy_(kept[name])
    resumed.load_state_dict(states[kept_step])
    resumed.begin(again)
    resumed.watch(again)
    train(again, optimizer, rows)
    after = resumed.audit(again, epoch=N_EPOCHS)
    found["resumed_at"] = [each.step for each in resumed.history]
    found["n_times_resumed"] = resumed.exposures.n_times
    found["status_resumed"] = after.status
    last_within = own_parts(again) if after.decision.is_within_budget else kept
    train(again, optimizer, rows)
    found["moved"] = difference(own_parts(again), last_within)
    resumed.restore_within_budget(again, optimizer)
    found["restored_again"] = difference(own_parts(again), last_within)
    return found


def a_loop_divided_by_transformers(rank: int, folder: Path) -> dict[str, Any]:
    run_engines_on_cpu()
    return a_loop_stops_restores_and_goes_on(folder, lambda: divided_by_transformers(folder / "whole"))


def a_loop_divided_by_torch(rank: int, folder: Path) -> dict[str, Any]:
    return a_loop_stops_restores_and_goes_on(folder, divided_by_torch)


def a_loop_with_lora(rank: int, folder: Path) -> dict[str, Any]:
    return a_loop_stops_restores_and_goes_on(folder, divided_under_lora, limit=0.7)


def a_loop_of_accelerate(rank: int, folder: Path) -> dict[str, Any]:
    run_engines_on_cpu()
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.state import AcceleratorState

    # The runs before this one were Trainer's.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(parallelism_config=ParallelismConfig(tp_size=2))
    found = a_loop_stops_restores_and_goes_on(
        folder,
        lambda: divided_by_transformers(folder / "whole"),
        lambda *objects: accelerator.prepare(*objects),
    )
    return found | {"is_told_of": accelerator.parallelism_config.tp_enabled}


def a_loop_alone() -> dict[str, Any]:
    """The same in one process, with the model whole, as far as three audits."""
    rows, canaries = draw()
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=N_EPOCHS, batch_size=BATCH_SIZE)
    auditor.begin(model)
    auditor.watch(model)
    for epoch in range(1, 4):
        train(model, optimizer, rows)
        auditor.audit(model, epoch=epoch)
    return what_audits_found(auditor)


def fed_differently(rank: int, folder: Path) -> dict[str, Any]:
    """Each process is fed batches of its own, which divided layers make nonsense of."""
    rows, canaries = draw()
    model = divided_by_torch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=2)
    auditor.begin(model)
    auditor.watch(model)
    train(model, optimizer, rows[rank * 24 :][:24])
    result = auditor.audit(model, epoch=1)
    return {"message": result.decision.message, "findings": [finding.text for finding in result.findings]}
