"""Where a run stands: all that an interrupted run needs to go on, and the ways from one state to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.audit.judge import Judge
from ezmia_callbacks.audit.run_id import check_run_id
from ezmia_callbacks.errors import ConfigurationError, ReferenceMismatchError
from ezmia_callbacks.measuring.subset import CanarySubset
from ezmia_callbacks.results.consistency import judged_anew
from ezmia_callbacks.results.exposures import Exposures
from ezmia_callbacks.results.history import AuditHistory, JudgedBy, read_audits
from ezmia_callbacks.results.result import AuditResult, Finding
from ezmia_callbacks.results.trajectories import Trajectories
from ezmia_callbacks.results.trajectory_blocks import TrajectoryBlocks
from ezmia_callbacks.scoring.statistics import TokenStatistics, arrays_of, check_numbers, statistics_of
from ezmia_callbacks.typed_rows import read_value

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

__all__: list[str] = []


@dataclass(frozen=True, eq=False)
class LastAudit:
    """What the next audit compares the model with, for whoever holds every checkpoint.

    Attributes:
        step: Optimizer steps done at the last audit that did not fail.
        statistics: Statistics of the model there, for the records that it scored, as it scored them.
    """

    step: int
    statistics: TokenStatistics


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What an interrupted run left behind, in its folder and its checkpoint or in a state dict.

    Attributes:
        results: Its audits.
        reference: Statistics of its reference, of all canaries.
        findings: What it checked before the first step.
        caveat: What has to stand beside its headlines.
        trajectories: Scores of its records; None if they are lost.
        exposures: What it was fed of each canary; None if that is lost.
        judged_by: `AuditHistory.judged_by` of it; None if that is not known.
        last_audit: The model at the last of its audits; None if that is lost.
        run_id: Name of the run; empty for one of the first version.
    """

    results: tuple[AuditResult, ...]
    reference: TokenStatistics
    findings: tuple[Finding, ...] = ()
    caveat: str = ""
    trajectories: Trajectories | None = None
    exposures: Exposures | None = None
    judged_by: Mapping[str, Any] | None = None
    last_audit: LastAudit | None = None
    run_id: str = ""


