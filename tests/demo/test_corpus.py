import itertools
import json
import re

import pytest

from ezmia_callbacks.demo import corpus
from ezmia_callbacks.demo.corpus import (
    MAX_CHARACTERS,
    MIN_CHARACTERS,
    package_docstrings,
    records_from_file,
    standard_library_docstrings,
)
from ezmia_callbacks.errors import ConfigurationError

MODULE = '''
"""A module on herons, which stand still for hours. They then strike faster than the eye follows,
and the fish is gone before the ripple reaches the far bank of the pond. Nobody sees it happen.

    >>> heron.strike()
    True

Parameters
----------
fish : list
    The fish that the heron is allowed to take from the pond during one whole afternoon in May.
"""

class Heron:
    def strike(self):
        if True:
            """Not a docstring. It is only an expression in the middle of the code, whatever it says,
            and it goes on and on without ever telling the reader what the method would return to
            them."""
        return True
'''


def write_package(folder, monkeypatch, name, source):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


def word_runs(text, n_words=4):
    words = re.findall(r"[^\W_]+", text.casefold())
    return set(zip(*(words[start:] for start in range(n_words)), strict=False))


@pytest.fixture(scope="module")
def package_records():
    return package_docstrings("numpy")


@pytest.mark.slow
def test_standard_library_gives_enough_text_to_train_a_base_model():
    records = standard_library_docstrings()

    # 2804 records and 676 thousand characters on Python 3.11.
    assert len(records) >= 1500
    assert sum(map(len, records)) >= 350_000
    assert all(MIN_CHARACTERS <= len(record) <= MAX_CHARACTERS for record in records)
    assert len(set(records)) == len(records)


@pytest.mark.slow
def test_dependencies_give_enough_records_for_members_and_non_members():
    # 1798 records with scipy 1.17.1, scikit-learn 1.9.1 and numpy 2.4.6.
    assert len(package_docstrings("scipy", "sklearn", "numpy")) >= 1200


def test_every_record_has_the_stated_length(package_records):
    lengths = [len(record) for record in package_records]

    assert min(lengths) >= MIN_CHARACTERS
    assert max(lengths) <= MAX_CHARACTERS


def test_records_are_running_text(package_records):
    for record in package_records:
        assert ">>>" not in record
        assert "----" not in record
        assert "\n" not in record


def test_no_record_repeats_more_than_a_quarter_of_an_earlier_one(package_records):
    runs = [word_runs(record) for record in package_records[:300]]

    for first, second in itertools.combinations(runs, 2):
        assert len(first & second) <= 0.25 * len(second)


def test_second_call_gives_the_same_records_in_the_same_order(package_records):
    assert package_docstrings("numpy") == package_records


def test_two_packages_do_not_repeat_the_text_they_share(tmp_path, monkeypatch):
    write_package(tmp_path, monkeypatch, "herons_one", MODULE)
    write_package(tmp_path, monkeypatch, "herons_two", MODULE)

    assert package_docstrings("herons_one", "herons_two") == package_docstrings("herons_one")


def test_code_tables_and_stray_strings_are_left_out(tmp_path, monkeypatch):
    write_package(tmp_path, monkeypatch, "herons", MODULE)

    records = package_docstrings("herons")

    assert len(records) == 1
    assert records[0].startswith("A module on herons,")
    assert records[0].endswith("Nobody sees it happen.")


def test_package_is_not_imported(tmp_path, monkeypatch):
    write_package(tmp_path, monkeypatch, "explosive", MODULE + "\nraise RuntimeError('imported')\n")

    assert len(package_docstrings("explosive")) == 1


def test_unreadable_source_files_are_skipped(tmp_path, monkeypatch):
    write_package(tmp_path, monkeypatch, "mixed", MODULE)
    (tmp_path / "mixed" / "template.py").write_text("def {{ name }}(:\n")
    (tmp_path / "mixed" / "latin.py").write_bytes(b'"""caf\xe9"""\n')

    assert len(package_docstrings("mixed")) == 1


@pytest.mark.parametrize("name", ["no_such_package_here", "scipy.stats", "ast", ""])
def test_package_that_cannot_be_found_is_named(name):
    with pytest.raises(ConfigurationError, match=f"'{re.escape(name)}' is not an installed"):
        package_docstrings(name)


def test_package_without_prose_is_refused(tmp_path, monkeypatch):
    write_package(tmp_path, monkeypatch, "silent", "answer = 42\n")

    with pytest.raises(ConfigurationError, match="'silent' holds no documented source"):
        package_docstrings("silent")


def test_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))

    with pytest.raises(ConfigurationError, match="No documented source"):
        standard_library_docstrings()


def test_text_file_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "records.txt"
    path.write_text("one\nstill one\n \n\ntwo\n\none\nstill one\n")

    assert records_from_file(path) == ["one\nstill one", "two"]


def test_text_file_without_blank_lines_has_one_record_per_line(tmp_path):
    path = tmp_path / "records.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n".encode())

    assert records_from_file(str(path)) == ["one", "two"]


def test_json_lines_are_read_by_their_text_field(tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [{"text": "one\n\nstill one"}, {"text": "two\u2028still two", "label": 1}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")

    assert records_from_file(path) == ["one\n\nstill one", "two\u2028still two"]


def test_every_file_of_records_is_read(tmp_path):
    path = tmp_path / "records.csv"
    path.write_text("prompt,completion\nWho? ,Me.\nWho? ,Me.\nWhere? ,Here.\n")

    assert records_from_file(path) == ["Who? Me.", "Where? Here."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("records.doc", b"text\n", r"must end in \.jsonl, \.json, \.txt"),
        ("records.txt", b" \n\n", "contains no records"),
        ("records.txt", b"caf\xe9", "not UTF-8"),
        ("records.jsonl", b'{"text": "one"}\n\n{"text": 2}', "row 2: Got a int in the field 'text'"),
        ("records.jsonl", b'{"text": "one"}\n{"input_ids": [1]}', "row 2: token ids without text"),
    ],
)
def test_file_that_cannot_be_used_is_explained(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(ConfigurationError, match=message):
        records_from_file(path)


def test_missing_file_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        records_from_file(tmp_path / "absent.txt")
