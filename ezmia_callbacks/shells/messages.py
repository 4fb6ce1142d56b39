"""What the shells over the frameworks share: checks of their common arguments, and what they say."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from ezmia_callbacks.audit.auditor import PrivacyAuditor
from ezmia_callbacks.audit.cadence import AuditPlan
from ezmia_callbacks.audit.settings import AuditSettings
from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.distributed import is_main_process
from ezmia_callbacks.errors import AuditError, ConfigurationError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.reference.pretrained import load_pretrained
from ezmia_callbacks.reference.sources import ReferenceSource
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.scoring.memory import is_out_of_memory

__all__: list[str] = []

logger = get_logger(__name__)

HOLD_OUT = "hold_out"
"""What the user passes as `canaries` to have them drawn out of the trainer's training set."""


def check_canaries(canaries: object, *, may_hold_out: bool = False) -> None:
    """Refuse what is neither canaries nor None.

    Args:
        canaries: What the user passed.
        may_hold_out: Whether the shell can draw canaries out of the training set itself.

    Raises:
        ConfigurationError: naming where canaries come from.
    """
    if canaries is None or isinstance(canaries, CanarySet):
        return
    if isinstance(canaries, str) and canaries == HOLD_OUT:
        if may_hold_out:
            return
        raise ConfigurationError(
            f"`canaries={HOLD_OUT!r}` is for the Hugging Face callback: Lightning's training data come from "
            "loaders that are made elsewhere. Draw where the training set is made, "
            "`train_dataset, canaries = hold_out_canaries(train_dataset)`, make the loader of what it "
            "returns, and pass `canaries`."
        )
    or_held_out = f", or {HOLD_OUT!r}" if may_hold_out else ""
    raise ConfigurationError(
        f"`canaries` must be a CanarySet{or_held_out}, got {type(canaries).__name__}: use "
        "`hold_out_canaries` or `CanarySet.from_lists(members, non_members)`."
    )


def reference_source(reference: ReferenceSource | str | Path, *, model: nn.Module) -> ReferenceSource:
    """The reference as the auditor takes it: a checkpoint is loaded only when it is needed.

    Args:
        reference: A source, or the path or hub id of a checkpoint.
        model: The model that is trained: the checkpoint goes to its device, in its precision.
    """
    if callable(reference) or reference in ("auto", "adapter", "copy"):
        return reference  # type: ignore[return-value]  # one of the three by the check
    return _loader(str(reference), like=next(model.parameters()))


