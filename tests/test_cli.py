import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ezmia_callbacks import cli
from ezmia_callbacks.errors import ConfigurationError


def ezmia(*arguments):
    code = "from ezmia_callbacks.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_demo_gets_what_the_command_line_says(monkeypatch):
    from ezmia_callbacks.demo import run

    seen = []
    monkeypatch.setattr(run, "run_demo", seen.append)

    outcome = CliRunner().invoke(
        cli.app,
        ["demo", "--model", "m", "--data", "d.txt", "--output", "o", "--limit", "0.8", "--epochs", "2"],
    )

    assert outcome.exit_code == 0, outcome.output
    assert (seen[0].model, seen[0].data, seen[0].output_dir) == ("m", Path("d.txt"), Path("o"))
    assert (seen[0].limit, seen[0].n_epochs) == (0.8, 2)


def test_the_defaults_of_the_command_are_those_of_the_settings(monkeypatch):
    from ezmia_callbacks.demo import run

    seen = []
    monkeypatch.setattr(run, "run_demo", seen.append)

    CliRunner().invoke(cli.app, ["demo"])

    assert seen == [run.DemoSettings()]


def test_an_error_of_ours_is_one_line_and_exit_code_two(monkeypatch, capsys):
    def fail():
        raise ConfigurationError("the limit is odd.")

    monkeypatch.setattr(cli, "app", fail)

    with pytest.raises(SystemExit) as caught:
        cli.main()

    assert caught.value.code == 2
    assert capsys.readouterr().err == "ezmia: the limit is odd.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--limit", "0.2"], "strictly between 0.5 (chance) and 1, got 0.2"),
        (["demo", "--data", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_bad_input_ends_in_one_line_without_a_traceback(arguments, message):
    outcome = ezmia(*arguments)

    assert outcome.returncode == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