@dataclass(frozen=True, eq=False)
class RunState:
    """One run up to now. Nothing in it changes: each audit, resume and restart makes the next state.

    Attributes:
        fingerprint: Of the canaries and the source of the reference: sources are never mixed in a run.
        subset: The canaries that audits score.
        history: The audits so far.
        blocks: Scores of the subset's records at these audits.
        exposures: What all processes together were fed of each canary, as far as it is known.
        reference: Statistics of the reference, of all canaries; None until the baseline was measured.
        last_audit: The model at the last audit that did not fail; None if there is none, or it is lost.
        chooses_subset: Whether the first audit after the baseline chooses a subset.
        is_subset_chosen: Whether it has done so.
        is_resumed: Whether it was taken over from an interrupted run and has not met its model yet.
    """

    fingerprint: str
    subset: CanarySubset
    history: AuditHistory
    blocks: TrajectoryBlocks
    exposures: Exposures
    reference: TokenStatistics | None = None
    last_audit: LastAudit | None = None
    chooses_subset: bool = False
    is_subset_chosen: bool = False
    is_resumed: bool = False

    @classmethod
    def before_training(
        cls,
        subset: CanarySubset,
        history: AuditHistory,
        *,
        fingerprint: str,
        score_names: Sequence[str],
        chooses_subset: bool,
    ) -> RunState:
        """A run of which nothing is known but its canaries.

        Args:
            subset: All canaries.
            history: A history without audits.
            fingerprint: Of the canaries and the source of the reference.
            score_names: Names of the scores that are judged together.
            chooses_subset: Whether its first audit after the baseline chooses a subset.
        """
        return cls(
            fingerprint=fingerprint,
            subset=subset,
            history=history,
            blocks=TrajectoryBlocks.of(_no_trajectories(subset, score_names=score_names)),
            exposures=Exposures.none(len(subset.all_encoded.rows)),
            chooses_subset=chooses_subset,
        )

    def anew(self) -> RunState:
        """A run of the same canaries and settings that starts here; one before may have chosen a subset."""
        return RunState.before_training(
            replace(self.subset, share=1.0, cut_to=None),
            replace(self.history, results=(), findings=(), caveat="", is_complete=False),
            fingerprint=self.fingerprint,
            score_names=self.blocks.score_names,
            chooses_subset=self.chooses_subset,
        ).named("")

    @property
    def run_id(self) -> str:
        """Name of the run; empty before its reference is known, and for runs of the first version."""
        return self.history.run_metadata.run_id or ""

    def named(self, run_id: str) -> RunState:
        """The run has this name."""
        blocks = TrajectoryBlocks.of(replace(self.trajectories, run_id=run_id))
        return replace(self, blocks=blocks).with_metadata(run_id=run_id or None)

    @property
    def trajectories(self) -> Trajectories:
        """Scores of the subset's records at all audits."""
        return self.blocks.whole

    @cached_property
    def reference_of_subset(self) -> TokenStatistics | None:
        """Statistics of the reference for the records that audits score."""
        reference, subset = self.reference, self.subset
        if reference is not None and subset.share != 1.0:
            reference = reference.select(subset.is_chosen)
        if reference is not None and subset.cut_to is not None:
            sides = zip(*(row.sides for row in subset.encoded.rows), strict=True)
            n_scored = [np.array([row.n_scored for row in side], dtype=np.int64) for side in sides]
            reference = reference.cut(*n_scored)
        return reference

    @property
    def previous_of_subset(self) -> TokenStatistics | None:
        """Statistics of the model at the last audit, for the records and tokens that audits score now.

        Those of the reference where the last audit's are lost, or are of fewer records or tokens: then the
        next step is compared with the start, which tells less and is as valid.
        """
        reference = self.reference_of_subset
        if self.last_audit is None or reference is None:
            return reference
        previous = self.last_audit.statistics
        if previous.n_records == len(self.subset.all_encoded.rows) and self.subset.share != 1.0:
            previous = previous.select(self.subset.is_chosen)
        return _cut_like(previous, reference) or reference

    def with_result(self, result: AuditResult, target: TokenStatistics | None = None) -> RunState:
        """One audit later, so that the run has not ended yet.

        Args:
            result: The audit.
            target: Statistics of the model at it; without them the next one is compared with the start.
        """
        last_audit = self.last_audit
        if result.status == "ok":
            last_audit = None if target is None else LastAudit(result.step, target)
        return replace(
            self,
            last_audit=last_audit,
            history=replace(self.history.with_result(result), is_complete=False, final_weights=""),
            blocks=self.blocks.with_result(result),
        )

    def with_final_weights(self, digest: str) -> RunState:
        """The model holds these weights, seen after training or after others were put back."""
        return replace(self, history=replace(self.history, final_weights=digest))

    def with_subset(self, subset: CanarySubset) -> RunState:
        """Audits score this subset from here on, as if there had never been more."""
        blocks = self.blocks
        if subset.share != self.subset.share:
            blocks = blocks.of_records(subset.is_chosen)
        return replace(self, subset=subset, blocks=blocks, is_subset_chosen=True)

    def with_exposures(self, exposures: Exposures) -> RunState:
        """So much is known by now of what training was fed; canaries that it cuts are cut, too."""
        cut_to = exposures.cut_to or None
        subset = self.subset if cut_to == self.subset.cut_to else replace(self.subset, cut_to=cut_to)
        return replace(self, exposures=exposures, subset=subset)

    def with_checks(self, findings: Sequence[Finding], *, caveat: str) -> RunState:
        """The checks before the first step have found this."""
        return replace(self, history=replace(self.history, findings=tuple(findings), caveat=caveat))

    def with_metadata(self, **fields: Any) -> RunState:
        """Fields of the run's metadata are known now."""
        metadata = replace(self.history.run_metadata, **fields)
        return replace(self, history=replace(self.history, run_metadata=metadata))

    def resumed(self, saved: SavedRun, judge: Judge) -> RunState:
        """An interrupted run goes on: its audits, its reference and its subset, with this run's settings.

        Args:
            saved: What it left behind.
            judge: Judges the audits anew where they were judged by another budget.

        Raises:
            ConfigurationError: if they were judged by another score, or what was left does not belong to
                these canaries.
        """
        self._check(saved)
        score = self.history.run_metadata.score
        others = sorted({result.score for result in saved.results} - {score})
        if others:
            raise ConfigurationError(
                f"The interrupted run was judged by the score {others[0]!r}, and this one would be by "
                f"{score!r}, which makes no curve: resume with the score {others[0]!r}, or "
                "start again from the original weights."
            )
        share = _chosen_share(saved.results)
        everything = self.subset.of_share(1.0 if share is None else share)
        results = judge.rejudged(saved.results, everything, judged_by=saved.judged_by)
        # A verdict that the figures do not lead to would put weights over the budget back.
        results = judged_anew(replace(self.history, results=results)).results
        return self._going_on(replace(saved, results=results))

    def _check(self, saved: SavedRun) -> None:
        """See that what comes from a checkpoint is of as many canaries as there are."""
        n_canaries = len(self.subset.all_encoded.rows)
        counts = {"reference": saved.reference.n_records}
        if saved.exposures is not None:
            counts["exposures"] = len(saved.exposures.n_times)
        for name, count in counts.items():
            if count != n_canaries:
                raise ConfigurationError(
                    f"The {name} of the interrupted run cover {count} canaries, and there are {n_canaries}: "
                    "what was saved is damaged, or another run's."
                )
        if not all(0 < result.share <= 1 for result in saved.results):
            raise ConfigurationError(
                "An audit of the interrupted run has a share outside (0, 1]: it is damaged."
            )
        has_rejected = saved.reference.rejected is not None
        if has_rejected != any(row.rejected is not None for row in self.subset.all_encoded.rows):
            raise ConfigurationError(
                f"The reference of the interrupted run has {'' if has_rejected else 'no '}rejected sides, "
                f"and these canaries have {'none' if has_rejected else 'some'}: what was saved is damaged, "
                "or another run's."
            )
        check_numbers(saved.reference)
        check_run_id(saved.run_id, self.subset, saved.reference)
        if saved.judged_by is not None:
            read_value(JudgedBy, saved.judged_by, name="judged_by")

    def _going_on(self, saved: SavedRun, *, step: int | None = None) -> RunState:
        """The run with what it left up to a step; later audits never happened. None for all."""
        history = replace(self.history, results=saved.results, findings=saved.findings, caveat=saved.caveat)
        if step is not None:
            history = history.up_to_step(step)
        share = _chosen_share(history.results)
        subset = self.subset.of_share(1.0 if share is None else share)
        trajectories = _no_trajectories(subset, score_names=self.blocks.score_names)
        trajectories = replace(trajectories, run_id=saved.run_id)
        # A subset that was chosen after this step will be chosen again.
        kept = saved.trajectories
        if kept is not None and all(
            getattr(kept, name) == getattr(trajectories, name)
            for name in ("score_names", "record_ids", "run_id")
        ):
            trajectories = kept if step is None else kept.up_to_step(step)
        # The model of an audit that never happened is nobody's checkpoint.
        last_audit, last_step = saved.last_audit, step_of_last_audit(history.results)
        resumed = replace(
            self,
            subset=subset,
            history=replace(history, is_complete=False),
            blocks=TrajectoryBlocks.of(trajectories),
            reference=saved.reference,
            last_audit=last_audit if last_audit is not None and last_audit.step == last_step else None,
            is_subset_chosen=share is not None,
            is_resumed=True,
        )
        resumed = resumed.with_metadata(run_id=saved.run_id or None)
        return resumed.with_exposures(saved.exposures or Exposures.none(len(subset.all_encoded.rows)))

    def at_step(self, step: int) -> RunState:
        """The same interrupted run, gone on with from an earlier step."""
        return self if (saved := self.saved()) is None else self._going_on(saved, step=step)

    def restarted(self) -> RunState:
        """The run starts over with trained weights: reference, checks and baseline stay what they were."""
        # Which weights it starts from now, no audit has seen.
        results = tuple(replace(result, weights="") for result in self.history if result.is_baseline)
        trajectories = self.trajectories.up_to_step(results[-1].step if results else -1)
        history = replace(self.history, results=results, is_complete=False)
        blocks = TrajectoryBlocks.of(trajectories)
        return replace(self, history=history, blocks=blocks, last_audit=None)

    def saved(self) -> SavedRun | None:
        """What has to be kept for the run to go on; None before the baseline was measured."""
        if self.reference is None:
            return None
        return SavedRun(
            results=self.history.results,
            reference=self.reference,
            findings=self.history.findings,
            caveat=self.history.caveat,
            trajectories=self.trajectories,
            exposures=self.exposures,
            judged_by=self.history.judged_by,
            last_audit=self.last_audit,
            run_id=self.run_id,
        )

    def to_dict(self) -> dict[str, Any]:
        """What has to be kept for the run to go on, as plain Python and arrays."""
        return {
            "run_id": self.run_id,
            "fingerprint": self.fingerprint,
            "history": self.history.to_dicts(),
            "findings": [asdict(finding) for finding in self.history.findings],
            "caveat": self.history.caveat,
            "reference": None if self.reference is None else arrays_of(self.reference),
            "last_audit": None
            if self.last_audit is None
            else {"step": self.last_audit.step, "statistics": arrays_of(self.last_audit.statistics)},
            "trajectories": {**_arrays(self.trajectories), "scores": dict(self.trajectories.scores)},
            "exposures": self.exposures.to_dict(),
            "judged_by": self.history.judged_by,
        }

    def resumed_from_dict(self, state: Mapping[str, Any], judge: Judge) -> RunState:
        """`resumed` from what `to_dict` returned; this state where that run had not begun.

        Raises:
            ReferenceMismatchError: if the state was saved for other canaries or another reference.
            ConfigurationError: if its audits were judged by another score, or something in it is not what
                `to_dict` writes; names the place.
        """
        found = read_value(_StateDict, state, newer={"exposures", "judged_by", "last_audit", "run_id"})
        if found.reference is None:
            return self
        if found.fingerprint != self.fingerprint:
            raise ReferenceMismatchError(
                "The state belongs to other canaries or another reference (fingerprint "
                f"{found.fingerprint:.40}, these have {self.fingerprint}). Resume with the same canaries, "
                "or start again from the original weights: the trained weights cannot stand in for the "
                "reference."
            )
        results = read_audits(found.history)
        share = _chosen_share(results)
        subset = self.subset.of_share(1.0 if share is None else share)
        empty = _no_trajectories(subset, score_names=self.blocks.score_names)
        trajectories = None
        # The first version kept those of one score, as an array.
        if not isinstance(found.trajectories.get("scores"), np.ndarray):
            kept = read_value(_Scores, found.trajectories, name="trajectories")
            trajectories = replace(empty, run_id=found.run_id, **vars(kept))
        saved = SavedRun(
            results=results,
            reference=statistics_of(found.reference, name="reference"),
            findings=found.findings,
            caveat=found.caveat,
            trajectories=trajectories,
            exposures=found.exposures,
            judged_by=found.judged_by,
            last_audit=None
            if found.last_audit is None
            else LastAudit(
                found.last_audit.step,
                statistics_of(found.last_audit.statistics, name="last_audit"),
            ),
            run_id=found.run_id,
        )
        return self.resumed(saved, judge)


