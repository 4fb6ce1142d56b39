"""One callback, several runs: each has a folder and a history of its own."""

from pathlib import Path
from types import SimpleNamespace

from ezmia_callbacks import AuditHistory, AuditResult, Decision
from ezmia_callbacks.shells.runs import RunsOfOneCallback

FOLDER = Path("run") / "_privacy_audit"


def auditor(step):
    result = AuditResult(step, None, "ok", False, "ez", 20, 20, Decision(False, None, "no budget"))
    return SimpleNamespace(history=AuditHistory((result,)))


def test_each_new_run_in_a_folder_gets_the_next_one():
    runs = RunsOfOneCallback()
    folders = []
    for _ in range(3):
        runs.begin(None, FOLDER, is_new=True)
        folders.append(runs.folder(FOLDER).name)

    assert folders == ["_privacy_audit", "_privacy_audit_2", "_privacy_audit_3"]
    assert runs.folder(Path("other") / "_privacy_audit").name == "_privacy_audit"


def test_a_run_that_resumes_stays_where_it_was():
    runs = RunsOfOneCallback()
    runs.begin(None, FOLDER, is_new=False)
    assert runs.folder(FOLDER) == FOLDER
    runs.begin(None, FOLDER, is_new=True)
    runs.begin(auditor(1), FOLDER, is_new=False)

    assert runs.folder(FOLDER).name == "_privacy_audit_2"


def test_histories_are_in_the_order_of_the_runs():
    runs, first, second = RunsOfOneCallback(), auditor(1), auditor(2)
    runs.begin(None, FOLDER, is_new=True)
    runs.begin(first, FOLDER, is_new=True)

    assert runs.histories(second) == (first.history, second.history)
    assert runs.histories(None) == (first.history,)
