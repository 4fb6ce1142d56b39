"""Runs of two processes on DeepSpeed's own engine, without a GPU, for `test_deepspeed.py`."""

import datetime
import os
import time
from importlib import import_module
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
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils.data import DataLoader

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback, PrivacyAuditor
from ezmia_callbacks.errors import ConfigurationError

# Seconds.
_GROUP_WAITS = 10


def run_on_cpu() -> None:
    """Have DeepSpeed run on gloo."""
    run_engines_on_cpu()
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    # A collective of its own, which would be compiled here. As an attribute `torch` is PyTorch.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def deepspeed_config(zero: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def make_deepspeed_trainer(folder: Path, rows, callbacks=(), *, zero: dict[str, Any], **arguments):
    settings = {"use_cpu": False, "ddp_backend": "gloo", "deepspeed": deepspeed_config(zero)} | arguments
    return make_trainer(folder, rows, callbacks, **settings)


def in_use(model) -> dict[str, torch.Tensor]:
    """The weights as a forward pass gets them."""
    import deepspeed

    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().float().clone() for name, p in parameters.items()}


def step_at_rate_zero(trainer, rows) -> None:
    engine = trainer.model_wrapped
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.train()
    loss = engine(**trainer.data_collator(rows[:4])).loss
    engine.backward(loss)
    engine.step()


def stop_and_look(
    folder: Path, *, zero: dict[str, Any], make=make_model, limit=0.8, **arguments
) -> dict[str, Any]:
    """A run that is stopped and put back; how far from the kept weights it is in each place."""
    run_on_cpu()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import load_file

    rows, canaries = draw()
    watched = Watched(canaries, budget=LeakageBudget(limit=limit, rule="point"), every=2)
    settings = {
        "zero": zero,
        "learning_rate": 2e-2,
        "num_train_epochs": 20,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
    } | arguments
    trainer = make_deepspeed_trainer(folder / "run", rows, [watched.callback], model=make(), **settings)
    trainer.train()
    engine, model, history = trainer.model_wrapped, trainer.model, watched.callback.history
    kept_step = history.last_within_budget.step
    kept = whole(model, watched.within[kept_step])
    found = {
        "engine": f"{type(engine).__name__} {type(engine.optimizer).__name__}",
        "kind": trainer.accelerator.distributed_type.name,
        "types": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        "n_failed": history.n_failed,
        "stopped_at": trainer.state.global_step,
        "kept_step": kept_step,
        "n_bytes": n_bytes_of(held_parts(model).values()),
        "n_bytes_trained": n_bytes_of(p for p in held_parts(model, is_trained=True).values()),
        "n_bytes_kept": watched.n_bytes_kept,
        "n_moments_before": watched.n_moments,
        "n_moments": n_moments_of(engine.optimizer),
        "over": difference(whole(model, watched.over), kept),
        "memory": difference(whole(model, own_parts(model)), kept),
        "in_use": difference(in_use(model), kept),
    }
    trainer.save_model(str(folder / "saved"))
    engine.save_checkpoint(str(folder / "checkpoint"))
    dist.barrier()
    (file,) = (folder / "saved").glob("*.safetensors")
    found["saved"] = difference(load_file(file), kept)
    converted = get_fp32_state_dict_from_zero_checkpoint(str(folder / "checkpoint"))
    found["converted"] = difference(converted, kept)
    step_at_rate_zero(trainer, rows)
    found["stepped"] = difference(in_use(model), kept)

    checkpoints = [path for path in (folder / "run").glob("checkpoint-*") if path.is_dir()]
    found["checkpoints"] = sorted(int(path.name.split("-")[1]) for path in checkpoints)
    again = Watched(canaries, budget=NEVER_CROSSED, every=2)
    settings |= {"max_steps": kept_step + 2, "save_strategy": "no"}
    resumed = make_deepspeed_trainer(folder / "run", rows, [again.callback], model=make(), **settings)
    at_start = AtStart()
    resumed.add_callback(at_start)
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{kept_step}"))
    found["resumed"] = difference(whole(resumed.model, at_start.parts), kept)
    found["resumed_audits"] = [result.step for result in again.callback.history if result.step >= kept_step]
    resumed.model_wrapped.load_checkpoint(str(folder / "checkpoint"))
    found["loaded"] = difference(in_use(resumed.model), kept)
    step_at_rate_zero(resumed, rows)
    found["loaded_and_stepped"] = difference(in_use(resumed.model), kept)
    return found


PARTS = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
}
SOME_WHOLE = PARTS | {"stage3_param_persistence_threshold": 3100}
ON_CPU = {"device": "cpu", "pin_memory": False}


def zero_1_in_float32(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero={"stage": 1})


def zero_1_in_bfloat16(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero={"stage": 1}, bf16=True)


def zero_2_in_float32(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero={"stage": 2})


def zero_2_in_bfloat16(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero={"stage": 2}, bf16=True)


def zero_2_offloaded(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero={"stage": 2, "offload_optimizer": ON_CPU}, bf16=True)


def zero_2_with_an_adapter(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero={"stage": 2}, bf16=True, make=with_adapter, limit=0.92)


def zero_3_in_float32(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero=PARTS)


def zero_3_in_bfloat16(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero=PARTS, bf16=True)


def zero_3_with_persistent_parameters(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero=SOME_WHOLE, bf16=True)


