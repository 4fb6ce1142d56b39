import json
import logging
import sys

import pytest

from ezmia_callbacks.cli.terminal import (
    ExitCode,
    fail,
    messages_on_standard_error,
    quiet_libraries,
    say,
    say_json,
    say_table,
    show_progress,
)


def test_results_go_to_standard_output_and_are_never_wrapped_in_a_pipe(capsys):
    say(" ".join(["word"] * 200))
    say_table(("a", "b"), [("x" * 300, "[bold]y[/bold]")])

    out, err = capsys.readouterr()
    assert err == ""
    paragraph, head, _, row = out.splitlines()
    assert paragraph == " ".join(["word"] * 200)
    assert head.split() == ["a", "b"]
    assert row.split() == ["x" * 300, "[bold]y[/bold]"]


def test_json_is_one_object_without_numbers_that_json_lacks(capsys):
    say_json({"value": 0.5, "text": "[a]"})
    assert json.loads(capsys.readouterr().out) == {"value": 0.5, "text": "[a]"}

    with pytest.raises(ValueError, match="not JSON compliant"):
        say_json({"value": float("nan")})


def test_a_failure_is_one_line_on_standard_error(capsys):
    code = fail("two\nlines", ExitCode.BAD_INPUT)

    assert code == 2
    assert capsys.readouterr() == ("", "ezmia: two lines\n")


def test_warnings_of_the_package_are_one_line_each_and_information_is_left_out(capsys):
    logger = logging.getLogger("ezmia_callbacks.some_module")

    with messages_on_standard_error():
        logger.info("not told")
        logger.warning("told\nin one %s", "line")
    logger.warning("not told any more")

    assert capsys.readouterr().err.splitlines() == ["ezmia: warning: told in one line"]


def test_libraries_are_as_talkative_afterwards_as_before():
    from transformers.utils import logging as library

    before = library.get_verbosity(), library.is_progress_bar_enabled()

    with quiet_libraries():
        assert library.get_verbosity() == logging.ERROR
        assert not library.is_progress_bar_enabled()

    assert (library.get_verbosity(), library.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_are_shown_to_a_person_only(is_terminal, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)

    assert show_progress() is is_terminal
