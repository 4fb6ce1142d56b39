"""The saved models of a finished run, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.post_hoc.twins import is_same_model
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.shells.checkpoint_folders import checkpoints_in, step_of
from ezmia_callbacks.typed_rows import parse_json

__all__: list[str] = []

logger = get_logger(__name__)

_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
# The names by which a loader finds a whole model.
_WHOLE_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
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
        twins: Folders with the same configuration and the same weights, to the last bit. They are not audited
            again; every report names them.
    """

    path: Path
    step: int
    epoch: float | None
    is_adapter: bool
    twins: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in tables: its folder, of an adapter with a name also the checkpoint's."""
        path = self.path.resolve()
        return path.name if step_of(path.parent) is None else f"{path.parent.name}/{path.name}"

    @property
    def base_named(self) -> str | None:
        """The base that an adapter names; None if it names none, or is no adapter."""
        named = self._adapter_config.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    @property
    def base_revision(self) -> str | None:
        """The revision of that base, if the adapter names one."""
        named = self._adapter_config.get("revision")
        return named if isinstance(named, str) and named else None

    @property
    def _adapter_config(self) -> dict[str, Any]:
        return _json_object(self.path / _ADAPTER_CONFIG) if self.is_adapter else {}


def find_checkpoints(path: str | Path) -> tuple[Checkpoint, ...]:
    """The checkpoints of a run in step order, or the one that the folder is.

    Of a run's folder: every `checkpoint-<step>` in it, then the model in the folder itself, if there is one.
    Adapters that PEFT saved in folders of their own names beside the first one are checkpoints, too. A model
    in the folder itself that is the same as a checkpoint is among its `twins`.

    Args:
        path: Folder of a run, of a checkpoint, or of a saved model or PEFT adapter.

    Raises:
        ConfigurationError: if there is no such folder, or no model in it, or one holds both a whole model and
            an adapter.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigurationError(f"There is no folder {str(folder)!r}: give a run, a checkpoint or a model.")
    steps = {path: step for path in checkpoints_in(folder) if (step := step_of(path)) is not None}
    checkpoints: list[Checkpoint] = []
    for place, step in sorted(steps.items(), key=lambda item: item[1]):
        # A folder without any model stays: it is a gap, not nothing.
        checkpoints += _models_in(place, step) or [_checkpoint(place, step)]
    own = step_of(folder) or step_of(folder.resolve().parent) or _UNKNOWN_STEP
    for model in _models_in(folder, checkpoints[-1].step if checkpoints else own):
        twin = next((i for i, c in enumerate(checkpoints) if _is_twin(c, model)), None)
        if twin is None:
            checkpoints.append(model)
        else:
            found = checkpoints[twin]
            logger.info("The model in %s is that of %s.", model.path, found.name)
            checkpoints[twin] = replace(found, twins=(*found.twins, model.path))
    if not checkpoints:
        raise ConfigurationError(
            f"{str(folder)!r} holds no model ({_CONFIG} or {_ADAPTER_CONFIG}) and no checkpoint-<step> "
            "folders."
        )
    _warn_of_others(folder, checkpoints)
    return tuple(checkpoints)


def _models_in(folder: Path, step: int) -> list[Checkpoint]:
    """The model in a folder, and the adapters with names beside it."""
    named = sorted(
        path.parent for path in folder.glob(f"*/{_ADAPTER_CONFIG}") if step_of(path.parent) is None
    )
    own = [_checkpoint(folder, step)] if _holds_model(folder) else []
    return [*own, *(_checkpoint(path, step) for path in named)]


def _is_twin(checkpoint: Checkpoint, model: Checkpoint) -> bool:
    return checkpoint.is_adapter == model.is_adapter and is_same_model(checkpoint.path, model.path)


def _warn_of_others(folder: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """Name whole models below the folder that are not audited: one of them may be what is released."""
    audited = {checkpoint.path for checkpoint in checkpoints}
    others = sorted(
        path.parent.name
        for path in folder.glob(f"*/{_CONFIG}")
        if path.parent not in audited and any((path.parent / name).is_file() for name in _WHOLE_MODEL)
    )
    if others:
        logger.warning(
            "Not audited, though they hold models: %s in %s. Give the folder that is released by itself.",
            ", ".join(others),
            folder,
        )


def _checkpoint(path: Path, step: int) -> Checkpoint:
    is_adapter = (path / _ADAPTER_CONFIG).is_file()
    whole = next((name for name in _WHOLE_MODEL if (path / name).is_file()), None)
    if is_adapter and whole is not None:
        raise ConfigurationError(
            f"{str(path)!r} holds both a whole model ({whole}) and an adapter ({_ADAPTER_CONFIG}): programs "
            "differ in which of them they load. Move one of them into a folder of its own."
        )
    # An adapter with a name stands in the folder of its checkpoint, which knows its epoch.
    states = [_json_object(place / "trainer_state.json") for place in (path, path.parent)]
    state = states[0] or (states[1] if is_adapter else {})
    step_then, epoch = state.get("global_step"), state.get("epoch")
    is_known = any(step_of(place) is not None for place in (path, path.parent))
    return Checkpoint(
        path=path,
        step=step_then if _is_count(step_then) and not is_known else step,
        epoch=float(epoch) if _is_finite(epoch) else None,
        is_adapter=is_adapter,
    )


def _is_count(value: Any) -> TypeGuard[int]:
    # To Python True is a number; beyond 64 bits no array holds it.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _json_object(path: Path) -> dict[str, Any]:
    try:
        # Trainers write the losses of runs that diverged, too.
        content = parse_json(path.read_text(encoding="utf-8"), allow_nan=True)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _holds_model(folder: Path) -> bool:
    return (folder / _CONFIG).is_file() or (folder / _ADAPTER_CONFIG).is_file()