def zero_3_offloaded(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(
        folder, zero=SOME_WHOLE | {"offload_optimizer": ON_CPU, "offload_param": ON_CPU}, bf16=True
    )


def zero_3_with_an_adapter(rank: int, folder: Path) -> dict[str, Any]:
    return stop_and_look(folder, zero=SOME_WHOLE, bf16=True, make=with_adapter, limit=0.92)


def is_neutral(folder: Path, *, zero: dict[str, Any]) -> dict[str, Any]:
    run_on_cpu()
    rows = draw()[0]
    return with_and_without_audits(
        lambda name, callbacks, **arguments: make_deepspeed_trainer(
            folder / name, rows, callbacks, zero=zero, **arguments
        )
    )


def zero_2_is_neutral(rank: int, folder: Path) -> dict[str, Any]:
    return is_neutral(folder, zero={"stage": 2})


def zero_3_is_neutral(rank: int, folder: Path) -> dict[str, Any]:
    return is_neutral(folder, zero=SOME_WHOLE)


def an_unproven_setting_is_refused(rank: int, folder: Path) -> list[str]:
    """By the callback, and by an auditor that is given the engine."""
    run_on_cpu()
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=NEVER_CROSSED)
    trainer = make_deepspeed_trainer(folder, rows, [audit], zero={"stage": 0}, bf16=True)
    auditor = PrivacyAuditor(canaries, budget=NEVER_CROSSED, n_audits=3)
    errors = []
    for begin in (trainer.train, lambda: auditor.begin(trainer.model_wrapped)):
        try:
            begin()
        except ConfigurationError as error:
            errors.append(f"step {trainer.state.global_step}: {error}")
    return errors


def a_copy_of_parts_is_refused(rank: int, folder: Path) -> str:
    run_on_cpu()
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, reference="copy")
    trainer = make_deepspeed_trainer(folder, rows, [audit], zero=PARTS, bf16=True)
    try:
        trainer.train()
    except Exception as error:
        return f"step {trainer.state.global_step}: {type(error).__name__}: {error}"
    return "not refused"


def rejected_weights_are_kept_in_parts(rank: int, folder: Path) -> dict[str, Any]:
    run_on_cpu()
    from safetensors.torch import load_file

    rows, canaries = draw()
    watched = Watched(canaries, budget=LeakageBudget(limit=0.8, rule="point"), every=2, keep_rejected=True)
    arguments = {"learning_rate": 2e-2, "num_train_epochs": 20, "bf16": True}
    trainer = make_deepspeed_trainer(folder, rows, [watched.callback], zero=PARTS, **arguments)
    trainer.train()
    (file,) = watched.callback.auditor.rejected_folder.glob(f"*-{rank}.safetensors")
    return {"difference": difference(watched.over, load_file(file))}


def a_loop_stops_and_puts_back(rank: int, folder: Path) -> dict[str, Any]:
    """As users of Accelerate write it: the engine is the model, and no optimizer is handed over."""
    run_on_cpu()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    # The runs before this one were Trainer's.
    AcceleratorState._reset_state(reset_partial_state=True)
    rows, canaries = draw()
    plugin = DeepSpeedPlugin(
        hf_ds_config=deepspeed_config(SOME_WHOLE) | {"train_micro_batch_size_per_gpu": 4},
        gradient_accumulation_steps=1,
    )
    accelerator = Accelerator(mixed_precision="bf16", deepspeed_plugin=plugin)
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(ids, batch_size=4, shuffle=True, generator=generator, collate_fn=torch.stack)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    budget = LeakageBudget(limit=0.8, rule="point")
    auditor = PrivacyAuditor(canaries, budget=budget, n_audits=20, output_dir=folder)
    auditor.begin(model)
    auditor.watch(model)
    within = {0: own_parts(model)}
    for epoch in range(20):
        for batch in loader:
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        before = own_parts(model)
        result = auditor.audit(model, epoch=epoch + 1)
        if result.decision.stop:
            break
        within[result.step] = before
    kept = auditor.restore_within_budget(model).step
    found = {
        "engine": f"{type(model).__name__} {type(model.optimizer).__name__}",
        "kept_step": kept,
        "stopped_at": auditor.history[-1].step,
        "over": difference(before, within[kept]),
        "in_use": difference(in_use(model), whole(model, within[kept])),
    }
    for group in model.optimizer.param_groups:
        group["lr"] = 0.0
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    return found | {"stepped": difference(in_use(model), whole(model, within[kept]))}


def a_process_fails_in_the_middle_of_a_pass(rank: int, folder: Path) -> dict[str, Any]:
    """Where the others wait for its part of the next weights; errors are to be gaps."""
    run_on_cpu()
    _set_pg_timeout(datetime.timedelta(seconds=_GROUP_WAITS), dist.group.WORLD)
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=NEVER_CROSSED, every=2, on_error="warn")
    arguments = {"save_strategy": "steps", "save_steps": 2, "bf16": True}
    trainer = make_deepspeed_trainer(folder / "run", rows, [audit], zero=PARTS, **arguments)
    block = trainer.model.transformer.h[0].mlp

    def fail(*args):
        is_third_audit = trainer.state.global_step == 6 and not block.training
        if rank == 1 and is_third_audit:
            raise ValueError("a kernel failed")

    block.register_forward_pre_hook(fail)
    started = time.monotonic()
    try:
        trainer.train()
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    else:
        raised = "not raised"
    checkpoints = sorted(path.name for path in (folder / "run").glob("checkpoint-*"))
    return {"raised": raised, "seconds": time.monotonic() - started, "checkpoints": checkpoints}
