"""Which weights were audited, which are kept, and whether what is put back is what it is said to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ezmia_callbacks.audit.checkpoint_check import other_weights_in
from ezmia_callbacks.audit.imprint import Imprint, digest_on_all_ranks
from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.audit.settings import OnError
from ezmia_callbacks.audit.zero import refuse_unproven
from ezmia_callbacks.distributed import (
    broadcast_from_main,
    gather,
    is_in_fsdp1,
    is_main_process,
    on_all_ranks_in_turns,
)
from ezmia_callbacks.errors import AuditError, ConfigurationError
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.safe_text import describe_error, get_logger, log_error

__all__: list[str] = []

logger = get_logger(__name__)

# Nats. The tensors are compared to the bit; kernels may round differently from one call to the next.
_TOLERANCE = 5e-3


class AuditedWeights:
    """The weights of a run as its audits saw them.

    Every process must call every method but `wait` and `finish`.

    Args:
        kept: Keeps the weights of the last audit within the budget; None where nothing is to be restored.
        sample: Log-probabilities of some tokens under a model, nats.
        on_error: What an error does after the first step.

    Attributes:
        digest: Stands for the weights of all processes that were seen last.
    """

    def __init__(
        self, kept: KeptWeights | None, *, sample: Callable[[nn.Module], np.ndarray], on_error: OnError
    ) -> None:
        self._kept = kept
        self._sample = sample
        self._on_error = on_error
        self._audited: dict[str, AuditResult] = {}
        self._present: Imprint | None = None
        self._said: set[str] = set()
        self.digest = ""

    @property
    def are_kept(self) -> bool:
        """Whether there are weights to restore."""
        return self._kept is not None and broadcast_from_main(self._kept.exists)

    def begin(self, model: nn.Module) -> None:
        """Notice from here on which weights change.

        Raises:
            ConfigurationError: if weights are to be kept that are not in memory, or not known to be restored.
        """
        present = self._see(model)
        self._audited = {}
        if self._kept is None:
            return
        refuse_unproven(model)
        if is_in_fsdp1(model):
            raise ConfigurationError(
                "FSDP1 (`FullyShardedDataParallel`) keeps weights where they were never seen to be restored "
                "whole: train with FSDP2 (`fsdp_version: 2`, or `fully_shard`), or pass `restore=False` and "
                "keep checkpoints to return to."
            )
        if any(gather(any(parameter.is_meta for parameter in model.parameters()))):
            raise ConfigurationError(
                "Parts of the model are offloaded (their device is `meta`) and cannot be kept to be "
                "restored: pass `restore=False`, or audit checkpoints afterwards."
            )
        self._kept.begin(model, present)

    def name(self, run_id: str) -> None:
        """The run has this name; before anything is kept."""
        if self._kept is not None:
            self._kept.run_id = run_id

    def keep_start(self, model: nn.Module, *, step: int) -> None:
        """Keep the weights before the first step, and wait until they are on the disk.

        Raises:
            OSError: if they cannot be written: the folder is the user's to mend.
        """
        if self._kept is not None:
            sample = self._sample(model).tolist()
            self._kept.save(model, step=step, present=self._present, sample=sample)
            self._kept.settle()

    def look(self, model: nn.Module) -> str:
        """See at an audit which weights the model holds now.

        Returns:
            Why what is kept cannot be put back whole any more; empty if it can, or nothing is kept.
        """
        self._settle()
        present = self._see(model)
        return "" if self._kept is None else self._kept.look(model, present)

    def note_audited(self, result: AuditResult) -> None:
        """The weights that `begin` or `look` saw last have these figures."""
        if self.digest:
            self._note(self.digest, result)

    def _note(self, digest: str, result: AuditResult) -> None:
        before = self._audited.get(digest)
        # The same weights again without a verdict: what was found of them before still holds.
        is_undecided = before is None or before.decision.is_within_budget is None
        if is_undecided or result.decision.is_within_budget is not None:
            self._audited[digest] = result

    def take_over(self, results: Iterable[AuditResult]) -> None:
        """Audits of before the run was interrupted, which say themselves what weights they saw."""
        for result in results:
            if result.weights:
                self._note(result.weights, result)

    def audit_of(self, model: nn.Module) -> AuditResult | None:
        """The last audit that saw the very weights that the model holds; None if none did."""
        self.digest = digest_on_all_ranks(model, Imprint.of(model))
        return self._audited.get(self.digest)

    def keep(self, model: nn.Module, *, step: int, checkpoint_follows: bool = False) -> None:
        """Keep the weights that the model holds.

        Args:
            model: The model.
            step: Optimizer steps done.
            checkpoint_follows: Whether the trainer is about to write them itself: `checkpoint_written` and
                `before_step` must be called then.
        """
        kept = self._kept
        if kept is None:
            return
        try:
            present = self._present or Imprint.of(model)
            sample = self._sample(model).tolist()
            if checkpoint_follows:
                kept.expect_checkpoint(model, step=step, present=present, sample=sample)
            else:
                kept.save(model, step=step, present=present, sample=sample)
        except Exception as error:  # a training is never lost for it
            self._fail(error)

    def checkpoint_written(self, model: nn.Module, folder: Path) -> list[str]:
        """The trainer has written a checkpoint of the weights that were audited last.

        Returns:
            Names of the tensors that it holds with other bits than these; empty where it was seen to hold
            them, and where it cannot be read.
        """
        audited = self._present or Imprint.of(model)
        differing = broadcast_from_main(
            on_all_ranks_in_turns(
                lambda: other_weights_in(folder, model, audited) if is_main_process() else []
            )
        )
        if self._kept is not None:
            try:
                if differing:
                    self._kept.save_expected(model)
                else:
                    self._kept.pin(model, folder)
            except Exception as error:  # a training is never lost for it
                self._fail(error)
        return differing

    def before_step(self, model: nn.Module) -> None:
        """The model is about to change: keep its weights if no checkpoint has come."""
        if self._kept is not None:
            try:
                self._kept.save_expected(model)
            except Exception as error:  # a training is never lost for it
                self._fail(error)

    def wait(self) -> None:
        """Wait until what this process keeps is on the disk; for no other process."""
        if self._kept is not None:
            self._kept.wait()

    def take_up(
        self, model: nn.Module, *, step: int, is_within: bool, is_within_at: Callable[[int, str], bool]
    ) -> None:
        """Go on with what an interrupted run has kept.

        Args:
            model: The model.
            step: Optimizer steps done.
            is_within: Whether it is within the budget now.
            is_within_at: Whether an audit at a step found weights, by their `digest`, within the budget of
                the run that goes on.
        """
        kept = self._kept
        if kept is None:
            return
        kept.discard_after(step)
        kept_digest, kept_step = kept.digest(), broadcast_from_main(kept.step)
        is_known = kept_step is None or kept_digest is None or is_within_at(kept_step, kept_digest)
        if not is_known:
            kept.discard()
            if is_main_process():
                logger.warning(
                    "The weights of step %d, which the interrupted run kept, are not known to be within this "
                    "budget and were discarded.",
                    kept_step,
                )
        if is_within:
            self.keep(model, step=step)
        elif not self.are_kept and is_main_process():
            logger.warning(
                "No weights within the budget are kept yet: until an audit finds the model within it, a stop "
                "has none to restore."
            )

    def start_over(self, model: nn.Module) -> None:
        """A run begins with weights that were trained; those that are kept stay the ones to restore."""
        kept = self._kept
        if kept is None:
            return
        kept.forget_expected()
        self._settle()
        if self.are_kept:
            on_all_ranks_in_turns(lambda: kept.relabel(step=0))
            return
        audit = self.audit_of(model)
        if audit is not None and audit.decision.is_within_budget:
            self._see(model)
            self.keep(model, step=0)
        elif is_main_process():
            logger.warning(
                "The model that training starts again with was %s, so that it is not kept: until an audit "
                "finds it within the budget, a stop has nothing to restore.",
                "never audited as it is" if audit is None else "over budget, or could not be judged",
            )

    def restore(self, model: nn.Module, *, optimizer: Any = None) -> int:
        """Put the kept weights back, and see that the model is what it was; returns the step they are from.

        Raises:
            AuditError: if there are none, or the model is another one afterwards; says what it is.
        """
        kept_weights = self._kept
        if kept_weights is None:
            raise AuditError("No weights were kept: that needs a `budget` and `restore=True`.")
        self._settle()
        try:
            kept = kept_weights.restore(model, optimizer=optimizer)
        except AuditError:
            raise
        except Exception as error:  # whoever restores must be able to say that it failed
            raise AuditError(
                f"Writing the kept weights into the model failed ({describe_error(error)}): it may "
                "hold the weights of no step at all."
            ) from error
        self._see(model)
        expected = np.array(kept.sample)
        found = self._sample(model)
        difference = np.abs(found - expected).mean() if found.shape == expected.shape else np.inf
        if not broadcast_from_main(bool(difference <= _TOLERANCE)):
            raise AuditError(
                f"The tensors of step {kept.step} are in the model again, and yet it gives the canaries "
                f"other probabilities than it did then (by {difference:.3g} nats a token): something that is "
                "no tensor has changed since, such as which adapter is active or merged."
            )
        return kept.step

    def holds(self, model: nn.Module, *, step: int) -> bool | None:
        """Whether a model holds the weights kept of a step; None if no such weights are kept."""
        if self._kept is None or broadcast_from_main(self._kept.step) != step:
            return None
        return not broadcast_from_main(self._kept.differs(model))

    def finish(self, *, removes_files: bool = True) -> None:
        """Forget the kept weights; waits for no other process.

        Args:
            removes_files: Whether the folder is still this run's, so that its files go, too.
        """
        if self._kept is None:
            return
        self._kept.unwatch()
        if removes_files:
            self._kept.discard()

    def _see(self, model: nn.Module) -> Imprint:
        self._present = present = Imprint.of(model)
        self.digest = digest_on_all_ranks(model, present)
        return present

    def _settle(self) -> None:
        if self._kept is None:
            return
        try:
            self._kept.settle()
        except Exception as error:  # a training is never lost for it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._on_error == "raise":
            raise error
        if is_main_process() and describe_error(error) not in self._said:
            self._said.add(describe_error(error))
            log_error(
                logger,
                "Weights could not be kept, and a stop would restore older ones (%s).",
                error=error,
            )
