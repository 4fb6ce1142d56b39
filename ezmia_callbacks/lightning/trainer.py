"""What the Lightning callback works out from a trainer and a module: lengths, cadences, the model.

It works on their attributes and imports no framework.
"""

import math
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from ezmia_callbacks.audit.cadence import AuditPlan, Cadence, plan_audits
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.lightning.trainer_access import (
    LightningTrainer,
    batches_between_validations,
    n_batches_done,
    saving_intervals,
)

__all__: list[str] = []


def intervals_in_steps(trainer: LightningTrainer, every: Cadence, *, is_saving_guarded: bool) -> list[int]:
    """Every so many optimizer steps an audit is made in mid-epoch, for each reason there is.

    Args:
        trainer: The trainer, when training begins.
        every: The user's cadence.
        is_saving_guarded: Whether an audit comes before each checkpoint that is saved every so many steps.

    Raises:
        ConfigurationError: for a fraction of an epoch whose length is unknown.
    """
    intervals = [every] if isinstance(every, int) else []
    if isinstance(every, float):
        per_epoch = _steps_per_epoch(trainer)
        if not math.isfinite(per_epoch):
            raise ConfigurationError(
                f"every={every} is a fraction of an epoch, and the length of an epoch is unknown: give a "
                "number of steps."
            )
        intervals.append(max(1, round(every * per_epoch)))
    if is_saving_guarded:
        intervals += saving_intervals(trainer)
    return intervals


def first_epoch_in_steps(trainer: LightningTrainer) -> int | None:
    """Optimizer steps in the first epoch, or in a shorter run; None if neither has a known end."""
    return _if_finite(min(_steps_per_epoch(trainer), _n_steps(trainer)))


def planned_audits(
    trainer: LightningTrainer,
    step_intervals: Sequence[int],
    *,
    early: Collection[int],
    is_at_epoch_end: bool,
    is_at_validation: bool,
) -> AuditPlan:
    """When the run will be audited after the baseline, as far as that is known.

    Args:
        trainer: The trainer, when training begins.
        step_intervals: As `intervals_in_steps` gives them.
        early: Steps of early audits.
        is_at_epoch_end: Whether there is an audit at the end of each epoch.
        is_at_validation: Whether there is an audit at each validation.
    """
    per_epoch, n_steps = _steps_per_epoch(trainer), _n_steps(trainer)
    intervals: list[float] = [*step_intervals]
    if is_at_epoch_end:
        intervals.append(per_epoch)
    between = batches_between_validations(trainer) if is_at_validation else None
    if between is not None:
        intervals.append(max(1, min(per_epoch, between // trainer.accumulate_grad_batches)))
    return plan_audits(
        early,
        [_if_finite(interval) for interval in intervals],
        n_steps=_if_finite(n_steps),
        steps_per_epoch=_if_finite(per_epoch),
    )


def language_model_in(module: nn.Module) -> nn.Module:
    """The one Hugging Face causal language model in a module, with its adapters or compiled, if it is.

    Raises:
        ConfigurationError: if there is none, or more than one.
    """
    found = list({id(model): model for model in _language_models(module)}.values())
    if len(found) != 1:
        names = ", ".join(type(model).__name__ for model in found) or "none"
        raise ConfigurationError(
            f"{type(module).__name__} must hold exactly one Hugging Face causal language model for it to be "
            f"found, got {names}: pass `logits_fn=lambda pl_module, input_ids, attention_mask: ...`, which "
            "returns the logits."
        )
    return found[0]


def _language_models(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost ones: what wraps a model passes its attributes on."""
    head = getattr(module, "get_output_embeddings", None)
    if getattr(module, "config", None) is not None and callable(head) and head() is not None:
        yield module
        return
    for child in module.children():
        yield from _language_models(child)


def _steps_per_epoch(trainer: LightningTrainer) -> float:
    n_batches: float = trainer.num_training_batches
    return math.ceil(n_batches / trainer.accumulate_grad_batches) if math.isfinite(n_batches) else math.inf


def _n_steps(trainer: LightningTrainer) -> float:
    limits = (trainer.max_steps, _steps_per_epoch(trainer) * trainer.max_epochs)
    return min((limit for limit in limits if limit >= 0), default=math.inf)


def _if_finite(number: float) -> int | None:
    return int(number) if math.isfinite(number) else None


def epochs_done(trainer: LightningTrainer) -> float:
    """Epochs done, as a fraction where their length is known."""
    n_batches: float = trainer.num_training_batches
    if not math.isfinite(n_batches):
        return float(trainer.current_epoch)
    return float(n_batches_done(trainer) / n_batches)
