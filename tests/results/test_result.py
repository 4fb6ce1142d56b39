import json
from dataclasses import replace

import numpy as np
import pytest

from ezmia_callbacks import LeakageBudget
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional import Decision, EpsilonBound, Interval
from ezmia_callbacks.functional.budget import decide_by_strongest
from ezmia_callbacks.results.result import AuditResult, EdgeCounts, Measurement


def interval(lower, upper, *, confidence=0.95):
    return Interval(lower=lower, upper=upper, confidence=confidence, method="delong")


def full_result():
    return AuditResult(
        step=120,
        epoch=1.5,
        status="ok",
        is_baseline=False,
        score="ez",
        n_members=50,
        n_non_members=100,
        n_tokens=4321,
        decision=Decision(
            True, False, "over budget: lower bound of AUC 0.610 > 0.600", 0.61, 0.6, n_over_in_a_row=1
        ),
        metrics={
            "auc": Measurement(0.7, interval(0.65, 0.75), interval(0.61, 0.79, confidence=0.99)),
            "tpr_at_fpr_0.01": Measurement(None, note="needs 100 non-members for a value, got 50"),
            "tpr_at_fpr_0.1": Measurement(0.3, interval(0.2, 0.4), note="bounds need 132 non-members"),
            "advantage": Measurement(0.4, interval(0.3, 0.5), interval(0.25, 0.55)),
        },
        auc_by_score={"loss": Measurement(0.6, interval(0.5, 0.7)), "wbc": Measurement(None, note="none")},
        member_loss=1.25,
        non_member_loss=2.5,
        member_edges=EdgeCounts(1, 2, 3),
        non_member_edges=EdgeCounts(0, 0, 1),
        seconds=0.5,
        scores=np.arange(150.0),
    )


def unjudged_result():
    message = "TPR at 10 % FPR cannot be judged any more (bounds need 132 non-members): it was to end by now"
    return replace(full_result(), decision=Decision(True, None, message))


def failed_result():
    return AuditResult(
        step=7,
        epoch=None,
        status="failed",
        is_baseline=False,
        score="ez",
        n_members=50,
        n_non_members=100,
        decision=Decision(False, None, "the audit failed: leakage is unknown"),
        error="NonFiniteLogitsError: NaN",
    )


def baseline_result():
    return replace(
        full_result(),
        step=0,
        epoch=0.0,
        is_baseline=True,
        decision=Decision(False, True, "baseline: nothing was trained yet"),
    )


@pytest.mark.parametrize("make", [full_result, failed_result, baseline_result])
def test_a_result_survives_json(make):
    result = make()

    restored = AuditResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))

    assert restored == result
    assert restored.scores is None


def test_what_a_holder_of_all_checkpoints_sees_survives_json_and_goes_to_trackers():
    bound = EpsilonBound(0.5, 3.4, 100, 0.95, 1e-5, "one_run")
    figure = Measurement(0.7, Interval(0.6, 0.8, 0.95, "delong"), note="no band")
    result = replace(
        full_result(), checkpoint_holder=figure, checkpoint_holder_epsilon=bound, n_checkpoints=3
    )

    restored = AuditResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))

    assert restored == result
    assert result.to_metrics()["auc_checkpoint_holder"] == 0.7
    assert "auc_checkpoint_holder" not in full_result().to_metrics()


def test_a_row_of_before_checkpoints_were_held_together_has_none():
    row = full_result().to_dict()
    for name in ("checkpoint_holder", "checkpoint_holder_epsilon", "n_checkpoints"):
        del row[name]

    assert AuditResult.from_dict(row) == full_result()


def test_a_changed_figure_makes_results_unequal():
    row = full_result().to_dict()

    row["metrics"]["auc"]["band"]["lower"] = 0.62

    assert AuditResult.from_dict(row) != full_result()


def test_numpy_numbers_become_plain_ones_in_json():
    result = replace(
        full_result(),
        step=np.int64(120),
        metrics={"auc": Measurement(np.float64(0.7), interval(np.float64(0.6), 0.8))},
        decision=Decision(np.bool_(True), np.bool_(False), "over", np.float64(0.6), 0.5, np.int64(1)),
    )

    row = json.loads(json.dumps(result.to_dict()))

    assert (row["step"], row["metrics"]["auc"]["value"], row["decision"]["stop"]) == (120, 0.7, True)


def test_tracker_figures_are_plain_floats_with_the_band_before_the_interval():
    metrics = full_result().to_metrics()

    assert metrics == {
        "auc": 0.7,
        "auc_lower": 0.61,
        "auc_upper": 0.79,
        "tpr_at_fpr_0.1": 0.3,
        "tpr_at_fpr_0.1_lower": 0.2,
        "tpr_at_fpr_0.1_upper": 0.4,
        "advantage": 0.4,
        "advantage_lower": 0.25,
        "advantage_upper": 0.55,
        "auc_loss": 0.6,
        "member_loss": 1.25,
        "non_member_loss": 2.5,
        "budget": 0.6,
        "over_budget": 1.0,
    }
    assert {type(value) for value in metrics.values()} == {float}


def test_numpy_and_integer_figures_become_floats_for_trackers():
    result = replace(full_result(), metrics={"auc": Measurement(np.float64(1.0), interval(0, 1))})

    assert {type(value) for value in result.to_metrics().values()} == {float}


def test_within_budget_is_zero_and_no_budget_is_absent():
    within = replace(full_result(), decision=Decision(False, True, "within budget", 0.55, 0.6))
    without = replace(full_result(), decision=Decision(False, None, "no budget"))

    assert within.to_metrics()["over_budget"] == 0.0
    assert {"budget", "over_budget"}.isdisjoint(without.to_metrics())