@dataclass(frozen=True)
class _LastAuditRow:
    """A step and the arrays of statistics."""

    step: int
    statistics: Mapping[str, object]


@dataclass(frozen=True, eq=False)
class _Scores:
    """The arrays of trajectories."""

    is_member: Bool[np.ndarray, " n_records"]
    steps: Int64[np.ndarray, " n_audits"]
    epochs: Float64[np.ndarray, " n_audits"]
    is_baseline: Bool[np.ndarray, " n_audits"]
    scores: Mapping[str, Float64[np.ndarray, "n_audits n_records"]]
    step_scores: Float64[np.ndarray, "n_audits n_records"]


@dataclass(frozen=True, eq=False)
class _StateDict:
    """What `RunState.to_dict` returned. A state of before they were counted has no exposures."""

    fingerprint: str
    history: object
    findings: tuple[Finding, ...]
    caveat: str
    reference: Mapping[str, object] | None
    trajectories: Mapping[str, object]
    exposures: Exposures | None = None
    judged_by: Mapping[str, object] | None = None
    # The first version kept neither.
    last_audit: _LastAuditRow | None = None
    run_id: str = ""


def step_of_last_audit(results: Sequence[AuditResult]) -> int | None:
    """Step of the last audit that did not fail; None if there is none."""
    return next((result.step for result in reversed(results) if result.status == "ok"), None)


