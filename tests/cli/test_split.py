import gzip
import json
import os
import re
import stat

import pytest
from command_line import refusal, write_jsonl
from tiny import make_texts

from ezmia_callbacks.canaries.files import load_canaries
from ezmia_callbacks.canaries.record_files import read_record_file
from ezmia_callbacks.functional.sizes import audit_reach


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
@pytest.mark.parametrize("readers", [0o600, 0o644, 0o755])
def test_what_a_split_writes_can_be_read_by_its_owner_alone(call, data, tmp_path, readers):
    before = os.umask(0)
    try:
        data.chmod(readers)
        code, _, _ = call("split", data, "--coins", 60, "-o", tmp_path / "out")
    finally:
        os.umask(before)

    assert code == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {"train.jsonl": 0o600, "canaries.json": 0o600}


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


def test_without_sizes_a_tenth_is_held_out_and_what_that_shows_is_said(call, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in make_texts(400)])

    code, out, err = call("split", data, "-o", tmp_path / "out")
    _, content, _ = call("split", data, "-o", tmp_path / "again", "--json")

    reach = audit_reach(80, 40)
    assert (code, err) == (0, "")
    assert "80 members, 40 non-members" in out
    assert "360 of 400 rows" in out
    assert reach.describe() in out
    assert json.loads(content)["reach"] == reach.to_dict()


def test_few_rows_are_split_with_a_warning_that_says_what_can_be_done(call, data, tmp_path):
    code, _, err = call("split", data, "-o", tmp_path / "out")

    assert code == 0
    assert err.startswith("ezmia: warning: 24 members and 12 non-members were chosen among 120 rows: too few")
    assert err.endswith("--members 38 --non-members 19 can be drawn, which takes 19 rows out of training.\n")


@pytest.mark.parametrize("sizes", [[], ["--members", 900, "--non-members", 3], ["--coins", 5_000]])
def test_sizes_that_a_refusal_proposes_can_be_split_off(sizes, call, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in make_texts(70)])
    err = refusal(call("split", data, "-o", tmp_path / "out", *sizes))
    (proposed,) = re.findall(r"((?:--[a-z-]+ \d+ ?)+)can be drawn", err)

    code, _, _ = call("split", data, "-o", tmp_path / "out", *proposed.split())

    assert code == 0


@pytest.mark.parametrize("name", ["data.txt", "data.json", "data.jsonl.gz", "DATA.TXT.GZ"])
def test_a_split_writes_the_kind_of_file_that_it_read(name, call, tmp_path):
    texts = make_texts(120)
    content = "".join(f"{text}\n" for text in texts)
    if ".json" in name:
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if name.endswith(".json"):
        content = json.dumps([{"text": text} for text in texts], indent=1)
    is_packed = name.lower().endswith(".gz")
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if is_packed else content.encode())

    results = [call("split", tmp_path / name, "--coins", 60, "-o", tmp_path / out) for out in ("a", "b")]

    assert [(code, err) for code, _, err in results] == [(0, "")] * 2
    train = tmp_path / "a" / f"train{name[4:].lower()}"
    assert train.read_bytes() == (tmp_path / "b" / train.name).read_bytes()
    canaries = load_canaries(tmp_path / "a" / "canaries.json")
    held_out = {r["text"] for r, m in zip(canaries.records, canaries.is_member, strict=True) if not m}
    kept = [record["text"] for record in read_record_file(train).records()]
    assert kept == [text for text in texts if text not in held_out]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["split", "DATA", "-o", "OUT", "--members", "50"],
            "together, or by --coins alone, or leave out all",
        ),
        (["split", "DATA", "-o", "OUT", "--members", "50", "--non-members", "50", "--coins", "60"], "alone"),
        (["split", "DATA", "-o", "OUT", "--members", "100", "--non-members", "50"], "only 120 of 120 rows"),
        (
            ["split", "DATA", "-o", "OUT", "--members", "5", "--non-members", "50"],
            "A split with --members 38 --non-members 19 can be drawn",
        ),
        (["split", "DATA", "-o", "OUT", "--coins", "10"], "at least 50 are needed"),
        (["split", "DATA", "-o", "OUT", "--coins", "60", "--text-column", "body"], "no column 'body'"),
        (["split", "nowhere.jsonl", "-o", "OUT", "--coins", "60"], "Cannot read 'nowhere.jsonl'"),
        (["split", "DATA", "-o", "DATA", "--coins", "60"], "data.jsonl' is a file; a folder is needed"),
        (["split", "data.doc", "-o", "OUT"], "must end in .jsonl, .json, .txt, .csv or .parquet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, call, data, tmp_path):
    places = {"DATA": data, "OUT": tmp_path / "out"}

    err = refusal(call(*(places.get(argument, argument) for argument in arguments)))

    assert message in err
    assert not (tmp_path / "out" / "train.jsonl").exists()
