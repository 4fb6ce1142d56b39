"""Where the reference comes from: the model as it was before this run trained it.

Whatever the source, its statistics are computed once, before the first step, and nothing else of it is kept.
That is why a base that moves later (trained biases, unfrozen layers) can do no harm, and why no second
model stays in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from ezmia_callbacks.errors import AuditMemoryError, ConfigurationError
from ezmia_callbacks.scoring.memory import is_out_of_memory
from ezmia_callbacks.scoring.rows import TokenRow

__all__ = [
    "ReferenceSource",
    "adapters_disabled",
    "can_disable_adapters",
    "check_reference",
    "check_token_ids",
    "explain_added_vocabulary",
    "explain_difference",
    "explain_other_vocabulary",
    "frozen_copy",
    "has_adapters",
    "reference_label",
    "second_model",
]

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


def check_token_ids(reference: nn.Module, rows: Sequence[TokenRow]) -> None:
    """Refuse a reference whose vocabulary lacks tokens of the canaries.

    Args:
        reference: The reference model.
        rows: The encoded canaries.

    Raises:
        ConfigurationError: with the number of such tokens, and what to use instead.
    """
    n_known = _n_embeddings(reference)
    n_unknown = 0 if n_known is None else _n_tokens_from(n_known, rows)
    if n_unknown:
        largest = max(int(row.input_ids.max()) for row in rows)
        raise ConfigurationError(
            f"{n_unknown} tokens of the canaries are not in the reference's vocabulary: the largest id is "
            f"{largest}, and the reference has {n_known} embeddings. If tokens were added to the model, use "
            "reference='auto', the start of this run, or save the model after they were added and before "
            "training, and give that checkpoint. Otherwise give a reference with the model's tokenizer."
        )


def explain_other_vocabulary(reference: nn.Module, model: nn.Module) -> str | None:
    """Why probabilities of two models are not quite comparable, in a sentence; None if they are.

    Args:
        reference: The reference model.
        model: The model that is trained.
    """
    n_reference, n_model = _n_logits(reference), _n_logits(model)
    if n_reference is None or n_model is None or n_reference == n_model:
        return None
    smaller, larger = sorted((n_reference, n_model))
    multiple = _padded_to(smaller, larger)
    surplus = (
        f"{larger} looks like {smaller} padded to a multiple of {multiple}; padding is harmless only where "
        "its logits are very low, as after pre-training with it, and not where it was added afterwards"
        if multiple is not None
        else "the surplus rows take a share of every probability, also where no canary holds their tokens"
    )
    return (
        f"The softmax of the reference runs over {n_reference} entries and that of the model over {n_model}: "
        f"{surplus}. Use reference='auto', the start of this run, or a reference with {n_model} entries."
    )


def explain_added_vocabulary(model: nn.Module, rows: Sequence[TokenRow]) -> str | None:
    """Which canary tokens were added after pre-training, in a sentence; None if none were.

    The checkpoint that the model came from is asked for its vocabulary size, on this machine alone; where
    its configuration cannot be found, nothing is said.

    Args:
        model: The model before training, for which the reference is its own start or base.
        rows: The encoded canaries.
    """
    n_present, n_pretrained = _n_embeddings(model), _n_pretrained(model)
    n_added = 0 if n_pretrained is None else _n_tokens_from(n_pretrained, rows)
    if n_present is None or not n_added:
        return None
    n_tokens = sum(len(row.input_ids) for row in rows)
    return (
        f"The vocabulary was enlarged from {n_pretrained} to {n_present} after pre-training, and {n_added} "
        f"of {n_tokens} canary tokens are new: unless trained since, their reference probabilities come from "
        "random rows. The start of this run, reference='auto', is the only reference for them; a checkpoint "
        "from before they were added has none. Where they carry no content, as in a chat template, give "
        "them the label -100."
    )


def _n_tokens_from(first_id: int, rows: Sequence[TokenRow]) -> int:
    return sum(int((row.input_ids >= first_id).sum()) for row in rows)


def _padded_to(smaller: int, larger: int) -> int | None:
    """The multiple to which the smaller size may have been rounded up; None if it was not."""
    multiples = (8 * 2**i for i in range(6))
    return next((m for m in multiples if smaller % m and larger == smaller + -smaller % m), None)


def _n_embeddings(model: nn.Module) -> int | None:
    """Number of token ids that a model can take; None if it does not say."""
    return _size(model, "get_input_embeddings", "num_embeddings")


def _n_logits(model: nn.Module) -> int | None:
    """Number of entries of a model's softmax; None if it does not say."""
    n_logits = _size(model, "get_output_embeddings", "out_features")
    return _n_embeddings(model) if n_logits is None else n_logits


def _size(model: nn.Module, getter: str, name: str) -> int | None:
    # Inside a wrapper the first module that has such a layer is the language model.
    owner = next((module for module in model.modules() if hasattr(module, getter)), None)
    try:
        layer = None if owner is None else getattr(owner, getter)()
    except NotImplementedError:  # transformers' answer for models that have none
        return None
    # PEFT's wrappers of a layer hold the original first, and only some of them have its size.
    parts = layer.modules() if isinstance(layer, nn.Module) else ()
    return next((size for part in parts if isinstance(size := getattr(part, name, None), int)), None)


def _n_pretrained(model: nn.Module) -> int | None:
    """Vocabulary size in the configuration of the checkpoint that a model was loaded from, if it is here."""
    configs = (getattr(module, "config", None) for module in model.modules())
    config: Any = next((found for found in configs if getattr(found, "_name_or_path", None)), None)
    if config is None or not hasattr(type(config), "from_pretrained"):
        return None
    try:
        written, _ = type(config).get_config_dict(config._name_or_path, local_files_only=True)
        size = type(config).from_dict(written).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):
        return None
    # A folder of GGUF weights has no configuration, and would get the default of the model's class.
    parts = [written, *(part for part in written.values() if isinstance(part, dict))]
    is_written = any("vocab_size" in part for part in parts)
    return size if is_written and isinstance(size, int) else None


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
