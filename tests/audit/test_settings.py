"""What the user chose: refused early, once, and described in one place."""

import dataclasses
import inspect

import pytest
from docstring_parser import parse

from ezmia_callbacks import (
    LeakageBudget,
    LightningPrivacyAuditCallback,
    PrivacyAuditCallback,
    PrivacyAuditor,
)
from ezmia_callbacks.audit.settings import AuditSettings
from ezmia_callbacks.errors import ConfigurationError

CALLBACKS = [PrivacyAuditCallback, LightningPrivacyAuditCallback]
FIELDS = [field.name for field in dataclasses.fields(AuditSettings)]


class MyAttack:
    name = "mine"
    is_trained_on_membership = False

    def begin(self, model, canaries):
        """Nothing to prepare."""

    def score(self, model, canaries, target, reference):
        """Nothing to score."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.6}, "`budget` must be a LeakageBudget or None, got 0.6"),
        ({"score": "magic"}, "Unknown score 'magic': use 'strongest', one of ez"),
        ({"score": object()}, "or an object with `name`"),
        ({"score": MyAttack(), "max_overhead": 0.1}, "use a built-in score, or fewer canaries"),
        ({"every": "step"}, "`every` must be 'auto', 'epoch', a number of steps >= 1"),
        ({"every": 0}, "got 0"),
        ({"every": True}, "got True"),
        ({"every": 1.0}, "got 1.0"),
        ({"fpr_levels": (0.0,)}, r"`fpr_levels` must lie in \(0, 1\), got \(0.0,\)"),
        ({"confidence": 1.0}, "`confidence` must lie in"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"max_overhead": 1.0}, "`max_overhead` must lie in"),
        ({"reference": 5}, "`reference` must be 'auto', 'adapter', 'copy', a module.*got 5"),
        ({"on_error": "ignore"}, "`on_error` must be 'warn' or 'raise', got 'ignore'"),
    ],
)
def test_what_can_never_work_is_refused_when_written_down(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        AuditSettings(**arguments)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_every_shell_refuses_the_same(callback):
    with pytest.raises(ConfigurationError, match="`every` must be 'auto', 'epoch'"):
        callback(every=-3)


def test_the_level_of_a_budget_is_reported_too():
    settings = AuditSettings(budget=LeakageBudget(0.5, "tpr_at_fpr", fpr=0.05), fpr_levels=[0.1])

    assert settings.reported_fpr_levels == (0.05, 0.1)
    assert settings.fpr_levels == (0.1,)


def test_early_audits_are_for_a_budget_alone():
    budget = LeakageBudget(limit=0.6)

    assert AuditSettings().cadence == "epoch"
    assert AuditSettings(budget=budget).cadence == "auto"
    assert AuditSettings(budget=budget, every="epoch").cadence == "epoch"
    assert AuditSettings(budget=budget, every=5).cadence == 5


def test_weights_are_kept_for_a_budget_alone():
    budget = LeakageBudget(limit=0.6)

    assert AuditSettings(budget=budget).keeps_weights
    assert not AuditSettings(budget=budget, restore=False).keeps_weights
    assert not AuditSettings().keeps_weights


def test_an_attack_of_the_users_goes_by_its_own_name():
    attack = MyAttack()

    assert (AuditSettings(score=attack).score_name, AuditSettings(score=attack).attack) == ("mine", attack)
    assert (AuditSettings().score_name, AuditSettings().attack) == ("strongest", None)


def test_the_auditor_gets_every_choice_that_it_takes():
    parameters = inspect.signature(PrivacyAuditor).parameters

    assert set(AuditSettings().auditor_arguments()) == set(FIELDS) & set(parameters)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_callbacks_have_every_choice_with_the_same_default(callback):
    parameters = inspect.signature(callback).parameters

    defaults = {name: parameters[name].default for name in FIELDS if name != "judge_only"}

    assert defaults == {name: getattr(AuditSettings(), name) for name in defaults}


def described(owner):
    return {param.arg_name: " ".join(param.description.split()) for param in parse(owner.__doc__).params}


@pytest.mark.parametrize("owner", [*CALLBACKS, PrivacyAuditor], ids=lambda owner: owner.__module__)
def test_an_argument_means_the_same_everywhere(owner):
    """Each shell may add where a default of its own comes from; the first words are those of the settings."""
    meanings, found = described(AuditSettings), described(owner)
    # The auditor's reference is one that needs no loading, and it keeps what a callback restores.
    own_words = {"reference", "restore"} if owner is PrivacyAuditor else set()

    differing = [
        name
        for name in meanings.keys() & found.keys() - own_words
        if not found[name].startswith(meanings[name].rstrip("."))
    ]

    assert sorted(differing) == []
    assert len(meanings.keys() & found.keys()) > 10
