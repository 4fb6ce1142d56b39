"""Examples as a user runs them: in processes of their own, on a CPU, without a network."""

import os
import re
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STOPPED = r"Stopped at step \d+\. Restored the weights of step \d+\."


class Example(NamedTuple):
    """What a run must print, as a regular expression, and leave in its output folder."""

    says: str
    leaves: tuple[str, ...]


def make_base_model(folder: Path) -> Path:
    """The base model of the examples; it takes some seconds."""
    spec = spec_from_file_location("examples_common", EXAMPLES / "common.py")
    common = module_from_spec(spec)
    spec.loader.exec_module(common)
    return Path(common.small_base_model(folder))


def run(command, *, cwd=EXAMPLES, **environment):
    fixed = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | fixed | environment,
        cwd=cwd,
    )


def assert_went_well(outcome, example: Example, output_dir: Path) -> None:
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    # Processes that Ray runs beside the workers tell of waits that were too short for them, and wait again.
    told = "\n".join(line for line in outcome.stderr.splitlines() if "(TrainController " not in line)
    assert "Traceback" not in told, told
    assert "FAILED" not in outcome.stdout + told
    assert re.search(example.says, outcome.stdout), outcome.stdout[-2000:]
    for name in example.leaves:
        (found,) = output_dir.glob(name)
        assert found.stat().st_size > 0
    assert list(output_dir.rglob("last_within_budget*")) == []


def with_path(*folders: Path) -> str:
    """The module path of a process that looks in these folders first."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))
