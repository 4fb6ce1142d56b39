from dataclasses import replace

import pytest

from ezmia_callbacks.cli.figures import epoch_of, verdict_of
from ezmia_callbacks.functional.budget import Decision
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.results.result import AuditResult, Measurement
from ezmia_callbacks.results.tables import figure, loss

INTERVAL = Interval(lower=0.55, upper=0.75, confidence=0.95, method="delong")
BAND = Interval(lower=0.5, upper=0.8, confidence=0.99, method="delong")
RESULT = AuditResult(9, 1.25, "ok", False, "ez", 50, 60, Decision(False, True, "within budget: 1 <= 2"))


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [
        (None, "-"),
        (Measurement(None, note="needs 100 non-members"), "not resolved"),
        (Measurement(0.65), "0.650 (no interval)"),
        (Measurement(0.65, INTERVAL), "0.650 [0.550, 0.750]"),
        (Measurement(0.65, INTERVAL, BAND), "0.650 [0.500, 0.800]"),
    ],
)
def test_a_figure_stands_with_its_band_or_the_reason_why_not(measurement, expected):
    assert figure(measurement) == expected


def test_a_loss_or_an_epoch_that_is_unknown_is_not_made_up():
    assert (loss(2.0), loss(None)) == ("2.000", "-")
    assert (epoch_of(RESULT), epoch_of(replace(RESULT, epoch=None))) == ("1.25", "step 9")


def test_a_verdict_is_one_line_with_its_reason():
    failed = replace(RESULT, status="failed", error="RuntimeError: no\nmemory")

    assert verdict_of(RESULT) == "within budget: 1 <= 2"
    assert verdict_of(replace(RESULT, is_baseline=True)) == "baseline"
    assert verdict_of(failed) == "FAILED, leakage unknown: RuntimeError: no memory"
