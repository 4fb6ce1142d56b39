from dataclasses import replace

import pytest

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import Decision, LeakageBudget
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.report import summarize
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import AuditResult, EdgeCounts, Measurement

ABOUT = "400 members and 600 non-members, drawn at random (seed 7) from 2000 records"


def interval(lower, upper):
    return Interval(lower, upper, 0.95, "delong")


def audit(epoch, auc, ends, decision, *, is_baseline=False, tpr=None, loss_auc=(0.51, 0.47, 0.55), step=90):
    band = None if is_baseline else interval(*ends)
    return AuditResult(
        step=step,
        epoch=epoch,
        status="ok",
        is_baseline=is_baseline,
        score="ez",
        n_members=400,
        n_non_members=600,
        n_tokens=64000,
        decision=decision,
        metrics={
            "auc": Measurement(auc, interval(*ends), band),
            "tpr_at_fpr_0.01": tpr or Measurement(None, note="needs 1000 non-members, got 600"),
            "advantage": Measurement(0.777, interval(0.7, 0.8)),
        },
        auc_by_score={
            "loss": Measurement(loss_auc[0], interval(*loss_auc[1:])),
            "loss_difference": Measurement(0.5432, interval(0.5011, 0.5899)),
            "wbc": Measurement(0.9999, interval(0.99, 1.0)),
        },
        member_loss=2.7123,
        non_member_loss=2.7654,
        member_edges=EdgeCounts(11, 12, 13),
        non_member_edges=EdgeCounts(21, 22, 23),
    )


BASELINE = audit(
    0.0,
    0.5,
    (0.464, 0.536),
    Decision(False, True, "baseline: nothing was trained yet"),
    is_baseline=True,
    step=0,
)
WITHIN = audit(
    1.0, 0.5613, (0.5152, 0.6051), Decision(False, True, "within budget: 0.515 <= 0.600", 0.5152, 0.6)
)
STOP = audit(
    2.0, 0.6604, (0.6173, 0.7032), Decision(True, False, "over budget: 0.617 > 0.600", 0.6173, 0.6, 1)
)
FAILED = AuditResult(
    90,
    1.5,
    "failed",
    False,
    "ez",
    400,
    600,
    Decision(False, None, "the audit failed: leakage is unknown"),
    error="RuntimeError: a | b\n<script>",
)


def history(*results, budget=LeakageBudget(limit=0.6), about=ABOUT):  # noqa: B008 - frozen
    return AuditHistory(results, budget, 0.95, about)


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start} |"))


def test_every_figure_stands_in_its_row_with_three_digits_and_ends():
    text = row(summarize(history(BASELINE, WITHIN, STOP)), "1")

    assert text == (
        "| 1 | 2.712 | 2.765 | 0.561 [0.515, 0.605] | not resolved: needs 1000 non-members, got 600 "
        "| 0.543 [0.501, 0.590] | 0.510 [0.470, 0.550] "
        "| members 11, 12, 13; non-members 21, 22, 23 | within budget: 0.515 <= 0.600 |"
    )


def test_header_names_every_column_and_rows_are_as_wide():
    lines = [line for line in summarize(history(BASELINE, FAILED, STOP)).splitlines() if line[:1] == "|"]

    assert lines[0] == (
        "| epoch | member loss | held-out loss | AUC (EZ) [band] | TPR at 1 % FPR (EZ) [interval] "
        "| AUC (loss-difference) [interval] | AUC (loss) [interval] | edge records | decision |"
    )
    assert {line.replace("\\|", "").count("|") for line in lines} == {10}


def test_baseline_has_its_own_row():
    text = row(summarize(history(BASELINE, WITHIN)), "0 (baseline)")

    assert "| 0.500 [0.464, 0.536] |" in text
    assert "nothing was trained yet" in text


def test_failed_audit_is_unknown_and_counted_loudly():
    text = summarize(history(BASELINE, FAILED, STOP))

    failed = row(text, "1.5")
    assert failed.count("| unknown ") == 7
    assert "AUDIT FAILED, leakage unknown: RuntimeError: a \\| b &lt;script>" in failed
    assert "> **1 of 3 audits FAILED. Leakage there is unknown" in text


def test_last_audit_that_failed_leaves_the_final_weights_unknown():
    text = summarize(history(BASELINE, WITHIN, FAILED))

    assert "the leakage of the final weights is unknown" in text
    assert "no verdict on its end" in text


def test_unresolved_rate_is_never_a_number():
    cell = row(summarize(history(BASELINE, WITHIN)), "1").split(" | ")[4]

    assert cell == "not resolved: needs 1000 non-members, got 600"


def test_rate_without_bounds_says_so():
    tpr = Measurement(0.0213, note="bounds need 1053 non-members, got 600")
    result = audit(1.0, 0.56, (0.51, 0.61), Decision(False, True, "within budget"), tpr=tpr)

    text = row(summarize(history(BASELINE, result)), "1")

    assert "0.021 (no interval: bounds need 1053 non-members, got 600)" in text


