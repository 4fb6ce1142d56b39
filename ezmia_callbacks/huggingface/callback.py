"""`PrivacyAuditCallback` for the Hugging Face Trainer and everything built on it.

It translates hooks, obeys the decision, logs, and keeps state; measuring is the auditor's work.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ezmia_callbacks.audit.auditor import PrivacyAuditor
from ezmia_callbacks.audit.cadence import AuditPlan, Cadence, early_steps, ends_epochs
from ezmia_callbacks.audit.run_folder import RunFolder
from ezmia_callbacks.audit.settings import AuditSettings, OnError
from ezmia_callbacks.audit.zero import refuse_unproven
from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.console import write_warnings_above_bars
from ezmia_callbacks.distributed import (
    broadcast_from_main,
    is_main_process,
    on_all_ranks,
    on_all_ranks_in_turns,
)
from ezmia_callbacks.divisions import refuse_split_records
from ezmia_callbacks.errors import AuditError, ConfigurationError, ReferenceMismatchError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.huggingface.checkpoint_notes import CheckpointNotes, KeptInState, kept_in_state
from ezmia_callbacks.huggingface.checkpoints import (
    checkpoint_intervals,
    evaluation_intervals,
    is_best_by_leakage,
    may_save_next,
    planned_audits,
    set_aside_unaudited,
    steps_between,
    steps_per_epoch,
)
from ezmia_callbacks.huggingface.hold_out import HeldOut
from ezmia_callbacks.huggingface.last_word import LastWord
from ezmia_callbacks.huggingface.trainer_access import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerReference,
    TrainerState,
    TrainingArguments,
    autocast,
    called_by_loop,
    log_unprinted,
    n_batches,
    run_folder,
    save_state,
    saved_state,
    sums_all_metrics,
    tokenizer_of,
    would_be_pushed,
)
from ezmia_callbacks.huggingface.trainer_feed import (
    as_fed_by_trainer,
    draw_from_trainer,
    training_records,
)
from ezmia_callbacks.reference.sources import ReferenceSource
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.scoring.attack import Attack
from ezmia_callbacks.scoring.forward import call_for_logits, evaluation_without_side_effects
from ezmia_callbacks.scoring.projection import LogitsFunction
from ezmia_callbacks.shells.checkpoint_folders import checkpoint_folder, checkpoints_in, step_of
from ezmia_callbacks.shells.membership_check import is_indexable
from ezmia_callbacks.shells.messages import (
    check_canaries,
    log_other_checkpoint,
    log_other_weights,
    log_restarted,
    reference_source,
    say_first_audit,
    say_start,
)
from ezmia_callbacks.shells.runs import RunsOfOneCallback
from ezmia_callbacks.shells.schedule_free import forget_undone_steps, swaps_weights, weights_for_use
from ezmia_callbacks.shells.trackers import audit_settings, log_settings, log_verdict

__all__: list[str] = []

# With the prefix no class name, so that Trainer leaves it alone and still saves it with every checkpoint.
_STATE_KEY = "ezmia/privacy_audit:"
_FOLDER = "_privacy_audit"


class PrivacyAuditCallback(TrainerCallback):  # type: ignore[misc]  # skipped import
    """Audits membership leakage while a Hugging Face trainer trains, and stops it at the budget.

    Before the first step the model's token statistics on the canaries are kept as the reference. At each
    audit one forward pass over the canaries shows what training changed; figures go to
    `trainer.state.log_history` and every tracker, one line goes to the console, and everything to
    `<output_dir>/_privacy_audit/history.jsonl`. When the budget is crossed, the weights of the last audit
    inside it are restored at once, nothing over budget is saved, and training ends. Training itself is
    not changed by one bit.

    Under a budget every checkpoint is audited before it is written, at whatever step that is, so that none
    on the disk is over it; these audits come on top of `every`.

    Args:
        canaries: Records with known membership, from `hold_out_canaries`. `"hold_out"` has the callback draw
            them itself by that function, when the trainer is made, and takes the non-members out of the
            trainer's training set. None draws members from that set and non-members from the evaluation
            set: the split is then the user's, and figures include any difference between the two sets.
        budget: When to stop; None only measures.
        every: When to audit: `"epoch"`, an integer number of optimizer steps, or a fraction of an epoch in
            (0, 1). `"auto"` audits at the end of each epoch, and under a budget also after an eighth, a
            quarter and half of the first, so that a run over budget keeps a part of it. The last step is
            always audited.
        reference: What the model is compared with: `"auto"`, the model at the start of this run; `"adapter"`,
            the base under its disabled PEFT adapters; `"copy"`, a frozen float32 copy of the start; a
            module; or the path or hub id of a checkpoint.
        score: What decides. `"strongest"`: EZ, loss difference, WBC and loss, of preference pairs also the
            margin, are judged together, and whichever leaks most decides, as an attacker would use it. Else
            one score, by its name or as an `Attack` of your own. Others are shown beside it.
        fpr_levels: False-positive rates at which the true-positive rate is reported.
        confidence: Confidence of the intervals, in (0, 1); without a budget also of the bands.
        n_members: Members drawn when no canaries are given, at most.
        n_non_members: Non-members drawn when no canaries are given, at most.
        seed: Seed of that draw.
        max_length: Truncation of canaries that are raw text; give what training uses. TRL trainers and
            tokenized canaries do not need it.
        batch_size: Records in a forward pass; by default the trainer's evaluation batch size.
        max_overhead: Share of the training time, in (0, 1), that audits may take. The first audit after the
            baseline then chooses a subset of the canaries that keeps to it, for all audits of the run, by the
            time that training took until then; never fewer than the budget needs. None scores all canaries.
        output_dir: Folder for the history, the reference statistics and the kept weights; by default
            `_privacy_audit` in the trainer's own.
        restore: Restore the weights of the last audit within the budget when stopping.
        keep_rejected: At a stop, write the weights over budget to `over_budget` in the run's folder, before
            those within it are restored; else they are gone.
        prefix: Put before every metric name. (The trackers' own integration adds `train/`.)
        on_error: What an error in an audit after the first step does: `"warn"` marks a gap in the curve and
            lets training go on, `"raise"` ends it. Errors before the first step are always raised.
        allow_shift: Let a budget decide although members and non-members, in a split that this library did
            not draw, can be told apart without the model: figures then include that difference. Or although
            the model has met one side of a split that it did draw: figures then read too low, or too high.
        assume_seen: Believe that every member is trained on and no non-member is, for training whose batches
            cannot be looked at. By default figures and verdicts are of the members that batches held.
        logits_fn: `logits_fn(model, input_ids, attention_mask)` returns logits (batch, length, vocabulary);
            None calls the model as Hugging Face's are called. With a parameter `**inputs` it is also given
            what else training feeds, by name.
        trainer: The trainer, if it cannot be found (it can, unless hooks are called by hand).

    Attributes:
        canaries: The canaries that were given, or held out of the trainer that began last; None before, and
            where they are drawn from the trainer's two datasets.
        history: All audits so far of the newest run.
        histories: Those of all runs, the oldest first: one callback may serve several trainers, one after the
            other, as in folds or sweeps. Each run has a folder of its own: `_privacy_audit`,
            `_privacy_audit_2`, ...
        auditor: The auditor; None before training begins.

    Raises:
        ConfigurationError: if an argument is outside its range.

    Examples:
        >>> from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback
        >>> from transformers import Trainer
        >>> callback = PrivacyAuditCallback(budget=LeakageBudget(metric="auc", limit=0.60))
        >>> trainer = Trainer(..., callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        canaries: CanarySet | Literal["hold_out"] | None = None,
        *,
        budget: LeakageBudget | None = None,
        every: Cadence = "auto",
        reference: ReferenceSource | str | Path = "auto",
        score: str | Attack = "strongest",
        fpr_levels: Sequence[float] = (0.01, 0.1),
        confidence: float = 0.95,
        n_members: int = 500,
        n_non_members: int = 1000,
        seed: int = 0,
        max_length: int | None = None,
        batch_size: int | None = None,
        max_overhead: float | None = None,
        output_dir: str | Path | None = None,
        restore: bool = True,
        keep_rejected: bool = False,
        prefix: str = "privacy/",
        on_error: OnError = "warn",
        allow_shift: bool = False,
        assume_seen: bool = False,
        logits_fn: LogitsFunction | None = None,
        trainer: Any = None,
    ) -> None:
        self.settings = AuditSettings(
            budget=budget,
            every=every,
            reference=reference,
            score=score,
            fpr_levels=fpr_levels,
            confidence=confidence,
            n_members=n_members,
            n_non_members=n_non_members,
            seed=seed,
            max_length=max_length,
            batch_size=batch_size,
            max_overhead=max_overhead,
            output_dir=output_dir,
            restore=restore,
            keep_rejected=keep_rejected,
            prefix=prefix,
            on_error=on_error,
            allow_shift=allow_shift,
            assume_seen=assume_seen,
        )
        check_canaries(canaries, may_hold_out=True)
        self.canaries = None if isinstance(canaries, str) else canaries
        self._held_out = HeldOut(seed=seed) if isinstance(canaries, str) else None
        self.logits_fn = logits_fn
        self.auditor: PrivacyAuditor | None = None
        self._trainer = TrainerReference(trainer)
        self._begun_with: weakref.ref[nn.Module] | None = None
        self._runs = RunsOfOneCallback()
        self._state: TrainerState | None = None
        self._is_ended = False
        self._early_steps: frozenset[int] = frozenset()
        self._older_checkpoints: dict[Path, float] = {}
        self._restored_result: AuditResult | None = None
        self._hidden_best: tuple[float | None] | None = None
        self._is_given_up = False
        self._notes: CheckpointNotes | None = None
        self._noted_step: int | None = None
        if trainer is not None:
            # It is made already.
            self._draw(trainer)

    def __getstate__(self) -> dict[str, Any]:
        # Ray and spawn pickle callbacks; model and auditor belong to this process.
        return {**self.__dict__, "_begun_with": None, "auditor": None, "_state": None}

    @property
    def history(self) -> AuditHistory:
        """All audits so far, the baseline first."""
        if self.auditor is None:
            return AuditHistory((), self.settings.budget, self.settings.confidence)
        return self.auditor.history

    @property
    def histories(self) -> tuple[AuditHistory, ...]:
        """The audits of every run that this callback has audited, the newest last."""
        return self._runs.histories(self.auditor)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the non-members out of the training set, if that was asked for, before anything reads it."""
        if self._held_out is not None:
            self._draw(self._trainer.anew(self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the reference and make the baseline audit, before the first optimizer step."""
        # Here, for in the processes of Ray callbacks are not made but unpickled.
        write_warnings_above_bars()
        trainer, model = self._trainer.anew(self), kwargs["model"]
        self._state = state
        LastWord.put_last(trainer, self)
        _refuse_unsupported(trainer, restore=self._guards_checkpoints)
        self._refuse_a_double(trainer)
        _refuse_pushing(trainer, self._folder(trainer))
        self._older_checkpoints = checkpoints_in(run_folder(trainer))
        self._is_ended = False
        self._restored_result = None
        self._hidden_best = None
        self._is_given_up = False
        plan = self._plan(args, state, kwargs.get("train_dataloader"))
        is_restart = self._begun_with is not None and self._begun_with() is model
        if state.global_step == 0 and is_restart and self.auditor is not None:
            self._restart(state, model, plan)
            return
        self._runs.begin(self.auditor, self._base_folder(trainer), is_new=state.global_step == 0)
        self.auditor = on_all_ranks(lambda: self._make_auditor(trainer, args, model, plan))
        self._begun_with = weakref.ref(model)
        if state.global_step > 0:
            saved = self._saved(state)
            self._begin_part(trainer, state)
            with weights_for_use(kwargs.get("optimizer")):
                self.auditor.resume(
                    model,
                    saved["history"],
                    step=state.global_step,
                    exposures=saved.get("exposures"),
                    judged_by=saved.get("judged_by"),
                    run_id=saved.get("run_id"),
                )
            self.auditor.watch(called_by_loop(trainer))
            self._keep_in(state)
            return
        self._begin_part(trainer, state)
        say_start(self.auditor, self.settings.budget)
        result = self.auditor.begin(model, step=0, epoch=0.0)
        self._keep_in(state)
        self.auditor.watch(called_by_loop(trainer))
        self._publish(trainer, state, control, result)
        say_first_audit(plan, self.settings)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit early, every `every` steps or every fraction of an epoch, and before a checkpoint."""
        self._refuse_another_run(state)
        if self.auditor is not None:
            self.auditor.step_done(state.global_step)
        interval = steps_between(self.settings.cadence, state)
        is_due = state.global_step in self._early_steps
        is_due |= interval is not None and state.global_step % interval == 0
        if is_due or self._needs_figures(args, control):
            self._audit(state, control, **kwargs)
        self._veto_save(control)
        if may_save_next(args, control):
            self._note(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit at the end of each epoch, before a checkpoint, and at the end of training in any case."""
        self._refuse_another_run(state)
        self._show_best(state)
        self._forget_newer_best(state)
        if self.auditor is not None:
            # The checkpoint of this step has come by now, or will not.
            self.auditor.before_step(kwargs["model"])
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        if ends_epochs(self.settings.cadence) or is_last or self._needs_figures(args, control):
            self._audit(state, control, **kwargs)
        if is_last and self._is_past_budget:
            self._restore(args, state, **kwargs)
        self._veto_save(control)
        if may_save_next(args, control):
            self._note(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """Offer the figures of the model's weights as `eval_privacy_*`, for `metric_for_best_model`."""
        is_other = self._state is not state
        if metrics is None or is_other or not len(self.history) or not self._find_trainer().is_in_train:
            return
        result = self._restored_result or self.history[-1]
        offered = {f"eval_privacy_{name}": value for name, value in result.to_metrics().items()}
        best = "eval_" + (args.metric_for_best_model or "").removeprefix("eval_")
        if is_best_by_leakage(args):
            # A failed audit has no figure: not a number is never the best, an absent one ends training.
            offered.setdefault(best, math.nan)
        if sums_all_metrics(self._find_trainer()):
            offered = {name: value for name, value in offered.items() if name == best}
        metrics.update(offered)
        if self._is_past_budget:
            self._hide_best(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give back what `on_evaluate` hid; the weights are about to change."""
        self._show_best(state)
        if self.auditor is not None:
            self.auditor.before_step(kwargs["model"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that what was saved is what was audited; its files stand for the kept weights then."""
        # A checkpoint that another callback asked for, after this one.
        if self._state is state and self._noted_step != state.global_step:
            self._note(state)
        if self.auditor is None or not self._guards_checkpoints:
            return
        trainer, model = self._find_trainer(), kwargs["model"]
        # A schedule-free optimizer has the trainer save the weights that it trains on.
        if swaps_weights(kwargs.get("optimizer")):
            return
        if self.auditor.audit_of(model) is None:
            # Another callback asked for this checkpoint, or has written into the model.
            self._audit(state, control, is_anew=True, **kwargs)
        folder = checkpoint_folder(run_folder(trainer), state.global_step)
        differing = self.auditor.checkpoint_saved(model, folder)
        if differing:
            log_other_checkpoint(folder, differing)
        if differing or self._is_past_budget:
            self._set_aside(trainer, after_step=state.global_step - 1)
            if step_of(state.best_model_checkpoint) == state.global_step:
                state.best_model_checkpoint = state.best_global_step = state.best_metric = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit what was trained after the last audit, and restore what is within the budget."""
        self._refuse_another_run(state)
        self._show_best(state)
        if self.auditor is None:
            return
        self.auditor.before_step(kwargs["model"])
        # Callbacks may have been added meanwhile.
        LastWord.put_last(self._find_trainer(), self)
        # Others may have ended training after an evaluation, which is after this callback's last hook.
        is_best_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not is_best_loaded and not self._is_ended:
            if not self._is_audited(state):
                with weights_for_use(kwargs.get("optimizer")):
                    self.auditor.audit(kwargs["model"], step=state.global_step, epoch=self._epoch(state))
            if self._is_past_budget:
                self._restore(args, state, **kwargs)

    def say_last_word(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Say what the run came to, and remove the kept weights; after every other callback's end.

        Others copy averages of the weights into the model there: what they leave is audited as it is.
        """
        auditor = self.auditor
        if auditor is None:
            return
        model = kwargs["model"]
        with weights_for_use(kwargs.get("optimizer")):
            known = auditor.audit_of(model)
            if known is None:
                known = auditor.audit(model, step=state.global_step, epoch=self._epoch(state))
                log_other_weights(known)
        if self._guards_checkpoints and known.decision.is_within_budget is False and not self._is_given_up:
            self._is_ended = False
            self._restore(args, state, **kwargs)
        with weights_for_use(kwargs.get("optimizer")):
            auditor.finish(model)

    @property
    def _state_key(self) -> str:
        return _STATE_KEY + self.settings.prefix

    def _refuse_another_run(self, state: TrainerState) -> None:
        """Runs may follow one another; one whose trainer is not the last one to begin has lost its audit."""
        if self._state is not None and self._state is not state:
            raise ConfigurationError(
                "Another trainer has begun with this PrivacyAuditCallback while this one was training: give "
                "each its own callback, or train them one after the other."
            )

    def _refuse_a_double(self, trainer: Trainer) -> None:
        """Two callbacks that write to one place would lose one curve, and resume with the other's."""
        others = [
            callback
            for callback in trainer.callback_handler.callbacks
            if isinstance(callback, PrivacyAuditCallback) and callback is not self
        ]
        for other in others:
            if self.settings.keeps_weights and other.settings.keeps_weights:
                raise ConfigurationError(
                    "Two PrivacyAuditCallbacks with a budget would each put weights back, and audit what the "
                    "other one has put back: give one of them `restore=False`, or no budget."
                )
            is_same_folder = other._folder(trainer) == self._folder(trainer)
            if is_same_folder or other.settings.prefix == self.settings.prefix:
                raise ConfigurationError(
                    "Two PrivacyAuditCallbacks share a `prefix` or an `output_dir`: give each its own, for "
                    f"example prefix='{self.settings.prefix.rstrip('/')}_2/' and "
                    f"output_dir='{self._folder(trainer)}_2'."
                )

    @property
    def _guards_checkpoints(self) -> bool:
        return self.settings.keeps_weights

    @property
    def _is_past_budget(self) -> bool:
        """By the last audit that did not fail; a failed one shows no way back."""
        return self._guards_checkpoints and self.history.is_past_budget

    def _is_audited(self, state: TrainerState) -> bool:
        return len(self.history) > 0 and self.history[-1].step == int(state.global_step)

    def _needs_figures(self, args: TrainingArguments, control: TrainerControl) -> bool:
        guards = self._guards_checkpoints and may_save_next(args, control)
        return guards or bool(control.should_evaluate and is_best_by_leakage(args))

    def _epoch(self, state: TrainerState) -> float | None:
        """Epochs done; of a stream the trainer counts the share of the steps instead, which is none."""
        return state.epoch if is_indexable(self._find_trainer().train_dataset) else None

    def _begin_part(self, trainer: Trainer, state: TrainerState) -> None:
        """From here on checkpoints are of this part of the run; no more of it is in what may be pushed."""
        self._notes = broadcast_from_main(CheckpointNotes.anew(self._folder(trainer) / "checkpoints"))
        self._noted_step = None
        self._keep_in(state)

    def _keep_in(self, state: TrainerState) -> None:
        """Have the state say which part of which run its checkpoints are of."""
        if self._notes is not None:
            kept = KeptInState.of(self._notes.part, self.history.run_metadata.run_id)
            save_state(state, self._state_key, asdict(kept))

    def _note(self, state: TrainerState) -> None:
        """Keep what the checkpoint of this step needs to go on."""
        if self.auditor is None or self._notes is None:
            return
        self._noted_step = state.global_step
        self.auditor.look_back()
        notes, auditor = self._notes, self.auditor

        def write() -> None:
            if not is_main_process():
                return
            steps = map(step_of, checkpoints_in(run_folder(self._find_trainer())))
            note = {
                "run_id": self.history.run_metadata.run_id,
                "history": self.history.to_dicts(),
                "exposures": auditor.exposures_of_all.to_dict(),
                "judged_by": self.history.judged_by,
            }
            notes.write(state.global_step, note, checkpoints={step for step in steps if step is not None})

        on_all_ranks_in_turns(write)

    def _saved(self, state: TrainerState) -> Mapping[str, Any]:
        """What was kept for the checkpoint that training goes on from."""
        kept = saved_state(state, self._state_key)
        if isinstance(kept, Mapping) and "history" in kept:  # as the first version kept it
            return kept
        found = kept_in_state(kept)
        if found is None:
            raise ReferenceMismatchError(
                f"Training resumes at step {state.global_step} from a checkpoint that was made without this "
                "callback (or with another `prefix`), and trained weights cannot stand in for the reference. "
                "Start over with the callback; or load the weights alone and train without "
                "`resume_from_checkpoint`: leakage is then counted from those weights on."
            )
        folder = self._folder(self._find_trainer())

        def read() -> Mapping[str, Any]:
            note = CheckpointNotes(folder / "checkpoints", found.part).read(state.global_step)
            if note is not None:
                return note
            history = RunFolder(folder).history()
            if history is not None and not found.is_of(history.run_metadata.run_id):
                raise ReferenceMismatchError(
                    f"The checkpoint belongs to the run {found.run}, and the files in {folder} to the run "
                    f"{history.run_metadata.run_id or 'without a name'}: pass the `output_dir` of the run "
                    "that is resumed, and give every run its own."
                )
            return {"history": [] if history is None else history.to_dicts()}

        return broadcast_from_main(on_all_ranks_in_turns(lambda: read() if is_main_process() else {}))

    def _veto_save(self, control: TrainerControl) -> None:
        if self._is_past_budget:
            control.should_save = False

    def _hide_best(self, state: TrainerState) -> None:
        """Let no evaluation of an over-budget model be the best one, whatever the save strategy.

        Trainer decides between this hook and the next, and nothing compares as better than NaN. The
        metrics themselves stay what they are.
        """
        if self._hidden_best is None:
            self._hidden_best = (state.best_metric,)
        state.best_metric = math.nan

    def _show_best(self, state: TrainerState) -> None:
        if self._hidden_best is not None:
            (state.best_metric,) = self._hidden_best
            self._hidden_best = None

    def _audit(
        self,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any = None,
        is_anew: bool = False,
        **kwargs: Any,
    ) -> None:
        auditor = self.auditor
        if auditor is None:
            raise ConfigurationError(
                "The callback was added after training began: pass it in `callbacks=[...]`."
            )
        # A stop in mid-epoch still fires the end of the epoch.
        if self._is_audited(state) and not is_anew:
            return
        with weights_for_use(optimizer):
            result = auditor.audit(
                model,
                step=state.global_step,
                epoch=self._epoch(state),
                checkpoint_follows=control.should_save and not is_anew and not swaps_weights(optimizer),
            )
        trainer = self._find_trainer()
        self._publish(trainer, state, control, result)
        if result.decision.stop:
            control.should_training_stop = True
            if self.settings.restore:
                self._restore(trainer.args, state, model=model, optimizer=optimizer)

    def _restore(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Restore the weights of the last audit within the budget, and let no later checkpoint stand."""
        auditor = self.auditor
        if auditor is None or self._is_ended:
            return
        self._is_ended = True
        forget_undone_steps(optimizer)
        try:
            kept = auditor.restore_within_budget(model, optimizer=optimizer)
        except AuditError:
            # The auditor has said so.
            self._is_given_up = True
            return
        self._restored_result = kept
        self._forget_newer_best(state)
        self._set_aside(self._find_trainer(), after_step=kept.step)

    def _forget_newer_best(self, state: TrainerState) -> None:
        """Trainer would load its best checkpoint last of all: not one newer than the weights restored."""
        kept, best_step = self._restored_result, step_of(state.best_model_checkpoint)
        if kept is not None and best_step is not None and best_step > kept.step:
            state.best_model_checkpoint = state.best_global_step = state.best_metric = None
            self._hidden_best = None

    def _set_aside(self, trainer: Trainer, *, after_step: int) -> None:
        """Move checkpoints that were not audited, or not as they were saved, to where none is taken up."""
        if is_main_process():
            set_aside_unaudited(
                run_folder(trainer),
                after_step=after_step,
                into=self._folder(trainer) / "over_budget",
                older=self._older_checkpoints,
            )

    def _folder(self, trainer: Trainer) -> Path:
        return self._runs.folder(self._base_folder(trainer))

    def _base_folder(self, trainer: Trainer) -> Path:
        run, output_dir = run_folder(trainer), Path(trainer.args.output_dir)
        # Of names that begin so, those that stand directly in the trainer's folder alone are not pushed.
        folder = Path(self.settings.output_dir or output_dir / _FOLDER)
        return folder / run.name if run != output_dir else folder

    def _publish(
        self, trainer: Trainer, state: TrainerState, control: TrainerControl, result: AuditResult
    ) -> None:
        """Log to trackers, `log_history` and callbacks; the console has had a line of its own."""
        payload = {f"{self.settings.prefix}{name}": value for name, value in result.to_metrics().items()}
        reporters = trainer.callback_handler.callbacks
        if result.is_baseline and is_main_process():
            settings = audit_settings(self.history, self.settings)
            log_settings(reporters, settings, prefix=self.settings.prefix)
        # Logging resets the flag by which Trainer is about to log its own loss.
        should_log = control.should_log
        try:
            log_unprinted(trainer, payload)
        finally:
            control.should_log = should_log
        if is_main_process():
            log_verdict(reporters, result.describe(), prefix=self.settings.prefix, step=result.step)

    def _restart(self, state: TrainerState, model: nn.Module, plan: AuditPlan) -> None:
        """The same weights train on from step 0: a second `train()`, or a smaller batch after an OOM."""
        log_restarted()
        if self.auditor is not None:
            self.auditor.restart(model, n_audits=plan.n_audits)
            self.auditor.watch(called_by_loop(self._find_trainer()))
            self._begin_part(self._find_trainer(), state)

    def _make_auditor(
        self, trainer: Trainer, args: TrainingArguments, model: nn.Module, plan: AuditPlan
    ) -> PrivacyAuditor:
        # Tokenizers, collators and datasets may draw random numbers.
        with evaluation_without_side_effects(model):
            canaries = self._prepare_canaries(trainer)
        settings = replace(
            self.settings,
            reference=reference_source(self.settings.reference, model=model),
            batch_size=self.settings.batch_size or args.per_device_eval_batch_size,
            output_dir=self._folder(trainer),
        )
        return PrivacyAuditor(
            canaries,
            **settings.auditor_arguments(),
            n_audits=plan.n_audits,
            tokenizer=tokenizer_of(trainer),
            training_records=training_records(trainer),
            show_progress=not args.disable_tqdm,
            logits_fn=self.logits_fn or call_for_logits,
            autocast=lambda: autocast(trainer),
        )

    def _draw(self, trainer: Trainer) -> None:
        if self._held_out is None:
            return
        callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, PrivacyAuditCallback)]
        others = [c._held_out for c in callbacks if c is not self and c._held_out is not None]
        self._held_out.draw(trainer, others=others)

    def _prepare_canaries(self, trainer: Trainer) -> CanarySet:
        if self._held_out is not None:
            self.canaries = self._held_out.of(trainer)
        if self.canaries is None:
            return draw_from_trainer(
                trainer,
                n_members=self.settings.n_members,
                n_non_members=self.settings.n_non_members,
                seed=self.settings.seed,
            )
        return as_fed_by_trainer(trainer, self.canaries, max_length=self.settings.max_length)

    def _plan(self, args: TrainingArguments, state: TrainerState, loader: Any) -> AuditPlan:
        """When this run will be audited; the early steps are kept."""
        per_epoch = steps_per_epoch(args, state, n_batches(loader))
        n_steps = int(state.max_steps)
        self._early_steps = early_steps(self.settings.cadence, n_steps=min(per_epoch or n_steps, n_steps))
        intervals = [self.settings.cadence]
        if self._guards_checkpoints:
            intervals += checkpoint_intervals(args, state)
        if is_best_by_leakage(args):
            intervals += evaluation_intervals(args, state)
        return planned_audits(intervals, state, early=self._early_steps, per_epoch=per_epoch)

    def _find_trainer(self) -> Trainer:
        return self._trainer.of(self)


def _refuse_pushing(trainer: Trainer, folder: Path) -> None:
    """Who was in the training set is not pushed to the hub with the model."""
    if would_be_pushed(trainer, folder):
        output_dir = trainer.args.output_dir
        raise ConfigurationError(
            f"`push_to_hub` would upload the audit's folder {str(folder)!r}, which tells who was in the "
            f"training set: leave `output_dir` out of the callback, or pass one outside of {output_dir!r}, "
            f"or one whose name begins with an underscore, {str(Path(output_dir) / f'_{folder.name}')!r}."
        )


def _refuse_unsupported(trainer: Trainer, *, restore: bool) -> None:
    if restore:
        refuse_unproven(called_by_loop(trainer))
    refuse_split_records(getattr(trainer.accelerator, "parallelism_config", None))
