"""What a run's figures say in plain words: of the weights that the model was left with first."""

from __future__ import annotations

import math

from ezmia_callbacks.functional.budget import LeakageBudget, fpr_of_metric, mirrored
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.report.labels import moment, percent, percents
from ezmia_callbacks.report.view import MeasuredView, OutcomeView, RefusedView, StatementView, VerdictName
from ezmia_callbacks.results.history import NOTHING_KEPT, AuditHistory
from ezmia_callbacks.results.result import AuditResult, Measurement

__all__: list[str] = []

_NOTHING_KEPT = f"{NOTHING_KEPT}: the model holds the weights from before training."


def verdict_of(result: AuditResult, history: AuditHistory) -> VerdictName:
    """The state of the weights of one audit, by the name that it has everywhere."""
    if result.is_baseline:
        return "baseline"
    if result.decision.is_within_budget is None:
        is_without = history.budget is None and result.decision.limit is None and not result.decision.stop
        return "no budget" if is_without and result.status == "ok" else "not judged"
    return "within budget" if result.decision.is_within_budget else "over budget"


def headline(history: AuditHistory) -> StatementView:
    """The figure to remember: of the weights that the model was left with, else of the last audit."""
    final = history.final_audit
    if final is not None:
        return _nothing_kept(history) if final.is_baseline and len(history) > 1 else _of(final, history)
    if history.final_weights:
        return _refused(
            "The model was left with weights that no audit saw: their leakage is unknown, not absent.",
            history,
        )
    return _of(history[-1], history)


def at_stop(history: AuditHistory) -> StatementView | None:
    """The same of the audit that stopped the run; None if none did, or the headline is about it."""
    stopped = history.stopped
    headed = history.final_audit or (None if history.final_weights else history[-1])
    return None if stopped is None or stopped is headed else _of(stopped, history)


def outcome(history: AuditHistory) -> OutcomeView:
    """How the run ended: the state of the weights that are left, and what happened."""
    kind, label, text = _end(history)
    if history.is_complete is False:
        text += (
            " This history was written while the run was still going on, or the run was interrupted: later "
            "audits, if there were any, are missing, and this is not how it ended."
        )
    return OutcomeView(kind=kind, label=label, text=text, is_stopped=history.stopped is not None)


def _end(history: AuditHistory) -> tuple[VerdictName, str, str]:
    final, stopped = history.final_audit, history.stopped
    if stopped is None:
        told = _unstopped(history)
    else:
        told = (
            f"Stopped at {moment(stopped)}: {sentence(stopped.decision.message)} {_after_the_stop(history)}"
        )
    if final is None and history.final_weights:
        return "not judged", "Not judged: no audit saw the weights that are left", told
    left = final or history[-1]
    if left.is_baseline and len(history) > 1:
        return "nothing kept", "Nothing of this training was kept", told
    if left.is_baseline:
        return "not judged", "Not judged: only the baseline was audited", told
    if left.status == "failed":
        return "not judged", "Not judged: the last audit failed", told
    kind = verdict_of(left, history)
    return kind, kind.capitalize(), told


def _unstopped(history: AuditHistory) -> str:
    final, last = history.final_audit, history[-1]
    if last.status == "failed":
        text = "The run was not stopped, and its last audit failed: there is no verdict on its end."
    elif last.is_baseline:
        return "Only the baseline was audited: there is no verdict on trained weights."
    elif verdict_of(last, history) == "no budget":
        text = "The run was measured without a budget: nothing could stop it."
    else:
        text = f"The run was not stopped. At {moment(last)}: {sentence(last.decision.message)}"
    if final is last or not history.final_weights:
        return text
    return f"{text} {_left_with(history)}"


def _after_the_stop(history: AuditHistory) -> str:
    if history.final_weights:
        return _left_with(history)
    kept = history.last_within_budget
    if kept is None:
        return "No audit was within budget."
    weights = "the weights from before training" if kept.is_baseline else f"those of {moment(kept)}"
    return (
        f"The last weights within budget were {weights}; whether they were put back into the model was not "
        "recorded."
    )


def _left_with(history: AuditHistory) -> str:
    final = history.final_audit
    if final is None:
        return "The model was left with weights that no audit saw."
    if final.is_baseline:
        return _NOTHING_KEPT
    if final.decision.is_within_budget:
        last = ", the last within budget" if final is history.last_within_budget else ""
        return f"The model was left with the weights of {moment(final)}{last}."
    kept = history.last_within_budget
    earlier = "No audit of trained weights was within budget."
    if kept is not None and not kept.is_baseline:
        earlier = f"The last within budget were those of {moment(kept)}."
    return f"The model was left with the weights of {moment(final)}. {earlier}"


