"""The command `ezmia`, in a process of its own and in this one."""

import contextlib
import io
import json
import subprocess
import sys

import pytest

from ezmia_callbacks.cli import command


def ezmia(*arguments):
    code = "from ezmia_callbacks.cli.command import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def run_main(monkeypatch, *arguments):
    """Exit code, standard output and standard error of the command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["ezmia", *map(str, arguments)])
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        command.main()
    return caught.value.code, out.getvalue(), err.getvalue()


def refusal(outcome):
    """The one line on standard error with which the command refused its input, and did nothing else."""
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.startswith("ezmia: ")
    assert err.count("\n") == 1, err
    return err


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
