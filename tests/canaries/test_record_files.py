import csv
import gzip
import json
import sys

import pytest

from ezmia_callbacks.canaries.record_files import read_record_file
from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError

LONG = "word " * 40_000


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_kept_lines_of_jsonl_are_the_bytes_they_were(tmp_path):
    lines = [
        b'{"text":   "one",  "id": 1}\n',
        '{"text": "zwölf \u2028 \x85 Zeilen"}\r\n'.encode(),
        b'{"id": 3, "text": "\\u00fc"}\n',
        b'{"text": "last, without a newline"}',
    ]
    file = read_record_file(written(tmp_path / "data.jsonl", b"".join(lines)))

    assert [row["text"] for row in file.rows][1] == "zwölf \u2028 \x85 Zeilen"
    assert len(file.rows) == 4
    assert file.content_of([0, 1, 3]) == lines[0] + lines[1] + lines[3]
    assert file.content_of(range(4)) == b"".join(lines)


def test_kept_lines_of_csv_are_the_bytes_they_were(tmp_path):
    header = b"id,text\r\n"
    lines = [b'1,"a, b"\r\n', b'2,"two\nlines ""quoted"""\r\n', b"3,plain\r\n", b"4,last"]
    file = read_record_file(written(tmp_path / "data.csv", header + b"".join(lines)))

    assert [row["text"] for row in file.rows] == ["a, b", 'two\nlines "quoted"', "plain", "last"]
    assert file.content_of([1, 3]) == header + lines[1] + lines[3]


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
def test_a_byte_order_mark_is_kept_and_not_read(name, tmp_path):
    content = b'{"text": "one"}\n' if name.endswith("jsonl") else b"text\none\n"
    file = read_record_file(written(tmp_path / name, b"\xef\xbb\xbf" + content))

    assert file.rows == ({"text": "one"},)
    assert file.content_of([0]) == b"\xef\xbb\xbf" + content


def test_long_fields_of_csv_are_read_and_the_global_limit_is_put_back(tmp_path):
    limit = csv.field_size_limit()
    file = read_record_file(written(tmp_path / "data.csv", f"text\n{LONG}\n"))

    assert file.rows[0]["text"] == LONG
    assert csv.field_size_limit() == limit


def test_parquet_comes_back_with_its_schema(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {"text": ["one", "two", "three"], "n": pyarrow.array([1, None, 3], pyarrow.int16())},
        metadata={"made by": "a test"},
    )
    parquet.write_table(table, tmp_path / "data.parquet")

    file = read_record_file(tmp_path / "data.parquet")
    kept = parquet.read_table(written(tmp_path / "kept.parquet", file.content_of([0, 2])))

    assert file.rows[1] == {"text": "two", "n": None}
    assert kept.equals(table.take([0, 2]))
    assert kept.schema.equals(table.schema, check_metadata=True)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(MissingDependencyError, match="pip install pyarrow"):
        read_record_file(written(tmp_path / "data.parquet", b"PAR1"))


