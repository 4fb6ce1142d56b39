"""Every example is run as a user runs it: in a process of its own, on a CPU, without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from packaging.version import Version

from ezmia_callbacks.scoring.forward import deal_rows
from ezmia_callbacks.scoring.rows import TokenRow

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STOPPED = r"Stopped at step \d+\. Restored the weights of step \d+\."


class Example(NamedTuple):
    """What a run must print, as a regular expression, and leave in its output folder."""

    says: str
    leaves: tuple[str, ...]


SCRIPTS = {
    "huggingface_trainer": Example(STOPPED, ("run/_privacy_audit/history.jsonl", "final/config.json")),
    "trl_sft_lora_chat": Example(
        STOPPED, ("run/_privacy_audit/history.jsonl", "final/adapter_model.safetensors")
    ),
    "lightning_module": Example(STOPPED, ("_privacy_audit/history.jsonl", "final.ckpt")),
    "accelerate_loop": Example(
        r"(?s)Interrupted after epoch 1.*" + STOPPED,
        ("_privacy_audit/history.jsonl", "state/custom_checkpoint_0.pkl", "final/config.json"),
    ),
    "plain_pytorch_loop": Example(STOPPED, ("_privacy_audit/history.jsonl", "final/config.json")),
    "fabric_loop": Example(STOPPED, ("_privacy_audit/history.jsonl", "final.ckpt")),
    "audit_checkpoints": Example(
        r"Last checkpoint within the budget: (none|checkpoint-\d+)",
        ("_privacy_audit/history.jsonl", "run/checkpoint-10/config.json"),
    ),
    "compare_lora_ranks": Example(
        r"(?s)LoRA rank 1 .*LoRA rank 8 .*LoRA rank 64 .*stopped at epoch", ("ranks.png", "summary.md")
    ),
}


def missing_for(name):
    """The package without which an example cannot run here; None if it can."""
    if name in ("lightning_module", "fabric_loop"):
        return None if find_spec("lightning") else "lightning"
    if name == "trl_sft_lora_chat":
        trl = find_spec("trl")
        has_option = trl and "assistant_only_loss" in (
            Path(trl.origin).parent / "trainer" / "sft_config.py"
        ).read_text(encoding="utf-8")
        return None if has_option else "a TRL with `assistant_only_loss`"
    return None


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """The base model, made once for all examples that one process runs."""
    spec = spec_from_file_location("examples_common", EXAMPLES / "common.py")
    common = module_from_spec(spec)
    spec.loader.exec_module(common)
    return Path(common.small_base_model(tmp_path_factory.mktemp("base")))


def run(command, **environment):
    fixed = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | fixed | environment,
        cwd=EXAMPLES,
    )


def assert_went_well(outcome, example, output_dir):
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "Traceback" not in outcome.stderr
    assert "FAILED" not in outcome.stdout + outcome.stderr
    assert re.search(example.says, outcome.stdout), outcome.stdout[-2000:]
    for name in example.leaves:
        assert (output_dir / name).stat().st_size > 0
    assert list(output_dir.rglob("last_within_budget*")) == []


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "huggingface_trainer"])
def test_an_example_runs_and_says_what_came_of_it(name, base_model, tmp_path):
    if missing := missing_for(name):
        pytest.skip(f"{missing} is not installed here")
    shutil.copytree(base_model, tmp_path / "base_model")

    outcome = run([sys.executable, EXAMPLES / f"{name}.py", "--output-dir", tmp_path])

    assert_went_well(outcome, SCRIPTS[name], tmp_path)


def test_an_example_needs_no_arguments(tmp_path):
    outcome = run([sys.executable, EXAMPLES / "huggingface_trainer.py"], TMPDIR=str(tmp_path))

    (output_dir,) = tmp_path.glob("ezmia-example-*")
    assert_went_well(outcome, SCRIPTS["huggingface_trainer"], output_dir)


def test_two_processes_run_under_torchrun_and_one_of_them_speaks(tmp_path):
    launcher = EXAMPLES / "launch" / "torchrun.sh"

    outcome = run(
        ["bash", launcher, "2", tmp_path], PYTHON=sys.executable, GLOO_SOCKET_IFNAME="lo", USE_LIBUV="0"
    )

    assert_went_well(outcome, SCRIPTS["huggingface_trainer"], tmp_path)
    assert outcome.stdout.count("Leakage curve:") == 1
    header, baseline, *_ = (tmp_path / "run" / "_privacy_audit" / "history.jsonl").read_text().splitlines()
    assert json.loads(header)["budget"]["limit"] == 0.7
    assert json.loads(baseline)["is_baseline"]


def test_the_notebook_runs_from_top_to_bottom_and_holds_no_outputs(tmp_path):
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # Cell by cell in one namespace, as a kernel does; it uses nothing that only a kernel has.
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code), encoding="utf-8")

    outcome = run([sys.executable, script], TMPDIR=str(tmp_path), PYTHONPATH=with_path(EXAMPLES))

    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    (output_dir,) = tmp_path.glob("ezmia-quickstart-*")
    leaves = ("leakage.png", "summary.md", "run/_privacy_audit/history.jsonl")
    assert_went_well(outcome, Example(STOPPED, leaves), output_dir)


def with_path(folder):
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def test_every_example_is_run_and_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}

    assert names == set(SCRIPTS)
    assert all(
        f"({path.name})" in listed for path in EXAMPLES.iterdir() if path.stem in {*names, "quickstart"}
    )


@pytest.mark.parametrize("name", ["accelerate_fsdp", "accelerate_deepspeed_zero2"])
def test_a_launch_file_holds_only_what_accelerate_knows(name):
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(EXAMPLES / "launch" / f"{name}.yaml"))
    known = {action.dest for action in launch_command_parser()._actions}

    settings = {**config.fsdp_config, **config.deepspeed_config}
    # FSDP2 came with accelerate 1.6, and the file asks for that.
    is_older = name == "accelerate_fsdp" and Version(version("accelerate")) < Version("1.6")
    # The launcher's arguments are named as the file's fields.
    assert settings
    assert set(settings) - known == ({"fsdp_version", "fsdp_reshard_after_forward"} if is_older else set())


@pytest.mark.parametrize("name", ["torchrun", "lightning_multi_node"])
def test_a_launch_script_is_valid_bash(name):
    assert run(["bash", "-n", EXAMPLES / "launch" / f"{name}.sh"]).returncode == 0


def test_the_page_on_scaling_quotes_what_its_script_prints():
    printed = run([sys.executable, ROOT / "benchmarks" / "cost_model.py"]).stdout

    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    tables = printed.strip().split("\n\n")
    assert len(tables) == 3
    assert all(table in page for table in tables)


@pytest.mark.parametrize(("n_canaries", "n_processes"), [(1_000, 8), (1_000, 64), (95, 2), (10_000, 64)])
def test_the_cost_model_counts_the_passes_that_the_audit_makes(n_canaries, n_processes):
    spec = spec_from_file_location("cost_model", ROOT / "benchmarks" / "cost_model.py")
    cost_model = module_from_spec(spec)
    spec.loader.exec_module(cost_model)
    size = cost_model.BATCH_SIZE
    rows = [TokenRow(np.arange(4), np.arange(4))] * n_canaries

    shares = deal_rows(rows, batch_size=size, n_shares=n_processes)

    expected = max(-(-len(share) // size) for share in shares)
    assert cost_model.n_forwards(n_canaries, n_processes=n_processes) == expected
