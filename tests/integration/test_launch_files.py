"""Every file of `examples/launch` is launched as it says itself, in two processes on a CPU.

Changed is the environment alone. A stand-in takes the place of SLURM. Accelerate's launcher is asked for two
processes instead of eight, and its processes import what has sharded engines run without a GPU
(`engine_runs.py`, for DeepSpeed also `deepspeed_bodies.py`). `make test-engines` runs all of it.
"""

import json
import os
import re
import shlex
import shutil
import socket
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from launched import EXAMPLES, ROOT, STOPPED, Example, assert_went_well, make_base_model, run, with_path
from packaging.version import Version

LAUNCH = EXAMPLES / "launch"
SUPPORT = ROOT / "tests" / "support"
TRAINED = ("run/_privacy_audit/history.jsonl", "final/model.safetensors")
ON_THIS_MACHINE = {"GLOO_SOCKET_IFNAME": "lo", "USE_LIBUV": "0", "PYTHON": sys.executable}
ENGINES_ON_CPU = """
import os

if "LOCAL_RANK" in os.environ:
    from {module} import {function}

    {function}()
"""
SRUN = """#!/usr/bin/env bash
for node in 0 1; do
    SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" &
done
wait -n && wait -n
"""


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return make_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def output_dir(base_model, tmp_path):
    shutil.copytree(base_model, tmp_path / "out" / "base_model")
    return tmp_path / "out"


def commands_in(path: Path) -> list[list[str]]:
    """The commands of a file's first comment, which are indented there."""
    comment = path.read_text(encoding="utf-8").partition("\ncompute_environment:")[0]
    lines = re.sub(r"\\\n#", "", comment).splitlines()
    return [shlex.split(line[1:]) for line in lines if line.startswith("#   ")]


def launch_by_accelerate(name, output_dir, *, module, function):
    *_, command = commands_in(LAUNCH / f"{name}.yaml")
    assert command[:2] == ["accelerate", "launch"]
    assert command[-2] == "--output-dir"
    site = output_dir.parent / "site"
    site.mkdir()
    text = ENGINES_ON_CPU.format(module=module, function=function)
    # Each process of Python imports this by itself.
    (site / "sitecustomize.py").write_text(text, encoding="utf-8")
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    return run(
        [*launcher, *command[2:-1], output_dir],
        cwd=ROOT,
        PYTHONPATH=with_path(site, SUPPORT),
        **ON_THIS_MACHINE,
    )


def test_two_processes_run_under_torchrun_and_one_of_them_speaks(output_dir):
    outcome = run(["bash", LAUNCH / "torchrun.sh", "2", output_dir], **ON_THIS_MACHINE)

    assert_went_well(outcome, Example(STOPPED, TRAINED), output_dir)
    assert outcome.stdout.count("Leakage curve:") == 1
    header, baseline, *_ = (output_dir / "run/_privacy_audit/history.jsonl").read_text().splitlines()
    assert json.loads(header)["budget"]["limit"] == 0.7
    assert json.loads(baseline)["is_baseline"]


@pytest.mark.slow
def test_two_nodes_of_lightning_stop_together(output_dir, tmp_path):
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN, encoding="utf-8")
    srun.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_slurm = {
        "MASTER_PORT": str(port),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "ezmia-lightning",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }

    outcome = run(
        # What `sbatch` does with the file.
        ["bash", LAUNCH / "lightning_multi_node.sh"],
        cwd=tmp_path,
        PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        OUTPUT_DIR=str(output_dir),
        **of_slurm,
        **ON_THIS_MACHINE,
    )

    leaves = ("_privacy_audit/history.jsonl", "final.ckpt")
    assert_went_well(outcome, Example(STOPPED, leaves), output_dir)
    assert "Starting with 2 processes" in outcome.stdout + outcome.stderr
    assert outcome.stdout.count("Leakage curve:") == 1


@pytest.mark.slow
def test_the_file_for_fsdp_shards_stops_and_leaves_a_model(output_dir):
    outcome = launch_by_accelerate(
        "accelerate_fsdp", output_dir, module="engine_runs", function="run_engines_on_cpu"
    )

    # Accelerate alone makes plain data parallelism of it on a CPU, whose checkpoints have no such file.
    sharded = ("run/checkpoint-*/pytorch_model_fsdp.bin",)
    assert_went_well(outcome, Example(STOPPED, (*TRAINED, *sharded)), output_dir)
    assert outcome.stdout.count("Leakage curve:") == 1


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed, which `make test-engines` brings along"
)
def test_the_file_for_deepspeed_stops_and_leaves_a_model(output_dir):
    outcome = launch_by_accelerate(
        "accelerate_deepspeed_zero2", output_dir, module="deepspeed_bodies", function="run_on_cpu"
    )

    of_zero_2 = (
        "run/checkpoint-*/global_step*/zero_pp_rank_0_*_optim_states.pt",
        "run/checkpoint-*/global_step*/zero_pp_rank_1_*_optim_states.pt",
    )
    assert_went_well(outcome, Example(STOPPED, (*TRAINED, *of_zero_2)), output_dir)
    assert outcome.stdout.count("Leakage curve:") == 1


@pytest.mark.parametrize("name", ["accelerate_fsdp", "accelerate_deepspeed_zero2"])
def test_a_launch_file_holds_only_what_accelerate_knows(name):
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    known = {action.dest for action in launch_command_parser()._actions}

    settings = {**config.fsdp_config, **config.deepspeed_config}
    # FSDP2 came with accelerate 1.6, and the file asks for that.
    is_older = name == "accelerate_fsdp" and Version(version("accelerate")) < Version("1.6")
    # The launcher's arguments are named as the file's fields.
    assert settings
    assert set(settings) - known == ({"fsdp_version", "fsdp_reshard_after_forward"} if is_older else set())
