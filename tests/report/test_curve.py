"""The points that a page and matplotlib draw."""

import math
from dataclasses import replace

import pytest
from example_runs import audit, failure, history, stopped_run

from ezmia_callbacks.report.curve import has_epochs, leakage_curve, limits_by_label, loss_curve
from ezmia_callbacks.report.document import report_view


def view_of(*results, **changes):
    return report_view(history(*results, **changes)).runs[0]


def test_a_point_has_its_figure_and_the_ends_that_decisions_read():
    run = view_of(audit(0, 0.5, (5.2, 5.2)), audit(1, 0.6, (5.0, 5.1)))

    baseline, point = leakage_curve(run, "auc", by_epoch=True).points

    assert (point.x, point.value) == (1.0, 0.6)
    band = run.audits[1].metrics["auc"].band
    assert (point.lower, point.upper) == (band.lower, band.upper)
    # The baseline has no band.
    assert baseline.lower == run.audits[0].metrics["auc"].interval.lower


def test_a_failed_audit_is_a_gap_and_so_is_a_figure_that_is_not_resolved():
    run = view_of(audit(0, 0.5, (5.2, 5.2)), failure(1), audit(2, 0.6, (4.9, 5.0)))

    failed = leakage_curve(run, "auc", by_epoch=True).points[1]
    unknown = leakage_curve(run, "tpr_at_fpr_0.5", by_epoch=True).points[2]

    assert (failed.value, failed.is_failed) == (None, True)
    assert (unknown.value, unknown.is_failed) == (None, False)


def test_steps_are_the_axis_where_an_epoch_is_unknown():
    run = view_of(audit(0, 0.5, (5.2, 5.2)), replace(audit(1, 0.6, (5.0, 5.1)), epoch=None))

    assert not has_epochs([run])
    assert [p.x for p in leakage_curve(run, "auc", by_epoch=False).points] == [0.0, 75.0]


def test_a_stopped_run_has_its_stop_and_what_was_kept_on_the_curve():
    run = report_view(stopped_run()).runs[0]

    curve = leakage_curve(run, "auc", by_epoch=True)

    assert curve.stopped == curve.points[-1]
    assert curve.kept in curve.points[:-1]
    assert curve.limit == run.budget.limit
    assert leakage_curve(run, "advantage", by_epoch=True).limit is None


def test_a_run_that_was_not_stopped_has_nothing_to_mark():
    curve = leakage_curve(
        view_of(audit(0, 0.5, (5.2, 5.2)), audit(1, 0.55, (5.0, 5.1))), "auc", by_epoch=True
    )

    assert (curve.stopped, curve.kept) == (None, None)


@pytest.mark.parametrize(("losses", "value"), [("member_loss", 5.0), ("non_member_loss", 5.1)])
def test_losses_are_those_of_the_audits(losses, value):
    points = loss_curve(view_of(audit(1, 0.6, (5.0, 5.1)), failure(2)), losses, by_epoch=True)

    assert points[0].value == value
    assert points[1].value is None
    assert math.isclose(points[1].x, 2.0)


def test_limits_are_those_of_budgets_on_the_metric():
    run = report_view({"full": stopped_run()}).runs[0]

    assert limits_by_label([run], "auc") == {"full": run.budget.limit}
    assert limits_by_label([run], "advantage") == {}
