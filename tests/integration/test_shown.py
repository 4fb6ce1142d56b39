"""What a notebook, a log or a traceback shows of an object says nothing of any record."""

import dataclasses
import json

import pytest
from own_loop import run

from ezmia_callbacks import CanarySet, PrivacyAuditor, hold_out_canaries
from ezmia_callbacks.canaries import Provenance
from ezmia_callbacks.canaries.record_files import read_record_file
from ezmia_callbacks.scoring.rows import encode_canaries

SECRET = "My number is 555"
# Tokens that occur nowhere else.
TOKENS = [31, 17, 29]


def texts(n=40):
    return [f"{SECRET}-{i:04} and not another one" for i in range(n)]


def rows(n=120):
    return [{"input_ids": [*TOKENS, i % 30 + 3, i // 30 + 3, 5, 7]} for i in range(n)]


def assert_says_nothing(shown):
    assert len(shown) < 300
    assert SECRET not in shown
    assert ", ".join(map(str, TOKENS)) not in shown
    assert " ".join(map(str, TOKENS)) not in shown


def test_a_canary_set_shows_its_sizes_and_how_it_was_drawn():
    _, canaries = hold_out_canaries(texts(), n_members=15, n_non_members=20, seed=3)

    assert repr(canaries) == "CanarySet(15 members, 20 non-members, drawn at random, seed 3)"
    assert_says_nothing(str(canaries))
    assert SECRET not in canaries._repr_html_()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "from two lists"),
        ({"provenance": Provenance("hold_out_coins", True, 1, 40, 0, None)}, "drawn by coins, seed 1"),
        ({"groups": tuple(str(i // 2) for i in range(40))}, "in 20 groups, from two lists"),
    ],
)
def test_other_ways_to_draw_are_told_as_briefly(changes, words):
    canaries = CanarySet.from_lists(texts()[:20], texts()[20:])

    assert repr(dataclasses.replace(canaries, **changes)).endswith(f"non-members, {words})")


def test_tokens_are_not_shown():
    encoded = encode_canaries(hold_out_canaries(rows(), n_members=30, n_non_members=60, seed=0)[1])

    for shown in (encoded, encoded.rows[0], encoded.rows[:2], {"a": encoded.rows[0]}):
        assert_says_nothing(repr(shown))


def test_a_file_of_records_is_not_shown(tmp_path):
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in texts()))

    assert_says_nothing(repr(read_record_file(tmp_path / "records.jsonl")))


def test_a_run_and_all_that_it_holds_say_nothing():
    kept, canaries = hold_out_canaries(rows(), n_members=30, n_non_members=60, seed=0)
    auditor = PrivacyAuditor(canaries, n_audits=2)
    run(auditor, kept, n_epochs=1)

    shown = (auditor, auditor.history, auditor.history[-1], auditor.trajectories, auditor.encoded)
    for each in (*shown, auditor.settings):
        assert ", ".join(map(str, TOKENS)) not in repr(each)
    for each in shown:
        assert_says_nothing(repr(each))