def _loader(name: str, *, like: nn.Parameter) -> Callable[[], nn.Module]:
    def load() -> nn.Module:
        try:
            loaded = load_pretrained(name)
        except AuditError:
            raise
        except Exception as error:  # hub, configuration, weights: each fails in a way of its own
            if is_out_of_memory(error):
                raise
            raise ConfigurationError(
                f"reference={name!r} is neither 'auto', 'adapter', 'copy' nor a checkpoint that can be "
                f"loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            ) from error
        dtype = like.dtype if like.is_floating_point() else None
        # Not the method of the loaded model, which refuses quantized weights.
        moved: nn.Module = nn.Module.to(loaded, device=like.device, dtype=dtype)
        return moved

    return load


def log_start(auditor: PrivacyAuditor, budget: LeakageBudget | None) -> None:
    """Say what will be measured, and held against what."""
    if is_main_process():
        logger.info("%s", auditor.canaries.describe())
        if budget is not None:
            logger.info("leakage budget: %s", budget.describe())


def log_first_audit(plan: AuditPlan, settings: AuditSettings) -> None:
    """Say, before the first step under a budget, when the first audit comes and what it could cost."""
    budget = settings.budget
    if budget is None or not is_main_process():
        return
    if not plan.steps:
        when = "at the end of the first epoch"
    elif not plan.is_complete:
        when = f"at step {plan.steps[0]} at the latest"
    else:
        when = f"at step {plan.steps[0]}"
        if plan.steps_per_epoch is not None:
            when += f" (epoch {plan.steps[0] / plan.steps_per_epoch:.3g})"
    over = f"it and the next {budget.patience}" if budget.patience else "it"
    lost = (
        "the starting weights would be all that is left"
        if settings.keeps_weights
        else "training would stop with the weights over budget"
    )
    logger.info("First audit %s; were %s over budget, %s.", when, over, lost)


def log_restarted() -> None:
    """Say that the weights are not taken for the reference."""
    logger.warning(
        "Training starts again with weights that this callback has seen before: the reference taken before "
        "the first step is kept."
    )


def log_restored(
    kept: AuditResult, history: AuditHistory, *, step: int, rejected: Path | None = None
) -> None:
    """Say at which step the run ended and why, what the model holds now, and what became of the rest.

    Args:
        kept: The audit of the weights that were restored.
        history: All audits.
        step: Optimizer steps done.
        rejected: Folder to which the weights over the budget were written; None if they are gone.
    """
    if not is_main_process():
        return
    if kept.is_baseline:
        restored = "the starting weights, the last ones within it"
        advice = (
            f"To keep part of the training, {_earlier_audits(history)}give the model less room to "
            "memorize: LoRA, a smaller learning rate."
        )
    else:
        last = history.last_within_budget
        is_last = last is not None and last.step == kept.step
        which = "the last audit within it" if is_last else "the last audit within it that could be kept"
        restored, advice = f"the weights of step {kept.step}, {which}", ""
    checked = "checked: every weight is, and the canaries that were scored again say the same"
    text = f"{_how_it_ended(history, step)}. Restored {restored} ({checked}). {advice}".rstrip()
    logger.warning("%s %s", text, _what_is_lost(kept, step=step, rejected=rejected))


def _what_is_lost(kept: AuditResult, *, step: int, rejected: Path | None) -> str:
    if rejected is not None:
        return f"The weights over the budget are in {rejected}."
    return (
        f"What was trained after step {kept.step}, until step {step}, is gone (`keep_rejected=True` would "
        "keep it aside)."
    )


def _earlier_audits(history: AuditHistory) -> str:
    """How to audit before the audit that was the first; empty if there is no step before it."""
    first = history.audits_after_baseline[0]
    if first.epoch is None or first.epoch > 0.25:
        return "audit more often (`every=0.25`), or "
    if first.step > 1:
        return f"audit more often (`every={first.step // 2}`, in steps), or "
    return ""


def log_other_weights(result: AuditResult) -> None:
    """Say that training left other weights than those of the last audit, whose figures are these."""
    if is_main_process():
        logger.warning(
            "The model that training left does not hold the weights of any audit: something else wrote into "
            "it, an average of the weights perhaps. It was audited as it is: the line above is about it."
        )


def log_other_checkpoint(folder: Path, differing: Sequence[str]) -> None:
    """Say that a checkpoint holds other weights than those that were audited."""
    if is_main_process():
        logger.error(
            "%s holds other weights than those that were audited, and may be OVER BUDGET: %d tensors differ "
            "(first: %s). Whatever saves the model writes something else, such as an average.",
            folder,
            len(differing),
            differing[0],
        )


def log_earlier_weights(result: AuditResult) -> None:
    """Say that training left the weights of an earlier audit, such as those of the best checkpoint."""
    if is_main_process():
        logger.info(
            "The model that training left holds the weights of step %d: its figures are those of that audit, "
            "not the last ones.",
            result.step,
        )


def log_not_restored(error: AuditError, history: AuditHistory, *, step: int) -> None:
    """Say that the model is over budget, or may be, and stays so."""
    logger.error(
        "%s, and earlier weights could not be restored: %s The model %s OVER BUDGET.",
        _how_it_ended(history, step),
        error,
        "may be" if _is_stopped_unjudged(history) else "is",
    )


def _how_it_ended(history: AuditHistory, step: int) -> str:
    # With patience, training can end over budget before anything stops it.
    ended = "Training ended" if history.stopped is None else "Stopped"
    if _is_stopped_unjudged(history):
        return f"{ended} at step {step}: leakage could no longer be judged against the budget"
    return f"{ended} at step {step}: leakage exceeded the budget"


def _is_stopped_unjudged(history: AuditHistory) -> bool:
    return history.stopped is not None and history.is_unjudged(history.stopped)


def log_unjudged(history: AuditHistory) -> None:
    """Say, at the end of a run with a budget, that nobody knows whether the model is within it."""
    judged = [result for result in history if result.status == "ok" and not result.is_baseline]
    if not judged or not is_main_process():
        return
    last = judged[-1]
    if history.is_unjudged(last) and not last.decision.stop:
        logger.error(
            "Training ended without a verdict, so that the model may be OVER BUDGET: %s.",
            last.decision.message,
        )


def warn_of_failed_audits(history: AuditHistory) -> None:
    """Say how many audits failed."""
    if history.n_failed and is_main_process():
        logger.warning(
            "%d of %d privacy audits failed: at those points leakage is unknown, not absent.",
            history.n_failed,
            len(history.audits_after_baseline),
        )
