import math
import sys

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
from matplotlib import pyplot

from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError, TooFewCanariesError
from ezmia_callbacks.functional.budget import Decision
from ezmia_callbacks.functional.intervals import tpr_at_fpr_interval
from ezmia_callbacks.functional.roc import tpr_at_fpr
from ezmia_callbacks.report.roc_plots import plot_roc, plot_score_histograms
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult

IS_MEMBER = np.arange(300) < 100


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def make_scores(shift, *, seed=0):
    return np.random.default_rng(seed).normal(shift * IS_MEMBER, 1.0)


def audit(epoch, scores):
    status = "failed" if scores is None else "ok"
    decision = Decision(False, None, "")
    return AuditResult(9 * epoch, float(epoch), status, epoch == 0, "ez", 100, 200, decision, scores=scores)


def line(ax, label):
    return next(found for found in ax.lines if found.get_label().startswith(label))


def caption(ax):
    return " ".join(ax.texts[-1].get_text().split())


def test_each_point_of_the_curve_is_the_rate_that_the_records_reach():
    scores = make_scores(1.5)

    ax = plot_roc(scores, IS_MEMBER)

    x, y = line(ax, "AUC").get_xydata().T
    assert len(x) > 20
    assert y.tolist() == [tpr_at_fpr(scores, IS_MEMBER, fpr=fpr) for fpr in x]
    assert line(ax, "AUC").get_drawstyle() == "steps-post"
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_rates_below_one_non_member_are_hatched_and_have_no_curve():
    ax = plot_roc(make_scores(1.5), IS_MEMBER)

    (hatched,) = [patch for patch in ax.patches if patch.get_label() == "_unresolved"]
    assert hatched.get_hatch()
    assert hatched.get_x() + hatched.get_width() == pytest.approx(1 / 200)
    assert hatched.get_x() == pytest.approx(ax.get_xlim()[0])
    assert line(ax, "AUC").get_xdata().min() == pytest.approx(1 / 200)
    assert "not resolved by 200 non-members" in [text.get_text() for text in ax.texts]


