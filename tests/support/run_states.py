"""States of a run, made of plain values."""

from dataclasses import replace

import numpy as np

from ezmia_callbacks import AuditHistory, AuditResult, LeakageBudget, hold_out_canaries
from ezmia_callbacks.audit.judge import Judge
from ezmia_callbacks.audit.run_state import RunState
from ezmia_callbacks.functional.budget import decide_by_strongest
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.measuring.analysis_units import AnalysisUnits
from ezmia_callbacks.measuring.subset import CanarySubset
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import Finding, Measurement
from ezmia_callbacks.scoring.rows import encode_canaries
from ezmia_callbacks.scoring.statistics import TokenStatistics

BUDGET = LeakageBudget(limit=0.6)
JUDGE = Judge(BUDGET, BUDGET.confidence, 4)
CHECK = Finding("length", False, "shows no difference")


def fresh(*, chooses_subset=False, command="first.py", seed=0):
    rows = [{"input_ids": [i % 50 + 3, i // 50 + 3, 5, 7]} for i in range(200)]
    canaries = hold_out_canaries(rows, n_members=20, n_non_members=40, seed=seed)[1]
    encoded = encode_canaries(canaries)
    history = AuditHistory((), BUDGET, run_metadata=RunMetadata(command=command, score="ez"))
    return RunState.before_training(
        CanarySubset(encoded, AnalysisUnits(canaries)),
        history,
        fingerprint=f"{encoded.fingerprint}-auto",
        score_names=["ez"],
        chooses_subset=chooses_subset,
    )


def statistics(n_records):
    values = -np.arange(1, 3 * n_records + 1, dtype=np.float32)
    offsets = np.arange(0, 3 * n_records + 1, 3, dtype=np.int64)
    return TokenStatistics(values, values < -9, values, -values, offsets)


def result(state, step):
    n = len(state.subset.encoded.rows)
    scores = np.random.default_rng(step).normal(size=n)
    auc = Measurement(0.5, band=Interval(0.4, 0.55, 0.95, "delong"))
    decision = decide_by_strongest(BUDGET, {"": auc.to_judge()}, n_over_before=0)
    share = state.subset.share
    given = {"share": share, "scores": scores, "step_scores": scores + step, "metrics": {"auc": auc}}
    return AuditResult(step, step / 10, "ok", step == 0, "ez", 20, 40, decision, **given)


def at_audit(state, step):
    """Statistics of the model at an audit."""
    return replace(state.reference_of_subset, means=state.reference_of_subset.means - step)


def with_audit(state, step):
    return state.with_result(result(state, step), at_audit(state, step))


def begun(**options):
    state = replace(fresh(**options), reference=statistics(60)).with_checks([CHECK], caveat="beware")
    return with_audit(state, 0)


def run_to(step, state=None):
    state = state or begun()
    for at in range(10, step + 1, 10):
        state = with_audit(state, at)
    return state


def assert_carries_the_same(state, expected):
    assert state.history.to_dicts() == expected.history.to_dicts()
    assert (state.history.findings, state.history.caveat) == ((CHECK,), "beware")
    np.testing.assert_array_equal(state.reference.log_probs, expected.reference.log_probs)
    np.testing.assert_equal(state.trajectories.scores, expected.trajectories.scores)
    np.testing.assert_equal(state.trajectories.step_scores, expected.trajectories.step_scores)
    assert state.trajectories.record_ids == expected.trajectories.record_ids
    assert state.subset.share == expected.subset.share
