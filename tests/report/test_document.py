import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from example_runs import (
    ABOUT,
    BUDGET,
    CAVEAT,
    audit,
    epsilon_run,
    exposed_records,
    failure,
    history,
    interval,
    left_with,
    lora_run,
    stopped_run,
)

from ezmia_callbacks import report
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import Decision, LeakageBudget
from ezmia_callbacks.report import summarize, to_document, write_json
from ezmia_callbacks.report.html import render_report
from ezmia_callbacks.report.labels import percents
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import Measurement

SCHEMA = json.loads((Path(report.__file__).parent / "schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

TPR_BUDGET = LeakageBudget(limit=0.3, metric="tpr_at_fpr", fpr=0.1)
UNRESOLVED = {"auc": Measurement(None, note="needs 100 non-members for a value, got 60")}


def only(document):
    (run,) = document["runs"]
    return run


def headline(*results, **changes):
    return only(to_document(history(*results, **changes)))["headline"]


def held(value, *, alone=0.6, n_checkpoints=2, note=None, **changes):
    """A run of two audits, with what someone sees who holds the checkpoints of both."""
    figure = Measurement(value, None if value is None else interval(value, 0.05), note=note)
    last = audit(2, alone, (5.1, 5.2), checkpoint_holder=figure, n_checkpoints=n_checkpoints, **changes)
    return history(audit(0, 0.5, (5.2, 5.2)), audit(1, 0.55, (5.2, 5.2)), last)


DOCUMENTS = {
    "all checkpoints": lambda: to_document(held(0.7, checkpoint_holder_epsilon=epsilon_run()[-1].epsilon)),
    "stopped": lambda: to_document(stopped_run()),
    "several": lambda: to_document({"full": stopped_run(), "LoRA": lora_run()}),
    "baseline only": lambda: to_document(history(audit(0, 0.5, (5.2, 5.2)))),
    "failed only": lambda: to_document(history(failure(1))),
    "steps": lambda: to_document(history(replace(audit(1, 0.6, (5.2, 5.2)), epoch=None))),
    "unresolved": lambda: to_document(history(audit(1, 0.6, (None, None), metrics=UNRESOLVED))),
    "no budget": lambda: to_document(history(audit(1, 0.6, (5.2, 5.2), budget=None), budget=None)),
    "another metric": lambda: to_document(history(audit(1, 0.6, (5, 5)), budget=TPR_BUDGET)),
    "coins": lambda: to_document(epsilon_run()),
    "bare": lambda: to_document(AuditHistory((audit(1, 0.6, (5.2, 5.2)),))),
    "exposed": lambda: to_document(stopped_run(), exposed=exposed_records(), texts={"ticket 17": "secret"}),
}


def test_the_schema_itself_is_valid_and_forbids_what_it_does_not_name():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    surplus = to_document(stopped_run()) | {"scores": [1.0]}

    assert not VALIDATOR.is_valid(surplus)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_fit_the_schema_and_come_back_from_json(name):
    document = DOCUMENTS[name]()

    VALIDATOR.validate(document)

    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_file_holds_the_document(tmp_path):
    write_json(stopped_run(), tmp_path / "new" / "report.json", title="A title")

    saved = json.loads((tmp_path / "new" / "report.json").read_text("utf-8"))
    assert saved == to_document(stopped_run(), title="A title")
    assert saved["schema_version"] == 2


def test_where_nobody_looked_what_was_left_the_headline_is_that_of_the_last_audit():
    run = only(to_document(stopped_run()))

    stated = run["headline"]
    assert stated["text"] == (
        "At epoch 6 an attacker who is shown one record that was trained on and one that was not picks the "
        "right one 68 times in 100 [63 to 73]; guessing would be right 50 times."
    )
    assert stated["basis"] == "95 % band over all audits of the run; 400 members, 800 non-members"
    assert (stated["value"], stated["lower"]) == (0.684, pytest.approx(0.684 - 1.45 * 0.034))
    assert stated["meaning"] == "Guessing lies outside the interval: this is leakage, not chance."
    assert run["caveat"] == CAVEAT


def test_a_run_that_goes_on_is_headed_by_its_last_audit_and_not_by_its_best():
    stated = headline(audit(0, 0.5, (5, 5)), audit(1, 0.52, (5, 5)), audit(2, 0.62, (5, 5)))

    assert stated["moment"] == "epoch 2"


def test_an_interval_around_chance_is_not_detected_and_never_absent():
    stated = headline(audit(0, 0.5, (5, 5)), audit(1, 0.51, (5, 5)))

    assert "leakage was not detected" in stated["meaning"]
    assert "does not show that there is none" in stated["meaning"]


def test_an_auc_below_chance_is_leakage_in_the_other_direction():
    stated = headline(audit(0, 0.5, (5, 5)), audit(1, 0.3, (5, 5)))

    assert "picks the right one 70 times in 100 [65 to 75]" in stated["text"]
    assert "score LOWER than the others (AUC 0.300)" in stated["meaning"]
    assert stated["is_reversed"]


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ((audit(0, 0.5, (5, 5)),), "Only the baseline"),
        ((audit(0, 0.5, (5, 5)), audit(1, 0.51, (5, 5)), failure(2)), "unknown, not absent"),
        ((audit(1, 0.6, (5, 5), metrics=UNRESOLVED),), "got 60"),
        ((audit(1, 0.6, (5, 5), metrics={"auc": Measurement(0.6, note="too few")}),), "too few"),
        ((audit(1, 0.6, (5, 5), metrics={}),), "no AUC was measured"),
    ],
)
def test_a_headline_that_the_data_cannot_carry_is_refused(results, reason):
    stated = headline(*results)

    assert stated["status"] == "refused"
    assert reason in stated["text"]
    assert "value" not in stated


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.9996, 0.99, 1.0], ["99.96", "99.00", "100.00"]),
        ([0.502, 0.4, 0.6], ["50.2", "40.0", "60.0"]),
        ([0.004, 0.0, 0.1], ["0.4", "0.0", "10.0"]),
        ([0.5, 0.45, 0.55], ["50", "45", "55"]),
    ],
)
def test_rounding_makes_neither_certainty_nor_chance(rates, expected):
    assert percents(rates) == expected


