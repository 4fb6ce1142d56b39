import os
import re
import threading

import pytest
import torch
from torch import nn

from ezmia_callbacks.audit import kept, kept_weights, weight_files
from ezmia_callbacks.audit.imprint import Imprint
from ezmia_callbacks.audit.kept import Kept
from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.errors import AuditError


@pytest.fixture(params=["memory", "disk"])
def snapshot(request, tmp_path):
    return KeptWeights(None if request.param == "memory" else tmp_path / "run" / "kept")


def make_model(*, dtype=torch.float32, momentum=0.1):
    """Weights and buffers of every kind; the batch norm has persistent ones, `scratch` is not."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 2))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def disturb(model):
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)


def bits(model):
    return {name: t.clone().view(torch.uint8) for name, t in model.state_dict().items() if t.dim()} | {
        name: t.clone() for name, t in model.state_dict().items() if not t.dim()
    }


def differing(model, expected):
    return [name for name, tensor in bits(model).items() if not torch.equal(tensor, expected[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_buffers_come_back_bit_for_bit(snapshot, dtype):
    model = make_model(dtype=dtype)
    with torch.no_grad():
        model[0].bias[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    expected, addresses = bits(model), [p.data_ptr() for p in model.parameters()]
    snapshot.save(model, step=1)
    disturb(model)
    assert len(differing(model, expected)) == len(expected)

    snapshot.restore(model)

    assert differing(model, expected) == []
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_kept_weights_do_not_follow_the_model(snapshot):
    model = make_model()
    expected = bits(model)
    snapshot.save(model, step=1)
    for _ in range(2):
        disturb(model)

        snapshot.restore(model)

        assert differing(model, expected) == []


def test_a_second_save_replaces_the_first(snapshot):
    model = make_model()
    snapshot.save(model, step=1)
    disturb(model)
    expected = bits(model)
    snapshot.save(model, step=1)
    disturb(model)

    snapshot.restore(model)

    assert differing(model, expected) == []


def train(model):
    """One step of an optimizer, on all that is trained now."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()


def begin(snapshot, model, *, step=0):
    snapshot.begin(model, Imprint.of(model))
    snapshot.save(model, step=step)


def look(snapshot, model):
    return snapshot.look(model, Imprint.of(model))


def test_weights_that_stay_frozen_and_scratch_buffers_are_not_kept(snapshot, tmp_path):
    model = make_model()
    model[0].requires_grad_(False)
    begin(snapshot, model)
    train(model)
    model.scratch.add_(1)

    assert look(snapshot, model) == ""
    snapshot.restore(model)

    assert torch.equal(model.scratch, torch.ones(2))
    for path in tmp_path.rglob("*.safetensors"):
        assert not any(name.startswith("0.") for name in weight_files.forms_in(path))


def test_a_parameter_frozen_after_the_snapshot_is_put_back_too(snapshot):
    model = make_model()
    expected = bits(model)
    begin(snapshot, model)
    disturb(model)
    model[2].requires_grad_(False)

    snapshot.restore(model)

    assert differing(model, expected) == []


def test_layers_trained_in_turns_come_back_whole(snapshot):
    model = make_model()
    expected = bits(model)
    model[2].requires_grad_(False)
    begin(snapshot, model)
    for trained, frozen in ((0, 2), (2, 0), (0, 2)):
        model[trained].requires_grad_(True)
        model[frozen].requires_grad_(False)
        train(model)
        train(model)
        assert look(snapshot, model) == ""

    snapshot.restore(model)

    assert differing(model, expected) == []


def test_a_layer_that_begins_to_be_trained_is_kept_from_then_on(snapshot):
    model = make_model()
    model[2].requires_grad_(False)
    begin(snapshot, model)
    model[2].requires_grad_(True)
    train(model)
    model[2].requires_grad_(False)
    look(snapshot, model)
    expected = bits(model)
    snapshot.save(model, step=2)
    model[2].requires_grad_(True)
    train(model)

    assert snapshot.restore(model).step == 2

    assert differing(model, expected) == []


def test_what_begins_to_be_trained_while_a_write_is_under_way_is_kept_for_both(tmp_path, monkeypatch):
    snapshot, model = KeptWeights(tmp_path / "kept"), make_model()
    model[2].requires_grad_(False)
    begin(snapshot, model)
    snapshot.settle()
    expected = bits(model)
    may_write = hold_writes(monkeypatch, fail=True)
    snapshot.save(model, step=1)
    model[2].requires_grad_(True)
    train(model)
    may_write.set()

    with pytest.raises(OSError, match="full"):
        snapshot.settle()
    assert snapshot.restore(model).step == 0

    assert differing(model, expected) == []


