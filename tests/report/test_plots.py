import math
import re
import sys
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex

from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError
from ezmia_callbacks.functional.budget import Decision, LeakageBudget
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.report.document import to_document
from ezmia_callbacks.report.html import render_report
from ezmia_callbacks.report.plots import (
    plot_leakage_and_loss,
    plot_leakage_and_utility,
    plot_leakage_curve,
)
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult, Measurement


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def interval(value, radius):
    return Interval(value - radius, value + radius, 0.95, "delong")


def audit(epoch, auc, *, stop=False, loss=3.0, tpr=None, step=None):
    is_baseline = epoch == 0
    band = None if is_baseline else interval(auc, 0.05)
    return AuditResult(
        step=int(90 * (epoch or 0)) if step is None else step,
        epoch=epoch,
        status="ok",
        is_baseline=is_baseline,
        score="ez",
        n_members=400,
        n_non_members=600,
        decision=Decision(stop, not stop, "over budget" if stop else "within budget"),
        metrics={
            "auc": Measurement(auc, interval(auc, 0.03), band),
            "tpr_at_fpr_0.01": Measurement(tpr, note="needs 1000 non-members"),
        },
        member_loss=loss,
        non_member_loss=loss + 0.1,
    )


def failure(epoch):
    decision = Decision(False, None, "the audit failed")
    return AuditResult(
        int(90 * epoch), epoch, "failed", False, "ez", 400, 600, decision, error="RuntimeError: x"
    )


def history(*results):
    return AuditHistory(results, LeakageBudget(limit=0.6), 0.95)


FULL = history(audit(0.0, 0.5), audit(1.0, 0.56, loss=2.7), audit(2.0, 0.66, stop=True, loss=2.4))
LORA = history(audit(0.0, 0.5), audit(1.0, 0.51), audit(2.0, 0.52), audit(3.0, 0.53))


def line(ax, label):
    return next(found for found in ax.lines if found.get_label() == label)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def caption(ax):
    return " ".join(texts(ax)[-1].split())


def test_curve_holds_the_measured_values():
    ax = plot_leakage_curve({"full": FULL, "LoRA": LORA})

    assert line(ax, "full").get_xydata().tolist() == [[0.0, 0.5], [1.0, 0.56], [2.0, 0.66]]
    assert line(ax, "LoRA").get_ydata().tolist() == [0.5, 0.51, 0.52, 0.53]


def test_shaded_area_is_the_band_and_at_the_baseline_the_interval():
    ax = plot_leakage_curve(FULL)

    corners = {(float(x), round(float(y), 6)) for x, y in ax.collections[0].get_paths()[0].vertices}
    assert corners == {(0.0, 0.47), (0.0, 0.53), (1.0, 0.51), (1.0, 0.61), (2.0, 0.61), (2.0, 0.71)}


def test_labels_name_metric_attack_counts_and_confidence():
    ax = plot_leakage_curve(FULL)

    assert ax.get_xlabel() == "epoch"
    assert ax.get_ylabel() == "AUC of the EZ attack"
    assert caption(ax) == (
        "400 members, 600 non-members. Bands hold for all audits of a run together at 95 % "
        "(baseline: interval). Over budget: the whole band is above it."
    )


@pytest.mark.parametrize(
    ("rules", "shown"),
    [
        (["upper"], "Over budget: any part of the band is above it."),
        (["point", "point"], "Over budget: the curve itself is above it."),
        (["lower", "point"], None),
        ([None], None),
    ],
)
def test_the_caption_says_what_is_over_budget_where_the_runs_agree_on_it(rules, shown):
    budgets = [rule and LeakageBudget(limit=0.6, rule=rule) for rule in rules]
    runs = {str(i): replace(FULL, budget=budget) for i, budget in enumerate(budgets)}

    page = render_report(to_document(runs))

    on_the_page = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)[0]
    for found in (caption(plot_leakage_curve(runs)), on_the_page):
        assert shown in found if shown else "Over budget" not in found


def test_legend_names_the_runs_and_a_single_run_needs_none():
    several = plot_leakage_curve({"full": FULL, "LoRA": LORA}).get_legend()
    single = plot_leakage_curve(FULL).get_legend()

    assert [text.get_text() for text in several.get_texts()] == ["full", "LoRA"]
    assert single is None


def test_runs_differ_in_color_marker_and_line():
    ax = plot_leakage_curve({"full": FULL, "LoRA": LORA})

    full, lora = line(ax, "full"), line(ax, "LoRA")
    assert to_hex(full.get_color()) != to_hex(lora.get_color())
    assert full.get_marker() != lora.get_marker()
    assert full.get_linestyle() != lora.get_linestyle()


