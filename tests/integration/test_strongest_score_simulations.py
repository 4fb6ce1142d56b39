"""Several scores judged together, held against runs whose true leakage is exactly at the limit.

The runs are those of `benchmarks/strongest_score.py`, whose tables `docs/statistics.md` quotes.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def runs():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("strongest_score", BENCHMARKS / "strongest_score.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.parametrize("name", ["all at the limit", "one at the limit, the others at chance"])
def test_the_package_decides_as_the_formulas_of_the_benchmark_do(name, runs, monkeypatch):
    """Shares that are not divided among the scores, or divided where rule "upper" needs none, differ."""
    monkeypatch.setattr(runs, "N_COMPARED", 60)

    runs.run_case(runs.Case(100, 100, 3, 0.0, runs.AT_LIMIT[name]), n_runs=60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("name", ["all at the limit", "one at the limit, the others at chance"])
def test_many_runs_at_the_limit_keep_both_promises(name, correlation, runs):
    n_runs = 2000
    case = runs.Case(300, 300, 3, correlation, runs.AT_LIMIT[name])

    rates = runs.run_case(case, n_runs=n_runs, seed=2)

    # Each rule reads one end, to which half of the 5 % go.
    most = 0.025 + 3.0 * math.sqrt(0.025 * 0.975 / n_runs)
    assert rates["together"][1] <= most
    assert rates["within"][1] <= most


def test_the_tables_in_the_docs_are_those_of_the_benchmark(runs):
    content = json.loads(runs.RESULTS.read_text())
    document = runs.DOCUMENT.read_text()
    n_runs = int(content["command"].split("--runs ")[1].split()[0])
    powers = [
        {**row, "needed": {int(n): count for n, count in row["needed"].items()}} for row in content["powers"]
    ]

    for text in runs.tables(content["stops"], powers, content["gains"], n_runs).values():
        assert text in document


def test_the_numbers_of_canaries_in_the_tables_are_those_of_the_planner(runs):
    for row in json.loads(runs.RESULTS.read_text())["powers"]:
        for n_scores, n in row["needed"].items():
            plan = runs.canaries_needed(
                runs.LOWER, n_audits=row["n_audits"], expected=row["truth"], n_scores=int(n_scores)
            )
            assert plan.n_members == n
