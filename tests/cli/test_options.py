import pytest
from typer.main import get_command

from ezmia_callbacks.cli import command
from ezmia_callbacks.cli.options import OPTIONS, in_options


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`fpr` must lie in (0, 1), got 2.", "--fpr must lie in (0, 1), got 2."),
        ("ask for n_members=38, n_non_members=19.", "ask for --members 38 --non-members 19."),
        ("or n_canaries=50 can", "or --coins 50 can"),
        ("pass `allow_shift=True` to", "pass --allow-shift to"),
        ("keep `batch_size` small (`max_length=`)", "keep --batch-size small (--max-length)"),
        ("use `rule=\"upper\"` or `tokenizer='checkpoint'`", "use --rule upper or --tokenizer checkpoint"),
        ("confidence=0.95, a rule", "--confidence 0.95, a rule"),
    ],
)
def test_arguments_are_shown_as_options(message, shown):
    assert in_options(message) == shown


@pytest.mark.parametrize(
    "message",
    [
        "Cannot read 'n_members=3.jsonl': no such file.",
        "Draw by `hold_out_canaries(rows, n_canaries=100)` before training.",
        "LeakageBudget(limit=0.6, fpr=0.1)",
        "the score of its members' texts",
        "my_fpr=3 and `every`",
    ],
)
def test_names_of_files_calls_and_plain_words_stay(message):
    assert in_options(message) == message


def test_every_option_that_is_shown_exists():
    commands = get_command(command.app).commands.values()
    exist = {name for each in commands for parameter in each.params for name in parameter.opts}

    assert set(OPTIONS.values()) <= exist
