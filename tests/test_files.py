import os
import subprocess
import sys

import pytest

from ezmia_callbacks import files
from ezmia_callbacks.files import write_atomically


def test_text_and_bytes_are_written_and_folders_made(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "text", "é\n")
    write_atomically(tmp_path / "bytes", b"\x00\xff")

    assert (tmp_path / "a" / "b" / "text").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"


def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path):
    path = tmp_path / "file"
    path.write_text("much longer old content")

    write_atomically(path, "new")

    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_write_keeps_the_old_content_and_cleans_up(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(_descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("survives", "expected"), [(False, "old"), (True, "new")])
def test_a_killed_process_leaves_the_old_content(tmp_path, survives, expected):
    path = tmp_path / "file"
    path.write_text("old")
    # The module alone, by its path: importing the package would take a second.
    script = (
        "import os, pathlib, runpy, signal, sys\n"
        "write = runpy.run_path(sys.argv[1])['write_atomically']\n"
        "if sys.argv[3] == 'False':\n"
        "    os.fsync = lambda descriptor: os._exit(9)\n"
        "write(pathlib.Path(sys.argv[2]), 'new')\n"
    )

    done = subprocess.run([sys.executable, "-c", script, files.__file__, path, str(survives)], check=False)

    assert done.returncode == (0 if survives else 9)
    assert path.read_text() == expected


def test_who_reads_while_a_file_is_replaced_reads_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    with path.open() as reader:
        write_atomically(path, "new")

        assert reader.read() == "old"
    assert path.read_text() == "new"
