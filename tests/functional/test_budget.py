import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.budget import (
    JudgedFigure,
    LeakageBudget,
    alpha_for_audit,
    check_resolvable,
    decide,
    decide_by_strongest,
    end_shares,
    fpr_of_metric,
    metric_name,
)
from ezmia_callbacks.functional.intervals import Interval


def band(lower, upper):
    return Interval(lower=lower, upper=upper, confidence=0.95, method="delong")


@pytest.mark.parametrize(
    ("rule", "lower", "value", "upper", "stop"),
    [
        ("lower", 0.59, 0.70, 0.80, False),
        ("lower", 0.61, 0.70, 0.80, True),
        ("lower", 0.60, 0.70, 0.80, False),
        ("point", 0.40, 0.61, 0.80, True),
        ("point", 0.40, 0.59, 0.80, False),
        ("upper", 0.40, 0.50, 0.61, True),
        ("upper", 0.40, 0.50, 0.59, False),
    ],
)
def test_each_rule_reads_its_own_number(rule, lower, value, upper, stop):
    decision = decide(LeakageBudget(limit=0.6, rule=rule), value, band=band(lower, upper))

    assert (decision.stop, decision.is_within_budget) == (stop, not stop)


def test_patience_tolerates_that_many_audits_in_a_row():
    budget = LeakageBudget(limit=0.6, patience=2)
    over = band(0.7, 0.8)

    decisions = [decide(budget, 0.75, band=over, n_over_before=n) for n in range(3)]

    assert [decision.stop for decision in decisions] == [False, False, True]
    assert not any(decision.is_within_budget for decision in decisions)


def test_the_reason_names_number_and_limit():
    decision = decide(LeakageBudget(limit=0.6), 0.75, band=band(0.7, 0.8))

    assert decision.message == "over budget: lower bound of AUC 0.700 > 0.600"


def test_members_that_score_lower_leak_as_well():
    decision = decide(LeakageBudget(limit=0.6), 0.09, band=band(0.05, 0.15))

    assert (decision.stop, decision.is_within_budget, decision.is_reversed) == (True, False, True)
    assert decision.compared == pytest.approx(0.85)
    assert decision.message == (
        "over budget: lower bound of AUC 0.850 > 0.600 with the score reversed: members score LOWER than "
        "non-members"
    )


@pytest.mark.parametrize(
    ("rule", "lower", "value", "upper", "is_within"),
    [
        ("lower", 0.3, 0.35, 0.41, True),
        ("lower", 0.3, 0.35, 0.39, False),
        ("point", 0.3, 0.39, 0.5, False),
        ("upper", 0.45, 0.5, 0.55, True),
        ("upper", 0.39, 0.5, 0.55, False),
        ("upper", 0.45, 0.5, 0.61, False),
    ],
)
def test_each_rule_reads_both_directions(rule, lower, value, upper, is_within):
    decision = decide(LeakageBudget(limit=0.6, rule=rule), value, band=band(lower, upper))

    assert decision.is_within_budget is is_within


