"""`PrivacyAuditCallback` for Lightning, under either of its names: `lightning` and `pytorch_lightning`.

It translates hooks, obeys the decision, logs, and keeps
state; measuring is the auditor's work.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ezmia_callbacks.audit.auditor import PrivacyAuditor
from ezmia_callbacks.audit.cadence import AuditPlan, Cadence, early_steps, ends_epochs
from ezmia_callbacks.audit.settings import AuditSettings, OnError
from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.console import write_warnings_above_bars
from ezmia_callbacks.distributed import is_main_process, on_all_ranks
from ezmia_callbacks.errors import (
    AuditError,
    ConfigurationError,
    ReferenceMismatchError,
)
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.lightning.checkpoints import checkpoints_of, set_aside
from ezmia_callbacks.lightning.loaders import as_fed_by_loaders, draw_from_loaders
from ezmia_callbacks.lightning.trainer import (
    epochs_done,
    first_epoch_in_steps,
    intervals_in_steps,
    language_model_in,
    planned_audits,
)
from ezmia_callbacks.lightning.trainer_access import (
    LightningTrainer,
    callback_classes,
    forward_context,
    saves_by_the_clock,
    skip_this_save,
    strategy_in_pieces,
)
from ezmia_callbacks.reference.sources import ReferenceSource
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.scoring.attack import Attack
from ezmia_callbacks.scoring.forward import (
    InputNotTakenError,
    call_for_logits,
    check_model,
    evaluation_without_side_effects,
    inputs_not_named,
    takes_further_inputs,
)
from ezmia_callbacks.scoring.projection import LogitsFunction
from ezmia_callbacks.scoring.rows import Tokenizer
from ezmia_callbacks.shells.membership_check import sample_training_rows
from ezmia_callbacks.shells.messages import (
    check_canaries,
    log_other_weights,
    log_restarted,
    reference_source,
    say_first_audit,
    say_start,
)
from ezmia_callbacks.shells.runs import RunsOfOneCallback
from ezmia_callbacks.shells.schedule_free import forget_undone_steps, weights_for_use
from ezmia_callbacks.shells.trackers import audit_settings, log_settings, log_verdict
from ezmia_callbacks.typed_rows import read_value

__all__: list[str] = []

logger = get_logger(__name__)

_FOLDER = "_privacy_audit"
_AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}
_DEFAULT_BATCH_SIZE = 16


class PrivacyAuditCallback(*callback_classes()):  # type: ignore[misc]  # bases known at import
    """Audits membership leakage while a Lightning trainer trains, and stops it at the budget.

    Before the first step the model's token statistics on the canaries are kept as the reference. At each
    audit one forward pass over the canaries shows what training changed; figures go to every logger and to
    `trainer.callback_metrics`, where `EarlyStopping` and `ModelCheckpoint(monitor="privacy/auc")` find them
    in the same epoch, one line goes to the console, and everything to
    `<default_root_dir>/_privacy_audit/history.jsonl`. When the budget is crossed, the weights of the last
    audit inside it are restored at once, nothing over budget is saved, and training ends. Training itself is
    not changed by one bit.

    Under a budget every checkpoint is audited before it is written; these audits come on top of `every`.
    What is saved while over budget, by a callback of the user's or by `trainer.save_checkpoint`, holds the
    weights of the last audit inside it. Only `trainer.save_checkpoint(..., weights_only=True)` in mid-run
    goes past this callback. A checkpoint whose audit failed is moved to `_privacy_audit/over_budget` if the
    run ends over budget.

    What is audited are the weights in training. Averages of them (`StochasticWeightAveraging`, EMA) are not,
    and are refused under a budget. A failed audit makes the monitored figures NaN.

    Args:
        canaries: Records with known membership, from `hold_out_canaries`. None draws members from the
            training dataloader and non-members from the validation dataloader: the split is then the
            user's, and figures include any difference between the two sets.
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
        tokenizer: Needed for canaries that are raw text; by default the LightningModule's `tokenizer`.
        max_length: Truncation of canaries that are raw text; give what training uses.
        batch_size: Records in a forward pass; by default the training dataloader's batch size.
        max_overhead: Share of the training time, in (0, 1), that audits may take. The first audit after the
            baseline then chooses a subset of the canaries that keeps to it, for all audits of the run, by the
            time that training took until then; never fewer than the budget needs. None scores all canaries.
        output_dir: Folder for the history, the reference statistics and the kept weights; by default
            `_privacy_audit` in `default_root_dir`.
        restore: Restore the weights of the last audit within the budget when stopping.
        keep_rejected: At a stop, write the weights over budget to `over_budget` in the run's folder, before
            those within it are restored; else they are gone.
        prefix: Put before every metric name.
        on_error: What an error in an audit after the first step does: `"warn"` marks a gap in the curve and
            lets training go on, `"raise"` ends it. Errors before the first step are always raised.
        allow_shift: Let a budget decide although members and non-members, in a split that this library did
            not draw, can be told apart without the model: figures then include that difference. Or although
            the model has met one side of a split that it did draw: figures then read too low, or too high.
        assume_seen: Believe that every member is trained on and no non-member is, for training whose batches
            cannot be looked at. By default figures and verdicts are of the members that batches held.
        logits_fn: `logits_fn(pl_module, input_ids, attention_mask)` returns logits (batch, length,
            vocabulary); needed only if the LightningModule does not hold exactly one Hugging Face causal
            language model, which is found by itself. Named in a configuration file, it must be annotated
            to return a `torch.Tensor`.

    Attributes:
        history: All audits so far of the newest run.
        histories: Those of all runs, the oldest first: one callback may serve several trainers, one after the
            other, as in folds or sweeps. Each run has a folder of its own: `_privacy_audit`,
            `_privacy_audit_2`, ...
        auditor: The auditor; None before training begins.

    Raises:
        ConfigurationError: if an argument is outside its range.

    Examples:
        >>> from ezmia_callbacks import LeakageBudget
        >>> from ezmia_callbacks.lightning import PrivacyAuditCallback
        >>> callback = PrivacyAuditCallback(budget=LeakageBudget(metric="auc", limit=0.60))
        >>> trainer = Trainer(..., callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        canaries: CanarySet | None = None,
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
        tokenizer: Tokenizer | None = None,
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
    ) -> None:
        super().__init__()
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
        check_canaries(canaries)
        self.canaries = canaries
        self.tokenizer = tokenizer
        self.logits_fn = logits_fn
        self.auditor: PrivacyAuditor | None = None
        self._begun_with: weakref.ref[nn.Module] | None = None
        self._forward_context: Callable[[], AbstractContextManager[object]] | None = None
        self._loaded: dict[str, Any] | None = None
        self._is_running = False
        self._is_audited_for_others = False
        self._step_intervals: list[int] = []
        self._early_steps: frozenset[int] = frozenset()
        self._older_checkpoints: dict[Path, float] = {}
        self._restored_step: int | None = None
        self._is_given_up = False
        self._runs = RunsOfOneCallback()
        self._running: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Ray and spawn pickle callbacks; model, precision and auditor belong to this process.
        of_this_process = ("auditor", "_begun_with", "_forward_context", "_running")
        return {**self.__dict__, **dict.fromkeys(of_this_process)}

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

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint, one for each prefix."""
        return f"ezmia/privacy_audit:{self.settings.prefix}"

    def state_dict(self) -> dict[str, Any]:
        """The audits so far, and of which step the weights are where that is not the trainer's own."""
        if self.auditor is None:
            return {}
        return {
            "run_id": self.history.run_metadata.run_id,
            "history": self.history.to_dicts(),
            "weights_step": self._restored_step,
            "exposures": self.auditor.exposures_of_all.to_dict(),
            "judged_by": self.history.judged_by,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint says until training begins."""
        self._loaded = state_dict

    def setup(self, trainer: LightningTrainer, pl_module: Any, stage: str) -> None:
        """Forget what the last run left: validating and testing load checkpoints, too."""
        # Here, for in the processes of Ray callbacks are not made but unpickled.
        write_warnings_above_bars()
        self._loaded = None
        self._is_running = False

    def on_train_start(self, trainer: LightningTrainer, pl_module: Any) -> None:
        """Take the reference and make the baseline audit, before the first optimizer step.

        Not `on_fit_start`: there the step and the number of batches are not known yet.
        """
        if trainer.fast_dev_run:
            logger.info("fast_dev_run: no privacy audit is made.")
            return
        self._refuse_unsupported(trainer)
        self._warn_of_minimum(trainer)
        is_known = self._begun_with is not None and self._begun_with() is pl_module
        saved = self._loaded
        if saved is None and is_known and trainer.global_step > 0:
            # The same trainer goes on with the same module.
            saved = copy.deepcopy(self.state_dict())
        if saved is None and trainer.global_step > 0:
            raise ReferenceMismatchError(
                f"Training resumes at step {trainer.global_step} from a checkpoint that was made without "
                "this callback (or with another `prefix`), and trained weights cannot stand in for the "
                "reference. Start over with the callback; or load the weights alone "
                "(`load_from_checkpoint`) and call `fit` without `ckpt_path`: leakage is then counted from "
                "those weights on."
            )
        self._forward_context = forward_context(trainer)
        self._restored_step = None
        self._is_given_up = False
        self._older_checkpoints = checkpoints_of(trainer)
        self._is_audited_for_others = self._guards and bool(trainer.checkpoint_callbacks)
        self._is_audited_for_others |= any(
            str(getattr(callback, "monitor", None)).startswith(self.settings.prefix)
            for callback in trainer.callbacks
        )
        self._step_intervals = intervals_in_steps(
            trainer, self.settings.cadence, is_saving_guarded=self._guards
        )
        self._early_steps = early_steps(self.settings.cadence, n_steps=first_epoch_in_steps(trainer))
        self._running = weakref.ref(trainer)
        with torch.inference_mode(False), _weights_for_use(trainer):
            if saved is None and is_known and self.auditor is not None:
                self._restart(trainer, pl_module, self.auditor)
            else:
                self._runs.begin(self.auditor, self._base_folder(trainer), is_new=saved is None)
                self.auditor = on_all_ranks(lambda: self._make_auditor(trainer, pl_module))
                self._begun_with = weakref.ref(pl_module)
                if saved is None:
                    self._begin(trainer, pl_module, self.auditor)
                else:
                    self._resume(trainer, pl_module, self.auditor, saved)
        self._is_running = True

    def on_train_batch_end(
        self, trainer: LightningTrainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Audit early, every `every` steps or every fraction of an epoch, and before a checkpoint."""
        if self._is_running and self.auditor is not None:
            self._refuse_another_run(trainer)
            if trainer.global_step > self.auditor.n_steps_seen:
                self.auditor.step_done(trainer.global_step)
            else:
                self.auditor.notice_step()
            step = self._step(trainer)
            is_due = step in self._early_steps
            if is_due or (step and any(step % interval == 0 for interval in self._step_intervals)):
                self._audit(trainer, pl_module)
            self._veto_saves(trainer)

    def on_validation_epoch_end(self, trainer: LightningTrainer, pl_module: Any) -> None:
        """Audit where others read the figures, or save, after a validation."""
        if self._is_running and self._is_audited_for_others:
            self._audit(trainer, pl_module)
            self._veto_saves(trainer)

    def on_train_epoch_end(self, trainer: LightningTrainer, pl_module: Any) -> None:
        """Audit at the end of each epoch, before a checkpoint, and at the end of training in any case."""
        if not self._is_running:
            return
        self._refuse_another_run(trainer)
        is_last = (
            trainer.should_stop
            or trainer.current_epoch + 1 == trainer.max_epochs
            or self._step(trainer) == trainer.max_steps
        )
        if ends_epochs(self.settings.cadence) or is_last or self._is_audited_for_others:
            self._audit(trainer, pl_module)
        self._veto_saves(trainer)

    def on_save_checkpoint(
        self, trainer: LightningTrainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Audit what is about to be written; over budget, write the last weights inside it instead."""
        if not self._is_running or self.auditor is None:
            return
        if not self._guards:
            self.auditor.look_back()
            checkpoint["callbacks"][self.state_key] = self.state_dict()
            return
        self._audit(trainer, pl_module)
        # What is trained after a stop will be undone: no audit of it may count.
        if self._restored_step is None:
            self._audit_others_weights(trainer, pl_module)
        self.auditor.look_back()
        if not self._is_past_budget:
            checkpoint["callbacks"][self.state_key] = self.state_dict()
            return
        held = [(tensor, tensor.detach().clone()) for tensor in _tensors(pl_module)]
        kept = self._restore(trainer, pl_module, is_undone=False)
        if kept is None:
            return
        # Anew: the dict may hold copies, and the optimizers' states the weights over budget a second time.
        checkpoint["state_dict"] = copy.deepcopy(pl_module.state_dict())
        states = checkpoint.get("optimizer_states", ())
        checkpoint["optimizer_states"] = [{**state, "state": {}} for state in states]
        checkpoint["callbacks"][self.state_key] = {**self.state_dict(), "weights_step": kept.step}
        with torch.no_grad():
            for tensor, value in held:
                tensor.copy_(value)

    def on_train_end(self, trainer: LightningTrainer, pl_module: Any) -> None:
        """Audit what was trained after the last audit, and restore what is within the budget."""
        if not self._is_running or self.auditor is None:
            return
        self._refuse_another_run(trainer)
        self._audit(trainer, pl_module)
        # Also after a stop: `min_epochs` and `min_steps` make the trainer go on.
        kept = self._restore(trainer, pl_module) if self._is_past_budget else None
        if kept is not None:
            self._set_aside(trainer, after_step=kept.step)

    def on_fit_end(self, trainer: LightningTrainer, pl_module: Any) -> None:
        """Say what the run came to, and remove the kept weights; after what others do when training ends.

        Averages of the weights are copied into the model there: what they leave is audited as it is.
        """
        auditor = self.auditor
        if not self._is_running or auditor is None:
            return
        known = self._audit_others_weights(trainer, pl_module)
        is_over = known is not None and known.decision.is_within_budget is False
        if self._guards and is_over and not self._is_given_up:
            kept = self._restore(trainer, pl_module)
            if kept is not None:
                self._set_aside(trainer, after_step=kept.step)
        with torch.inference_mode(False), _weights_for_use(trainer):
            auditor.finish(pl_module)
        self._is_running = False

    @property
    def _guards(self) -> bool:
        return self.settings.keeps_weights

    @property
    def _is_past_budget(self) -> bool:
        """By the last audit that did not fail; a failed one shows no way back."""
        return self._guards and self.history.is_past_budget

    def _audit(self, trainer: LightningTrainer, pl_module: Any) -> None:
        auditor, step = self.auditor, self._step(trainer)
        # What is trained after a stop will be undone: no audit of it may count.
        is_decided = self._restored_step is not None
        if auditor is None or is_decided or self.history[-1].step == step:
            return
        # Weights kept during a validation must not be tensors of its inference mode.
        with torch.inference_mode(False), _weights_for_use(trainer):
            result = auditor.audit(pl_module, step=step, epoch=epochs_done(trainer))
        self._publish(trainer, result)
        if result.decision.stop:
            trainer.should_stop = True
            if self.settings.restore:
                self._restore(trainer, pl_module)

    def _audit_others_weights(self, trainer: LightningTrainer, pl_module: Any) -> AuditResult | None:
        """The audit of the weights that the module holds; made now if others have written into it."""
        auditor = self.auditor
        if auditor is None:
            return None
        with torch.inference_mode(False), _weights_for_use(trainer):
            known = auditor.audit_of(pl_module)
            if known is not None:
                return known
            known = auditor.audit(pl_module, step=self._step(trainer), epoch=epochs_done(trainer))
        log_other_weights(known)
        return known

    def _step(self, trainer: LightningTrainer) -> int:
        """Optimizer steps done: as the trainer counts, or as seen, of an optimizer that it does not know."""
        counted, auditor = int(trainer.global_step), self.auditor
        return counted or (0 if auditor is None else auditor.n_steps_seen)

    def _restore(
        self, trainer: LightningTrainer, pl_module: Any, *, is_undone: bool = True
    ) -> AuditResult | None:
        """Restore the weights of the last audit within the budget; None if that fails."""
        if self.auditor is None:
            return None
        try:
            with torch.inference_mode(False):
                if is_undone:
                    for optimizer in trainer.optimizers:
                        forget_undone_steps(optimizer)
                optimizers = list(trainer.optimizers) if is_undone else None
                kept = self.auditor.restore_within_budget(pl_module, optimizer=optimizers, is_final=is_undone)
        except AuditError:
            # The auditor has said so.
            self._is_given_up = True
            return None
        if is_undone:
            self._restored_step = kept.step
        return kept

    def _veto_saves(self, trainer: LightningTrainer) -> None:
        """Have `ModelCheckpoint` skip this step: its figures and file names would be of other weights."""
        if self._is_past_budget:
            skip_this_save(trainer)

    def _set_aside(self, trainer: LightningTrainer, *, after_step: int) -> None:
        """Move away what was saved after a failed audit."""
        is_unaudited = any(r.status == "failed" and r.step > after_step for r in self.history)
        if is_unaudited and is_main_process():
            into = self._folder(trainer) / "over_budget"
            set_aside(trainer, after_step=after_step, into=into, older=self._older_checkpoints)

    def _refuse_another_run(self, trainer: LightningTrainer) -> None:
        """Runs may follow one another; one whose trainer is not the last one to begin has lost its audit."""
        running = None if self._running is None else self._running()
        if running is not None and running is not trainer:
            raise ConfigurationError(
                "Another trainer has begun with this PrivacyAuditCallback while this one was training: give "
                "each its own callback, or train them one after the other."
            )

    def _folder(self, trainer: LightningTrainer) -> Path:
        return self._runs.folder(self._base_folder(trainer))

    def _base_folder(self, trainer: LightningTrainer) -> Path:
        return Path(self.settings.output_dir or Path(trainer.default_root_dir) / _FOLDER)

    def _publish(self, trainer: LightningTrainer, result: AuditResult) -> None:
        """Log to every logger, and offer the figures to callbacks from here on.

        `pl_module.log` is forbidden in some of these hooks and would average audits over an epoch.
        """
        metrics = {f"{self.settings.prefix}{name}": value for name, value in result.to_metrics().items()}
        if result.is_baseline and is_main_process():
            settings = audit_settings(self.history, self.settings)
            log_settings(trainer.loggers, settings, prefix=self.settings.prefix)
        for run_logger in trainer.loggers:
            run_logger.log_metrics(dict(metrics), step=result.step)
        for offered in (trainer.callback_metrics, trainer.logged_metrics):
            # An audit that failed has no figures; those of an older one must not pass for its own.
            unknown = {name: math.nan for name in offered if name.startswith(self.settings.prefix)}
            offered.update({name: torch.tensor(value) for name, value in {**unknown, **metrics}.items()})
        if is_main_process():
            log_verdict(trainer.loggers, result.describe(), prefix=self.settings.prefix, step=result.step)

    def _begin(self, trainer: LightningTrainer, pl_module: nn.Module, auditor: PrivacyAuditor) -> None:
        say_start(auditor, self.settings.budget)
        auditor.settle_inputs(pl_module)
        if self.logits_fn is None:
            # The LightningModule itself has no configuration to check the canaries against.
            check_model(language_model_in(pl_module), auditor.encoded.rows, autocast=self._training_context)
        result = auditor.begin(pl_module, step=0, epoch=0.0)
        auditor.watch(self._called_in_training(pl_module))
        self._publish(trainer, result)
        say_first_audit(self._plan(trainer), self.settings)

    def _resume(
        self, trainer: LightningTrainer, pl_module: nn.Module, auditor: PrivacyAuditor, saved: dict[str, Any]
    ) -> None:
        newer = {"exposures", "judged_by", "run_id"}
        found = read_value(_Saved, saved, newer=newer, name="the callback's state in the checkpoint")
        step = trainer.global_step if found.weights_step is None else found.weights_step
        auditor.resume(
            pl_module,
            found.history,
            step=step,
            exposures=found.exposures,
            judged_by=found.judged_by,
            run_id=found.run_id,
        )
        auditor.watch(self._called_in_training(pl_module))

    def _restart(self, trainer: LightningTrainer, pl_module: nn.Module, auditor: PrivacyAuditor) -> None:
        """The same weights train on from step 0, under a new trainer."""
        log_restarted()
        auditor.restart(pl_module, n_audits=self._plan(trainer).n_audits)
        auditor.watch(self._called_in_training(pl_module))

    def _called_in_training(self, pl_module: nn.Module) -> nn.Module:
        """What `training_step` calls: the language model, or the embedding that gets the token ids."""
        if self.logits_fn is None:
            return language_model_in(pl_module)
        embeddings = [module for module in pl_module.modules() if isinstance(module, nn.Embedding)]
        return max(embeddings, key=lambda module: module.num_embeddings, default=pl_module)

    def _make_auditor(self, trainer: LightningTrainer, pl_module: nn.Module) -> PrivacyAuditor:
        tokenizer = self.tokenizer or getattr(pl_module, "tokenizer", None)
        # Tokenizers, collators and datasets may draw random numbers.
        with evaluation_without_side_effects(pl_module):
            canaries = self._prepare_canaries(trainer, tokenizer)
        takes_inputs = self.logits_fn is None or takes_further_inputs(self.logits_fn)
        batch_size = getattr(trainer.train_dataloader, "batch_size", None)
        settings = replace(
            self.settings,
            reference=reference_source(self.settings.reference, model=pl_module),
            batch_size=self.settings.batch_size or batch_size or _DEFAULT_BATCH_SIZE,
            output_dir=self._folder(trainer),
        )
        return PrivacyAuditor(
            canaries,
            **settings.auditor_arguments(),
            n_audits=self._plan(trainer).n_audits,
            tokenizer=tokenizer,
            training_records=sample_training_rows(getattr(trainer.train_dataloader, "dataset", None)),
            show_progress=trainer.progress_bar_callback is not None,
            logits_fn=self._logits if takes_inputs else self._logits_of_tokens,
            autocast=self._training_context,
        )

    def _prepare_canaries(self, trainer: LightningTrainer, tokenizer: Tokenizer | None) -> CanarySet:
        if self.canaries is not None:
            return as_fed_by_loaders(
                trainer.train_dataloader,
                self.canaries,
                tokenizer=tokenizer,
                max_length=self.settings.max_length,
            )
        return draw_from_loaders(
            trainer.train_dataloader,
            trainer.val_dataloaders,
            n_members=self.settings.n_members,
            n_non_members=self.settings.n_non_members,
            seed=self.settings.seed,
            tokenizer=tokenizer,
        )

    def _training_context(self) -> AbstractContextManager[object]:
        if self._forward_context is None:
            raise ConfigurationError("No Trainer trains with this callback: pass it in `callbacks=[...]`.")
        return self._forward_context()

    def _logits(self, module: nn.Module, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Tensor:
        # A reference of the user's may be a bare model.
        if self.logits_fn is not None and hasattr(module, "training_step"):
            return self.logits_fn(module, input_ids, attention_mask, **inputs)
        model = language_model_in(module)
        unknown = inputs_not_named(model, frozenset(inputs))
        if unknown:
            raise InputNotTakenError(unknown)
        return call_for_logits(model, input_ids, attention_mask, **inputs)

    def _logits_of_tokens(self, module: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._logits(module, input_ids, attention_mask)

    def _plan(self, trainer: LightningTrainer) -> AuditPlan:
        return planned_audits(
            trainer,
            self._step_intervals,
            early=self._early_steps,
            is_at_epoch_end=ends_epochs(self.settings.cadence) or self._is_audited_for_others,
            is_at_validation=self._is_audited_for_others,
        )

    def _refuse_unsupported(self, trainer: LightningTrainer) -> None:
        strategy = strategy_in_pieces(trainer)
        if strategy is not None:
            raise ConfigurationError(
                f"{strategy} holds the weights in pieces, which the audit cannot read "
                "yet: train with one device or 'ddp', or audit checkpoints with PrivacyAuditor."
            )
        for callback in trainer.callbacks:
            if callback is self:
                continue
            if isinstance(callback, PrivacyAuditCallback) and callback._folder(trainer) == self._folder(
                trainer
            ):
                raise ConfigurationError(
                    "Two PrivacyAuditCallbacks share an `output_dir`: give each its own, for example "
                    f"output_dir='{self._folder(trainer)}_2'."
                )
            if not self._guards:
                continue
            name = type(callback).__name__
            if any(base.__name__ in _AVERAGING for base in type(callback).__mro__):
                raise ConfigurationError(
                    f"{name} replaces the model's weights after the last audit, so that a leakage budget "
                    "cannot hold for them: remove it, or pass `restore=False`."
                )
            if saves_by_the_clock(callback) and getattr(callback, "save_weights_only", False):
                raise ConfigurationError(
                    f"{name} saves weights alone at times that are not known beforehand, so that they cannot "
                    "be audited first: use `every_n_train_steps`, or `save_weights_only=False`."
                )

    def _warn_of_minimum(self, trainer: LightningTrainer) -> None:
        n_epochs, n_steps = trainer.min_epochs or 0, trainer.min_steps or 0
        if self.settings.budget is not None and (n_epochs > 1 or n_steps > 0) and is_main_process():
            logger.warning(
                "Trainer(min_epochs=%s, min_steps=%s) OVERRIDES the leakage budget: Lightning trains on "
                "until both are reached. %s",
                trainer.min_epochs,
                trainer.min_steps,
                "What it trains after the stop is undone at the end, and not saved."
                if self.settings.restore
                else "The model will end OVER BUDGET.",
            )


@dataclass(frozen=True)
class _Saved:
    """What `state_dict` returned; the first version knew nothing of exposures."""

    history: Any
    weights_step: int | None
    exposures: Mapping[str, object] | None = None
    judged_by: Mapping[str, object] | None = None
    run_id: str | None = None


@contextmanager
def _weights_for_use(trainer: LightningTrainer) -> Iterator[None]:
    with ExitStack() as stack:
        for optimizer in trainer.optimizers:
            stack.enter_context(weights_for_use(optimizer))
        yield


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
