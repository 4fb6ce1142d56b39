"""From audit histories to the view that every report draws from, and to the JSON document.

What stands here is chosen field by field: no record id, text or score of a record gets in unless it was
handed over for that purpose.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.files import FOR_OTHERS, PRIVATE, write_atomically
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.functional.epsilon import EpsilonBound
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.report.comparison import comparison
from ezmia_callbacks.report.labels import (
    chance_of,
    histories_by_label,
    metric_label,
    moment,
    percent,
    score_label,
)
from ezmia_callbacks.report.next_steps import next_steps
from ezmia_callbacks.report.statements import at_stop, headline, outcome, verdict_of
from ezmia_callbacks.report.view import (
    SCHEMA_VERSION,
    AuditView,
    BudgetView,
    CheckView,
    EdgesView,
    EpsilonView,
    ExposedRecordView,
    ExposedView,
    FigureView,
    IntervalView,
    MetricView,
    NamedFigureView,
    NameView,
    ReportView,
    RunView,
    Subject,
    TermView,
    VerdictView,
    to_plain,
    with_valid_texts,
)
from ezmia_callbacks.report.wording import LIMITS, READING
from ezmia_callbacks.results.consistency import judged_anew
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult, EdgeCounts, Finding, Measurement

if TYPE_CHECKING:
    from ezmia_callbacks.results.trajectories import ExposedRecords

__all__: list[str] = []

Document = dict[str, Any]


def to_document(
    histories: AuditHistory | Mapping[str, AuditHistory],
    *,
    title: str | None = None,
    subject: Subject | None = None,
    exposed: ExposedRecords | None = None,
    texts: Mapping[str, str] | None = None,
) -> Document:
    """All that a report on one or several runs says, as plain dicts, lists, strings, numbers and None.

    `schema.json` beside this module describes it. A figure that is missing is None with a note, never 0.

    Args:
        histories: The audits of one run, or of several by label.
        title: Title of the report.
        subject: Model, data and author, as the report is to name them.
        exposed: Records to name, as `most_exposed` found them; by default no record is named.
        texts: Texts by record id, shown beside `exposed`; by default no text is shown.

    Raises:
        ConfigurationError: if there is no history, one has no audits, `exposed` is given for several runs, or
            `texts` without `exposed`.
    """
    document: Document = to_plain(
        report_view(histories, title=title, subject=subject, exposed=exposed, texts=texts)
    )
    return document


def write_json(
    histories: AuditHistory | Mapping[str, AuditHistory],
    path: str | Path,
    *,
    title: str | None = None,
    subject: Subject | None = None,
    exposed: ExposedRecords | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write `to_document` as a JSON file, whole or not at all.

    Args:
        histories: The audits of one run, or of several by label.
        path: File to write.
        title: Title of the report.
        subject: Model, data and author, as the report is to name them.
        exposed: Records to name; by default no record is named.
        texts: Texts by record id, shown beside `exposed`.

    Raises:
        ConfigurationError: as `to_document`.
    """
    document = to_document(histories, title=title, subject=subject, exposed=exposed, texts=texts)
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    # With records named it says who was in the training set.
    write_atomically(Path(path), text, mode=FOR_OTHERS if exposed is None else PRIVATE)


def report_view(
    histories: AuditHistory | Mapping[str, AuditHistory],
    *,
    title: str | None = None,
    subject: Subject | None = None,
    exposed: ExposedRecords | None = None,
    texts: Mapping[str, str] | None = None,
) -> ReportView:
    """All that a report on one or several runs says, as typed values; the arguments of `to_document`."""
    runs = {label: judged_anew(history) for label, history in histories_by_label(histories).items()}
    if exposed is not None and len(runs) > 1:
        raise ConfigurationError("`exposed` names records of one run: write a report for each run.")
    if texts is not None and exposed is None:
        raise ConfigurationError("`texts` are shown beside the records of `exposed`, which is missing.")
    view = ReportView(
        schema_version=SCHEMA_VERSION,
        title=title or "Membership leakage during fine-tuning",
        subject=_subject(subject or Subject(), runs),
        runs=tuple(
            _run(label, history, names_records=exposed is not None) for label, history in runs.items()
        ),
        comparison=comparison(runs),
        exposed=None if exposed is None else _exposed(exposed, texts or {}),
        reading=tuple(TermView(term, anchor, text) for term, anchor, text in READING),
        limits=LIMITS,
    )
    return with_valid_texts(view)


