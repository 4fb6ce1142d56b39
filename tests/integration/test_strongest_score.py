"""A run is judged by the score that leaks most, as an attacker would use it."""

import json

import numpy as np
import pytest
import torch
from tiny import make_model

from ezmia_callbacks import AuditHistory, LeakageBudget, PrivacyAuditor, hold_out_canaries
from ezmia_callbacks.report import render_report, summarize, to_document

BUDGET = LeakageBudget(limit=0.6)


def memorized(*, n_epochs=4, **options):
    """Records whose first token nobody can know: EZ looks at it, and hardly at what was learned."""
    rng = np.random.default_rng(0)
    records = [{"input_ids": [1, *rng.integers(3, 43, size=10).tolist()]} for _ in range(180)]
    rows, canaries = hold_out_canaries(records, n_members=60, n_non_members=60, seed=0)
    model = make_model(n_embd=64, initializer_range=0.2)
    auditor = PrivacyAuditor(canaries, n_audits=1, restore=False, **options)
    auditor.begin(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(n_epochs):
        for start in range(0, len(rows), 10):
            ids = torch.tensor([row["input_ids"] for row in rows[start : start + 10]])
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    auditor.audit(model, epoch=float(n_epochs))
    auditor.finish()
    return auditor


@pytest.fixture(scope="module")
def run():
    return memorized(budget=BUDGET)


def test_what_ez_alone_lets_pass_is_over_budget_by_the_strongest(run):
    alone = memorized(budget=BUDGET, score="ez").history[-1]
    strongest = run.history[-1]

    assert alone.decision.is_within_budget
    assert strongest.decision.is_within_budget is False
    assert (strongest.score, strongest.decided_by) == ("strongest", "loss")
    assert "lower bound of AUC (loss)" in strongest.decision.message
    # EZ itself is what it was, and stands beside it.
    assert strongest.judged_beside["ez"]["auc"].value == alone.metrics["auc"].value
    assert f"AUC {strongest.metrics['auc'].value:.3f} [" in strongest.describe()


def test_under_rule_upper_all_scores_have_to_be_within():
    budget = LeakageBudget(limit=0.85, rule="upper")
    alone = memorized(budget=budget, score="ez").history[-1]
    strongest = memorized(budget=budget).history[-1]

    assert alone.decision.is_within_budget
    assert strongest.decision.is_within_budget is False
    # No division is needed: the upper end is that of the score alone.
    by_itself = memorized(budget=budget, score=strongest.decided_by).history[-1]
    assert strongest.metrics["auc"].band.upper == by_itself.metrics["auc"].band.upper
    assert strongest.metrics["auc"].band.lower < by_itself.metrics["auc"].band.lower


def test_every_curve_is_kept_and_every_report_names_the_score(run, tmp_path):
    run.history.save(tmp_path / "history.jsonl")

    history = AuditHistory.load(tmp_path / "history.jsonl")

    assert history[-1].judged == run.history[-1].judged
    assert run.trajectories.score_names == ("ez", "loss_difference", "wbc", "loss")
    document = to_document(history)
    audit = document["runs"][0]["audits"][-1]
    assert audit["decided_by"] == {"name": "loss", "label": "loss"}
    assert {"ez", "loss_difference", "wbc", "loss"} <= {each["name"] for each in audit["auc_by_score"]}
    assert next(each for each in audit["auc_by_score"] if each["name"] == "ez")["band"] is not None
    attack = "the strongest of EZ, loss, loss-difference and WBC at each audit"
    assert attack in render_report(document)
    assert attack in summarize(history)
    json.dumps(document, allow_nan=False)


def test_a_run_goes_on_with_the_scores_that_judged_it(run):
    state = run.state_dict()
    again = PrivacyAuditor(run.canaries, n_audits=2, budget=BUDGET, restore=False)
    other = PrivacyAuditor(run.canaries, n_audits=2, budget=BUDGET, restore=False, score="ez")

    again.load_state_dict(state)

    assert again.history[-1].judged == run.history[-1].judged
    np.testing.assert_equal(again.trajectories.scores, run.trajectories.scores)
    with pytest.raises(ValueError, match="judged by the score 'strongest', and this one would be by 'ez'"):
        other.load_state_dict(state)


def test_where_the_reference_knows_nothing_the_bare_loss_sees_the_members():
    """The other scores subtract the losses of random weights, which are noise."""
    judged = memorized(n_epochs=3).history[-1].judged

    aucs = {name: metrics["auc"].value for name, metrics in judged.items()}
    assert aucs["loss"] > 0.95
    assert max(aucs[name] for name in ("ez", "loss_difference", "wbc")) < 0.7
