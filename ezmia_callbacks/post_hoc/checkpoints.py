"""The saved models of a finished run, in order, and the model that they were trained from."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.shells.checkpoint_folders import checkpoints_in, step_of

__all__: list[str] = []

logger = get_logger(__name__)

_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_WEIGHT_FILES = ("*model*.safetensors", "*model*.bin")
# Of a model that does not say after how many steps it was saved.
_UNKNOWN_STEP = 1


@dataclass(frozen=True)
class Checkpoint:
    """A saved model of a run.

    Attributes:
        path: Its folder.
        step: Optimizer steps done when it was saved.
        epoch: Epochs done, as a fraction; None if unknown.
        is_adapter: Whether it is a PEFT adapter without its base.
    """

    path: Path
    step: int
    epoch: float | None
    is_adapter: bool


def find_checkpoints(path: str | Path) -> tuple[Checkpoint, ...]:
    """The checkpoints of a run in step order, or the one that the folder is.

    Of a run's folder: every `checkpoint-<step>` in it, then the model in the folder itself, if there is one
    and its weights are not those of a checkpoint.

    Args:
        path: Folder of a run, of a checkpoint, or of a saved model or PEFT adapter.

    Raises:
        ConfigurationError: if there is no such folder, or no model in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigurationError(f"There is no folder {str(folder)!r}: give a run, a checkpoint or a model.")
    steps = {path: step for path in checkpoints_in(folder) if (step := step_of(path)) is not None}
    checkpoints = [_checkpoint(path, step) for path, step in sorted(steps.items(), key=lambda item: item[1])]
    if _holds_model(folder):
        last = checkpoints[-1].step if checkpoints else (step_of(folder) or _UNKNOWN_STEP)
        twin = next((c for c in checkpoints if _has_same_weights(c.path, folder)), None)
        if twin is None:
            checkpoints.append(_checkpoint(folder, last))
        else:
            logger.info("The model in %s is that of %s.", folder, twin.path.name)
    if not checkpoints:
        raise ConfigurationError(
            f"{str(folder)!r} holds no model ({_CONFIG} or {_ADAPTER_CONFIG}) and no checkpoint-<step> "
            "folders."
        )
    return tuple(checkpoints)


def _checkpoint(path: Path, step: int) -> Checkpoint:
    state = _json_object(path / "trainer_state.json")
    step_then, epoch = state.get("global_step"), state.get("epoch")
    return Checkpoint(
        path=path,
        step=step_then if isinstance(step_then, int) and step_of(path) is None else step,
        epoch=float(epoch) if isinstance(epoch, int | float) else None,
        is_adapter=(path / _ADAPTER_CONFIG).is_file(),
    )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _holds_model(folder: Path) -> bool:
    return (folder / _CONFIG).is_file() or (folder / _ADAPTER_CONFIG).is_file()


def _has_same_weights(one: Path, other: Path) -> bool:
    names = [
        sorted({path.name for pattern in _WEIGHT_FILES for path in folder.glob(pattern)})
        for folder in (one, other)
    ]
    return names[0] == names[1] and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names[0]
    )


def base_of(checkpoints: Sequence[Checkpoint], base: str | Path | None) -> str | Path:
    if not checkpoints:
        raise ConfigurationError("Got no checkpoints: see `find_checkpoints`.")
    if base is None:
        named = [
            _json_object(c.path / _ADAPTER_CONFIG).get("base_model_name_or_path")
            for c in checkpoints
            if c.is_adapter
        ]
        if len(named) < len(checkpoints) or not all(isinstance(name, str) and name for name in named):
            raise ConfigurationError(
                f"{str(checkpoints[0].path)!r} does not say which model it was trained from: name it "
                "(--base)."
            )
        return str(named[0])
    for checkpoint in checkpoints:
        if Path(base).is_dir() and Path(base).resolve() == checkpoint.path.resolve():
            raise ConfigurationError(
                f"The base and the checkpoint are the same folder, {str(base)!r}: the base is the model that "
                "the run started from."
            )
    return base
