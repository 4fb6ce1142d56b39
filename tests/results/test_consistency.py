"""Edited histories: the verdict is that of the figures, and the report says what the file says."""

from dataclasses import replace

import pytest

from ezmia_callbacks import AuditHistory, AuditResult, Decision, LeakageBudget
from ezmia_callbacks.functional import Interval
from ezmia_callbacks.functional.budget import decide, decide_by_strongest
from ezmia_callbacks.report import summarize, to_document
from ezmia_callbacks.results import Measurement
from ezmia_callbacks.results.consistency import CONTRADICTION, contradictions_of, judged_anew


def interval(lower, upper):
    return Interval(lower=lower, upper=upper, confidence=0.95, method="delong")


AUC = Measurement(0.7, interval(0.66, 0.74), interval(0.65, 0.75))
LOW_AUC = Measurement(0.3, interval(0.26, 0.34), interval(0.25, 0.35))
TPR = Measurement(
    0.1, interval(0.05, 0.2), interval(0.02, 0.3), reversed=Measurement(0.6, None, interval(0.45, 0.7))
)
BASELINE = AuditResult(0, 0.0, "ok", True, "ez", 50, 50, Decision(False, True, "baseline"))


def audit(decision, step=9, **fields):
    metrics = {"auc": AUC, **fields.pop("metrics", {})}
    return AuditResult(step, 1.0, "ok", False, "ez", 50, 50, decision, metrics=metrics, **fields)


def honest(budget, figure=AUC, n_over_before=0):
    turned = figure.reversed
    return decide(
        budget,
        figure.value,
        band=figure.band,
        reversed_value=turned and turned.value,
        reversed_band=turned and turned.band,
        n_over_before=n_over_before,
    )


BUDGETS = [
    (LeakageBudget(limit=0.6), AUC),
    (LeakageBudget(limit=0.6), LOW_AUC),
    (LeakageBudget(limit=0.6, rule="upper", patience=2), AUC),
    (LeakageBudget(limit=0.8, rule="point"), AUC),
    (LeakageBudget(limit=0.4, metric="tpr_at_fpr"), TPR),
]


@pytest.mark.parametrize(("budget", "figure"), BUDGETS)
def test_what_an_audit_decided_agrees_with_its_figures(budget, figure):
    result = audit(honest(budget, figure), metrics={budget.name: figure})
    whole = AuditHistory((BASELINE, result, result), budget)

    assert contradictions_of(result, budget) == ()
    assert judged_anew(whole) == whole
    rows = AuditHistory(budget=budget).with_results(whole.to_dicts())
    assert judged_anew(rows) == rows


@pytest.mark.parametrize(("budget", "figure"), BUDGETS)
def test_the_other_verdict_is_found_whatever_the_rule(budget, figure):
    decision = honest(budget, figure)
    turned = replace(decision, is_within_budget=not decision.is_within_budget)
    result = audit(turned, metrics={budget.name: figure})

    (baseline, found) = judged_anew(AuditHistory((BASELINE, result), budget))

    assert baseline == BASELINE
    assert found.decision.is_within_budget is decision.is_within_budget
    assert [finding.name for finding in found.findings if finding.is_flagged] == [CONTRADICTION]


BUDGET = LeakageBudget(limit=0.6)
OVER = honest(BUDGET)
FORGED = {
    "the verdict alone": replace(OVER, is_within_budget=True),
    "verdict and message": Decision(
        False, True, "within budget: lower bound of AUC 0.550 <= 0.600", 0.55, 0.6
    ),
    "the number": replace(OVER, compared=0.62),
    "the limit": replace(OVER, limit=0.9, is_within_budget=True),
    "the direction": replace(OVER, is_reversed=True),
    "the message": replace(OVER, message="within budget: lower bound of AUC 0.550 <= 0.600"),
    "a number in the message": replace(OVER, message="over budget: lower bound of AUC 0.601 > 0.600"),
    "no verdict, with the words of one": Decision(False, None, "within budget: all is well", limit=0.6),
}


@pytest.mark.parametrize("decision", FORGED.values(), ids=FORGED.keys())
def test_a_forged_decision_is_replaced_and_named(decision):
    found = judged_anew(AuditHistory((BASELINE, audit(decision)), BUDGET))[1]

    assert found.decision.is_within_budget is False
    assert found.decision.message == OVER.message
    assert "The file says" in found.findings[-1].text


