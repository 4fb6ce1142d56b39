import json

import pytest
from command_line import refusal

from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.functional.planning import canaries_needed


def test_a_plan_says_what_the_library_says(call):
    plan = canaries_needed(LeakageBudget(limit=0.6), n_audits=10, expected=0.7, power=0.8, n_scores=4)

    code, out, err = call("plan", "--max-auc", 0.6, "--audits", 10, "--expected", 0.7, "--power", 0.8)
    _, content, _ = call("plan", "--max-auc", 0.6, "--audits", 10, "--expected", 0.7, "--json")

    assert (code, err) == (0, "")
    assert plan.describe() in out
    assert "0.7 " in out
    content = json.loads(content)
    assert (content["n_members"], content["text"]) == (plan.n_members, plan.describe())
    assert {"expected": 0.7, "power": 0.8, "n_members": 261, "n_non_members": 261} in content["alternatives"]


def test_a_single_score_needs_fewer_canaries(call):
    _, content, _ = call(
        "plan", "--max-auc", 0.6, "--audits", 10, "--expected", 0.7, "--score", "ez", "--json"
    )

    assert json.loads(content)["n_members"] == 211


@pytest.mark.parametrize("rule", ["lower", "upper", "point"])
def test_every_rule_can_be_planned(rule, call):
    code, out, _ = call("plan", "--max-auc", 0.7, "--rule", rule)

    assert code == 0
    assert "50 % chance" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "A plan needs a budget"),
        (["plan", "--max-auc", "0.6", "--expected", "0.55"], "`expected` is 0.55"),
        (["plan", "--max-auc", "0.6", "--audits", "0"], "`n_audits` is 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, call):
    assert message in refusal(call(*arguments))
