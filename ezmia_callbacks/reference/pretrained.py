"""A causal language model from a checkpoint, whole or not at all."""

from typing import Any

from torch import nn

from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError

__all__: list[str] = []


def load_pretrained(name: str, **options: Any) -> nn.Module:
    """The causal language model of a checkpoint, with every weight from it.

    transformers fills what a checkpoint lacks with random numbers and only warns: figures that compare with
    such a model would be wrong without a sign. Weights that the model shares with others, such as a tied
    output layer, are not missing.

    Args:
        name: Path or hub id of the checkpoint.
        options: Passed on to `from_pretrained`, such as its `dtype`.

    Raises:
        ConfigurationError: if weights are missing, with their number.
        MissingDependencyError: if transformers is not installed.
        Exception: whatever transformers raises when it cannot load the checkpoint.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise MissingDependencyError(
            'Loading a checkpoint needs transformers: pip install "ezmia-callbacks[huggingface]"'
        ) from None
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigurationError(
            f"{name!r} is not a whole causal language model, weights are missing: {missing[0]}{others}. Save "
            "the whole model there, or give another checkpoint."
        )
    whole: nn.Module = model
    return whole
