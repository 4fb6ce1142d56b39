"""Loading the models of a finished run, one at a time, and their tokenizers.

Nothing is asked on the terminal, no code that comes with a model runs, and nothing is fetched from a hub for
what lies on this machine, unless the user says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ezmia_callbacks.errors import AuditError, AuditMemoryError, ConfigurationError, MissingDependencyError
from ezmia_callbacks.post_hoc.bases import Base
from ezmia_callbacks.post_hoc.checkpoints import Checkpoint
from ezmia_callbacks.post_hoc.offline import no_hub
from ezmia_callbacks.scoring.rows import Tokenizer

if TYPE_CHECKING:
    from torch import nn

__all__: list[str] = []

Precision = Literal["auto", "float32", "bfloat16", "float16", "bfloat16-mixed", "float16-mixed"]
"""Of the weights when audited; `"auto"`: as they were saved; mixed: as saved, computed under autocast."""

_MIXED = "-mixed"


@dataclass(frozen=True)
class Loader:
    """Loads the models of a run, each onto its base where it is an adapter.

    Attributes:
        base: The base.
        device: Where the models go.
        dtype: Precision of their weights.
        trust_remote_code: Whether code that comes with a model or a tokenizer may run.
        allow_download: Whether what their files name may be fetched from a hub.
    """

    base: Base
    device: str
    dtype: str
    trust_remote_code: bool
    allow_download: bool

    @classmethod
    def of(
        cls, base: Base, *, device: str, dtype: Precision, trust_remote_code: bool, allow_download: bool
    ) -> Loader:
        """A loader for a precision; mixed precision is that of the computation, not of the weights."""
        of_weights = "auto" if dtype.endswith(_MIXED) else dtype
        return cls(base, device, of_weights, trust_remote_code, allow_download)

    def load_base(self) -> nn.Module:
        """The model that the run started from."""
        base = self.base
        return self._load(
            base.source, "the base model", is_here=base.is_on_this_machine, revision=base.revision
        )

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """A saved model of the run.

        Raises:
            ConfigurationError: if it cannot be loaded, or an adapter does not fit its base.
            AuditMemoryError: if there is no memory for it.
            MissingDependencyError: if it is an adapter and peft is not installed.
        """
        if not checkpoint.is_adapter:
            return self._load(str(checkpoint.path), "a checkpoint")
        return self._onto_device(_with_adapter(self.load_base(), checkpoint.path, base=self.base.name))

    def load_tokenizer_of_base(self) -> Tokenizer:
        """The base's tokenizer."""
        base = self.base
        return self.load_tokenizer(base.source, is_here=base.is_on_this_machine, revision=base.revision)

    def load_tokenizer(
        self, source: str | Path, *, is_here: bool = True, revision: str | None = None
    ) -> Tokenizer:
        """A tokenizer.

        Raises:
            ConfigurationError: if it cannot be loaded.
        """
        transformers = _transformers()
        try:
            with self._confined(is_here=is_here) as options:
                tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(
                    str(source), **options, **_revision(revision)
                )
        except Exception as error:  # as for models
            raise _cannot_load(source, "a tokenizer", error) from error
        return tokenizer

    def _load(self, path: str, role: str, *, is_here: bool = True, revision: str | None = None) -> nn.Module:
        from ezmia_callbacks.reference.pretrained import load_pretrained

        transformers = _transformers()
        precision: dict[str, Any] = {_name_of_dtype_argument(transformers.__version__): self.dtype}
        try:
            with self._confined(is_here=is_here) as options:
                model = load_pretrained(path, **precision, **options, **_revision(revision))
        except AuditError:
            raise
        except Exception as error:  # hub, configuration, weights: each fails in a way of its own
            raise _cannot_load(path, role, error) from error
        return self._onto_device(model)

    @contextmanager
    def _confined(self, *, is_here: bool) -> Iterator[dict[str, bool]]:
        """Options of `from_pretrained`, under which nothing is asked, run or fetched unbidden."""
        is_closed = is_here and not self.allow_download
        options = {"trust_remote_code": self.trust_remote_code}
        with no_hub() if is_closed else nullcontext():
            yield options | ({"local_files_only": True} if is_closed else {})

    def _onto_device(self, model: nn.Module) -> nn.Module:
        from torch import nn

        try:
            # Not the model's own method, which refuses quantized weights.
            moved: nn.Module = nn.Module.to(model, device=self.device)
        except Exception as error:
            raise _cannot_load(self.base.name, "a model", error) from error
        return moved


def _revision(revision: str | None) -> dict[str, Any]:
    return {} if revision is None else {"revision": revision}


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
        raise ConfigurationError(f"There is no device {device!r} here: {reason(error)}") from error
    return device


def autocast_of(dtype: Precision, device: str) -> Callable[[], AbstractContextManager[object]]:
    """The context of a forward pass as a trainer in mixed precision makes it."""
    import torch

    if not dtype.endswith(_MIXED):
        return nullcontext
    computed_in = getattr(torch, dtype.removesuffix(_MIXED))
    return lambda: torch.autocast(torch.device(device).type, dtype=computed_in)


def _with_adapter(model: nn.Module, path: Path, *, base: str) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise MissingDependencyError(
            f'{str(path)!r} is a PEFT adapter, which needs peft: pip install "ezmia-callbacks[huggingface]"'
        ) from None
    try:
        with no_hub():
            model = peft.PeftModel.from_pretrained(model, str(path))
            expected = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
            missing = sorted(expected - set(peft.load_peft_weights(str(path), device="cpu")))
    except Exception as error:  # as for models
        raise _cannot_load(path, f"an adapter of {base!r}", error) from error
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
    text, advice = str(error), ""
    if "size mismatch" in text:
        advice = (
            " Is it the base that the adapter was trained on? If tokens were added before training, give as "
            "--base the base with the enlarged vocabulary, saved before the first step."
        )
    elif "trust_remote_code" in text:
        advice = " Code that comes with a model runs only with --trust-remote-code."
    return ConfigurationError(f"{str(path)!r} cannot be loaded as {role}: {reason(error)}{advice}")


def release_memory() -> None:
    """Give back what the model before has left."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """What an error says first; with what follows, where the first line only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if not lines[0].endswith(":") or len(lines) == 1:
        return lines[0]
    more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
    return f"{lines[0]} {lines[1].rstrip('.')}{more}."
