"""DeepSpeed's ZeRO: where it keeps weights beside the model, and what of that can be put back.

The optimizer steps on float32 copies of its own, divided among the processes, and writes them into the model
afterwards. The third stage divides the model, too: each process holds its part of a parameter in `ds_tensor`,
and the parameter itself is empty but while it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ezmia_callbacks.errors import ConfigurationError

__all__: list[str] = []

# Settings that keep weights elsewhere or otherwise, and the values with which tests have put weights back.
_PROVEN: Mapping[str, tuple[object, ...]] = {
    "fp16.enabled": (False,),
    "bf16.bf16_master_weights_and_grads": (False,),
    "torch_autocast.enabled": (False,),
    "tensor_parallel.autotp_size": (0, 1),
    "zero_optimization.offload_optimizer.device": ("none", "cpu"),
    "zero_optimization.offload_optimizer.super_offload": (False,),
    "zero_optimization.offload_param.device": ("none", "cpu"),
    "zero_optimization.mics_shard_size": (-1,),
    "zero_optimization.zero_hpz_partition_size": (0, 1),
    "zero_optimization.zero_quantized_weights": (False,),
    "zero_optimization.zero_quantized_nontrainable_weights": (False,),
    "zero_optimization.zenflow": (),
}


def held_part(parameter: Tensor) -> Tensor:
    """The tensor in which this process holds a parameter, or its part of it."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


@dataclass(frozen=True, eq=False)
class ZeroMaster:
    """The float32 copy of a parameter, of which each process has a part.

    Attributes:
        parameter: The model's.
    """

    parameter: nn.Parameter

    def follow(self) -> None:
        """Take over the parameter's present value; for no other process."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        part = held_part(self.parameter)
        put = safe_set_full_fp32_param if part is self.parameter else safe_set_local_fp32_param
        with torch.no_grad():
            put(self.parameter, part.detach())


def zero_masters(model: nn.Module) -> list[ZeroMaster]:
    """The float32 copies that DeepSpeed's optimizer has of a model's parameters; empty without DeepSpeed."""
    # The third stage gives the one name to all parameters, the others the other to those that they step on.
    return [
        ZeroMaster(parameter)
        for parameter in model.parameters()
        if (parameter.requires_grad and hasattr(parameter, "ds_id"))
        or hasattr(parameter, "set_full_hp_param")
    ]


def drop_gathered(model: nn.Module) -> None:
    """Have the third stage gather its parameters anew: whole ones that are at hand hold former values."""
    for parameter in model.parameters():
        if getattr(getattr(parameter, "ds_status", None), "name", "") == "AVAILABLE":
            parameter.partition()  # type: ignore[attr-defined]  # DeepSpeed's


def refuse_unproven(model: nn.Module) -> None:
    """Refuse to keep weights under settings of DeepSpeed's with which they were never seen put back.

    Args:
        model: DeepSpeed's engine, as the training loop calls it; any other model has no such settings.

    Raises:
        ConfigurationError: if it has one; says which.
    """
    if not hasattr(model, "zero_optimization_stage"):
        return
    if setting := _unproven_setting(model.config):
        raise ConfigurationError(
            f"DeepSpeed with {setting} keeps weights where they were never seen to be restored whole: pass "
            "`restore=False` and keep checkpoints to return to, or train without it."
        )


def _unproven_setting(config: Any) -> str:
    """Name and value; empty if there is none."""
    if not isinstance(config, Mapping):
        config = json.loads(Path(config).read_text("utf-8"))
    if _setting(config, "zero_optimization.stage") in (None, 0) and _setting(config, "bf16.enabled"):
        return "`bf16` without ZeRO"
    for name, proven in _PROVEN.items():
        value = _setting(config, name)
        if value is not None and value not in proven:
            return f"`{name}: {json.dumps(value, default=str)}`"
    return ""


def _setting(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config
