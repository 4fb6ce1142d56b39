"""Auditing after the fact: the leakage curve of a finished run, from the checkpoints that it left.

The base model is the reference. With the same canaries, batch size and precision the figures are those that
the callback would have written during the run, bit by bit; canaries that were tokenized for training (the
callback's `auditor.canaries`) are the same, raw text is tokenized in the plainest way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ezmia_callbacks.canaries.sets import CanarySet
from ezmia_callbacks.errors import MissingDependencyError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.post_hoc.bases import bases_of
from ezmia_callbacks.post_hoc.checkpoints import Checkpoint
from ezmia_callbacks.post_hoc.curves import Curve, join
from ezmia_callbacks.post_hoc.models import (
    Loader,
    Precision,
    autocast_of,
    release_memory,
    resolve_device,
)
from ezmia_callbacks.post_hoc.reading import Reading, read_canaries
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import AuditResult, Finding
from ezmia_callbacks.safe_text import describe_error, get_logger, log_error

if TYPE_CHECKING:
    from ezmia_callbacks.audit.auditor import PrivacyAuditor

__all__: list[str] = []

logger = get_logger(__name__)

_HISTORY = "history.jsonl"


def audit_checkpoints(
    checkpoints: Sequence[Checkpoint],
    canaries: CanarySet,
    *,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    budget: LeakageBudget | None = None,
    score: str = "strongest",
    fpr_levels: Sequence[float] = (0.01, 0.1),
    confidence: float = 0.95,
    max_length: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    dtype: Precision = "auto",
    output_dir: str | Path | None = None,
    allow_shift: bool = False,
    allow_other_base: bool = False,
    allow_download: bool = False,
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> AuditHistory:
    """The leakage curve of a finished run: the base as the baseline, then one audit per checkpoint.

    One forward pass over the canaries for each; models are loaded one at a time. A checkpoint that cannot be
    loaded or audited is a marked gap in the curve, unless it is the only one. Adapters that name different
    bases are compared each with its own: the baseline of the curve is then that of the first one, and each
    audit names its base.

    Args:
        checkpoints: What `find_checkpoints` found.
        canaries: Records with known membership.
        base: Path or hub id of the model that the run started from; may be None for PEFT adapters, which
            name theirs: what they name is looked for on this machine alone.
        tokenizer: What reads canaries that are text: `"base"`, the base's tokenizer, `"checkpoint"`, that of
            the checkpoints, or the folder or hub id of another. By default the base's, and an error if a
            checkpoint's own makes other tokens of them.
        budget: What each checkpoint is held against; None only measures.
        score: What decides: `"strongest"` of EZ, loss difference, WBC and loss, or one by its name.
        fpr_levels: False-positive rates at which the true-positive rate is reported.
        confidence: Confidence of the intervals, in (0, 1).
        max_length: Truncation of canaries that are raw text; give what training used.
        batch_size: Records in a forward pass.
        device: Where to compute, such as `"cuda:1"`; by default a GPU if there is one.
        dtype: Precision of the weights; of a run in mixed precision (`bf16=True`), `"bfloat16-mixed"`.
        output_dir: Folder for history and reference statistics; None keeps them in memory. With several
            bases the statistics are in a folder for each.
        allow_shift: Let a budget decide although members and non-members of a split of the user's can be told
            apart without the model. Figures then include that difference.
        allow_other_base: Take `base` although an adapter names another model as its base.
        allow_download: Fetch the base that an adapter names from a hub, if it is not on this machine.
        trust_remote_code: Run code that comes with the models and their tokenizers.
        show_progress: Show bars.

    Raises:
        ConfigurationError: if a base, its tokenizer or the only checkpoint cannot be loaded, an adapter names
            another base than `base`, a checkpoint's tokenizer makes other tokens of the canaries and
            `tokenizer` is None, an argument is outside its range, or a budget is to decide on sides that can
            be told apart without the model.
        CanaryError: if the canaries cannot be encoded, or cannot resolve the budget.
        MissingDependencyError: if transformers, or peft for an adapter, is not installed.
        OSError: if `output_dir` cannot be written.
    """
    from ezmia_callbacks.audit.auditor import PrivacyAuditor

    bases = bases_of(checkpoints, base, allow_other_base=allow_other_base, allow_download=allow_download)
    device = resolve_device(device)
    distinct = list(dict.fromkeys(bases))
    loaders = [
        Loader.of(
            one,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            allow_download=allow_download,
        )
        for one in distinct
    ]
    own = [[c for c, its in zip(checkpoints, bases, strict=True) if its == one] for one in distinct]
    # All before the first forward pass: what is wrong with the last base is known at once.
    readings = [
        read_canaries(canaries, some, loader, tokenizer=tokenizer, max_length=max_length, score=score)
        for some, loader in zip(own, loaders, strict=True)
    ]
    folder = None if output_dir is None else Path(output_dir)
    curves = []
    for number, (some, loader, reading) in enumerate(zip(own, loaders, readings, strict=True), start=1):
        auditor = PrivacyAuditor(
            reading.canaries,
            budget=budget,
            score=score,
            fpr_levels=fpr_levels,
            confidence=confidence,
            # The error rate is shared by all of them, whatever their base.
            n_audits=len(checkpoints),
            tokenizer=reading.tokenizer,
            batch_size=batch_size,
            output_dir=folder if folder is None or len(distinct) == 1 else folder / f"base_{number}",
            restore=False,
            on_error="raise",
            allow_shift=allow_shift,
            judge_only=True,
            # The run is over, and its batches are gone.
            assume_seen=True,
            show_progress=show_progress,
            autocast=autocast_of(dtype, device),
            run_metadata=replace(
                RunMetadata.of_this_process(),
                n_checkpoints=len(some),
                base_model=loader.base.name,
                tokenizer=reading.source,
                device=device,
                precision=dtype,
            ),
        )
        is_only = len(checkpoints) == 1
        curves.append(_curve(auditor, some, loader, reading, is_only=is_only, show_progress=show_progress))
    history = join(curves, checkpoints)
    if folder is not None:
        history.save(folder / _HISTORY)
    return history


def _curve(
    auditor: PrivacyAuditor,
    checkpoints: Sequence[Checkpoint],
    loader: Loader,
    reading: Reading,
    *,
    is_only: bool,
    show_progress: bool,
) -> Curve:
    """The audits of the checkpoints of one base."""
    from tqdm import tqdm

    from ezmia_callbacks.reference.vocabulary import n_logits

    def begin() -> tuple[AuditResult, int | None]:
        model = loader.load_base()
        return auditor.begin(model, step=0, epoch=0.0), n_logits(model)

    def audit(checkpoint: Checkpoint) -> list[Finding]:
        # No name outside holds the model: the next one may need its memory.
        model = loader.load(checkpoint)
        found = _other_vocabulary(n_in_base, n_logits(model), loader.base.name)
        result = auditor.audit(model, step=checkpoint.step, epoch=checkpoint.epoch)
        return [*found, *_untrained(result, baseline)]

    baseline, n_in_base = begin()
    of_audits = []
    for checkpoint in tqdm(checkpoints, desc="checkpoints", leave=False, disable=not show_progress):
        release_memory()
        n_before = len(auditor.history)
        found: list[Finding] = []
        try:
            found = audit(checkpoint)
        except Exception as error:  # one bad checkpoint leaves a gap, not a lost curve
            if is_only or isinstance(error, MissingDependencyError):
                raise
            log_error(logger, "%s could not be audited (%s).", checkpoint.path, error=error)
            if len(auditor.history) == n_before:
                auditor.mark_failed(describe_error(error), step=checkpoint.step, epoch=checkpoint.epoch)
        for finding in found:
            logger.warning("%s: %s", checkpoint.path, finding.text)
        of_audits.append(tuple(found))
    auditor.finish()
    for finding in reading.findings:
        logger.warning("%s", finding.text)
    return Curve(loader.base, checkpoints, auditor.history, reading.findings, of_audits)


def _other_vocabulary(n_in_base: int | None, n_in_model: int | None, base: str) -> list[Finding]:
    from ezmia_callbacks.reference.vocabulary import describe_other_softmax

    text = describe_other_softmax(n_in_base, n_in_model, f"the base {base!r}", "the checkpoint")
    if text is None:
        return []
    advice = "Give as the base the model with the checkpoint's vocabulary, saved before training."
    return [Finding("vocabulary", True, f"{text}. {advice}")]


def _untrained(result: AuditResult, baseline: AuditResult) -> list[Finding]:
    """A clean figure of the wrong weights is the worst that this module could return."""
    losses = (result.member_loss, result.non_member_loss)
    if losses != (baseline.member_loss, baseline.non_member_loss):
        return []
    text = "It predicts exactly what the base predicts: it was not trained, or it is the base itself."
    return [Finding("not trained", True, text)]
