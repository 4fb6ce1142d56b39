"""What the user chose for an audit, validated once; every shell takes the same arguments.

What an argument means is written here. The callbacks and the auditor repeat it word by word where a reader of
theirs looks for it, which a test checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ezmia_callbacks.audit.cadence import Cadence
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.functional.judged import STRONGEST
from ezmia_callbacks.scoring.attack import Attack
from ezmia_callbacks.scoring.statistics import SCORES

if TYPE_CHECKING:
    from ezmia_callbacks.reference.sources import ReferenceSource

__all__: list[str] = []

OnError = Literal["warn", "raise"]

# The others are the callbacks' alone.
_AUDITOR_ARGUMENTS = (
    "budget",
    "reference",
    "score",
    "fpr_levels",
    "confidence",
    "max_length",
    "batch_size",
    "max_overhead",
    "output_dir",
    "restore",
    "keep_rejected",
    "on_error",
    "allow_shift",
    "judge_only",
    "assume_seen",
)


@dataclass(frozen=True)
class AuditSettings:
    """The user's choices, as far as the shells share them.

    Attributes:
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
        max_length: Truncation of canaries that are raw text; give what training uses.
        batch_size: Records in a forward pass.
        max_overhead: Share of the training time, in (0, 1), that audits may take. The first audit after the
            baseline then chooses a subset of the canaries that keeps to it, for all audits of the run, by the
            time that training took until then; never fewer than the budget needs. None scores all canaries.
        output_dir: Folder for the history, the reference statistics and the kept weights.
        restore: Restore the weights of the last audit within the budget when stopping.
        keep_rejected: At a stop, write the weights over budget to `over_budget` in the run's folder, before
            those within it are restored; else they are gone.
        prefix: Put before every metric name.
        on_error: What an error in an audit after the first step does: `"warn"` marks a gap in the curve and
            lets training go on, `"raise"` ends it. Errors before the first step are always raised.
        allow_shift: Let a budget decide although members and non-members, in a split that this library did
            not draw, can be told apart without the model: figures then include that difference. Or although
            the model has met one side of a split that it did draw: figures then read too low, or too high.
        judge_only: Give verdicts and never stop, for a run that is over.
        assume_seen: Believe that every member is trained on and no non-member is, for training whose batches
            cannot be looked at. By default figures and verdicts are of the members that batches held.

    Raises:
        ConfigurationError: if an argument can never work; says what was got and what is needed.
    """

    budget: LeakageBudget | None = None
    every: Cadence = "auto"
    reference: ReferenceSource | str | Path = "auto"
    score: str | Attack = STRONGEST
    fpr_levels: Sequence[float] = (0.01, 0.1)
    confidence: float = 0.95
    n_members: int = 500
    n_non_members: int = 1000
    seed: int = 0
    max_length: int | None = None
    batch_size: int | None = None
    max_overhead: float | None = None
    output_dir: str | Path | None = None
    restore: bool = True
    keep_rejected: bool = False
    prefix: str = "privacy/"
    on_error: OnError = "warn"
    allow_shift: bool = False
    judge_only: bool = False
    assume_seen: bool = False

    def __post_init__(self) -> None:
        """Check every argument, before anything is computed."""
        if self.budget is not None and not isinstance(self.budget, LeakageBudget):
            raise ConfigurationError(
                f"`budget` must be a LeakageBudget or None, got {self.budget!r}: try "
                "LeakageBudget(limit=0.6)."
            )
        self._check_score()
        self._check_every()
        if not all(0.0 < fpr < 1.0 for fpr in self.fpr_levels):
            raise ConfigurationError(f"`fpr_levels` must lie in (0, 1), got {tuple(self.fpr_levels)!r}.")
        object.__setattr__(self, "fpr_levels", tuple(self.fpr_levels))
        if not 0.0 < self.confidence < 1.0:
            raise ConfigurationError(f"`confidence` must lie in (0, 1), got {self.confidence!r}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigurationError(f"`batch_size` must be at least 1, got {self.batch_size!r}.")
        if self.max_overhead is not None and not 0.0 < self.max_overhead < 1.0:
            raise ConfigurationError(
                f"`max_overhead` must lie in (0, 1), a share of the training time such as 0.05, or be None, "
                f"got {self.max_overhead!r}."
            )
        if not (isinstance(self.reference, str | Path) or callable(self.reference)):
            raise ConfigurationError(
                "`reference` must be 'auto', 'adapter', 'copy', a module, a function that loads one, or the "
                f"path or hub id of a checkpoint, got {self.reference!r}."
            )
        if self.keep_rejected and not self.keeps_weights:
            raise ConfigurationError(
                "`keep_rejected=True` needs a `budget` and `restore=True`: else no weights are rejected."
            )
        if self.on_error not in ("warn", "raise"):
            raise ConfigurationError(f"`on_error` must be 'warn' or 'raise', got {self.on_error!r}.")

    @property
    def attack(self) -> Attack | None:
        """The user's own attack; None if a built-in score decides."""
        return None if isinstance(self.score, str) else self.score

    @property
    def score_name(self) -> str:
        """Name of the score that was asked for."""
        return self.score if isinstance(self.score, str) else self.score.name

    @property
    def band_confidence(self) -> float:
        """Confidence with which the bands of all audits hold together: the budget's, if there is one."""
        return self.confidence if self.budget is None else self.budget.confidence

    @property
    def cadence(self) -> Cadence:
        """When to audit, for this budget: `"auto"` only where there are early audits."""
        return "epoch" if self.every == "auto" and self.budget is None else self.every

    @property
    def keeps_weights(self) -> bool:
        """Whether the weights of the last audit within the budget are kept, and checkpoints guarded."""
        return self.restore and self.budget is not None

    @property
    def reported_fpr_levels(self) -> tuple[float, ...]:
        """Every level that is reported, that of a budget among them, in order."""
        levels = set(self.fpr_levels)
        if self.budget is not None and self.budget.metric == "tpr_at_fpr":
            levels.add(self.budget.fpr)
        return tuple(sorted(levels))

    def auditor_arguments(self) -> dict[str, Any]:
        """Those of the choices that `PrivacyAuditor` takes, by its own names for them."""
        return {name: getattr(self, name) for name in _AUDITOR_ARGUMENTS}

    def _check_score(self) -> None:
        is_known = isinstance(self.score, Attack)
        if isinstance(self.score, str):
            is_known = self.score == STRONGEST or self.score in SCORES
        if not is_known:
            raise ConfigurationError(
                f"Unknown score {self.score!r}: use {STRONGEST!r}, one of {', '.join(SCORES)}, or an object "
                "with `name`, `is_trained_on_membership`, `begin` and `score` (see "
                "`ezmia_callbacks.scoring.Attack`)."
            )
        if self.max_overhead is not None and self.attack is not None:
            raise ConfigurationError(
                "`max_overhead` scores a subset of the canaries, and an attack of your own has seen them all "
                "at its start: use a built-in score, or fewer canaries."
            )

    def _check_every(self) -> None:
        every = self.every
        is_steps = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        is_fraction = isinstance(every, float) and 0.0 < every < 1.0
        if not (every in ("auto", "epoch") or is_steps or is_fraction):
            raise ConfigurationError(
                "`every` must be 'auto', 'epoch', a number of steps >= 1, or a fraction of an epoch in "
                f"(0, 1), got {every!r}."
            )
