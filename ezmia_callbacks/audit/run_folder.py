"""The files of a run: its history, its reference, its trajectories, its kept weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ezmia_callbacks.audit.run_state import LastAudit, RunState, SavedRun, step_of_last_audit
from ezmia_callbacks.errors import AuditError, ReferenceMismatchError
from ezmia_callbacks.files import check_writable, remove_leftovers
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.results.trajectories import Trajectories
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.scoring.statistics import load_statistics, save_statistics

__all__: list[str] = []

logger = get_logger(__name__)

_HISTORY = "history.jsonl"
_REFERENCE = "reference.safetensors"
_TRAJECTORIES = "trajectories.safetensors"
_LAST_AUDIT = "last_audit.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """Where a run is written down; the main process's alone, but for the kept weights.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def kept_weights(self) -> Path:
        """Folder of the weights of the last audit within the budget."""
        return self.path / "last_within_budget"

    @property
    def rejected_weights(self) -> Path:
        """Folder of weights and checkpoints that were over the budget."""
        return self.path / "over_budget"

    def check_writable(self) -> None:
        """Raise OSError, saying what to do, unless files can be written; what killed runs left is removed."""
        check_writable(self.path)
        for folder in (self.path, self.kept_weights):
            remove_leftovers(folder)

    def save_reference(self, state: RunState) -> None:
        """Write the reference's statistics, if there are any yet.

        Raises:
            OSError: if they cannot be written.
        """
        if state.reference is not None:
            save_statistics(self.path / _REFERENCE, state.reference, fingerprint=state.fingerprint)

    def save_audits(self, state: RunState) -> None:
        """Write the audits, the records' scores and the last audit's statistics, each file whole or not.

        Raises:
            OSError: if they cannot be written.
        """
        state.history.save(self.path / _HISTORY)
        state.trajectories.save(self.path / _TRAJECTORIES)
        if (last := state.last_audit) is not None:
            fingerprint = _of_step(state.fingerprint, last.step)
            save_statistics(self.path / _LAST_AUDIT, last.statistics, fingerprint=fingerprint)

    def rows(self) -> list[dict[str, Any]]:
        """The audits in the history file, as plain dicts; none if it cannot be read."""
        try:
            return AuditHistory.load(self.path / _HISTORY).to_dicts()
        except AuditError:
            return []

    def refuse_another_run(self, results: Sequence[AuditResult]) -> None:
        """See that a run which goes on here is the one that wrote here last: both began with one baseline.

        Args:
            results: The audits of the run that goes on.

        Raises:
            ReferenceMismatchError: if another run did: its reference and its kept weights are here.
        """
        found = [AuditResult.from_dict(row) for row in self.rows()[:1]]
        starts = [_start(result) for result in (*found, *results[:1]) if result.is_baseline]
        if len(starts) == 2 and starts[0] != starts[1]:
            raise ReferenceMismatchError(
                f"The reference in {self.path} is that of another run: pass the `output_dir` of the run that "
                "is resumed, and give every run its own."
            )

    def load(self, results: Sequence[AuditResult], state: RunState) -> SavedRun:
        """What an interrupted run left here, with its audits from elsewhere.

        Without a history or trajectories that can be read the run goes on all the same, with a warning.

        Args:
            results: Its audits, as the checkpoint that it resumes from has them.
            state: The run that goes on, before any audit: says which canaries and reference must match.

        Raises:
            ReferenceMismatchError: if the reference is missing, damaged, or made for other canaries.
        """
        saved = SavedRun(
            tuple(results), load_statistics(self.path / _REFERENCE, fingerprint=state.fingerprint)
        )
        try:
            found = AuditHistory.load(self.path / _HISTORY)
            saved = replace(saved, findings=found.findings, caveat=found.caveat)
            fingerprint = state.trajectories.fingerprint
            trajectories = Trajectories.load(self.path / _TRAJECTORIES, fingerprint=fingerprint)
            saved = replace(saved, trajectories=trajectories)
        except AuditError as error:
            logger.warning("What an earlier part of the run found is lost: %s", error)
        step = step_of_last_audit(results)
        if step is None:
            return saved
        try:
            fingerprint = _of_step(state.fingerprint, step)
            statistics = load_statistics(self.path / _LAST_AUDIT, fingerprint=fingerprint)
        except ReferenceMismatchError:
            # Missing, damaged or of another step: the figure that needs it does without.
            return saved
        return replace(saved, last_audit=LastAudit(step, statistics))


def _of_step(fingerprint: str, step: int) -> str:
    """A fingerprint of statistics that belong to one step as well."""
    return f"{fingerprint}-step-{step}"


def _start(baseline: AuditResult) -> tuple[Any, ...]:
    """What a baseline says of the weights and the reference that it was made with."""
    figures = {name: measured.value for name, measured in baseline.metrics.items()}
    return baseline.score, figures, baseline.member_loss, baseline.non_member_loss