def test_records_are_recognized_by_their_columns_or_by_the_one_that_is_named(tmp_path):
    rows = [{"text": "a", "body": "b"}, {"text": "c", "body": "d"}]
    path = written(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    assert read_record_file(path).records() == rows
    assert read_record_file(path).records(text_column="body") == ["b", "d"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2: not JSON"),
        ("data.jsonl", b'{"text": "a"}\n\n[1]\n', r"line 3: a JSON list; an object is needed"),
        ("data.jsonl", b"\n\n", "contains no records"),
        ("data.jsonl", '{"text": "ä"}'.encode("latin-1"), r"not UTF-8 text \(byte 10\)"),
        ("data.csv", b"id,text\n1,a\n2,b,c\n", r"line 3: 3 fields, but the header names 2"),
        ("data.csv", b'id,text\n1,"a\n', "line 2: not CSV"),
        ("data.csv", b"text,text\na,b\n", "columns 1 and 2 have the same name"),
        ("data.csv", b"id,text\n", "contains no records"),
        ("data.csv", b"", "contains no records"),
        ("data.parquet", b"not parquet", "is not a Parquet file"),
        ("data.doc", b"a", r"must end in \.jsonl, \.json, \.txt, \.csv or \.parquet, also with \.gz"),
        ("data.txt", b" \n\n", "contains no records"),
        ("data.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("data.json", b'[{"text": "a"},\n{"text": }]', "line 2: not JSON"),
        ("data.json", b'[{"text": "a"}, "b"]', "row 2: a JSON str; an object is needed"),
        ("data.json", b'{"data": [{"text": "a"}]}', "holds one JSON value; a list of objects, or one object"),
        ("data.json", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("data.json", b"[" * 100_000, "line 1: not JSON"),
        ("data.json", b"[]", "contains no records"),
        ("data.jsonl.gz", b'{"text": "a"}', "is not a whole gzip file"),
        ("data.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 50, mtime=0)[:-9], "is not a whole gzip file"),
        ("data.jsonl.gz", gzip.compress(b'{"text": "a"}\n\n[1]', mtime=0), "line 3: a JSON list"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(name, content, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_record_file(written(tmp_path / name, content))

    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"Cannot read .*nowhere\.csv'"):
        read_record_file(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"body": "a"}, None, r"row 1: no column 'text'.*it has the columns 'body'\..*--text-column"),
        ({"body": "a"}, "text", r"row 1: no column 'text'; it has the columns 'body'"),
        ({"body": 1}, "body", r"row 1: column 'body' holds a int; text is needed"),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(row, column, message, tmp_path):
    file = read_record_file(written(tmp_path / "data.jsonl", json.dumps(row)))

    with pytest.raises(ConfigurationError, match=message):
        file.records(text_column=column)


HALF = "\ud800"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": f"a{HALF}b"}, r"'text' holds half of a character \(a surrogate\)"),
        ({"messages": [{"role": "user", "content": HALF}]}, "'messages' holds half of a character"),
        ({"messages": [{"role": "user", "content": "a", HALF: 1}]}, "'messages' holds half of a character"),
        ({"text": float("nan")}, r"'text' holds a number that is not finite \(NaN or infinity\)"),
        ({"prompt": "a", "completion": float("inf")}, "'completion' holds a number that is not finite"),
        ({"text": 3}, "Got a int in the field 'text'"),
        ({"messages": [{"role": "user", "content": float("nan")}]}, "'messages' holds a number that is not"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"x": float("nan")}]}, "'tools' holds a"),
        ({"input_ids": [3, -5]}, "'input_ids' holds the token id -5, where ids count from 0"),
        ({"input_ids": [3], "rejected_input_ids": [-1]}, "'rejected_input_ids' holds the token id -1"),
        ({"input_ids": [3, float("nan")]}, "'input_ids' holds a number that is not finite"),
        ({"input_ids": [3, 4], "labels": [1]}, "token columns of different lengths"),
    ],
)
def test_a_record_that_cannot_be_read_is_named_by_file_and_row(row, message, tmp_path):
    rows = [{"text": "one", "input_ids": None}, row]
    file = read_record_file(written(tmp_path / "d.jsonl", "".join(json.dumps(each) + "\n" for each in rows)))

    with pytest.raises(ConfigurationError, match=rf"d\.jsonl', row 2: .*{message}"):
        file.records()


def test_a_named_column_is_looked_at_as_well(tmp_path):
    file = read_record_file(written(tmp_path / "d.jsonl", json.dumps({"body": HALF})))

    with pytest.raises(ConfigurationError, match="row 1: 'body' holds half of a character"):
        file.records(text_column="body")


def test_what_other_columns_hold_does_not_matter(tmp_path):
    row = {"text": "one \U0001f600", "score": float("nan"), "note": HALF}
    chat = {"messages": [{"role": "a", "content": "b"}], "tools": None}
    ids = {"input_ids": [], "labels": [-100]}
    rows = [row, chat, {**ids, "labels": []}]
    file = read_record_file(written(tmp_path / "d.jsonl", "".join(json.dumps(each) + "\n" for each in rows)))

    assert file.records()[1:] == rows[1:]


def test_text_has_a_record_a_line_and_keeps_its_bytes(tmp_path):
    lines = ["\ufeff one \r\n", "zw\u00f6lf \u2028 \x85\n", "three\n", "four, without a newline"]
    file = read_record_file(written(tmp_path / "data.txt", "".join(lines)))

    texts = [" one ", "zw\u00f6lf \u2028 \x85", "three", "four, without a newline"]
    assert file.records() == [{"text": text} for text in texts]
    assert file.content_of([0, 1, 3]).decode() == "".join([lines[0], lines[1], lines[3]])


