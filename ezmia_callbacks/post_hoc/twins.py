"""Whether two folders hold the same model, to the last bit: then one audit speaks of both."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

from ezmia_callbacks.typed_rows import parse_json

__all__: list[str] = []

# What decides, beside the weights, what a model computes. How it generates and how text becomes tokens do
# not: an audit generates nothing, and reads the canaries with one tokenizer.
_CONFIGURATION = ("config.json", "adapter_config.json", "*.index.json", "*quant*.json", "*.py")
_INDEX = "*.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")
# Of the training, not of the model.
_OF_TRAINING = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")


def is_same_model(one: Path, other: Path) -> bool:
    """Whether configuration and all weight files of two folders are equal, at least one of these compared.

    Weight files are all that look like some, and all that an index names, whatever they are called. What
    cannot be read is not equal.
    """
    filecmp.clear_cache()
    try:
        if _configuration(one) != _configuration(other):
            return False
        names = weight_files(one)
        return bool(names) and names == weight_files(other) and _are_equal(one, other, names)
    except (OSError, ValueError):
        return False


def weight_files(folder: Path) -> set[str]:
    """Names of the files that hold a model's weights, as paths in its folder.

    Raises:
        OSError: if an index cannot be read.
        ValueError: if it is no JSON.
    """
    found = {
        path.name
        for path in folder.iterdir()
        if path.suffix in _WEIGHT_SUFFIXES and not any(path.match(pattern) for pattern in _OF_TRAINING)
    }
    for index in folder.glob(_INDEX):
        content = _json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict):
            raise ValueError(f"{index} names no weights")
        found |= set(map(str, shards.values()))
    return found


def _configuration(folder: Path) -> dict[str, Any]:
    paths = {path for pattern in _CONFIGURATION for path in folder.glob(pattern)}
    return {path.name: _json(path) if path.suffix == ".json" else path.read_bytes() for path in paths}


def _json(path: Path) -> Any:
    # Some models are configured with infinities.
    return parse_json(path.read_text(encoding="utf-8"), allow_nan=True)


def _are_equal(one: Path, other: Path, names: set[str]) -> bool:
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)
