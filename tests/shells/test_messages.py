"""What the shells say when a run ends, from audits made of plain values."""

import logging
from pathlib import Path

import pytest

from ezmia_callbacks import AuditHistory, AuditResult, LeakageBudget
from ezmia_callbacks.audit.cadence import AuditPlan
from ezmia_callbacks.audit.settings import AuditSettings
from ezmia_callbacks.errors import AuditError, ConfigurationError
from ezmia_callbacks.functional import Decision
from ezmia_callbacks.shells.messages import (
    check_canaries,
    log_first_audit,
    log_not_restored,
    log_restored,
    warn_of_failed_audits,
)

LOGGER = "ezmia_callbacks.shells.messages"
DECISIONS = {
    "baseline": Decision(False, True, "baseline"),
    "within": Decision(False, True, "within budget"),
    "over": Decision(False, False, "over budget"),
    "stop": Decision(True, False, "over budget"),
    "unjudged": Decision(True, None, "cannot be judged any more"),
    "failed": Decision(False, None, "failed"),
}


def make_history(*states, epoch=3.0, steps=3):
    audits = [
        AuditResult(
            step=steps * i,
            epoch=epoch * i,
            status="failed" if state == "failed" else "ok",
            is_baseline=state == "baseline",
            score="ez",
            n_members=20,
            n_non_members=30,
            decision=DECISIONS[state],
            error="RuntimeError: no" if state == "failed" else None,
        )
        for i, state in enumerate(states)
    ]
    return AuditHistory(tuple(audits), LeakageBudget(limit=0.6))


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (
            ("baseline", "within", "within", "stop"),
            "Stopped at step 9: leakage exceeded the budget. Restored the weights of step 6, the last audit "
            "within it.",
        ),
        (
            ("baseline", "within", "over"),
            "Training ended at step 9: leakage exceeded the budget. Restored the weights of step 3, the last "
            "audit within it.",
        ),
        (
            ("baseline", "within", "unjudged"),
            "Stopped at step 9: leakage could no longer be judged against the budget. Restored the weights "
            "of step 3, the last audit within it.",
        ),
        (
            ("baseline", "stop"),
            "Stopped at step 9: leakage exceeded the budget. Restored the starting weights, the last ones "
            "within it. To keep part of the training, audit more often (`every=0.25`), or give the model "
            "less room to memorize: LoRA, a smaller learning rate.",
        ),
    ],
    ids=["stopped", "ended while patience lasted", "not to be judged", "starting weights"],
)
def test_it_is_said_where_the_run_ended_why_and_what_the_model_holds(states, message, caplog):
    history = make_history(*states)

    log_restored(history.last_within_budget, history, step=9)

    checked = " (checked: every weight is, and the canaries that were scored again say the same)"
    ((_, level, said),) = caplog.record_tuples
    assert (level, said.replace(checked, "").partition(" What was trained")[0]) == (logging.WARNING, message)
    assert checked in said


def test_it_is_said_what_is_lost_and_how_to_keep_it(caplog):
    history = make_history("baseline", "within", "stop")

    log_restored(history.last_within_budget, history, step=9)
    log_restored(history.last_within_budget, history, step=9, rejected=Path("run/over_budget/step-9"))

    lost, kept = caplog.messages
    assert lost.endswith(
        "What was trained after step 3, until step 9, is gone (`keep_rejected=True` would keep it aside)."
    )
    assert kept.endswith("The weights over the budget are in run/over_budget/step-9.")


@pytest.mark.parametrize(
    ("steps", "epoch", "advice"),
    [
        (40, 1.0, "audit more often (`every=0.25`), or give the model"),
        (40, 0.125, "audit more often (`every=20`, in steps), or give the model"),
        (1, 0.125, "To keep part of the training, give the model less room"),
    ],
)
def test_who_lost_all_is_told_to_audit_before_the_first_audit_if_that_is_possible(
    steps, epoch, advice, caplog
):
    history = make_history("baseline", "stop", steps=steps, epoch=epoch)

    log_restored(history.last_within_budget, history, step=steps)

    assert advice in caplog.text


@pytest.mark.parametrize(
    ("last", "why", "verdict"),
    [
        ("stop", "leakage exceeded the budget", "is OVER BUDGET."),
        ("unjudged", "leakage could no longer be judged against the budget", "may be OVER BUDGET."),
    ],
)
def test_a_model_that_stays_over_budget_is_an_error_in_capitals(last, why, verdict, caplog):
    log_not_restored(AuditError("The file is gone."), make_history("baseline", "within", last), step=6)

    message = (
        f"Stopped at step 6: {why}, and earlier weights could not be restored: The file is gone. "
        f"The model {verdict}"
    )
    assert caplog.record_tuples == [(LOGGER, logging.ERROR, message)]


def test_failed_audits_are_counted_as_unknown(caplog):
    warn_of_failed_audits(make_history("baseline", "failed", "within", "failed"))

    message = "2 of 3 privacy audits failed: at those points leakage is unknown, not absent."
    assert caplog.record_tuples == [(LOGGER, logging.WARNING, message)]


def test_without_a_failed_audit_nothing_is_said(caplog):
    warn_of_failed_audits(make_history("baseline", "within"))

    assert caplog.record_tuples == []


STARTING_WEIGHTS = "the starting weights would be all that is left."


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        (
            AuditPlan((12, 25), True, 100),
            {"budget": LeakageBudget(limit=0.6)},
            f"First audit at step 12 (epoch 0.12); were it over budget, {STARTING_WEIGHTS}",
        ),
        (
            AuditPlan((12, 25), True),
            {"budget": LeakageBudget(limit=0.6)},
            f"First audit at step 12; were it over budget, {STARTING_WEIGHTS}",
        ),
        (
            AuditPlan((12, 25), False),
            {"budget": LeakageBudget(limit=0.6)},
            f"First audit at step 12 at the latest; were it over budget, {STARTING_WEIGHTS}",
        ),
        (
            AuditPlan((), False),
            {"budget": LeakageBudget(limit=0.6)},
            f"First audit at the end of the first epoch; were it over budget, {STARTING_WEIGHTS}",
        ),
        (
            AuditPlan((12, 25), True, 24),
            {"budget": LeakageBudget(limit=0.6, patience=2)},
            f"First audit at step 12 (epoch 0.5); were it and the next 2 over budget, {STARTING_WEIGHTS}",
        ),
        (
            AuditPlan((12, 25), True, 24),
            {"budget": LeakageBudget(limit=0.6), "restore": False},
            "First audit at step 12 (epoch 0.5); were it over budget, training would stop with the weights "
            "over budget.",
        ),
    ],
    ids=["epochs", "no epochs", "stream", "stream without an end", "patience", "nothing restored"],
)
def test_it_is_said_when_the_first_audit_comes_and_what_it_could_cost(plan, settings, message, caplog):
    caplog.set_level(logging.INFO, logger=LOGGER)

    log_first_audit(plan, AuditSettings(**settings))

    assert caplog.record_tuples == [(LOGGER, logging.INFO, message)]


def test_without_a_budget_no_first_audit_is_announced(caplog):
    caplog.set_level(logging.INFO, logger=LOGGER)

    log_first_audit(AuditPlan((12,), True, 12), AuditSettings())

    assert caplog.record_tuples == []


def test_what_is_no_canary_set_is_refused_with_where_they_come_from():
    check_canaries(None)

    with pytest.raises(ConfigurationError, match="must be a CanarySet, got list: use `hold_out_canaries`"):
        check_canaries([])
