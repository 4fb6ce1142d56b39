"""The arguments that the auditor and every shell over it take alike."""

from collections.abc import Sequence
from typing import Literal

from ezmia_callbacks.audit.economy import check_max_overhead
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.scoring.attack import Attack
from ezmia_callbacks.scoring.statistics import SCORES

__all__ = ["OnError", "check_arguments"]

OnError = Literal["warn", "raise"]


def check_arguments(
    *,
    budget: LeakageBudget | None,
    score: str | Attack,
    fpr_levels: Sequence[float],
    confidence: float,
    batch_size: int | None,
    max_overhead: float | None,
    on_error: OnError,
) -> None:
    """Raise ConfigurationError for an argument that can never work; every shell calls this when built."""
    if budget is not None and not isinstance(budget, LeakageBudget):
        raise ConfigurationError(
            f"`budget` must be a LeakageBudget or None, got {budget!r}: try LeakageBudget(limit=0.6)."
        )
    if score not in SCORES if isinstance(score, str) else not isinstance(score, Attack):
        raise ConfigurationError(
            f"Unknown score {score!r}: use one of {', '.join(SCORES)}, or an object with `name`, "
            "`is_trained_on_membership`, `begin` and `score` (see `ezmia_callbacks.scoring.attack.Attack`)."
        )
    if not all(0.0 < fpr < 1.0 for fpr in fpr_levels):
        raise ConfigurationError(f"`fpr_levels` must lie in (0, 1), got {tuple(fpr_levels)!r}.")
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"`confidence` must lie in (0, 1), got {confidence!r}.")
    if batch_size is not None and batch_size < 1:
        raise ConfigurationError(f"`batch_size` must be at least 1, got {batch_size!r}.")
    check_max_overhead(max_overhead)
    if max_overhead is not None and not isinstance(score, str):
        raise ConfigurationError(
            "`max_overhead` scores a part of the canaries, and an attack of your own has seen them all at "
            "its start: use a built-in score, or fewer canaries."
        )
    if on_error not in ("warn", "raise"):
        raise ConfigurationError(f"`on_error` must be 'warn' or 'raise', got {on_error!r}.")
