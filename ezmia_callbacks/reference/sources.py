"""Where the reference comes from: the model as it was before this run trained it.

Whatever the source, its statistics are computed once, before the first step, and nothing else of it is kept.
That is why a base that moves later (trained biases, unfrozen layers) can do no harm, and why no second
model stays in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from ezmia_callbacks.errors import AuditMemoryError, ConfigurationError
from ezmia_callbacks.scoring.memory import is_out_of_memory

__all__: list[str] = []

ReferenceSource = Literal["auto", "adapter", "copy"] | nn.Module | Callable[[], nn.Module]
"""`"auto"`: the model as it is at the start; `"adapter"`: the base under its disabled adapters; `"copy"`:
a frozen copy of the model at the start, in float32; a module of the user's, or a function that loads one."""

# These initializations move weight from the base into the adapter: the base alone is not the start.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_reference(source: object) -> None:
    """Refuse a source that is none.

    Raises:
        ConfigurationError: naming the sources there are.
    """
    if not (callable(source) or source in ("auto", "adapter", "copy")):
        raise ConfigurationError(
            f"`reference` must be 'auto', 'adapter', 'copy' or a module, got {source!r}. (The Hugging Face "
            "callback also takes the path or hub id of a checkpoint.)"
        )


def reference_label(source: ReferenceSource) -> str:
    """Name of a source, for files and results."""
    return source if isinstance(source, str) else "module"


def has_adapters(model: nn.Module) -> bool:
    """Whether the model, or a module inside it, carries PEFT adapters that can be disabled."""
    return _adapter_owner(model) is not None


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters that the model, or a module inside it, carries."""
    return sorted(_peft_configs(model))


def can_disable_adapters(model: nn.Module) -> bool:
    """Whether disabling leaves the weights alone: merged adapters would be unmerged, which costs bits."""
    return not any(getattr(module, "merged_adapters", ()) for module in model.modules())


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model without its adapters; everything is as before afterwards.

    PEFT's own context sets `requires_grad` of every active adapter weight when it ends, which would train
    weights that the user froze, and leaves an instance `forward` behind on prompt-learning models.

    Raises:
        ConfigurationError: if there are no adapters, or they are merged into the base.
    """
    owner = _adapter_owner(model)
    if owner is None:
        raise ConfigurationError(
            f"reference='adapter' needs a model with PEFT adapters, got {type(model).__name__}: use "
            "reference='auto'."
        )
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    if not can_disable_adapters(model):
        raise ConfigurationError(
            "The adapters are merged into the base, and unmerging would change its weights: call "
            "`model.unmerge_adapter()` before training, or use reference='auto'."
        )
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    were_disabled = [(layer, layer._disable_adapters) for layer in layers]
    own_forward = owner.__dict__.get("forward")
    try:
        if hasattr(owner, "disable_adapter"):
            with owner.disable_adapter():  # type: ignore[operator]  # PEFT's own
                yield
        else:
            owner.disable_adapters()  # type: ignore[operator]  # transformers' own adapters
            try:
                yield
            finally:
                owner.enable_adapters()  # type: ignore[operator]
    finally:
        for parameter, was_trained in trains:
            parameter.requires_grad_(was_trained)
        for layer, was_disabled in were_disabled:
            layer._disable_adapters = was_disabled
        if own_forward is None:
            owner.__dict__.pop("forward", None)
        else:
            owner.__dict__["forward"] = own_forward


def frozen_copy(
    model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = torch.float32
) -> nn.Module:
    """A copy of the model that does not follow its weights.

    Pass it as `reference=` to compute the reference statistics on another device or in another precision.

    Args:
        model: The model; left exactly as it was found.
        device: Where to put the copy; by default where the model is.
        dtype: Its floating-point type; None for the model's own. Quantized weights stay as they are.

    Raises:
        ConfigurationError: if the model cannot be copied, as sharded and some quantized ones cannot.
    """
    # DeepSpeed's third stage: a copy would be of the part, and not know the others.
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigurationError(
            f"reference='copy' needs a model that can be copied, and of {type(model).__name__} this process "
            "holds a part alone: use reference='auto', the same start without a second model."
        )
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # sharding and quantization refuse a deep copy each in a way of their own
        if is_out_of_memory(error):
            raise
        raise ConfigurationError(
            f"reference='copy' needs a model that can be copied, and {type(model).__name__} cannot "
            f"({type(error).__name__}: {str(error)[:200]}): use reference='auto', the same start without a "
            "second model."
        ) from error
    for module in copied.modules():
        # TRL and others give an instance a `forward` that is a closure over the original: a plain deep
        # copy would run, and follow, the live weights.
        module.__dict__.pop("forward", None)
        module.training = False
    for parameter in copied.parameters():
        parameter.requires_grad = False
    # Not `copied.to`: transformers overrides it to refuse any dtype for quantized models, whose quantized
    # weights torch's own leaves alone.
    return nn.Module.to(copied, device=device, dtype=dtype)


def explain_difference(model: nn.Module) -> str:
    """Why a model differs from its base before any training, and which reference to choose, in a sentence."""
    configs = [config for config in _peft_configs(model).values() if config is not None]
    for config in configs:
        initialization = str(getattr(config, "init_lora_weights", ""))
        if initialization.lower().startswith(_BASE_CHANGING):
            return (
                f"init_lora_weights='{initialization}' moves weight from the base into the adapter, so that "
                "the base alone is not the model that you started from: use reference='auto'."
            )
        if getattr(config, "is_prompt_learning", False):
            return (
                "prompt learning starts from virtual tokens that the base has not: use reference='adapter' "
                "to compare with the base, 'auto' to compare with the start of this run."
            )
    return (
        "the adapter changes the model already, because it was trained before or starts from random weights: "
        "use reference='adapter' to count what was learned since the base, 'auto' for this run alone."
    )


def _adapter_owner(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        if hasattr(module, "disable_adapter") and getattr(module, "peft_config", None):
            return module
        if getattr(module, "_hf_peft_config_loaded", False):
            return module
    return None


def _peft_configs(model: nn.Module) -> Mapping[str, Any]:
    owner = _adapter_owner(model)
    configs: Mapping[str, Any] = getattr(owner, "peft_config", None) or {}
    return configs


def second_model(model: nn.Module, source: Literal["copy"] | Callable[[], nn.Module]) -> nn.Module:
    """A model beside the one that is trained: its frozen copy, or what a function loads.

    Raises:
        AuditMemoryError: if there is no memory for it.
    """
    try:
        return frozen_copy(model) if source == "copy" else source()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Not chained: its message makes trainers shrink their batch.
        reason = type(error).__name__
    raise AuditMemoryError(
        f"There is no memory for a second model as the reference ({reason}): use reference='auto', which "
        "needs none."
    )