def test_a_raised_limit_does_not_keep_the_verdicts_of_the_old_one():
    raised = replace(BUDGET, limit=0.9)
    lowered = AuditHistory((BASELINE, audit(honest(raised))), BUDGET)

    assert judged_anew(lowered)[1].decision.is_within_budget is False
    assert "that the limit was 0.9, not 0.6" in judged_anew(lowered)[1].findings[0].text


def test_an_audit_that_calls_itself_a_baseline_is_judged():
    hidden = replace(audit(Decision(False, True, "baseline: nothing was trained yet")), is_baseline=True)

    found = judged_anew(AuditHistory((BASELINE, hidden), BUDGET))[1]

    assert not found.is_baseline
    assert found.decision.is_within_budget is False
    assert "that it is a baseline" in found.findings[0].text


@pytest.mark.parametrize(
    ("result", "budget", "words"),
    [
        (replace(audit(OVER), status="failed", error="gone"), BUDGET, "of an audit that failed"),
        (replace(audit(OVER), metrics={"auc": replace(AUC, band=None)}), BUDGET, "has no AUC with a band"),
        (replace(audit(OVER), metrics={}), BUDGET, "has no AUC with a band"),
        (audit(OVER), None, "names no budget"),
    ],
)
def test_a_verdict_that_nothing_carries_is_none(result, budget, words):
    claimed = replace(result, decision=replace(OVER, is_within_budget=True))

    found = judged_anew(AuditHistory((BASELINE, claimed), budget))[1]

    assert found.decision.is_within_budget is None
    assert words in found.findings[0].text


def test_an_audit_without_a_verdict_stays_without_one():
    open_ones = (
        audit(Decision(False, None, "not judged yet: members fed: 3", limit=0.6)),
        audit(Decision(True, None, "AUC cannot be judged any more (few): the run was to end by now")),
    )
    history = AuditHistory((BASELINE, *open_ones), BUDGET)

    assert judged_anew(history) == history


def test_audits_in_a_row_are_counted_anew():
    budget = replace(BUDGET, patience=2)
    forged = replace(honest(budget), is_within_budget=True, n_over_in_a_row=0)
    history = AuditHistory((BASELINE, audit(forged, 1), audit(forged, 2)), budget)

    assert [result.decision.n_over_in_a_row for result in judged_anew(history)] == [0, 1, 2]


def test_every_report_shows_the_verdict_of_the_figures():
    forged = audit(FORGED["verdict and message"])
    history = AuditHistory((BASELINE, forged), BUDGET)

    (run,) = to_document(history)["runs"]

    assert run["outcome"]["kind"] == "over budget"
    assert run["audits"][1]["decision"]["verdict"] == "over budget"
    assert "The file says" in run["audits"][1]["findings"][0]["text"]
    assert "0.650 > 0.600" in summarize(history)
    assert "The file says" in summarize(history)


def test_the_strongest_of_several_scores_decides_also_in_a_file():
    """EZ is within the budget; an edited file that says so of the audit is found out by the other score."""
    budget = LeakageBudget(limit=0.6)
    ez, wbc = Measurement(0.55, None, interval(0.5, 0.6)), AUC
    others = {"loss_difference": {"auc": ez}, "loss": {"auc": ez}}
    decided = decide_by_strongest(budget, {"ez": ez.to_judge(), "wbc": wbc.to_judge()})
    of_all = {"score": "strongest", "decided_by": "wbc", "judged_beside": {"ez": {"auc": ez}, **others}}
    result = replace(audit(decided), **of_all)
    by_ez = replace(
        audit(decide(budget, ez.value, band=ez.band), metrics={"auc": ez}),
        score="strongest",
        judged_beside={"wbc": {"auc": wbc}, **others},
    )

    assert contradictions_of(result, budget) == ()
    assert contradictions_of(by_ez, budget)
    assert judged_anew(AuditHistory((BASELINE, by_ez), budget))[-1].decision.score == "wbc"


def test_an_audit_that_lost_one_of_its_scores_is_not_within_budget():
    """The strongest may have been the one that is missing."""
    budget = LeakageBudget(limit=0.8)
    lost = replace(audit(honest(budget)), score="strongest", decided_by="ez", judged_beside={})

    assert "of every score that is judged" in contradictions_of(lost, budget)[0]
    assert judged_anew(AuditHistory((BASELINE, lost), budget))[-1].decision.is_within_budget is None
