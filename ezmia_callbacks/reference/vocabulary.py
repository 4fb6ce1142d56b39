"""Whether the reference and the model speak of the same vocabulary, and what to do where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.scoring.rows import TokenRow, sides_of

__all__: list[str] = []


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
        largest = max(int(row.input_ids.max()) for row in sides_of(rows))
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
    n_reference, n_model = n_logits(reference), n_logits(model)
    difference = describe_other_softmax(n_reference, n_model, "the reference", "the model")
    if difference is None:
        return None
    return (
        f"{difference}. Use reference='auto', the start of this run, or a reference with {n_model} entries."
    )


def describe_other_softmax(
    n_reference: int | None, n_model: int | None, reference: str, model: str
) -> str | None:
    """How the vocabularies of two models differ in size, without a full stop; None if they do not.

    Args:
        n_reference: Entries of the reference's softmax; None if unknown.
        n_model: Entries of the model's.
        reference: What the reference is called.
        model: What the model is called.
    """
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
        f"The softmax of {reference} runs over {n_reference} entries and that of {model} over {n_model}: "
        f"{surplus}"
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
    n_tokens = sum(len(row.input_ids) for row in sides_of(rows))
    return (
        f"The vocabulary was enlarged from {n_pretrained} to {n_present} after pre-training, and {n_added} "
        f"of {n_tokens} canary tokens are new: unless trained since, their reference probabilities come from "
        "random rows. The start of this run, reference='auto', is the only reference for them; a checkpoint "
        "from before they were added has none. Where they carry no content, as in a chat template, give "
        "them the label -100."
    )


def _n_tokens_from(first_id: int, rows: Sequence[TokenRow]) -> int:
    return sum(int((row.input_ids >= first_id).sum()) for row in sides_of(rows))


def _padded_to(smaller: int, larger: int) -> int | None:
    """The multiple to which the smaller size may have been rounded up; None if it was not."""
    multiples = (8 * 2**i for i in range(6))
    return next((m for m in multiples if smaller % m and larger == smaller + -smaller % m), None)


def _n_embeddings(model: nn.Module) -> int | None:
    """Number of token ids that a model can take; None if it does not say."""
    return _size(model, "get_input_embeddings", "num_embeddings")


def n_logits(model: nn.Module) -> int | None:
    """Number of entries of a model's softmax; None if it does not say."""
    size = _size(model, "get_output_embeddings", "out_features")
    return _n_embeddings(model) if size is None else size


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
