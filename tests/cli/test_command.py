import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ezmia, run_main
from typer.testing import CliRunner

from ezmia_callbacks import __version__
from ezmia_callbacks.cli import command
from ezmia_callbacks.errors import ConfigurationError, NonFiniteLogitsError
from ezmia_callbacks.scoring import SCORES

COMMANDS = ("demo", "doctor", "plan", "split", "audit", "report", "compare")


def test_the_demo_gets_what_the_command_line_says(monkeypatch):
    from ezmia_callbacks.demo import run

    seen = []
    monkeypatch.setattr(run, "run_demo", seen.append)

    outcome = CliRunner().invoke(
        command.app,
        ["demo", "--model", "m", "--data", "d.txt", "--output", "o", "--limit", "0.8", "--epochs", "2"],
    )

    assert outcome.exit_code == 0, outcome.output
    assert (seen[0].model, seen[0].data, seen[0].output_dir) == ("m", Path("d.txt"), Path("o"))
    assert (seen[0].limit, seen[0].n_epochs) == (0.8, 2)


def test_the_defaults_of_the_command_are_those_of_the_settings(monkeypatch):
    from ezmia_callbacks.demo import run

    seen = []
    monkeypatch.setattr(run, "run_demo", seen.append)

    CliRunner().invoke(command.app, ["demo"])

    assert seen == [run.DemoSettings()]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("the limit\nis odd."), 2),
        (OSError("the limit is odd."), 2),
        (NonFiniteLogitsError("the limit is odd."), 3),
    ],
)
def test_an_error_of_ours_is_one_line_and_an_exit_code(error, code, monkeypatch):
    def fail(**options):
        raise error

    monkeypatch.setattr(command, "app", fail)

    assert run_main(monkeypatch) == (code, "", "ezmia: the limit is odd.\n")


def test_a_crash_is_never_taken_for_a_model_over_budget(monkeypatch):
    def fail(**options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(command, "app", fail)

    code, _, err = run_main(monkeypatch)
    assert code == 3
    assert "ZeroDivisionError in tests.cli.test_command.fail, line" in err
    assert "please report it" in err


SECRET = "My number is 42"


@pytest.mark.parametrize("is_own", [False, True])
@pytest.mark.parametrize("is_debugged", [False, True])
def test_what_an_error_says_of_records_is_shown_only_if_it_is_asked_for(is_own, is_debugged, monkeypatch):
    def quoting():
        return json.loads(f'"{SECRET}"')

    def fail(data, **options):
        try:
            raise KeyError(quoting())
        except KeyError as error:
            if is_own:
                raise ConfigurationError("The records cannot be read.") from error
            raise

    monkeypatch.setattr("ezmia_callbacks.cli.split.read_record_file", fail)
    options = ["--debug"] if is_debugged else []

    code, out, err = run_main(monkeypatch, *options, "split", "x.csv", "--coins", 60, "-o", "out")

    assert (code, out) == (2 if is_own else 3, "")
    assert (f"KeyError: '{SECRET}'" in err) == is_debugged
    assert (SECRET in err) == is_debugged
    if is_own:
        assert err.splitlines()[-1] == "ezmia: The records cannot be read."
    else:
        assert "KeyError in tests.cli.test_command.fail, line" in err
    assert not logging.getLogger("ezmia_callbacks").isEnabledFor(logging.DEBUG)


def test_an_interrupt_is_never_taken_for_a_model_over_budget(monkeypatch):
    def fail(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "app", fail)

    assert run_main(monkeypatch) == (130, "", "ezmia: interrupted.\n")


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


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["plan", "--nonsense"], ["split"], ["audit", "--fpr", "x"]]
)
def test_wrong_usage_shows_the_usage_and_one_line(arguments, monkeypatch):
    code, out, err = run_main(monkeypatch, *arguments)

    assert (code, out) == (2, "")
    assert err.startswith("Usage: ezmia")
    assert len([line for line in err.splitlines() if line.startswith("Error: ")]) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_offers_json(name):
    outcome = CliRunner().invoke(command.app, [name, "--help"], env={"COLUMNS": "200"})

    assert outcome.exit_code == 0
    assert "--json" in outcome.output
    # The blank help of an undocumented option would be a row without words.
    assert len(outcome.output) > 500


@pytest.mark.parametrize("name", ["audit", "plan"])
def test_the_help_lists_every_score(name):
    output = CliRunner().invoke(command.app, [name, "--help"], env={"COLUMNS": "300"}).output

    listed = set(re.findall(r"[a-z_]+", output[output.index("--score") :]))
    assert {"strongest", *SCORES} <= listed


def test_what_the_system_says_comes_with_the_file_and_without_a_number(monkeypatch):
    def fail(**options):
        Path("/dev/null/x").mkdir()

    monkeypatch.setattr(command, "app", fail)

    assert run_main(monkeypatch) == (2, "", "ezmia: '/dev/null/x': Not a directory.\n")


def test_the_commands_are_listed_and_the_version_is_told():
    assert all(name in CliRunner().invoke(command.app, ["--help"]).output for name in COMMANDS)
    assert CliRunner().invoke(command.app, ["--version"]).output == f"ezmia {__version__}\n"


def test_help_loads_no_framework():
    code = (
        "import sys\nfrom ezmia_callbacks.cli import command\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )

    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert outcome.stdout == "[]\n"


def test_a_module_that_is_run_answers_like_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "ezmia_callbacks.cli.command", "plan", "--no-such-option"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "no-such-option" in done.stderr
