import json

import numpy as np
import pytest
from tiny import make_texts

from ezmia_callbacks import CanarySet, hold_out_canaries, insert_canaries
from ezmia_callbacks.canaries.files import load_canaries, save_canaries
from ezmia_callbacks.errors import ConfigurationError

TEXTS = [f"note {i}: the patient slept {i} hours \u2028 and \ud800 woke" for i in range(60)]
ROWS = {
    "text": TEXTS,
    "tokenized": [{"input_ids": [i, i + 1, 2], "labels": [-100, i + 1, 2]} for i in range(60)],
    "prompt": [{"prompt": f"q {i}", "completion": f"a {i}", "tools": None} for i in range(60)],
    "messages": [{"messages": [{"role": "user", "content": text}]} for text in TEXTS],
    "arrays": [{"input_ids": np.array([i, 3])} for i in range(60)],
}


def held_out(rows):
    return hold_out_canaries(rows, n_members=10, n_non_members=20, seed=3)[1]


def assert_same(loaded, saved):
    assert loaded.records == saved.records
    assert loaded.record_ids == saved.record_ids
    np.testing.assert_array_equal(loaded.is_member, saved.is_member)
    assert loaded.provenance == saved.provenance
    assert loaded.details == saved.details
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.describe() == saved.describe()


@pytest.mark.parametrize("kind", ROWS)
def test_a_set_comes_back_whole(kind, tmp_path):
    canaries = held_out(ROWS[kind])

    save_canaries(canaries, tmp_path / "folder" / "canaries.json")

    assert_same(load_canaries(tmp_path / "folder" / "canaries.json"), canaries)


def test_inserted_canaries_keep_how_they_were_made(tmp_path):
    _, canaries = insert_canaries(
        make_texts(12_000),
        n_canaries=100,
        families=["unigram"],
        repetitions=[1, 2],
        length=8,
        seed=0,
    )

    save_canaries(canaries, tmp_path / "canaries.json")

    loaded = load_canaries(tmp_path / "canaries.json")
    assert_same(loaded, canaries)
    assert loaded.tiers == (1, 2)


def test_lists_of_the_user_do_not_become_a_random_split(tmp_path):
    canaries = CanarySet.from_lists(TEXTS[:10], TEXTS[10:20])

    save_canaries(canaries, tmp_path / "canaries.json")

    assert not load_canaries(tmp_path / "canaries.json").provenance.is_randomized


def test_the_same_set_gives_the_same_bytes_one_record_a_line(tmp_path):
    for name in ("one.json", "two.json"):
        save_canaries(held_out(TEXTS), tmp_path / name)

    content = (tmp_path / "one.json").read_bytes()
    assert content == (tmp_path / "two.json").read_bytes()
    assert sum(line.startswith(b'"note ') for line in content.splitlines()) == 30


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["records"].__setitem__(0, "another text"), "was changed since it was saved"),
        (
            lambda c: c.update(is_member=[not m for m in c["is_member"]]),
            "was changed since it was saved",
        ),
        (lambda c: c.update(schema=1), "its schema is not 2"),
        (lambda c: c.pop("provenance"), "provenance"),
        (lambda c: c["provenance"].update(method="user_lists"), "is_randomized=True"),
        (lambda c: c.update(is_member=[1] * 30), r"`is_member\[0\]` is 1; true or false is needed"),
        (lambda c: c.pop("fingerprint"), "`fingerprint` is None; a text is needed"),
        (lambda c: c.update(extra=1), "extra"),
    ],
)
def test_a_changed_file_is_refused(change, message, tmp_path):
    path = tmp_path / "canaries.json"
    save_canaries(held_out(TEXTS), path)
    changed(path, change)

    with pytest.raises(ConfigurationError, match=message):
        load_canaries(path)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"schema": 2}', "\x00"])
def test_another_file_is_no_file_of_canaries(content, tmp_path):
    path = tmp_path / "canaries.json"
    path.write_text(content)

    with pytest.raises(ConfigurationError, match=r"canaries\.json' is not a file of canaries"):
        load_canaries(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"canaries\.json.*No such file"):
        load_canaries(tmp_path / "canaries.json")


def test_what_json_cannot_say_is_refused(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"text {i}", "at": object()}]} for i in range(60)]

    with pytest.raises(ConfigurationError, match="cannot be written as JSON"):
        save_canaries(held_out(rows), tmp_path / "canaries.json")
    assert list(tmp_path.iterdir()) == []


def test_rows_with_other_columns_are_not_written_and_further_inputs_are(tmp_path):
    rows = [
        {"input_ids": [0, 5, 6 + i], "further_inputs": {"attention_mask": [0, 1, 1]}, "image": b"secret"}
        for i in range(20)
    ]
    canaries = CanarySet.from_lists(rows[:10], rows[10:])

    save_canaries(canaries, tmp_path / "canaries.json")

    loaded = load_canaries(tmp_path / "canaries.json")
    assert (loaded.records, loaded.rows) == (canaries.records, None)
    assert "secret" not in (tmp_path / "canaries.json").read_text()
