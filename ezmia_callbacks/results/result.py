"""The result of one audit, as frozen data that goes to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import Decision, JudgedFigure, fpr_of_metric, metric_label
from ezmia_callbacks.functional.epsilon import EpsilonBound
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.typed_rows import read_value

if TYPE_CHECKING:
    from jaxtyping import Float64

__all__: list[str] = []

NEWER_FIELDS = frozenset(
    {
        "auc_recent",
        "checkpoint_holder",
        "checkpoint_holder_epsilon",
        "decided_by",
        "is_reversed",
        "judged_beside",
        "n_checkpoints",
        "n_members_seen",
        "n_records",
        "reversed",
        "weights",
        # Of a decision; that of a result itself has no default.
        "score",
    }
)
"""Fields of a result, at any depth, that files of older releases lack."""
# Fields that say something of each record: no file holds them.
_IN_MEMORY = ("scores", "scores_beside", "step_scores")
_LONGEST_LINE = 100


@dataclass(frozen=True)
class Measurement:
    """One figure, with what is known about its error; or the reason why there is none.

    Attributes:
        value: Point estimate; None if the canary set cannot resolve it.
        interval: Interval for this audit alone.
        band: Interval that holds for all audits of the run together; decisions read this one.
        note: Why `value`, `interval` or `band` is missing, and what would be needed.
        reversed: The same figure of the score turned around, which takes low scores for members. None for an
            AUC whose mirror image it is, where the figure is missing, and in older files.
    """

    value: float | None
    interval: Interval | None = None
    band: Interval | None = None
    note: str | None = None
    reversed: Measurement | None = None

    def to_judge(self) -> JudgedFigure | None:
        """The figure as a budget reads it; None where it has no value or no band."""
        if self.value is None or self.band is None:
            return None
        turned = self.reversed
        if turned is None:
            return JudgedFigure(self.value, self.band)
        return JudgedFigure(self.value, self.band, turned.value, turned.band)


@dataclass(frozen=True)
class EdgeCounts:
    """Records on which the EZ ratio stands on its edge rules.

    Attributes:
        n_no_errors: Records that the target model predicts without any error.
        n_no_negative: Records whose error tokens all moved up.
        n_low_evidence: Records with a single error token.
        n_records: Records among which these were counted, also where figures count groups of them; 0 if that
            was not written down.
    """

    n_no_errors: int
    n_no_negative: int
    n_low_evidence: int
    n_records: int = 0


@dataclass(frozen=True)
class Finding:
    """Something that a reader of the figures must know, or that was looked for and not found.

    Attributes:
        name: What was looked at, a few words.
        is_flagged: Whether something was found.
        text: What was found, and what follows from it, in plain sentences.
    """

    name: str
    is_flagged: bool
    text: str


@dataclass(frozen=True)
class AuditResult:
    """One audit: how well the attack told members from non-members at one point of the training.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs done, as a fraction; None if unknown.
        status: `"ok"`, or `"failed"`: then there are no figures and `error` says why.
        is_baseline: True for the audit before the first step.
        score: Name of the score that was asked for; with `"strongest"` several are judged together.
        n_members: Member records scored.
        n_non_members: Non-member records that count: scored, and never fed in training.
        n_members_seen: Members that figures and verdict are about: those that the model was fed so far. None
            where that was not looked at: at the baseline, after the fact, with `assume_seen`.
        decision: The verdict under the budget.
        n_tokens: Scored tokens of all records.
        decided_by: Name of the deciding score: of those that are judged, the one that leaks most. Left empty
            it is `score`.
        metrics: Figures of the deciding score: `"auc"`, `"advantage"`, `"tpr_at_fpr_<fpr>"`.
        judged_beside: The same figures of the other scores that are judged, by their names. Intervals and
            bands of all of them hold together.
        auc_by_score: AUC of scores that are only shown; these decide nothing.
        auc_by_group: AUC of the deciding score within each group of canaries (copies in training, family),
            if there are several; `metrics` then are those of the group that stands for a normal record.
        auc_recent: AUC of the deciding score for the quarter of the members seen that was fed last: they may
            leak more than those of long ago. None if they are too few, or nobody looked.
        checkpoint_holder: AUC of someone who holds the weights of all audits so far, not of the last one
            alone; see `functional.checkpoint_holder_score`. With an interval of this audit alone: it is no
            part of any decision. None until there are two audits after the baseline.
        checkpoint_holder_epsilon: Lower bound of the epsilon of handing out all these weights, from this
            audit alone; None unless membership was drawn by coins.
        n_checkpoints: Audits after the baseline, this one among them, whose weights that holder compares.
        findings: What the audit noticed that changes how its figures read.
        epsilon: Lower bound of epsilon from this audit alone; None unless membership was drawn by coins.
        member_loss: Mean loss over the members' tokens, nats per token.
        non_member_loss: Mean loss over the non-members' tokens: a held-out loss.
        n_error_tokens: Median number of wrongly predicted tokens of a record, on which EZ rests.
        member_edges: Edge records among the members.
        non_member_edges: Edge records among the non-members.
        error: What went wrong, if `status` is `"failed"`.
        seconds: Wall-clock time of the audit.
        overhead: Time that this run's audits took so far, the baseline and this one among them, over the time
            of the training between them; None before the first step. Counted by each process since it began.
        share: Share of the canaries that was scored, in (0, 1]; see `max_overhead` of the callbacks.
        batch_size: Records in a forward pass; smaller than asked for where memory ran out, None if unknown.
        weights: SHA-256, as hexadecimal digits, of a checksum of each tensor of the model, by which it is
            known again; empty where the audit failed, and in older files.
        scores: float64, (n_records,): the deciding score of each record; kept in memory only.
        scores_beside: float64, (n_records,) each: the other scores that are judged; kept in memory only.
        step_scores: float64, (n_records,): EZ against the audit before; kept in memory only.
    """

    step: int
    epoch: float | None
    status: Literal["ok", "failed"]
    is_baseline: bool
    score: str
    n_members: int
    n_non_members: int
    decision: Decision
    n_members_seen: int | None = None
    n_tokens: int = 0
    decided_by: str = ""
    metrics: Mapping[str, Measurement] = field(default_factory=dict)
    judged_beside: Mapping[str, Mapping[str, Measurement]] = field(default_factory=dict)
    auc_by_score: Mapping[str, Measurement] = field(default_factory=dict)
    auc_by_group: Mapping[str, Measurement] = field(default_factory=dict)
    auc_recent: Measurement | None = None
    checkpoint_holder: Measurement | None = None
    checkpoint_holder_epsilon: EpsilonBound | None = None
    n_checkpoints: int | None = None
    findings: tuple[Finding, ...] = ()
    epsilon: EpsilonBound | None = None
    member_loss: float | None = None
    non_member_loss: float | None = None
    n_error_tokens: float | None = None
    member_edges: EdgeCounts | None = None
    non_member_edges: EdgeCounts | None = None
    error: str | None = None
    seconds: float = 0.0
    overhead: float | None = None
    share: float = 1.0
    batch_size: int | None = None
    weights: str = ""
    scores: Float64[np.ndarray, " n_records"] | None = field(default=None, repr=False, compare=False)
    scores_beside: Mapping[str, Float64[np.ndarray, " n_records"]] = field(
        default_factory=dict, repr=False, compare=False
    )
    step_scores: Float64[np.ndarray, " n_records"] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """A single score decides by itself.

        Raises:
            ConfigurationError: if the figures of the deciding score are there twice.
        """
        if not self.decided_by:
            object.__setattr__(self, "decided_by", self.score)
        if self.decided_by in self.judged_beside:
            raise ConfigurationError(
                f"The score {self.decided_by!r:.80} decides, and is judged beside itself: give its figures "
                "as `metrics` alone."
            )

    def __repr__(self) -> str:
        auc = self.metrics.get("auc")
        figure = "" if auc is None or auc.value is None else f", AUC {auc.value:.3f} by {self.decided_by}"
        return f"AuditResult(step {self.step}{figure}, {self.verdict})"

    def _repr_html_(self) -> str:
        from ezmia_callbacks.results.tables import html_table

        return html_table([self], caption=f"Privacy audit, step {self.step}")

    @property
    def verdict(self) -> Literal["baseline", "within budget", "over budget", "not judged", "failed"]:
        """What was found, in one name."""
        if self.status == "failed":
            return "failed"
        if self.is_baseline:
            return "baseline"
        if self.decision.is_within_budget is None:
            return "not judged"
        return "within budget" if self.decision.is_within_budget else "over budget"

    @property
    def judged(self) -> dict[str, Mapping[str, Measurement]]:
        """Figures of every score that is judged, by name, the deciding one first."""
        return {self.decided_by: self.metrics, **self.judged_beside}

    @property
    def judged_scores(self) -> dict[str, Float64[np.ndarray, " n_records"]]:
        """Every score that is judged of each record, by name, the deciding one first; empty from a file."""
        return {} if self.scores is None else {self.decided_by: self.scores, **self.scores_beside}

    def to_dict(self) -> dict[str, Any]:
        """The result as plain dicts, strings, numbers and None, without the records' scores."""
        return {
            key: _plain(asdict(value) if hasattr(value, "__dataclass_fields__") else value)
            for key, value in vars(self).items()
            if key not in _IN_MEMORY
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> AuditResult:
        """The result that `to_dict` was called on.

        Raises:
            ConfigurationError: if something in it is not what `to_dict` writes; names the place.
        """
        return read_value(cls, row, newer=NEWER_FIELDS)

    def to_metrics(self) -> dict[str, float]:
        """Flat plain floats for trackers; a figure that the set cannot resolve is absent, not 0.

        Keys: each metric, `<metric>_lower`/`_upper` (the band), `auc_<name>` of the other scores (where
        several are judged, of the deciding one as well, so that each has its curve) and of the groups of
        canaries, `auc_recent`, `auc_checkpoint_holder`, `n_members_seen`, `member_loss`, `non_member_loss`,
        `overhead`;
        where coins were flipped `epsilon_lower` and `epsilon_ceiling`; under a budget `budget`, and with a
        verdict `over_budget` (0 or 1); `failed` is 1 for a failed audit, which has nothing else.
        """
        if self.status == "failed":
            return {"failed": 1.0}
        flat: dict[str, float] = {}
        for name, measurement in self.metrics.items():
            if measurement.value is not None:
                flat[name] = measurement.value
            band = measurement.band or measurement.interval
            if band is not None:
                flat[f"{name}_lower"] = band.lower
                flat[f"{name}_upper"] = band.upper
        judged = {name: metrics["auc"] for name, metrics in self.judged.items() if "auc" in metrics}
        beside = judged if self.judged_beside else {}
        for name, measurement in {**beside, **self.auc_by_score, **self.auc_by_group}.items():
            if measurement.value is not None:
                flat[f"auc_{name}"] = measurement.value
        for name, single in (
            ("auc_recent", self.auc_recent),
            ("auc_checkpoint_holder", self.checkpoint_holder),
        ):
            if single is not None and single.value is not None:
                flat[name] = single.value
        if self.n_members_seen is not None:
            flat["n_members_seen"] = self.n_members_seen
        if self.epsilon is not None:
            flat["epsilon_lower"], flat["epsilon_ceiling"] = self.epsilon.value, self.epsilon.ceiling
        if self.member_loss is not None and self.non_member_loss is not None:
            flat["member_loss"] = self.member_loss
            flat["non_member_loss"] = self.non_member_loss
        if self.overhead is not None:
            flat["overhead"] = self.overhead
        if self.decision.limit is not None:
            flat["budget"] = self.decision.limit
        if self.decision.limit is not None and self.decision.is_within_budget is not None:
            flat["over_budget"] = 0.0 if self.decision.is_within_budget else 1.0
        return {name: float(value) for name, value in flat.items()}

    def describe(self) -> str:
        """The result as one line for the console, of at most 100 characters, the verdict first.

        It has the figure that was judged, with the band that holds for all audits, and what was compared with
        the limit. All other figures are left to `AuditHistory.table`, trackers and the report.
        """
        when = "; audit before training" if self.is_baseline else f"; audit at step {self.step}"
        verdict = f"{self.verdict}, STOP" if self.decision.stop else self.verdict
        text = " ".join(f"{verdict}: {self._in_short()}".split())
        epoch = "" if self.epoch is None or self.is_baseline else f", epoch {self.epoch:.3g}"
        if len(text + when + epoch) <= _LONGEST_LINE:
            return text + when + epoch
        room = _LONGEST_LINE - len(when)
        return (text if len(text) <= room else f"{text[: room - 3]}...") + when

    def _in_short(self) -> str:
        decision = self.decision
        if self.status == "failed":
            return f"leakage unknown, {self.error}"
        name = next((name for name in self.metrics if metric_label(name) in decision.message), "auc")
        figure = _describe(name, self.metrics.get(name))
        if self.is_baseline:
            return (
                f"{figure}, loss of members {_loss(self.member_loss)}, held out {_loss(self.non_member_loss)}"
            )
        if decision.is_within_budget is None:
            # The verdict has said so.
            reason = decision.message.removeprefix("not judged ").removeprefix("yet: ")
            auc = self.metrics.get("auc")
            if auc is not None and auc.value is None and decision.limit is None:
                figure = f"no figures ({auc.note})"
            return f"{reason}, {figure}" if figure and not decision.stop else reason
        if decision.compared is None or decision.limit is None:
            return figure
        relation = "<=" if decision.is_within_budget else ">"
        compared = f"{decision.compared:.3f} {relation} limit {decision.limit:.3f}"
        return f"{figure}, {'reversed ' if decision.is_reversed else ''}{compared}"


def _describe(name: str, measurement: Measurement | None) -> str:
    """A figure with its band; empty if there is none."""
    if measurement is None or measurement.value is None:
        return ""
    label = "AUC" if name == "auc" else name
    if (fpr := fpr_of_metric(name)) is not None:
        label = f"TPR@{100 * fpr:g}%FPR"
    band = measurement.band or measurement.interval
    text = f"{label} {measurement.value:.3f}"
    return text if band is None else f"{text} [{band.lower:.3f}, {band.upper:.3f}]"


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _plain(value: Any) -> Any:
    """Nested dataclasses inside mappings turned into dicts, NumPy numbers into Python ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(item) for key, item in asdict(value).items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value
