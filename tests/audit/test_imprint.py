import torch
from torch import nn

from ezmia_callbacks.audit.imprint import Imprint, named_tensors


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    model.register_buffer("top", torch.zeros(2))
    return model


def test_parameters_and_persistent_buffers_are_in_it_and_nothing_else():
    model = make_model()
    assert sorted(name for name, _ in named_tensors(model)) == sorted(model.state_dict())
    assert sorted(Imprint.of(model).checksums) == sorted(model.state_dict())


def test_a_model_is_known_again_and_a_changed_one_is_not():
    model = make_model()
    before = Imprint.of(model)
    model.scratch += 1
    assert Imprint.of(model).is_same_as(before)

    model[0].weight.data[1, 2] += 1e-6  # what autograd's counters do not tell

    assert not Imprint.of(model).is_same_as(before)
    assert Imprint.of(model).differing(before) == ["0.weight"]


def test_tensors_that_come_and_go_differ():
    model = make_model()
    before = Imprint.of(model)
    model.append(nn.Linear(1, 1, bias=False))
    del model.top

    assert before.differing(Imprint.of(model)) == ["2.weight", "top"]


def test_a_compiled_model_has_the_names_of_the_model():
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    assert Imprint.of(compiled).is_same_as(Imprint.of(model))


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert list(Imprint.of(model).checksums) == ["0.weight"]
