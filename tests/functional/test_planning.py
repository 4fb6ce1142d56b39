from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.budget import (
    BudgetMetric,
    BudgetRule,
    LeakageBudget,
    check_resolvable,
    decide,
)
from ezmia_callbacks.functional.intervals import (
    Interval,
    advantage_interval,
    clopper_pearson_lower,
    delong_interval,
    n_non_members_needed,
    tpr_at_fpr_interval,
)
from ezmia_callbacks.functional.planning import (
    CanaryPlan,
    _largest_count_within,
    _rank_of_threshold,
    canaries_needed,
    decision_power,
    describe_power,
    has_enough_power,
    minimum_detectable_value,
)
from ezmia_callbacks.functional.roc import auc, membership_advantage, tpr_at_fpr


def separation(budget: LeakageBudget, expected: float) -> float:
    """Distance of two unit normals with this true value of the budget's metric."""
    if budget.metric == "auc":
        return np.sqrt(2) * stats.norm.ppf(expected)
    if budget.metric == "advantage":
        return 2 * stats.norm.ppf((expected + 1) / 2)
    return stats.norm.ppf(expected) - stats.norm.ppf(budget.fpr)


def measure(budget: LeakageBudget, scores, is_member, *, confidence: float) -> tuple[float, Interval]:
    if budget.metric == "auc":
        return auc(scores, is_member), delong_interval(scores, is_member, confidence=confidence)
    if budget.metric == "advantage":
        interval = advantage_interval(scores, is_member, confidence=confidence)
        return membership_advantage(scores, is_member), interval
    value = tpr_at_fpr(scores, is_member, fpr=budget.fpr)
    if budget.rule == "point":
        return value, Interval(value, value, confidence, "order_statistics")
    return value, tpr_at_fpr_interval(scores, is_member, fpr=budget.fpr, confidence=confidence)


def simulated_power(plan: CanaryPlan, *, n_runs: int, seed: int) -> float:
    budget, rng = plan.budget, np.random.default_rng(seed)
    is_member = np.arange(plan.n_members + plan.n_non_members) < plan.n_members
    shift = separation(budget, plan.expected) * is_member
    confidence = 1 - (1 - budget.confidence) / plan.n_audits
    is_within = plan.expected < budget.limit

    def is_right() -> bool:
        scores = rng.normal(size=len(is_member)) + shift
        value, band = measure(budget, scores, is_member, confidence=confidence)
        return decide(budget, value, band=band).is_within_budget == is_within

    return np.mean([is_right() for _ in range(n_runs)])


# The last column is how far the true power may lie above the plan's 0.8: AUC near 1 and advantage are
# planned on the safe side.
POWER_CASES = [
    ("auc", "lower", 0.6, 0.7, 0.05),
    ("auc", "upper", 0.6, 0.5, 0.05),
    ("auc", "upper", 0.7, 0.6, 0.05),
    ("auc", "point", 0.6, 0.65, 0.05),
    ("auc", "point", 0.6, 0.55, 0.05),
    ("auc", "lower", 0.6, 0.9, 0.2),
    ("advantage", "lower", 0.2, 0.5, 0.2),
    ("advantage", "upper", 0.25, 0.0, 0.05),
    ("advantage", "point", 0.2, 0.1, 0.15),
    ("tpr_at_fpr", "lower", 0.1, 0.3, 0.1),
    ("tpr_at_fpr", "upper", 0.1, 0.03, 0.08),
    ("tpr_at_fpr", "point", 0.1, 0.05, 0.05),
]


