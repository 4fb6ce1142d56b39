import json
import os
from dataclasses import replace

import pytest

from ezmia_callbacks import AuditHistory, AuditResult, LeakageBudget
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional import Decision, Interval
from ezmia_callbacks.results import history as history_module
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import Finding, Measurement

BUDGET = LeakageBudget(limit=0.6)


def result(step, state, *, n_over=0):
    """One audit: state is "baseline", "within", "over", "stop", "unjudged" or "failed"."""
    decision = {
        "baseline": Decision(False, True, "baseline"),
        "within": Decision(False, True, "within budget", 0.55, 0.6),
        "over": Decision(False, False, "over budget", 0.65, 0.6, n_over),
        "stop": Decision(True, False, "over budget", 0.65, 0.6, n_over),
        "unjudged": Decision(True, None, "cannot be judged any more"),
        "failed": Decision(False, None, "failed"),
    }[state]
    band = Interval(lower=0.5, upper=0.7, confidence=0.95, method="delong")
    return AuditResult(
        step=step,
        epoch=step / 10,
        status="failed" if state == "failed" else "ok",
        is_baseline=state == "baseline",
        score="ez",
        n_members=20,
        n_non_members=30,
        decision=decision,
        metrics={} if state == "failed" else {"auc": Measurement(0.6, band, band)},
        error="RuntimeError: no" if state == "failed" else None,
    )


def make_history(*states, **settings):
    audits, n_over = [], 0
    for i, state in enumerate(states):
        if state != "failed":
            n_over = n_over + 1 if state in ("over", "stop") else 0
        audits.append(result(10 * i, state, n_over=n_over))
    return AuditHistory(tuple(audits), **{"budget": BUDGET, **settings})


def steps(results):
    return [r.step for r in results]


def test_a_history_is_a_sequence_of_its_audits():
    history = make_history("baseline", "within", "over")

    assert len(history) == 3
    assert steps(history) == [0, 10, 20]
    assert history[-1] is history.results[2]


def test_another_result_leaves_the_old_history_and_the_settings_alone():
    history = make_history("baseline", confidence=0.9, about="drawn at random")

    longer = history.with_result(result(10, "within"))

    assert (len(history), len(longer)) == (1, 2)
    assert (longer.budget, longer.confidence, longer.about) == (BUDGET, 0.9, "drawn at random")


def test_bands_hold_at_the_confidence_of_the_budget_if_there_is_one():
    budget = LeakageBudget(limit=0.6, confidence=0.9)

    assert AuditHistory(budget=budget, confidence=0.99).band_confidence == 0.9
    assert AuditHistory(confidence=0.99).band_confidence == 0.99


def test_looks_are_all_audits_but_the_baseline_failed_ones_too():
    history = make_history("baseline", "within", "failed", "over")

    assert steps(history.audits_after_baseline) == [10, 20, 30]
    assert history.n_failed == 1


def test_stopped_is_the_first_audit_that_said_stop():
    assert make_history("baseline", "over", "failed").stopped is None
    assert make_history("baseline", "over", "stop", "stop").stopped.step == 20


def test_the_last_audit_within_budget_is_looked_for_behind_gaps_and_excess():
    assert make_history("baseline", "within", "within", "failed", "over").last_within_budget.step == 20


def test_the_baseline_counts_as_within_budget_and_a_failed_audit_does_not():
    assert make_history("baseline", "failed", "over").last_within_budget.step == 0
    assert make_history("failed", "over").last_within_budget is None


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], 0),
        (["failed"], 0),
        (["baseline"], 0),
        (["baseline", "over", "over"], 2),
        (["baseline", "over", "failed"], 1),
        (["baseline", "over", "failed", "over"], 2),
        (["baseline", "over", "over", "within"], 0),
        (["baseline", "over", "within", "over"], 1),
        (["baseline", "within", "failed"], 0),
    ],
)
def test_failed_audits_neither_count_nor_interrupt_a_row_over_budget(states, expected):
    assert make_history(*states).n_over_in_a_row == expected


@pytest.mark.parametrize(("step", "expected"), [(-1, []), (0, [0]), (19, [0, 10]), (20, [0, 10, 20])])
def test_up_to_a_step_includes_it(step, expected):
    history = make_history("baseline", "within", "over", "stop", confidence=0.9, about="drawn")

    cut = history.up_to_step(step)

    assert steps(cut) == expected
    assert (cut.budget, cut.confidence, cut.about) == (BUDGET, 0.9, "drawn")


def test_dicts_bring_the_audits_back_under_the_same_settings():
    history = make_history("baseline", "within", "failed", "stop", confidence=0.9, about="drawn")

    assert history.with_results(json.loads(json.dumps(history.to_dicts()))) == history