def _subject(stated: Subject, runs: Mapping[str, AuditHistory]) -> Subject:
    """What is stated; the model, where it is not, as the runs name theirs."""
    models = dict.fromkeys(history.run_metadata.model or "" for history in runs.values())
    return stated if stated.model else replace(stated, model=", ".join(filter(None, models)))


def _run(label: str, history: AuditHistory, *, names_records: bool) -> RunView:
    first = history[0]
    judged = _judged(history)
    ended = outcome(history)
    return RunView(
        label=label,
        score=NameView(first.score, score_label(first.score)),
        judged=judged,
        attack=_attack(judged),
        n_members=int(first.n_members),
        n_non_members=int(first.n_non_members),
        n_tokens=max(int(result.n_tokens) for result in history) or None,
        n_audits=len(history),
        n_failed=history.n_failed,
        seconds=float(sum(result.seconds for result in history)),
        confidence=history.confidence,
        band_confidence=history.band_confidence,
        budget=_budget(history.budget),
        decides="auc" if history.budget is None else history.budget.name,
        metrics=_names(history),
        headline=headline(history),
        at_stop=at_stop(history),
        outcome=ended,
        next_steps=next_steps(history, state=ended.kind, names_records=names_records),
        is_final_known=bool(history.final_weights),
        failures=_failures(history),
        checkpoint_holder=_checkpoint_holder(history),
        caveat=history.caveat,
        about=history.about,
        promise=_promise(history),
        checks=(*_baseline_check(history), *map(_finding, history.findings)),
        facts=history.run_metadata.to_dict(),
        audits=tuple(_audit(result, history) for result in history),
    )


def _judged(history: AuditHistory) -> tuple[NameView, ...]:
    """The scores that are judged, EZ first."""
    names = {name for result in history if result.status == "ok" for name in result.judged}
    return tuple(NameView(name, score_label(name)) for name in _ez_first(names or {history[0].score}))


def _ez_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name != "ez", name))


def _attack(judged: Sequence[NameView]) -> str:
    labels = [name.label for name in judged]
    if len(labels) == 1:
        return labels[0]
    return f"the strongest of {', '.join(labels[:-1])} and {labels[-1]} at each audit"


def _budget(budget: LeakageBudget | None) -> BudgetView | None:
    if budget is None:
        return None
    return BudgetView(
        metric=budget.name,
        label=budget.label,
        limit=float(budget.limit),
        rule=budget.rule,
        confidence=budget.confidence,
        patience=budget.patience,
        text=budget.describe(),
    )


def _names(history: AuditHistory) -> tuple[MetricView, ...]:
    """The metrics of the run in the order in which they are shown."""
    seen = dict.fromkeys(name for result in history for name in result.metrics)
    return tuple(MetricView(name, metric_label(name), chance_of(name)) for name in seen)


