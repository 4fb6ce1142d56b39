from dataclasses import replace

import pytest
from example_runs import audit, failure, history

from ezmia_callbacks.functional import Decision
from ezmia_callbacks.report import render_report, summarize, to_document
from ezmia_callbacks.report.charts import leakage_chart, loss_chart
from ezmia_callbacks.report.document import report_view
from ezmia_callbacks.report.shown import numbers_shown, shown, what_is_left_out
from ezmia_callbacks.results.result import Finding


def long_run(n_audits, *, aucs=None, changed=None):
    """Audits a hundredth of an epoch apart that leak little, with some of them as they are given."""
    aucs, changed = aucs or {}, changed or {}
    results = [audit(i / 100, aucs.get(i, 0.52), (3.0, 3.1)) for i in range(n_audits)]
    for i, change in changed.items():
        results[i] = change(results[i])
    return history(*(replace(result, step=i) for i, result in enumerate(results)))


def view_of(run):
    return report_view(run).runs[0]


def shown_steps(run):
    return [found.step for found in shown(view_of(run)).audits]


def failed(result):
    return failure(result.epoch)


def test_of_a_run_of_usual_length_every_audit_is_shown():
    run = view_of(long_run(200))

    assert shown(run) == run
    assert what_is_left_out(run) == ""


@pytest.mark.parametrize("n_audits", [201, 1_001])
def test_of_a_long_run_never_more_is_shown_and_what_is_left_out_is_counted(n_audits):
    run = long_run(n_audits, changed={i: failed for i in range(5, n_audits, 2)})

    steps = shown_steps(run)

    assert len(steps) <= 200
    assert [steps[0], steps[-1]] == [0, n_audits - 1]
    assert what_is_left_out(view_of(run)).startswith(f"{len(steps)} of {n_audits:,} audits are shown")


def test_the_largest_figure_and_every_stretch_of_gaps_are_shown():
    run = long_run(1_000, aucs={333: 0.71, 335: 0.58, 777: 0.72}, changed={500: failed, 501: failed})

    steps = shown_steps(run)

    assert {333, 500, 777} <= set(steps)
    assert not {335, 501} & set(steps)


def test_what_decided_is_shown():
    def stops(result):
        return replace(result, decision=replace(result.decision, stop=True))

    run = long_run(300, aucs={298: 0.8, 299: 0.8}, changed={299: stops})

    assert {297, 298, 299} <= set(shown_steps(run))


def test_the_first_of_each_kind_of_remark_is_shown_and_the_rest_counted():
    def noticed(name):
        return lambda result: replace(result, findings=(Finding(name, True, f"{name} at {result.step}."),))

    kinds = {i: noticed("inversion" if i == 123 else "saturation") for i in range(100, 1_000)}
    run = long_run(1_000, changed=kinds)

    page, text, steps = render_report(to_document(run)), summarize(run), shown_steps(run)

    assert {100, 123} <= set(steps)
    n_left_out = 900 - sum(step >= 100 for step in steps)
    assert "inversion at" in page
    assert "900 remarks at single audits" in page
    for written in (page, text):
        assert f"{n_left_out:,} more at audits that are not shown." in written
        assert f"{len(steps)} of 1,000 audits are shown" in written


def test_the_document_has_every_audit():
    document = to_document(long_run(300))

    assert len(document["runs"][0]["audits"]) == 300


def test_the_page_of_a_longer_run_is_hardly_longer():
    pages = [render_report(to_document(long_run(n))) for n in (250, 1_000)]

    assert len(pages[1]) < 1.1 * len(pages[0])


def test_a_curve_is_drawn_by_the_audits_that_are_shown_and_described_by_all():
    run = view_of(long_run(1_000, changed={i: failed for i in range(400, 500)}))
    # A loss that no stretch shows, for another metric decides.
    audits = tuple(replace(a, member_loss=9.0) if a.step == 335 else a for a in run.audits)
    run = replace(run, audits=audits)

    chart = loss_chart([run])

    assert chart.series[0].lines.count("L") + chart.series[0].lines.count("M") < 200
    assert len(chart.columns) == len(numbers_shown(run))
    assert "largest 9.000; 100 of 1000 audits unknown" in chart.description


def test_a_gap_is_as_wide_as_its_failed_audits_wherever_its_neighbors_are():
    run = view_of(long_run(1_000, changed={500: failed}))

    chart = leakage_chart([run], "auc")

    ((left, width),) = chart.gaps
    per_audit = (430.0 - 42.0 - 28.0) / 999
    assert width == pytest.approx(per_audit, abs=0.02)
    assert left == pytest.approx(42.0 + 14.0 + 499.5 * per_audit, abs=0.02)


class CountingSteps(int):
    """A step that counts how often somebody looks where it stands."""

    n_read = 0

    def __float__(self):
        CountingSteps.n_read += 1
        return float(int(self))


def looks_of(runs):
    """How often a chart of these runs looks where their audits stand."""
    views = [
        replace(run, audits=tuple(replace(a, step=CountingSteps(a.step), epoch=None) for a in run.audits))
        for run in map(view_of, runs)
    ]
    CountingSteps.n_read = 0
    leakage_chart(views, "auc")
    return CountingSteps.n_read


def test_a_chart_looks_at_every_audit_a_fixed_number_of_times():
    assert looks_of([long_run(160)]) == 4 * looks_of([long_run(40)])


def test_a_chart_of_runs_that_share_no_step_looks_at_every_audit_a_fixed_number_of_times():
    def runs(n):
        first = audit(1, 0.6, (3, 3))
        return [history(*(replace(first, step=n * k + i) for k in range(4))) for i in range(n)]

    assert looks_of(runs(20)) == 4 * looks_of(runs(5))


def test_of_many_runs_at_one_moment_a_tip_lists_some_and_counts_the_rest():
    views = [replace(view_of(history(audit(1, 0.6, (3, 3)))), label=f"run {i}") for i in range(30)]

    (column,) = leakage_chart(views, "auc").columns

    assert len(column.lines) == 1 + 12 + 1
    assert column.lines[-1] == "and 18 more, in the tables below"
    assert len(column.dots) == 30


def test_a_failed_audit_alone_in_its_stretch_is_shown():
    run = history(*(failure(i / 100) for i in range(300)), audit(3, 0.6, (3, 3)))
    decision = Decision(False, None, "the audit failed: leakage is unknown")

    assert all(result.decision == decision for result in run.results[:-1])
    assert len(shown(view_of(run)).audits) == 51
