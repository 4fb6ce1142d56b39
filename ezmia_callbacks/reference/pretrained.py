"""A causal language model from a checkpoint, whole or not at all."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError

__all__: list[str] = []


def load_pretrained(name: str, *, trust_remote_code: bool = False, **options: Any) -> nn.Module:
    """The causal language model of a checkpoint, with every weight from it.

    transformers fills what a checkpoint lacks with random numbers and only warns: figures that compare with
    such a model would be wrong without a sign. Weights that the model shares with others, such as a tied
    output layer, are not missing.

    Args:
        name: Path or hub id of the checkpoint.
        trust_remote_code: Whether code that comes with the checkpoint may run; nobody is asked.
        options: Passed on to `from_pretrained`, such as its `dtype`.

    Raises:
        ConfigurationError: if weights are missing, with their number, or have other shapes than the
            checkpoint's configuration says.
        MissingDependencyError: if transformers is not installed, or cannot be imported.
        Exception: whatever transformers raises when it cannot load the checkpoint.
    """
    try:
        from transformers import AutoModelForCausalLM
    except Exception as error:  # whatever a broken installation raises
        raise MissingDependencyError.because(
            error,
            "transformers",
            'Loading a checkpoint needs transformers: pip install "ezmia-callbacks[huggingface]"',
        ) from error

    def load(**further: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, trust_remote_code=trust_remote_code, **options, **further
        )

    try:
        model, info = load()
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        # Newer releases say only in their log which weights they mean.
        _, info = load(ignore_mismatched_sizes=True)
        raise ConfigurationError(_other_shapes(name, info["mismatched_keys"])) from error
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigurationError(
            f"{name!r} is not a whole causal language model, weights are missing: {missing[0]}{others}. Save "
            "the whole model there, or give another checkpoint."
        )
    whole: nn.Module = model
    return whole


def _other_shapes(name: str, mismatched: Iterable[tuple[str, Any, Any]]) -> str:
    found = sorted((key, list(saved), list(needed)) for key, saved, needed in mismatched)
    which = (
        f"{found[0][0]} has the shape {found[0][1]} in the file and {found[0][2]} by the configuration"
        if found
        else "its files and its configuration disagree"
    )
    others = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{name!r} cannot be loaded, size mismatch: {which}{others}. Save model and configuration together "
        "again, after the last change of the vocabulary."
    )