def test_text_with_blank_lines_has_a_record_a_paragraph(tmp_path):
    pieces = ["\r\n \n", "one\r\nstill one\n\n", "two\n \t\n\n", "three\n\n"]
    file = read_record_file(written(tmp_path / "data.txt", "".join(pieces)))

    assert [row["text"] for row in file.rows] == ["one\nstill one", "two", "three"]
    assert file.content_of([0, 2]).decode() == pieces[0] + pieces[1] + pieces[3]


def test_a_list_of_objects_keeps_each_as_it_was_written(tmp_path):
    items = ['{"text":   "a, ]",\n "n": [1, {}]}', '{"text": "\\u00fc"}', '{"n": 1e3, "text": "\u2028"}']
    file = read_record_file(
        written(tmp_path / "data.json", f"\ufeff \n[ {items[0]}, {items[1]}\n,{items[2]} ] ")
    )

    kept = file.content_of([0, 2]).decode()
    assert [row["text"] for row in file.rows] == ["a, ]", "\u00fc", "\u2028"]
    assert kept == f"\ufeff[\n{items[0]},\n{items[2]}\n]\n"
    assert read_record_file(written(tmp_path / "kept.json", kept)).rows == (file.rows[0], file.rows[2])


def test_a_json_file_of_lines_is_read_and_written_as_lines(tmp_path):
    lines = ['{"text": "one"}\n', '{"text":  "two"}\n']
    file = read_record_file(written(tmp_path / "data.json", "".join(lines)))

    assert file.content_of([1]).decode() == lines[1]


def test_packed_files_are_packed_again_the_same_way_each_time(tmp_path):
    lines = [b'{"text": "one"}\n', b'{"text":  "two"}\n']
    file = read_record_file(written(tmp_path / "data.JSONL.gz", gzip.compress(b"".join(lines))))

    assert file.rows == ({"text": "one"}, {"text": "two"})
    assert gzip.decompress(file.content_of([1])) == lines[1]
    # Bytes 4 to 8 are the time.
    assert file.content_of([1])[4:8] == bytes(4)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "9" * 5_000 + "}"])
def test_a_line_that_cannot_be_read_is_named(line, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n' + line + "\n")

    with pytest.raises(ConfigurationError, match="line 2: not JSON"):
        read_record_file(path)


def test_a_path_that_no_file_can_have_is_refused():
    with pytest.raises(ConfigurationError, match="Cannot read"):
        read_record_file("a\x00b.jsonl")


SECRET = "My number is 42"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        # A first line that is a record, and no header.
        ("data.csv", f"{SECRET},7\nMy cat is ill,8\n".encode()),
        ("data.csv", f"{SECRET}\nMy cat is ill\n".encode()),
        ("data.csv", f"{SECRET},{SECRET}\nMy cat,is ill\n".encode()),
        ("data.csv", f'{SECRET}\n"{SECRET}\n'.encode()),
        ("data.csv", f"{SECRET},7\n{SECRET}\n".encode()),
        ("data.jsonl", json.dumps({SECRET: 7}).encode()),
        ("data.jsonl", json.dumps({"body": {SECRET: 7}}).encode()),
        ("data.jsonl", json.dumps(SECRET).encode()),
        ("data.jsonl", json.dumps({"body": SECRET}).encode()[:-1]),
    ],
)
@pytest.mark.parametrize("column", [None, "text", "body"])
def test_no_error_says_what_a_record_says(name, content, column, tmp_path):
    path = written(tmp_path / name, content)

    with pytest.raises(ConfigurationError) as caught:
        read_record_file(path).records(text_column=column)

    assert SECRET not in str(caught.value)
    # The folder has a number of its own.
    assert "42" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("texts", [{SECRET: ["a"]}, {"when": [2**62]}])
def test_no_error_says_what_a_parquet_file_holds(texts, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(texts)
    if "when" in texts:
        table = table.cast(pyarrow.schema([("when", pyarrow.timestamp("us"))]))
    parquet.write_table(table, tmp_path / "data.parquet")

    with pytest.raises(ConfigurationError) as caught:
        read_record_file(tmp_path / "data.parquet").records()

    assert SECRET not in str(caught.value)
    assert "4611686" not in str(caught.value)


def test_a_file_without_a_header_is_told_what_its_first_line_is_taken_for(tmp_path):
    path = written(tmp_path / "data.csv", f"{SECRET},7\nMy cat is ill,8\n".encode())

    with pytest.raises(ConfigurationError, match=r"2 columns with names of their own\..* first line"):
        read_record_file(path).records()
