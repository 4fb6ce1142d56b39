import os
import re
import secrets
import stat
import subprocess
import sys

import pytest

from ezmia_callbacks import files
from ezmia_callbacks.files import (
    FOR_OTHERS,
    append,
    check_writable,
    copy_private,
    remove_leftovers,
    write_atomically,
)


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


@pytest.mark.parametrize("write", [write_atomically, append])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_write_keeps_the_old_content_and_cleans_up(tmp_path, monkeypatch, error, write):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(_descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write(path, "new")

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


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_file_is_its_owners_alone_unless_it_is_for_others(tmp_path):
    (tmp_path / "private").write_text("was for others")

    write_atomically(tmp_path / "private", "new")
    write_atomically(tmp_path / "report", "new", mode=FOR_OTHERS)

    assert (mode(tmp_path / "private"), mode(tmp_path / "report")) == (0o600, 0o644)


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize(
    ("there", "expected"), [(0o600, 0o600), (0o640, 0o640), (0o400, 0o600), (0o644, 0o644), (0o777, 0o644)]
)
def test_no_file_is_widened(tmp_path, there, expected):
    report, private = tmp_path / "report", tmp_path / "private"
    for path in (report, private):
        path.write_text("old")
        path.chmod(there)

    write_atomically(report, "new", mode=FOR_OTHERS)
    write_atomically(private, "new")

    assert (mode(report), mode(private)) == (expected, 0o600)


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_private_file_is_private_from_its_first_byte_under_any_umask(tmp_path, monkeypatch):
    seen = []

    def fsync(_descriptor):
        seen.extend((path.name, mode(path)) for path in tmp_path.iterdir())

    monkeypatch.setattr(os, "fsync", fsync)
    before = os.umask(0)
    try:
        write_atomically(tmp_path / "private", "new")
    finally:
        os.umask(before)

    assert [found for _, found in seen] == [0o600]
    assert mode(tmp_path / "private") == 0o600


def test_nobody_can_tell_the_name_of_a_temporary_file(tmp_path, monkeypatch):
    names = set()
    monkeypatch.setattr(os, "fsync", lambda _descriptor: names.update(names_in(tmp_path)))

    for _ in range(3):
        write_atomically(tmp_path / "file", "new")

    names -= {"file"}
    assert len(names) == 3
    assert all(re.fullmatch(r"\.ezmia-[0-9a-f]{32}\.tmp", name) for name in names)


def test_a_temporary_file_is_never_one_that_is_there(tmp_path, monkeypatch):
    """Whoever guessed the name and put a link there gets nothing written through it."""
    elsewhere, link = tmp_path / "elsewhere", tmp_path / f".ezmia-{'0' * 32}.tmp"
    elsewhere.write_text("theirs")
    link.symlink_to(elsewhere)
    monkeypatch.setattr(secrets, "token_hex", lambda n_bytes: "0" * 2 * n_bytes)

    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", "new")

    assert elsewhere.read_text() == "theirs"
    assert link.is_symlink()
    assert not (tmp_path / "file").exists()


def test_a_link_in_the_place_of_a_file_is_replaced_and_what_it_names_stays(tmp_path):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "link"
    elsewhere.write_text("theirs")
    link.symlink_to(elsewhere)

    write_atomically(link, "new", mode=FOR_OTHERS)

    assert elsewhere.read_text() == "theirs"
    assert not link.is_symlink()
    assert link.read_text() == "new"


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_copy_is_its_owners_alone_and_goes_through_no_link(tmp_path):
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    source.write_text("weights")
    elsewhere.write_text("theirs")
    (tmp_path / "copy").symlink_to(elsewhere)

    copy_private(source, tmp_path / "copy")

    assert (tmp_path / "copy").read_text() == "weights"
    assert (mode(source), mode(tmp_path / "copy")) == (0o644, 0o600)
    assert elsewhere.read_text() == "theirs"


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "source").write_text("weights")

    def fail(_descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        copy_private(tmp_path / "source", tmp_path / "copy")

    assert names_in(tmp_path) == ["source"]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    script = (
        "import os, pathlib, runpy, sys\n"
        "os.fsync = lambda descriptor: os._exit(9)\n"
        "runpy.run_path(sys.argv[1])['write_atomically'](pathlib.Path(sys.argv[2]), 'new')\n"
    )
    subprocess.run([sys.executable, "-c", script, files.__file__, tmp_path / "file"], check=False)
    others = [".ezmia-notes.tmp", ".ezmia", "file.tmp"]
    for name in others:
        (tmp_path / name).write_text("theirs")
    assert len(names_in(tmp_path)) == 4

    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "nowhere")

    assert names_in(tmp_path) == sorted(others)


def test_trying_a_folder_touches_no_file_of_it(tmp_path):
    (tmp_path / ".writable").write_text("theirs")

    check_writable(tmp_path)

    assert (tmp_path / ".writable").read_text() == "theirs"
    assert names_in(tmp_path) == [".writable"]


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_folder_is_made_for_its_owner_alone_and_one_that_is_there_stays_as_it_is(tmp_path):
    check_writable(tmp_path / "above" / "run")
    (tmp_path / "mine").mkdir()
    check_writable(tmp_path / "mine")

    modes = [mode(tmp_path / name) for name in ("above", "above/run", "mine")]
    assert modes == [0o755, 0o700, 0o755]