def _audit(result: AuditResult, history: AuditHistory) -> AuditView:
    return AuditView(
        moment=moment(result),
        step=int(result.step),
        epoch=_number(result.epoch),
        status=result.status,
        is_baseline=result.is_baseline,
        is_final=result is history.final_audit,
        decided_by=NameView(result.decided_by, score_label(result.decided_by)),
        metrics={name: _figure(measurement) for name, measurement in result.metrics.items()},
        auc_by_score=tuple(
            _named(name, score_label(name), measurement)
            for name, measurement in _auc_by_score(result).items()
        ),
        auc_by_group=tuple(
            _named(name, name, measurement) for name, measurement in result.auc_by_group.items()
        ),
        n_members=int(result.n_members),
        n_members_seen=result.n_members_seen,
        auc_recent=None if result.auc_recent is None else _figure(result.auc_recent),
        checkpoint_holder=None if result.checkpoint_holder is None else _figure(result.checkpoint_holder),
        checkpoint_holder_epsilon=_epsilon(result.checkpoint_holder_epsilon),
        n_checkpoints=result.n_checkpoints,
        epsilon=_epsilon(result.epsilon),
        member_loss=_number(result.member_loss),
        non_member_loss=_number(result.non_member_loss),
        n_error_tokens=_number(result.n_error_tokens),
        member_edges=_edges(result.member_edges),
        non_member_edges=_edges(result.non_member_edges),
        decision=_decision(result, history),
        findings=tuple(_finding(finding) for finding in result.findings),
        error=result.error,
        seconds=float(result.seconds),
        overhead=_number(result.overhead),
        share=float(result.share),
        batch_size=result.batch_size,
    )


def _auc_by_score(result: AuditResult) -> dict[str, Measurement]:
    """AUC of the other scores; where several are judged, of each of them first."""
    judged = {name: metrics["auc"] for name, metrics in result.judged.items() if "auc" in metrics}
    beside = {name: judged[name] for name in _ez_first(judged)}
    return {**(beside if result.judged_beside else {}), **result.auc_by_score}


def _named(name: str, label: str, measurement: Measurement) -> NamedFigureView:
    figure = _figure(measurement)
    return NamedFigureView(name, label, figure.value, figure.interval, figure.band, figure.note)


def _checkpoint_holder(history: AuditHistory) -> str:
    """What leaks to someone who holds the weights of all audits, at the last one that says; empty if none."""
    result = next((each for each in reversed(history.results) if each.checkpoint_holder is not None), None)
    if result is None or result.checkpoint_holder is None:
        return ""
    found = result.checkpoint_holder
    n_audits = sum(each.status == "ok" and each.step <= result.step for each in history.audits_after_baseline)
    # Steps that an interrupted run has lost are missing in the middle.
    all_of = "all" if result.n_checkpoints == n_audits else f"{result.n_checkpoints} of"
    about = f"the checkpoints of {all_of} {n_audits} audits"
    if found.value is None or found.interval is None:
        return f"Leakage to someone who holds {about} is unknown: {found.note}."
    ends = found.interval
    sentences = [
        f"Leakage to someone who holds {about} up to {moment(result)}: AUC {found.value:.3f} "
        f"[{ends.lower:.3f}, {ends.upper:.3f}], interval of this audit alone at {percent(ends.confidence)}; "
        "not part of the budget, which is about the weights of one audit."
    ]
    deciding = result.metrics.get("auc")
    alone = None if deciding is None else deciding.value
    if alone is not None and abs(found.value - 0.5) < abs(alone - 0.5):
        sentences.append(
            f"That is no reassurance: the last of these checkpoints alone reads {alone:.3f}, and who holds "
            "them all holds that one, so this way of combining them misses some of the leakage."
        )
    if (bound := result.checkpoint_holder_epsilon) is not None:
        sentences.append(f"Of a pipeline that hands out all of them: {bound.describe()}.")
    return " ".join(sentences)


def _figure(measurement: Measurement) -> FigureView:
    return FigureView(
        value=_number(measurement.value),
        interval=_interval(measurement.interval),
        band=_interval(measurement.band),
        note=measurement.note,
    )


def _interval(interval: Interval | None) -> IntervalView | None:
    if interval is None:
        return None
    return IntervalView(
        lower=float(interval.lower),
        upper=float(interval.upper),
        confidence=float(interval.confidence),
        method=interval.method,
    )


def _epsilon(bound: EpsilonBound | None) -> EpsilonView | None:
    if bound is None:
        return None
    return EpsilonView(
        value=_number(bound.value),
        ceiling=_number(bound.ceiling),
        n=int(bound.n),
        confidence=float(bound.confidence),
        delta=float(bound.delta),
        method=bound.method,
        text=bound.describe(),
    )


def _number(value: float | None) -> float | None:
    """A plain float; None for what is missing or no number, which JSON has no way to write."""
    return float(value) if value is not None and math.isfinite(value) else None


