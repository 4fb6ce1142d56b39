"""A history as a table, and what its objects show of themselves."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from ezmia_callbacks import AuditHistory, AuditResult, LeakageBudget
from ezmia_callbacks.errors import MissingDependencyError
from ezmia_callbacks.functional import Decision
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.results.result import Measurement
from ezmia_callbacks.results.trajectories import Trajectories

WITHIN, OVER = Decision(False, True, "within budget: ...", 0.52, 0.6), Decision(True, False, "over", 0.7, 0.6)
UNJUDGED = Decision(False, None, "not judged yet")


def result(step, decision, *, value=0.5, **fields):
    auc = Measurement(value, band=Interval(value - 0.1, value + 0.1, 0.95, "delong"))
    given = {"metrics": {"auc": auc}, "decided_by": "wbc", "non_member_loss": 3.25, **fields}
    status, is_baseline = given.pop("status", "ok"), given.pop("is_baseline", False)
    return AuditResult(step, step / 8, status, is_baseline, "strongest", 500, 1000, decision, **given)


HISTORY = AuditHistory(
    (
        result(0, WITHIN, is_baseline=True),
        result(8, WITHIN, value=0.52, n_members_seen=480),
        result(16, UNJUDGED, value=0.55),
        result(20, replace(UNJUDGED), status="failed", metrics={}, error="KeyError: 'a secret'"),
        result(24, OVER, value=0.7),
    ),
    LeakageBudget(limit=0.6),
)


def test_a_history_is_a_table_of_one_line_an_audit():
    assert HISTORY.table().splitlines() == [
        "epoch  step  AUC                   by   members seen  held-out loss  verdict",
        "0      0     0.500 [0.400, 0.600]  wbc  500 of 500    3.250          baseline",
        "1      8     0.520 [0.420, 0.620]  wbc  480 of 500    3.250          within budget",
        "2      16    0.550 [0.450, 0.650]  wbc  500 of 500    3.250          not judged",
        "2.5    20    -                     -    -             3.250          failed",
        "3      24    0.700 [0.600, 0.800]  wbc  500 of 500    3.250          over budget",
    ]


def test_a_table_fits_on_a_terminal():
    long = replace(
        result(123_456, OVER, decided_by="a_score_of_ones_own_with_a_long_name"),
        epoch=12.5,
        n_members=99_999,
        n_members_seen=99_998,
    )

    lines = AuditHistory((*HISTORY, long)).table().splitlines()

    assert max(map(len, lines)) <= 100
    assert "a_score_of_o...  99998 of 99999" in lines[-1]


def test_a_history_shows_its_last_audit_and_no_error_text():
    assert repr(HISTORY) == (
        "AuditHistory(5 audits, the last: AuditResult(step 24, AUC 0.700 by wbc, over budget))"
    )
    assert repr(HISTORY[3]) == "AuditResult(step 20, failed)"
    assert repr(AuditHistory()) == "AuditHistory(no audits)"


def test_trajectories_show_their_sizes():
    ids = [f"record-{i}" for i in range(1500)]
    found = Trajectories.empty(
        score_names=["ez", "wbc"], record_ids=ids, is_member=np.arange(1500) < 500, fingerprint="a"
    )

    assert repr(found) == "Trajectories(0 audits of 500 members and 1000 non-members, scores ez, wbc)"


def test_a_notebook_shows_a_table_in_which_data_is_text():
    named = result(8, WITHIN, decided_by="<script>")

    page = AuditHistory((named,))._repr_html_()

    assert page.startswith("<table><caption>Privacy audits, 1 after the baseline</caption>")
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "<td>within budget</td>" in named._repr_html_()


def test_a_terminal_gets_no_control_sequences_from_a_table():
    assert "\x1b" not in AuditHistory((result(8, WITHIN, decided_by="\x1b[31m"),)).table()


def test_a_data_frame_has_what_trackers_get():
    pytest.importorskip("pandas")

    frame = HISTORY.to_dataframe()

    assert frame["step"].tolist() == [0, 8, 16, 20, 24]
    assert frame["verdict"].tolist() == ["baseline", "within budget", "not judged", "failed", "over budget"]
    assert frame["auc"].tolist()[-1] == HISTORY[-1].to_metrics()["auc"]
    assert np.isnan(frame["auc"][3])


def test_a_missing_pandas_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(MissingDependencyError, match="pip install pandas"):
        HISTORY.to_dataframe()
