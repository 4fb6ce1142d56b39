"""`benchmarks/load.py` measures what it says: at sizes that take no time."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load_script():
    spec = spec_from_file_location("load", ROOT / "benchmarks" / "load.py")
    module = module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["load"] = module
    spec.loader.exec_module(module)
    return module


LOAD = load_script()
# What the checks of a split need most of their time for does not depend on its size.
PARTS = [
    pytest.param(part, id=part.name, marks=[pytest.mark.slow] if "checks" in part.name else [])
    for part in LOAD.PARTS
]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs(part, tmp_path, monkeypatch):
    monkeypatch.setattr(LOAD, "N_MORE", 2)
    # The command line reads them.
    monkeypatch.setattr(sys, "argv", ["ezmia"])
    size = {"canaries": 60, "audits": 12}.get(part.unit, 2)

    part.prepare(size, 0, tmp_path)()


def test_a_history_is_one_that_a_run_could_have_written(tmp_path):
    history = LOAD.make_history(40, 0, n_failed_of_ten=3)

    history.save(tmp_path / "history.jsonl")

    loaded = LOAD.load_history(40, 0, tmp_path)()
    assert len(loaded) == 40
    assert history.n_failed == 12
    assert {result.decision.is_within_budget for result in history} == {True, False, None}


def test_an_audit_more_is_a_whole_one():
    state, next_audit = LOAD._run_of(3, 0)

    longer = next_audit(state)

    assert len(longer.history) == 4
    assert longer.trajectories.n_audits == 4
    assert longer.history[-1].n_checkpoints == 3
