"""A finished run, a file of records, and the command in this process."""

import pytest
from command_line import run_main, write_jsonl
from post_hoc_runs import finish_run
from tiny import make_texts


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return finish_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def call(monkeypatch):
    return lambda *arguments: run_main(monkeypatch, *arguments)


@pytest.fixture
def data(tmp_path):
    rows = [{"id": i, "text": text} for i, text in enumerate(make_texts(120))]
    return write_jsonl(tmp_path / "data.jsonl", rows)
