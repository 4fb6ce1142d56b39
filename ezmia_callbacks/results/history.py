"""All audits of a run in order, in memory and as a JSON-lines file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.files import write_atomically
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import AuditResult, Finding

__all__: list[str] = []

# Of the history file; a file of another schema is refused, not guessed at.
_SCHEMA = 1


@dataclass(frozen=True)
class AuditHistory:
    """The leakage curve of one run: an immutable sequence of audits, the baseline first.

    Attributes:
        results: The audits, in the order in which they were made.
        budget: The budget that the run was held against.
        confidence: Confidence of the intervals, each for its audit alone.
        about: How the canaries were drawn and what that means for the figures, one sentence.
        findings: What was checked before the first step, and found or not.
        caveat: What has to stand beside every headline; empty if nothing has.
        run_metadata: What the figures were made with: versions, fingerprints, the command.
        is_complete: Whether the run has said that it ended; None if that was not recorded. A file that says
            False was written by a run that was still going on, or was interrupted.
    """

    results: tuple[AuditResult, ...] = ()
    budget: LeakageBudget | None = None
    confidence: float = 0.95
    about: str = ""
    findings: tuple[Finding, ...] = ()
    caveat: str = ""
    run_metadata: RunMetadata = field(default_factory=RunMetadata)
    is_complete: bool | None = None

    @property
    def band_confidence(self) -> float:
        """Confidence with which the bands of all audits hold together: the budget's, if there is one."""
        return self.confidence if self.budget is None else self.budget.confidence

    @property
    def judged_by(self) -> dict[str, Any]:
        """What the decisions and bands were made by, as plain Python; for a checkpoint."""
        return {"budget": self.budget and asdict(self.budget), "confidence": self.band_confidence}

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[AuditResult]:
        return iter(self.results)

    def __getitem__(self, index: int) -> AuditResult:
        return self.results[index]

    def with_result(self, result: AuditResult) -> "AuditHistory":
        """A history with one audit more."""
        return replace(self, results=(*self.results, result))

    def up_to_step(self, step: int) -> "AuditHistory":
        """The history as it was at an optimizer step; for a run that resumes there."""
        kept = tuple(result for result in self.results if result.step <= step)
        return replace(self, results=kept)

    @property
    def audits_after_baseline(self) -> tuple[AuditResult, ...]:
        """The audits that spent error rate: all but the baseline."""
        return tuple(result for result in self.results if not result.is_baseline)

    def is_unjudged(self, result: AuditResult) -> bool:
        """Whether one of the audits has figures, and under a budget no verdict: that is not within budget."""
        decision = result.decision
        is_to_be_judged = self.budget is not None or decision.stop
        return result.status == "ok" and is_to_be_judged and decision.is_within_budget is None

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
        """The latest audit within the budget; the baseline counts, for nothing was trained yet."""
        for result in reversed(self.results):
            if result.decision.is_within_budget:
                return result
        return None

    def is_within_at(self, step: int) -> bool:
        """Whether an audit at this step found the model within the budget."""
        return any(result.step == step and result.decision.is_within_budget for result in self.results)

    @property
    def is_past_budget(self) -> bool:
        """Whether the last weights audited are not to be kept: over budget, or not to be judged any more.

        Failed audits change nothing: the last one that did not fail counts.
        """
        for result in reversed(self.results):
            decision = result.decision
            if decision.stop or decision.is_within_budget is not None:
                return not decision.is_within_budget
        return False

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
        return replace(self, results=results)

    def save(self, path: str | Path) -> None:
        """Write one JSON object a line, whole or not at all: first about the run, then each audit."""
        run = {
            "budget": self.budget and asdict(self.budget),
            "confidence": self.confidence,
            "about": self.about,
            "findings": [asdict(finding) for finding in self.findings],
            "caveat": self.caveat,
            "facts": self.run_metadata.to_dict(),
            "is_complete": self.is_complete,
        }
        rows = [{"schema": _SCHEMA, **run}, *self.to_dicts()]
        write_atomically(Path(path), "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    @classmethod
    def load(cls, path: str | Path) -> "AuditHistory":
        """The history that `save` wrote.

        Raises:
            ConfigurationError: if the file is missing or is not such a history.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            run, *audits = (json.loads(line) for line in text.splitlines())
            if run.pop("schema") != _SCHEMA:
                raise ValueError(f"its schema is not {_SCHEMA}, of which this release knows")
            run["budget"] = run["budget"] and LeakageBudget(**run["budget"])
            run["findings"] = tuple(Finding(**finding) for finding in run["findings"])
            run["run_metadata"] = RunMetadata.from_dict(run.pop("facts"))
            return cls(**run).with_results(audits)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{path} is not an audit history: {error}.") from error
