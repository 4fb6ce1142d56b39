"""What is said of a run that was stopped, and of one that ends, from audits made of plain values."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from ezmia_callbacks import AuditHistory, AuditResult, LeakageBudget
from ezmia_callbacks.audit.outcome import lines_of_end, lines_of_failed_restore, lines_of_restore
from ezmia_callbacks.functional import Decision

NOTHING = "NOTHING OF THIS TRAINING WAS KEPT"
DECISIONS = {
    "baseline": Decision(False, True, "baseline"),
    "within": Decision(False, True, "within budget"),
    "over": Decision(False, False, "over budget"),
    "stop": Decision(True, False, "over budget"),
    "cannot": Decision(True, None, "cannot be judged any more"),
    "not yet": Decision(False, None, "not judged yet: members fed: 0", limit=0.6),
    "failed": Decision(False, None, "the audit failed: leakage is unknown"),
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
            weights=f"digest {i}",
        )
        for i, state in enumerate(states)
    ]
    return AuditHistory(tuple(audits), LeakageBudget(limit=0.6))


def texts(lines):
    return [line.text for line in lines]


def without_table(lines):
    return [line for line in lines if not line.text.startswith("Privacy audits")]


@pytest.mark.parametrize(
    ("states", "ended"),
    [
        (("within", "within", "stop"), "Stopped at step 9: leakage exceeded the budget."),
        (("within", "within", "over"), "Training ended at step 9: leakage exceeded the budget."),
        (
            ("within", "within", "cannot"),
            "Stopped at step 9: leakage could no longer be judged against the budget.",
        ),
    ],
    ids=["stopped", "ended while patience lasted", "not to be judged"],
)
def test_it_is_said_where_the_run_ended_why_and_what_the_model_holds(states, ended):
    history = make_history("baseline", *states)

    lines = lines_of_restore(history.last_within_budget, history)

    assert {line.level for line in lines} == {logging.WARNING}
    assert texts(lines) == [
        ended,
        "Restored the weights of step 6, the last audit within it (every weight was checked).",
        "What was trained after step 6, until step 9, is gone (`keep_rejected=True` would keep it aside).",
    ]


def test_the_weights_over_the_budget_are_named_where_they_were_kept_aside():
    history = make_history("baseline", "within", "stop")

    lines = lines_of_restore(history.last_within_budget, history, rejected=Path("run/over_budget/step-6"))

    assert texts(lines)[-1] == "The weights over the budget are in run/over_budget/step-6."
    assert "is gone" not in " ".join(texts(lines))


def test_weights_that_are_put_back_within_the_budget_are_no_stop():
    history = make_history("baseline", "within", "within")

    (restored, lost) = texts(lines_of_restore(history[1], history))

    assert restored.startswith("Restored the weights of step 3, the last audit within it that could be kept")
    assert lost.startswith("What was trained after step 3, until step 6, is gone")


def test_a_stop_at_the_first_audit_says_that_nothing_was_kept():
    history = make_history("baseline", "stop")

    lines = texts(lines_of_restore(history[0], history))

    assert lines[1] == f"{NOTHING}: no audit was within the budget. Restored the starting weights."


def test_a_stop_after_weights_that_could_not_be_kept_says_that_nothing_was_kept():
    history = make_history("baseline", "within", "stop")

    lines = texts(lines_of_restore(history[0], history))

    assert lines[1:3] == [
        f"{NOTHING}: the weights of step 3, within it, could not be kept.",
        "Restored the starting weights (every weight was checked).",
    ]


@pytest.mark.parametrize(
    ("steps", "epoch", "advice"),
    [
        (40, 1.0, "audit more often (`every=0.25`), or give the model"),
        (40, 0.125, "audit more often (`every=20`, in steps), or give the model"),
        (1, 0.125, "To keep a part of it, give the model less room"),
    ],
)
def test_who_lost_all_is_told_to_audit_before_the_first_audit_if_that_is_possible(steps, epoch, advice):
    history = make_history("baseline", "stop", steps=steps, epoch=epoch)

    assert advice in texts(lines_of_restore(history[0], history))[2]


@pytest.mark.parametrize(
    ("last", "verdict"), [("stop", "is OVER BUDGET."), ("cannot", "may be OVER BUDGET.")]
)
def test_a_model_that_stays_over_budget_is_an_error_in_capitals(last, verdict):
    lines = lines_of_failed_restore("The file is gone.", make_history("baseline", "within", last))

    assert {line.level for line in lines} == {logging.ERROR}
    assert f"{NOTHING} within the budget: the model {verdict}" in texts(lines)
    assert "Earlier weights could not be restored: The file is gone." in texts(lines)


@pytest.mark.parametrize(
    ("states", "left", "level", "expected"),
    [
        (
            ("within", "within"),
            2,
            logging.INFO,
            "The model holds the weights of step 6: within budget.",
        ),
        (
            ("within", "stop"),
            0,
            logging.WARNING,
            f"{NOTHING}: the model holds the starting weights.",
        ),
        (
            ("within", "stop"),
            2,
            logging.ERROR,
            "The model holds the weights of step 6: it is OVER BUDGET.",
        ),
        (
            ("within", "not yet"),
            2,
            logging.ERROR,
            "Training ended without a verdict, so that the model may be OVER BUDGET: not judged yet: "
            "members fed: 0.",
        ),
        (
            ("failed", "failed"),
            2,
            logging.ERROR,
            "Training ended without a verdict, so that the model may be OVER BUDGET: the audit failed: "
            "leakage is unknown.",
        ),
        (
            ("within", "within"),
            None,
            logging.WARNING,
            "The model that is left does not hold the weights of any audit: its leakage is unknown, and it "
            "may be OVER BUDGET. Audit it before it is finished.",
        ),
        (
            ("within", "within"),
            1,
            logging.INFO,
            "The model holds the weights of step 3, not the last ones: its figures are those of that audit: "
            "within budget.",
        ),
    ],
    ids=["within", "nothing kept", "over", "not judged", "all failed", "not audited since", "earlier"],
)
def test_a_run_ends_with_what_is_known_of_the_model_that_is_left(states, left, level, expected):
    history = make_history("baseline", *states)

    lines = lines_of_end(history, None if left is None else history[left], is_restored=False)

    assert without_table(lines)[-1] == (level, expected)


def test_what_was_put_back_is_not_remarked_on_again():
    history = make_history("baseline", "within", "stop")

    lines = lines_of_end(history, history[1], is_restored=True)

    assert texts(lines)[-1] == "The model holds the weights of step 3: within budget."


def test_without_a_budget_only_surprises_are_said():
    history = replace(make_history("baseline", "not yet", "not yet"), budget=None)

    assert without_table(lines_of_end(history, history[-1], is_restored=False)) == []
    assert texts(lines_of_end(history, history[1], is_restored=False))[-1] == (
        "The model holds the weights of step 3, not the last ones: its figures are those of that audit."
    )


def test_a_training_that_changed_no_weight_lost_nothing():
    history = make_history("baseline", "within")
    same = replace(history, results=tuple(replace(result, weights="one digest") for result in history))

    assert NOTHING not in " ".join(texts(lines_of_end(same, same[0], is_restored=False)))


def test_failed_audits_are_counted_as_unknown():
    history = make_history("baseline", "failed", "within", "failed")

    assert (
        logging.WARNING,
        "2 of 3 privacy audits failed: at those points leakage is unknown, not absent.",
    ) in lines_of_end(history, history[-1], is_restored=False)


def test_weights_that_wait_to_be_put_back_are_an_error():
    history = make_history("baseline", "within", "stop")

    lines = lines_of_end(history, history[-1], is_restored=False, can_restore=True)

    assert lines[-1].level == logging.ERROR
    assert "call `restore_within_budget(model, optimizer)`" in lines[-1].text


def test_the_table_of_a_long_run_has_its_last_audits():
    history = make_history("baseline", *["within"] * 99, "stop")

    table, *_ = texts(lines_of_end(history, history[-1], is_restored=False))

    head, _, *rows = table.splitlines()
    assert head == "Privacy audits, the last 30 of 101 (stop when the lower bound of AUC exceeds 0.600):"
    assert len(rows) == 30
    assert rows[-1].endswith("over budget")


def test_a_run_without_an_audit_after_the_baseline_has_no_table():
    history = make_history("baseline")

    assert lines_of_end(history, history[0], is_restored=False) == ()


def test_starting_weights_that_are_put_back_before_any_training_are_no_loss():
    history = make_history("baseline")

    assert texts(lines_of_restore(history[0], history)) == [
        "Restored the starting weights (every weight was checked)."
    ]
