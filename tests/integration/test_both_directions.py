"""Leakage below one half: members that were unlearned score lower than non-members."""

import numpy as np
import own_loop
import pytest
import torch
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import LeakageBudget, PrivacyAuditor, hold_out_canaries
from ezmia_callbacks.functional import delong_interval
from ezmia_callbacks.functional.budget import decide
from ezmia_callbacks.functional.roc import auc


def unlearn(model, forgotten, kept, *, n_epochs=4):
    """Gradient ascent on some rows, and descent on others, so that the model stays one."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for start in [*range(0, len(forgotten), 8)] * n_epochs:
        up, down = (
            torch.tensor([row["input_ids"] for row in rows[start : start + 8]]) for rows in (forgotten, kept)
        )
        optimizer.zero_grad()
        (model(input_ids=down, labels=down).loss - 0.5 * model(input_ids=up, labels=up).loss).backward()
        optimizer.step()


@pytest.mark.parametrize("metric", ["auc", "advantage"])
def test_unlearned_members_are_over_budget_and_the_verdict_says_in_which_direction(metric, caplog):
    known = make_rows(make_texts(200, seed=9, n_words=24))
    members, canaries = hold_out_canaries(
        make_rows(make_texts(120, n_words=24)), n_members=60, n_non_members=60, seed=0
    )
    # Wide weights remember single records within a few epochs.
    model = make_model(n_embd=64, initializer_range=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(2):
        own_loop.train_one_epoch(model, known, optimizer)
    budget = LeakageBudget(metric=metric, limit=0.6 if metric == "auc" else 0.2)
    auditor = PrivacyAuditor(canaries, budget=budget, n_audits=1)
    auditor.begin(model)
    unlearn(model, members, known[:60])

    result = auditor.audit(model)

    assert result.metrics["auc"].value < 0.2
    assert (result.decision.stop, result.decision.is_within_budget) == (True, False)
    assert "members score LOWER than non-members" in result.decision.message
    assert ", reversed " in result.describe()
    assert "reversed" in {finding.name for finding in result.findings}
    assert "an attacker turns the score around" in caplog.text


def test_both_directions_together_keep_the_error_rate():
    """No leakage and a limit next to chance: either end of the band can stop the run falsely, and both do."""
    rng, n_runs = np.random.default_rng(0), 600
    is_member = np.arange(300) < 150
    budget = LeakageBudget(limit=0.501)
    stopped = []
    for _ in range(n_runs):
        scores = rng.normal(size=300)
        band = delong_interval(scores, is_member, confidence=0.95)
        stopped.append(decide(budget, auc(scores, is_member), band=band))

    share = np.mean([decision.stop for decision in stopped])
    reversed_share = np.mean([decision.stop and decision.is_reversed for decision in stopped])

    assert share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_runs)
    assert 0.0 < reversed_share < share
