"""Auditing after the fact: the leakage curve of a finished run, from the checkpoints that it left.

The base model is the reference. With the same canaries, batch size and precision the figures are those that
the callback would have written during the run, bit by bit; canaries that were tokenized for training (the
callback's `auditor.canaries`) are the same, raw text is tokenized in the plainest way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ezmia_callbacks.canaries.sets import CanarySet
from ezmia_callbacks.errors import MissingDependencyError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.post_hoc.checkpoints import Checkpoint, base_of
from ezmia_callbacks.post_hoc.models import (
    Loader,
    Precision,
    autocast_of,
    first_line,
    load_tokenizer,
    release_memory,
    resolve_device,
)
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.scoring.rows import Tokenizer, encode_canaries

__all__: list[str] = []

logger = get_logger(__name__)


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

    base = base_of(checkpoints, base)
    device = resolve_device(device)
    loader = Loader.of(base, device=device, dtype=dtype)
    tokenizer = load_tokenizer(checkpoints, canaries, base=base, score=score)
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
        judge_only=True,
        # The run is over, and its batches are gone.
        assume_seen=True,
        show_progress=show_progress,
        autocast=autocast_of(dtype, device),
        run_metadata=replace(
            RunMetadata.of_this_process(),
            n_checkpoints=len(checkpoints),
            base_model=str(base),
            device=device,
            precision=dtype,
        ),
    )
    baseline = auditor.begin(loader.load_base(), step=0, epoch=0.0)
    for checkpoint in tqdm(checkpoints, desc="checkpoints", leave=False, disable=not show_progress):
        release_memory()
        n_before = len(auditor.history)
        try:
            result = auditor.audit(loader.load(checkpoint), step=checkpoint.step, epoch=checkpoint.epoch)
        except Exception as error:  # one bad checkpoint leaves a gap, not a lost curve
            if len(checkpoints) == 1 or isinstance(error, MissingDependencyError):
                raise
            logger.warning("%s could not be audited: %s", checkpoint.path, first_line(error))
            if len(auditor.history) == n_before:
                reason = f"{type(error).__name__}: {first_line(error)}"
                auditor.mark_failed(reason, step=checkpoint.step, epoch=checkpoint.epoch)
        else:
            _warn_if_untrained(checkpoint, result, baseline)
    auditor.finish()
    return auditor.history


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
        records=[encoded.rows[i].as_record() for i in kept],
    )


def _warn_if_untrained(checkpoint: Checkpoint, result: AuditResult, baseline: AuditResult) -> None:
    """A clean figure of the wrong weights is the worst that this module could return."""
    losses = (result.member_loss, result.non_member_loss)
    if losses == (baseline.member_loss, baseline.non_member_loss):
        logger.warning(
            "%s predicts exactly what the base predicts: it was not trained, or it is the base itself.",
            checkpoint.path,
        )
