"""One writer for each folder."""

import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from ezmia_callbacks.audit import folder_lock
from ezmia_callbacks.audit.folder_lock import FolderLock
from ezmia_callbacks.errors import ConfigurationError

PROCESSES = multiprocessing.get_context("spawn")


def _take_and_wait(folder, taken):
    lock = FolderLock(folder)
    lock.take()
    taken.set()
    time.sleep(60)


def _try(folder, outcome):
    try:
        FolderLock(folder).take()
        outcome.put("taken")
    except ConfigurationError as error:
        outcome.put(str(error))


def of_another_process(folder):
    outcome = PROCESSES.Queue()
    process = PROCESSES.Process(target=_try, args=(folder, outcome))
    process.start()
    found = outcome.get(timeout=60)
    process.join()
    return found


@pytest.fixture
def other(tmp_path):
    """Another process that writes into the folder."""
    taken = PROCESSES.Event()
    process = PROCESSES.Process(target=_take_and_wait, args=(tmp_path, taken))
    process.start()
    assert taken.wait(60)
    yield process
    # Not by an event: to set one waits forever for a process that was killed while it waited for it.
    process.kill()
    process.join()


def test_a_folder_that_another_process_writes_to_is_refused_by_its_name(tmp_path, other):
    with pytest.raises(
        ConfigurationError, match=f"Another run writes to .*process {other.pid} on .*output_dir"
    ):
        FolderLock(tmp_path).take()


def test_what_a_crash_leaves_behind_locks_nobody_out(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert (tmp_path / ".writer.json").exists()

    FolderLock(tmp_path).take()


def test_no_other_process_writes_until_it_is_released(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()
    during = of_another_process(tmp_path)
    lock.release()

    assert during.startswith("Another run writes to")
    assert of_another_process(tmp_path) == "taken"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_run_that_nobody_holds_any_more_has_released_it(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()
    del lock
    gc.collect()

    assert of_another_process(tmp_path) == "taken"


def test_the_later_run_of_a_process_has_the_folder_and_the_earlier_cannot_go_on(tmp_path):
    earlier, later = FolderLock(tmp_path), FolderLock(tmp_path / ".." / tmp_path.name)
    earlier.take()
    later.take()

    later.hold()
    with pytest.raises(ConfigurationError, match="A later run of this process writes to"):
        earlier.hold()
    # It was not its own to give back.
    earlier.release()
    later.hold()
    assert of_another_process(tmp_path).startswith("Another run writes to")


def test_a_run_goes_on_after_it_was_released(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()

    lock.hold()

    assert of_another_process(tmp_path).startswith("Another run writes to")


_FORKING = """
import os, sys
from pathlib import Path
from ezmia_callbacks.audit.folder_lock import FolderLock

lock = FolderLock(Path(sys.argv[1]))
lock.take()
if os.fork() == 0:
    try:
        FolderLock(Path(sys.argv[1])).take()
    except ValueError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
lock.hold()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_has_not_got_it(tmp_path):
    told = subprocess.run(
        [sys.executable, "-c", _FORKING, str(tmp_path)], check=True, capture_output=True, text=True
    )

    assert told.stdout.startswith("Another run writes to")


_FORKING_A_CHILD_THAT_ENDS = """
import os, sys
from pathlib import Path
from ezmia_callbacks.audit.folder_lock import FolderLock

lock = FolderLock(Path(sys.argv[1]))
lock.take()
if os.fork() == 0:
    sys.exit(0)
os.wait()
print("ended", flush=True)
sys.stdin.read()
"""

_FORKING_A_CHILD_THAT_OUTLIVES_IT = """
import os, signal, sys, time
from pathlib import Path
from ezmia_callbacks.audit.folder_lock import FolderLock

lock = FolderLock(Path(sys.argv[1]))
lock.take()
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_that_ends_takes_no_lock_with_it(tmp_path):
    command = [sys.executable, "-c", _FORKING_A_CHILD_THAT_ENDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ended\n"

        assert of_another_process(tmp_path).startswith("Another run writes to")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_that_outlives_its_killed_parent_locks_nobody_out(tmp_path):
    command = [sys.executable, "-c", _FORKING_A_CHILD_THAT_OUTLIVES_IT, str(tmp_path)]
    child = int(subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True).stdout)

    try:
        assert of_another_process(tmp_path) == "taken"
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_system_that_knows_no_locks_gets_no_file_that_a_crash_would_leave_locked(
    tmp_path, monkeypatch, caplog
):
    fcntl = pytest.importorskip("fcntl")

    def flock(_file, _operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)

    FolderLock(tmp_path).take()

    assert "cannot lock it" in caplog.text


def test_a_file_system_without_locks_is_named_once(tmp_path, monkeypatch, caplog):
    def acquire(_self):
        raise NotImplementedError("no flock")

    monkeypatch.setattr(folder_lock.FileLock, "acquire", acquire)
    lock = FolderLock(tmp_path)

    lock.take()
    lock.hold()

    assert caplog.text.count("cannot lock it (no flock)") == 1


def test_files_of_the_lock_are_the_owners_alone(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()

    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        ".lock": 0o600,
        ".writer.json": 0o600,
    }


def test_a_damaged_word_on_who_writes_costs_nothing(tmp_path, other):
    (tmp_path / ".writer.json").write_text("half {")

    with pytest.raises(ConfigurationError, match=r"Another run writes to [^(]*: give each run"):
        FolderLock(tmp_path).take()