@pytest.mark.parametrize("metric", ["advantage", "tpr_at_fpr"])
def test_other_metrics_are_judged_by_the_figure_of_the_score_turned_around(metric):
    budget = LeakageBudget(limit=0.3, metric=metric)
    forward = {"value": 0.1, "band": band(0.0, 0.2)}

    within = decide(budget, **forward, reversed_value=0.3, reversed_band=band(0.2, 0.4))
    over = decide(budget, **forward, reversed_value=0.5, reversed_band=band(0.4, 0.6))

    assert (within.is_within_budget, within.compared) == (True, 0.2)
    assert within.message.endswith("0.200 <= 0.300 with the score reversed")
    assert (over.is_within_budget, over.compared, over.is_reversed) == (False, 0.4, True)
    assert decide(budget, **forward).is_within_budget


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_never_within_budget(value):
    with pytest.raises(ConfigurationError, match="Cannot judge"):
        decide(LeakageBudget(limit=0.6, rule="point"), value, band=band(0.1, 0.9))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limit": 0.5}, "strictly between 0.5"),
        ({"limit": 1.0}, "strictly between"),
        ({"limit": math.nan}, "strictly between"),
        ({"limit": "0.6"}, "strictly between"),
        ({"limit": 0.01, "metric": "tpr_at_fpr"}, "strictly between 0.01"),
        ({"limit": 0.0, "metric": "advantage"}, "strictly between 0"),
        ({"limit": 0.6, "metric": "f1"}, "Unknown budget metric 'f1'"),
        ({"limit": 0.6, "rule": "mean"}, "Unknown budget rule 'mean'"),
        ({"limit": 0.6, "patience": -1}, "`patience` must be"),
        ({"limit": 0.6, "fpr": 0.0}, "`fpr` must lie in"),
    ],
)
def test_bad_fields_are_refused_when_built(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        LeakageBudget(**fields)


@pytest.mark.parametrize("fpr", [0.0001, 0.001, 0.01, 0.025, 0.1, 0.5])
def test_the_name_of_a_metric_gives_its_false_positive_rate_back(fpr):
    assert fpr_of_metric(metric_name("tpr_at_fpr", fpr=fpr)) == fpr


@pytest.mark.parametrize("name", ["auc", "advantage", "tpr_at_fpr", "loss"])
def test_only_a_tpr_at_a_rate_has_a_false_positive_rate(name):
    assert fpr_of_metric(name) is None


@given(n=st.integers(1, 500), alpha=st.floats(0.001, 0.5))
def test_a_known_number_of_audits_spends_the_error_rate_and_no_more(n, alpha):
    spent = sum(alpha_for_audit(look, n_planned=n, failure_probability=alpha) for look in range(1, n + 1))

    assert spent == pytest.approx(alpha)


@given(n=st.integers(1, 2000), planned=st.one_of(st.none(), st.integers(1, 50)))
def test_any_number_of_audits_spends_at_most_what_is_documented(n, planned):
    spent = sum(
        alpha_for_audit(look, n_planned=planned, failure_probability=0.05) for look in range(1, n + 1)
    )

    assert spent <= (0.05 if planned is None else 0.1) + 1e-12


def test_the_schedule_without_a_known_number_has_its_published_values():
    shares = [alpha_for_audit(t, n_planned=None, failure_probability=0.05) for t in (1, 2, 3, 10)]

    # methods: .05 -> .0304, .0076, .0034, ..., .0003 at t = 10
    assert [round(share, 4) for share in shares] == [0.0304, 0.0076, 0.0034, 0.0003]


def test_a_budget_on_tpr_names_the_non_members_it_needs():
    budget = LeakageBudget(metric="tpr_at_fpr", limit=0.1, fpr=0.01)

    with pytest.raises(TooFewCanariesError, match="needs at least 601 non-members, got 500"):
        check_resolvable(budget, n_members=500, n_non_members=500, failure_probability=0.01 * 0.96)


def test_too_few_records_for_any_stop_are_refused():
    with pytest.raises(TooFewCanariesError, match="at least 54 of each"):
        check_resolvable(LeakageBudget(limit=0.9), n_members=30, n_non_members=500, failure_probability=0.007)


@pytest.mark.parametrize("metric", ["auc", "advantage"])
def test_the_upper_rule_refuses_a_set_on_which_a_clean_run_would_stop(metric):
    budget = LeakageBudget(metric=metric, limit=0.6 if metric == "auc" else 0.2, rule="upper")

    with pytest.raises(TooFewCanariesError, match=r": use \d+ of each, a higher limit") as caught:
        check_resolvable(budget, n_members=40, n_non_members=40, failure_probability=0.01)

    needed = int(str(caught.value).split(": use ")[1].split()[0])
    check_resolvable(budget, n_members=needed, n_non_members=needed, failure_probability=0.01)
    with pytest.raises(TooFewCanariesError):
        check_resolvable(budget, n_members=needed - 1, n_non_members=needed - 1, failure_probability=0.01)


@pytest.mark.parametrize("rule", ["lower", "upper", "point"])
def test_a_tpr_budget_needs_an_interval_under_every_rule(rule):
    budget = LeakageBudget(metric="tpr_at_fpr", fpr=0.01, limit=0.3, rule=rule)
    check_resolvable(budget, n_members=500, n_non_members=437, failure_probability=0.05)

    with pytest.raises(TooFewCanariesError, match="at least 437 non-members, got 436"):
        check_resolvable(budget, n_members=500, n_non_members=436, failure_probability=0.05)


@pytest.mark.parametrize(
    ("rule", "limit", "fewest"), [("lower", 0.9, 42), ("upper", 0.1, 42), ("lower", 0.5, 7)]
)
def test_a_tpr_budget_needs_members_that_can_carry_a_decision(rule, limit, fewest):
    # The exact bound when all, or none, of n are above the threshold is 0.0125^(1/n), or one minus that.
    budget = LeakageBudget(metric="tpr_at_fpr", fpr=0.01, limit=limit, rule=rule)
    check_resolvable(budget, n_members=fewest, n_non_members=500, failure_probability=0.05)

    with pytest.raises(TooFewCanariesError, match=f"at least {fewest} are needed"):
        check_resolvable(budget, n_members=fewest - 1, n_non_members=500, failure_probability=0.05)


@pytest.mark.parametrize(
    "name", ["tpr_at_fpr_0.01_", "tpr_at_fpr_", "tpr_at_fpr_nan", "tpr_at_fpr_1e999", "auc"]
)
def test_a_name_that_no_metric_has_names_no_rate(name):
    assert fpr_of_metric(name) is None


def figure(lower, value, upper):
    return JudgedFigure(value, band(lower, upper))


@pytest.mark.parametrize(("rule", "is_within"), [("lower", False), ("point", False), ("upper", False)])
def test_any_score_over_budget_is_over_budget(rule, is_within):
    figures = {"ez": figure(0.4, 0.5, 0.55), "wbc": figure(0.61, 0.7, 0.8)}

    decision = decide_by_strongest(LeakageBudget(limit=0.6, rule=rule), figures)

    assert (decision.is_within_budget, decision.score) == (is_within, "wbc")


def test_under_rule_upper_one_score_that_may_be_over_is_enough():
    figures = {"ez": figure(0.45, 0.5, 0.55), "wbc": figure(0.5, 0.56, 0.62)}

    assert decide_by_strongest(LeakageBudget(limit=0.6, rule="lower"), figures).is_within_budget
    assert not decide_by_strongest(LeakageBudget(limit=0.6, rule="upper"), figures).is_within_budget


@given(
    st.lists(st.floats(0.11, 0.89), min_size=1, max_size=4),
    st.sampled_from(["lower", "point", "upper"]),
    st.floats(0.51, 0.99),
)
def test_several_scores_are_within_budget_where_each_of_them_is(values, rule, limit):
    budget = LeakageBudget(limit=limit, rule=rule)
    figures = {str(i): figure(value - 0.1, value, value + 0.1) for i, value in enumerate(values)}

    together = decide_by_strongest(budget, figures)

    alone = [decide(budget, each.value, band=each.band) for each in figures.values()]
    assert together.is_within_budget is all(decision.is_within_budget for decision in alone)
    assert together.compared == max(decision.compared for decision in alone)


def test_without_a_score_there_is_nothing_to_judge():
    with pytest.raises(ConfigurationError, match="There is no AUC to be judged"):
        decide_by_strongest(LeakageBudget(limit=0.6), {})


@pytest.mark.parametrize(
    "arguments", [{"failure_probability": 0.0}, {"failure_probability": 0.1, "n_scores": 0}]
)
def test_shares_of_nothing_are_refused(arguments):
    with pytest.raises(ConfigurationError, match="at least one score"):
        end_shares(None, **arguments)
