import os

import pytest
import torch
from torch import nn

from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.errors import AuditError


@pytest.fixture(params=["memory", "disk"])
def snapshot(request, tmp_path):
    return KeptWeights(None if request.param == "memory" else tmp_path / "run" / "weights.pt")


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


def test_frozen_weights_and_scratch_buffers_are_not_kept(snapshot):
    model = make_model()
    model[0].requires_grad_(False)
    snapshot.save(model, step=1)
    expected = bits(model)
    disturb(model)

    snapshot.restore(model)

    assert differing(model, expected) == ["0.weight", "0.bias"]
    assert torch.equal(model.scratch, torch.ones(2))


def test_a_parameter_frozen_after_the_snapshot_is_put_back_too(snapshot):
    model = make_model()
    expected = bits(model)
    snapshot.save(model, step=1)
    disturb(model)
    model[2].requires_grad_(False)

    snapshot.restore(model)

    assert differing(model, expected) == []


def test_a_parameter_unfrozen_after_the_snapshot_is_refused_and_nothing_is_touched(snapshot):
    model = make_model()
    model[2].requires_grad_(False)
    snapshot.save(model, step=1)
    disturb(model)
    model[2].requires_grad_(True)
    present = bits(model)

    with pytest.raises(AuditError, match=r"2 trainable weights were not trainable .* \(first: 2\.bias\)"):
        snapshot.restore(model)

    assert differing(model, present) == []


def test_a_parameter_removed_after_the_snapshot_is_refused(snapshot):
    model = make_model()
    snapshot.save(model, step=1)
    del model[2]

    with pytest.raises(AuditError, match=r"2 kept weights are no longer in the model \(first: 2\.bias\)"):
        snapshot.restore(model)


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


def test_weights_on_disk_outlive_the_object(tmp_path):
    model = make_model()
    expected = bits(model)
    KeptWeights(tmp_path / "weights.pt").save(model, step=1)
    disturb(model)

    snapshot = KeptWeights(tmp_path / "weights.pt")
    assert snapshot.exists
    snapshot.restore(model)

    assert differing(model, expected) == []


class FullDisk:
    """An open file on a disk that is full after a hundred bytes."""

    def __init__(self, file):
        self._file, self._n_left = file, 100

    def write(self, data):
        self._n_left -= len(data)
        if self._n_left < 0:
            raise OSError(28, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def _full_disk(monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda weights, file: save(weights, FullDisk(file)))


def _failing_sync(monkeypatch):
    def fail(_descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("break_disk", [_full_disk, _failing_sync])
def test_a_failing_write_is_an_os_error_and_keeps_the_old_weights(tmp_path, monkeypatch, break_disk):
    model, snapshot = make_model(), KeptWeights(tmp_path / "weights.pt")
    expected = bits(model)
    snapshot.save(model, step=1)
    disturb(model)

    with monkeypatch.context() as patch:
        break_disk(patch)
        with pytest.raises(OSError, match=r"cannot be written|Input/output"):
            snapshot.save(model, step=1)

    assert list(tmp_path.iterdir()) == [tmp_path / "weights.pt"]
    snapshot.restore(model)
    assert differing(model, expected) == []
