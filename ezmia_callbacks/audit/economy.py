"""What audits cost in time, and what share of the canaries they can afford."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__: list[str] = []


@dataclass
class Stopwatch:
    """Wall-clock time of audits, and of the training between them, in this process.

    Attributes:
        audit_seconds: Time in audits that have ended, the baseline among them.
        training_seconds: Time between audits.
        last_interval: Time since the audit before, seconds; 0 at the first.
        scoring_seconds: Time in which the model scored the canaries last; 0 before.
        keeping_seconds: Time in which what is kept of an audit was written last; 0 before.
    """

    audit_seconds: float = 0.0
    training_seconds: float = 0.0
    last_interval: float = 0.0
    scoring_seconds: float = 0.0
    keeping_seconds: float = 0.0
    _started: float = 0.0
    _ended: float | None = None

    @contextmanager
    def audit(self) -> Iterator[None]:
        """Count what happens inside as an audit."""
        self._started = time.perf_counter()
        self.last_interval = 0.0 if self._ended is None else self._started - self._ended
        self.training_seconds += self.last_interval
        try:
            yield
        finally:
            self._ended = time.perf_counter()
            self.audit_seconds += self._ended - self._started

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Time what happens inside as the scoring of the canaries."""
        started = time.perf_counter()
        yield
        self.scoring_seconds = time.perf_counter() - started

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Time what happens inside as writing what is kept of an audit."""
        started = time.perf_counter()
        yield
        self.keeping_seconds = time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Time since the present audit began."""
        return time.perf_counter() - self._started

    @property
    def overhead(self) -> float | None:
        """Time of audits, the present one as far as it has come, over that of training; None before any."""
        if not self.training_seconds:
            return None
        return (self.audit_seconds + self.seconds) / self.training_seconds


def affordable_share(
    max_overhead: float,
    *,
    training_seconds: float,
    scoring_seconds: float,
    other_seconds: float,
    spent_seconds: float,
    n_audits: int | None,
) -> float:
    """Share of the canaries that keeps all audits of a run under a share of its training time.

    Args:
        max_overhead: Share of the training time, in (0, 1).
        training_seconds: Time of training between two audits.
        scoring_seconds: Time in which the model scores all canaries.
        other_seconds: Time of an audit that does not depend on their number.
        spent_seconds: Time that was spent before the first step.
        n_audits: Audits that will be made; None if unknown: then what was spent is not won back.

    Returns:
        A share, at most 1; 0 or less where even an audit of nothing takes too long.

    >>> affordable_share(
    ...     0.05,
    ...     training_seconds=100.0,
    ...     scoring_seconds=8.0,
    ...     other_seconds=0.5,
    ...     spent_seconds=5.0,
    ...     n_audits=10,
    ... )
    0.5
    """
    allowed = max_overhead * training_seconds
    if n_audits is not None:
        allowed -= spent_seconds / n_audits
    return min(1.0, (allowed - other_seconds) / max(scoring_seconds, 1e-9))
