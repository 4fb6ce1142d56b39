"""What a person reads first of a run: of the model that was left, in plain words."""

from dataclasses import replace

import pytest
from example_runs import audit, failure, history, interval, left_with, lora_run, stopped_run

from ezmia_callbacks.functional.budget import Decision, JudgedFigure, LeakageBudget, decide_by_strongest
from ezmia_callbacks.report import summarize
from ezmia_callbacks.report.document import report_view
from ezmia_callbacks.results.result import Measurement

START = audit(0, 0.5, (5.2, 5.2))


def unjudged():
    decision = Decision(
        False, None, "not judged yet: 4 members were fed so far, and 100 are needed", limit=0.6
    )
    return left_with(history(START, replace(audit(1, 0.55, (5, 5.1)), decision=decision)), 1)


HISTORIES = {
    "inside": lambda: left_with(lora_run(), 6),
    "stopped": lambda: left_with(stopped_run(), 5),
    "nothing kept": lambda: left_with(history(START, audit(1, 0.71, (3.1, 3.6))), 0),
    "not judged": unjudged,
    "failed": lambda: history(START, audit(1, 0.52, (5, 5.1)), failure(2)),
}
HEADLINES = {
    "inside": (
        "Within budget",
        "At epoch 6 an attacker who is shown one record that was trained on and one that was not picks the "
        "right one 54 times in 100 [49 to 59]; guessing would be right 50 times.",
        "The limit is 60 times in 100. It is kept, at 95 % confidence: the whole band lies below it.",
    ),
    "stopped": (
        "Within budget",
        "At epoch 5 an attacker who is shown one record that was trained on and one that was not picks the "
        "right one 64 times in 100 [59 to 69]; guessing would be right 50 times.",
        "The limit is 60 times in 100. Whether it is exceeded is open, for the band reaches across it; by "
        "the rule of this budget that is within budget.",
    ),
    "nothing kept": (
        "Nothing of this training was kept",
        "NOTHING OF THIS TRAINING WAS KEPT: the model holds the weights from before training.",
        "The limit is 60 times in 100.",
    ),
    "not judged": (
        "Not judged",
        "At epoch 1 an attacker who is shown one record that was trained on and one that was not picks the "
        "right one 55.0 times in 100 [50.1 to 59.9]; guessing would be right 50 times.",
        "The limit is 60 times in 100. Not judged yet: 4 members were fed so far, and 100 are needed.",
    ),
    "failed": (
        "Not judged: the last audit failed",
        "The audit at epoch 2 failed: the leakage of these weights is unknown, not absent.",
        "The limit is 60 times in 100.",
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_the_headline_is_about_the_model_that_was_left(name):
    run = report_view(HISTORIES[name]()).runs[0]

    assert (run.outcome.label, run.headline.text, run.headline.against_limit) == HEADLINES[name]


@pytest.mark.parametrize("name", HISTORIES)
def test_a_model_card_begins_with_the_same(name):
    text = summarize(HISTORIES[name]())

    for sentence in HEADLINES[name]:
        assert text.index(sentence) < text.index("| --- |")


def test_what_was_stopped_comes_second():
    run = report_view(HISTORIES["stopped"]()).runs[0]

    assert run.outcome.text == (
        "Stopped at epoch 6: over budget: lower bound of AUC 0.635 > 0.600. The model was left with the "
        "weights of epoch 5, the last within budget."
    )
    assert "68 times in 100" in run.at_stop.text
    assert "It is exceeded, at 95 % confidence" in run.at_stop.against_limit


def test_a_stopped_run_that_put_nothing_back_is_headed_by_what_it_left():
    run = report_view(left_with(stopped_run(), 6)).runs[0]

    assert run.outcome.kind == "over budget"
    assert run.headline.moment == "epoch 6"
    assert run.at_stop is None
    assert run.kept is None
    assert run.outcome.text.endswith(
        "The model was left with the weights of epoch 6. The last within budget were those of epoch 5."
    )


def test_weights_that_no_audit_saw_are_unknown_whatever_the_audits_said():
    run = report_view(left_with(lora_run(), 99)).runs[0]

    assert run.outcome.kind == "not judged"
    assert run.headline.text.startswith("The model was left with weights that no audit saw")
    assert "within budget" not in run.headline.text


def test_where_nobody_looked_nothing_is_said_of_what_was_put_back():
    run = report_view(stopped_run()).runs[0]

    assert run.outcome.kind == "over budget"
    assert "whether they were put back into the model was not recorded" in run.outcome.text


def test_the_best_checkpoint_that_was_loaded_is_the_headline_of_a_run_that_was_not_stopped():
    run = report_view(left_with(lora_run(), 3)).runs[0]

    assert run.headline.moment == "epoch 3"
    assert "The model was left with the weights of epoch 3." in run.outcome.text


def over_on_another_metric():
    budget = LeakageBudget(limit=0.1, metric="tpr_at_fpr", fpr=0.01)
    rate = Measurement(0.18, interval(0.18, 0.03), interval(0.18, 0.05))
    result = audit(1, 0.6, (5, 5.1), budget=None)
    decision = decide_by_strongest(budget, {"": JudgedFigure(rate.value, rate.band)})
    metrics = {**result.metrics, "tpr_at_fpr_0.01": rate}
    return history(START, replace(result, metrics=metrics, decision=decision), budget=budget)


def test_a_limit_on_another_metric_is_told_with_its_own_figure():
    stated = report_view(over_on_another_metric()).runs[0].headline

    assert "picks the right one 60 times in 100" in stated.text
    assert stated.against_limit == (
        "The limit is on confident accusations: of an attacker who wrongly accuses at most 1 in 100 records "
        "that were not trained on, it is that 10 in 100 of those that were are identified. Measured: 0.180 "
        "[0.130, 0.230]. It is exceeded, at 95 % confidence: the whole band lies above it."
    )


def test_a_score_that_is_turned_around_is_held_against_the_limit_as_the_attacker_uses_it():
    result = audit(1, 0.3, (5, 5.1))
    assert result.decision.is_reversed

    stated = report_view(history(START, result)).runs[0].headline

    assert "70 times in 100" in stated.text
    assert "It is exceeded" in stated.against_limit


def test_a_baseline_alone_is_no_verdict():
    run = report_view(history(START)).runs[0]

    assert run.outcome.kind == "not judged"
    assert run.headline.title == "Unknown"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("inside", "If these weights are released, release no others"),
        ("stopped", "If these weights are released, release no others"),
        ("nothing kept", "Audit more often"),
        ("not judged", "Treat these weights as over budget"),
        ("failed", "Treat these weights as over budget"),
    ],
)
def test_what_to_do_now_begins_with_the_nearest(name, first):
    assert report_view(HISTORIES[name]()).runs[0].next_steps[0].startswith(first)


def test_a_stopped_run_is_told_what_lowers_leakage_and_one_inside_is_not():
    stopped, inside = (
        " ".join(report_view(HISTORIES[n]()).runs[0].next_steps) for n in ("stopped", "inside")
    )

    for advice in (
        "fewer epochs",
        "LoRA",
        "Remove duplicates",
        "differential privacy",
        "band reaches across",
    ):
        assert advice in stopped
        assert advice not in inside


def test_a_run_without_a_budget_is_told_how_to_set_one():
    run = report_view(history(START, audit(1, 0.55, (5, 5.1), budget=None), budget=None)).runs[0]

    assert any("LeakageBudget(limit=0.6)" in step for step in run.next_steps)
    assert run.headline.against_limit == "No limit was set."
    assert run.budget is None
