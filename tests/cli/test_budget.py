import pytest

from ezmia_callbacks.cli.budget import Rule, budget_of
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import LeakageBudget

OTHERS = {"fpr": 0.05, "rule": Rule.POINT, "confidence": 0.9}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((None, None), None),
        ((0.6, None), LeakageBudget(0.6, "auc", 0.05, "point", 0.9)),
        ((None, 0.2), LeakageBudget(0.2, "tpr_at_fpr", 0.05, "point", 0.9)),
    ],
)
def test_the_option_that_is_given_names_the_metric(limits, expected):
    max_auc, max_tpr = limits

    assert budget_of(max_auc=max_auc, max_tpr=max_tpr, **OTHERS) == expected


def test_two_limits_are_refused():
    with pytest.raises(ConfigurationError, match="both given"):
        budget_of(max_auc=0.6, max_tpr=0.2, **OTHERS)
