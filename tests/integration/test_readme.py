"""The script on the README's first screen runs as it stands there, and prints what stands below it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

README = Path(__file__).parents[2] / "README.md"


def blocks():
    """The first script of the README, and what it says that is printed."""
    return re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", README.read_text("utf-8"), re.DOTALL
    ).groups()


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "script.py").write_text(blocks()[0], "utf-8")
    outcome = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=400, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert (folder / "run" / "_privacy_audit" / "history.jsonl").is_file()
    return f"{outcome.stdout}\n{outcome.stderr}"


def without_numbers(text):
    return re.sub(r"[0-9.]+", "#", text)


def test_the_script_is_short():
    lines = [line for line in blocks()[0].splitlines() if line and not line.startswith(("from", "import"))]

    assert len(lines) <= 15


def test_the_script_runs_and_says_what_it_finds(printed):
    assert "Held out of training: " in printed
    assert re.search(r"within budget: AUC 0\.\d+ \[0\.\d+, 0\.\d+\], .*; audit at step \d+", printed)


# Other releases have other documentation, and shuffle otherwise: the figures are others.
needs_the_same_records = pytest.mark.skipif(transformers.__version__ < "5", reason="older releases")


@needs_the_same_records
def test_the_script_stops_and_says_so(printed):
    assert "Held out of training: 142 of 1423 rows" in printed
    assert re.search(r"over budget, STOP: AUC 0\.\d+ \[0\.\d+, 0\.\d+\], .*; audit at step \d+", printed)
    assert "Restored the weights of step" in printed


@needs_the_same_records
def test_every_line_that_is_shown_is_printed(printed):
    said = without_numbers(printed)

    assert [line for line in blocks()[1].splitlines() if without_numbers(line) not in said] == []