@pytest.mark.parametrize(("metric", "rule", "limit", "expected", "excess"), POWER_CASES)
def test_planned_counts_have_the_promised_power(
    metric: str, rule: str, limit: float, expected: float, excess: float
) -> None:
    budget = LeakageBudget(metric=metric, limit=limit, rule=rule)
    plan = canaries_needed(budget, n_audits=3, expected=expected)

    power = simulated_power(plan, n_runs=250, seed=7)

    # Three standard errors of 250 runs.
    assert 0.8 - 0.076 <= power <= 0.8 + excess + 0.076


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1.0, 3.0])
@pytest.mark.parametrize(("metric", "rule", "limit", "expected", "excess"), POWER_CASES)
def test_planned_counts_have_the_promised_power_in_many_runs(
    metric: str, rule: str, limit: float, expected: float, excess: float, ratio: float
) -> None:
    budget = LeakageBudget(metric=metric, limit=limit, rule=rule)
    plan = canaries_needed(budget, n_audits=10, expected=expected, power=0.9, non_members_per_member=ratio)

    power = simulated_power(plan, n_runs=2000, seed=8)

    assert power >= 0.9 - 0.04


@pytest.mark.parametrize("rule", ["lower", "upper"])
def test_a_plan_reads_the_threshold_and_the_count_that_a_decision_reads(rule: str) -> None:
    budget = LeakageBudget(metric="tpr_at_fpr", limit=0.2, fpr=0.05, rule=rule)
    n_members, n_non_members = 150, 400
    is_member = np.arange(n_members + n_non_members) < n_members
    highest_first = np.arange(n_non_members, 0.0, -1.0)

    rank = _rank_of_threshold(budget, n_non_members, 0.01 / 4)
    n_within = _largest_count_within(budget, n_members, 0.01 / 4)

    def bound(n_above: int, value: float) -> float:
        members = np.where(np.arange(n_members) < n_above, value, -1.0)
        scores = np.concatenate([members, highest_first])
        interval = tpr_at_fpr_interval(scores, is_member, fpr=0.05, confidence=0.99)
        return interval.lower if rule == "lower" else interval.upper

    # Just above and just below the threshold of that rank, which is the `rank`-th highest non-member.
    assert bound(n_within, highest_first[rank - 1] + 0.5) <= budget.limit
    assert bound(n_within + 1, highest_first[rank - 1] + 0.5) > budget.limit
    assert bound(n_members, highest_first[rank - 1] - 0.5) == bound(0, 0.0)


def test_there_is_no_power_below_the_fewest_counts() -> None:
    budget = LeakageBudget(metric="tpr_at_fpr", limit=0.9)
    fewest = canaries_needed(budget, n_audits=10)

    def power(n_members: int, n_non_members: int) -> float:
        return decision_power(
            budget,
            expected=0.99,
            n_members=n_members,
            n_non_members=n_non_members,
            failure_probability=0.005,
        )

    assert power(fewest.n_members, fewest.n_non_members) > 0.0
    assert power(fewest.n_members - 1, fewest.n_non_members) == 0.0
    assert power(fewest.n_members, fewest.n_non_members - 1) == 0.0


@pytest.mark.parametrize(("metric", "limit"), [("auc", 0.6), ("advantage", 0.3), ("tpr_at_fpr", 0.3)])
@pytest.mark.parametrize("is_over", [True, False])
def test_a_band_stands_in_the_way_of_one_answer_and_helps_the_other(
    metric: BudgetMetric, limit: float, is_over: bool
) -> None:
    """Simulated: each rule's answer about the same runs, right as often as is promised."""
    n, n_runs, failure_probability = 400, 60, 0.05
    rng, is_member = np.random.default_rng(0), np.arange(2 * n) < n
    budget = LeakageBudget(metric=metric, limit=limit, fpr=0.1)
    expected = (limit + 1) / 2 if is_over else (limit + budget.chance) / 2
    shift = separation(budget, expected) * is_member
    right: dict[str, float] = {}
    promised: dict[str, float] = {}
    for rule in ("lower", "point", "upper"):
        ruled = LeakageBudget(metric=metric, limit=limit, fpr=0.1, rule=rule)
        promised[rule] = decision_power(
            ruled, expected=expected, n_members=n, n_non_members=n, failure_probability=failure_probability
        )
        found = []
        for _ in range(n_runs):
            value, band = measure(
                ruled, rng.normal(size=2 * n) + shift, is_member, confidence=1 - failure_probability
            )
            found.append(decide(ruled, value, band=band).is_within_budget is not is_over)
        right[rule] = float(np.mean(found))

    hard, easy = ("lower", "upper") if is_over else ("upper", "lower")
    assert promised[hard] <= promised["point"] <= promised[easy]
    assert promised[easy] > 0.95
    for rule, share in right.items():
        assert share >= promised[rule] - 0.2


