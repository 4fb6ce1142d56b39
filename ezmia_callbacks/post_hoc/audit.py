"""Auditing after the fact: the leakage curve of a finished run, from the checkpoints that it left.

The base model is the reference. With the same canaries, batch size and precision the figures are those that
the callback would have written during the run, bit by bit; canaries that were tokenized for training (the
callback's `auditor.canaries`) are the same, raw text is tokenized in the plainest way.
"""

from __future__ import annotations

import filecmp
import gc
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ezmia_callbacks.canaries.records import record_kind
from ezmia_callbacks.canaries.sets import CanarySet
from ezmia_callbacks.errors import AuditError, AuditMemoryError, ConfigurationError, MissingDependencyError
from ezmia_callbacks.functional.budget import Decision, LeakageBudget
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.scoring.rows import Tokenizer, encode_canaries
from ezmia_callbacks.shells.checkpoint_folders import checkpoints_in, step_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Checkpoint", "Precision", "audit_checkpoints", "find_checkpoints"]

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16", "bfloat16-mixed", "float16-mixed"]
"""Of the weights when audited; `"auto"`: as they were saved; mixed: as saved, computed under autocast."""
_MIXED = "-mixed"

_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
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


def audit_checkpoints(
    checkpoints: Sequence[Checkpoint],
    canaries: CanarySet,
    *,
    base: str | Path | None = None,
    budget: LeakageBudget | None = None,
    score: str = "ez",
    fpr_levels: Sequence[float] = (0.01, 0.1),
    confidence: float = 0.95,
    max_length: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    dtype: Precision = "auto",
    output_dir: str | Path | None = None,
    allow_shift: bool = False,
    show_progress: bool = False,
) -> AuditHistory:
    """The leakage curve of a finished run: the base as the baseline, then one audit per checkpoint.

    One forward pass over the canaries for each; models are loaded one at a time. A checkpoint that cannot be
    loaded or audited is a marked gap in the curve, unless it is the only one.

    Args:
        checkpoints: What `find_checkpoints` found.
        canaries: Records with known membership.
        base: Path or hub id of the model that the run started from; may be None for PEFT adapters, which
            name theirs.
        budget: What each checkpoint is held against; None only measures.
        score: The score that decides.
        fpr_levels: False-positive rates at which the true-positive rate is reported.
        confidence: Confidence of the intervals, in (0, 1).
        max_length: Truncation of canaries that are raw text; give what training used.
        batch_size: Records in a forward pass.
        device: Where to compute, such as `"cuda:1"`; by default a GPU if there is one.
        dtype: Precision of the weights; of a run in mixed precision (`bf16=True`), `"bfloat16-mixed"`.
        output_dir: Folder for history and reference statistics; None keeps them in memory.
        allow_shift: Let a budget decide although members and non-members of a split of the user's can be told
            apart without the model. Figures then include that difference.
        show_progress: Show bars.

    Raises:
        ConfigurationError: if the base, its tokenizer or the only checkpoint cannot be loaded, an argument is
            outside its range, or a budget is to decide on sides that can be told apart without the model.
        CanaryError: if the canaries cannot be encoded, or cannot resolve the budget.
        MissingDependencyError: if transformers, or peft for an adapter, is not installed.
        OSError: if `output_dir` cannot be written.
    """
    from tqdm import tqdm

    from ezmia_callbacks.audit.auditor import PrivacyAuditor

    base = _checked_base(checkpoints, base)
    device = _device(device)
    loader = _Loader(base, device=device, dtype="auto" if dtype.endswith(_MIXED) else dtype)
    tokenizer = _tokenizer(checkpoints, canaries, base=base, score=score)
    auditor = PrivacyAuditor(
        _distinct_rows(canaries, tokenizer, max_length=max_length),
        budget=budget,
        score=score,
        fpr_levels=fpr_levels,
        confidence=confidence,
        n_audits=len(checkpoints),
        tokenizer=tokenizer,
        batch_size=batch_size,
        output_dir=output_dir,
        restore=False,
        on_error="raise",
        allow_shift=allow_shift,
        show_progress=show_progress,
        autocast=_autocast(dtype, device),
    )
    auditor.history = replace(
        auditor.history,
        run_metadata=replace(
            auditor.history.run_metadata,
            n_checkpoints=len(checkpoints),
            base_model=str(base),
            device=device,
            precision=dtype,
        ),
    )
    baseline = auditor.begin(loader.load_base(), step=0, epoch=0.0)
    for checkpoint in tqdm(checkpoints, desc="checkpoints", leave=False, disable=not show_progress):
        _release_memory()
        n_before = len(auditor.history)
        try:
            result = auditor.audit(loader.load(checkpoint), step=checkpoint.step, epoch=checkpoint.epoch)
        except Exception as error:  # one bad checkpoint leaves a gap, not a lost curve
            if len(checkpoints) == 1 or isinstance(error, MissingDependencyError):
                raise
            logger.warning("%s could not be audited: %s", checkpoint.path, _first_line(error))
            if len(auditor.history) == n_before:
                auditor.history = auditor.history.with_result(_gap(checkpoint, baseline, error))
        else:
            _warn_if_untrained(checkpoint, result, baseline)
    history = _never_stopped(auditor.history)
    if output_dir is not None:
        history.save(Path(output_dir) / "history.jsonl")
    return history


