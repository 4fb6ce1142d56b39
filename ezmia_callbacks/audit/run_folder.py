"""The files of a run: its history, its reference, its trajectories, its kept weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ezmia_callbacks.audit.run_state import LastAudit, RunState, SavedRun, step_of_last_audit
from ezmia_callbacks.errors import AuditError, ReferenceMismatchError
from ezmia_callbacks.files import check_writable, private_folder, remove_leftovers
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

    def save_audits(self, state: RunState, *, after: RunState | None = None) -> None:
        """Write the audits, the records' scores and the last audit's statistics.

        Args:
            state: The run.
            after: The run as this process saved it here last: of what is the same since, little is written
                again. None writes every file anew.

        Raises:
            OSError: if they cannot be written.
        """
        # It may have been removed since the run began.
        private_folder(self.path)
        state.history.save(self.path / _HISTORY, after=None if after is None else after.history)
        state.blocks.save(self.path / _TRAJECTORIES, after=None if after is None else after.blocks)
        if (last := state.last_audit) is not None:
            fingerprint = _of_step(state.fingerprint, last.step, run_id=state.run_id)
            save_statistics(self.path / _LAST_AUDIT, last.statistics, fingerprint=fingerprint)

    def history(self) -> AuditHistory | None:
        """The history that was written here; None if it cannot be read."""
        try:
            return AuditHistory.load(self.path / _HISTORY)
        except AuditError:
            return None

    def refuse_another_run(self, state: RunState) -> None:
        """See that a run which goes on here is the one that wrote here last.

        Args:
            state: The run that goes on.

        Raises:
            ReferenceMismatchError: if another run did: its reference and its kept weights are here.
        """
        found = self.history()
        if found is None or not len(found):
            return
        self._check_run(found, state.run_id)
        # Runs of the first version have no name, and are known by their start.
        starts = [_start(each[0]) for each in (found, state.history) if len(each) and each[0].is_baseline]
        if len(starts) == 2 and starts[0] != starts[1]:
            raise self._of_another_run("that began otherwise")

    def load(self, results: Sequence[AuditResult], state: RunState, *, run_id: str | None) -> SavedRun:
        """What an interrupted run left here, with its audits from elsewhere.

        Without a history or trajectories that can be read the run goes on all the same, with a warning.

        Args:
            results: Its audits, as the checkpoint that it resumes from has them.
            state: The run that goes on, before any audit: says which canaries and reference must match.
            run_id: Name of the run, as the checkpoint has it; None if it has none: then the files here must
                belong together.

        Raises:
            ReferenceMismatchError: if the reference is missing, damaged, or made for other canaries, or the
                files are another run's.
        """
        reference = load_statistics(self.path / _REFERENCE, fingerprint=state.fingerprint)
        saved = SavedRun(tuple(results), reference, run_id=run_id or "")
        try:
            found = AuditHistory.load(self.path / _HISTORY)
        except AuditError as error:
            logger.warning("What an earlier part of the run found is lost: %s", error)
        else:
            if run_id is not None:
                self._check_run(found, run_id)
            saved = replace(
                saved,
                findings=found.findings,
                caveat=found.caveat,
                run_id=found.run_metadata.run_id or "",
                trajectories=self._trajectories(state, run_id=found.run_metadata.run_id or ""),
            )
        step = step_of_last_audit(results)
        if step is None:
            return saved
        try:
            fingerprint = _of_step(state.fingerprint, step, run_id=saved.run_id)
            statistics = load_statistics(self.path / _LAST_AUDIT, fingerprint=fingerprint)
        except ReferenceMismatchError:
            # Missing, damaged or of another step: the figure that needs it does without.
            return saved
        return replace(saved, last_audit=LastAudit(step, statistics))

    def _trajectories(self, state: RunState, *, run_id: str) -> Trajectories | None:
        """The trajectories of a run; None, with a warning, if they cannot be read or are another run's."""
        fingerprint = state.subset.all_encoded.fingerprint
        try:
            return Trajectories.load(self.path / _TRAJECTORIES, fingerprint=fingerprint, run_id=run_id)
        except AuditError as error:
            logger.warning("What an earlier part of the run found is lost: %s", error)
            return None

    def _check_run(self, found: AuditHistory, run_id: str) -> None:
        own = found.run_metadata.run_id or ""
        if own != run_id:
            raise self._of_another_run(f"({own or 'of an older release'}, not {run_id or 'an unnamed one'})")

    def _of_another_run(self, which: str) -> ReferenceMismatchError:
        return ReferenceMismatchError(
            f"The files in {self.path} are those of another run {which}: pass the `output_dir` of the run "
            "that is resumed, and give every run its own."
        )


def _of_step(fingerprint: str, step: int, *, run_id: str) -> str:
    """A fingerprint of statistics that belong to one run and one step as well."""
    return f"{fingerprint}-run-{run_id}-step-{step}"


def _start(baseline: AuditResult) -> tuple[Any, ...]:
    """What a baseline says of the weights and the reference that it was made with."""
    figures = {name: measured.value for name, measured in baseline.metrics.items()}
    return baseline.score, figures, baseline.member_loss, baseline.non_member_loss