@pytest.mark.parametrize("metric", ["auc", "advantage", "tpr_at_fpr"])
def test_the_recognized_value_is_the_least_that_is_found_often_enough(metric: BudgetMetric) -> None:
    budget = LeakageBudget(metric=metric, limit=0.6, fpr=0.1)
    counts = {"n_members": 300, "n_non_members": 300, "failure_probability": 0.01}

    value = minimum_detectable_value(budget, **counts)

    assert decision_power(budget, expected=value, **counts) >= 0.8
    assert decision_power(budget, expected=value - 0.004, **counts) < 0.8
    assert minimum_detectable_value(budget, **counts, power=0.99) > value
    assert minimum_detectable_value(budget, **{**counts, "n_members": 4, "n_non_members": 4}) is None


def test_enough_power_is_power_for_every_answer_that_the_rule_may_get_wrong() -> None:
    counts = {"n_members": 60, "n_non_members": 60, "failure_probability": 0.0125}

    # Far over budget both find it; only one of them lets a harmless run pass.
    assert has_enough_power(LeakageBudget(limit=0.6), **counts)
    assert not has_enough_power(LeakageBudget(limit=0.6, rule="upper"), **counts)
    counts |= {"n_members": 12, "n_non_members": 12}
    check_resolvable(LeakageBudget(limit=0.6), **counts)
    assert not has_enough_power(LeakageBudget(limit=0.6), **counts)
    counts |= {"n_members": 10, "n_non_members": 10}
    assert not has_enough_power(LeakageBudget(limit=0.6, rule="point"), **counts)


def test_certificate_counts_match_published_values() -> None:
    # One-sided at 5 %, order statistics of methods 3a: a plan asks for more, and says so.
    one_sided = [n_non_members_needed(fpr=fpr, failure_probability=0.05) for fpr in (0.05, 0.01, 0.001)]
    assert one_sided == [59, 299, 2995]

    planned = [
        canaries_needed(
            LeakageBudget(metric="tpr_at_fpr", limit=0.1, fpr=fpr, confidence=0.8), n_audits=1
        ).n_non_members
        for fpr in (0.05, 0.01, 0.001)
    ]

    # A quarter of 0.2 is 0.05 again.
    assert planned == one_sided


@pytest.mark.parametrize("rule", ["lower", "upper"])
@pytest.mark.parametrize(("metric", "limit"), [("auc", 0.6), ("auc", 0.97), ("advantage", 0.9)])
@pytest.mark.parametrize("n_audits", [1, 3])
def test_the_refusal_and_the_plan_name_the_same_number(
    rule: BudgetRule, metric: BudgetMetric, limit: float, n_audits: int
) -> None:
    budget = LeakageBudget(metric=metric, limit=limit, rule=rule)
    needed = canaries_needed(budget, n_audits=n_audits).n_members_to_resolve

    with pytest.raises(TooFewCanariesError) as caught:
        check_resolvable(budget, n_members=3, n_non_members=3, failure_probability=0.05 / n_audits)

    (named,) = re.findall(r"(\d+) of each", str(caught.value))
    assert max(10, int(named)) == needed