def test_rate_without_band_shows_the_interval_of_its_audit():
    tpr = Measurement(0.0213, interval(0.005, 0.0482), note="bounds need 1053 non-members, got 600")
    result = audit(1.0, 0.56, (0.51, 0.61), Decision(False, True, "within budget"), tpr=tpr)

    text = row(summarize(history(BASELINE, result)), "1")

    assert "0.021 [0.005, 0.048] (this audit alone; bounds need 1053" in text


def test_advantage_has_a_column_only_if_it_decides():
    decides = LeakageBudget(limit=0.3, metric="advantage")

    assert "0.777" not in summarize(history(BASELINE, WITHIN))
    assert "0.777 [0.700, 0.800]" in summarize(history(BASELINE, WITHIN, budget=decides))


def test_stop_is_told_with_the_weights_that_are_kept():
    text = summarize(history(BASELINE, WITHIN, STOP))

    assert "Stopped at epoch 2: over budget: 0.617 > 0.600." in text
    assert "The last weights within budget were those of epoch 1; whether they were put back" in text
    assert "→ **STOP**" in row(text, "2")


def test_stop_at_the_first_audit_keeps_the_starting_weights():
    assert "the weights from before training" in summarize(history(BASELINE, STOP))


def test_reading_says_what_the_number_means_with_band_and_counts():
    text = summarize(history(BASELINE, WITHIN))

    assert (
        "At epoch 1 an attacker who is shown one record that was trained on and one that was not picks the "
        "right one 56 times in 100 [52 to 61]; guessing would be right 50 times. The limit is 60 "
        "times in 100."
    ) in text
    assert (
        "(AUC 0.561 [0.515, 0.605], 95 % band over all audits of the run; 400 members, 600 non-members.)"
    ) in text


def test_run_without_stop_or_budget_says_so():
    undecided = audit(1.0, 0.56, (0.51, 0.61), Decision(False, None, "no budget"))

    assert "was not stopped. At epoch 1: within budget" in summarize(history(BASELINE, WITHIN))
    assert "measured without a budget" in summarize(history(BASELINE, undecided, budget=None))
    assert "Only the baseline was audited" in summarize(history(BASELINE))


def test_run_without_any_figure_is_unknown():
    text = summarize(history(BASELINE, FAILED))

    assert "**Not judged: the last audit failed.**" in text
    assert "the leakage of these weights is unknown, not absent" in text


def test_canaries_confidence_and_limits_are_stated():
    text = summarize(history(BASELINE, WITHIN))

    assert f"**Canaries.** {ABOUT}." in text
    assert "hold for all audits of this run together at 95 %" in text
    assert "Within budget is not proof of privacy" in text


@pytest.mark.parametrize(
    ("rule", "promise"),
    [
        ("lower", "is stopped with probability at most 5 %"),
        ("upper", "goes on with probability at most 5 %"),
        ("point", "carries no such promise"),
    ],
)
def test_promise_is_that_of_the_rule(rule, promise):
    text = summarize(history(BASELINE, WITHIN, budget=LeakageBudget(limit=0.6, rule=rule)))

    assert promise in text


def test_what_an_audit_can_find_out_stands_beside_the_promise():
    budget = LeakageBudget(limit=0.6)
    metadata = RunMetadata(power="An audit finds little.")
    run = replace(history(BASELINE, WITHIN, budget=budget), run_metadata=metadata)

    assert "may still exceed it. An audit finds little.\n" in summarize(run) + "\n"
    assert "An audit finds" not in summarize(history(BASELINE, WITHIN, budget=budget))


def test_difference_before_training_is_named():
    shifted = audit(
        0.0,
        0.5,
        (0.46, 0.54),
        Decision(False, True, "baseline"),
        is_baseline=True,
        loss_auc=(0.6, 0.56, 0.64),
    )

    assert "differed before any training" in summarize(history(shifted, WITHIN))
    assert "differed before any training" not in summarize(history(BASELINE, WITHIN))


def test_several_runs_get_a_heading_each_and_labels_are_escaped():
    text = summarize({"full | all": history(BASELINE, STOP), "LoRA": history(BASELINE, WITHIN)})

    assert "### full \\| all\n" in text
    assert "### LoRA\n" in text
    assert text.count("**Limits.**") == 1


def test_steps_replace_epochs_where_one_is_unknown():
    result = audit(None, 0.56, (0.51, 0.61), Decision(False, True, "within budget"), step=70)

    text = summarize(history(BASELINE, result))

    assert row(text, "70").startswith("| 70 | 2.712")
    assert "At step 70 an attacker" in text


@pytest.mark.parametrize("empty", [AuditHistory(), {}, {"run": AuditHistory()}])
def test_nothing_to_summarize_is_refused(empty):
    with pytest.raises(ConfigurationError, match=r"no history|no audits"):
        summarize(empty)
