import json
import re

import pytest
from command_line import refusal, write_jsonl
from tiny import make_texts

from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.functional.planning import canaries_needed, decision_power
from ezmia_callbacks.functional.sizes import audit_reach


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


def test_a_training_set_can_be_planned_without_a_budget(call):
    reach = audit_reach(300, 150, n_audits=4, confidence=0.9, score="ez")
    arguments = ["plan", "--rows", 1500, "--audits", 4, "--confidence", 0.9, "--score", "ez"]

    code, out, err = call(*arguments)
    _, content, _ = call(*arguments, "--json")

    assert (code, err) == (0, "")
    assert out.startswith(
        "1500 rows: 300 members, which stay in training, and 150 non-members, which leave it"
    )
    assert reach.describe() in out
    assert json.loads(content) == {"rows": {"n_rows": 1500, **reach.to_dict()}}


@pytest.mark.parametrize(("n_rows", "is_little"), [(120, True), (1_500, False)])
def test_what_can_be_done_with_few_rows_is_said(n_rows, is_little, call):
    _, out, _ = call("plan", "--rows", n_rows)

    assert ("That is little. A split with --members 38 --non-members 19 can be drawn" in out) == is_little


BUDGET = ["--max-auc", 0.6, "--expected", 0.7, "--audits", 10]


def test_a_training_set_that_is_enough_for_a_budget_is_told_so(call):
    code, out, _ = call("plan", "--rows", 5_000, *BUDGET)
    _, content, _ = call("plan", "--rows", 5_000, *BUDGET, "--json")

    assert code == 0
    assert "They are enough for this budget" in out
    assert json.loads(content)["rows"]["is_enough"] is True


def test_rows_that_are_proposed_for_a_budget_are_enough(call):
    _, out, _ = call("plan", "--rows", 300, *BUDGET)
    (proposed,) = re.findall(r"(\d+) rows have room for them", out)

    _, content, _ = call("plan", "--rows", proposed, *BUDGET, "--json")

    assert "too few for this budget, and so are all 300 rows" in out
    assert json.loads(content)["rows"]["is_enough"] is True


def test_sizes_that_are_proposed_for_a_budget_can_be_split_off_and_decide_it(call, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in make_texts(1_000)])
    _, out, _ = call("plan", "--rows", 1_000, *BUDGET)
    (proposed,) = re.findall(r"ask ezmia split for (--members \d+ --non-members \d+),", out)

    code, out, _ = call("split", data, "-o", tmp_path / "out", *proposed.split(), "--json")

    drawn = json.loads(out)
    assert code == 0
    reached = decision_power(
        LeakageBudget(limit=0.6),
        expected=0.7,
        n_members=drawn["n_members"],
        n_non_members=drawn["n_non_members"],
        failure_probability=0.005,
        n_scores=4,
    )
    assert reached >= 0.8


def test_a_budget_that_the_rows_cannot_resolve_is_no_error(call):
    code, out, _ = call("plan", "--rows", 500, "--max-tpr", 0.1)

    assert code == 0
    assert "They are too few for this budget, and so are all 500 rows. 5740 rows have room for them" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "A plan needs a budget"),
        (["plan", "--max-auc", "0.6", "--expected", "0.55"], "--expected is 0.55"),
        (["plan", "--max-auc", "0.6", "--audits", "0"], "--audits is 0"),
        (["plan", "--rows", "1500", "--audits", "0"], "--audits is 0"),
        (["plan", "--rows", "1500", "--confidence", "2"], "--confidence must lie in (0, 1), got 2"),
        (["plan", "--max-auc", "0.6", "--ratio", "0"], "--ratio is 0.0"),
        (["plan", "--max-auc", "0.6", "--power", "80"], "--power is 80"),
        (["plan", "--max-auc", "6"], "--max-auc must lie strictly between 0.5 (chance) and 1, got 6"),
        (["plan", "--max-tpr", "0.01"], "--max-tpr must lie strictly between 0.01 (chance) and 1, got 0.01"),
        (["plan", "--max-tpr", "0.1", "--fpr", "7"], "--fpr must lie in (0, 1), got 7"),
        (["plan", "--max-auc", "0.6", "--score", "magic"], "Unknown --score 'magic': use strongest, or"),
        (["plan", "--rows", "60"], "A split with --members 38 --non-members 19 can be drawn"),
        (["plan", "--rows", "12"], "No split can be drawn from fewer than 20 rows"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, call):
    assert message in refusal(call(*arguments))