@pytest.mark.parametrize(("n_audits", "needed"), [(1, 437), (10, 666)])
def test_a_decision_needs_more_than_a_one_sided_certificate(n_audits: int, needed: int) -> None:
    plan = canaries_needed(LeakageBudget(metric="tpr_at_fpr", limit=0.1), n_audits=n_audits)

    assert plan.n_non_members_to_resolve == plan.n_non_members == needed


@pytest.mark.parametrize("rule", ["lower", "upper", "point"])
@pytest.mark.parametrize(("metric", "limit"), [("auc", 0.6), ("advantage", 0.3), ("tpr_at_fpr", 0.2)])
@pytest.mark.parametrize("ratio", [1.0, 2.5, 0.5])
def test_the_fewest_counts_pass_the_check_and_fewer_do_not(
    metric: str, limit: float, rule: str, ratio: float
) -> None:
    budget = LeakageBudget(metric=metric, limit=limit, rule=rule)

    plan = canaries_needed(budget, n_audits=5, non_members_per_member=ratio)

    n1, n0 = plan.n_members, plan.n_non_members
    check_resolvable(budget, n_members=n1, n_non_members=n0, failure_probability=0.01)
    if (rule != "point" or metric == "tpr_at_fpr") and min(n1, n0) > 10:
        with pytest.raises(TooFewCanariesError):
            check_resolvable(
                budget,
                n_members=n1 - 1,
                n_non_members=n0 - max(1, round(ratio)),
                failure_probability=0.01,
            )


def test_a_budget_on_tpr_needs_members_enough_for_its_bound_to_cross() -> None:
    budget = LeakageBudget(metric="tpr_at_fpr", limit=0.9)

    plan = canaries_needed(budget, n_audits=1)

    n = plan.n_members_to_resolve
    assert clopper_pearson_lower(n, n, failure_probability=0.05 / 4) > 0.9
    assert clopper_pearson_lower(n - 1, n - 1, failure_probability=0.05 / 4) <= 0.9


def test_smaller_differences_and_more_audits_need_more_canaries() -> None:
    budget = LeakageBudget(limit=0.6)

    def n_members(**changes) -> int:
        return canaries_needed(budget, **{"n_audits": 5, "expected": 0.7} | changes).n_members

    assert n_members() < n_members(expected=0.65)
    assert n_members() < n_members(n_audits=50)
    assert n_members() < n_members(power=0.95)
    assert n_members(non_members_per_member=4.0) < n_members()


@pytest.mark.parametrize(("metric", "limit", "expected"), [("auc", 0.6, 0.7), ("tpr_at_fpr", 0.1, 0.3)])
def test_planned_counts_are_just_enough(metric: str, limit: float, expected: float) -> None:
    budget = LeakageBudget(metric=metric, limit=limit)

    plan = canaries_needed(budget, n_audits=4, expected=expected)

    def power(n: int) -> float:
        return decision_power(
            budget, expected=expected, n_members=n, n_non_members=n, failure_probability=0.0125
        )

    assert plan.n_members == plan.n_non_members
    assert power(plan.n_members) >= 0.8 > power(plan.n_members - 1)


@pytest.mark.parametrize(("rule", "limit", "expected"), [("lower", 0.6, 0.7), ("upper", 0.7, 0.6)])
@pytest.mark.parametrize("spread", [1 / 3, 10.0])
def test_the_worst_case_of_a_plan_holds_for_unequal_spreads(
    rule: str, limit: float, expected: float, spread: float
) -> None:
    budget = LeakageBudget(limit=limit, rule=rule)
    plan = canaries_needed(budget, n_audits=3, expected=expected)
    n_runs, n, rng = 250, plan.n_members_at_worst, np.random.default_rng(3)
    is_member = np.arange(2 * n) < n
    shift = np.hypot(1, spread) * stats.norm.ppf(expected)

    def is_right() -> bool:
        scores = np.where(is_member, shift + spread * rng.normal(size=2 * n), rng.normal(size=2 * n))
        band = delong_interval(scores, is_member, confidence=1 - 0.05 / 3)
        return decide(budget, 0.5, band=band).is_within_budget == (expected < limit)

    # Three standard errors of 250 runs.
    assert np.mean([is_right() for _ in range(n_runs)]) >= 0.8 - 0.076


