import json
import os
import stat

import pytest
from command_line import refusal, write_jsonl
from tiny import make_texts

from ezmia_callbacks.canaries.files import load_canaries


def test_a_split_leaves_all_lines_but_the_non_members_as_they_were(call, data, tmp_path):
    code, out, err = call("split", data, "--members", 20, "--non-members", 30, "-o", tmp_path / "out")

    assert (code, err) == (0, "")
    canaries = load_canaries(tmp_path / "out" / "canaries.json")
    assert (canaries.n_members, canaries.n_non_members) == (20, 30)
    assert canaries.provenance.is_randomized
    held_out = {r["text"] for r, m in zip(canaries.records, canaries.is_member, strict=True) if not m}
    lines = data.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["text"] not in held_out]
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == b"".join(kept)
    assert len(kept) == 90
    assert "90 of 120 rows" in out


def test_a_split_can_be_drawn_again_and_differs_by_its_seed(call, data, tmp_path):
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, out, _ = call("split", data, "--coins", 60, "--seed", seed, "-o", tmp_path / name, "--json")
        assert code == 0
        drawn[name] = json.loads(out)

    assert drawn["a"]["fingerprint"] == drawn["b"]["fingerprint"] != drawn["c"]["fingerprint"]
    assert drawn["a"]["n_members"] + drawn["a"]["n_non_members"] == 60
    for file in ("train.jsonl", "canaries.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert load_canaries(tmp_path / "a" / "canaries.json").provenance.has_independent_coins


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize("readers", [0o600, 0o640, 0o644, 0o755])
def test_who_cannot_read_the_source_cannot_read_what_a_split_writes(call, data, tmp_path, readers):
    before = os.umask(0)
    try:
        data.chmod(readers)
        code, _, _ = call("split", data, "--coins", 60, "-o", tmp_path / "out")
    finally:
        os.umask(before)

    assert code == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {"train.jsonl": 0o666 & readers, "canaries.json": 0o600}


def test_a_split_is_not_overwritten_unless_told_to(call, data, tmp_path):
    arguments = ["split", data, "--coins", 60, "-o", tmp_path / "out"]
    call(*arguments)
    before = (tmp_path / "out" / "train.jsonl").read_bytes()

    refused = call(*arguments, "--seed", 5)
    still = (tmp_path / "out" / "train.jsonl").read_bytes()
    forced = call(*arguments, "--seed", 5, "--force")

    assert (refused[0], forced[0]) == (2, 0)
    assert "--force" in refused[2]
    assert still == before != (tmp_path / "out" / "train.jsonl").read_bytes()


def test_a_split_never_overwrites_its_source(call, tmp_path):
    rows = [{"text": text} for text in make_texts(120)]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    before = data.read_bytes()

    code, _, err = call("split", data, "--coins", 60, "-o", tmp_path, "--force")

    assert code == 2
    assert "is the file to be split" in err
    assert data.read_bytes() == before


def test_a_csv_is_split_by_the_column_that_is_named(call, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("id,body\n" + "".join(f'{i},"{text},"\n' for i, text in enumerate(make_texts(80))))

    code, _, err = call("split", data, "--coins", 60, "-o", tmp_path / "out", "--text-column", "body")

    assert (code, err) == (0, "")
    canaries = load_canaries(tmp_path / "out" / "canaries.json")
    assert all(record.endswith(",") for record in canaries.records)
    kept = (tmp_path / "out" / "train.csv").read_text().splitlines()
    assert kept[0] == "id,body"
    assert len(kept) == 81 - canaries.n_non_members


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split", "DATA", "-o", "OUT"], "--members and --non-members, or --coins alone"),
        (["split", "DATA", "-o", "OUT", "--members", "50", "--non-members", "50", "--coins", "60"], "alone"),
        (["split", "DATA", "-o", "OUT", "--members", "100", "--non-members", "50"], "only 120 of 120 rows"),
        (["split", "DATA", "-o", "OUT", "--coins", "10"], "at least 50 are needed"),
        (["split", "DATA", "-o", "OUT", "--coins", "60", "--text-column", "body"], "no column 'body'"),
        (["split", "nowhere.jsonl", "-o", "OUT", "--coins", "60"], "Cannot read 'nowhere.jsonl'"),
        (["split", "DATA", "-o", "DATA", "--coins", "60"], "data.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, call, data, tmp_path):
    places = {"DATA": data, "OUT": tmp_path / "out"}

    err = refusal(call(*(places.get(argument, argument) for argument in arguments)))

    assert message in err
    assert not (tmp_path / "out" / "train.jsonl").exists()
