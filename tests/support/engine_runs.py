"""What runs on sharded engines have in common, without a GPU: DeepSpeed's and FSDP2."""

import os
from typing import Any

import torch
import torch.distributed as dist
from huggingface_tiny import NEVER_CROSSED, draw
from tiny import make_model
from transformers import TrainerCallback

from ezmia_callbacks import PrivacyAuditCallback
from ezmia_callbacks.scoring.checksums import own_part


def run_engines_on_cpu() -> None:
    """Have accelerate run sharded engines on gloo; without it it makes plain DDP of them and says nothing."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}
    import accelerate.state
    import transformers.training_args

    backend = ("gloo", accelerate.utils.DistributedType.MULTI_GPU)
    accelerate.state.PartialState._prepare_backend = lambda self, *args, **kwargs: backend
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def held_parts(model, *, is_trained: bool = False) -> dict[str, torch.Tensor]:
    """The tensors in which this process holds each parameter, or its part of it."""
    return {
        name: own_part(getattr(parameter, "ds_tensor", parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not is_trained
    }


def own_parts(model) -> dict[str, torch.Tensor]:
    """Copies of them."""
    return {name: tensor.detach().float().clone() for name, tensor in held_parts(model).items()}


def whole(model, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors, out of the parts of all processes."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, parts)
    found = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if hasattr(parameter, "ds_shape") or hasattr(parameter, "device_mesh"):
            values = torch.cat([each[name].reshape(-1) for each in gathered])
            found[name] = values[: shape.numel()].view(shape)
        else:
            found[name] = parts[name]
    return found


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest between two sets of weights, of which the first may have the names that files have."""
    second = second | {name.replace(".default.", "."): tensor for name, tensor in second.items()}
    pairs = [
        # The tied weights of a GPT-2.
        (tensor, second[name if name in second else name.replace("lm_head", "transformer.wte")])
        for name, tensor in first.items()
    ]
    # Of few values a process may have none.
    differing = [(one.float() - other.float()).abs() for one, other in pairs]
    return max(each.max().item() for each in differing if each.numel())


def n_moments_of(optimizer) -> int:
    """Values other than 0 that an optimizer remembers of its steps."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(own_part(value).count_nonzero().item() for value in values if isinstance(value, torch.Tensor))


def n_bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Watched:
    """A callback with a budget, and what the weights were at each of its audits."""

    def __init__(self, canaries, *, budget, **arguments):
        self.callback = PrivacyAuditCallback(canaries, budget=budget, **arguments)
        self.within: dict[int, dict[str, torch.Tensor]] = {}
        self.over: dict[str, torch.Tensor] = {}
        self.n_bytes_kept: list[int] = []
        self.n_moments = 0
        audit, self.callback._audit = self.callback._audit, self._audit
        self._make_audit = audit

    def _audit(self, state, control, *, model, optimizer, **kwargs):
        before, n_moments = own_parts(model), n_moments_of(optimizer)
        self._make_audit(state, control, model=model, optimizer=optimizer, **kwargs)
        auditor = self.callback.auditor
        if not self.callback.history[-1].decision.is_within_budget:
            if not self.over:
                self.over, self.n_moments = before, n_moments
        else:
            self.within[state.global_step] = before
            auditor._weights._kept.wait()
            folder = auditor.settings.output_dir / "last_within_budget"
            files = sorted(folder.glob(f"{dist.get_rank()}-{state.global_step}-*.safetensors"))
            self.n_bytes_kept = [path.stat().st_size for path in files]


class AtStart(TrainerCallback):
    """The parts of the model at the first hook, when a checkpoint has been loaded."""

    def __init__(self):
        self.parts: dict[str, torch.Tensor] = {}

    def on_train_begin(self, *args, model, **kwargs):
        self.parts = own_parts(model)


def with_and_without_audits(make_trainer) -> dict[str, Any]:
    """A run with the callback and one without, in bfloat16 with dropout and accumulation.

    Args:
        make_trainer: Makes the trainer of a run, given its name, its callbacks and further arguments.
    """
    weights, logs, n_audits = [], [], 0
    canaries = draw()[1]
    for name in ("without", "with"):
        audit = PrivacyAuditCallback(canaries, budget=NEVER_CROSSED, every=3)
        trainer = make_trainer(
            name,
            [audit] if name == "with" else [],
            model=make_model(dropout=0.2),
            gradient_accumulation_steps=2,
            logging_steps=1,
            bf16=True,
        )
        trainer.train()
        n_audits = len(audit.history.audits_after_baseline)
        weights.append(own_parts(trainer.model))
        logs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    return {"difference": difference(*weights), "logs": logs, "n_audits": n_audits}


def with_adapter():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        make_model(), LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    )