def hold_writes(monkeypatch, *, fail=False):
    """Have the next writes wait until this event is set."""
    event, write = threading.Event(), weight_files.write_tensors

    def held(path, tensors):
        assert event.wait(30)
        if fail:
            raise OSError(28, "the disk is full")
        write(path, tensors)

    monkeypatch.setattr(kept_weights, "write_tensors", held)
    return event


def test_a_frozen_tensor_that_moved_unseen_is_named_and_nothing_is_put_back(snapshot):
    model = make_model()
    model[2].requires_grad_(False)
    begin(snapshot, model)
    # As adapters are merged into their base: no counter tells.
    model[2].weight.data += 1
    train(model)
    present = bits(model)

    assert look(snapshot, model) == "1 tensors that were frozen then are others now (first: 2.weight)"
    with pytest.raises(AuditError, match=r"step 0 cannot be put back whole: 1 tensors .* 2\.weight"):
        snapshot.restore(model)

    assert differing(model, present) == []


def test_a_frozen_tensor_that_moved_is_kept_from_then_on(snapshot):
    model = make_model()
    model[2].requires_grad_(False)
    begin(snapshot, model)
    model[2].weight.data += 1
    look(snapshot, model)
    expected = bits(model)
    snapshot.save(model, step=1)
    model[2].weight.data += 1
    train(model)

    assert look(snapshot, model) == ""
    snapshot.restore(model)

    assert differing(model, expected) == []


def test_a_parameter_removed_after_the_snapshot_is_refused(snapshot):
    model = make_model()
    begin(snapshot, model)
    del model[2]

    reason = r"the model had 9 tensors then and has 7 now \(first that differs: 2\.bias\)"
    assert re.search(reason, look(snapshot, model))
    with pytest.raises(AuditError, match=reason):
        snapshot.restore(model)


def test_a_layer_of_another_size_is_refused_and_nothing_is_touched(snapshot):
    model = make_model()
    begin(snapshot, model)
    train(model)
    model[2] = nn.Linear(4, 3)
    present = bits(model)

    reason = r"2 tensors have another shape or type now \(first: 2\.bias\)"
    with pytest.raises(AuditError, match=reason):
        snapshot.restore(model)

    assert differing(model, present) == []


def test_large_quantized_buffers_are_watched_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_weights, "_LARGE_BUFFER", 8)
    model = make_model()
    model.register_buffer("packed", torch.arange(16, dtype=torch.int32))
    snapshot = KeptWeights(tmp_path)
    begin(snapshot, model)
    snapshot.settle()

    (path,) = tmp_path.glob("*.safetensors")
    assert "packed" not in weight_files.forms_in(path)
    assert look(snapshot, model) == ""
    model.packed += 1
    assert "packed" in look(snapshot, model)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        mask = torch.ones(2)
        self.first, self.second = nn.Identity(), nn.Identity()
        self.first.register_buffer("mask", mask)
        self.second.register_buffer("mask", mask)


def test_tied_weights_and_shared_buffers_come_back_and_stay_tied(snapshot):
    model = Tied()
    expected = bits(model)
    snapshot.save(model, step=1)
    disturb(model)

    snapshot.restore(model)

    assert differing(model, expected) == []
    assert model.head.weight is model.embedding.weight
    assert model.first.mask is model.second.mask


def test_nothing_kept_cannot_be_put_back(snapshot):
    assert not snapshot.exists
    with pytest.raises(AuditError, match="no weights to restore"):
        snapshot.restore(make_model())


def test_discarded_weights_are_gone(snapshot, tmp_path):
    snapshot.save(make_model(), step=1)
    assert snapshot.exists

    snapshot.discard()

    assert not snapshot.exists
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(AuditError, match="no weights to restore"):
        snapshot.restore(make_model())


