"""Loading the models of a finished run, one at a time, and its tokenizer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ezmia_callbacks.canaries.records import record_kind
from ezmia_callbacks.canaries.sets import CanarySet
from ezmia_callbacks.errors import AuditError, AuditMemoryError, ConfigurationError, MissingDependencyError
from ezmia_callbacks.post_hoc.checkpoints import Checkpoint
from ezmia_callbacks.scoring.rows import Tokenizer

if TYPE_CHECKING:
    from torch import nn

__all__: list[str] = []

Precision = Literal["auto", "float32", "bfloat16", "float16", "bfloat16-mixed", "float16-mixed"]
"""Of the weights when audited; `"auto"`: as they were saved; mixed: as saved, computed under autocast."""

_MIXED = "-mixed"
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Loader:
    """Loads the models of a run, each onto its base where it is an adapter."""

    base: str | Path
    device: str
    dtype: Precision

    @classmethod
    def of(cls, base: str | Path, *, device: str, dtype: Precision) -> Loader:
        """A loader for a precision; mixed precision is that of the computation, not of the weights."""
        return cls(base, device=device, dtype="auto" if dtype.endswith(_MIXED) else dtype)

    def load_base(self) -> nn.Module:
        """The model that the run started from."""
        return self._load(self.base, "the base model")

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """A saved model of the run.

        Raises:
            ConfigurationError: if it cannot be loaded, or an adapter does not fit its base.
            AuditMemoryError: if there is no memory for it.
            MissingDependencyError: if it is an adapter and peft is not installed.
        """
        if not checkpoint.is_adapter:
            return self._load(checkpoint.path, "a checkpoint")
        return self._onto_device(_with_adapter(self.load_base(), checkpoint.path))

    def _load(self, path: str | Path, role: str) -> nn.Module:
        from ezmia_callbacks.reference.pretrained import load_pretrained

        transformers = _transformers()
        precision = {_name_of_dtype_argument(transformers.__version__): self.dtype}
        try:
            model = load_pretrained(str(path), **precision)
        except AuditError:
            raise
        except Exception as error:  # hub, configuration, weights: each fails in a way of its own
            raise _cannot_load(path, role, error) from error
        return self._onto_device(model)

    def _onto_device(self, model: nn.Module) -> nn.Module:
        from torch import nn

        try:
            # Not the model's own method, which refuses quantized weights.
            moved: nn.Module = nn.Module.to(model, device=self.device)
        except Exception as error:
            raise _cannot_load(self.base, "a model", error) from error
        return moved


def resolve_device(device: str | None) -> str:
    """The device to compute on; by default a GPU if there is one."""
    import torch

    if device is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(f"There is no device {device!r} here: {first_line(error)}") from error
    return device


def autocast_of(dtype: Precision, device: str) -> Callable[[], AbstractContextManager[object]]:
    """The context of a forward pass as a trainer in mixed precision makes it."""
    import torch

    if not dtype.endswith(_MIXED):
        return nullcontext
    computed_in = getattr(torch, dtype.removesuffix(_MIXED))
    return lambda: torch.autocast(torch.device(device).type, dtype=computed_in)


def load_tokenizer(
    checkpoints: Sequence[Checkpoint], canaries: CanarySet, *, base: str | Path, score: str
) -> Tokenizer | None:
    """The run's own tokenizer, or its base's; None where no text has to be tokenized."""
    if score != "zlib" and all(record_kind(record) == "tokenized" for record in canaries.records):
        return None
    transformers = _transformers()
    last = checkpoints[-1].path
    has_own = any((last / name).is_file() for name in _TOKENIZER_FILES)
    source = last if has_own else base
    try:
        tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # as for models
        raise _cannot_load(source, "a tokenizer", error) from error
    return tokenizer


def _with_adapter(base: nn.Module, path: Path) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise MissingDependencyError(
            f'{str(path)!r} is a PEFT adapter, which needs peft: pip install "ezmia-callbacks[huggingface]"'
        ) from None
    try:
        model: nn.Module = peft.PeftModel.from_pretrained(base, str(path))
        expected = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        missing = sorted(expected - set(peft.load_peft_weights(str(path), device="cpu")))
    except Exception as error:  # as for models
        raise _cannot_load(path, "an adapter", error) from error
    if missing:
        # PEFT only warns, and an adapter that is not there leaks nothing.
        raise ConfigurationError(
            f"The adapter {str(path)!r} does not fit its base: {len(missing)} of its {len(expected)} weights "
            f"are not in the file, such as {missing[0]}. Is it the base that the adapter was trained on?"
        )
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            'Auditing checkpoints needs transformers: pip install "ezmia-callbacks[huggingface]"'
        ) from None
    return transformers


def _name_of_dtype_argument(version: str) -> str:
    """Renamed in transformers 4.56, where the old name began to warn."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _cannot_load(path: str | Path, role: str, error: Exception) -> AuditError:
    from ezmia_callbacks.scoring.memory import is_out_of_memory

    if is_out_of_memory(error):
        return AuditMemoryError(f"There is no memory for {str(path)!r}: use another device or precision.")
    return ConfigurationError(f"{str(path)!r} cannot be loaded as {role}: {first_line(error)}")


def release_memory() -> None:
    """Give back what the model before has left."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """What an error says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
