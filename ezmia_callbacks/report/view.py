"""All that a report says of its runs, as typed values: every format and every picture draws from these.

Fields are named as in the JSON document, which is nothing but these values written down; `schema.json` beside
this module describes it. A figure that is missing is None with a note, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, cast

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.safe_text import for_document
from ezmia_callbacks.typed_rows import read_value

__all__: list[str] = []

# Of the document; a change that a reader could trip over raises it.
SCHEMA_VERSION = 2

_View = TypeVar("_View")

# One name for each state, wherever a person or a program reads of it.
VerdictName = Literal["baseline", "within budget", "over budget", "not judged", "no budget", "nothing kept"]


@dataclass(frozen=True)
class IntervalView:
    """The two ends of what is known about a figure."""

    lower: float
    upper: float
    confidence: float
    method: str


@dataclass(frozen=True)
class FigureView:
    """One figure: its own interval, the band that decisions read, and why something of it is missing."""

    value: float | None
    interval: IntervalView | None
    band: IntervalView | None
    note: str | None

    @property
    def certain(self) -> IntervalView | None:
        """The band where there is one, else the interval of the audit alone."""
        return self.band or self.interval


@dataclass(frozen=True)
class NamedFigureView:
    """The same of another score, or of a group of canaries."""

    name: str
    label: str
    value: float | None
    interval: IntervalView | None
    band: IntervalView | None
    note: str | None

    @property
    def certain(self) -> IntervalView | None:
        """The band where there is one, else the interval of the audit alone."""
        return self.band or self.interval


AnyFigure = FigureView | NamedFigureView


@dataclass(frozen=True)
class NameView:
    """What a program calls something, and what a reader does."""

    name: str
    label: str


@dataclass(frozen=True)
class MetricView:
    """A metric of a run, and what it reads where nothing leaks."""

    name: str
    label: str
    chance: float | None


@dataclass(frozen=True)
class BudgetView:
    """The budget that a run was held against."""

    metric: str
    label: str
    limit: float
    rule: Literal["lower", "point", "upper"]
    confidence: float
    patience: int
    text: str


@dataclass(frozen=True)
class EpsilonView:
    """A lower bound of epsilon, beside the largest that the canaries could have shown."""

    value: float | None
    ceiling: float | None
    n: int
    confidence: float
    delta: float
    method: str
    text: str


@dataclass(frozen=True)
class EdgesView:
    """Records on which the EZ ratio stands on its edge rules."""

    n_no_errors: int
    n_no_negative: int
    n_low_evidence: int


@dataclass(frozen=True)
class CheckView:
    """Something that was looked for, and whether it was found."""

    name: str
    is_flagged: bool
    text: str


@dataclass(frozen=True)
class VerdictView:
    """What one audit means under the budget."""

    verdict: VerdictName
    label: str
    stops: bool
    message: str
    compared: float | None
    limit: float | None
    n_over_in_a_row: int


@dataclass(frozen=True)
class AuditView:
    """One audit."""

    moment: str
    step: int
    epoch: float | None
    status: Literal["ok", "failed"]
    is_baseline: bool
    is_final: bool
    decided_by: NameView
    metrics: Mapping[str, FigureView]
    auc_by_score: tuple[NamedFigureView, ...]
    auc_by_group: tuple[NamedFigureView, ...]
    n_members: int
    n_members_seen: int | None
    auc_recent: FigureView | None
    checkpoint_holder: FigureView | None
    checkpoint_holder_epsilon: EpsilonView | None
    n_checkpoints: int | None
    epsilon: EpsilonView | None
    member_loss: float | None
    non_member_loss: float | None
    n_error_tokens: float | None
    member_edges: EdgesView | None
    non_member_edges: EdgesView | None
    decision: VerdictView
    findings: tuple[CheckView, ...]
    error: str | None
    seconds: float
    overhead: float | None
    share: float
    batch_size: int | None


@dataclass(frozen=True)
class MeasuredView:
    """The one figure to remember of some weights."""

    status: Literal["measured"]
    moment: str
    verdict: VerdictName
    value: float
    lower: float
    upper: float
    is_band: bool
    confidence: float
    n_members: int
    n_non_members: int
    is_reversed: bool
    percent: str
    lower_percent: str
    upper_percent: str
    text: str
    against_limit: str
    basis: str
    meaning: str


@dataclass(frozen=True)
class RefusedView:
    """Why there is no such figure."""

    status: Literal["refused"]
    title: str
    text: str
    against_limit: str


StatementView = MeasuredView | RefusedView


@dataclass(frozen=True)
class OutcomeView:
    """The state of the weights that a run has left, and how it came to them."""

    kind: VerdictName
    label: str
    text: str
    is_stopped: bool


@dataclass(frozen=True)
class RunView:
    """One run."""

    label: str
    score: NameView
    judged: tuple[NameView, ...]
    attack: str
    n_members: int
    n_non_members: int
    n_tokens: int | None
    n_audits: int
    n_failed: int
    seconds: float
    confidence: float
    band_confidence: float
    budget: BudgetView | None
    decides: str
    metrics: tuple[MetricView, ...]
    headline: StatementView
    at_stop: StatementView | None
    outcome: OutcomeView
    next_steps: tuple[str, ...]
    is_final_known: bool
    failures: str
    checkpoint_holder: str
    caveat: str
    about: str
    promise: str
    checks: tuple[CheckView, ...]
    facts: Mapping[str, str]
    audits: tuple[AuditView, ...]

    @property
    def audits_after_baseline(self) -> tuple[AuditView, ...]:
        """The audits of trained weights."""
        return tuple(audit for audit in self.audits if not audit.is_baseline)

    @property
    def stopped(self) -> AuditView | None:
        """The audit that stopped the run, if one did: over its budget, or because it could not be judged."""
        return next((audit for audit in self.audits if audit.decision.stops), None)

    @property
    def last_within_budget(self) -> AuditView | None:
        """The latest audit within the budget; the baseline counts, for nothing was trained yet."""
        within = [a for a in self.audits if a.decision.verdict in ("within budget", "baseline")]
        return within[-1] if within else None

    @property
    def left(self) -> AuditView | None:
        """The audit of the weights that the run has left, or its last one where nobody looked."""
        if not self.is_final_known:
            return self.audits[-1]
        return next((audit for audit in self.audits if audit.is_final), None)

    @property
    def kept(self) -> AuditView | None:
        """Of a stopped run the audit of the weights that it has left, if not that which stopped it."""
        if self.stopped is None:
            return None
        if not self.is_final_known:
            return self.last_within_budget
        return None if self.left is self.stopped else self.left


@dataclass(frozen=True)
class ComparisonView:
    """What comes out of several runs, their order, and what stands in the way of comparing them."""

    text: str
    ranking: tuple[str, ...]
    differs_in: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class ExposedRecordView:
    """A record that was asked for by name."""

    record_id: str
    score: float
    share_above: float
    first_step: int
    first_epoch: float | None
    n_audits_above: int
    text: str | None


@dataclass(frozen=True)
class ExposedView:
    """The records that an attack would pick out first."""

    text: str
    n_exposed: int
    n_expected: float
    n_members: int
    n_non_members: int
    fpr: float
    step: int
    records: tuple[ExposedRecordView, ...]


@dataclass(frozen=True)
class Subject:
    """What a report is about, in the words of whoever writes it; empty where it is not stated.

    Attributes:
        model: The model that was trained.
        data: The data that it was trained on.
        author: Who writes the report.

    >>> Subject(model="support-assistant 1.3", data="tickets of 2025").author
    ''
    """

    model: str = ""
    data: str = ""
    author: str = ""


@dataclass(frozen=True)
class TermView:
    """How to read a term."""

    term: str
    anchor: str
    text: str


@dataclass(frozen=True)
class ReportView:
    """A report on one or several runs."""

    schema_version: int
    title: str
    subject: Subject
    runs: tuple[RunView, ...]
    comparison: ComparisonView | None
    exposed: ExposedView | None
    reading: tuple[TermView, ...]
    limits: tuple[str, ...]


def with_valid_texts(value: _View) -> _View:
    """The same view, with U+FFFD for what is no character in a page, a document or a picture."""
    return cast(_View, _with_valid_texts(value))


def _with_valid_texts(value: Any) -> Any:
    if isinstance(value, str):
        return for_document(value)
    if isinstance(value, tuple):
        return tuple(map(_with_valid_texts, value))
    if isinstance(value, Mapping):
        return {for_document(key): _with_valid_texts(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _with_valid_texts(item) for name, item in vars(value).items()})
    return value


def to_plain(value: Any) -> Any:
    """A view as plain dicts, lists, strings, numbers and None, ready for JSON.

    >>> to_plain(TermView("AUC", "auc", "The share of pairs ..."))
    {'term': 'AUC', 'anchor': 'auc', 'text': 'The share of pairs ...'}
    """
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(document: Mapping[str, Any]) -> ReportView:
    """The view that `to_plain` wrote down.

    Raises:
        ConfigurationError: if the document has another schema, or something of it is missing.
    """
    version = document.get("schema_version") if isinstance(document, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ConfigurationError(
            f"Got a report document of schema {version!r:.40}, need {SCHEMA_VERSION}: write it again from "
            "the audit history."
        )
    try:
        view = with_valid_texts(read_value(ReportView, document))
        if not view.runs or not all(run.audits for run in view.runs):
            raise ConfigurationError("it has no runs, or one without audits")
        if (len(view.runs) > 1) != (view.comparison is not None):
            raise ConfigurationError("`comparison` is there for several runs, and for them alone")
        return view
    except ConfigurationError as error:
        raise ConfigurationError(
            f"The report document is not what its schema asks for ({error}): write it again from the audit "
            "history."
        ) from error
