import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ezmia_callbacks.audit import weight_files
from ezmia_callbacks.audit.weight_files import (
    Background,
    Form,
    as_form,
    forms_in,
    has_memory_for,
    read_tensors,
    write_tensors,
)
from ezmia_callbacks.errors import AuditError

KNOWN = list(weight_files._NAMES)
UNKNOWN = [torch.complex64, torch.uint16]


def make_tensor(dtype, shape=(3, 5)):
    values = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(torch.int32).to(dtype) if dtype == torch.uint16 else values.to(dtype)


def read(path, names):
    found = {}
    read_tensors([path], names, found.__setitem__)
    return found


@pytest.mark.parametrize("dtype", KNOWN, ids=str)
def test_another_library_reads_what_was_written(tmp_path, dtype):
    tensors = {
        "matrix": make_tensor(dtype),
        "scalar": make_tensor(dtype, ()),
        "nothing": make_tensor(dtype, (0, 2)),
        "turned": make_tensor(dtype).t(),
    }
    write_tensors(tmp_path / "file", tensors)

    found = load_file(tmp_path / "file")

    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(
            found[name].contiguous().flatten().view(torch.uint8),
            tensor.contiguous().flatten().view(torch.uint8),
        )


@pytest.mark.parametrize("dtype", UNKNOWN, ids=str)
def test_types_that_the_format_does_not_know_come_back_as_they_were(tmp_path, dtype):
    tensor = make_tensor(dtype)
    write_tensors(tmp_path / "file", {"a": tensor})

    assert torch.equal(as_form(read(tmp_path / "file", ["a"])["a"], tensor), tensor)


def test_what_another_library_wrote_is_read(tmp_path):
    tensors = {"a": torch.randn(4, 3), "b": torch.arange(5)}
    save_file(tensors, tmp_path / "file")

    found = read(tmp_path / "file", ["b"])

    assert list(found) == ["b"]
    assert torch.equal(found["b"], tensors["b"])
    assert forms_in(tmp_path / "file") == {name: Form.of(tensor) for name, tensor in tensors.items()}


def test_tensors_may_be_in_several_files(tmp_path):
    write_tensors(tmp_path / "1", {"a": torch.ones(2)})
    write_tensors(tmp_path / "2", {"b": torch.zeros(2)})
    found = {}
    read_tensors([tmp_path / "1", tmp_path / "2"], ["b", "a"], found.__setitem__)
    assert sorted(found) == ["a", "b"]


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.ones(2)})
    with pytest.raises(AuditError, match=r"lack 1 tensors \(first: b\)"):
        read(tmp_path / "file", ["a", "b"])


@pytest.mark.parametrize("content", [b"", b"half a", b"\xff" * 100])
def test_a_file_of_another_kind_is_damaged_and_has_no_forms(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert forms_in(tmp_path / "file") == {}
    with pytest.raises(AuditError, match="are damaged"):
        read(tmp_path / "file", ["a"])


def test_a_file_is_its_owners_alone(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.ones(2)})
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    def fail(_write, _content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "_write", fail)
    with pytest.raises(OSError, match="No space"):
        write_tensors(tmp_path / "file", {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_writes_less_than_it_was_given_is_given_the_rest():
    written = bytearray()

    def write_a_little(content):
        written.extend(content[:3])
        return min(3, len(content))

    weight_files._write(write_a_little, b"0123456789")

    assert bytes(written) == b"0123456789"


def test_what_is_done_beside_is_waited_for_and_what_fails_is_raised_once():
    background, may_end = Background(), threading.Event()
    done = []
    background.start(lambda: (may_end.wait(30), done.append(1)))
    assert not done
    may_end.set()
    background.wait()
    assert done == [1]

    def fail():
        raise OSError("no")

    background.start(fail)
    background.join()
    with pytest.raises(OSError, match="no"):
        background.wait()
    background.wait()


def test_a_copy_that_would_take_half_of_the_memory_is_not_made(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _path: "MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    assert has_memory_for(499 * 1024)
    assert not has_memory_for(501 * 1024)


def test_where_the_memory_is_not_known_there_is_enough(monkeypatch):
    def fail(_path):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    assert has_memory_for(2**60)