@dataclass(frozen=True)
class _Loader:
    """Loads the models of a run, each onto its base where it is an adapter."""

    base: str | Path
    device: str
    dtype: Precision

    def load_base(self) -> nn.Module:
        return self._load(self.base, "the base model")

    def load(self, checkpoint: Checkpoint) -> nn.Module:
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


def _checked_base(checkpoints: Sequence[Checkpoint], base: str | Path | None) -> str | Path:
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


def _device(device: str | None) -> str:
    import torch

    if device is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(f"There is no device {device!r} here: {_first_line(error)}") from error
    return device


def _autocast(dtype: Precision, device: str) -> Callable[[], AbstractContextManager[object]]:
    """The context of a forward pass as a trainer in mixed precision makes it."""
    import torch

    if not dtype.endswith(_MIXED):
        return nullcontext
    computed_in = getattr(torch, dtype.removesuffix(_MIXED))
    return lambda: torch.autocast(torch.device(device).type, dtype=computed_in)


def _tokenizer(
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


def _distinct_rows(canaries: CanarySet, tokenizer: Tokenizer | None, *, max_length: int | None) -> CanarySet:
    """The canaries as token rows, without those that truncation has made equal.

    The choice does not look at membership, so that a random split stays one. The callback does the same.
    """
    encoded = encode_canaries(canaries, tokenizer, max_length=max_length)
    keys = [row.input_ids.tobytes() for row in encoded.rows]
    n_copies = Counter(keys)
    kept = [i for i, key in enumerate(keys) if n_copies[key] == 1]
    if len(kept) < len(canaries):
        logger.warning(
            "%d of %d canaries are left out: fewer than two of their tokens carry loss, or truncation makes "
            "them the same as another.",
            len(canaries) - len(kept),
            len(canaries),
        )
    return canaries.select(
        canaries.indices_of(encoded.record_ids[i] for i in kept),
        records=[
            {"input_ids": encoded.rows[i].input_ids.tolist(), "labels": encoded.rows[i].labels.tolist()}
            for i in kept
        ],
    )


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
    return ConfigurationError(f"{str(path)!r} cannot be loaded as {role}: {_first_line(error)}")


def _gap(checkpoint: Checkpoint, baseline: AuditResult, error: Exception) -> AuditResult:
    return AuditResult(
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        status="failed",
        is_baseline=False,
        score=baseline.score,
        n_members=baseline.n_members,
        n_non_members=baseline.n_non_members,
        decision=Decision(False, None, "the audit failed: leakage is unknown"),
        error=f"{type(error).__name__}: {_first_line(error)}",
    )


def _never_stopped(history: AuditHistory) -> AuditHistory:
    """Verdicts without a stop: the run is over, and a report must not say that its audit ended it."""
    results = (replace(result, decision=replace(result.decision, stop=False)) for result in history)
    return replace(history, results=tuple(results))


def _warn_if_untrained(checkpoint: Checkpoint, result: AuditResult, baseline: AuditResult) -> None:
    """A clean figure of the wrong weights is the worst that this module could return."""
    losses = (result.member_loss, result.non_member_loss)
    if losses == (baseline.member_loss, baseline.non_member_loss):
        logger.warning(
            "%s predicts exactly what the base predicts: it was not trained, or it is the base itself.",
            checkpoint.path,
        )


def _release_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
