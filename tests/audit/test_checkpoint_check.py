import pytest
import torch
from restoring import make_adapted_model
from safetensors.torch import load_file, save_file
from tiny import make_model

from ezmia_callbacks.audit.checkpoint_check import other_weights_in
from ezmia_callbacks.audit.imprint import Imprint

pytestmark = [
    # peft reads a name that transformers 5 renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Could not find a config file.*:UserWarning"),
]


def other(model):
    """The same model with an average of its weights, say."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.9)
    return model


def train(model):
    """No parameter is the same in two models, also not one that starts with zeros."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(1e-3 * (i + 1))
    return model


def make_with_trained_copies():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return get_peft_model(make_model(), config)


@pytest.mark.parametrize("make", [make_model, make_adapted_model, make_with_trained_copies])
def test_a_checkpoint_of_the_audited_weights_is_told_from_one_of_others(tmp_path, make):
    model = train(make())
    audited = Imprint.of(model)
    model.save_pretrained(tmp_path / "same")
    other(model).save_pretrained(tmp_path / "other")

    assert other_weights_in(tmp_path / "same", model, audited) == []
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(other_weights_in(tmp_path / "other", model, audited)) == trained


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_pickled_weights_are_read_too(tmp_path, name):
    model = train(make_model())
    audited = Imprint.of(model)
    torch.save(other(model).state_dict(), tmp_path / name)
    assert other_weights_in(tmp_path, model, audited)


def test_a_single_tensor_is_named(tmp_path):
    model = train(make_model())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, tmp_path / "model.safetensors")

    assert other_weights_in(tmp_path, model, Imprint.of(model)) == ["transformer.ln_f.bias"]


def test_what_cannot_be_compared_says_nothing(tmp_path):
    model = train(make_model())
    audited = Imprint.of(model)
    (tmp_path / "model.safetensors").write_bytes(b"no such file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"nor this")
    torch.save([1, 2], tmp_path / "pytorch_model-2.bin")
    save_file({"lm_head.weight": torch.ones(2, 2), "unknown": torch.ones(3)}, tmp_path / "half.safetensors")

    assert other_weights_in(tmp_path, model, audited) == []
    assert other_weights_in(tmp_path / "nowhere", model, audited) == []
