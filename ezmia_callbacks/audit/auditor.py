"""The audit itself, for a hand-written loop; the framework callbacks are thin shells over it."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ezmia_callbacks.audit.economy import Stopwatch, affordable_share
from ezmia_callbacks.audit.feeding import (
    CONTAMINATION,
    counted_by,
    describe_never_fed,
    findings_of_feeding,
    scored_otherwise,
    why_not_seen,
)
from ezmia_callbacks.audit.folder_lock import FolderLock
from ezmia_callbacks.audit.judge import Judge
from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.audit.model_facts import name_of, parameters_of
from ezmia_callbacks.audit.outcome import (
    Line,
    lines_of_end,
    lines_of_failed_restore,
    lines_of_restore,
)
from ezmia_callbacks.audit.rejected import save_rejected
from ezmia_callbacks.audit.run_folder import RunFolder
from ezmia_callbacks.audit.run_id import new_run_id
from ezmia_callbacks.audit.run_state import RunState
from ezmia_callbacks.audit.seen import SeenCanaries
from ezmia_callbacks.audit.settings import AuditSettings, OnError
from ezmia_callbacks.audit.weights import AuditedWeights
from ezmia_callbacks.audit.windows import end_is_uncertain_by
from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.console import say
from ezmia_callbacks.distributed import (
    broadcast_from_main,
    can_share_records,
    gather,
    is_main_process,
    n_processes,
    on_all_ranks,
    on_all_ranks_in_turns,
    talk_beside_the_model,
    unwrapped,
)
from ezmia_callbacks.divisions import refuse_divisions
from ezmia_callbacks.errors import (
    AuditError,
    BrokenPassError,
    ConfigurationError,
    ModelChangedError,
    OverlappingCanariesError,
)
from ezmia_callbacks.functional.budget import Decision, LeakageBudget
from ezmia_callbacks.functional.judged import judged_scores
from ezmia_callbacks.measuring.analysis_units import AnalysisUnits
from ezmia_callbacks.measuring.figures import Counted, figures, mean_loss
from ezmia_callbacks.measuring.split_checks import (
    MET_BEFORE,
    check_split,
    findings_of_split,
    refuse_blind_split,
)
from ezmia_callbacks.measuring.subset import CanarySubset, smallest_subset
from ezmia_callbacks.reference.sources import (
    ReferenceSource,
    adapter_names,
    check_reference,
    reference_label,
)
from ezmia_callbacks.reference.statistics import reference_statistics
from ezmia_callbacks.results.consistency import CONTRADICTION
from ezmia_callbacks.results.exposures import (
    Exposures,
    add_exposures,
    cut_exposures,
    same_exposures,
    truncation,
    whole_again,
)
from ezmia_callbacks.results.findings import detect
from ezmia_callbacks.results.history import AuditHistory, read_audits
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.moment import Moment
from ezmia_callbacks.results.result import AuditResult, Finding
from ezmia_callbacks.results.trajectories import Trajectories
from ezmia_callbacks.safe_text import describe_error, get_logger, log_error
from ezmia_callbacks.scoring.attack import Attack
from ezmia_callbacks.scoring.forward import call_for_logits
from ezmia_callbacks.scoring.projection import LogitsFunction
from ezmia_callbacks.scoring.rows import (
    EncodedCanaries,
    Tokenizer,
    TokenRow,
    encode_canaries,
)
from ezmia_callbacks.scoring.scorer import Scorer
from ezmia_callbacks.scoring.statistics import TokenStatistics
from ezmia_callbacks.typed_rows import read_mapping, read_value

__all__: list[str] = []

logger = get_logger(__name__)

# Relative difference of a loss that other kernels make, on another machine.
_SAME_LOSS = 1e-4
# Canaries by which a model that was put back is known again.
_N_SAMPLED = 8


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
        score: What decides. `"strongest"`: EZ, loss difference, WBC and loss, of preference pairs also the
            margin, are judged together, and whichever leaks most decides, as an attacker would use it. Else
            one score, by its name or as an `Attack` of your own. Others are shown beside it.
        fpr_levels: False-positive rates at which the true-positive rate is reported.
        confidence: Confidence of the intervals, in (0, 1); without a budget also of the bands.
        n_audits: Number of audits the run will make after the baseline; the error rate is shared among
            them. None if unknown: then early audits get more of it and late ones less.
        tokenizer: Needed for canaries that are not tokenized.
        max_length: Truncation of canaries that are raw text; give what training uses.
        batch_size: Records in a forward pass.
        max_overhead: Share of the training time, in (0, 1), that audits may take. The first audit after the
            baseline then chooses a subset of the canaries that keeps to it, for all audits of the run, by the
            time that training took until then; never fewer than the budget needs. None scores all canaries.
        output_dir: Folder for the history, the reference statistics and the kept weights; None keeps all in
            memory.
        restore: Keep the weights of the last audit within the budget, for `restore_within_budget`.
        keep_rejected: At a stop, write the weights over budget to `over_budget` in the run's folder, before
            those within it are restored; else they are gone.
        on_error: What an error in an audit after the first step does: `"warn"` marks a gap in the curve and
            lets training go on, `"raise"` ends it. Errors before the first step are always raised.
        allow_shift: Let a budget decide although members and non-members, in a split that this library did
            not draw, can be told apart without the model: figures then include that difference. Or although
            the model has met one side of a split that it did draw: figures then read too low, or too high.
        judge_only: Give verdicts and never stop, for a run that is over.
        assume_seen: Believe that every member is trained on and no non-member is, for training whose batches
            cannot be looked at. By default figures and verdicts are of the members that batches held.
        training_records: Rows that will be trained on, in the form of the canaries; near copies of
            non-members are looked for among them before the first step.
        show_progress: Show a bar while an audit takes longer than two seconds.
        logits_fn: How to get logits (batch, length, vocabulary) out of the model, given the model, the
            input ids and the attention mask; the default calls it like a Hugging Face model. With a parameter
            `**inputs` it is also given what else training feeds, by name.
        autocast: Makes the context under which training runs its forward pass.
        run_metadata: What is known about the run besides; by default its time, machine, versions and command.

    Attributes:
        canaries: The canaries.
        settings: The choices.
        rejected_folder: Where weights over the budget were written by `keep_rejected`; None if none were.

    Raises:
        ConfigurationError: if an argument is outside its range.
        CanaryError: if the canaries cannot be encoded, or cannot resolve the budget.

    Examples:
        >>> auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.6))  # doctest: +SKIP
        >>> auditor.begin(model)  # doctest: +SKIP
        >>> for epoch in range(3):  # doctest: +SKIP
        ...     train_one_epoch(model)
        ...     if auditor.audit(model, step=(epoch + 1) * len(loader), epoch=epoch + 1).decision.stop:
        ...         auditor.restore_within_budget(model, optimizer)
        ...         break
        >>> auditor.finish(model)  # doctest: +SKIP
    """

    def __init__(
        self,
        canaries: CanarySet,
        *,
        budget: LeakageBudget | None = None,
        reference: ReferenceSource = "auto",
        score: str | Attack = "strongest",
        fpr_levels: Sequence[float] = (0.01, 0.1),
        confidence: float = 0.95,
        n_audits: int | None = None,
        tokenizer: Tokenizer | None = None,
        max_length: int | None = None,
        batch_size: int = 16,
        max_overhead: float | None = None,
        output_dir: str | Path | None = None,
        restore: bool = True,
        keep_rejected: bool = False,
        on_error: OnError = "warn",
        allow_shift: bool = False,
        judge_only: bool = False,
        assume_seen: bool = False,
        training_records: Iterable[Any] | None = None,
        show_progress: bool = False,
        logits_fn: LogitsFunction = call_for_logits,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        run_metadata: RunMetadata | None = None,
    ) -> None:
        check_reference(reference)
        settings = AuditSettings(
            budget=budget,
            reference=reference,
            score=score,
            fpr_levels=fpr_levels,
            confidence=confidence,
            max_length=max_length,
            batch_size=batch_size,
            max_overhead=max_overhead,
            output_dir=output_dir,
            restore=restore,
            keep_rejected=keep_rejected,
            on_error=on_error,
            allow_shift=allow_shift,
            judge_only=judge_only,
            assume_seen=assume_seen,
        )
        if keep_rejected and output_dir is None:
            raise ConfigurationError("`keep_rejected=True` needs an `output_dir` to write the weights to.")
        _check_attack_fits(settings.attack, canaries)
        self.canaries = canaries
        self.settings = settings
        self._reference_source: ReferenceSource = reference
        self._training_records = training_records
        self._scorer = Scorer(
            batch_size=batch_size, logits_fn=logits_fn, autocast=autocast, show_progress=show_progress
        )
        self._watch = Stopwatch()
        # Absolute: a script may change its folder while it trains.
        self._folder = None if output_dir is None else RunFolder(Path(output_dir).absolute())
        self._lock = None if self._folder is None else FolderLock(self._folder.path)
        self._weights = AuditedWeights(
            self._no_kept_weights() if settings.keeps_weights else None,
            sample=self._sample,
            on_error=on_error,
        )
        self._target: TokenStatistics | None = None
        self._seen: SeenCanaries | None = None
        self._is_fed_alike = False
        self._said: set[str] = set()
        # The audit of what the model holds, as far as is known without looking, and the steps done by then.
        self._left: AuditResult | None = None
        self._left_at = 0
        self._restored: AuditResult | None = None
        self._is_restore_tried = False
        self.rejected_folder: Path | None = None
        self._state = self._before_training(tokenizer, run_metadata or RunMetadata.of_this_process())
        # As it is in the folder, if this process wrote it there.
        self._saved: RunState | None = None
        n_scores = len(self._state.blocks.score_names)
        self._judge = Judge(budget, settings.band_confidence, n_audits, judge_only, n_scores)
        self._judge.check_resolvable(self._state.subset)
        self._move_to(self._state)

    def __repr__(self) -> str:
        return f"PrivacyAuditor({self.canaries!r}, {self.history!r})"

    @property
    def history(self) -> AuditHistory:
        """The audits so far, the baseline first; empty before `begin`."""
        return self._state.history

    @property
    def encoded(self) -> EncodedCanaries:
        """The records that audits score: all that carry loss, or the subset that `max_overhead` left."""
        return self._state.subset.encoded

    @property
    def trajectories(self) -> Trajectories:
        """The scores that are judged, of each record at each audit."""
        return self._state.trajectories

    @property
    def trajectories_of_units(self) -> Trajectories:
        """The trajectories of what figures count: groups where there are groups, the tier of the headline."""
        units = self._state.subset.units
        if units.canaries.groups is not None:
            return self.trajectories.by_group(units.canaries.groups)
        return self.trajectories.of_records(units.is_headline)

    @property
    def reference(self) -> TokenStatistics | None:
        """Statistics of the reference model; None before `begin`."""
        return self._state.reference_of_subset

    @property
    def target(self) -> TokenStatistics | None:
        """Statistics of the model at the last audit, for figures of your own; None before `begin`.

        `functional.extraction_probability` and `functional.rank_exposure` take it from there.
        """
        return self._target

    @property
    def exposures(self) -> Exposures:
        """How often training fed each canary of `encoded`, and when last, as of the last audit."""
        return self._state.exposures.select(self._state.subset.is_chosen)

    @property
    def exposures_of_all(self) -> Exposures:
        """The same of all canaries, those among them that `max_overhead` left out."""
        return self._state.exposures

    @property
    def n_steps_seen(self) -> int:
        """Optimizer steps of this process after which the weights had moved, or that `step_done` told."""
        return 0 if self._seen is None else self._seen.n_steps

    def watch(self, module: nn.Module) -> None:
        """Look at the batches that this object gets, instead of those of the model given to `begin`.

        Needed where the loop calls something else than that model: the result of `torch.compile`, a wrapper
        that was put around it later.

        Args:
            module: The object that the training loop calls, in training mode and with gradients.
        """
        if self._seen is not None:
            self._seen.watch(module)

    def step_done(self, step: int) -> None:
        """Say that an optimizer step is done; the auditor notices by itself where the weights have moved.

        Args:
            step: Optimizer steps done.
        """
        if self._seen is not None:
            self._seen.step_done(step)

    def notice_step(self) -> None:
        """See whether the weights have moved, so that an optimizer step is done; waits for nothing."""
        if self._seen is not None:
            self._seen.notice_step()

    def look_back(self) -> None:
        """How often training fed each canary up to now; every process must call it.

        An audit does so by itself. Call it before `state_dict` where several processes train, so that the
        state knows what each of them was fed.
        """
        if self._seen is not None:
            self._look_back(self._seen)

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
            ModelChangedError: if the model could not be left as it was found; names the tensors.
            NonFiniteLogitsError: if it returns NaN or infinite logits.
            AuditMemoryError: if one canary alone does not fit into memory.
            ConfigurationError: if the canaries differ from process to process, a budget is to decide on a
                split of the user's whose sides can be told apart without the model, or weights are to be kept
                that are offloaded.
            OSError: if `output_dir` cannot be written.
        """
        moment = Moment(step or 0, epoch, is_baseline=True)
        self._watch = Stopwatch()
        with self._watch.audit():
            self._check_surroundings(model)
            if self._state.is_resumed:
                self._go_on(model, step=step)
                return self.history[-1]
            return self._start(model, moment)

    def resume(
        self,
        model: nn.Module,
        history: Sequence[dict[str, Any]],
        *,
        step: int,
        exposures: Mapping[str, Any] | None = None,
        judged_by: Mapping[str, Any] | None = None,
        run_id: str | None = None,
    ) -> None:
        """Go on with an interrupted run: its audits up to `step`, and its reference from `output_dir`.

        The model's weights were trained already and are never taken for the reference.

        Args:
            model: The model, with the checkpoint's weights.
            history: The audits so far, as `AuditHistory.to_dicts` gave them.
            step: Optimizer steps done in the checkpoint that training resumes from.
            exposures: What it had been fed by then, as `Exposures.to_dict` gave it; None if that is lost:
                then members count once they are fed again.
            judged_by: What they were judged by, as `AuditHistory.judged_by` gave it; None if that is unknown.
                Under another budget they are judged anew.
            run_id: Name of the run, as `history.run_metadata.run_id` gave it; None if that is lost: then the
                files in `output_dir` need only belong together.

        Raises:
            ReferenceMismatchError: if the reference is missing, damaged, made for other canaries, or another
                run's, or if the canaries are said to have been drawn otherwise.
            ConfigurationError: if there is no `output_dir` to read it from, the score is another one, or
                something is not what it should be: names the place.
        """
        folder, state = self._folder, self._state
        if folder is None:
            raise ConfigurationError("Resuming needs the `output_dir` of the interrupted run.")
        results = read_audits(history)
        if run_id is not None:
            run_id = read_value(str, run_id, name="run_id")
        with self._watch.audit():
            self._check_surroundings(model)
            saved = broadcast_from_main(
                on_all_ranks_in_turns(
                    lambda: folder.load(results, state, run_id=run_id) if is_main_process() else None
                )
            )
            if saved is not None:  # the main process's, on every one
                if exposures is not None:
                    saved = replace(saved, exposures=Exposures.from_dict(exposures))
                self._move_to(state.resumed(replace(saved, judged_by=judged_by), self._judge))
            self._go_on(model, step=step)

    def state_dict(self) -> dict[str, Any]:
        """All that an interrupted run needs to go on; plain Python and tensors only.

        Save it with every checkpoint (`accelerator.register_for_checkpointing(auditor)` does).
        """
        # Waits for no other process: one alone may save.
        self._weights.wait()
        if self._seen is not None and n_processes() == 1:
            self._look_back(self._seen)
        state: dict[str, Any] = _map_leaves(
            self._state.to_dict(), lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
        )
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over an interrupted run, as `state_dict` left it; call `begin` afterwards as always.

        Its audits are judged anew if they were judged by another budget.

        Raises:
            ReferenceMismatchError: if the state was saved for other canaries or another reference.
            ConfigurationError: if its audits were judged by another score, or it is damaged: names the place.
        """
        arrays = _map_leaves(read_mapping(state, "state"), _as_array)
        self._move_to(self._state.resumed_from_dict(arrays, self._judge))

    def restart(self, model: nn.Module, *, n_audits: int | None) -> None:
        """Start a new run with the reference kept: the weights were trained in between.

        A run that was broken off has weights within the budget still kept; those stay the ones to restore.
        A run that ended has left such weights in the model.

        Args:
            model: The model, with the weights that the new run starts from.
            n_audits: Number of audits that the new run will make.
        """
        self._take_folder()
        self._forget_what_was_said()
        self._weights.start_over(unwrapped(model))
        self._judge = replace(self._judge, n_audits=n_audits)
        self._move_to(self._state.restarted())
        if self._seen is not None:
            self._seen.count_from_here()
            self._seen.watch(model)

    def audit(
        self,
        model: nn.Module,
        *,
        step: int | None = None,
        epoch: float | None = None,
        checkpoint_follows: bool = False,
    ) -> AuditResult:
        """Measure the leakage of the model as it is now, and judge it.

        Args:
            model: The model in training; left exactly as it was found.
            step: Optimizer steps done; by default one more than at the last audit.
            epoch: Epochs done.
            checkpoint_follows: Whether these weights are about to be saved as a checkpoint of safetensors
                files. If `checkpoint_saved` is called then, these files are kept and not all written twice.

        Returns:
            The result; without a budget its `decision` says that there is nothing to stop for.

        Raises:
            ConfigurationError: if `begin` was not called, or `step` is before that of the last audit.
            ModelChangedError: if the model could not be left as it was found, whatever `on_error` says.
            Exception: whatever went wrong in the audit, if `on_error` is `"raise"`.
        """
        if self._state.reference is None or self._state.is_resumed:
            raise ConfigurationError(
                "`begin(model)` must be called before the first optimizer step: the trained model cannot "
                "stand in for the reference."
            )
        if step is None:
            step = self.history[-1].step + 1 if len(self.history) else 1
        self._refuse_earlier(step)
        moment = Moment(step, epoch)
        self._say_if_stop_was_ignored(step)
        with self._watch.audit():
            model = unwrapped(model)
            try:
                self._hold_folder()
                lost = self._weights.look(model)
                if self._seen is not None:
                    self._look_back(self._seen)
                self._choose_subset()
                result = self._measure(model, moment)
            except Exception as error:
                result = self._failed(describe_error(error), moment)
                self._record(result)
                self._weights.note_audited(result)
                # Whatever `on_error` says: training cannot go on, or not with another model. On all or none.
                is_lost = any(gather(isinstance(error, ModelChangedError | BrokenPassError)))
                if self.settings.on_error == "raise" or is_lost:
                    raise
                if self._is_new(result.error or ""):
                    log_error(
                        logger,
                        "The audit at step %d failed, and training goes on (%s).",
                        step,
                        error=error,
                    )
                return result
            is_within = bool(result.decision.is_within_budget)
            if lost and not is_within:
                result = replace(result, findings=(*result.findings, _not_whole(result, lost)))
            self._record(result)
            self._weights.note_audited(result)
            if is_within:
                self._weights.keep(model, step=step, checkpoint_follows=checkpoint_follows)
            self._refuse_contamination(result)
            return result

    def _refuse_earlier(self, step: int) -> None:
        if len(self.history) and step < self.history[-1].step:
            raise ConfigurationError(
                f"Got step {step} after the audit of step {self.history[-1].step}: the steps of a run never "
                "fall. Count optimizer steps from the start of the run, not of the epoch."
            )

    def mark_failed(self, reason: str, *, step: int, epoch: float | None = None) -> AuditResult:
        """Record that no audit could be made at this point: a gap in the curve, where leakage is unknown.

        Args:
            reason: What went wrong. It is kept in the history, which is shown and passed on: quote no record.
            step: Optimizer steps done.
            epoch: Epochs done.

        Raises:
            ConfigurationError: if `step` is before that of the last audit.
        """
        self._refuse_earlier(step)
        with self._watch.audit():
            result = self._failed(reason, Moment(step, epoch))
            self._record(result)
        return result

    def checkpoint_saved(self, model: nn.Module, folder: str | Path) -> list[str]:
        """Say that a checkpoint of the weights that were audited last is written.

        Its safetensors or PyTorch files are read, and their tensors compared with the audited ones.

        Args:
            model: The model, unchanged since that audit.
            folder: Folder that holds it.

        Returns:
            Names of the tensors that it holds with other bits: a checkpoint that was never audited.
        """
        return self._weights.checkpoint_written(unwrapped(model), Path(folder))

    def before_step(self, model: nn.Module) -> None:
        """Say that training goes on: weights whose checkpoint has not come are kept now.

        Needed only where `audit` was told that a checkpoint follows.

        Args:
            model: The model, unchanged since that audit.
        """
        self._weights.before_step(unwrapped(model))

    def audit_of(self, model: nn.Module) -> AuditResult | None:
        """The audit that saw the very weights that the model holds now, to the bit; None if none of them did.

        Others write into models, too: averages of the weights at the end, the best checkpoint. Every process
        must call it.

        Args:
            model: The model.
        """
        return self._weights.audit_of(unwrapped(model))

    def restore_within_budget(
        self, model: nn.Module, optimizer: Any = None, *, is_final: bool = True
    ) -> AuditResult:
        """Restore, in place, the weights of the last audit within the budget; returns that audit.

        It is the last one whose weights could be kept: after a full disk, an earlier one. Every tensor is
        compared with those of that step afterwards, and some canaries are scored again: what is returned has
        been seen. With `keep_rejected` the present weights are written to `over_budget` first. The console
        says what was put back, and what is lost.

        Args:
            model: The model.
            optimizer: Its optimizer: float32 copies of the weights that it may hold, as in mixed precision,
                are restored with the model.
            is_final: Whether the model is left so; if not, nothing is said.

        Raises:
            AuditError: if no such weights were kept, if they cannot be put back whole, or if the model is
                another one afterwards; says what it holds.
        """
        self._is_restore_tried |= is_final
        if self.settings.keep_rejected:
            self._save_rejected(unwrapped(model))
        try:
            kept = self._put_back(unwrapped(model), optimizer)
        except AuditError as error:
            if is_final:
                self._say_new(lines_of_failed_restore(error, self.history))
            raise
        if is_final:
            self._restored = kept
            self._note_left(kept)
            self._say_new(lines_of_restore(kept, self.history, rejected=self.rejected_folder))
        return kept

    def _put_back(self, model: nn.Module, optimizer: Any) -> AuditResult:
        step = self._weights.restore(model, optimizer=optimizer)
        results = [r for r in self.history if r.step == step and r.decision.is_within_budget]
        if not results:
            raise AuditError(
                f"The weights of step {step} are in the model again, and no audit of this run found them "
                "within the budget."
            )
        self._weights.note_audited(results[-1])
        self._state = self._state.with_final_weights(self._weights.digest)
        return results[-1]

    def finish(self, model: nn.Module | None = None) -> None:
        """Say that the run is over, and what it came to: its history is whole, the kept weights are removed.

        The console gets the audits as a table, and what is known of the model that is left. Kept weights stay
        where the model is over budget and `restore_within_budget` was not called.

        Without a model it waits for no other process, so that one alone may call it.

        Args:
            model: The model that is left: it is looked whether its weights are those of an audit, for
                averages may have been copied into it since.
        """
        left = self._left_without_looking() if model is None else self.audit_of(model)
        if model is not None:
            self._state = self._state.with_final_weights(self._weights.digest)
        is_within = left is not None and left.decision.is_within_budget
        can_restore = self.settings.keeps_weights and self.history.is_past_budget
        can_restore &= not self._is_restore_tried and not is_within
        if len(self.history) and not self.settings.judge_only:
            is_restored = left is not None and left is self._restored
            self._say(lines_of_end(self.history, left, is_restored=is_restored, can_restore=can_restore))
        if self._seen is not None:
            self._seen.unwatch()
            self._log_never_fed()
        # Those in the folder are a later run's, if one has taken it.
        is_own = self._lock is None or not self._lock.is_lost
        self._weights.finish(removes_files=is_own and not can_restore)
        if len(self.history):
            self._state = replace(self._state, history=replace(self.history, is_complete=True))
            self._save_audits(may_raise=False)
        if self._lock is not None:
            self._lock.release()

    def _before_training(self, tokenizer: Tokenizer | None, metadata: RunMetadata) -> RunState:
        """The canaries as rows, and an empty history."""
        settings, canaries = self.settings, self.canaries
        encoded = encode_canaries(canaries, tokenizer, max_length=settings.max_length)
        if encoded.n_dropped:
            logger.warning(
                "%d canaries have fewer than two tokens that carry loss and are left out.", encoded.n_dropped
            )
        kept = canaries.select(canaries.indices_of(encoded.record_ids))
        label = reference_label(self._reference_source)
        metadata = replace(metadata, canaries=encoded.fingerprint, reference=label, score=settings.score_name)
        return RunState.before_training(
            CanarySubset(encoded, AnalysisUnits(kept)),
            AuditHistory(
                (), settings.budget, settings.confidence, canaries.describe(), run_metadata=metadata
            ),
            fingerprint=f"{encoded.fingerprint}-{label}",
            score_names=judged_scores(settings.score_name, has_pairs=encoded.has_pairs),
            chooses_subset=settings.max_overhead is not None,
        )

    def _no_kept_weights(self) -> KeptWeights:
        return KeptWeights(None if self._folder is None else self._folder.kept_weights)

    def _move_to(self, state: RunState) -> None:
        """The run stands here now; what its canaries can find out is noted with it."""
        subset = state.subset
        self._state = state.with_metadata(
            n_planned_audits="unknown" if self._judge.n_audits is None else self._judge.n_audits,
            n_scored=len(subset.encoded.rows),
            n_canaries=len(subset.all_encoded.rows),
            power=self._judge.describe_power(subset),
        )

    def _check_surroundings(self, model: nn.Module) -> None:
        """Refuse what makes an audit impossible: how a model is divided, the folder, other canaries."""
        model = unwrapped(model)
        refuse_divisions(model)
        talk_beside_the_model(model)
        self._is_fed_alike = not can_share_records(model)
        self._state = self._state.with_metadata(model=name_of(model), parameters=parameters_of(model))
        folder = self._folder
        if folder is not None:
            on_all_ranks_in_turns(lambda: folder.check_writable() if is_main_process() else None)
        self._take_folder()
        if len(set(gather(self._state.fingerprint))) > 1:
            raise ConfigurationError(
                "The processes hold different canaries: draw them from the whole dataset with the same seed "
                "in every process, before it is divided among them."
            )

    def _take_folder(self) -> None:
        """Nobody else writes into the run's folder from here on."""
        lock = self._lock
        on_all_ranks(lambda: lock.take() if lock is not None and is_main_process() else None)

    def _hold_folder(self) -> None:
        """Refuse to go on where a later run has taken the folder."""
        lock = self._lock
        on_all_ranks(lambda: lock.hold() if lock is not None and is_main_process() else None)

    def _start(self, model: nn.Module, moment: Moment) -> AuditResult:
        """The baseline of a run that starts here."""
        called, model = model, unwrapped(model)
        self._forget_what_was_said()
        self._move_to(self._state.anew())
        self._weights.begin(model)
        self._prepare(model)
        self._log_power()
        self._log_adapters(model)
        result = self._measure(model, moment)
        self._name_run()
        self._check_split()
        on_all_ranks_in_turns(self._save_reference)
        with self._watch.keeping():
            self._record(result)
            self._weights.note_audited(result)
            self._weights.keep_start(model, step=moment.step)
        self._watch_batches(called, step=moment.step)
        self._note_left(result)
        return result

    def _name_run(self) -> None:
        """From here on all that the run writes says to which run it belongs."""
        reference = self._state.reference
        if reference is not None:
            self._state = self._state.named(broadcast_from_main(new_run_id(self._state.subset, reference)))
            self._weights.name(self._state.run_id)

    def _go_on(self, model: nn.Module, *, step: int | None) -> None:
        """The interrupted run has its model again, at this step or, if None, at its last audit."""
        called, model = model, unwrapped(model)
        self._weights.begin(model)
        self._weights.name(self._state.run_id)
        self._weights.take_over(self.history)
        folder, state = self._folder, self._state
        if folder is not None:
            on_all_ranks_in_turns(lambda: folder.refuse_another_run(state) if is_main_process() else None)
        self._prepare(model)
        if step is not None:
            self._move_to(self._state.at_step(step))
        self._say_where_it_stands()
        on_all_ranks_in_turns(self._save_reference)
        within = self.history.last_within_budget
        if step is None:
            step = self.history[-1].step
            is_within = within is self.history[-1] and self._is_audited(model, within)
        else:
            is_within = (
                within is not None and within.step == step and self._is_what_was_audited(model, within)
            )
        self._weights.take_up(
            model,
            step=step,
            is_within=is_within,
            is_within_at=lambda step, weights: self.history.is_within_at(step, weights=weights),
        )
        self._state = replace(self._state, is_resumed=False)
        self._watch_batches(called, step=step)
        self._note_left(self.history[-1])

    def _say_where_it_stands(self) -> None:
        """Name verdicts that were edited, and a last audit that this budget does not let pass."""
        edited = [f for result in self.history for f in result.findings if f.name == CONTRADICTION]
        if edited and is_main_process():
            logger.error("%s", edited[-1].text)
        judged = [result for result in self.history.audits_after_baseline if result.status == "ok"]
        if self.settings.budget is None or not judged or judged[-1].decision.is_within_budget:
            return
        if is_main_process():
            logger.warning(
                "The run goes on from weights that are not known to be within its budget (step %d, %s): the "
                "next audit judges it again.",
                judged[-1].step,
                judged[-1].decision.message,
            )

    def _watch_batches(self, called: nn.Module, *, step: int) -> None:
        """From here on every batch is looked at; what was fed before the run was interrupted still counts."""
        if self.settings.assume_seen:
            return
        state = self._state
        if self._seen is not None:
            self._seen.unwatch()
        before = self._before_here(state.exposures)
        rows = replace(state.subset, share=1.0).encoded.rows
        self._seen = SeenCanaries(rows, before)
        # Steps go on: an own loop may count audits.
        last = int(state.exposures.last_step.max(initial=0))
        self._seen.watch(called, step=max(step, last))

    def _look_back(self, seen: SeenCanaries) -> None:
        """Put together what all processes were fed, and cut the canaries where training cuts its records."""

        def exposures() -> Exposures:
            seen.settle()
            return seen.exposures()

        parts = gather(on_all_ranks(exposures))
        fed = same_exposures(parts) if self._is_fed_alike else add_exposures(parts)
        whole = replace(self._state.subset, share=1.0, cut_to=None).encoded.rows
        n_tokens = np.array([row.n_tokens for row in whole], dtype=np.int64)
        if 0 < fed.cut_to < fed.longest_row:
            fed = whole_again(fed, n_tokens)
            self._log_length("Training does not cut its records any more: whole canaries count from here on.")
            self._look_for(seen, whole, fed)
        elif not fed.cut_to and (to := self._truncation(fed, whole, n_tokens)):
            fed = cut_exposures(fed, n_tokens, to=to, step=seen.n_steps)
            n_cut = int((n_tokens > to).sum())
            self._log_length(
                f"Training feeds at most {to} tokens of a record: the {n_cut} canaries that are longer "
                "are cut."
            )
            self._look_for(seen, [row.cut(to) for row in whole], fed)
        self._state = self._state.with_exposures(fed)

    def _truncation(self, fed: Exposures, rows: Sequence[TokenRow], n_tokens: np.ndarray) -> int:
        """Tokens after which training cuts its records, where the canaries can be cut there; else 0."""
        # Further inputs are not cut here: they come from the trainer's collator, which cuts them itself.
        if any(row.has_further_inputs for row in rows):
            return 0
        to = truncation(fed, n_tokens, tolerance=end_is_uncertain_by(n_tokens))
        return to if to and all(row.cut(to).has_enough_tokens for row in rows) else 0

    def _look_for(self, seen: SeenCanaries, rows: Sequence[TokenRow], fed: Exposures) -> None:
        """Look for the canaries in this form from here on."""
        seen.replace_rows(rows, self._before_here(fed))

    def _before_here(self, fed: Exposures) -> Exposures | None:
        """This process's part of what was fed before: with the others' it is the whole."""
        return fed if is_main_process() or self._is_fed_alike else None

    def _log_length(self, text: str) -> None:
        if is_main_process():
            logger.warning("%s", text)

    def _refuse_contamination(self, result: AuditResult) -> None:
        """Say loudly, or raise if errors are to be raised, that non-members are trained on."""
        found = [finding for finding in result.findings if finding.name == CONTAMINATION]
        if not found or not self._is_new(found[0].text):
            return
        if self.settings.on_error == "raise":
            raise OverlappingCanariesError(found[0].text)
        if is_main_process():
            logger.error("%s", found[0].text)

    def _log_never_fed(self) -> None:
        """Name what was never fed, where no audit could tell that an epoch was over."""
        is_told = len(self.history) and self.history[-1].epoch is not None
        if is_told or not is_main_process() or not self.exposures.n_batches:
            return
        if text := describe_never_fed(self.exposures, self.encoded):
            logger.warning("%s", text)

    def settle_inputs(self, model: nn.Module) -> None:
        """Settle what the model is given of the canaries besides token ids; `begin` does it, too.

        Raises:
            ConfigurationError: if a budget is to decide and training feeds what the canaries, or the model as
                it is called here, cannot be given.
        """
        subset = self._state.subset
        encoded = subset.all_encoded
        not_taken = self._scorer.inputs_not_taken(model, encoded)
        # The same for every token, such as token types of single texts: it tells the model nothing.
        names = frozenset(name for name in not_taken if not encoded.is_constant(name))
        lacking = encoded.lacking_inputs
        problems = [
            f"The trainer's collator returns {_listed(each)}, {reason}."
            for each, reason in (
                (
                    names,
                    "which cannot be handed to the model: its forward pass, or the `logits_fn`, does not "
                    "take it. Leave it out of the batches if the model does not read it, name it as the "
                    "forward pass does, or pass a `logits_fn` with `**inputs`, which is handed all",
                ),
                (
                    lacking,
                    "and for the canaries it does not: draw them with `hold_out_canaries` from the very "
                    "dataset that the trainer is given, with all its columns",
                ),
            )
            if each
        ]
        stripped = replace(subset, all_encoded=encoded.without_inputs(not_taken))
        if not problems:
            if not_taken:
                self._state = replace(self._state, subset=stripped)
            return
        if self.settings.budget is not None:
            raise ConfigurationError(" ".join([*problems, "Scored without, the canaries carry no verdict."]))
        if is_main_process():
            for problem in problems:
                logger.warning("%s The canaries are scored WITHOUT: leakage may read too low.", problem)
        self._state = replace(self._state, subset=stripped)

    def _prepare(self, model: nn.Module) -> None:
        self.settle_inputs(model)
        projection = self._scorer.prepare(model, self._state.subset.all_encoded.rows)
        self._state = self._state.with_metadata(logits=projection.describe())

    def _is_audited(self, model: nn.Module, audit: AuditResult, *, tolerance: float = 0.0) -> bool:
        """Whether the weights are those of an audit, by its figures: a checkpoint may be of a later step."""
        target = self._scorer.statistics(model, self.encoded.rows)
        is_member, members = self.encoded.is_member, self.encoded.is_member
        if audit.n_members_seen is not None and not audit.is_baseline:
            counted = is_member & counted_by(self.exposures, is_member).is_counted
            # Where it is lost what was fed, all of them are compared.
            members = counted if counted.any() else is_member
        loss = mean_loss(target, members) if members.any() else None
        found = (loss, audit.member_loss)
        is_same = None not in found and math.isclose(*found, rel_tol=tolerance, abs_tol=0.0)  # type: ignore[arg-type]
        return broadcast_from_main(is_same)

    def _is_what_was_audited(self, model: nn.Module, audit: AuditResult) -> bool:
        """Whether the checkpoint that a run goes on with holds the weights of its audit; says if not."""
        if not self.settings.keeps_weights or audit.weights == self._weights.digest:
            return True
        is_same = self._weights.holds(model, step=audit.step)
        if is_same is None:
            is_same = self._is_audited(model, audit, tolerance=_SAME_LOSS)
        if not is_same and is_main_process():
            logger.warning(
                "The checkpoint of step %d does not hold the weights that were audited at that step: they "
                "were never audited, and are not kept to be restored.",
                audit.step,
            )
        return is_same

    def _save_rejected(self, model: nn.Module) -> None:
        folder = self._folder
        known = self._weights.audit_of(model)
        # Weights within the budget are no rejected ones.
        if folder is None or (known is not None and known.decision.is_within_budget):
            return
        try:
            self.rejected_folder = save_rejected(model, folder.rejected_weights, step=self.history[-1].step)
        except Exception as error:  # whatever a model's own `save_pretrained` raises: the stop must go on
            if is_main_process():
                log_error(
                    logger,
                    "The weights over the budget could not be written and are gone (%s).",
                    error=error,
                    level=logging.ERROR,
                )

    def _sample(self, model: nn.Module) -> np.ndarray:
        """Log-probabilities of a few canaries' tokens, nats: the same ones, in the same batch, each time."""
        rows = self._state.subset.all_encoded.rows
        chosen = rows[:: max(1, len(rows) // _N_SAMPLED)][:_N_SAMPLED]
        return self._scorer.statistics(model, chosen).log_probs

    def _choose_subset(self) -> None:
        """Choose, once in a run, how many canaries its audits can afford."""
        state, max_overhead = self._state, self.settings.max_overhead
        if max_overhead is None or state.is_subset_chosen:
            return
        share = affordable_share(
            max_overhead,
            training_seconds=self._watch.last_interval,
            # The baseline of a resumed run was made by another process.
            scoring_seconds=self._watch.scoring_seconds or self.history[0].seconds,
            other_seconds=self._watch.keeping_seconds,
            spent_seconds=self._watch.audit_seconds,
            n_audits=self._judge.n_audits,
        )
        # Clocks differ from process to process.
        share = broadcast_from_main(share)
        subset = smallest_subset(state.subset, affordable_share=share, can_judge=self._judge.can_judge)
        self._move_to(state.with_subset(subset))
        is_affordable = subset.share <= share
        if not is_main_process() or (is_affordable and subset.share == 1.0):
            return
        text = " ".join(filter(None, (subset.describe(), self._judge.describe_power(subset))))
        if is_affordable:
            logger.info("To keep audits under %.3g of the training time: %s", max_overhead, text)
        else:
            logger.warning(
                "Audits will take more than %.3g of the training time: fewer canaries could not carry the "
                "figures. %s Audit less often, or raise `max_overhead`.",
                max_overhead,
                text,
            )

    def _log_power(self) -> None:
        """Say before the first step what will hardly be found: it would read as if nothing leaked."""
        power = self._judge.describe_power(self._state.subset)
        if power is not None and is_main_process():
            can_judge = self._judge.can_judge(self._state.subset)
            logger.log(logging.INFO if can_judge else logging.WARNING, "%s", power)

    def _log_adapters(self, model: nn.Module) -> None:
        """Say before the first step what audits of several adapters are about."""
        names = adapter_names(model)
        if len(names) > 1 and is_main_process():
            logger.warning(
                "The model has %d adapters (%s). Audits score it with those that are active at that moment, "
                "and weights that are put back do not switch them: keep the same ones active while it is "
                "trained, or audit each adapter in a run of its own.",
                len(names),
                ", ".join(names),
            )

    def _measure(self, model: nn.Module, moment: Moment) -> AuditResult:
        """One result for all processes, from the main one."""
        with self._watch.scoring():
            target = self._scorer.statistics(model, self.encoded.rows)
        if moment.is_baseline:
            reference = reference_statistics(
                self._reference_source,
                model,
                start=target,
                scorer=self._scorer,
                rows=self.encoded.rows,
            )
            self._state = replace(self._state, reference=reference)
        self._target = target
        attack, own_scores = self.settings.attack, {}
        if attack is not None:
            own_scores = self._scorer.attack_scores(
                attack,
                model,
                self.encoded,
                target=target,
                reference=self.reference or target,
                is_first=moment.is_baseline,
            )
        return broadcast_from_main(on_all_ranks(lambda: self._result(target, own_scores, moment)))

    def _result(
        self, target: TokenStatistics, own_scores: Mapping[str, np.ndarray], moment: Moment
    ) -> AuditResult:
        settings, history, attack = self.settings, self.history, self.settings.attack
        counted = None if moment.is_baseline else self._counted()
        is_fair = attack is None or not attack.is_trained_on_membership
        measured = figures(
            target,
            self.reference or target,
            self._state.subset,
            judged=self._state.blocks.score_names,
            strongest_of=self._judge.strongest_of,
            own_scores=own_scores,
            fpr_levels=settings.reported_fpr_levels,
            confidence=settings.confidence,
            band=None if moment.is_baseline else self._judge.band(history),
            has_epsilon=is_fair and not moment.is_baseline,
            counted=counted,
            previous=None if moment.is_baseline else self._state.previous_of_subset,
            earlier_steps=self._state.blocks.earlier_steps,
        )
        result = AuditResult(
            **vars(moment),
            **vars(measured),
            **self._cost(),
            status="ok",
            score=settings.score_name,
            decision=self._judge.decide(
                {measured.decided_by: measured.metrics, **measured.judged_beside},
                history,
                is_baseline=moment.is_baseline,
                why_unknown="" if counted is None and not self._met_before() else self._why_unknown(),
                lacks=self._judge.lacks(
                    measured.n_members_seen or 0, measured.n_non_members, self._state.subset
                )
                if counted is not None
                else "",
            ),
            batch_size=self._scorer.batch_size,
            weights=self._weights.digest,
        )
        about_feeding = (
            ()
            if counted is None
            else findings_of_feeding(
                self.exposures, self.encoded, epoch=moment.epoch, otherwise=self._scored_otherwise()
            )
        )
        met_before = () if moment.is_baseline else self._met_before()
        return replace(result, findings=(*met_before, *about_feeding, *detect(result, history.results)))

    def _counted(self) -> Counted | None:
        """Which records figures count; None for all, where nobody looks at batches."""
        return None if self._seen is None else counted_by(self.exposures, self.encoded.is_member)

    def _why_unknown(self) -> str:
        """Why what is measured says nothing of what was fed; empty if it does."""
        if self._met_before():
            return "the model, as it was before training, had met one side of the canaries (see the findings)"
        return why_not_seen(self.exposures, self.encoded.is_member) or self._scored_otherwise()

    def _met_before(self) -> tuple[Finding, ...]:
        """That the reference knew one side of a random split before, unless that is allowed."""
        if self.settings.allow_shift:
            return ()
        return tuple(finding for finding in self.history.findings if finding.name == MET_BEFORE)

    def _scored_otherwise(self) -> str:
        """What the batches show that the audit does not give the model; empty if nothing."""
        # A `logits_fn` of the user's own calls the model as the user knows that training does.
        if self._seen is None or self._scorer.logits_fn is not call_for_logits:
            return ""
        return scored_otherwise(
            self._seen.further_inputs,
            self.encoded,
            is_left_padded=self._seen.is_left_padded,
            is_shifted=self._seen.is_shifted,
        )

    def _failed(self, reason: str, moment: Moment) -> AuditResult:
        subset = self._state.subset
        return AuditResult(
            **vars(moment),
            **self._cost(),
            status="failed",
            score=self.settings.score_name,
            n_members=subset.n_members,
            n_non_members=subset.n_non_members,
            decision=Decision(False, None, "the audit failed: leakage is unknown"),
            error=reason,
        )

    def _cost(self) -> dict[str, Any]:
        watch = self._watch
        return {"seconds": watch.seconds, "overhead": watch.overhead, "share": self._state.subset.share}

    def _record(self, result: AuditResult) -> None:
        earlier = self.history
        self._state = self._state.with_result(result, self._target)
        self._note_left(result)
        if is_main_process():
            self._say([Line(logging.WARNING if result.decision.stop else logging.INFO, result.describe())])
            for finding in result.findings:
                # Of the baseline's, the caveat says all.
                if result.is_baseline or finding.name == CONTAMINATION:
                    continue
                # What was found before is mostly found soon: not all audits are looked through.
                if all(finding.name != other.name for before in earlier for other in before.findings):
                    logger.warning("%s", finding.text)
        # Before the first step a folder that cannot be written is the user's to mend.
        may_raise = result.is_baseline or self.settings.on_error == "raise"
        on_all_ranks_in_turns(lambda: self._save_audits(may_raise=may_raise))

    def _save_audits(self, *, may_raise: bool) -> None:
        if self._folder is None or self._lock is None or not is_main_process():
            return
        # What fails may leave anything: the next audit writes all anew.
        saved, self._saved = self._saved, None
        try:
            self._lock.hold()
            self._folder.save_audits(self._state, after=saved)
        except ConfigurationError as error:
            if self._is_new(str(error)):
                logger.warning("The audit is not written: %s", error)
        except OSError as error:
            if may_raise:
                raise
            if self._is_new(str(error)):
                logger.warning("The audit history could not be written: %s", error)
        else:
            # Its statistics are large, and no longer needed.
            self._saved = replace(self._state, last_audit=None)

    def _say(self, lines: Iterable[Line]) -> None:
        """Say something on the console; of a run that is over its caller has the word."""
        for line in lines:
            if not self.settings.judge_only:
                say(logger, line.text, level=line.level)
            elif is_main_process():
                logger.log(line.level, "%s", line.text)

    def _say_new(self, lines: Iterable[Line]) -> None:
        """Say what was not said before: who puts weights back twice has done so once."""
        self._say(line for line in lines if self._is_new(line.text))

    def _forget_what_was_said(self) -> None:
        """Another run begins."""
        self._said.clear()
        self._restored, self._is_restore_tried = None, False

    def _is_new(self, text: str) -> bool:
        """Whether this was not said before; from now on it was."""
        is_new = text not in self._said
        self._said.add(text)
        return is_new

    def _say_if_stop_was_ignored(self, step: int) -> None:
        stopped = self.history.stopped
        if stopped is None or self._is_restore_tried or step <= stopped.step:
            return
        restore = "call `restore_within_budget(model, optimizer)` and " if self.settings.keeps_weights else ""
        text = f"The audit of step {stopped.step} said STOP, and training goes on: {restore}end the loop."
        self._say_new([Line(logging.WARNING, text)])

    def _note_left(self, result: AuditResult) -> None:
        self._left, self._left_at = result, self.n_steps_seen

    def _left_without_looking(self) -> AuditResult | None:
        """The audit of what the model holds; None if optimizer steps were seen since."""
        self.notice_step()
        return self._left if self.n_steps_seen == self._left_at else None

    def _save_reference(self) -> None:
        if self._folder is not None and is_main_process():
            self._folder.save_reference(self._state)

    def _check_split(self) -> None:
        """Look for what would make the figures say something else than leakage, before it is too late."""
        state, settings = self._state, self.settings
        report = broadcast_from_main(
            on_all_ranks_in_turns(
                lambda: (
                    check_split(
                        state.subset.units.canaries,
                        state.reference_of_subset,
                        training_records=self._training_records,
                        confidence=settings.confidence,
                    )
                    if is_main_process() and state.reference_of_subset is not None
                    else None
                )
            )
        )
        if report is None:
            return
        self._state = state.with_checks(findings_of_split(report), caveat=report.headline)
        if settings.budget is not None and not settings.allow_shift:
            refuse_blind_split(report)
        if report.headline and is_main_process():
            logger.warning("%s", report.headline)


def _not_whole(result: AuditResult, reason: str) -> Finding:
    """What must be said at the audit at which the kept weights cannot be put back any more."""
    is_over = result.decision.is_within_budget is False
    return Finding(
        "kept weights",
        True,
        f"The weights kept within the budget cannot be put back whole: {reason}. The model "
        f"{'is' if is_over else 'may be'} OVER BUDGET and a stop would leave it so.",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _check_attack_fits(attack: Attack | None, canaries: CanarySet) -> None:
    is_structured = canaries.groups is not None or len(canaries.tiers) > 1
    if attack is not None and attack.is_trained_on_membership and is_structured:
        raise ConfigurationError(
            f"The attack {attack.name!r} is trained on the canaries, and these have groups or several "
            "tiers of copies, which its folds would tear apart: use a built-in score, or canaries without."
        )


def _as_array(value: Any) -> Any:
    """A tensor as an array; anything else, also a tensor that is none, as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    try:
        return value.detach().cpu().numpy()
    except (TypeError, RuntimeError):
        return value


def _map_leaves(value: Any, change: Callable[[Any], Any], *, n_levels: int = 3) -> Any:
    """Nested mappings with every other value changed.

    Args:
        value: The outermost mapping.
        change: What to do.
        n_levels: Levels of mappings; what is nested deeper is not what `state_dict` returns, and stays.
    """
    if isinstance(value, Mapping) and n_levels > 0:
        return {name: _map_leaves(item, change, n_levels=n_levels - 1) for name, item in value.items()}
    return change(value)