@pytest.mark.slow
def test_the_count_for_equal_spreads_is_too_small_for_unequal_ones() -> None:
    plan = canaries_needed(LeakageBudget(limit=0.6), n_audits=10, expected=0.7)
    n, rng = plan.n_members, np.random.default_rng(4)
    is_member = np.arange(2 * n) < n

    def is_found(spread: float) -> bool:
        shift = np.hypot(1, spread) * stats.norm.ppf(0.7)
        scores = np.where(is_member, shift + spread * rng.normal(size=2 * n), rng.normal(size=2 * n))
        return delong_interval(scores, is_member, confidence=0.995).lower > 0.6

    alike, unlike = (np.mean([is_found(spread) for _ in range(3000)]) for spread in (1.0, 10.0))

    # Why the plan's sentence names its condition. Three standard errors are 0.022.
    assert alike >= 0.8 - 0.022
    assert unlike < 0.7


@pytest.mark.parametrize(("metric", "limit", "expected"), [("auc", 0.6, 0.7), ("auc", 0.9, 0.97)])
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_the_worst_case_is_no_better_than_the_usual_one(
    metric: BudgetMetric, limit: float, expected: float, ratio: float
) -> None:
    budget = LeakageBudget(metric=metric, limit=limit)

    plan = canaries_needed(budget, n_audits=5, expected=expected, non_members_per_member=ratio)

    assert plan.n_members_at_worst > plan.n_members
    assert plan.n_non_members_at_worst > plan.n_non_members


def test_only_the_auc_is_planned_for_two_cases() -> None:
    plans = [
        canaries_needed(LeakageBudget(metric="advantage", limit=0.3), n_audits=1, expected=0.6),
        canaries_needed(LeakageBudget(metric="tpr_at_fpr", limit=0.1), n_audits=1, expected=0.4),
        canaries_needed(LeakageBudget(limit=0.6), n_audits=1),
    ]

    assert [plan.n_members_at_worst for plan in plans] == [None, None, None]
    assert plans[0].describe().endswith("non-members.")
    assert (
        plans[1].describe().endswith("if the scores of members and non-members are normal and spread alike.")
    )


def test_power_is_said_with_its_condition() -> None:
    counts = {"n_members": 500, "n_non_members": 500, "failure_probability": 0.005}

    auc, advantage, tpr = (
        describe_power(LeakageBudget(metric=metric, limit=0.5 if metric != "auc" else 0.6, fpr=0.1), **counts)
        for metric in ("auc", "advantage", "tpr_at_fpr")
    )

    at_worst = minimum_detectable_value(LeakageBudget(limit=0.6), **counts, is_worst_case=True)
    assert auc.endswith(
        f"if the scores of members and non-members spread alike, and at {at_worst:.3f} however they spread."
    )
    assert "if " not in advantage
    assert tpr.endswith("if the scores of members and non-members are normal and spread alike.")


def test_both_answers_of_the_upper_rule_are_said_with_their_condition() -> None:
    budget = LeakageBudget(limit=0.6, rule="upper")
    counts = {"n_members": 300, "n_non_members": 300, "failure_probability": 0.005}

    usual, worst = (
        decision_power(budget, expected=0.5, **counts, is_worst_case=is_worst) for is_worst in (False, True)
    )
    text = describe_power(budget, **counts)

    assert worst < usual
    assert f"within budget with {100 * usual:.0f} % probability, if the scores of" in text
    assert text.endswith(f" and with {100 * worst:.0f} %.")


def test_one_record_of_a_class_decides_nothing() -> None:
    counts = {"n_members": 1, "n_non_members": 50, "failure_probability": 0.05}

    assert decision_power(LeakageBudget(limit=0.6), expected=0.9, **counts) == 0.0