def _edges(edges: EdgeCounts | None) -> EdgesView | None:
    if edges is None:
        return None
    return EdgesView(
        n_no_errors=int(edges.n_no_errors),
        n_no_negative=int(edges.n_no_negative),
        n_low_evidence=int(edges.n_low_evidence),
    )


def _finding(finding: Finding) -> CheckView:
    return CheckView(name=finding.name, is_flagged=finding.is_flagged, text=finding.text)


def _decision(result: AuditResult, history: AuditHistory) -> VerdictView:
    decision, verdict = result.decision, verdict_of(result, history)
    label = verdict.capitalize()
    if result.status == "failed":
        label += ": audit failed"
    elif decision.stop:
        label += ": stopped"
    return VerdictView(
        verdict=verdict,
        label=label,
        stops=decision.stop,
        message=decision.message,
        compared=_number(decision.compared),
        limit=_number(decision.limit),
        n_over_in_a_row=decision.n_over_in_a_row,
    )


def _failures(history: AuditHistory) -> str:
    """What failed audits leave open; empty if none failed."""
    if not history.n_failed:
        return ""
    text = (
        f"{history.n_failed} of {len(history)} audits FAILED. Leakage there is unknown; it is neither zero "
        "nor within budget."
    )
    if history[-1].status == "failed":
        text += " The last audit is one of them: the leakage of the final weights is unknown."
    return text


def _promise(history: AuditHistory) -> str:
    risk = f"{100 * (1 - history.band_confidence):.3g} %"
    text = (
        f"The bands hold for all audits of this run together at {percent(history.band_confidence)} "
        "(union bound)."
    )
    if history.budget is None:
        return text
    text += {
        "lower": f" A run whose true leakage stays within the limit is stopped with probability at most "
        f"{risk}; a run that goes on may still exceed it.",
        "upper": f" A run whose true leakage exceeds the limit goes on with probability at most {risk}.",
        "point": " The stop reads the bare estimate and carries no such promise.",
    }[history.budget.rule]
    return f"{text} {history.run_metadata.power or ''}".rstrip()


def _baseline_check(history: AuditHistory) -> list[CheckView]:
    """What the baseline says about members and non-members before any training."""
    baseline = next((result for result in history if result.is_baseline), None)
    measurement = None if baseline is None else _auc_by_score(baseline).get("loss")
    if measurement is None or measurement.value is None or measurement.interval is None:
        return []
    lower, upper = measurement.interval.lower, measurement.interval.upper
    is_flagged = 0.5 not in measurement.interval
    text = (
        "Before training a score that compares with the reference ties on all records, so its AUC is 0.5 by "
        f"construction; the one to look at is the AUC of the bare loss, {measurement.value:.3f} "
        f"[{lower:.3f}, {upper:.3f}]. "
    )
    text += (
        "It excludes 0.5: members and non-members differed before any training. If they come from different "
        "sources, the leakage figures include this difference; if both were drawn from one pool, the model "
        "had met one side before, and figures that compare with it read far too low for members that it met."
        if is_flagged
        else "It agrees with 0.5: no sign that members and non-members differed beforehand."
    )
    return [CheckView("difference before training", is_flagged, text)]


def _exposed(exposed: ExposedRecords, texts: Mapping[str, str]) -> ExposedView:
    return ExposedView(
        text=exposed.describe(),
        n_exposed=int(exposed.n_exposed),
        n_expected=float(exposed.n_expected),
        n_members=int(exposed.n_members),
        n_non_members=int(exposed.n_non_members),
        fpr=float(exposed.fpr),
        step=int(exposed.step),
        records=tuple(
            ExposedRecordView(
                record_id=record.record_id,
                score=float(record.score),
                share_above=float(record.share_above),
                first_step=int(record.first_step),
                first_epoch=_number(record.first_epoch),
                n_audits_above=int(record.n_audits_above),
                text=texts.get(record.record_id),
            )
            for record in exposed.records
        ),
    )
