"""Runs of two processes under FSDP2, by Trainer and by Accelerate, without a GPU, for `test_fsdp.py`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_runs import (
    AtStart,
    Watched,
    difference,
    held_parts,
    n_bytes_of,
    n_moments_of,
    own_parts,
    run_engines_on_cpu,
    whole,
    with_adapter,
    with_and_without_audits,
)
from huggingface_tiny import NEVER_CROSSED, draw, make_trainer
from tiny import make_model
from torch.utils.data import DataLoader

from ezmia_callbacks import LeakageBudget, PrivacyAuditor


def make_fsdp_trainer(folder: Path, rows, callbacks=(), *, fsdp: dict[str, Any], **arguments):
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"], **fsdp}
    settings = {"use_cpu": False, "ddp_backend": "gloo", "fsdp": True, "fsdp_config": config} | arguments
    trainer = make_trainer(folder, rows, callbacks, **settings)
    if config.get("cpu_offload"):
        from torch.distributed.fsdp import CPUOffloadPolicy

        # Pinned memory needs a GPU.
        trainer.accelerator.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
    return trainer


def in_use(model) -> dict[str, torch.Tensor]:
    """The weights as a forward pass gathers them."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return found


def difference_in_use(model, kept: dict[str, torch.Tensor]) -> float:
    """How far that is from the parts that were kept, which it may round."""
    found, expected = in_use(model), whole(model, kept)
    return difference(found, {name: tensor.to(found[name].dtype) for name, tensor in expected.items()})


def is_offloaded(model) -> bool:
    return type(model._get_fsdp_state()._fsdp_param_group.offload_policy).__name__ == "CPUOffloadPolicy"


def types_of(tensors) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def step_at_rate_zero(trainer, rows) -> None:
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.model_wrapped.train()
    trainer.accelerator.backward(trainer.model_wrapped(**trainer.data_collator(rows[:4])).loss)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def stop_and_look(
    folder: Path, *, fsdp: dict[str, Any], make=make_model, limit=0.8, **arguments
) -> dict[str, Any]:
    """A run that is stopped and restored; how far from the kept weights it is in each place."""
    run_engines_on_cpu()
    from accelerate.utils import merge_fsdp_weights
    from safetensors.torch import load_file

    rows, canaries = draw()
    watched = Watched(canaries, budget=LeakageBudget(limit=limit, rule="point"), every=2, keep_rejected=True)
    settings = {
        "fsdp": fsdp,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 20,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
    } | arguments
    trainer = make_fsdp_trainer(folder / "run", rows, [watched.callback], model=make(), **settings)
    trainer.train()
    model, history = trainer.model, watched.callback.history
    kept_step = history.last_within_budget.step
    kept = watched.within[kept_step]
    found = {
        "is_fsdp2": trainer.accelerator.is_fsdp2,
        "are_sharded": all(hasattr(p, "device_mesh") for p in model.parameters()),
        "are_tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "is_offloaded": is_offloaded(model),
        "types": types_of(model.parameters()),
        "n_failed": history.n_failed,
        "stopped_at": trainer.state.global_step,
        "kept_step": kept_step,
        "n_bytes": n_bytes_of(held_parts(model).values()),
        "n_bytes_trained": n_bytes_of(held_parts(model, is_trained=True).values()),
        "n_bytes_kept": watched.n_bytes_kept,
        "n_moments_before": watched.n_moments,
        "n_moments": n_moments_of(trainer.optimizer),
        "over": difference(watched.over, kept),
        "memory": difference(own_parts(model), kept),
        "types_in_use": types_of(in_use(model).values()),
        "in_use": difference_in_use(model, kept),
    }
    (rejected,) = watched.callback.auditor.rejected_folder.glob(f"*-{dist.get_rank()}.safetensors")
    found["rejected"] = difference(load_file(rejected), watched.over)
    trainer.save_model(str(folder / "saved"))
    trainer.accelerator.save_state(str(folder / "checkpoint"))
    if fsdp["state_dict_type"] == "SHARDED_STATE_DICT":
        # Trainer saves no model then; this is how its checkpoint becomes one.
        merge_fsdp_weights(str(folder / "checkpoint" / "pytorch_model_fsdp_0"), str(folder / "saved"))
    dist.barrier()
    (file,) = (folder / "saved").glob("*.safetensors")
    found["saved"] = difference(load_file(file), whole(model, kept))
    step_at_rate_zero(trainer, rows)
    found["stepped"] = difference(own_parts(model), kept)

    checkpoints = [path for path in (folder / "run").glob("checkpoint-*") if path.is_dir()]
    found["checkpoints"] = sorted(int(path.name.split("-")[1]) for path in checkpoints)
    again = Watched(canaries, budget=NEVER_CROSSED, every=2)
    settings |= {"max_steps": kept_step + 2, "save_strategy": "no"}
    resumed = make_fsdp_trainer(folder / "run", rows, [again.callback], model=make(), **settings)
    at_start = AtStart()
    resumed.add_callback(at_start)
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{kept_step}"))
    found["resumed"] = difference(at_start.parts, kept)
    found["resumed_audits"] = [result.step for result in again.callback.history if result.step >= kept_step]
    found["went_on"] = difference(own_parts(resumed.model), watched.over)
    resumed.accelerator.load_state(str(folder / "checkpoint"))
    found["loaded"] = difference(own_parts(resumed.model), kept)
    step_at_rate_zero(resumed, rows)
    found["loaded_and_stepped"] = difference(own_parts(resumed.model), kept)
    return found


SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}
FULL = {"state_dict_type": "FULL_STATE_DICT"}


def sharded_files(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, fsdp=SHARDED)


def whole_files(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, fsdp=FULL)


def untied(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, fsdp=FULL, make=lambda: make_model(tie_word_embeddings=False))


def computing_in_bfloat16(rank: int, folder: Path) -> dict[str, Any]:
    """As the launch file in `examples` has it: the model comes from the main process."""
    return stop_and_look(folder, fsdp=SHARDED | {"cpu_ram_efficient_loading": True}, bf16=True)


def with_lora(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, fsdp=FULL, make=with_adapter, limit=0.92)


def offloaded(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, fsdp=SHARDED | {"cpu_offload": True})


def is_neutral(rank: int, folder: Path) -> dict[str, Any]:
    run_engines_on_cpu()
    rows = draw()[0]
    return with_and_without_audits(
        lambda name, callbacks, **arguments: make_fsdp_trainer(
            folder / name, rows, callbacks, fsdp=SHARDED, **arguments
        )
    )


def prepare(rows):
    """As users of Accelerate write it."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    # The runs before this one were Trainer's.
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    # In one order: a resumed run is fed what the first one was.
    loader = DataLoader(ids, batch_size=4, collate_fn=torch.stack)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def train_epoch(accelerator, model, optimizer, loader) -> None:
    model.train()
    for batch in loader:
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()


def a_loop_stops_and_restores(rank: int, folder: Path) -> dict[str, Any]:
    """Accelerate; each epoch is audited and has a checkpoint."""
    run_engines_on_cpu()
    from safetensors.torch import load_file

    rows, canaries = draw()
    accelerator, model, optimizer, loader = prepare(rows)
    budget = LeakageBudget(limit=0.8, rule="point")
    auditor = PrivacyAuditor(canaries, budget=budget, n_audits=20, output_dir=folder / "audit")
    auditor.begin(model)
    auditor.watch(model)
    within, states = {}, {}
    for epoch in range(20):
        train_epoch(accelerator, model, optimizer, loader)
        before = own_parts(model)
        result = auditor.audit(model, epoch=epoch + 1)
        if result.decision.stop:
            break
        within[result.step], states[result.step] = before, auditor.state_dict()
        accelerator.save_state(str(folder / f"epoch-{result.step}"))
    kept_step = auditor.restore_within_budget(model, optimizer).step
    kept = within[kept_step]
    found = {
        "is_fsdp2": accelerator.is_fsdp2,
        "are_sharded": all(hasattr(p, "device_mesh") for p in model.parameters()),
        "kept_step": kept_step,
        "stopped_at": auditor.history[-1].step,
        "over": difference(before, kept),
        "memory": difference(own_parts(model), kept),
        "in_use": difference_in_use(model, kept),
    }
    accelerator.save_model(model, str(folder / "saved"))
    dist.barrier()
    found["saved"] = difference(load_file(folder / "saved" / "model.safetensors"), whole(model, kept))
    accelerator.save_state(str(folder / "stopped"))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train_epoch(accelerator, model, optimizer, loader)
    found["stepped"] = difference(own_parts(model), kept)

    accelerator, model, optimizer, loader = prepare(rows)
    accelerator.load_state(str(folder / f"epoch-{kept_step}"))
    again = PrivacyAuditor(canaries, budget=budget, n_audits=20, output_dir=folder / "resumed")
    again.load_state_dict(states[kept_step])
    again.begin(model)
    again.watch(model)
    found["resumed"] = difference(own_parts(model), kept)
    train_epoch(accelerator, model, optimizer, loader)
    found["stops_again"] = again.audit(model).decision.stop
    again.restore_within_budget(model, optimizer)
    found["restored_again"] = difference(own_parts(model), kept)
    accelerator.load_state(str(folder / "stopped"))
    found["loaded"] = difference(own_parts(model), kept)
    return found
