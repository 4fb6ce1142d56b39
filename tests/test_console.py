"""What reaches the console of a script, whatever it has done about logging."""

import io
import logging
import logging.config
import sys

import pytest
from rich.console import Console
from rich.logging import RichHandler
from script_logging import script_logging
from tqdm import tqdm

from ezmia_callbacks import console
from ezmia_callbacks.console import say, write_warnings_above_bars

LOGGER = logging.getLogger("ezmia_callbacks.audit.auditor")
LINE = "within budget: AUC 0.570"


PACKAGE = logging.getLogger("ezmia_callbacks")


def plain_handler(stream=None, level=logging.NOTSET):
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setLevel(level)
    return handler


def test_a_script_that_configured_nothing_gets_the_line_once_above_its_bar(capsys):
    with script_logging():
        with tqdm(total=2, file=sys.stderr) as bar:
            say(LOGGER, LINE)
            say(LOGGER, "over budget, STOP", level=logging.WARNING)
            bar.update()

        out, err = capsys.readouterr()
        assert out == f"{LINE}\nover budget, STOP\n"
        assert LINE not in err
        assert "STOP" not in err


@pytest.mark.parametrize(
    ("level", "expected_out", "expected_err"),
    [("WARNING", f"{LINE}\n", ""), ("INFO", "", f"{LINE}\n")],
)
def test_the_users_handler_shows_the_line_or_it_is_printed_and_never_both(
    capsys, level, expected_out, expected_err
):
    with script_logging() as root:
        root.setLevel(level)
        root.addHandler(plain_handler())

        say(LOGGER, LINE)

        assert capsys.readouterr() == (expected_out, expected_err)


def test_a_handler_of_a_higher_level_does_not_show_the_line(capsys):
    with script_logging() as root:
        root.setLevel(logging.INFO)
        root.addHandler(plain_handler(level=logging.WARNING))

        say(LOGGER, LINE)

        assert capsys.readouterr() == (f"{LINE}\n", "")


def test_a_file_is_no_console(capsys, tmp_path):
    with script_logging() as root:
        root.setLevel(logging.INFO)
        handler = logging.FileHandler(tmp_path / "log.txt")
        root.addHandler(handler)

        say(LOGGER, LINE)
        handler.close()

        assert (tmp_path / "log.txt").read_text() == f"{LINE}\n"
        assert capsys.readouterr().out == f"{LINE}\n"


def test_the_handler_of_rich_is_a_console(capsys):
    with script_logging() as root:
        root.setLevel(logging.INFO)
        root.addHandler(RichHandler(console=Console(file=sys.stderr, width=200)))

        say(LOGGER, LINE)

        out, err = capsys.readouterr()
        assert out == ""
        assert err.count(LINE) == 1


def test_loggers_that_a_configuration_switched_off_do_not_silence_the_line(capsys, monkeypatch):
    with script_logging() as root:
        monkeypatch.setattr(LOGGER, "disabled", True)
        root.addHandler(plain_handler())

        say(LOGGER, LINE, level=logging.WARNING)

        assert capsys.readouterr() == (f"{LINE}\n", "")


def test_handlers_and_levels_stay_as_they_were(capsys):
    with script_logging() as root:
        handler = plain_handler()
        root.addHandler(handler)

        write_warnings_above_bars()
        say(LOGGER, LINE)

        assert (root.handlers, root.level, handler.level) == ([handler], logging.WARNING, logging.NOTSET)
        assert (PACKAGE.handlers, PACKAGE.level, LOGGER.level) == ([], logging.NOTSET, logging.NOTSET)


@pytest.mark.parametrize(("level", "expected"), [("WARNING", "over budget, STOP\n"), ("ERROR", "")])
def test_a_level_of_the_packages_own_logger_silences_what_is_below_it(capsys, level, expected):
    with script_logging():
        PACKAGE.setLevel(level)

        say(LOGGER, LINE)
        say(LOGGER, "over budget, STOP", level=logging.WARNING)

        assert capsys.readouterr().out == expected


def test_other_processes_say_nothing(capsys, monkeypatch):
    with script_logging():
        monkeypatch.setattr(console, "is_main_process", lambda: False)

        say(LOGGER, LINE)

        assert capsys.readouterr() == ("", "")


def test_what_steers_a_terminal_is_shown_as_letters(capsys):
    with script_logging():
        say(LOGGER, "STOP \x1b[2J")

        assert capsys.readouterr().out == "STOP \\x1b[2J\n"


def test_a_console_that_cannot_take_the_line_ends_nothing(monkeypatch):
    with script_logging():
        ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", ascii_only)
        say(LOGGER, "weights in r\u00e9sum\u00e9")
        assert ascii_only.buffer.getvalue() == b"weights in r\\xe9sum\\xe9\n"

        closed = io.StringIO()
        closed.close()
        for stdout in (None, closed):
            monkeypatch.setattr(sys, "stdout", stdout)
            say(LOGGER, LINE)


def test_a_level_that_the_user_chose_is_kept_and_what_it_lets_through_is_shown(capsys):
    with script_logging():
        PACKAGE.setLevel(logging.DEBUG)

        write_warnings_above_bars()
        write_warnings_above_bars()
        for level in (logging.DEBUG, logging.WARNING):
            LOGGER.log(level, "a line of level %d", level)

        assert capsys.readouterr().err == "a line of level 10\na line of level 30\n"


def test_who_configures_logging_after_the_callback_was_made_gets_warnings_once(capsys):
    with script_logging() as root:
        write_warnings_above_bars()
        root.addHandler(plain_handler())

        LOGGER.warning("weights could not be kept")

        assert capsys.readouterr() == ("", "weights could not be kept\n")
