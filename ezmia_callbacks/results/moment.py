"""When in a run an audit is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ezmia_callbacks.errors import ConfigurationError

__all__: list[str] = []


@dataclass(frozen=True)
class Moment:
    """The point of a run at which an audit is made.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs done, as a fraction; None if unknown.
        is_baseline: Whether it is the one before the first step.

    Raises:
        ConfigurationError: if the epoch is not a number.
    """

    step: int
    epoch: float | None
    is_baseline: bool = False

    def __post_init__(self) -> None:
        """Refuse what JSON cannot hold and no axis can show."""
        if self.epoch is not None and not math.isfinite(self.epoch):
            raise ConfigurationError(f"`epoch` must be a finite number or None, got {self.epoch!r}.")