@pytest.mark.parametrize("small", [0, 2**30], ids=["in files alone", "small"])
def test_weights_on_disk_outlive_the_object(tmp_path, monkeypatch, small):
    monkeypatch.setattr(kept_weights, "_SMALL", small)
    model = make_model()
    expected = bits(model)
    first = KeptWeights(tmp_path / "kept")
    first.save(model, step=3, sample=[-1.25, -0.1])
    first.settle()
    disturb(model)

    snapshot = KeptWeights(tmp_path / "kept")
    assert (snapshot.exists, snapshot.step) == (True, 3)
    assert snapshot.restore(model).sample == (-1.25, -0.1)

    assert differing(model, expected) == []


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_process_that_keeps_nothing_leaves_the_folder_to_the_one_that_is_about_to_write(
    tmp_path, monkeypatch, is_pinned
):
    """Removed between the main process's making of the folder and its opening of a file, it is not there."""
    snapshot, model, folder = KeptWeights(tmp_path / "kept"), make_model(), tmp_path / "kept"
    if is_pinned:
        snapshot.expect_checkpoint(model, step=1, present=Imprint.of(model))
    # As the second of two processes that hold the same weights.
    monkeypatch.setattr(kept_weights, "is_main_process", lambda: False)
    monkeypatch.setattr(kept_weights, "rank", lambda: 1)
    monkeypatch.setattr(kept_weights, "broadcast_from_main", lambda value: True)
    folder.mkdir(exist_ok=True)

    if is_pinned:
        snapshot.pin(model, tmp_path)
    else:
        snapshot.save(model, step=1)

    assert list(tmp_path.iterdir()) == [folder]


def test_files_are_the_owners_alone(tmp_path):
    snapshot = KeptWeights(tmp_path / "kept")
    snapshot.save(make_model(), step=3)
    snapshot.settle()

    assert (tmp_path / "kept").stat().st_mode & 0o77 == 0
    for path in (tmp_path / "kept").iterdir():
        assert path.stat().st_mode & 0o77 == 0, path


def test_training_goes_on_while_weights_are_written(tmp_path, monkeypatch):
    snapshot, model = KeptWeights(tmp_path / "kept"), make_model()
    expected = bits(model)
    may_write = hold_writes(monkeypatch)

    snapshot.save(model, step=1)
    disturb(model)
    may_write.set()
    snapshot.settle()
    snapshot.restore(model)

    assert differing(model, expected) == []


def test_at_most_one_write_is_under_way_and_the_next_waits_for_it(tmp_path, monkeypatch):
    snapshot, model, under_way, most = KeptWeights(tmp_path / "kept"), make_model(), [0], [0]
    write = weight_files.write_tensors

    def counted(path, tensors):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        write(path, tensors)
        under_way[0] -= 1

    monkeypatch.setattr(kept_weights, "write_tensors", counted)
    for step in range(20):
        snapshot.save(model, step=step)
        # The old one and the new one at most.
        assert len(list(tmp_path.rglob("*.safetensors"))) <= 2
    snapshot.settle()

    assert most == [1]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_without_memory_for_a_copy_they_are_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_weights, "has_memory_for", lambda n_bytes: False)
    monkeypatch.setattr(kept_weights, "_copies", None)
    snapshot, model = KeptWeights(tmp_path / "kept"), make_model()
    expected = bits(model)

    snapshot.save(model, step=1)
    disturb(model)
    snapshot.restore(model)

    assert differing(model, expected) == []


def _full_disk(monkeypatch):
    def fail(_write, _content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "_write", fail)


def _failing_sync(monkeypatch):
    def fail(_descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("break_disk", [_full_disk, _failing_sync])
def test_a_failing_write_is_told_before_the_next_and_keeps_the_old_weights(tmp_path, monkeypatch, break_disk):
    model, snapshot = make_model(), KeptWeights(tmp_path)
    expected = bits(model)
    snapshot.save(model, step=1)
    snapshot.settle()
    files = sorted(tmp_path.iterdir())
    disturb(model)

    with monkeypatch.context() as patch:
        break_disk(patch)
        snapshot.save(model, step=2)
        with pytest.raises(OSError, match=r"No space|Input/output"):
            snapshot.settle()

    assert sorted(tmp_path.iterdir()) == files
    assert snapshot.restore(model).step == 1
    assert differing(model, expected) == []


def test_what_a_killed_process_left_half_written_is_neither_taken_nor_left(tmp_path):
    model = make_model()
    first = KeptWeights(tmp_path)
    first.save(model, step=1)
    first.settle()
    expected = bits(model)
    half = tmp_path / "0-2-0.safetensors"
    half.write_bytes(b"half")
    disturb(model)

    snapshot = KeptWeights(tmp_path)
    assert snapshot.restore(model).step == 1
    assert differing(model, expected) == []
    snapshot.save(model, step=2)
    snapshot.settle()
    assert not half.exists()
    assert KeptWeights(tmp_path).step == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_files_are_an_error(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(kept_weights, "_SMALL", 0)
    snapshot, model = KeptWeights(tmp_path), make_model()
    snapshot.save(model, step=1)
    snapshot.settle()
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[-3] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-8])

    with pytest.raises(AuditError, match="damaged"):
        snapshot.restore(model)


