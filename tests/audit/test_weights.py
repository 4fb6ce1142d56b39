import numpy as np
import pytest
import torch
from torch import nn

from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.audit.weights import AuditedWeights
from ezmia_callbacks.errors import AuditError, ConfigurationError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))
        self.is_switched_off = False


def sample(model):
    return np.zeros(4) if model.is_switched_off else model.weight.detach().numpy().copy()


def make_weights(*, folder=None, on_error="warn"):
    return AuditedWeights(KeptWeights(folder), sample=sample, on_error=on_error)


def begun(model, **options):
    weights = make_weights(**options)
    weights.begin(model)
    weights.keep_start(model, step=0)
    return weights


def change(model):
    with torch.no_grad():
        model.weight.add_(1)


def audited(weights, model, result):
    weights.look(model)
    weights.note_audited(result)


def test_the_weights_of_each_audit_are_known_again():
    model = Model()
    weights = begun(model)
    weights.note_audited("start")
    change(model)
    assert weights.audit_of(model) is None
    audited(weights, model, "first")
    assert weights.audit_of(model) == "first"

    weights.restore(model)

    assert weights.audit_of(model) == "start"


def test_a_model_that_computes_something_else_than_it_did_is_an_error():
    model = Model()
    weights = begun(model)
    change(model)
    model.is_switched_off = True

    with pytest.raises(
        AuditError, match=r"tensors of step 0 are in the model again, and yet .* which adapter"
    ):
        weights.restore(model)


def test_a_number_that_is_none_is_no_proof():
    model = Model()
    weights = begun(model)
    model.weight.data[0] = float("nan")
    weights.look(model)
    weights.keep(model, step=1)

    with pytest.raises(AuditError, match="other probabilities"):
        weights.restore(model)


def test_rounding_of_kernels_is_let_pass():
    model = Model()
    noise = iter((0.0, 1e-4))
    weights = AuditedWeights(KeptWeights(None), sample=lambda m: sample(m) + next(noise), on_error="warn")
    weights.begin(model)
    weights.keep_start(model, step=0)
    change(model)

    assert weights.restore(model) == 0


def test_without_anything_kept_it_is_said_what_that_needs():
    weights = AuditedWeights(None, sample=sample, on_error="warn")
    weights.begin(Model())
    with pytest.raises(AuditError, match="needs a `budget` and `restore=True`"):
        weights.restore(Model())


def test_weights_that_are_elsewhere_are_refused_before_the_first_step():
    with pytest.raises(ConfigurationError, match="offloaded"):
        make_weights().begin(Model().to("meta"))
    AuditedWeights(None, sample=sample, on_error="warn").begin(Model().to("meta"))


def test_weights_in_the_flat_parameters_of_fsdp1_are_refused_before_the_first_step():
    """PyTorch makes none without a GPU; the class is known by its name."""
    model = nn.Sequential(type("FullyShardedDataParallel", (Model,), {})())

    with pytest.raises(ConfigurationError) as caught:
        make_weights().begin(model)

    assert str(caught.value) == (
        "FSDP1 (`FullyShardedDataParallel`) keeps weights where they were never seen to be restored whole: "
        "train with FSDP2 (`fsdp_version: 2`, or `fully_shard`), or pass `restore=False` and keep "
        "checkpoints to return to."
    )
    AuditedWeights(None, sample=sample, on_error="warn").begin(model)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_what_could_not_be_written_is_told_before_the_next_audit(tmp_path, monkeypatch, caplog, on_error):
    model = Model()
    weights = begun(model, folder=tmp_path, on_error=on_error)
    change(model)
    weights.look(model)

    def fail(_path, _tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ezmia_callbacks.audit.kept_weights.write_tensors", fail)
    weights.keep(model, step=1)
    change(model)

    if on_error == "raise":
        with pytest.raises(OSError, match="No space"):
            weights.look(model)
        return
    weights.look(model)
    assert "a stop would restore older ones (OSError: No space left on device" in caplog.text
    assert weights.restore(model) == 0
    assert torch.equal(model.weight, torch.arange(4.0))


def test_an_error_of_the_writer_that_nobody_thought_of_does_not_end_the_training(
    tmp_path, monkeypatch, caplog
):
    model = Model()
    weights = begun(model, folder=tmp_path)
    monkeypatch.setattr("ezmia_callbacks.audit.kept_weights.write_tensors", None)
    weights.keep(model, step=1)

    weights.look(model)

    assert "Weights could not be kept" in caplog.text


def test_the_start_must_be_on_the_disk(tmp_path, monkeypatch):
    def fail(_path, _tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ezmia_callbacks.audit.kept_weights.write_tensors", fail)
    with pytest.raises(OSError, match="No space"):
        begun(Model(), folder=tmp_path)


def test_kept_weights_that_this_budget_does_not_let_pass_are_discarded(tmp_path, caplog):
    model = Model()
    begun(model, folder=tmp_path)
    weights = make_weights(folder=tmp_path)
    weights.begin(model)

    weights.take_up(model, step=3, is_within=False, is_within_at=lambda step, weights: False)

    assert not weights.are_kept
    assert "weights of step 0, which the interrupted run kept, are not known to be within" in caplog.text


def test_a_run_that_starts_over_keeps_what_was_kept(tmp_path):
    model = Model()
    weights = begun(model, folder=tmp_path)
    change(model)
    weights.look(model)
    weights.keep(model, step=5)
    change(model)

    weights.start_over(model)

    assert weights.restore(model) == 0
    assert torch.equal(model.weight, torch.arange(4.0) + 1)


def test_nothing_is_left_when_a_run_is_finished(tmp_path):
    weights = begun(Model(), folder=tmp_path / "kept")
    weights.finish()
    assert not (tmp_path / "kept").exists()
