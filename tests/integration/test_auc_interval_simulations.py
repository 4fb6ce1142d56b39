"""The interval of the AUC, held against simulations where classes are small, unequal, or nearly separated.

The grid is that of `benchmarks/auc_interval.py`, whose tables `docs/statistics.md` quotes.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ezmia_callbacks.functional import delong_interval

ROOT = Path(__file__).parents[2]


def load_grid():
    path = ROOT / "benchmarks" / "auc_interval.py"
    spec = importlib.util.spec_from_file_location("auc_interval", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grid = load_grid()


def at_most(promise: float, n_runs: int) -> float:
    """Largest rate that may be seen where the true one is `promise`."""
    return promise + 3.0 * math.sqrt(promise * (1.0 - promise) / n_runs)


def lower_ends(n_members, n_non_members, *, auc, confidence, n_draws, seed):
    """Lower ends from two unit normals."""
    rng = np.random.default_rng(seed)
    is_member = np.arange(n_members + n_non_members) < n_members
    shift = math.sqrt(2.0) * stats.norm.ppf(auc) * is_member
    return np.array(
        [
            delong_interval(rng.normal(size=len(shift)) + shift, is_member, confidence=confidence).lower
            for _ in range(n_draws)
        ]
    )


@pytest.mark.slow
def test_ten_audits_with_few_members_rarely_stop_a_run_at_its_limit():
    n_runs = 2000
    ends = lower_ends(30, 1000, auc=0.8, confidence=0.995, n_draws=10 * n_runs, seed=0)

    is_stopped = (ends.reshape(n_runs, 10) > 0.8).any(axis=1)

    # A rule reads one end, to which half of the 5 % go.
    assert is_stopped.mean() <= at_most(0.025, n_runs)


@pytest.mark.slow
@pytest.mark.parametrize(("n_members", "n_non_members", "auc"), [(30, 1000, 0.8), (100, 100, 0.995)])
def test_the_lower_end_of_one_audit_keeps_its_share(n_members, n_non_members, auc):
    n_draws = 8000
    ends = lower_ends(n_members, n_non_members, auc=auc, confidence=0.95, n_draws=n_draws, seed=1)

    assert np.mean(ends > auc) <= at_most(0.025, n_draws)


@pytest.mark.parametrize("shape", [*grid.SHAPES, *grid.HARD_SHAPES])
def test_the_grid_is_of_the_interval_that_the_package_makes(shape):
    # `run_cell` raises where they disagree.
    rows = grid.cell_rates(12, 40, shape, 0.8, n_draws=200, seed=2)

    assert [row["share"] for row in rows] == list(grid.SHARES)
    assert all(row["width_ratio"] > 0 for row in rows)


@pytest.mark.parametrize("shape", [*grid.SHAPES, *grid.HARD_SHAPES])
def test_the_populations_of_the_grid_have_their_auc(shape):
    draws, first = grid.draw(grid.Cell(20, 30, shape, 0.9), np.random.default_rng(3), 4000)

    # Its standard error is below 0.001 even if all pairs hung on 20 members.
    assert draws.auc.mean() == pytest.approx(0.9, abs=0.005)
    assert first.shape == (grid.N_COMPARED, 50)


def test_a_disagreement_with_the_package_is_an_error(monkeypatch):
    monkeypatch.setattr(
        grid, "delong_interval", lambda scores, is_member, **how: delong_interval(-scores, is_member, **how)
    )

    with pytest.raises(RuntimeError, match="the package says"):
        grid.cell_rates(40, 40, "normal", 0.9, n_draws=20, seed=4)


def test_the_documented_grid_holds_the_promise_and_is_the_recorded_one():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "auc_interval.json").read_text(encoding="utf-8"))
    document = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    rows, n_draws = grid.unpacked(recorded["columns"], recorded["cells"]), recorded["n_draws"]

    assert grid.with_tables(document, grid.tables(rows, n_draws)) == document
    promised = [row for row in rows if row["shape"] in grid.SHAPES]
    assert len(promised) > 1000
    over = [row for row in promised if max(row["misses"]["now"]) > at_most(row["share"], n_draws)]
    assert over == []
    # The interval before did not, or the grid would show nothing.
    assert any(max(row["misses"]["before"]) > 4.0 * row["share"] for row in promised)