def test_the_plan_reads_as_plain_sentences() -> None:
    budget = LeakageBudget(limit=0.6)

    assert canaries_needed(budget, n_audits=1).describe() == (
        "A budget of AUC 0.6 needs at least 10 members and 10 non-members to be resolved over 1 audit at "
        "95 % confidence."
    )
    assert canaries_needed(budget, n_audits=10, expected=0.7).describe() == (
        "A budget of AUC 0.6 needs at least 12 members and 12 non-members to be resolved over 10 audits at "
        "95 % confidence. To detect a run over budget with 80 % probability per audit when its true AUC "
        "is 0.7, it needs 211 members and 211 non-members if the scores of both spread alike, and at most "
        "321 and 321 however they spread."
    )


@pytest.mark.parametrize(
    ("rule", "expected", "message"),
    [
        ("lower", 0.55, "only values above the limit 0.6"),
        ("upper", 0.65, "only values below the limit 0.6"),
        ("point", 0.6, "only values away from the limit 0.6"),
        ("lower", 1.0, "between 0.5, where nothing leaks, and 1"),
        ("upper", 0.4, "between 0.5, where nothing leaks"),
        ("upper", float("nan"), "between 0.5"),
    ],
)
def test_an_expected_value_that_decides_nothing_is_refused(rule: str, expected: float, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        canaries_needed(LeakageBudget(limit=0.6, rule=rule), n_audits=1, expected=expected)


def test_a_difference_that_no_set_can_show_is_refused() -> None:
    budget = LeakageBudget(limit=0.6)

    with pytest.raises(TooFewCanariesError, match="move `expected` away"):
        canaries_needed(budget, n_audits=1, expected=0.60001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_audits": 0}, "`n_audits` is 0"),
        ({"power": 1.0}, "`power` is"),
        ({"non_members_per_member": 0.0}, "needs to be above 0"),
        ({"non_members_per_member": float("inf")}, "needs to be above 0"),
    ],
)
def test_arguments_outside_their_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        canaries_needed(LeakageBudget(limit=0.6), **{"n_audits": 1} | changes)


def test_power_refuses_empty_classes() -> None:
    with pytest.raises(ConfigurationError, match="at least one of each"):
        decision_power(
            LeakageBudget(limit=0.6), expected=0.7, n_members=0, n_non_members=5, failure_probability=0.05
        )


@pytest.mark.parametrize("metric", ["auc", "advantage", "tpr_at_fpr"])
def test_several_scores_need_more_canaries_and_never_promise_more(metric):
    budget = LeakageBudget(limit=0.6 if metric == "auc" else 0.3, metric=metric)
    counts = {"n_members": 400, "n_non_members": 900, "failure_probability": 0.01}
    expected = 0.75 if metric == "auc" else 0.6

    one, three = (decision_power(budget, expected=expected, **counts, n_scores=n) for n in (1, 3))
    plans = [canaries_needed(budget, n_audits=5, expected=expected, n_scores=n) for n in (1, 3)]

    # Exactly as one score with a third of the error rate.
    third = {**counts, "failure_probability": 0.01 / 3}
    assert three == decision_power(budget, expected=expected, **third) < one
    assert plans[0].n_members < plans[1].n_members < 1.4 * plans[0].n_members
    assert "5 audits and 3 scores" in plans[1].describe()


def test_under_rule_upper_all_scores_must_be_found_within():
    budget = LeakageBudget(limit=0.6, rule="upper")
    counts = {"n_members": 500, "n_non_members": 500, "failure_probability": 0.01}

    one, three = (decision_power(budget, expected=0.52, **counts, n_scores=n) for n in (1, 3))

    assert 1.0 - three == pytest.approx(3.0 * (1.0 - one))
    assert decision_power(budget, expected=0.7, **counts, n_scores=3) == decision_power(
        budget, expected=0.7, **counts
    )
