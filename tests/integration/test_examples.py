"""Every example is run as a user runs it: in a process of its own, on a CPU, without a network."""

import json
import shutil
import sys
import tempfile
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from launched import EXAMPLES, ROOT, STOPPED, Example, assert_went_well, make_base_model, run, with_path

from ezmia_callbacks.scoring.forward import deal_rows
from ezmia_callbacks.scoring.rows import TokenRow

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
    "ray_train": Example(
        f"(?s){STOPPED}.*" + r"Ray's last checkpoint: step \d+, AUC 0\.\d+, within budget",
        ("run/_privacy_audit/history.jsonl", "final/model.safetensors"),
    ),
    "ray_tune": Example(
        r"(?s)within budget\n.*over budget\nBest within the budget: learning rate 0\.\d+",
        ("trial_*_00000/_privacy_audit/history.jsonl", "trial_*_00000/model.safetensors"),
    ),
}


def missing_for(name):
    """The package without which an example cannot run here; None if it can."""
    if name in ("lightning_module", "fabric_loop"):
        return None if find_spec("lightning") else "lightning"
    if name.startswith("ray_"):
        return None if find_spec("ray") else "Ray, which `make test-engines` brings along,"
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
    return make_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def of_ray(tmp_path):
    """What keeps Ray to this test's folders; the paths of its sockets have to be short."""
    with tempfile.TemporaryDirectory(prefix="ray-") as short:
        yield {"HOME": str(tmp_path), "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "huggingface_trainer"])
def test_an_example_runs_and_says_what_came_of_it(name, base_model, tmp_path, of_ray):
    if missing := missing_for(name):
        pytest.skip(f"{missing} is not installed here")
    shutil.copytree(base_model, tmp_path / "base_model")

    environment = of_ray if name.startswith("ray_") else {}
    outcome = run([sys.executable, EXAMPLES / f"{name}.py", "--output-dir", tmp_path], **environment)

    assert_went_well(outcome, SCRIPTS[name], tmp_path)


def test_an_example_needs_no_arguments(tmp_path):
    outcome = run([sys.executable, EXAMPLES / "huggingface_trainer.py"], TMPDIR=str(tmp_path))

    (output_dir,) = tmp_path.glob("ezmia-example-*")
    assert_went_well(outcome, SCRIPTS["huggingface_trainer"], output_dir)


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


def test_every_example_is_run_and_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}

    assert names == set(SCRIPTS)
    assert all(
        f"({path.name})" in listed for path in EXAMPLES.iterdir() if path.stem in {*names, "quickstart"}
    )


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
