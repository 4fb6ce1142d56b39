"""What comes from files is what was declared, or is refused by an error that names the place."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.canaries.files import load_canaries, save_canaries
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.typed_rows import parse_json, read_mapping, read_rest, read_value


@dataclass(frozen=True)
class Inner:
    name: str
    value: float | None = None


@dataclass(frozen=True)
class Outer:
    step: int
    is_first: bool
    status: Literal["ok", "failed"]
    inner: Inner
    by_name: Mapping[str, Inner]
    numbers: tuple[float, ...] = ()
    later: int = 7
    memory: object = field(default=None, compare=False)


ROW = {
    "step": 3,
    "is_first": False,
    "status": "ok",
    "inner": {"name": "a", "value": 1},
    "by_name": {"x y": {"name": "b", "value": None}},
    "numbers": [0.5, 1],
    "later": 2,
}


def changed(**changes):
    return {**ROW, **changes}


def test_a_row_is_read_as_its_types():
    assert read_value(Outer, ROW) == Outer(
        3, False, "ok", Inner("a", 1), {"x y": Inner("b", None)}, (0.5, 1), 2
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(step=True), "`step` is True; a whole number is needed"),
        (changed(step="3"), "`step` is a text of 1 character; a whole number is needed"),
        (changed(step=3.0), "`step` is 3.0; a whole number is needed"),
        (changed(step=10**40), "`step` is a whole number of more than 128 bits"),
        (changed(is_first=0), "`is_first` is 0; true or false is needed"),
        (changed(status="fine"), "`status` is a text of 4 characters; one of 'ok', 'failed' is needed"),
        (changed(status=None), "`status` is None"),
        (changed(inner=[1]), "`inner` is a list of 1; an object with names is needed"),
        (
            changed(inner={"name": "a", "value": "1"}),
            "`inner.value` is a text of 1 character; a number is needed",
        ),
        (changed(inner={"name": "a", "value": float("nan")}), "`inner.value` is nan; a finite number"),
        (changed(inner={"name": "a", "value": float("inf")}), "`inner.value` is inf; a finite number"),
        (changed(inner={"name": "a", "value": 1e200}), "`inner.value` is 1e.200; a finite number below"),
        (changed(inner={"name": "a"}), "it has no `value` in `inner`"),
        (changed(inner={"name": 5, "value": 1}), "`inner.name` is 5; a text is needed"),
        (changed(by_name={"x y": {}}), r"it has no `name` in `by_name\[a name of 3 characters\]`"),
        (changed(by_name=[]), "`by_name` is a list of 0; an object"),
        (changed(by_name={1: {"name": "", "value": 1}}), "`by_name` is 1; names that are text"),
        (changed(numbers=5), "`numbers` is 5; a list is needed"),
        (changed(numbers=[0.5, "1"]), r"`numbers\[1\]` is a text of 1 character; a number is needed"),
        (changed(unheard="\x1b[2J"), "it has 'unheard', of which this release does not know"),
        (changed(memory=1), "it has 'memory', of which"),
        ({}, "it has no `step`"),
        (None, "it is None; an object"),
    ],
)
def test_what_is_anything_else_is_named(row, message):
    with pytest.raises(ConfigurationError, match=message):
        read_value(Outer, row)


def test_an_error_says_nothing_that_steers_a_terminal():
    with pytest.raises(ConfigurationError) as caught:
        read_value(Outer, {"\x1b[2J\u202e": 1, **changed(step="\x9b31m" * 50)})

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_older_files_may_lack_what_is_newer_and_nothing_else():
    row = {name: value for name, value in ROW.items() if name != "later"}

    assert read_value(Outer, row, newer={"later"}).later == 7
    with pytest.raises(ConfigurationError, match="it has no `later`"):
        read_value(Outer, row, newer={"numbers"})


def test_of_a_newer_name_a_field_without_a_default_is_needed():
    with pytest.raises(ConfigurationError, match="it has no `step`"):
        read_value(Outer, {name: value for name, value in ROW.items() if name != "step"}, newer={"step"})


@dataclass(frozen=True, eq=False)
class ArraysByName:
    arrays: 'Mapping[str, Float64[np.ndarray, "m n"]]'  # noqa: F821 - read as text


def test_arrays_by_name_are_read_as_arrays():
    assert read_value(ArraysByName, {"arrays": {"a": np.zeros((3, 2))}}).arrays["a"].shape == (3, 2)
    with pytest.raises(ConfigurationError, match=r"`arrays\.a` is an array of float64 with 1 dimensions"):
        read_value(ArraysByName, {"arrays": {"a": np.zeros(3)}})
    with pytest.raises(ConfigurationError, match=r"`arrays` is a ndarray; an object with names"):
        read_value(ArraysByName, {"arrays": np.zeros((3, 2))})


@dataclass(frozen=True, eq=False)
class Arrays:
    counts: 'Int64[np.ndarray, " n"]'  # noqa: F821 - read as text
    shares: 'Float64[np.ndarray, " n"]'  # noqa: F821
    table: 'Float64[np.ndarray, "m n"]'  # noqa: F821


TABLE = np.zeros((3, 2))


def test_lists_and_arrays_are_read_as_arrays():
    found = read_value(Arrays, {"counts": [1, 2], "shares": np.array([0.5, 1.0]), "table": TABLE})

    assert found.counts.dtype == np.int64
    assert found.counts.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [1, 2, 3]}, "`shares` has 2 n, and the arrays beside it have 3"),
        ({"counts": [1, True]}, r"`counts\[1\]` is True"),
        ({"counts": [1, 2.5]}, r"`counts\[1\]` is 2.5"),
        ({"counts": [1, 2**70]}, "numbers of 64 bits"),
        ({"counts": np.array([1, 2], dtype=np.int32)}, "`counts` is an array of int32"),
        ({"counts": "12"}, "`counts` is a text of 2 characters; an array of int64 with 1 dimensions"),
        ({"table": TABLE[0]}, "`table` is an array of float64 with 1 dimensions"),
        ({"table": TABLE.tolist()}, "`table` is a list of 3; an array"),
        ({"shares": [float("nan"), 0.5]}, r"`shares\[0\]` is nan"),
    ],
)
def test_arrays_of_another_kind_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        read_value(Arrays, {"counts": [1, 2], "shares": [0.5, 1.0], "table": TABLE, **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "it holds NaN where a finite number is needed"),
        ('{"a": [-Infinity]}', "it holds -Infinity"),
        ("1e999", "it holds 1e999"),
        ('{"a": 1, "b": 2, "a": 1}', "it names 'a' more than once"),
        ("9" * 5000, "it is not JSON"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[" * 65 + "]" * 65, "it is nested more than 64 levels deep"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested"),
        ("", "it is not JSON"),
        ("\ufeff{}", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        ('{"a": 1', "it is not JSON"),
        ('"\x00"', "it is not JSON"),
    ],
)
def test_a_text_that_is_no_plain_json_is_refused(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_json(text)


def test_json_as_it_is_written_is_read():
    value = {"a": [1, 2.5, None, True, "\ud800"], "b": {"c": -(2**60)}}

    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * 64 + "]" * 64)


def test_of_other_programs_numbers_may_be_infinite_and_nothing_else():
    assert parse_json('{"a": [1e999, -Infinity]}', allow_nan=True) == {"a": [float("inf"), -float("inf")]}
    for text in ("[" * 100_000, '{"a": 1, "a": NaN}', "9" * 5000):
        with pytest.raises(ConfigurationError):
            parse_json(text, allow_nan=True)


@pytest.mark.parametrize("row", [None, [], {"schema": 2}, {"schema": True}, {"schema": "1"}, {}])
def test_another_schema_is_refused(row):
    with pytest.raises(ConfigurationError):
        read_rest(row, schema=1)


def test_a_mapping_is_one_by_text():
    assert read_mapping({"a": 1}) == {"a": 1}
    with pytest.raises(ConfigurationError, match="`state` is a list of 0; an object with names"):
        read_mapping([], "state")


SECRET = "My number is 42"


@pytest.mark.parametrize("content", [{"schema": 2, "fingerprint": SECRET}, {"schema": 2, SECRET: []}, {}])
@pytest.mark.parametrize("place", ["records", "record_ids", "is_member", "provenance", "details"])
def test_no_error_about_a_file_of_canaries_says_what_a_record_says(tmp_path, content, place):
    path = tmp_path / "canaries.json"
    path.write_text(json.dumps({"schema": 2, "fingerprint": "0" * 16, place: SECRET} | content))

    with pytest.raises(ConfigurationError) as caught:
        load_canaries(path)

    # The folder has a number of its own.
    assert "42" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("change", [{"records": SECRET}, {"tiers": [SECRET]}, {"provenance": {SECRET: 1}}])
def test_no_error_about_a_damaged_file_of_canaries_says_what_a_record_says(tmp_path, change):
    path = tmp_path / "canaries.json"
    save_canaries(CanarySet.from_lists([f"m {i}" for i in range(20)], [f"n {i}" for i in range(20)]), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(ConfigurationError) as caught:
        load_canaries(path)

    # The folder has a number of its own.
    assert "42" not in str(caught.value).replace(str(tmp_path), "")


def test_a_name_that_repeats_is_not_shown_where_it_may_be_a_text():
    with pytest.raises(ConfigurationError, match="it names a name of 15 characters more than once"):
        parse_json(json.dumps({SECRET: 1})[:-1] + f', "{SECRET}": 2' + "}")
