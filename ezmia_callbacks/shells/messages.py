"""What the shells over the frameworks share: checks of their common arguments, and what they say."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from ezmia_callbacks.audit.auditor import PrivacyAuditor
from ezmia_callbacks.audit.cadence import AuditPlan
from ezmia_callbacks.audit.settings import AuditSettings
from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.console import say
from ezmia_callbacks.distributed import is_main_process
from ezmia_callbacks.errors import AuditError, ConfigurationError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.reference.pretrained import load_pretrained
from ezmia_callbacks.reference.sources import ReferenceSource
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


def say_start(auditor: PrivacyAuditor, budget: LeakageBudget | None) -> None:
    """Say what will be measured, and held against what."""
    say(logger, auditor.canaries.describe())
    if budget is not None:
        say(logger, f"leakage budget: {budget.describe()}")


def say_first_audit(plan: AuditPlan, settings: AuditSettings) -> None:
    """Say, before the first step under a budget, when the first audit comes and what it could cost."""
    budget = settings.budget
    if budget is None:
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
        "only the starting weights would be left"
        if settings.keeps_weights
        else "training would stop and stay over budget"
    )
    say(logger, f"First audit {when}; were {over} over budget, {lost}.")


def log_restarted() -> None:
    """Say that the weights are not taken for the reference."""
    logger.warning(
        "Training starts again with weights that this callback has seen before: the reference taken before "
        "the first step is kept."
    )


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