def test_a_model_that_is_not_what_was_put_back_is_an_error(snapshot, monkeypatch):
    """Something else writes into the model, or nothing is written at all."""
    model = make_model()
    begin(snapshot, model)
    train(model)
    monkeypatch.setattr(kept, "as_form", lambda tensor, like: like)

    with pytest.raises(AuditError, match=r"\d tensors are not those of step 0 although they were put back"):
        snapshot.restore(model)


def test_counting_them_as_those_of_another_step_writes_no_weights_again(tmp_path, monkeypatch):
    snapshot = KeptWeights(tmp_path)
    snapshot.save(make_model(), step=5)
    snapshot.settle()
    monkeypatch.setattr(kept_weights, "write_tensors", None)

    snapshot.relabel(step=0)

    assert KeptWeights(tmp_path).step == 0


# A checkpoint of the trainer's own.


@pytest.fixture
def pinning(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_weights, "_SMALL", 0)
    return KeptWeights(tmp_path / "kept")


def write_checkpoint(folder, model, *, change=None):
    folder.mkdir()
    tensors = dict(model.state_dict())
    if change is not None:
        change(tensors)
    weight_files.write_tensors(folder / "model.safetensors", tensors)
    return folder


def expect(snapshot, model, *, step):
    snapshot.expect_checkpoint(model, step=step, present=Imprint.of(model), sample=[-1.0])


def test_a_checkpoint_is_pinned_and_outlives_the_trainers(pinning, tmp_path, monkeypatch):
    model = make_model()
    begin(pinning, model)
    train(model)
    expected = bits(model)
    pinning.settle()
    monkeypatch.setattr(kept_weights, "write_tensors", None)
    expect(pinning, model, step=4)
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4", model)
    pinning.pin(model, checkpoint)
    train(model)
    (checkpoint / "model.safetensors").unlink()

    for snapshot in (pinning, KeptWeights(tmp_path / "kept")):
        found = snapshot.restore(model)
        assert (found.step, found.sample, differing(model, expected)) == (4, (-1.0,), [])
        train(model)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 1


def no_links(*_names):
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize(
    ("change", "link"),
    [
        (lambda tensors: tensors.pop("2.weight"), os.link),
        (lambda tensors: tensors.update({"2.weight": tensors["2.weight"].half()}), os.link),
        (None, no_links),
    ],
    ids=["a tensor is missing", "another precision", "no hard links"],
)
def test_a_checkpoint_that_cannot_stand_for_the_weights_is_not_taken(
    pinning, tmp_path, monkeypatch, change, link
):
    monkeypatch.setattr(os, "link", link)
    model = make_model()
    begin(pinning, model)
    train(model)
    expected = bits(model)
    expect(pinning, model, step=4)
    pinning.pin(model, write_checkpoint(tmp_path / "checkpoint-4", model, change=change))
    train(model)

    assert pinning.restore(model).step == 4

    assert differing(model, expected) == []
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "kept").iterdir())


def test_a_pinned_file_that_was_rewritten_in_place_is_damaged_and_the_model_stays(pinning, tmp_path):
    model = make_model()
    begin(pinning, model)
    train(model)
    expect(pinning, model, step=4)
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4", model)
    pinning.pin(model, checkpoint)
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    train(model)
    present = bits(model)

    with pytest.raises(AuditError, match="The kept weights of step 4 are damaged: 1 tensors"):
        pinning.restore(model)

    assert differing(model, present) == []


def test_weights_whose_checkpoint_does_not_come_are_saved_before_the_next_step(pinning):
    model = make_model()
    begin(pinning, model)
    train(model)
    expected = bits(model)
    expect(pinning, model, step=4)
    pinning.save_expected(model)
    train(model)

    assert pinning.restore(model).step == 4

    assert differing(model, expected) == []