def test_within_budget_is_no_praise():
    run = only(to_document(lora_run()))

    assert run["outcome"]["label"] == "Within budget"
    assert {entry["decision"]["label"] for entry in run["audits"]} == {"Baseline", "Within budget"}
    assert not re.search(r"\b(safe|passed|private\b(?!\.))", json.dumps(run), re.IGNORECASE)


def test_every_audit_has_the_verdict_that_its_decision_gave():
    patient = LeakageBudget(limit=0.6, patience=1)
    over = audit(2, 0.684, (5, 5), budget=patient)
    stop = audit(3, 0.7, (5, 5), budget=patient, n_over_before=1)

    run = only(to_document(history(audit(0, 0.5, (5, 5)), failure(1), over, stop, budget=patient)))

    verdicts = [entry["decision"]["verdict"] for entry in run["audits"]]
    assert verdicts == ["baseline", "not judged", "over budget", "over budget"]
    assert [entry["decision"]["stops"] for entry in run["audits"]] == [False, False, False, True]
    assert run["audits"][2]["decision"]["limit"] == 0.6


def test_failed_audits_are_gaps_without_numbers():
    run = only(to_document(stopped_run()))

    failed = run["audits"][3]
    assert failed["metrics"] == {}
    assert failed["member_loss"] is None
    assert "one record alone" in failed["error"]
    assert run["failures"].startswith("1 of 7 audits FAILED. Leakage there is unknown")


def test_the_weights_that_were_left_come_first_and_what_was_stopped_second():
    run = only(to_document(left_with(stopped_run(), 5)))

    assert run["headline"]["moment"] == "epoch 5"
    assert run["at_stop"]["moment"] == "epoch 6"
    assert [entry["is_final"] for entry in run["audits"]] == [False] * 5 + [True, False]
    assert only(to_document(stopped_run()))["at_stop"] is None
    assert only(to_document(lora_run()))["at_stop"] is None


def test_checks_that_found_nothing_are_listed_and_the_baseline_is_checked():
    checks = only(to_document(stopped_run()))["checks"]

    assert [(check["name"], check["is_flagged"]) for check in checks] == [
        ("difference before training", False),
        ("blind difference", False),
        ("near-duplicates", True),
        ("overlap", False),
    ]


def test_a_difference_before_training_is_flagged():
    shifted = audit(
        0, 0.5, (5, 5), auc_by_score={"loss": Measurement(0.6, audit(0, 0.6, (5, 5)).metrics["auc"].interval)}
    )

    check = only(to_document(history(shifted, audit(1, 0.6, (5, 5)))))["checks"][0]

    assert check["is_flagged"]
    assert "excludes 0.5" in check["text"]


def test_no_record_is_named_and_no_score_of_one_leaves_unless_asked_for():
    result = audit(1, 0.6, (5, 5), scores=np.array([0.123456789]))
    found = exposed_records()

    plain = json.dumps(to_document(history(result)))
    named = to_document(history(result), exposed=found)["exposed"]

    assert "0.123456789" not in plain
    assert "ticket" not in plain
    assert [record["record_id"] for record in named["records"]] == ["ticket 17", "ticket 4"]
    assert {record["text"] for record in named["records"]} == {None}
    assert "without any leakage about 40.5 would" in named["text"]


def test_texts_are_those_of_the_records_named_and_no_others():
    texts = {"ticket 17": "my pin is 1234", "ticket 99": "not exposed"}

    document = to_document(stopped_run(), exposed=exposed_records(), texts=texts)

    assert [record["text"] for record in document["exposed"]["records"]] == ["my pin is 1234", None]
    assert "not exposed" not in json.dumps(document)


@pytest.mark.parametrize(
    ("histories", "arguments", "reason"),
    [
        (AuditHistory(), {}, "no audits"),
        ({}, {}, "no history"),
        (stopped_run(), {"texts": {"ticket 17": "a"}}, "`exposed`, which is missing"),
        ({"a": lora_run(), "b": lora_run()}, {"exposed": exposed_records()}, "one run"),
    ],
)
def test_what_cannot_be_reported_is_refused(histories, arguments, reason):
    with pytest.raises(ConfigurationError, match=reason):
        to_document(histories, **arguments)


