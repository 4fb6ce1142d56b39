"""All audits of a run in order, in memory and as a JSON-lines file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.files import write_atomically
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.results import AuditResult

__all__ = ["AuditHistory"]


@dataclass(frozen=True)
class AuditHistory:
    """The leakage curve of one run: an immutable sequence of audits, the baseline first.

    Attributes:
        results: The audits, in the order in which they were made.
        budget: The budget that the run was held against.
        confidence: Confidence of the intervals, each for its audit alone.
        about: How the canaries were drawn and what that means for the figures, one sentence.
    """

    results: tuple[AuditResult, ...] = ()
    budget: LeakageBudget | None = None
    confidence: float = 0.95
    about: str = ""

    @property
    def band_confidence(self) -> float:
        """Confidence with which the bands of all audits hold together: the budget's, if there is one."""
        return self.confidence if self.budget is None else self.budget.confidence

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[AuditResult]:
        return iter(self.results)

    def __getitem__(self, index: int) -> AuditResult:
        return self.results[index]

    def with_result(self, result: AuditResult) -> "AuditHistory":
        """A history with one audit more."""
        return AuditHistory((*self.results, result), self.budget, self.confidence, self.about)

    def up_to_step(self, step: int) -> "AuditHistory":
        """The history as it was at an optimizer step; for a run that resumes there."""
        kept = tuple(result for result in self.results if result.step <= step)
        return AuditHistory(kept, self.budget, self.confidence, self.about)

    @property
    def looks(self) -> tuple[AuditResult, ...]:
        """The audits that spent error rate: all but the baseline."""
        return tuple(result for result in self.results if not result.is_baseline)

    @property
    def n_failed(self) -> int:
        """Audits that failed: gaps in the curve, at which leakage is unknown."""
        return sum(result.status == "failed" for result in self.results)

    @property
    def stopped(self) -> AuditResult | None:
        """The audit that stopped the run, if one did."""
        for result in self.results:
            if result.decision.stop:
                return result
        return None

    @property
    def last_within_budget(self) -> AuditResult | None:
        """The latest audit inside the budget; the baseline counts, for nothing was trained yet."""
        for result in reversed(self.results):
            if result.decision.is_within_budget:
                return result
        return None

    @property
    def n_over_in_a_row(self) -> int:
        """Consecutive audits over budget at the end; failed audits neither count nor interrupt."""
        for result in reversed(self.results):
            if result.decision.is_within_budget is not None:
                return result.decision.n_over_in_a_row
        return 0

    def to_dicts(self) -> list[dict[str, Any]]:
        """The audits as plain dicts, ready for JSON."""
        return [result.to_dict() for result in self.results]

    def with_results(self, rows: Sequence[Mapping[str, Any]]) -> "AuditHistory":
        """This history with its audits replaced by rows that `to_dicts` made."""
        results = tuple(AuditResult.from_dict(row) for row in rows)
        return AuditHistory(results, self.budget, self.confidence, self.about)

    def save(self, path: str | Path) -> None:
        """Write one JSON object a line, whole or not at all."""
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in self.to_dicts())
        write_atomically(Path(path), "".join(lines))

    @classmethod
    def load(cls, path: str | Path) -> "AuditHistory":
        """The history that `save` wrote, without budget and confidence.

        Raises:
            ConfigurationError: if the file is missing or is not such a history.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            return cls().with_results([json.loads(line) for line in text.splitlines()])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{path} is not an audit history: {error}.") from error
