"""What processes do agrees with the arithmetic of `benchmarks/cost_model.py`."""

import importlib.util
from pathlib import Path

import distributed_bodies as bodies
import pytest
from processes import run_processes
from tiny import make_model

ROOT = Path(__file__).parents[2]
N_PARAMETERS = sum(parameter.numel() for parameter in make_model().parameters())


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("cost_model", ROOT / "benchmarks" / "cost_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    counted = (bodies.count_passes_and_bytes, bodies.count_bytes_under_a_mixed_policy)
    return run_processes(counted, 2, tmp_path_factory.mktemp("counted"))


def test_each_process_makes_as_many_passes_as_it_says(model, outcomes):
    n = model.n_forwards(bodies.N_MEMBERS + bodies.N_NON_MEMBERS, n_processes=2)

    # And one of a few records, by which weights that are kept are known again.
    assert [outcome["n_forwards"] for outcome in outcomes["count_passes_and_bytes"]] == [n + 1, n + 1]


def test_statistics_take_as_many_bytes_as_it_says(model, outcomes):
    for outcome in outcomes["count_passes_and_bytes"]:
        of_tokens = model.BYTES_PER_TOKEN * outcome["n_tokens"]
        assert outcome["bytes_of_statistics"] == of_tokens + 8 * (outcome["n_records"] + 1)


@pytest.mark.parametrize(
    ("body", "n_shards"), [("count_passes_and_bytes", 1), ("count_bytes_under_a_mixed_policy", 2)]
)
def test_kept_weights_take_as_many_bytes_as_it_says(model, outcomes, body, n_shards):
    """Under a policy that computes in bfloat16 as many as without."""
    said = model.bytes_of_kept_weights(N_PARAMETERS, held_in="float32, or a mixed policy", n_shards=n_shards)

    sizes = [outcome["bytes_of_kept_weights"] for outcome in outcomes[body]]
    assert sizes == [said] * n_shards + [0] * (2 - n_shards)
