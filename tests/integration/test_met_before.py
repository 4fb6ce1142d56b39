"""A model that has met one side of the canaries before training, though both were drawn from one pool."""

import logging

import own_loop
import pytest
import torch
from tiny import make_model

from ezmia_callbacks import LeakageBudget, PrivacyAuditor

BUDGET = LeakageBudget(limit=0.7)


def draw():
    rows, canaries = own_loop.draw(n=180, n_members=60, n_non_members=60)
    return rows, canaries


def memorized(records, *, n_epochs=12):
    """A model that knows these records by heart before the run begins."""
    model = make_model(n_embd=64, initializer_range=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(n_epochs):
        own_loop.train_one_epoch(model, records, optimizer)
    return model


def run(model, **options):
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=1, **options)
    own_loop.run(auditor, rows, n_epochs=1, model=model, learning_rate=1e-3)
    return auditor, auditor.history[-1]


def records_of(*, members):
    _, canaries = draw()
    return [
        r for r, is_member in zip(canaries.records, canaries.is_member, strict=True) if is_member == members
    ]


def test_members_that_were_met_before_leave_no_verdict_and_the_way_out_is_named(caplog):
    model = memorized(records_of(members=True))

    with caplog.at_level(logging.INFO):
        auditor, result = run(model)

    # What was learned before cannot be seen by comparing with the model that had learned it.
    assert result.judged["ez"]["auc"].value < 0.7
    assert result.judged["loss"]["auc"].value > 0.9
    assert result.decision.is_within_budget is None
    assert not result.decision.stop
    assert "had met one side of the canaries" in result.decision.message
    assert "met before training" in {finding.name for finding in result.findings}
    for text in (auditor.history.caveat, caplog.text):
        assert "The model has met the members before" in text
        assert "far too LOW" in text
        assert "`reference=`" in text
    # The opposite of what follows from a split of the user's.
    assert "unless it is well above" not in auditor.history.caveat


def test_the_model_from_before_it_met_them_finds_what_it_knows():
    model = memorized(records_of(members=True))

    auditor, result = run(model, reference=make_model(n_embd=64, initializer_range=0.2))

    assert "met" not in auditor.history.caveat
    assert result.metrics["auc"].value > 0.9
    assert result.decision.is_within_budget is False


def test_a_budget_may_be_judged_all_the_same():
    auditor, result = run(memorized(records_of(members=True)), allow_shift=True, score="ez")

    assert result.decision.is_within_budget
    assert "far too LOW" in auditor.history.caveat


def test_the_bare_loss_compares_with_nothing_and_sees_what_was_met_before():
    _, result = run(memorized(records_of(members=True)), allow_shift=True)

    assert result.decision.is_within_budget is False
    assert result.decided_by == "loss"


def test_non_members_that_were_met_before_make_figures_too_high():
    auditor, result = run(memorized(records_of(members=False)))

    assert "The model has met the non-members before" in auditor.history.caveat
    assert "read too HIGH" in auditor.history.caveat
    assert result.decision.is_within_budget is None


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_met_neither_side_is_judged(seed):
    auditor, result = run(make_model(seed=seed))

    assert "met" not in auditor.history.caveat
    assert result.decision.is_within_budget is not None