def test_a_saved_history_comes_back_one_line_an_audit(tmp_path):
    history = make_history("baseline", "within", "failed", "stop")

    history.save(str(tmp_path / "run" / "history.jsonl"))

    assert AuditHistory.load(tmp_path / "run" / "history.jsonl") == history
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 1 + 4


def test_a_saved_history_says_what_it_was_made_with(tmp_path):
    history = make_history(
        "baseline",
        "within",
        about="drawn",
        findings=(Finding("length", False, "shows no difference"),),
        caveat="the sides differ",
        run_metadata=RunMetadata(packages={"torch": "2.13.0"}, n_planned_audits=3, others={"shoe": "44"}),
        is_complete=False,
    )

    history.save(tmp_path / "history.jsonl")

    assert AuditHistory.load(tmp_path / "history.jsonl") == history


def test_a_history_of_a_later_release_is_refused(tmp_path):
    make_history("baseline").save(tmp_path / "history.jsonl")
    text = (tmp_path / "history.jsonl").read_text()
    (tmp_path / "history.jsonl").write_text(text.replace('"schema": 1', '"schema": 2'))

    with pytest.raises(ConfigurationError, match="its schema is not 1"):
        AuditHistory.load(tmp_path / "history.jsonl")


def test_an_empty_history_survives_saving(tmp_path):
    AuditHistory().save(tmp_path / "history.jsonl")

    assert AuditHistory.load(tmp_path / "history.jsonl") == AuditHistory()


@pytest.mark.parametrize(
    "content",
    [
        b"not json\n",
        b"\xff\xfe\x00",
        b"{}\n",
        b"[1, 2]\n",
        b"3\n",
        b"null\n",
        b'{"metrics": [], "auc_by_score": {}}\n',
        b'{"metrics": {"auc": 0.5}}\n',
    ],
)
def test_a_file_that_is_no_history_is_refused(tmp_path, content):
    path = tmp_path / "history.jsonl"
    path.write_bytes(content)

    with pytest.raises(ConfigurationError, match=r"history\.jsonl is not an audit history"):
        AuditHistory.load(path)


def test_a_line_cut_short_and_an_unknown_field_are_refused(tmp_path):
    path = tmp_path / "history.jsonl"
    make_history("baseline", "within", "within").save(path)
    lines = path.read_text().splitlines(keepends=True)

    for content in (
        "".join([*lines[:2], lines[2][:-20] + "\n", lines[3]]),
        "".join([*lines[:3], lines[3][:-20] + "\n"]),
        lines[0][:-20],
        "".join(lines).replace('"step"', '"stop"'),
    ):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match="is not an audit history"):
            AuditHistory.load(path)


def test_half_a_line_that_a_killed_process_left_at_the_end_is_left_out_and_named(tmp_path, caplog):
    path = tmp_path / "history.jsonl"
    history = make_history("baseline", "within", "within", is_complete=False)
    history.save(path)
    content = path.read_bytes()
    start = content.rindex(b"\n", 0, -1) + 1

    for end in (*range(start, len(content), 30), len(content) - 2, len(content) - 1):
        caplog.clear()
        path.write_bytes(content[:end])
        loaded = AuditHistory.load(path)

        # Without its line end the line is whole.
        is_cut_off = end < len(content) - 1
        assert loaded.results == history.results[: 2 if is_cut_off else 3]
        assert ("is cut off" in caplog.text) is (is_cut_off and end > start)
    assert loaded.is_complete is False


@pytest.fixture
def writes(monkeypatch):
    """How the file was written each time."""
    found = []

    def noted(name, write):
        def noting(*arguments):
            found.append(name)
            write(*arguments)

        return noting

    for name in ("append", "write_atomically"):
        monkeypatch.setattr(history_module, name, noted(name, getattr(history_module, name)))
    return found


def test_audits_that_have_come_since_are_appended(tmp_path, writes):
    path = tmp_path / "history.jsonl"
    before = make_history("baseline", "within", about="drawn", is_complete=False)
    before.save(path)
    now = before.with_result(result(20, "failed")).with_result(result(30, "within"))

    now.save(path, after=before)

    assert writes == ["write_atomically", "append"]
    assert AuditHistory.load(path) == now


@pytest.mark.parametrize(
    "change",
    [
        lambda history: history.up_to_step(10),
        lambda history: replace(history, is_complete=True),
        lambda history: replace(history, caveat="beware"),
        lambda history: replace(history, run_metadata=RunMetadata(power="little")),
        lambda history: replace(history, results=(history[0], result(10, "over"), history[2])),
    ],
)
def test_whatever_else_has_changed_has_the_file_written_anew(change, tmp_path, writes):
    path = tmp_path / "history.jsonl"
    before = make_history("baseline", "within", "within", is_complete=False)
    before.save(path)
    now = change(before)

    now.save(path, after=before)

    assert writes == ["write_atomically"] * 2
    assert AuditHistory.load(path) == now