def test_numbers_that_json_has_no_way_to_write_are_missing():
    result = audit(1, 0.6, (float("inf"), float("nan")))

    entry = only(to_document(history(result)))["audits"][0]

    assert (entry["member_loss"], entry["non_member_loss"]) == (None, None)


def test_runs_that_differ_say_in_what():
    other = replace(lora_run(), budget=LeakageBudget(limit=0.7), about="Others")

    same = to_document({"a": stopped_run(), "b": lora_run()})["comparison"]
    different = to_document({"a": stopped_run(), "b": other})["comparison"]

    assert same["differs_in"] == []
    assert different["differs_in"] == ["description of the canaries", "budget"]


def test_the_model_card_tells_the_same():
    run = only(to_document(stopped_run()))
    text = summarize(stopped_run())

    for sentence in (run["failures"], run["promise"], run["budget"]["text"], ABOUT, CAVEAT):
        assert sentence in text
    assert run["outcome"]["text"] in text
    assert BUDGET.describe() == run["budget"]["text"]


def unjudged_run(*, is_stopped):
    """The last audit has figures, and the canaries can carry no verdict on them."""
    last = audit(3, 0.55, (4, 5))
    decision = Decision(is_stopped, None, "AUC cannot be judged any more: the run was to end by now")
    return history(audit(0, 0.5, (5, 5)), audit(1, 0.51, (5, 5)), replace(last, decision=decision))


@pytest.mark.parametrize(
    ("is_stopped", "label"),
    [
        (True, "Not judged: stopped"),
        (False, "Not judged"),
    ],
)
def test_an_audit_that_could_not_be_judged_is_unknown_and_neither_within_nor_over(is_stopped, label):
    run_history = unjudged_run(is_stopped=is_stopped)

    document = to_document(run_history)
    run = only(document)

    VALIDATOR.validate(document)
    assert (run["outcome"]["kind"], run["outcome"]["label"]) == ("not judged", "Not judged")
    assert "cannot be judged any more" in run["outcome"]["text"]
    last = run["audits"][-1]["decision"]
    assert (last["verdict"], last["label"]) == ("not judged", label)
    assert run["failures"] == ""


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_page_and_a_model_card_show_no_verdict_where_there_is_none(is_stopped):
    document = to_document(unjudged_run(is_stopped=is_stopped))
    document["runs"][0]["audits"] = document["runs"][0]["audits"][-1:]

    page = render_report(document)
    card = summarize(unjudged_run(is_stopped=is_stopped)).splitlines()

    tags = set(re.findall(r'class="tag[^"]*">([^<]*)<', page))
    assert "Not judged" in tags
    assert not any(tag.startswith(("Within", "Over")) for tag in tags)
    (row,) = [line for line in card if line.startswith("| 3 |")]
    assert "cannot be judged any more" in row
    assert "within budget" not in row


def test_runs_without_a_budget_have_no_verdict_to_miss():
    free = replace(audit(1, 0.51, (5, 5)), decision=Decision(False, None, "no budget"))

    run = only(to_document(history(audit(0, 0.5, (5, 5)), free, budget=None)))

    assert run["outcome"]["kind"] == run["audits"][-1]["decision"]["verdict"] == "no budget"


def test_what_leaks_to_a_holder_of_all_checkpoints_is_said_with_its_interval_and_beside_the_budget():
    run = only(to_document(held(0.7)))

    assert run["checkpoint_holder"] == (
        "Leakage to someone who holds the checkpoints of all 2 audits up to epoch 2: AUC 0.700 "
        "[0.650, 0.750], interval of this audit alone at 95 %; not part of the budget, which is about the "
        "weights of one audit."
    )
    assert only(to_document(stopped_run()))["checkpoint_holder"] == ""


@pytest.mark.parametrize(("value", "alone"), [(0.55, 0.7), (0.55, 0.3)])
def test_a_holder_of_all_checkpoints_who_sees_less_is_no_reassurance(value, alone):
    text = only(to_document(held(value, alone=alone)))["checkpoint_holder"]

    assert f"That is no reassurance: the last of these checkpoints alone reads {alone:.3f}" in text


def test_the_epsilon_of_all_checkpoints_says_what_it_is_of():
    bound = epsilon_run()[-1].epsilon

    text = only(to_document(held(0.7, checkpoint_holder_epsilon=bound)))["checkpoint_holder"]

    assert f"Of a pipeline that hands out all of them: {bound.describe()}." in text


def test_checkpoints_that_were_lost_on_the_way_are_not_counted():
    text = only(to_document(held(0.7, n_checkpoints=1)))["checkpoint_holder"]

    assert "the checkpoints of 1 of 2 audits" in text


def test_a_holder_of_all_checkpoints_without_a_figure_leaves_the_leakage_unknown():
    text = only(to_document(held(None, note="4 members count")))["checkpoint_holder"]

    assert text.endswith("is unknown: 4 members count.")
