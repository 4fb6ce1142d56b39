"""Weights that were over the budget, put where nothing is loaded from by accident."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ezmia_callbacks.audit.imprint import Imprint, alike_on_all_ranks, named_tensors
from ezmia_callbacks.audit.weight_files import write_tensors
from ezmia_callbacks.distributed import (
    broadcast_from_main,
    is_main_process,
    is_sharded,
    on_all_ranks_in_turns,
    rank,
)
from ezmia_callbacks.files import private_folder, write_atomically

__all__: list[str] = []

_README = """\
# Over the leakage budget

What lies here was rejected by a privacy audit: it gave away more of its training records than the run's
budget allows, or was never audited. Do not publish or deploy it. `history.jsonl`, in the folder above, has
the figures. Delete this folder when you are done with it.
"""


def describe_folder(folder: Path) -> None:
    """Have the folder of rejected weights say what it holds.

    Raises:
        OSError: if it cannot be written.
    """
    write_atomically(folder / "README.md", _README)


def save_rejected(model: nn.Module, folder: Path, *, step: int) -> Path:
    """Write a model that is over the budget; every process must call it.

    As the model itself saves, where it can (`save_pretrained`); else as one safetensors file, of a model in
    pieces one for each process, of which the main one's has what all hold alike.

    Args:
        model: The model.
        folder: Folder of rejected weights.
        step: Optimizer steps done.

    Returns:
        The folder that holds it.

    Raises:
        OSError: if it cannot be written.
    """
    taken = sum(1 for path in folder.glob(f"step-{step}*")) if is_main_process() else 0
    n = broadcast_from_main(taken)
    into = folder / (f"step-{step}" if n == 0 else f"step-{step}-{n + 1}")
    is_in_pieces = is_sharded(model)
    tensors = dict(named_tensors(model))
    shared = alike_on_all_ranks(Imprint.of(model), tensors) if is_in_pieces else set()

    def save() -> None:
        if not (is_main_process() or is_in_pieces):
            return
        private_folder(into)
        if is_main_process():
            describe_folder(folder)
        if hasattr(model, "save_pretrained") and not is_in_pieces:
            model.save_pretrained(into)  # type: ignore[operator]  # a method of Hugging Face models
            for path in into.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)
            return
        own = {name: tensor for name, tensor in tensors.items() if is_main_process() or name not in shared}
        write_tensors(into / f"weights-{rank()}.safetensors", own)

    on_all_ranks_in_turns(save)
    return into
