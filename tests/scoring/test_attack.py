"""An attack of the user's decides, is held to its contract, and changes nothing in training."""

import re

import numpy as np
import pytest
import torch
from own_loop import draw, run, train_one_epoch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import LeakageBudget, PrivacyAuditor, insert_canaries
from ezmia_callbacks.errors import AuditError, ConfigurationError
from ezmia_callbacks.functional import auc


class CrossFitted:
    """A classifier trained on the canaries; each record is scored by one that has not seen it."""

    name = "cross_fitted"
    is_trained_on_membership = True

    def begin(self, model, canaries):
        self.n_begun = getattr(self, "n_begun", 0) + 1
        self.start = next(model.parameters()).detach().clone()

    def score(self, model, canaries, target, reference):
        assert not torch.is_grad_enabled()
        assert not model.training
        shift = target.log_probs - reference.log_probs
        features = [
            (shift[a:b].mean(), shift[a:b].max(), target.log_probs[a:b].mean())
            for a, b in zip(target.offsets[:-1], target.offsets[1:], strict=True)
        ]
        classifier = LogisticRegression()
        return cross_val_predict(
            classifier, np.array(features), canaries.is_member, cv=5, method="decision_function"
        )


def test_an_attack_that_is_trained_on_the_canaries_decides():
    rows, canaries = draw()
    attack = CrossFitted()
    auditor = PrivacyAuditor(
        canaries, score=attack, budget=LeakageBudget(limit=0.7, rule="point"), n_audits=8
    )

    run(auditor, rows, n_epochs=8)

    last = auditor.history[-1]
    assert attack.n_begun == 1
    assert last.score == "cross_fitted"
    assert last.metrics["auc"].value == auc(last.scores, canaries.is_member)
    assert auditor.history.stopped is last
    assert "ez" in last.auc_by_score
    assert auditor.history.run_metadata.score == "cross_fitted"


def test_an_attack_leaves_training_as_it_was():
    rows, canaries = draw()
    models = []
    for score in ("ez", CrossFitted()):
        torch.manual_seed(0)
        auditor = PrivacyAuditor(canaries, score=score, n_audits=3)
        models.append(run(auditor, rows, n_epochs=3, model=make_model(dropout=0.2)))

    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wrong", [np.zeros(3), np.full(90, np.nan), ["a"] * 90, None])
def test_scores_that_are_none_are_refused(wrong):
    _, canaries = draw()

    class Broken(CrossFitted):
        def score(self, *_):
            return wrong

    with pytest.raises(AuditError, match="The attack 'cross_fitted' returned"):
        PrivacyAuditor(canaries, score=Broken()).begin(make_model())


def test_an_error_in_an_attack_is_a_gap_in_the_curve():
    rows, canaries = draw()
    attack = CrossFitted()
    model = make_model()
    auditor = PrivacyAuditor(canaries, score=attack, n_audits=1)
    auditor.begin(model)
    train_one_epoch(model, rows, torch.optim.Adam(model.parameters()))

    def fail(*_):
        raise RuntimeError("no such file")

    attack.score = fail
    assert re.fullmatch(r"RuntimeError in \S+\.fail, line \d+", auditor.audit(model).error)


def test_what_is_no_attack_is_refused():
    _, canaries = draw()

    with pytest.raises(ConfigurationError, match="an object with `name`"):
        PrivacyAuditor(canaries, score=object())


def test_an_attack_that_is_trained_on_the_canaries_has_no_epsilon():
    rows, canaries = insert_canaries(
        make_rows(make_texts(1500)), n_canaries=100, length=12, max_fraction=0.9, seed=0
    )
    for is_trained in (True, False):
        attack = CrossFitted()
        attack.is_trained_on_membership = is_trained
        model = make_model()
        auditor = PrivacyAuditor(canaries, score=attack, n_audits=1)
        auditor.begin(model)
        train_one_epoch(model, rows[:80], torch.optim.Adam(model.parameters()))

        assert (auditor.audit(model).epsilon is None) == is_trained


def test_an_attack_that_is_trained_on_the_canaries_is_refused_on_tiers():
    _, canaries = insert_canaries(
        make_rows(make_texts(1500)), n_canaries=200, repetitions=(1, 4), length=12, max_fraction=0.9, seed=0
    )

    with pytest.raises(ConfigurationError, match="which its folds would tear apart"):
        PrivacyAuditor(canaries, score=CrossFitted())