def test_a_failed_audit_has_one_figure():
    assert failed_result().to_metrics() == {"failed": 1.0}


def test_the_line_of_an_audit_has_its_verdict_first_then_the_figure_and_the_moment():
    assert full_result().describe() == (
        "over budget, STOP: AUC 0.700 [0.610, 0.790], 0.610 > limit 0.600; audit at step 120, epoch 1.5"
    )
    within = replace(full_result(), decision=Decision(False, True, "within budget", 0.55, 0.6))
    assert within.describe() == (
        "within budget: AUC 0.700 [0.610, 0.790], 0.550 <= limit 0.600; audit at step 120, epoch 1.5"
    )


def test_the_line_of_an_audit_that_goes_on_does_not_say_stop():
    result = replace(full_result(), epoch=None, decision=Decision(False, None, "no budget"))

    assert result.describe() == "not judged: no budget, AUC 0.700 [0.610, 0.790]; audit at step 120"


def test_the_line_of_the_baseline_names_it():
    assert baseline_result().describe() == (
        "baseline: AUC 0.700 [0.610, 0.790], loss of members 1.250, held out 2.500; audit before training"
    )


def test_the_line_of_a_failed_audit_says_that_leakage_is_unknown():
    assert failed_result().describe() == (
        "failed: leakage unknown, NonFiniteLogitsError: NaN; audit at step 7"
    )


def test_the_line_has_the_figure_of_the_budget():
    figure = Measurement(0.3, band=Interval(0.2, 0.4, 0.95, "delong"))
    for budget, label in (
        (LeakageBudget(limit=0.15, metric="tpr_at_fpr", fpr=0.1), "TPR@10%FPR"),
        (LeakageBudget(limit=0.15, metric="advantage"), "advantage"),
    ):
        decision = decide_by_strongest(budget, {"": figure.to_judge()})
        result = replace(
            full_result(), metrics={**full_result().metrics, budget.name: figure}, decision=decision
        )

        assert f"STOP: {label} 0.300 [0.200, 0.400], 0.200 > limit 0.150;" in result.describe()


def test_the_line_says_that_the_score_was_turned_around():
    budget = LeakageBudget(limit=0.6)
    low = Measurement(0.2, band=Interval(0.1, 0.3, 0.95, "delong"))
    decision = decide_by_strongest(budget, {"": low.to_judge()})

    line = replace(full_result(), metrics={"auc": low}, decision=decision).describe()

    assert "AUC 0.200 [0.100, 0.300], reversed 0.700 > limit 0.600" in line


@pytest.mark.parametrize("step", [7, 120_000, 123_456_789])
@pytest.mark.parametrize("epoch", [None, 0.125, 1234.5])
def test_no_line_is_longer_than_100_characters_and_the_limit_is_in_each(step, epoch):
    low = Measurement(0.2, band=Interval(0.1, 0.3, 0.95, "delong"))
    turned = decide_by_strongest(LeakageBudget(limit=0.6), {"": low.to_judge()})
    long = Decision(True, None, "AUC cannot be judged any more (a reason of many words): " + "why " * 30)
    results = [
        full_result(),
        replace(full_result(), metrics={"auc": low}, decision=turned),
        replace(full_result(), decision=long),
        replace(failed_result(), error="RuntimeError:\n" + "CUDA " * 50),
        baseline_result(),
    ]

    lines = [replace(result, step=step, epoch=epoch).describe() for result in results]

    assert max(map(len, lines)) <= 100
    assert not any("\n" in line for line in lines)
    assert [f"audit at step {step}" in line for line in lines] == [True] * 4 + [False]
    assert all("limit 0.600" in line for line in lines[:2])
    assert lines[2].startswith("not judged, STOP: AUC cannot be judged any more")


def test_where_several_scores_are_judged_each_has_its_curve_in_the_trackers():
    judged_beside = {"ez": {"auc": Measurement(0.57)}}
    result = replace(full_result(), decided_by="wbc", judged_beside=judged_beside, auc_by_score={})
    flat = result.to_metrics()

    assert (flat["auc"], flat["auc_wbc"], flat["auc_ez"]) == (0.7, 0.7, 0.57)
    assert "auc_ez" not in full_result().to_metrics()


def test_figures_of_all_judged_scores_survive_json():
    figure = Measurement(0.57, Interval(0.5, 0.6, 0.95, "delong"), Interval(0.4, 0.7, 0.99, "delong"))
    result = replace(
        full_result(), score="strongest", decided_by="wbc", judged_beside={"ez": {"auc": figure}}
    )

    read = AuditResult.from_dict(json.loads(json.dumps(result.to_dict())))

    assert read == result
    assert list(read.judged) == ["wbc", "ez"]
    # Of older files.
    later = ("decided_by", "judged_beside")
    older = {name: value for name, value in full_result().to_dict().items() if name not in later}
    assert AuditResult.from_dict(older) == full_result()


def test_the_deciding_score_is_not_beside_itself():
    beside = {"ez": {"auc": Measurement(0.5)}}

    with pytest.raises(ConfigurationError, match="'ez' decides, and is judged beside itself"):
        replace(full_result(), decided_by="ez", judged_beside=beside)


def test_a_result_without_its_score_is_refused():
    row = full_result().to_dict()
    del row["score"]

    with pytest.raises(ConfigurationError, match="it has no `score`"):
        AuditResult.from_dict(row)


def test_a_figure_that_cannot_be_judged_has_no_verdict_for_trackers():
    flat = unjudged_result().to_metrics()

    assert flat["auc"] == 0.7
    assert not {"over_budget", "budget"} & set(flat)


def test_a_stop_without_a_verdict_says_so_on_the_console():
    line = unjudged_result().describe()

    assert line.startswith("not judged, STOP: ")
    assert "within" not in line
