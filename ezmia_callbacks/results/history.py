"""All audits of a run in order, in memory and as a JSON-lines file."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.files import append, write_atomically
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import NEWER_FIELDS, AuditResult, Finding
from ezmia_callbacks.results.tables import data_frame, html_table, plain_table
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.typed_rows import parse_json, read_rest, read_value

if TYPE_CHECKING:
    import pandas as pd

__all__: list[str] = []

logger = get_logger(__name__)

# Of the history file; a file of another schema is refused, not guessed at.
_SCHEMA = 1

NOTHING_KEPT = "NOTHING OF THIS TRAINING WAS KEPT"
"""Said wherever a run has left the weights from before training."""


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
        final_weights: The weights that the model was left with, as `AuditResult.weights` names them; empty if
            nobody looked at the end.
    """

    results: tuple[AuditResult, ...] = ()
    budget: LeakageBudget | None = None
    confidence: float = 0.95
    about: str = ""
    findings: tuple[Finding, ...] = ()
    caveat: str = ""
    run_metadata: RunMetadata = field(default_factory=RunMetadata)
    is_complete: bool | None = None
    final_weights: str = ""

    def __repr__(self) -> str:
        if not self.results:
            return "AuditHistory(no audits)"
        return f"AuditHistory({len(self)} audits, the last: {self.results[-1]!r})"

    def _repr_html_(self) -> str:
        n_audits = len(self.audits_after_baseline)
        return html_table(self.results, caption=f"Privacy audits, {n_audits} after the baseline")

    def table(self) -> str:
        """The audits as text, one line each.

        >>> print(AuditHistory().table())
        epoch  step  AUC  by  members seen  held-out loss  verdict
        """
        return plain_table(self.results)

    def to_dataframe(self) -> "pd.DataFrame":
        """The audits as a pandas data frame, one row each: step, epoch, verdict, and what trackers get.

        Raises:
            MissingDependencyError: if pandas is not installed.
        """
        return data_frame(self.results)

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

    @property
    def final_audit(self) -> AuditResult | None:
        """The audit that found the weights which the model was left with; None if none did, or nobody looked.

        Of several audits of the same weights it is the last with a verdict.
        """
        found = [r for r in self.results if r.weights and r.weights == self.final_weights]
        judged = [result for result in found if result.decision.is_within_budget is not None]
        return next(reversed(judged or found), None)

    def is_within_at(self, step: int, *, weights: str) -> bool:
        """Whether an audit at this step found these very weights within the budget.

        Args:
            step: Optimizer steps done.
            weights: What an audit would call the weights, see `AuditResult.weights`. Older audits did not
                note theirs: these count by the step alone.
        """
        return any(
            result.step == step and result.decision.is_within_budget and result.weights in ("", weights)
            for result in self.results
        )

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
        """This history with its audits replaced by rows that `to_dicts` made.

        Raises:
            ConfigurationError: if they are none, or not in the order of a run.
        """
        return replace(self, results=read_audits(rows))

    def save(self, path: str | Path, *, after: "AuditHistory | None" = None) -> None:
        """Write one JSON object a line: first about the run, then each audit.

        Args:
            path: File to write.
            after: What the file holds, as this process has saved it. If audits are all that has come since,
                they are appended, and a killed process may leave half of a line; else the file is written
                anew, whole or not at all.
        """
        path = Path(path)
        if after is not None and self._goes_on(after) and path.is_file():
            append(path, _lines(result.to_dict() for result in self.results[len(after) :]))
            return
        run = {
            "budget": self.budget and asdict(self.budget),
            "confidence": self.confidence,
            "about": self.about,
            "findings": [asdict(finding) for finding in self.findings],
            "caveat": self.caveat,
            "facts": self.run_metadata.to_dict(),
            "is_complete": self.is_complete,
            "final_weights": self.final_weights,
        }
        write_atomically(path, _lines([{"schema": _SCHEMA, **run}, *self.to_dicts()]))

    def _goes_on(self, before: "AuditHistory") -> bool:
        """Whether this is another history with nothing but audits added."""
        is_same_run = replace(self, results=()) == replace(before, results=())
        return is_same_run and self.results[: len(before)] == before.results

    @classmethod
    def load(cls, path: str | Path) -> "AuditHistory":
        """The history that `save` wrote; half a line at its end, of a killed process, is left out and named.

        Raises:
            ConfigurationError: if the file is missing or is not such a history.
        """
        try:
            first, *lines = _whole_lines(Path(path))
            rest = read_rest(parse_json(first), schema=_SCHEMA)
            run = read_value(_Run, rest, newer={"is_complete", "final_weights"})
            audits = read_audits([parse_json(line) for line in lines])
        # A path that no file can have is a ValueError; so is a file that is no UTF-8.
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise ConfigurationError(f"{path} is not an audit history: {reason}.") from error
        known = {name: value for name, value in vars(run).items() if name != "facts"}
        return cls(audits, run_metadata=RunMetadata.from_dict(run.facts), **known)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file, without what a killed process has left of its last one."""
    # Not `splitlines`: texts may hold U+2028 and its like.
    *lines, last = path.read_bytes().split(b"\n")
    if lines and _is_cut_off(last):
        if last:
            logger.warning(
                "The last line of %s is cut off and left out: its process was killed, or still writes it.",
                path,
            )
    else:
        lines.append(last)
    return [line.decode("utf-8") for line in lines]


def _is_cut_off(line: bytes) -> bool:
    """Whether this is no JSON: no beginning of an object is any."""
    try:
        json.loads(line.decode("utf-8"))
    except ValueError:
        return True
    except RecursionError:
        return False
    return False


def read_audits(rows: object) -> tuple[AuditResult, ...]:
    """The audits of a run, as `AuditHistory.to_dicts` made them.

    Raises:
        ConfigurationError: if they are none, or no run makes them in this order.
    """
    audits = read_value(tuple[AuditResult, ...], rows, newer=NEWER_FIELDS, name="audits")
    for before, after in itertools.pairwise(audits):
        if after.is_baseline:
            raise ConfigurationError(f"the audit after that of step {before.step} is a second baseline")
        # Two at one step are two models: one was averaged, or saved again at the end.
        if after.step < before.step:
            raise ConfigurationError(f"the audit of step {after.step} comes after that of step {before.step}")
    return audits


@dataclass(frozen=True)
class JudgedBy:
    """`AuditHistory.judged_by`, as a checkpoint has it."""

    budget: LeakageBudget | None
    confidence: float


@dataclass(frozen=True)
class _Run:
    """The first line of the file."""

    budget: LeakageBudget | None
    confidence: float
    about: str
    findings: tuple[Finding, ...]
    caveat: str
    facts: Mapping[str, str]
    is_complete: bool | None = None
    final_weights: str = ""