def test_budget_and_chance_lie_at_their_values_and_say_so():
    ax = plot_leakage_curve(FULL)

    assert list(line(ax, "_budget").get_ydata()) == [0.6, 0.6]
    assert line(ax, "_budget").get_linestyle() == "--"
    assert list(line(ax, "_chance").get_ydata()) == [0.5, 0.5]
    assert {"budget 0.60", "chance 0.50"} <= set(texts(ax))


def test_no_budget_draws_no_budget_line():
    ax = plot_leakage_curve(AuditHistory(FULL.results))

    assert not any("budget" in found.get_label() for found in ax.lines if found.get_linestyle() == "--")


def test_different_budgets_are_told_apart_by_run():
    strict = AuditHistory(LORA.results, LeakageBudget(limit=0.55))

    ax = plot_leakage_curve({"full": FULL, "LoRA": strict})

    assert {"budget 0.55\nLoRA", "budget 0.60\nfull"} <= set(texts(ax))


def test_stop_and_last_audit_within_budget_are_marked():
    ax = plot_leakage_curve(FULL)

    assert line(ax, "_stopped").get_xydata().tolist() == [[2.0, 0.66]]
    assert line(ax, "_last within budget").get_xydata().tolist() == [[1.0, 0.56]]
    assert {"stopped", "last within\nbudget"} <= set(texts(ax))


def test_run_that_was_not_stopped_has_no_marks():
    assert not {"stopped", "last within\nbudget", "audit failed"} & set(texts(plot_leakage_curve(LORA)))


def test_failed_audit_splits_line_and_band_and_is_marked_at_the_bottom():
    ax = plot_leakage_curve(
        {"run": history(audit(0.0, 0.5), audit(1.0, 0.51), failure(2.0), audit(3.0, 0.53))}
    )

    assert np.isnan(line(ax, "run").get_ydata()).tolist() == [False, False, True, False]
    assert max(x for path in ax.collections[0].get_paths()[:1] for x, _ in path.vertices) == 1.0
    marker = line(ax, "_audit failed")
    assert list(marker.get_xdata()) == [2.0]
    assert marker.get_transform().transform((2.0, 0.035))[1] < ax.transAxes.transform((0.0, 0.1))[1]
    assert "audit failed" in texts(ax)
    assert "1 of 4 audits failed: leakage there is unknown." in caption(ax)


def test_audit_between_gaps_keeps_its_interval():
    ax = plot_leakage_curve(history(audit(0.0, 0.5), failure(1.0), audit(2.0, 0.52), failure(3.0)))

    lone = ax.collections[1].get_paths()[2].vertices
    assert lone == pytest.approx(np.array([[2.0, 0.47], [2.0, 0.57]]))


def test_unresolved_value_is_a_gap_and_never_zero():
    ax = plot_leakage_curve(
        {"run": history(audit(0.0, 0.5), audit(1.0, 0.5, tpr=0.02))}, metric="tpr_at_fpr_0.01"
    )

    values = line(ax, "run").get_ydata()
    assert math.isnan(values[0])
    assert values[1] == 0.02
    assert ax.get_ylabel() == "TPR at 1 % FPR of the EZ attack"
    assert list(line(ax, "_chance").get_ydata()) == [0.01, 0.01]


def test_budget_of_another_metric_is_not_drawn():
    ax = plot_leakage_curve(history(audit(0.0, 0.5, tpr=0.01)), metric="tpr_at_fpr_0.01")

    assert not [found for found in ax.lines if found.get_label() == "_budget"]


def test_stop_without_a_figure_for_the_metric_is_not_marked():
    results = (audit(0.0, 0.5, tpr=0.01), audit(1.0, 0.7, stop=True))

    ax = plot_leakage_curve(history(*results), metric="tpr_at_fpr_0.01")

    assert "stopped" not in texts(ax)


def test_steps_are_the_axis_when_an_epoch_is_unknown():
    ax = plot_leakage_curve({"run": history(audit(0.0, 0.5), audit(None, 0.52, step=70))})

    assert ax.get_xlabel() == "optimizer steps"
    assert line(ax, "run").get_xdata().tolist() == [0.0, 70.0]


def test_given_axes_are_drawn_on_and_no_figure_is_opened():
    _, given = pyplot.subplots()
    figures = pyplot.get_fignums()

    ax = plot_leakage_curve(FULL, ax=given)

    assert ax is given
    assert pyplot.get_fignums() == figures


def test_global_style_stays_as_it_was():
    before = dict(matplotlib.rcParams)

    plot_leakage_and_loss({"full": FULL, "LoRA": LORA})

    assert dict(matplotlib.rcParams) == before


def test_losses_of_members_and_held_out_records_are_drawn_for_each_run():
    _, right = plot_leakage_and_loss({"full": FULL, "LoRA": LORA})

    drawn = [found.get_ydata().tolist() for found in right.lines if len(found.get_xdata())]
    assert drawn[0] == [3.0, 2.7, 2.4]
    assert drawn[1] == pytest.approx([3.1, 2.8, 2.5])
    assert len(drawn) == 4
    assert right.get_ylabel() == "loss (nats per token)"
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend == ["members (trained on)", "held out"]