def test_weights_that_have_changed_before_their_checkpoint_came_are_not_kept_as_theirs(pinning):
    model = make_model()
    begin(pinning, model)
    expect(pinning, model, step=4)
    train(model)

    with pytest.raises(AuditError, match="changed before the trainer wrote"):
        pinning.save_expected(model)
    assert pinning.step == 0


def test_a_pinned_checkpoint_that_is_written_anew_after_a_restart_does_not_change_what_is_kept(
    pinning, tmp_path
):
    model = make_model()
    begin(pinning, model)
    train(model)
    expected = bits(model)
    expect(pinning, model, step=4)
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4", model)
    pinning.pin(model, checkpoint)
    pinning.settle()

    pinning.relabel(step=0)
    (checkpoint / "model.safetensors").write_bytes(b"another run's")
    train(model)
    pinning.restore(model)

    assert differing(model, expected) == []


def test_a_checkpoint_that_was_expected_in_a_run_that_broke_off_is_forgotten(pinning):
    model = make_model()
    begin(pinning, model)
    expect(pinning, model, step=4)
    pinning.forget_expected()
    train(model)

    pinning.save_expected(model)

    assert pinning.step == 0


def test_memory_that_a_tensor_repeats_is_written_once(snapshot):
    model = make_model()
    model.register_buffer("repeated", torch.zeros(1, 3).expand(4, 3))
    begin(snapshot, model)
    with torch.no_grad():
        model.repeated[:1].add_(1)
    train(model)

    snapshot.restore(model)

    assert torch.equal(model.repeated, torch.zeros(4, 3))


def test_who_is_interrupted_while_waiting_loses_neither_the_old_nor_the_new(tmp_path, monkeypatch):
    snapshot, model = KeptWeights(tmp_path), make_model()
    begin(snapshot, model)
    snapshot.settle()
    train(model)
    expected = bits(model)
    may_write = hold_writes(monkeypatch)
    snapshot.save(model, step=2)

    def interrupt(_futures):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            snapshot.settle()
    may_write.set()
    train(model)

    assert snapshot.restore(model).step == 2
    assert differing(model, expected) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("of a library")])
def test_what_fails_at_the_very_end_ends_no_script(tmp_path, monkeypatch, error):
    snapshot, model = KeptWeights(tmp_path / "kept"), make_model()
    begin(snapshot, model)
    snapshot.settle()

    def fail(_path, _tensors):
        raise error

    monkeypatch.setattr(kept_weights, "write_tensors", fail)
    snapshot.save(model, step=1)
    snapshot.discard()

    assert not snapshot.exists


def test_a_folder_that_became_a_file_ends_no_script(tmp_path):
    import shutil

    snapshot = KeptWeights(tmp_path / "kept")
    begin(snapshot, make_model())
    snapshot.settle()
    shutil.rmtree(tmp_path / "kept")
    (tmp_path / "kept").write_text("in the way")

    snapshot.discard()


def test_what_is_written_beside_the_files_comes_back():
    model = make_model()
    imprint = Imprint({"0.bias": -(2**62), "0.weight": 2**63 - 1}, "['default']")
    forms = {"0.bias": weight_files.Form.of(model[0].bias)}
    written = Kept(7, True, imprint, forms, (-1.5, 0.1), ("0-7-0.safetensors",), run_id="a")

    read = Kept.from_json(written.to_json())

    assert read.imprint.digest == imprint.digest
    assert (read.step, read.is_everybodys, read.forms, read.run_id) == (7, True, forms, "a")
    assert (read.sample, read.files, read.tensors) == ((-1.5, 0.1), ("0-7-0.safetensors",), None)


@pytest.mark.parametrize(
    "name", ["../0-1-0.safetensors", "/etc/0-1-0.safetensors", "0-1-0.pt", "", "a/0-1-0.safetensors"]
)
def test_kept_weights_are_never_read_from_another_folder(name):
    imprint = Imprint({"w": 1})

    def text(name):
        return Kept(1, True, imprint, {}, (), (name,)).to_json()

    assert Kept.from_json(text("0-1-0.safetensors")).files == ("0-1-0.safetensors",)
    with pytest.raises(AuditError, match="is no file of kept weights"):
        Kept.from_json(text(name))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"step": 1}', '{"step": NaN}'])
def test_a_description_of_kept_weights_that_is_none_is_an_error(text):
    with pytest.raises(AuditError):
        Kept.from_json(text)
