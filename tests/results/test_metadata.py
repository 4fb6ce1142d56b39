import sys

import pytest

from ezmia_callbacks.results.metadata import run_facts


def test_the_versions_that_matter_are_there():
    facts = run_facts()

    assert facts["torch"].startswith("2.")
    assert {"started", "python", "machine", "command", "numpy"} <= facts.keys()
    assert all(isinstance(value, str) for value in facts.values())


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--lr", "1e-4"], "train.py --lr 1e-4"),
        (["--hub_token", "hf_abc"], "train.py --hub_token ***"),
        (["--hub-token=hf_abc"], "train.py --hub-token=***"),
        (["--api_key", "k", "--lr", "1"], "train.py --api_key *** --lr 1"),
        (["WANDB_API_KEY=k"], "train.py WANDB_API_KEY=***"),
        (["keys.json", "x"], "train.py keys.json x"),
    ],
)
def test_the_command_is_shown_without_its_secrets(monkeypatch, arguments, shown):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])

    assert run_facts()["command"] == shown
