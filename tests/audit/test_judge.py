"""Verdicts from figures alone: no model, no forward pass."""

from dataclasses import replace

import pytest

from ezmia_callbacks import AuditHistory, AuditResult, LeakageBudget, hold_out_canaries
from ezmia_callbacks.audit.judge import Judge
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional import Decision, Interval, alpha_for_audit, describe_power
from ezmia_callbacks.measuring.analysis_units import AnalysisUnits
from ezmia_callbacks.measuring.subset import CanarySubset
from ezmia_callbacks.results.result import Finding, Measurement
from ezmia_callbacks.scoring.rows import encode_canaries

BUDGET = LeakageBudget(limit=0.6)


def make_judge(budget=BUDGET, *, n_audits=4, **options):
    return Judge(budget, 0.95, n_audits, **options)


def make_history(*decisions, budget=BUDGET):
    """The baseline, then an audit for each decision."""
    made = [Decision(False, True, "baseline"), *decisions]
    return AuditHistory(
        tuple(AuditResult(i, float(i), "ok", i == 0, "ez", 100, 200, d) for i, d in enumerate(made)), budget
    )


def make_subset(n_members=100, n_non_members=200):
    rows = [{"input_ids": [i % 50 + 3, i // 50 + 3, 5, 7]} for i in range(2000)]
    canaries = hold_out_canaries(rows, n_members=n_members, n_non_members=n_non_members, seed=0)[1]
    return CanarySubset(encode_canaries(canaries), AnalysisUnits(canaries))


def auc_of(value, *, half_width=0.03):
    band = Interval(value - half_width, value + half_width, 0.99, "delong")
    return {"auc": Measurement(value, band=band)}


WITHIN = Decision(False, True, "within")


def test_the_bands_of_all_planned_audits_share_the_error_rate_equally():
    judge = make_judge(n_audits=4)

    confidences = [judge.band(make_history(*[WITHIN] * n)).confidence for n in range(4)]

    assert confidences == pytest.approx([1 - 0.05 / 4] * 4)


def test_audits_beyond_the_plan_get_less_and_less():
    judge = make_judge(n_audits=2)

    alphas = [1 - judge.band(make_history(*[WITHIN] * n)).confidence for n in range(5)]

    expected = [alpha_for_audit(n, n_planned=2, failure_probability=0.05) for n in (1, 2, 3, 4, 5)]
    assert alphas == pytest.approx(expected)
    assert sum(alphas) < 2 * 0.05


def test_the_lower_end_of_the_band_decides():
    judge, history = make_judge(), make_history()

    within, over = (judge.decide({"ez": auc_of(value)}, history) for value in (0.62, 0.65))

    assert (within.stop, within.is_within_budget) == (False, True)
    assert (over.stop, over.is_within_budget) == (True, False)
    assert over.compared == pytest.approx(0.62)


def test_patience_counts_on_from_the_history():
    budget = LeakageBudget(limit=0.6, patience=1)
    judge = make_judge(budget)

    first = judge.decide({"ez": auc_of(0.7)}, make_history(budget=budget))
    second = judge.decide({"ez": auc_of(0.7)}, make_history(first, budget=budget))

    assert (first.stop, first.n_over_in_a_row) == (False, 1)
    assert (second.stop, second.n_over_in_a_row) == (True, 2)


def test_the_baseline_is_within_budget_and_stops_nothing():
    decision = make_judge().decide({"ez": auc_of(0.9)}, make_history(), is_baseline=True)

    assert decision == Decision(False, True, "baseline: nothing was trained yet")


def test_without_a_budget_there_is_no_verdict():
    decision = make_judge(None).decide({"ez": auc_of(0.9)}, make_history(budget=None))

    assert (decision.stop, decision.is_within_budget) == (False, None)


@pytest.mark.parametrize("figure", [Measurement(None, note="too few"), Measurement(0.7, note="too few")])
def test_a_figure_that_the_canaries_cannot_carry_is_never_within_budget(figure):
    decision = make_judge().decide({"ez": {"auc": figure}}, make_history())

    assert (decision.stop, decision.is_within_budget) == (True, None)
    assert "too few" in decision.message


def test_a_judge_of_a_finished_run_gives_the_same_verdicts_and_never_stops():
    stopping, judging = make_judge(), make_judge(judge_only=True)
    unresolved = {"auc": Measurement(None, note="too few")}

    for figures in (auc_of(0.55), auc_of(0.9), unresolved):
        expected, found = (judge.decide({"ez": figures}, make_history()) for judge in (stopping, judging))

        assert not found.stop
        assert (found.is_within_budget, found.message) == (expected.is_within_budget, expected.message)


def test_a_budget_beyond_the_canaries_is_refused_with_the_number_that_would_do():
    judge = make_judge(LeakageBudget(limit=0.6, metric="tpr_at_fpr"), n_audits=2)

    with pytest.raises(TooFewCanariesError, match="non-members, got 200") as refused:
        judge.check_resolvable(make_subset())

    assert "2 audits" in str(refused.value)


def test_no_budget_is_beyond_any_canaries():
    make_judge(None).check_resolvable(make_subset(12, 12))


@pytest.mark.parametrize(("n", "can_judge"), [(12, False), (100, True)])
def test_so_few_that_a_far_excess_would_hardly_be_found_cannot_judge(n, can_judge):
    assert make_judge().can_judge(make_subset(n, n)) is can_judge


def test_too_few_for_any_figure_cannot_judge_even_without_a_budget():
    assert make_judge(None).can_judge(make_subset())
    assert not make_judge(None).can_judge(make_subset().of_share(0.01))


def test_power_is_that_of_the_least_favored_audit():
    text = make_judge(n_audits=4).describe_power(make_subset())

    expected = describe_power(BUDGET, n_members=100, n_non_members=200, failure_probability=0.05 / 4)
    assert text == expected
    assert make_judge(None).describe_power(make_subset()) is None


@pytest.mark.parametrize(
    ("budget", "n_audits", "message"),
    [
        (BUDGET, 0, "`n_audits` must be at least 1 or None, got 0"),
        (LeakageBudget(0.5, "tpr_at_fpr"), None, "needs to know how many audits will share its error rate"),
    ],
)
def test_a_plan_that_no_decision_can_be_made_by_is_refused(budget, n_audits, message):
    with pytest.raises(ConfigurationError, match=message):
        make_judge(budget, n_audits=n_audits)


def test_canaries_that_are_as_good_as_all_lack_nothing():
    assert make_judge().lacks(100, 200, make_subset()) == ""


def test_a_few_of_canaries_that_would_do_lack_something():
    everything = make_subset(n_members=300, n_non_members=300)

    assert make_judge().lacks(30, 300, everything) == ("members fed: 30, non-members: 300, which is too few")
    assert make_judge(budget=None).lacks(30, 300, everything) == ""


def test_of_canaries_that_are_too_few_altogether_no_more_is_asked():
    assert make_judge().lacks(40, 60, make_subset(n_members=40, n_non_members=60)) == ""
    assert "members fed: 9," in make_judge().lacks(9, 60, make_subset(n_members=40, n_non_members=60))


@pytest.mark.parametrize(
    ("rule", "auc", "expected"),
    [
        ("lower", 0.55, None),
        ("lower", 0.9, False),
        ("upper", 0.55, True),
        ("upper", 0.65, None),
        ("point", 0.55, None),
        ("point", 0.9, None),
    ],
)
def test_few_canaries_carry_the_verdicts_alone_that_more_could_not_undo(rule, auc, expected):
    judge = make_judge(LeakageBudget(limit=0.6, rule=rule))

    decision = judge.decide({"ez": auc_of(auc)}, make_history(), lacks="30 members are too few")

    assert decision.is_within_budget is expected
    assert decision.stop is (expected is False)
    if expected is None:
        assert decision.message == "not judged yet: 30 members are too few"


def test_of_what_nobody_has_seen_there_is_no_verdict():
    decision = make_judge().decide({"ez": auc_of(0.9)}, make_history(), why_unknown="no batch was seen")

    assert (decision.stop, decision.is_within_budget) == (False, None)


def test_figures_without_a_value_are_not_judged_yet_and_end_nothing():
    metrics = {"auc": Measurement(None, note="3 members")}

    decision = make_judge().decide({"ez": metrics}, make_history(), lacks="3 members are too few")

    assert (decision.stop, decision.is_within_budget) == (False, None)


def audits(*aucs, before=BUDGET, half_width=0.03, **options):
    """A run with these figures, and what judged it."""
    judge, history = make_judge(before), AuditHistory(budget=before)
    for i, auc in enumerate((0.5, *aucs)):
        figures = auc_of(auc, half_width=half_width)
        decision = judge.decide({"ez": figures}, history, is_baseline=i == 0)
        history = history.with_result(
            AuditResult(i, float(i), "ok", i == 0, "ez", 100, 200, decision, metrics=figures, **options)
        )
    return history


def rejudged(history, budget, *, n_audits=4, is_known=True):
    judged_by = history.judged_by if is_known else None
    return make_judge(budget, n_audits=n_audits).rejudged(history.results, make_subset(), judged_by=judged_by)


def verdicts(results):
    return [result.decision.is_within_budget for result in results]


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("patience", [0, 1])
def test_under_the_same_budget_every_decision_stays_as_it_was(is_known, patience):
    history = audits(0.55, 0.7, 0.7, before=LeakageBudget(limit=0.6, patience=patience))

    assert rejudged(history, history.budget, is_known=is_known) == history.results
    assert history.stopped is not None


def test_under_the_same_budget_a_longer_plan_changes_no_decision():
    history = audits(0.55, 0.7)

    assert rejudged(history, BUDGET, n_audits=40) == history.results


@pytest.mark.parametrize("is_known", [True, False])
def test_what_a_wider_limit_let_pass_may_be_over_a_stricter_one(is_known):
    history = audits(0.55, 0.7, before=LeakageBudget(limit=0.9))

    results = rejudged(history, LeakageBudget(limit=0.6), is_known=is_known)

    assert verdicts(history) == [True, True, True]
    assert verdicts(results) == [True, True, False]
    assert results[2].decision.message == "over budget: lower bound of AUC 0.670 > 0.600"
    # It did not stop then; the next audit may.
    assert [result.decision.stop for result in results] == [False] * 3
    assert results[2].decision.n_over_in_a_row == 1


def test_what_a_stricter_limit_did_not_let_pass_may_be_within_a_wider_one():
    assert verdicts(rejudged(audits(0.7), LeakageBudget(limit=0.9))) == [True, True]


def test_patience_counts_anew():
    history = audits(0.7, 0.7, before=LeakageBudget(limit=0.9))

    results = rejudged(history, LeakageBudget(limit=0.6, patience=3))

    assert [result.decision.n_over_in_a_row for result in results] == [0, 1, 2]


def test_another_rule_reads_the_other_end_of_the_band():
    history = audits(0.59)

    assert verdicts(rejudged(history, LeakageBudget(limit=0.6, rule="upper"))) == [True, False]


def test_another_metric_is_judged_by_its_own_figures():
    history = audits(0.55)
    advantage = Measurement(0.3, band=Interval(0.25, 0.4, 0.99, "exact_pairs"))
    results = [replace(r, metrics={**r.metrics, "advantage": advantage}) for r in history]

    judge = make_judge(LeakageBudget(metric="advantage", limit=0.2))

    assert verdicts(judge.rejudged(results, make_subset(), judged_by=history.judged_by)) == [True, False]


def test_the_other_direction_is_judged_anew_too():
    history = audits(0.2, before=LeakageBudget(limit=0.9))

    results = rejudged(history, LeakageBudget(limit=0.6))

    assert verdicts(history) == [True, True]
    assert verdicts(results) == [True, False]
    assert "members score LOWER" in results[1].decision.message


def test_a_metric_that_was_measured_in_one_direction_alone_is_never_within_another_budget():
    history = audits(0.55)
    advantage = Measurement(0.1, band=Interval(0.0, 0.15, 0.99, "exact_pairs"))
    judge = make_judge(LeakageBudget(metric="advantage", limit=0.2))

    def judged(figure):
        results = [replace(r, metrics={**r.metrics, "advantage": figure}) for r in history]
        return judge.rejudged(results, make_subset(), judged_by=history.judged_by)[1].decision

    assert judged(advantage).is_within_budget is None
    assert "measured in one direction alone" in judged(advantage).message
    assert judged(replace(advantage, reversed=advantage)).is_within_budget
    turned = Measurement(0.5, band=Interval(0.4, 0.6, 0.99, "exact_pairs"))
    assert judged(replace(advantage, reversed=turned)).is_within_budget is False


def test_a_figure_survives_json_in_both_directions():
    history = audits(0.55)
    turned = Measurement(0.5, band=Interval(0.4, 0.6, 0.99, "exact_pairs"))
    result = replace(history[1], metrics={"advantage": replace(turned, reversed=turned)})

    assert AuditResult.from_dict(result.to_dict()) == result


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (None, "AUC was not measured"),
        (Measurement(None, note="too few"), "too few"),
        (Measurement(0.55, note="no band: too few"), "no band: too few"),
    ],
)
def test_an_audit_without_the_figure_has_no_verdict(figure, message):
    history = audits(0.55, before=LeakageBudget(limit=0.9))
    results = [replace(result, metrics={} if figure is None else {"auc": figure}) for result in history]

    _, again = make_judge().rejudged(results, make_subset(), judged_by=history.judged_by)

    assert again.decision == Decision(False, None, f"not judged under this budget: {message}", limit=0.6)


@pytest.mark.parametrize("rule", ["lower", "upper", "point"])
def test_a_band_of_too_low_a_confidence_carries_no_verdict(rule):
    """The band here holds with 0.99; four audits that share 0.01 need 0.9975 each."""
    surer = LeakageBudget(limit=0.9, rule=rule, confidence=0.99)
    judge = Judge(surer, 0.99, 4)

    _, again = judge.rejudged(audits(0.55).results, make_subset(), judged_by=audits().judged_by)

    if rule == "point":  # reads no band
        assert again.decision.is_within_budget
    else:
        assert again.decision.is_within_budget is None
        assert "was made for a lower confidence than this budget asks for" in again.decision.message


def test_a_run_without_a_budget_is_judged_by_the_one_that_comes():
    history = audits(0.55, 0.7, before=None)

    results = rejudged(history, BUDGET)

    assert verdicts(history) == [True, None, None]
    assert verdicts(results) == [True, True, False]


def test_a_budget_that_is_gone_leaves_no_verdict():
    assert verdicts(rejudged(audits(0.7), None)) == [True, None]


def test_of_what_was_not_seen_there_is_no_verdict_under_another_budget_either():
    unseen = Finding("batches not seen", True, "Leakage is unknown: no batch was seen.")
    history = audits(0.7, before=None, findings=(unseen,))
    few = audits(0.55, before=None, n_members_seen=9)

    for results in (rejudged(history, BUDGET), rejudged(few, BUDGET)):
        assert verdicts(results) == [True, None]
        assert results[1].decision.message.startswith("not judged yet: ")


def test_a_failed_audit_stays_a_failed_one():
    history = audits(0.55)
    failed = replace(history[1], status="failed", metrics={}, decision=Decision(False, None, "failed"))
    results = [history[0], failed]

    found = make_judge(LeakageBudget(limit=0.9)).rejudged(results, make_subset(), judged_by=None)

    assert found == tuple(results)


JUDGED = {"ez": auc_of(0.58), "loss_difference": auc_of(0.9), "wbc": auc_of(0.05)}


def test_the_score_that_leaks_most_in_either_direction_decides():
    judge = make_judge(n_scores=3)

    decision = judge.decide(JUDGED, make_history())

    assert judge.strongest_of(JUDGED) == decision.score == "wbc"
    assert (decision.stop, decision.is_reversed, decision.compared) == (True, True, pytest.approx(0.92))
    assert "lower bound of AUC (wbc) 0.920" in decision.message


def test_the_strongest_is_the_one_that_the_rule_reads_most_of():
    """A higher estimate with a wider band is less evidence, and more that cannot be ruled out."""
    judged = {"ez": auc_of(0.68, half_width=0.01), "wbc": auc_of(0.7, half_width=0.1)}

    chosen = {
        rule: make_judge(LeakageBudget(limit=0.6, rule=rule), n_scores=2).strongest_of(judged)
        for rule in ("lower", "point", "upper")
    }

    assert chosen == {"lower": "ez", "point": "wbc", "upper": "wbc"}
    assert make_judge(None, n_scores=2).strongest_of(judged) == "wbc"
    # Of equal ones the first is named.
    tied = {"ez": {"auc": Measurement(0.5)}, "wbc": {"auc": Measurement(0.5)}}
    assert make_judge(n_scores=2).strongest_of(tied) == "ez"


@pytest.mark.parametrize(("rule", "shares"), [("lower", (3, 3)), ("point", (3, 3)), ("upper", (3, 1))])
def test_scores_share_the_error_rate_of_each_audit(rule, shares):
    band = make_judge(LeakageBudget(limit=0.6, rule=rule), n_scores=3).band(make_history())

    assert (band.lower, band.upper) == tuple(pytest.approx(0.05 / 4 / 2 / share) for share in shares)


def test_one_score_without_a_figure_leaves_no_verdict_on_the_others():
    judged = {"ez": auc_of(0.5), "wbc": {"auc": Measurement(None, note="too few")}}

    decision = make_judge(n_scores=2).decide(judged, make_history())

    assert decision.is_within_budget is None
    assert "too few" in decision.message


def test_a_stricter_budget_reads_every_score_of_an_older_audit():
    """EZ stands at 0.58, and another score at 0.66 that the older limit let pass."""
    within = Decision(False, True, "within", compared=0.63, limit=0.9, score="wbc")
    ez, wbc = auc_of(0.58), auc_of(0.66)
    result = AuditResult(
        1,
        1.0,
        "ok",
        False,
        "strongest",
        100,
        200,
        within,
        decided_by="ez",
        metrics=ez,
        judged_beside={"wbc": wbc},
    )
    judge = make_judge(LeakageBudget(limit=0.6), n_scores=2)

    (anew,) = judge.rejudged([result], make_subset(), judged_by={"budget": None, "confidence": 0.95})

    assert anew.decision.is_within_budget is False
    assert anew.decision.score == "wbc"


def test_an_older_audit_that_lost_one_of_its_scores_has_no_verdict_under_another_budget():
    lost = AuditResult(
        1, 1.0, "ok", False, "strongest", 100, 200, WITHIN, decided_by="ez", metrics=auc_of(0.55)
    )

    (anew,) = make_judge(n_scores=2).rejudged(
        [lost], make_subset(), judged_by={"budget": None, "confidence": 0.95}
    )

    assert anew.decision.is_within_budget is None


class NotWalked(tuple):
    """Audits that nobody may look through from the first to the last."""

    def __iter__(self):
        raise AssertionError("looks through all audits")


def test_a_band_is_made_without_a_look_through_all_audits_before():
    judge, history = make_judge(n_audits=2), make_history(WITHIN, WITHIN)

    band = judge.band(replace(history, results=NotWalked(history.results)))

    assert band == judge.band(history)
    without_baseline = replace(history, results=history.results[1:])
    assert judge.band(without_baseline) == judge.band(history)
