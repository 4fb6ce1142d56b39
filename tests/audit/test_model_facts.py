from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ezmia_callbacks.audit.model_facts import name_of, parameters_of


def named(name):
    model = nn.Linear(2, 3)
    model.config = SimpleNamespace(_name_or_path=name)
    return model


def test_a_model_is_named_as_it_was_loaded():
    assert name_of(named("openai-community/gpt2")) == "openai-community/gpt2"


def test_where_a_folder_lies_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "ours").mkdir(parents=True)

    assert name_of(named(str(tmp_path / "models" / "ours"))) == "ours"
    assert name_of(named("models/ours")) == "ours"
    assert name_of(named("/home/jane.doe/gone")) == "gone"


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_model_without_a_name_is_named_by_its_class(name):
    assert name_of(named(name)) == "Linear"
    assert name_of(nn.Sequential(named(name))) == "Sequential"


def test_frozen_parameters_are_counted_apart():
    model = nn.Sequential(nn.Linear(100, 20), nn.Linear(20, 1))
    model[0].requires_grad_(False)

    assert parameters_of(model) == "2,041, of which 21 trained"


def test_partitioned_and_packed_parameters_count_whole():
    class Params4bit(nn.Parameter):
        pass

    model = nn.Module()
    model.packed = Params4bit(torch.zeros(50, dtype=torch.uint8), requires_grad=False)
    model.part = nn.Parameter(torch.zeros(0))
    model.part.ds_numel = 1_000

    assert parameters_of(model) == "1,100, of which 1,000 trained"
