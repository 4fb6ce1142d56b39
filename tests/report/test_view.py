"""The typed view of a report: what it says is what the document says, and back."""

import json
from dataclasses import replace

import pytest
from example_runs import audit, epsilon_run, exposed_records, failure, history, lora_run, stopped_run

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional import Decision
from ezmia_callbacks.report import to_document
from ezmia_callbacks.report.document import report_view
from ezmia_callbacks.report.view import MeasuredView, RefusedView, from_plain, to_plain

EXAMPLES = {
    "stopped": lambda: report_view(stopped_run()),
    "coins": lambda: report_view(epsilon_run()),
    "several": lambda: report_view({"full": stopped_run(), "LoRA": lora_run()}),
    "exposed": lambda: report_view(stopped_run(), exposed=exposed_records(), texts={"ticket 17": "a"}),
    "baseline": lambda: report_view(history(audit(0, 0.5, (5.2, 5.2)))),
    "failed": lambda: report_view(history(audit(0, 0.5, (5.2, 5.2)), failure(1))),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_view_survives_being_written_as_json(name):
    view = EXAMPLES[name]()

    assert from_plain(json.loads(json.dumps(to_plain(view)))) == view


def test_the_document_is_the_view_written_down():
    assert to_document(stopped_run()) == to_plain(report_view(stopped_run()))


def test_a_headline_is_measured_or_says_why_it_is_not():
    measured, refused = (EXAMPLES[name]().runs[0].headline for name in ("stopped", "failed"))

    assert isinstance(measured, MeasuredView)
    assert isinstance(refused, RefusedView)


def test_a_document_of_another_schema_is_refused():
    with pytest.raises(ConfigurationError, match="Got a report document of schema 7, need 2"):
        from_plain({**to_document(stopped_run()), "schema_version": 7})


def test_a_document_that_lacks_something_is_refused_with_its_name():
    document = to_document(stopped_run())
    del document["runs"][0]["outcome"]

    with pytest.raises(ConfigurationError, match=r"not what its schema asks for .*outcome"):
        from_plain(document)


def test_a_run_tells_what_stopped_it_and_what_was_kept():
    run = report_view(stopped_run()).runs[0]

    assert run.stopped is run.audits[-1]
    assert run.last_within_budget.decision.verdict == "within budget"
    assert report_view(lora_run()).runs[0].stopped is None


def test_a_stop_without_a_verdict_is_a_stop():
    unjudged = replace(audit(2, 0.7, (4.9, 5.0)), decision=Decision(True, None, "cannot be judged any more"))
    run = report_view(history(audit(0, 0.5, (5.2, 5.2)), audit(1, 0.55, (5.0, 5.1)), unjudged)).runs[0]

    assert run.stopped is run.audits[-1]
    assert run.stopped.decision.verdict == "not judged"


@pytest.mark.parametrize(("is_complete", "says_so"), [(False, True), (True, False), (None, False)])
def test_a_history_that_is_cut_off_says_that_its_end_is_not_the_runs(is_complete, says_so):
    run = report_view(replace(stopped_run(), is_complete=is_complete)).runs[0]

    assert ("this is not how it ended" in run.outcome.text) is says_so


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(runs=[]),
        lambda d: d.update(runs=2 * d["runs"]),
        lambda d: d["runs"][0].update(audits=[]),
        lambda d: d.update(comparison={"differs_in": [], "text": ""}),
    ],
)
def test_a_document_of_which_no_page_can_be_made_is_refused(change):
    document = to_document(stopped_run())
    change(document)

    with pytest.raises(ConfigurationError, match="not what its schema asks for"):
        from_plain(document)