def _cut_like(statistics: TokenStatistics, scored: TokenStatistics) -> TokenStatistics | None:
    """Statistics of the tokens that are scored now; None if they are of fewer, or of other records."""
    sides, wanted = (
        [side for side in (each, each.rejected) if side is not None] for each in (statistics, scored)
    )
    if statistics.n_records != scored.n_records or len(sides) != len(wanted):
        return None
    lengths = [np.diff(side.offsets) for side in sides]
    n_scored = [np.diff(side.offsets) for side in wanted]
    if any((found < needed).any() for found, needed in zip(lengths, n_scored, strict=True)):
        return None
    return statistics.cut(*n_scored)


def _chosen_share(results: Sequence[AuditResult]) -> float | None:
    """Share of the canaries that a run had chosen; None if it had not chosen yet."""
    shares = [r.share for r in results if r.status == "ok" and not r.is_baseline]
    return shares[-1] if shares else None


def _no_trajectories(subset: CanarySubset, *, score_names: Sequence[str]) -> Trajectories:
    return Trajectories.empty(
        score_names=score_names,
        record_ids=subset.encoded.record_ids,
        is_member=subset.encoded.is_member,
        fingerprint=subset.all_encoded.fingerprint,
    )


def _arrays(owner: Trajectories) -> dict[str, np.ndarray]:
    values = {field.name: getattr(owner, field.name) for field in fields(owner)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
