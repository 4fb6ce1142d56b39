"""Constructed runs for the tests of the report: figures as a real run would have them, and the hard cases."""

from dataclasses import replace

from ezmia_callbacks.functional.budget import Decision, LeakageBudget, decide
from ezmia_callbacks.functional.epsilon import EpsilonBound
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import AuditResult, EdgeCounts, Finding, Measurement
from ezmia_callbacks.results.trajectories import ExposedRecord, ExposedRecords

N_MEMBERS, N_NON_MEMBERS = 400, 800
BUDGET = LeakageBudget(limit=0.6)

ABOUT = (
    "400 members and 800 non-members, drawn at random (seed 0) from 12000 records; groups of near-duplicates "
    "stay on one side"
)
CAVEAT = (
    "The members were drawn from the training set after the fact: a difference in topic reads as leakage."
)
FACTS = {
    "ezmia_callbacks": "0.1.0.dev0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "canaries": "sha256:1f0a5c3e9b7d42c8a6e1",
    "reference": "auto",
    "seed": "0",
    "command": "python train.py --epochs 6 --learning-rate 1e-4",
}
FINDINGS = (
    Finding(
        "blind difference",
        False,
        "A bag-of-words classifier tells members from non-members with AUC 0.512 [0.478, 0.546]: it agrees "
        "with chance.",
    ),
    Finding(
        "near-duplicates",
        True,
        "7 of 800 non-members share more than half of their 5-grams with a training record. They read as "
        "members, which hides leakage.",
    ),
    Finding("overlap", False, "No record stands on both sides."),
)


def interval(value, radius, method="delong"):
    return Interval(max(0.0, value - radius), max(0.0, min(1.0, value + radius)), 0.95, method)


def measured(value, radius, *, is_baseline):
    return Measurement(
        value, interval(value, radius), None if is_baseline else interval(value, 1.45 * radius)
    )


def audit(epoch, auc, losses, *, budget=BUDGET, n_over_before=0, tpr=0.0, group_aucs=None, **changes):
    """One audit of a run of 75 steps an epoch; the verdict is that of the budget."""
    is_baseline = epoch == 0
    figure = measured(auc, 0.034, is_baseline=is_baseline)
    if is_baseline:
        decision = Decision(False, True, "baseline: nothing was trained yet")
    elif budget is None:
        decision = Decision(False, None, "no budget")
    else:
        decision = decide(budget, auc, band=figure.band, n_over_before=n_over_before)
    above = auc - 0.5
    result = AuditResult(
        step=int(75 * epoch),
        epoch=float(epoch),
        status="ok",
        is_baseline=is_baseline,
        score="ez",
        n_members=N_MEMBERS,
        n_non_members=N_NON_MEMBERS,
        n_tokens=76_800,
        decision=decision,
        metrics={
            "auc": figure,
            "tpr_at_fpr_0.01": Measurement(
                tpr,
                interval(tpr, 0.03, "order_statistics"),
                None,
                None if is_baseline else "bounds need 876 non-members, got 800",
            ),
            "tpr_at_fpr_0.1": measured(max(0.0, 0.1 + 1.6 * above), 0.06, is_baseline=is_baseline),
            "advantage": measured(max(0.0, 1.45 * above), 0.05, is_baseline=is_baseline),
        },
        auc_by_score={
            "loss_difference": measured(0.5 + 0.72 * above, 0.034, is_baseline=True),
            "wbc": measured(0.5 + 0.96 * above, 0.034, is_baseline=True),
            "calibrated_min_k_plus_plus": measured(0.5 + 0.8 * above, 0.034, is_baseline=True),
            "loss": measured(0.506 + 0.6 * above, 0.034, is_baseline=True),
        },
        auc_by_group={
            name: measured(value, 0.05, is_baseline=True) for name, value in (group_aucs or {}).items()
        },
        member_loss=losses[0],
        non_member_loss=losses[1],
        n_error_tokens=22.0,
        member_edges=EdgeCounts(0, int(90 * above), 1),
        non_member_edges=EdgeCounts(0, int(20 * above), 2),
        seconds=41.7,
        batch_size=16,
    )
    return replace(result, **changes)


def failure(epoch, error="AuditMemoryError: one record alone does not fit"):
    return AuditResult(
        step=int(75 * epoch),
        epoch=float(epoch),
        status="failed",
        is_baseline=False,
        score="ez",
        n_members=N_MEMBERS,
        n_non_members=N_NON_MEMBERS,
        decision=Decision(False, None, "the audit failed: leakage is unknown"),
        error=error,
        seconds=3.2,
    )


def history(*results, budget=BUDGET, **changes):
    run = AuditHistory(results, budget, 0.95, ABOUT, FINDINGS, CAVEAT, RunMetadata.from_dict(FACTS))
    return replace(run, **changes)


def groups(once, often):
    return {"seen once": once, "seen 4 times": often}


def stopped_run():
    """Six epochs, of which the third audit failed and the last one stops the run."""
    low_evidence = Finding(
        "few error tokens",
        True,
        "The median record has 6 wrongly predicted tokens; EZ rests on these alone.",
    )
    return history(
        audit(0, 0.5, (5.194, 5.217), tpr=0.01, group_aucs=groups(0.5, 0.5)),
        audit(1, 0.521, (3.307, 3.516), tpr=0.013, group_aucs=groups(0.521, 0.58)),
        audit(2, 0.548, (2.981, 3.422), tpr=0.022, group_aucs=groups(0.548, 0.66)),
        failure(3),
        audit(4, 0.602, (2.71, 3.418), tpr=0.041, group_aucs=groups(0.602, 0.78)),
        audit(5, 0.637, (2.58, 3.431), tpr=0.063, group_aucs=groups(0.637, 0.85)),
        audit(
            6,
            0.684,
            (2.4712, 3.47),
            tpr=0.0975,
            group_aucs=groups(0.684, 0.93),
            n_error_tokens=6.0,
            findings=(low_evidence,),
        ),
    )


def left_with(run, number):
    """The run, ended, with weights that each audit names; the model holds those of one of them again."""
    results = tuple(
        result if result.status == "failed" else replace(result, weights=f"{i:064x}")
        for i, result in enumerate(run.results)
    )
    return replace(run, results=results, is_complete=True, final_weights=f"{number:064x}")


def lora_run():
    """Six epochs that stay within budget."""
    aucs = (0.5, 0.508, 0.517, 0.522, 0.531, 0.537, 0.541)
    return history(
        *(audit(epoch, auc, (5.2 - 0.3 * epoch, 5.2 - 0.28 * epoch)) for epoch, auc in enumerate(aucs))
    )


def epsilon_run():
    """A run whose members were drawn by coins."""
    bound = EpsilonBound(0.412, 4.6, 200, 0.95, 1e-5, "one_run")
    return history(audit(0, 0.5, (5.2, 5.2)), audit(1, 0.58, (4.9, 5.0), epsilon=bound))


def exposed_records():
    """Two members that stand out, of 61."""
    return ExposedRecords(
        records=(
            ExposedRecord("ticket 17", 0.981, 0.0, 150, 2.0, 4),
            ExposedRecord("ticket 4", 0.912, 0.0013, 450, None, 1),
        ),
        n_exposed=61,
        n_expected=40.5,
        n_members=400,
        n_non_members=800,
        fpr=0.1,
        score="ez",
        step=450,
    )
