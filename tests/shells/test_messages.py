"""What the shells say before a run begins."""

import logging

import pytest

from ezmia_callbacks import LeakageBudget
from ezmia_callbacks.audit.cadence import AuditPlan
from ezmia_callbacks.audit.settings import AuditSettings
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.shells.messages import check_canaries, say_first_audit

LOGGER = "ezmia_callbacks.shells.messages"
STARTING_WEIGHTS = "only the starting weights would be left."


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
            "First audit at step 12 (epoch 0.5); were it over budget, training would stop and stay over "
            "budget.",
        ),
    ],
    ids=["epochs", "no epochs", "stream", "stream without an end", "patience", "nothing restored"],
)
def test_it_is_said_when_the_first_audit_comes_and_what_it_could_cost(plan, settings, message, caplog):
    caplog.set_level(logging.INFO, logger=LOGGER)

    say_first_audit(plan, AuditSettings(**settings))

    assert caplog.record_tuples == [(LOGGER, logging.INFO, message)]


def test_without_a_budget_no_first_audit_is_announced(caplog):
    caplog.set_level(logging.INFO, logger=LOGGER)

    say_first_audit(AuditPlan((12,), True, 12), AuditSettings())

    assert caplog.record_tuples == []


def test_what_is_no_canary_set_is_refused_with_where_they_come_from():
    check_canaries(None)

    with pytest.raises(ConfigurationError, match="must be a CanarySet, got list: use `hold_out_canaries`"):
        check_canaries([])
