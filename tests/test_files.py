import os
import stat
import subprocess
import sys

import pytest

from ezmia_callbacks import files
from ezmia_callbacks.files import append, check_writable, write_atomically


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


def test_what_is_appended_stands_at_the_end_of_the_same_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "é\n")
    before = path.stat()

    append(path, "ü\n")
    append(path, "")

    assert path.read_text(encoding="utf-8") == "é\nü\n"
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_cannot_be_appended_leaves_the_file_as_it_was(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(_descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        append(path, "new")

    assert path.read_text() == "old"


def test_nothing_is_appended_to_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        append(tmp_path / "file", "new")


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


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_file_is_its_owners_alone_unless_it_is_for_others(tmp_path):
    (tmp_path / "private").write_text("was for others")
    (tmp_path / ".private.tmp").write_text("left by a killed process")

    write_atomically(tmp_path / "private", "new")
    write_atomically(tmp_path / "report", "new", is_for_others=True)

    assert (mode(tmp_path / "private"), mode(tmp_path / "report")) == (0o600, 0o644)


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_folder_is_made_for_its_owner_alone_and_one_that_is_there_stays_as_it_is(tmp_path):
    check_writable(tmp_path / "above" / "run")
    (tmp_path / "mine").mkdir()
    check_writable(tmp_path / "mine")

    modes = [mode(tmp_path / name) for name in ("above", "above/run", "mine")]
    assert modes == [0o755, 0o700, 0o755]
