"""The promises of intervals, decisions and bounds, held against simulations with known truth.

The simulations are those of `benchmarks/statistics_coverage.py`, whose output `docs/statistics.md` quotes. A
rate may exceed its promise by three binomial standard errors. Beside a promise stands the naive form that
breaks it, so that a simulation too weak to tell them apart fails as well.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import LeakageBudget, PrivacyAuditor, hold_out_canaries
from ezmia_callbacks.functional import alpha_for_audit

ROOT = Path(__file__).parents[2]


def load_simulations():
    path = ROOT / "benchmarks" / "statistics_coverage.py"
    spec = importlib.util.spec_from_file_location("statistics_coverage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simulations = load_simulations()
population = simulations.population


def at_most(promise: float, n_runs: int) -> float:
    """Largest rate that may be seen where the true one is `promise`."""
    return promise + 3.0 * math.sqrt(promise * (1.0 - promise) / n_runs)


def runs(budget, *, kind="smooth", n, n_runs, seed=0, true=None, **how):
    """Rates of runs whose true leakage is the limit at each of ten audits."""
    value = budget.limit if true is None else true
    source = population(kind, metric=budget.metric, value=value)
    return simulations.run_rates(source, [budget], n=n, n_runs=n_runs, seed=seed, **how)[0]


# --- seconds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["lower", "upper"])
@pytest.mark.parametrize("n_planned", [10, None])
def test_ten_looks_at_a_run_at_the_limit_rarely_mislead(rule, n_planned):
    budget = LeakageBudget(limit=0.6, rule=rule, confidence=0.8)

    rates = runs(budget, n=60, n_runs=100, n_planned=n_planned, correlation=0.5)

    wrong = rates.stopped if rule == "lower" else rates.within_once
    # Each rule reads one end of the band, to which half of the 20 % go.
    assert wrong <= at_most(0.1, 100)


@pytest.mark.parametrize("rule", ["lower", "upper"])
def test_without_the_union_bound_they_would_mislead_often(rule):
    budget = LeakageBudget(limit=0.6, rule=rule, confidence=0.8)

    rates = runs(budget, n=60, n_runs=60, is_shared=False, correlation=0.5)

    wrong = rates.stopped if rule == "lower" else rates.within_once
    assert wrong > at_most(0.1, 60)


def test_point_estimates_promise_nothing():
    budget = LeakageBudget(limit=0.6, rule="point")

    assert runs(budget, n=60, n_runs=40).stopped > 0.6


def test_patience_delays_the_upper_rule_by_that_many_audits_and_no_more():
    budget = LeakageBudget(limit=0.6, rule="upper", patience=2)

    after_two = runs(budget, n=100, n_runs=10, true=0.8, n_looks=2)
    after_three = runs(budget, n=100, n_runs=10, true=0.8, n_looks=3)

    assert (after_two.stopped, after_two.over) == (0.0, 1.0)
    assert (after_three.stopped, after_three.over) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ["smooth", "tied"])
def test_each_end_of_each_interval_misses_as_rarely_as_promised(kind):
    n_runs = 200

    found = simulations.coverage(population(kind, value=0.75), n=440, n_runs=n_runs, seed=1)

    for name in ("auc", "advantage", "tpr 0.01", "tpr 0.1"):
        assert max(found[name]) <= at_most(0.025, n_runs), name
    if kind == "smooth":
        # methods 3a: members alone miss in a third to a half of the draws
        assert sum(found["members only 0.01"]) > 0.15


def test_shuffled_labels_cover_one_half():
    misses = simulations.shuffled_misses(n=60, n_runs=500, seed=2)

    assert max(misses) <= at_most(0.025, 500)


@pytest.mark.parametrize("n", [100, 300])
def test_both_ends_of_the_auc_keep_their_share_where_a_few_records_carry_the_variance(n):
    limits = [0.55, 0.6, 0.7, 0.8, 0.9, 0.95]

    found = simulations.few_remembered_misses(n=n, n_audits=10, limits=limits)

    # Exact, and for audits as independent as one likes: each end has half of 0.5 %.
    assert max(max(misses) for misses in found) <= 0.0025


def test_the_joint_permutation_test_keeps_its_level_and_finds_more_than_single_audits():
    nothing = simulations.permutation_p_values(population("smooth", value=0.5), n=60, n_runs=150, seed=3)
    leaking = population("smooth", value=0.62)
    found = simulations.permutation_p_values(leaking, n=60, n_runs=60, seed=4)
    alone = simulations.per_audit_detection(leaking, n=60, n_runs=60, seed=4)

    assert np.mean(nothing <= 0.05) <= at_most(0.05, 150)
    assert np.mean(nothing <= 0.5) > 0.3
    assert np.mean(found <= 0.05) >= alone


def test_a_rise_between_audits_named_beforehand_is_rarely_false():
    fixed, chosen = simulations.false_rises(population("smooth", value=0.75), n=60, n_runs=80, seed=5)

    assert fixed <= at_most(0.025, 80) < chosen


@pytest.mark.parametrize("choice", ["fixed", "bonferroni", "split_half"])
@pytest.mark.parametrize("mechanism", simulations.MECHANISMS[:2], ids=lambda m: m.name)
def test_one_run_rarely_claims_more_epsilon_than_there_is(mechanism, choice):
    values = simulations.epsilon_bounds(mechanism, method="one_run", choice=choice, n_runs=100, seed=6)

    assert np.mean(values > mechanism.epsilon) <= at_most(0.05, 100)
    if mechanism.epsilon:
        assert np.median(values) > 0.4


def test_the_best_of_several_bounds_claims_too_much_unless_it_is_paid_for():
    values = simulations.epsilon_bounds(
        simulations.MECHANISMS[0], method="one_run", choice="best", n_runs=200, seed=7
    )

    assert np.mean(values > 0.0) > at_most(0.05, 200)


@pytest.mark.parametrize("n_audits", [2, None])
def test_the_auditor_spends_the_shares_that_the_simulations_spend(n_audits):
    _, canaries = hold_out_canaries(make_rows(make_texts(60)), n_members=20, n_non_members=20)
    model = make_model()
    budget = LeakageBudget(limit=0.9, rule="point")
    auditor = PrivacyAuditor(canaries, budget=budget, n_audits=n_audits, score="ez", assume_seen=True)
    auditor.begin(model)

    results = [auditor.audit(model) for _ in range(3)]

    spent = [1.0 - result.metrics["auc"].band.confidence for result in results]
    expected = [alpha_for_audit(look, n_planned=n_audits, failure_probability=0.05) for look in range(1, 4)]
    assert spent == pytest.approx(expected)
    # Audits beyond the plan included, each side of the band spends at most what both were promised.
    assert sum(spent) / 2.0 <= 0.05


def test_the_documentation_quotes_the_tables_as_they_were_printed():
    content = json.loads((ROOT / "benchmarks/results/statistics_coverage.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs/statistics.md").read_text(encoding="utf-8")

    missing = [
        table["name"]
        for table in content["tables"]
        if not all(part in text for part in (table["caption"], simulations.Table(**table).markdown()))
    ]

    assert missing == []
    assert simulations.text_of_run(content) in text


# --- minutes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smooth", "tied"])
@pytest.mark.parametrize("n", [100, 300, 1000])
@pytest.mark.parametrize("n_planned", [10, 5, None])
def test_false_stops_at_the_limit_keep_their_promise_in_many_runs(kind, n, n_planned):
    rates = runs(LeakageBudget(limit=0.6), kind=kind, n=n, n_runs=1000, seed=10, n_planned=n_planned)

    assert rates.stopped <= at_most(0.05 if n_planned == 5 else 0.025, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smooth", "tied"])
@pytest.mark.parametrize("n", [300, 1000])
@pytest.mark.parametrize("n_planned", [10, None])
def test_false_go_ons_at_the_limit_keep_their_promise_in_many_runs(kind, n, n_planned):
    budget = LeakageBudget(limit=0.6, rule="upper")

    rates = runs(budget, kind=kind, n=n, n_runs=1000, seed=11, n_planned=n_planned)

    assert rates.within_once <= at_most(0.05, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lower", "upper"])
@pytest.mark.parametrize(("n", "n_planned"), [(700, 10), (1100, None)])
def test_a_budget_on_tpr_keeps_both_promises_in_many_runs(rule, n, n_planned):
    budget = LeakageBudget(metric="tpr_at_fpr", limit=0.05, rule=rule)

    rates = runs(budget, n=n, n_runs=500, seed=12, n_planned=n_planned)

    wrong = rates.stopped if rule == "lower" else rates.within_once
    assert wrong <= at_most(0.05, 500)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lower", "upper"])
def test_a_budget_on_advantage_keeps_both_promises_in_many_runs(rule):
    budget = LeakageBudget(metric="advantage", limit=0.3, rule=rule)

    rates = runs(budget, n=300, n_runs=500, seed=13)

    wrong = rates.stopped if rule == "lower" else rates.within_once
    assert wrong <= at_most(0.05, 500)


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 500])
@pytest.mark.parametrize("true", [0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("kind", ["smooth", "tied", "few"])
def test_intervals_keep_their_promise_in_many_draws(kind, true, n):
    n_runs = 1500

    found = simulations.coverage(population(kind, value=true), n=n, n_runs=n_runs, seed=14)

    for name in ("auc", "advantage", "tpr 0.01", "tpr 0.1"):
        assert max(rate for rate in found[name] if rate is not None) <= at_most(0.025, n_runs), name


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["fixed", "bonferroni", "split_half"])
@pytest.mark.parametrize(
    ("method", "mechanism"),
    [
        ("one_run", 0),
        ("one_run", 1),
        ("rates", 0),
        ("rates", 1),
        ("one_run_gdp", 0),
        ("one_run_gdp", 2),
        ("rates_gdp", 0),
        ("rates_gdp", 2),
    ],
)
def test_epsilon_bounds_keep_their_promise_in_many_runs(method, mechanism, choice):
    known = simulations.MECHANISMS[mechanism]

    values = simulations.epsilon_bounds(known, method=method, choice=choice, n_runs=1000, seed=15)

    assert np.mean(values > known.epsilon) <= at_most(0.05, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smooth", "tied"])
def test_permutation_p_values_without_leakage_are_uniform_in_many_runs(kind):
    p_values = simulations.permutation_p_values(population(kind, value=0.5), n=100, n_runs=1000, seed=16)

    assert stats.kstest(p_values, "uniform").pvalue > 0.001


@pytest.mark.slow
def test_random_splits_are_flagged_as_rarely_as_promised():
    rate = simulations.blind_flags("random split", n=80, n_runs=200, seed=17)

    assert rate <= at_most(0.05, 200)