def test_panels_share_x_and_colors():
    left, right = plot_leakage_and_loss({"full": FULL, "LoRA": LORA})

    assert left.get_xlim() == right.get_xlim()
    assert right.lines[2].get_color() == line(left, "LoRA").get_color()


def test_two_given_axes_are_drawn_on_and_one_is_refused():
    _, given = pyplot.subplots(1, 2)
    figures = pyplot.get_fignums()

    drawn = plot_leakage_and_loss(FULL, axes=given)

    assert drawn == tuple(given)
    assert pyplot.get_fignums() == figures
    with pytest.raises(ConfigurationError, match="Two axes are needed, got 1"):
        plot_leakage_and_loss(FULL, axes=given[:1])


def test_failed_audit_is_a_gap_in_the_losses():
    _, right = plot_leakage_and_loss(history(audit(0.0, 0.5), failure(1.0)))

    assert math.isnan(right.lines[0].get_ydata()[1])


def test_nothing_is_clipped_or_overlaps_in_the_front_page_picture():
    left, right = plot_leakage_and_loss({"full fine-tuning": FULL, "LoRA": LORA})

    figure = left.get_figure()
    figure.canvas.draw()
    boxes = [text.get_window_extent() for ax in (left, right) for text in ax.texts]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_path_has_a_dot_an_audit_at_held_out_loss_and_leakage():
    ax = plot_leakage_and_utility({"full": FULL, "LoRA": LORA})

    assert line(ax, "full").get_xydata() == pytest.approx(np.array([[3.1, 0.5], [2.8, 0.56], [2.5, 0.66]]))
    assert line(ax, "full").get_marker() != line(ax, "LoRA").get_marker()
    assert ax.get_xlabel() == "held-out loss (nats per token)"
    assert ax.get_ylabel() == "AUC of the EZ attack"
    assert list(line(ax, "_budget").get_ydata()) == [0.6, 0.6]


def test_path_names_its_epochs_points_forward_and_marks_the_stop():
    ax = plot_leakage_and_utility(FULL)

    assert {"0", "1", "2 stopped"} <= set(texts(ax))
    arrows = [text for text in ax.texts if text.arrow_patch is not None]
    assert [arrow.xyann for arrow in arrows] == [pytest.approx((3.1, 0.5)), pytest.approx((2.8, 0.56))]
    assert [arrow.xy for arrow in arrows] == [pytest.approx((2.95, 0.53)), pytest.approx((2.65, 0.61))]
    assert line(ax, "_stopped").get_xydata() == pytest.approx(np.array([[2.5, 0.66]]))


def test_path_carries_the_band_of_each_audit():
    (bars,) = plot_leakage_and_utility(FULL).collections

    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx(end) for end in ([0.47, 0.53], [0.51, 0.61], [0.61, 0.71])]


def test_failed_audit_interrupts_the_path_and_no_arrow_bridges_it():
    ax = plot_leakage_and_utility(history(audit(0.0, 0.5), failure(1.0), audit(2.0, 0.52)))

    assert not [text for text in ax.texts if text.arrow_patch is not None]
    assert "1 of 3 audits failed" in caption(ax)


def test_path_without_a_held_out_loss_is_refused():
    with pytest.raises(ConfigurationError, match="held-out loss"):
        plot_leakage_and_utility(history(replace(audit(1.0, 0.5), non_member_loss=None)))


def test_path_changes_nothing_global_and_draws_on_given_axes():
    _, given = pyplot.subplots()
    figures, style = pyplot.get_fignums(), dict(matplotlib.rcParams)

    ax = plot_leakage_and_utility(FULL, ax=given)

    assert ax is given
    assert pyplot.get_fignums() == figures
    assert dict(matplotlib.rcParams) == style


@pytest.mark.parametrize("empty", [AuditHistory(), {}, {"run": AuditHistory()}])
def test_nothing_to_draw_is_refused(empty):
    with pytest.raises(ConfigurationError, match=r"no history|no audits"):
        plot_leakage_curve(empty)


def test_unknown_metric_is_refused_with_those_available():
    with pytest.raises(ConfigurationError, match="Unknown metric 'f1'; available: auc"):
        plot_leakage_curve(FULL, metric="f1")


def test_metric_that_no_audit_resolves_is_refused_with_the_reason():
    with pytest.raises(ConfigurationError, match=r"No audit resolves .*needs 1000 non-members"):
        plot_leakage_curve(FULL, metric="tpr_at_fpr_0.01")


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(MissingDependencyError, match=r'pip install "ezmia-callbacks\[report\]"'):
        plot_leakage_curve(FULL)