def _of(result: AuditResult, history: AuditHistory) -> StatementView:
    if result.status == "failed":
        return _refused(
            f"The audit at {moment(result)} failed: the leakage of these weights is unknown, not absent.",
            history,
        )
    if result.is_baseline:
        return _refused("Only the baseline was audited: nothing is known about trained weights.", history)
    measurement = result.metrics.get("auc", Measurement(None, note="no AUC was measured"))
    value, interval = _number(measurement.value), measurement.band or measurement.interval
    if value is None or interval is None:
        reason = measurement.note or "no reason was recorded"
        return _refused(
            f"At {moment(result)} the AUC has no value with an interval ({reason}): the leakage of these "
            "weights is unknown.",
            history,
        )
    # Who sees that members score lower turns the score around.
    is_reversed = interval.upper < 0.5
    told_value, told = (1.0 - value, mirrored(interval)) if is_reversed else (value, interval)
    shown = percents([told_value, told.lower, told.upper])
    return MeasuredView(
        status="measured",
        moment=moment(result),
        verdict=verdict_of(result, history),
        value=value,
        lower=float(interval.lower),
        upper=float(interval.upper),
        is_band=measurement.band is not None,
        confidence=_confidence(measurement, history),
        n_members=_n_counted(result),
        n_non_members=int(result.n_non_members),
        is_reversed=is_reversed,
        percent=shown[0],
        lower_percent=shown[1],
        upper_percent=shown[2],
        text=(
            f"At {moment(result)} an attacker who is shown one record that was trained on and one that was "
            f"not picks the right one {shown[0]} times in 100 [{shown[1]} to {shown[2]}]; guessing would be "
            "right 50 times."
        ),
        against_limit=_against_limit(result, history),
        meaning=_meaning(interval, value),
        basis=_basis(result, measurement, history),
    )


def _refused(text: str, history: AuditHistory) -> RefusedView:
    return RefusedView(status="refused", title="Unknown", text=text, against_limit=_limit(history.budget))


def _nothing_kept(history: AuditHistory) -> RefusedView:
    limit = _limit(history.budget)
    return RefusedView(status="refused", title="Nothing kept", text=_NOTHING_KEPT, against_limit=limit)


def _n_counted(result: AuditResult) -> int:
    return int(result.n_members if result.n_members_seen is None else result.n_members_seen)


def _confidence(measurement: Measurement, history: AuditHistory) -> float:
    return history.confidence if measurement.band is None else history.band_confidence


def _basis(result: AuditResult, measurement: Measurement, history: AuditHistory) -> str:
    kind = "interval of this audit alone" if measurement.band is None else "band over all audits of the run"
    n_counted = _n_counted(result)
    of_all = "" if n_counted == result.n_members else f" fed so far, of {result.n_members}"
    return (
        f"{percent(_confidence(measurement, history))} {kind}; {n_counted} members{of_all}, "
        f"{result.n_non_members} non-members"
    )


def _meaning(interval: Interval, value: float) -> str:
    if interval.lower > 0.5:
        return "Guessing lies outside the interval: this is leakage, not chance."
    if interval.upper < 0.5:
        return (
            "Guessing lies outside the interval: this is leakage, not chance. Records that were trained on "
            f"score LOWER than the others (AUC {value:.3f}); the attacker picks the one with the lower score."
        )
    return (
        "Guessing lies within the interval: leakage was not detected with this many records, which does not "
        "show that there is none."
    )


def _against_limit(result: AuditResult, history: AuditHistory) -> str:
    """The limit in the same words as the figure, whether it is exceeded, and how sure that is."""
    budget, decision = history.budget, result.decision
    if budget is None:
        return _limit(None)
    if decision.is_within_budget is None:
        return f"{_limit(budget)} {decision.message[:1].upper()}{sentence(decision.message[1:])}"
    measurement = result.judged.get(decision.score or result.decided_by, {}).get(budget.name)
    turned = measurement.reversed if measurement is not None and decision.is_reversed else measurement
    band = None if turned is None else turned.band
    if band is None and decision.is_reversed and measurement is not None and measurement.band is not None:
        band = mirrored(measurement.band)
    return (
        f"{_limit(budget)} {_figure_of(budget, turned)}{_how_sure(band, budget, decision.is_within_budget)}"
    )


def _limit(budget: LeakageBudget | None) -> str:
    if budget is None:
        return "No limit was set."
    limit = percents([budget.limit])[0]
    if budget.metric == "auc":
        return f"The limit is {limit} times in 100."
    fpr = fpr_of_metric(budget.name)
    if fpr is not None:
        return (
            f"The limit is on confident accusations: of an attacker who wrongly accuses at most "
            f"{100 * fpr:g} in 100 records that were not trained on, it is that {limit} in 100 of those that "
            "were are identified."
        )
    return f"The limit is a membership advantage of {budget.limit:.3f} (0 is guessing, 1 is certainty)."


def _figure_of(budget: LeakageBudget, measurement: Measurement | None) -> str:
    """The figure that the limit is on, where the headline is another one."""
    if budget.metric == "auc" or measurement is None or measurement.value is None:
        return ""
    band = measurement.band or measurement.interval
    ends = "" if band is None else f" [{band.lower:.3f}, {band.upper:.3f}]"
    return f"Measured: {measurement.value:.3f}{ends}. "


def _how_sure(band: Interval | None, budget: LeakageBudget, is_within: bool) -> str:
    state = "within budget" if is_within else "over budget"
    if band is None:
        return f"That is {state}."
    sure = f"at {percent(budget.confidence)} confidence"
    if band.lower > budget.limit:
        return f"It is exceeded, {sure}: the whole band lies above it."
    if band.upper <= budget.limit:
        return f"It is kept, {sure}: the whole band lies below it."
    return (
        f"Whether it is exceeded is open, for the band reaches across it; by the rule of this budget that is "
        f"{state}."
    )


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def sentence(text: str) -> str:
    """A text on one line, with a full stop."""
    text = " ".join(text.split())
    return text if text.endswith(".") else text + "."