def test_a_file_that_is_gone_is_written_anew(tmp_path):
    before = make_history("baseline")
    now = before.with_result(result(10, "within"))

    now.save(tmp_path / "history.jsonl", after=before)

    assert AuditHistory.load(tmp_path / "history.jsonl") == now


def test_a_missing_history_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="is not an audit history"):
        AuditHistory.load(tmp_path / "history.jsonl")


def test_a_write_that_is_cut_off_leaves_the_old_history_readable(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    old = make_history("baseline")
    old.save(path)

    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_history("baseline", "within").save(path)

    assert AuditHistory.load(path).results == old.results


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], False),
        (["failed"], False),
        (["baseline"], False),
        (["baseline", "within", "over"], True),
        (["baseline", "stop"], True),
        (["baseline", "over", "within"], False),
        (["baseline", "over", "failed"], True),
        (["baseline", "within", "failed"], False),
        (["baseline", "within", "unjudged"], True),
        (["baseline", "unjudged", "failed"], True),
    ],
)
def test_past_budget_are_weights_over_it_and_those_that_cannot_be_judged(states, expected):
    assert make_history(*states).is_past_budget is expected


def test_unjudged_are_figures_without_a_verdict_where_one_was_due():
    states = ["baseline", "within", "over", "stop", "failed", "unjudged"]
    history = make_history(*states)
    unbudgeted = AuditHistory((replace(result(10, "within"), decision=Decision(False, None, "no budget")),))

    assert [state for state, each in zip(states, history, strict=True) if history.is_unjudged(each)] == [
        "unjudged"
    ]
    assert not unbudgeted.is_unjudged(unbudgeted[0])
    # Under a budget no figure goes without a verdict unnoticed.
    assert replace(unbudgeted, budget=BUDGET).is_unjudged(unbudgeted[0])


def saved(path, history, change):
    """The file of a history of which one row was changed."""
    history.save(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.insert(3, rows.pop(2)), "the audit of step 10 comes after that of step 20"),
        (lambda rows: rows.append(rows[1]), "after that of step 30 is a second baseline"),
        (lambda rows: rows.insert(2, rows[1]), "after that of step 0 is a second baseline"),
        (lambda rows: rows[2].update(step="10"), r"`audits\[1\].step` is '10'; a whole number is needed"),
        (lambda rows: rows[2].update(n_members=True), r"`audits\[1\].n_members` is True"),
        (lambda rows: rows[2].pop("metrics"), r"it has no `metrics` in `audits\[1\]`"),
        (lambda rows: rows[2].update(leak=0), r"it has 'leak' in `audits\[1\]`"),
        (lambda rows: rows[2]["metrics"]["auc"].update(value=float("nan")), "holds NaN"),
        (lambda rows: rows[2]["decision"].update(limit=[]), r"decision.limit` is a list of 0"),
        (lambda rows: rows[0].update(budget={}), "it has no `limit` in `budget`"),
        (lambda rows: rows[0]["facts"].update(torch=2), "`facts.torch` is 2; a text is needed"),
        (lambda rows: rows[0].update(is_complete=0), "`is_complete` is 0"),
        (lambda rows: rows.clear(), "it is not JSON"),
    ],
)
def test_a_file_that_no_run_writes_is_refused(change, message, tmp_path):
    history = make_history("baseline", "within", "within", "failed", confidence=0.9)

    with pytest.raises(ConfigurationError, match=message):
        AuditHistory.load(saved(tmp_path / "history.jsonl", history, change))


def test_two_audits_of_one_step_are_two_models(tmp_path):
    path = saved(tmp_path / "history.jsonl", make_history("baseline", "within"), lambda r: r.append(r[2]))

    assert steps(AuditHistory.load(path)) == [0, 10, 10]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"\n\n", b"{}\n", b"null\n[]\n"])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "history.jsonl").write_bytes(content)

    with pytest.raises(ConfigurationError, match="is not an audit history"):
        AuditHistory.load(tmp_path / "history.jsonl")


@pytest.mark.parametrize("name", ["a\x00b", "missing\udcff", "x" * 5000, "."])
def test_a_path_that_holds_no_history_is_refused(name, tmp_path):
    with pytest.raises(ConfigurationError, match="is not an audit history"):
        AuditHistory.load(f"{tmp_path}/{name}")