def test_shaded_is_the_exact_interval_of_the_last_curve_where_it_exists():
    last = make_scores(1.5)

    ax = plot_roc({"epoch 1": make_scores(0.2), "epoch 2": last}, IS_MEMBER, confidence=0.9)

    corners = ax.collections[0].get_paths()[0].vertices
    rates = np.unique(corners[:, 0])
    assert 1 / 200 < rates[0] < 0.05
    for rate in rates[[0, len(rates) // 2, -1]]:
        exact = tpr_at_fpr_interval(last, IS_MEMBER, fpr=float(rate), confidence=0.9)
        drawn = corners[corners[:, 0] == rate, 1]
        assert (drawn.min(), drawn.max()) == pytest.approx((exact.lower, exact.upper))
    assert "exact 90 % interval at each rate alone" in caption(ax)


def test_too_few_non_members_to_certify_anything_draw_no_band_and_say_so():
    is_member = np.arange(3) < 2

    ax = plot_roc(np.arange(3.0), is_member, confidence=0.999)

    assert not ax.collections[0].get_paths()
    assert "No rate is certified" in caption(ax)


def test_chance_is_the_diagonal():
    x, y = line(plot_roc(make_scores(1.0), IS_MEMBER), "_chance").get_xydata().T

    assert x.tolist() == y.tolist()
    assert x[-1] == 1.0


def test_a_history_gives_a_curve_an_audit_evenly_from_first_to_last():
    audits = [audit(epoch, make_scores(0.2 * epoch)) for epoch in range(7)]
    history = AuditHistory((*audits[:3], audit(3, None), *audits[3:]))

    ax = plot_roc(history, IS_MEMBER)

    labels = [text.get_text().split(":")[0] for text in ax.get_legend().get_texts()]
    assert labels == ["the baseline", "epoch 2", "epoch 4", "epoch 6"]
    assert "4 of 8 audits shown" in caption(ax)


def test_curves_differ_in_color_and_line_and_the_band_has_the_last_ones():
    ax = plot_roc({f"epoch {i}": make_scores(0.5 * i) for i in range(4)}, IS_MEMBER)

    curves = [line(ax, f"epoch {i}") for i in range(4)]
    assert len({curve.get_color() for curve in curves}) == 4
    assert len({str(curve._dash_pattern) for curve in curves}) == 4
    assert matplotlib.colors.to_hex(ax.collections[0].get_facecolor()[0]) == curves[-1].get_color().lower()


def test_a_history_from_a_file_has_no_scores_and_says_so():
    with pytest.raises(ConfigurationError, match="holds no record's score"):
        plot_roc(AuditHistory((audit(1, None),)), IS_MEMBER)


@pytest.mark.parametrize("plot", [plot_roc, plot_score_histograms])
def test_bad_arrays_are_refused(plot):
    with pytest.raises(ConfigurationError, match="shape"):
        plot(np.zeros(3), IS_MEMBER)
    with pytest.raises(ConfigurationError, match="NaN or infinite"):
        plot(np.full(300, math.nan), IS_MEMBER)
    with pytest.raises(TooFewCanariesError, match="0 members"):
        plot(np.zeros(300), np.zeros(300, dtype=bool))
    assert pyplot.get_fignums() == []


def test_no_scores_and_an_impossible_confidence_are_refused():
    with pytest.raises(ConfigurationError, match="no scores"):
        plot_roc({}, IS_MEMBER)
    with pytest.raises(ConfigurationError, match="confidence"):
        plot_roc(make_scores(1.0), IS_MEMBER, confidence=1.5)


@pytest.mark.parametrize("plot", [plot_roc, plot_score_histograms])
def test_given_axes_are_drawn_on_and_nothing_global_changes(plot):
    _, given = pyplot.subplots()
    figures, style = pyplot.get_fignums(), dict(matplotlib.rcParams)

    ax = plot(make_scores(1.0), IS_MEMBER, ax=given)

    assert ax is given
    assert pyplot.get_fignums() == figures
    assert dict(matplotlib.rcParams) == style


def test_histograms_share_their_bins_and_are_shares_of_each_class():
    scores = make_scores(1.5)

    ax = plot_score_histograms(scores, IS_MEMBER, score="ez", n_bins=10)

    members, non_members = [patch.get_data() for patch in ax.patches]
    assert members.edges.tolist() == non_members.edges.tolist()
    assert len(members.values) == 10
    expected = np.histogram(scores[IS_MEMBER], members.edges)[0] / 100
    assert members.values.tolist() == expected.tolist()
    assert non_members.values.sum() == pytest.approx(1.0)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("EZ score", "share of the class")
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["members (100)", "non-members (200)"]


def test_one_class_is_an_area_and_the_other_an_outline():
    members, non_members = plot_score_histograms(make_scores(1.0), IS_MEMBER).patches

    assert members.get_fill()
    assert not non_members.get_fill()
    assert non_members.get_linestyle() != "-"


def test_ties_stand_as_spikes_at_their_value_with_their_share():
    scores = make_scores(1.0)
    scores[:30] = 0.5
    scores[100:120] = 0.5

    ax = plot_score_histograms(scores, IS_MEMBER)

    spikes = [found.get_xydata()[1].tolist() for found in ax.lines if found.get_label() == "_tied"]
    assert spikes == [[0.5, 0.3], [0.5, 0.1]]
    assert caption(ax) == "Spikes: records tied at one value (0.5: 30 % of members, 10 % of non-members)."


def test_scores_without_ties_have_no_spikes():
    ax = plot_score_histograms(make_scores(1.0), IS_MEMBER)

    assert not ax.lines
    assert caption(ax) == "No value is shared by 2 % of a class."


def test_constant_scores_are_drawn():
    ax = plot_score_histograms(np.full(300, 0.5), IS_MEMBER)

    assert ax.lines[0].get_xydata()[1].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("n_bins", [0, 2.5, True])
def test_a_number_of_bins_that_is_none_is_refused(n_bins):
    with pytest.raises(ConfigurationError, match="`n_bins`"):
        plot_score_histograms(make_scores(1.0), IS_MEMBER, n_bins=n_bins)


@pytest.mark.parametrize("plot", [plot_roc, plot_score_histograms])
def test_missing_matplotlib_names_the_extra(monkeypatch, plot):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(MissingDependencyError, match=r'pip install "ezmia-callbacks\[report\]"'):
        plot(make_scores(1.0), IS_MEMBER)
