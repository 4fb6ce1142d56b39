"""The audit itself, for a hand-written loop; the framework callbacks are thin shells over it."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ezmia_callbacks.audit.economy import Stopwatch, affordable_share
from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.audit.settings import OnError, check_arguments
from ezmia_callbacks.canaries import CanarySet, ValidityReport, check_validity
from ezmia_callbacks.distributed import (
    broadcast_from_main,
    can_share_records,
    gather,
    is_main_process,
    n_processes,
    on_all_ranks,
    rank,
    unwrapped,
)
from ezmia_callbacks.errors import (
    AuditError,
    ConfigurationError,
    ReferenceMismatchError,
    TooFewCanariesError,
)
from ezmia_callbacks.files import check_writable
from ezmia_callbacks.functional.budget import (
    Decision,
    LeakageBudget,
    alpha_for_audit,
    decide,
)
from ezmia_callbacks.functional.epsilon import EpsilonBound
from ezmia_callbacks.functional.planning import canaries_needed
from ezmia_callbacks.measuring.analysis_units import AnalysisUnits
from ezmia_callbacks.measuring.figures import (
    edge_counts,
    mean_loss,
    mean_of_records,
    measure_auc,
    measure_scores,
)
from ezmia_callbacks.measuring.subset import CanarySubset, smallest_subset
from ezmia_callbacks.reference.sources import (
    ReferenceSource,
    adapters_disabled,
    can_disable_adapters,
    check_reference,
    check_token_ids,
    explain_added_vocabulary,
    explain_difference,
    explain_other_vocabulary,
    has_adapters,
    reference_label,
    second_model,
)
from ezmia_callbacks.results.findings import detect
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import AuditResult, Finding, Measurement
from ezmia_callbacks.results.trajectories import Trajectories
from ezmia_callbacks.scoring.attack import Attack, checked_scores
from ezmia_callbacks.scoring.forward import (
    call_for_logits,
    check_model,
    deal_rows,
    evaluation_without_side_effects,
    token_statistics,
)
from ezmia_callbacks.scoring.memory import fit_into_memory
from ezmia_callbacks.scoring.projection import LogitsFunction, Projection
from ezmia_callbacks.scoring.rows import EncodedCanaries, Tokenizer, encode_canaries
from ezmia_callbacks.scoring.statistics import (
    TokenStatistics,
    join_statistics,
    load_statistics,
    save_statistics,
    score_records,
)

__all__ = ["PrivacyAuditor"]

logger = logging.getLogger(__name__)

# Enough rows to see whether two models differ at all.
_N_PROBE_ROWS = 8
# Nats a token; rounding in bfloat16 stays well below, a model that was trained lies well above.
_SAME_MODEL_TOLERANCE = 0.02

_TRAJECTORIES = "trajectories.safetensors"

# Of (epsilon, delta), where coins were thrown.
_DELTA = 1e-5

# Shown beside the deciding score; they decide nothing.
_COMPARED_SCORES = ("ez", "loss_difference", "wbc", "calibrated_min_k_plus_plus", "loss")


class PrivacyAuditor:
    """Measures membership leakage of a model while it is trained, and judges it against a budget.

    Call `begin` before the first optimizer step, while the model still is the reference, then `audit` as
    often as wanted. The model is left exactly as it was found.

    Args:
        canaries: Records with known membership; see `hold_out_canaries`. Of synthetic ones in several
            numbers of copies the figures are those of the fewest, of grouped ones those of the groups.
        budget: When to stop; None only measures.
        reference: What the model is compared with: `"auto"`, the model as it is at `begin`; `"adapter"`, the
            base under its disabled PEFT adapters; `"copy"`, a frozen float32 copy of the model at
            `begin`; a module, or a function that loads one. Its statistics are computed once, at
            `begin`, and nothing else of it is kept.
        score: The score that decides: a key of `token_statistics.SCORES`, or an `Attack` of your own.
        fpr_levels: False-positive rates at which the true-positive rate is reported.
        confidence: Confidence of the intervals, in (0, 1); without a budget also of the bands.
        n_audits: Number of audits the run will make after the baseline; the error rate is shared among
            them. None if unknown: then early audits get more of it and late ones less.
        tokenizer: Needed for canaries that are not tokenized.
        max_length: Truncation of canaries that are not tokenized; give what training uses.
        batch_size: Records in a forward pass.
        max_overhead: Share of the training time, in (0, 1), that audits may take. The first audit after the
            baseline then chooses a part of the canaries that keeps to it, for all audits of the run, by the
            time that training took until then; never fewer than the budget needs. None scores all canaries.
        output_dir: Folder for reference statistics, history and kept weights; None keeps all in memory.
        restore: Keep the weights of the last audit inside the budget, for `restore_within_budget`.
        on_error: What an error in an audit after the first step does: `"warn"` marks the audit as failed
            and lets training go on, `"raise"` ends it. Errors in `begin` are always raised.
        allow_shift: Let a budget decide although members and non-members, in a split that this library did
            not draw, can be told apart without the model. Figures then include that difference.
        training_records: Rows that will be trained on, in the form of the canaries; near copies of
            non-members are looked for among them before the first step.
        show_progress: Show a bar while an audit takes longer than two seconds.
        logits_fn: How to get logits (batch, length, vocabulary) out of the model, given the model, the
            input ids and the attention mask; the default calls it like a Hugging Face model.
        autocast: Makes the context under which training runs its forward pass.

    Raises:
        ConfigurationError: if an argument is outside its range.
        CanaryError: if the canaries cannot be encoded, or cannot resolve the budget.

    Examples:
        >>> auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.6))  # doctest: +SKIP
        >>> auditor.begin(model)  # doctest: +SKIP
        >>> for epoch in range(3):  # doctest: +SKIP
        ...     train_one_epoch(model)
        ...     if auditor.audit(model, epoch=epoch + 1).decision.stop:
        ...         auditor.restore_within_budget(model)
        ...         break
    """

    def __init__(
        self,
        canaries: CanarySet,
        *,
        budget: LeakageBudget | None = None,
        reference: ReferenceSource = "auto",
        score: str | Attack = "ez",
        fpr_levels: Sequence[float] = (0.01, 0.1),
        confidence: float = 0.95,
        n_audits: int | None = None,
        tokenizer: Tokenizer | None = None,
        max_length: int | None = None,
        batch_size: int = 16,
        max_overhead: float | None = None,
        output_dir: str | Path | None = None,
        restore: bool = True,
        on_error: OnError = "warn",
        allow_shift: bool = False,
        training_records: Iterable[Any] | None = None,
        show_progress: bool = False,
        logits_fn: LogitsFunction = call_for_logits,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        check_arguments(
            budget=budget,
            score=score,
            fpr_levels=fpr_levels,
            confidence=confidence,
            batch_size=batch_size,
            max_overhead=max_overhead,
            on_error=on_error,
        )
        check_reference(reference)
        if n_audits is not None and n_audits < 1:
            raise ConfigurationError(f"`n_audits` must be at least 1 or None, got {n_audits!r}.")
        self.canaries = canaries
        self._attack = None if isinstance(score, str) else score
        self._score = score if isinstance(score, str) else score.name
        index_of = {record_id: i for i, record_id in enumerate(canaries.record_ids)}
        encoded = encode_canaries(canaries, tokenizer, max_length=max_length)
        kept = canaries.select([index_of[record_id] for record_id in encoded.record_ids])
        self._part = CanarySubset(encoded, AnalysisUnits(kept))
        self._whole_reference: TokenStatistics | None = None
        self._is_part_chosen = max_overhead is None
        self._max_overhead = max_overhead
        self._watch = Stopwatch()
        self._scoring_seconds = self._keeping_seconds = 0.0
        is_structured = canaries.groups is not None or len(canaries.tiers) > 1
        if self._attack is not None and self._attack.is_trained_on_membership and is_structured:
            raise ConfigurationError(
                f"The attack {self._attack.name!r} is trained on the canaries, and these have groups or "
                "several tiers of copies, which its folds would tear apart: use a built-in score, or "
                "canaries without."
            )
        metadata = replace(
            RunMetadata.of_this_process(),
            canaries=self.encoded.fingerprint,
            reference=reference_label(reference),
            score=self._score,
            n_planned_audits="unknown" if n_audits is None else n_audits,
        )
        self.history = AuditHistory((), budget, confidence, canaries.describe(), run_metadata=metadata)
        self._n_audits = n_audits
        self.trajectories = self._no_trajectories()
        self._allow_shift = allow_shift
        self._training_records = training_records
        self._reference_source: ReferenceSource = reference
        self._fpr_levels = _with_budget_level(fpr_levels, budget)
        self._batch_size = batch_size
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._on_error = on_error
        self._is_progress_shown = show_progress
        self._logits_fn = logits_fn
        self._autocast = autocast
        self._reference: TokenStatistics | None = None
        self._target: TokenStatistics | None = None
        self._projection: Projection | None = None
        self._is_loaded = False
        keeps_weights = restore and budget is not None
        path = self._output_dir and self._output_dir / f"last_within_budget-{rank()}.pt"
        self._snapshot = KeptWeights(path) if keeps_weights else None
        if self.encoded.n_dropped:
            logger.warning(
                "%d canaries have fewer than two tokens that carry loss and are left out.",
                self.encoded.n_dropped,
            )
        if budget is not None and budget.metric == "tpr_at_fpr" and n_audits is None:
            raise ConfigurationError(
                f"A budget on {budget.label} needs to know how many audits will share its error rate: pass "
                "`n_audits`, or give the trainer a length (`max_steps`); or set the budget on AUC."
            )
        if budget is not None:
            self._check_budget_is_resolvable(budget)
        self._note_part()

    @property
    def encoded(self) -> EncodedCanaries:
        """The records that audits score: all that carry loss, or the part that `max_overhead` left."""
        return self._part.encoded

    @property
    def _units(self) -> AnalysisUnits:
        return self._part.units

    @property
    def trajectories_of_units(self) -> Trajectories:
        """The trajectories of what figures count: groups where there are groups, the tier of the headline."""
        groups = self._units.canaries.groups
        if groups is not None:
            return self.trajectories.by_group(groups)
        return self.trajectories.of_records(self._units.is_headline)

    @property
    def reference(self) -> TokenStatistics | None:
        """Statistics of the reference model; None before `begin`."""
        return self._reference

    @property
    def _fingerprint(self) -> str:
        """Of what the reference statistics were computed on, and from: sources are never mixed in a run."""
        return f"{self._part.all_encoded.fingerprint}-{reference_label(self._reference_source)}"

    @property
    def target(self) -> TokenStatistics | None:
        """Statistics of the model at the last audit, for figures of your own; None before `begin`.

        `functional.extraction_probability` and `functional.rank_exposure` take it from there.
        """
        return self._target

    @property
    def _reference_path(self) -> Path | None:
        return self._output_dir and self._output_dir / "reference.safetensors"

    def begin(self, model: nn.Module, *, step: int | None = None, epoch: float | None = 0.0) -> AuditResult:
        """Compute the reference statistics and make the baseline audit.

        With `reference="auto"` the model, as it is now, is the reference: every reference-based score
        ties at the baseline and its AUC is 0.5 by construction. The AUC of the bare loss is the one to
        look at: away from 0.5 it says that members and non-members differed before any training.

        After `load_state_dict` it goes on with the interrupted run instead and returns its last audit; the
        model's weights are then never taken for the reference.

        Args:
            model: The model before the first optimizer step.
            step: Optimizer steps done; by default 0, in an interrupted run those of its last audit.
            epoch: Epochs done.

        Raises:
            UnsupportedModelError: if the model is not a causal language model with logits.
            NonFiniteLogitsError: if it returns NaN or infinite logits.
            AuditMemoryError: if one canary alone does not fit into memory.
            ConfigurationError: if the canaries differ from process to process, or a budget is to decide on a
                split of the user's whose sides can be told apart without the model.
            OSError: if `output_dir` cannot be written.
        """
        _check_epoch(epoch)
        self._watch = Stopwatch()
        with self._watch.audit():
            return self._begin(unwrapped(model), step=step, epoch=epoch)

    def _begin(self, model: nn.Module, *, step: int | None, epoch: float | None) -> AuditResult:
        on_all_ranks(self._check_output_dir)
        self._check_same_canaries()
        self._projection = self._check_model(model)
        if self._is_loaded:
            return self._begin_loaded(model, step=step)
        started = time.perf_counter()
        # A run before this one may have chosen a part.
        self._part = self._part.of_share(1.0)
        self._is_part_chosen = self._max_overhead is None
        self._note_part()
        self._say_power()
        self._set_reference(None)
        self.history = self.history.with_results([])
        self.trajectories = self._no_trajectories()
        step = step or 0
        result = self._measure(model, step=step, epoch=epoch, is_baseline=True, started=started)
        self._check_validity()
        on_all_ranks(self._save_reference)
        before = time.perf_counter()
        self._record(result)
        if self._snapshot is not None:
            self._snapshot.save(model, step=step)
        self._keeping_seconds = time.perf_counter() - before
        return result

    def resume(self, model: nn.Module, history: Sequence[dict[str, Any]], *, step: int) -> None:
        """Go on with an interrupted run: its audits up to `step`, and its reference from `output_dir`.

        The model's weights were trained already and are never taken for the reference.

        Args:
            model: The model, with the checkpoint's weights.
            history: The audits so far, as `AuditHistory.to_dicts` gave them.
            step: Optimizer steps done in the checkpoint that training resumes from.

        Raises:
            ReferenceMismatchError: if the reference is missing, damaged, or made for other canaries.
            ConfigurationError: if there is no `output_dir` to read it from.
        """
        path = self._reference_path
        if path is None:
            raise ConfigurationError("Resuming needs the `output_dir` of the interrupted run.")
        with self._watch.audit():
            self._resume(unwrapped(model), history, path=path, step=step)

    def _resume(self, model: nn.Module, history: Sequence[dict[str, Any]], *, path: Path, step: int) -> None:
        self._check_same_canaries()
        fingerprint = self._fingerprint
        own = on_all_ranks(
            lambda: load_statistics(path, fingerprint=fingerprint) if is_main_process() else None
        )
        self.history = self.history.with_results(history).up_to_step(step)
        self._take_up_part()
        self._set_reference(broadcast_from_main(own))
        self._recall(step=step)
        last = self.history.last_within_budget
        self._resume_snapshot(model, step=step, is_within=last is not None and last.step == step)

    def state_dict(self) -> dict[str, Any]:
        """All that an interrupted run needs to go on; plain Python and tensors only.

        Save it with every checkpoint (`accelerator.register_for_checkpointing(auditor)` does).
        """
        reference = self._whole_reference
        return {
            "fingerprint": self._fingerprint,
            "history": self.history.to_dicts(),
            "findings": [asdict(finding) for finding in self.history.findings],
            "caveat": self.history.caveat,
            "reference": None if reference is None else _to_tensors(reference),
            "trajectories": _to_tensors(self.trajectories),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over an interrupted run, as `state_dict` left it; call `begin` afterwards as always.

        Raises:
            ReferenceMismatchError: if the state was saved for other canaries or another reference.
        """
        if state["reference"] is None:
            return
        if state["fingerprint"] != self._fingerprint:
            raise ReferenceMismatchError(
                "The state belongs to other canaries or another reference (fingerprint "
                f"{state['fingerprint']}, these have {self._fingerprint}). Resume with the same canaries, "
                "or start again from the original weights: the trained weights cannot stand in for the "
                "reference."
            )
        findings = tuple(Finding(**finding) for finding in state["findings"])
        self.history = replace(self.history, findings=findings, caveat=state["caveat"])
        self.history = self.history.with_results(state["history"])
        self._take_up_part()
        self._set_reference(TokenStatistics(**_to_arrays(state["reference"])))
        self.trajectories = replace(self.trajectories, **_to_arrays(state["trajectories"]))
        self._is_loaded = True

    def restart(self, model: nn.Module, *, n_audits: int | None) -> None:
        """Start a new run with the reference kept: the weights were trained in between.

        A run that was broken off has weights inside the budget still kept; those stay the ones to put back.
        A run that ended has left such weights in the model.

        Args:
            model: The model, with the weights that the new run starts from.
            n_audits: Number of audits that the new run will make.
        """
        snapshot = self._snapshot
        if snapshot is not None and broadcast_from_main(snapshot.exists):
            on_all_ranks(lambda: snapshot.relabel(step=0))
        else:
            self._keep_weights(unwrapped(model), step=0)
        baseline = [r for r in self.history if r.is_baseline]
        self.history = self.history.with_results([r.to_dict() for r in baseline])
        self.trajectories = self.trajectories.up_to_step(baseline[-1].step if baseline else -1)
        self._n_audits = n_audits
        self._note_part()

    def audit(self, model: nn.Module, *, step: int | None = None, epoch: float | None = None) -> AuditResult:
        """Measure the leakage of the model as it is now, and judge it.

        Args:
            model: The model in training; left exactly as it was found.
            step: Optimizer steps done; by default one more than at the last audit.
            epoch: Epochs done.

        Returns:
            The result; without a budget its `decision` says that there is nothing to stop for.

        Raises:
            ConfigurationError: if `begin` was not called.
            Exception: whatever went wrong in the audit, if `on_error` is `"raise"`.
        """
        if self._reference is None:
            raise ConfigurationError(
                "`begin(model)` must be called before the first optimizer step: the trained model cannot "
                "stand in for the reference."
            )
        model = unwrapped(model)
        if step is None:
            step = self.history[-1].step + 1 if len(self.history) else 1
        _check_epoch(epoch)
        with self._watch.audit():
            return self._audit(model, step=step, epoch=epoch)

    def _audit(self, model: nn.Module, *, step: int, epoch: float | None) -> AuditResult:
        started = time.perf_counter()
        try:
            self._choose_part()
            result = self._measure(model, step=step, epoch=epoch, is_baseline=False, started=started)
        except Exception as error:
            result = self._failed(error, step=step, epoch=epoch, started=started)
            self._record(result)
            if self._on_error == "raise":
                raise
            logger.warning("The audit at step %d failed; training goes on.", step, exc_info=error)
            return result
        self._record(result)
        if result.decision.is_within_budget:
            self._keep_weights(model, step=step)
        return result

    def restore_within_budget(self, model: nn.Module) -> AuditResult:
        """Put back, in place, the weights of the last audit inside the budget; returns that audit.

        It is the last one whose weights could be kept: after a full disk, an earlier one.

        Raises:
            AuditError: if no such weights were kept.
        """
        if self._snapshot is None:
            raise AuditError("No weights were kept: that needs a `budget` and `restore=True`.")
        step = self._snapshot.restore(unwrapped(model))
        return next(result for result in reversed(self.history.results) if result.step == step)

    def finish(self) -> None:
        """Remove the kept weights; the reference and the history stay."""
        if self._snapshot is not None:
            self._snapshot.discard()

    def _check_output_dir(self) -> None:
        if self._output_dir is not None and is_main_process():
            check_writable(self._output_dir)

    def _check_same_canaries(self) -> None:
        if len(set(gather(self._fingerprint))) > 1:
            raise ConfigurationError(
                "The processes hold different canaries: draw them from the whole dataset with the same seed "
                "in every process, before it is divided among them."
            )

    def _save_reference(self) -> None:
        whole = self._whole_reference
        if self._reference_path is not None and whole is not None and is_main_process():
            save_statistics(self._reference_path, whole, fingerprint=self._fingerprint)

    def _set_reference(self, whole: TokenStatistics | None) -> None:
        self._whole_reference = whole
        self._reference = None if whole is None else whole.select(self._part.is_chosen)

    def _note_metadata(self, **fields: Any) -> None:
        self.history = replace(self.history, run_metadata=replace(self.history.run_metadata, **fields))

    def _no_trajectories(self) -> Trajectories:
        return Trajectories.empty(
            score=self._score,
            record_ids=self.encoded.record_ids,
            is_member=self.encoded.is_member,
            fingerprint=self.encoded.fingerprint,
        )

    def _take_part(self, part: CanarySubset) -> None:
        """Score a part of the canaries from here on, and go on as if there had never been more."""
        self._is_part_chosen = True
        if part.share == self._part.share:
            return
        self._part = part
        self.trajectories = self.trajectories.of_records(part.is_chosen)
        self._set_reference(self._whole_reference)
        self._note_part()

    def _take_up_part(self) -> None:
        """Score the part that an interrupted run had chosen."""
        shares = [result.share for result in self.history.audits_after_baseline if result.status == "ok"]
        if shares:
            self._take_part(self._part.of_share(shares[-1]))

    def _choose_part(self) -> None:
        """Choose, once in a run, how many canaries its audits can afford."""
        if self._is_part_chosen or self._max_overhead is None:
            return
        share = affordable_share(
            self._max_overhead,
            training_seconds=self._watch.last_interval,
            # The baseline of a resumed run was made by another process.
            scoring_seconds=self._scoring_seconds or self.history[0].seconds,
            other_seconds=self._keeping_seconds,
            spent_seconds=self._watch.audit_seconds,
            n_audits=self._n_audits,
        )
        # Clocks differ from process to process.
        share = broadcast_from_main(share)
        part = smallest_subset(
            self._part,
            affordable_share=share,
            budget=self.history.budget,
            failure_probability=self._least_failure_probability,
        )
        self._take_part(part)
        is_affordable = part.share <= share
        if not is_main_process() or (is_affordable and part.share == 1.0):
            return
        text = " ".join(filter(None, (part.describe(), self._power())))
        if is_affordable:
            logger.info("To keep audits under %.3g of the training time: %s", self._max_overhead, text)
        else:
            logger.warning(
                "Audits will take more than %.3g of the training time: fewer canaries could not carry the "
                "figures. %s Audit less often, or raise `max_overhead`.",
                self._max_overhead,
                text,
            )

    @property
    def _least_failure_probability(self) -> float:
        """Share of the error rate of the least favored audit; of the first where their number is unknown."""
        return alpha_for_audit(
            self._n_audits or 1,
            n_planned=self._n_audits,
            failure_probability=1.0 - self.history.band_confidence,
        )

    def _power(self) -> str:
        """What one audit can find out about the budget, in one sentence; empty without a budget."""
        budget = self.history.budget
        if budget is None:
            return ""
        return self._part.describe_power(budget, failure_probability=self._least_failure_probability)

    def _say_power(self) -> None:
        """Say before the first step what will hardly be found: it would read as if nothing leaked."""
        if self.history.budget is None or not is_main_process():
            return
        can_judge = self._part.can_judge(
            self.history.budget, failure_probability=self._least_failure_probability
        )
        logger.log(logging.INFO if can_judge else logging.WARNING, "%s", self._power())

    def _note_part(self) -> None:
        """Write down which canaries audits score, and what they can find out."""
        self._note_metadata(
            n_scored=len(self._part.encoded.rows),
            n_canaries=len(self._part.all_encoded.rows),
            power=None if self.history.budget is None else self._power(),
        )

    def _check_budget_is_resolvable(self, budget: LeakageBudget) -> None:
        try:
            self._part.check_resolvable(budget, failure_probability=self._least_failure_probability)
        except TooFewCanariesError as error:
            if self._n_audits is None:
                raise
            plan = canaries_needed(budget, n_audits=self._n_audits)
            raise TooFewCanariesError(f"{error} {plan.describe()}") from None

    def _check_validity(self) -> None:
        """Look for what would make the figures say something else than leakage, before it is too late."""
        report = broadcast_from_main(on_all_ranks(lambda: self._validity() if is_main_process() else None))
        if report is None or self._reference is None:
            return
        findings = tuple(Finding(check.name, check.is_flagged, check.describe()) for check in report.checks)
        self.history = replace(self.history, findings=findings, caveat=report.headline)
        is_blind = report.blind_auc > 0.5
        if (
            is_blind
            and not report.is_randomized
            and self.history.budget is not None
            and not self._allow_shift
        ):
            raise ConfigurationError(
                f"{report.headline} A leakage budget cannot be judged on such a split: draw both sides "
                "from one pool with `hold_out_canaries`, or pass `allow_shift=True` to have the difference "
                "counted as leakage."
            )
        _warn(report.headline or None)

    def _validity(self) -> ValidityReport | None:
        reference = self._reference
        if reference is None:
            return None
        n_scored = np.diff(reference.offsets)
        canaries = self._units.canaries
        # One record of each group: those of a group are not independent.
        chosen = np.sort(np.unique(canaries.groups or canaries.record_ids, return_index=True)[1])
        return check_validity(
            canaries.select(chosen.tolist()),
            training_records=self._training_records,
            reference_losses=mean_of_records(-reference.log_probs, reference.offsets)[chosen],
            n_scored_tokens=n_scored[chosen],
            n_error_tokens=(n_scored * mean_of_records(~reference.is_correct, reference.offsets))[chosen],
            confidence=self.history.confidence,
        )

    def _recall(self, *, step: int) -> None:
        """Findings and trajectories of a run that goes on; without their files it goes on, too."""
        if self._output_dir is None:
            return
        try:
            found = AuditHistory.load(self._output_dir / "history.jsonl")
            self.history = replace(self.history, findings=found.findings, caveat=found.caveat)
            trajectories = Trajectories.load(
                self._output_dir / _TRAJECTORIES, fingerprint=self.trajectories.fingerprint
            ).up_to_step(step)
            # A part that was chosen after this step is chosen again.
            if trajectories.record_ids == self.trajectories.record_ids:
                self.trajectories = trajectories
        except AuditError as error:
            if is_main_process():
                logger.warning("What an earlier part of the run found is lost: %s", error)

    def _begin_loaded(self, model: nn.Module, *, step: int | None) -> AuditResult:
        self._is_loaded = False
        on_all_ranks(self._save_reference)
        last, within = self.history[-1], self.history.last_within_budget
        is_within = within is last and (last.step == step if step is not None else self._is_audited(model))
        self._resume_snapshot(model, step=last.step if step is None else step, is_within=is_within)
        return last

    def _is_audited(self, model: nn.Module) -> bool:
        """Whether the weights are those of the last audit; a checkpoint may have been saved later."""
        target = self._statistics(model)
        loss = mean_loss(target, self.encoded.is_member)
        return broadcast_from_main(loss == self.history[-1].member_loss)

    def _resume_snapshot(self, model: nn.Module, *, step: int, is_within: bool) -> None:
        if self._snapshot is None:
            return
        # Weights kept after the checkpoint belong to a future that this run will not have.
        if (broadcast_from_main(self._snapshot.step) or 0) > step:
            self._snapshot.discard()
        if is_within:
            self._keep_weights(model, step=self.history[-1].step)
        elif not broadcast_from_main(self._snapshot.exists) and is_main_process():
            logger.warning(
                "No weights inside the budget are kept yet: until an audit finds the model inside it, a stop "
                "can put none back."
            )

    def _measure(
        self, model: nn.Module, *, step: int, epoch: float | None, is_baseline: bool, started: float
    ) -> AuditResult:
        """One result for all processes, from the main one."""
        before = time.perf_counter()
        target = self._statistics(model)
        if is_baseline:
            self._scoring_seconds = time.perf_counter() - before
            self._set_reference(self._reference_statistics(model, target))
        self._target = target
        own_scores = self._attack_scores(model, target, is_baseline=is_baseline)
        result = on_all_ranks(
            lambda: self._result(
                target, own_scores, step=step, epoch=epoch, is_baseline=is_baseline, started=started
            )
        )
        return broadcast_from_main(result)

    def _attack_scores(
        self, model: nn.Module, target: TokenStatistics, *, is_baseline: bool
    ) -> dict[str, np.ndarray]:
        """Scores of the user's attack, by its name; none if a built-in score decides."""
        attack, reference = self._attack, self._reference or target
        if attack is None:
            return {}

        def scored() -> np.ndarray:
            scores = attack.score(model, self.encoded, target, reference)
            return checked_scores(scores, name=attack.name, n_records=len(self.encoded.rows))

        with evaluation_without_side_effects(model), self._autocast():
            if is_baseline:
                on_all_ranks(lambda: attack.begin(model, self.encoded))
            return {attack.name: on_all_ranks(scored)}

    def _statistics(
        self, model: nn.Module, *, n_rows: int | None = None, is_own: bool = True
    ) -> TokenStatistics:
        """Statistics of all rows, or the first ones, on every process; each scores its share.

        Args:
            model: The model that is trained, or another one as its reference.
            n_rows: Number of rows; None for all.
            is_own: Whether it is the model that is trained.
        """
        rows = self.encoded.rows[:n_rows]
        if is_own and self._projection is None:
            self._projection = self._check_model(model)
        projection = self._projection if is_own else None
        n_shares, own = (n_processes(), rank()) if can_share_records(model) else (1, 0)

        def share(batch_size: int) -> tuple[TokenStatistics, list[list[int]]]:
            shares = deal_rows(rows, batch_size=batch_size, n_shares=n_shares)
            statistics = token_statistics(
                model,
                [rows[i] for i in shares[own]],
                batch_size=batch_size,
                n_batches=math.ceil(max(map(len, shares)) / batch_size),
                projection=projection,
                logits_fn=self._logits_fn,
                autocast=self._autocast,
                show_progress=self._is_progress_shown and is_main_process(),
            )
            return statistics, shares

        # A size that was too large once is not tried again.
        (statistics, shares), self._batch_size = fit_into_memory(share, batch_size=self._batch_size)
        if n_shares == 1:
            return join_statistics([broadcast_from_main(statistics)], shares)
        return join_statistics(gather(statistics), shares)

    def _check_model(self, model: nn.Module) -> Projection:
        """Refuse a model that cannot be audited; how its logits are computed, alike on all processes."""
        found, _ = fit_into_memory(
            lambda _: check_model(
                model, self.encoded.rows, logits_fn=self._logits_fn, autocast=self._autocast
            ),
            batch_size=1,
        )
        projection = next((each for each in gather(found) if each.reason is not None), found)
        self._note_metadata(logits=projection.describe())
        if projection.reason is not None and is_main_process():
            logger.info(
                "An audit holds the logits %s: with a large vocabulary keep `batch_size` small.",
                projection.describe(),
            )
        return projection

    def _reference_statistics(self, model: nn.Module, start: TokenStatistics) -> TokenStatistics:
        """Statistics of the reference; says so if the model has moved away from its base already."""
        source = self._reference_source
        if isinstance(source, str):
            _warn(explain_added_vocabulary(model, self.encoded.rows))
        if source == "auto":
            if has_adapters(model) and can_disable_adapters(model):
                with adapters_disabled(model):
                    base = self._statistics(model, n_rows=_N_PROBE_ROWS)
                self._warn_of_difference(model, start, base)
            return start
        if source == "adapter":
            with adapters_disabled(model):
                reference = self._statistics(model)
            self._warn_of_difference(model, start, reference)
            return reference
        other = source if isinstance(source, nn.Module) else on_all_ranks(lambda: second_model(model, source))
        check_token_ids(other, self.encoded.rows)
        _warn(explain_other_vocabulary(other, model))
        return self._statistics(other, is_own=False)

    def _warn_of_difference(self, model: nn.Module, start: TokenStatistics, base: TokenStatistics) -> None:
        difference = float(np.abs(start.log_probs[: base.n_tokens] - base.log_probs).max())
        if difference > _SAME_MODEL_TOLERANCE and is_main_process():
            logger.warning(
                "Before any training the model differs from its base by up to %.3g nats a token: %s",
                difference,
                explain_difference(model),
            )

    def _result(
        self,
        target: TokenStatistics,
        own_scores: Mapping[str, np.ndarray],
        *,
        step: int,
        epoch: float | None,
        is_baseline: bool,
        started: float,
    ) -> AuditResult:
        reference = self._reference if self._reference is not None else target
        is_member, confidence = self._units.is_member, self.history.confidence
        n_bytes = self.encoded.n_compressed_bytes
        scores: dict[str, np.ndarray] = {
            name: score_records(name, target, reference, n_compressed_bytes=n_bytes)
            for name in {self._score, *_COMPARED_SCORES} - own_scores.keys()
        }
        scores.update(own_scores)
        metrics = measure_scores(
            self._units.headline(scores[self._score]),
            is_member,
            fpr_levels=self._fpr_levels,
            confidence=confidence,
            band_confidence=None if is_baseline else self._band_confidence(),
        )
        of_records = self.encoded.is_member
        member_edges, non_member_edges = edge_counts(target, reference, of_records)
        n_errors = np.diff(target.offsets) * mean_of_records(~target.is_correct, target.offsets)
        result = AuditResult(
            step=step,
            epoch=epoch,
            status="ok",
            is_baseline=is_baseline,
            score=self._score,
            n_members=self._part.n_members,
            n_non_members=self._part.n_non_members,
            n_tokens=target.n_tokens,
            metrics=metrics,
            auc_by_score={
                name: measure_auc(self._units.headline(scores[name]), is_member, confidence=confidence)
                for name in _COMPARED_SCORES
                if name != self._score
            },
            auc_by_group={
                name: measure_auc(scores[self._score][chosen], of_records[chosen], confidence=confidence)
                for name, chosen in self._units.others.items()
            },
            epsilon=self._epsilon(scores[self._score], is_baseline=is_baseline),
            member_loss=mean_loss(target, of_records),
            non_member_loss=mean_loss(target, ~of_records),
            n_error_tokens=float(np.median(n_errors)),
            member_edges=member_edges,
            non_member_edges=non_member_edges,
            decision=self._decide(metrics, is_baseline=is_baseline),
            seconds=time.perf_counter() - started,
            overhead=self._watch.overhead,
            share=self._part.share,
            batch_size=self._batch_size,
            scores=scores[self._score],
        )
        return replace(result, findings=detect(result, self.history.results))

    def _epsilon(self, scores: np.ndarray, *, is_baseline: bool) -> EpsilonBound | None:
        is_fair = self._attack is None or not self._attack.is_trained_on_membership
        if is_baseline or not is_fair or not self.canaries.provenance.has_independent_coins:
            return None
        return self._units.epsilon(scores, delta=_DELTA, confidence=self.history.confidence)

    def _band_confidence(self) -> float:
        """Confidence of the next audit's bands that makes the bands of all audits hold together."""
        return 1.0 - alpha_for_audit(
            len(self.history.audits_after_baseline) + 1,
            n_planned=self._n_audits,
            failure_probability=1.0 - self.history.band_confidence,
        )

    def _decide(self, metrics: Mapping[str, Measurement], *, is_baseline: bool) -> Decision:
        budget = self.history.budget
        if is_baseline:
            return Decision(False, True, "baseline: nothing was trained yet")
        if budget is None:
            return Decision(False, None, "no budget")
        decided = metrics[budget.name]
        if decided.value is None or decided.band is None:
            # Audits beyond the plan have less of the error rate, until the canaries cannot carry them. Going
            # on would be to go on without a budget.
            message = f"{budget.label} cannot be judged any more ({decided.note}): the run was to end by now"
            return Decision(True, None, message)
        n_over_before = self.history.n_over_in_a_row
        return decide(budget, decided.value, band=decided.band, n_over_before=n_over_before)

    def _failed(self, error: Exception, *, step: int, epoch: float | None, started: float) -> AuditResult:
        return AuditResult(
            step=step,
            epoch=epoch,
            status="failed",
            is_baseline=False,
            score=self._score,
            n_members=self._part.n_members,
            n_non_members=self._part.n_non_members,
            decision=Decision(False, None, "the audit failed: leakage is unknown"),
            error=f"{type(error).__name__}: {error}",
            seconds=time.perf_counter() - started,
            overhead=self._watch.overhead,
            share=self._part.share,
        )

    def _record(self, result: AuditResult) -> None:
        known = {finding.name for earlier in self.history for finding in earlier.findings}
        self.history = self.history.with_result(result)
        self.trajectories = self.trajectories.with_result(result)
        if is_main_process():
            logger.info("%s", result.describe())
            for finding in result.findings:
                # Of the baseline's, the caveat says all.
                if finding.name not in known and not result.is_baseline:
                    logger.warning("%s", finding.text)
        on_all_ranks(lambda: self._save_history(result))

    def _save_history(self, result: AuditResult) -> None:
        if self._output_dir is None or not is_main_process():
            return
        try:
            self.history.save(self._output_dir / "history.jsonl")
            self.trajectories.save(self._output_dir / _TRAJECTORIES)
        except OSError as error:
            # Before the first step a folder that cannot be written is the user's to mend.
            if result.is_baseline or self._on_error == "raise":
                raise
            logger.warning("The audit history could not be written: %s", error)

    def _keep_weights(self, model: nn.Module, *, step: int) -> None:
        try:
            if self._snapshot is not None:
                self._snapshot.save(model, step=step)
        except (OSError, AuditError) as error:
            if self._on_error == "raise":
                raise
            logger.warning(
                "The weights of step %d could not be kept (%s): a stop would put back older ones.",
                step,
                error,
            )


def _to_tensors(owner: TokenStatistics | Trajectories) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(owner, field.name) for field in fields(owner)}
    return {name: torch.from_numpy(v) for name, v in values.items() if isinstance(v, np.ndarray)}


def _to_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _warn(sentence: str | None) -> None:
    if sentence is not None and is_main_process():
        logger.warning("%s", sentence)


def _with_budget_level(fpr_levels: Sequence[float], budget: LeakageBudget | None) -> tuple[float, ...]:
    levels = set(fpr_levels)
    if budget is not None and budget.metric == "tpr_at_fpr":
        levels.add(budget.fpr)
    return tuple(sorted(levels))


def _check_epoch(epoch: float | None) -> None:
    if epoch is not None and not math.isfinite(epoch):
        raise ConfigurationError(f"`epoch` must be a finite number or None, got {epoch!r}.")
