import numpy as np
import peft
import pytest
import torch
from adapted_llama import LORA, draw, make_llama, perturb
from tiny import make_model
from torch import nn

from ezmia_callbacks import PrivacyAuditor
from ezmia_callbacks.errors import ConfigurationError, ReferenceMismatchError
from ezmia_callbacks.reference.sources import (
    adapters_disabled,
    frozen_copy,
)

pytestmark = pytest.mark.filterwarnings(
    # PEFT warns of trained biases, of its own deprecations, and of adapters without a matching layer type.
    "ignore::UserWarning:peft.*",
    "ignore::FutureWarning",
)


def with_adapter(config, *, attention_bias=False):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(make_llama(attention_bias=attention_bias), config)


def state_of(model):
    return (
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [getattr(module, "_disable_adapters", None) for module in model.modules()],
        [tuple(getattr(module, "active_adapters", ()) or ()) for module in peft_layers(model)],
        [tuple(getattr(module, "merged_adapters", ()) or ()) for module in peft_layers(model)],
        ["forward" in vars(module) for module in model.modules()],
        [parameter.detach().clone() for parameter in model.parameters()],
    )


def peft_layers(model):
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


def assert_same_state(before, after):
    for was, is_now in zip(before[:-1], after[:-1], strict=True):
        assert was == is_now
    assert all(torch.equal(was, is_now) for was, is_now in zip(before[-1], after[-1], strict=True))


AGREEING = {
    "lora": peft.LoraConfig(**LORA),
    "gaussian": peft.LoraConfig(**LORA, init_lora_weights="gaussian"),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "rslora": peft.LoraConfig(**LORA, use_rslora=True),
    "modules_to_save": peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "embeddings": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"]),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "bias": peft.LoraConfig(**LORA, bias="all"),
}
DIFFERING = {
    "pissa": (peft.LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights='pissa' moves weight"),
    "olora": (peft.LoraConfig(**LORA, init_lora_weights="olora"), "init_lora_weights='olora' moves weight"),
    "random": (
        peft.LoraConfig(**LORA, init_lora_weights=False),
        "trained before or starts from random weights",
    ),
    "prompt": (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "virtual tokens that the base has not",
    ),
    "prefix": (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "virtual tokens that the base has not",
    ),
}


@pytest.mark.parametrize("name", AGREEING)
def test_adapters_that_start_at_their_base_raise_no_question(name, caplog):
    _, canaries = draw()
    model = with_adapter(AGREEING[name], attention_bias=name == "bias")

    of_start, of_base = PrivacyAuditor(canaries), PrivacyAuditor(canaries, reference="adapter")
    of_start.begin(model)
    of_base.begin(model)

    assert "differs from its base" not in caplog.text
    np.testing.assert_allclose(of_start.reference.log_probs, of_base.reference.log_probs, atol=1e-5)


@pytest.mark.parametrize("name", DIFFERING)
def test_a_base_that_is_not_the_start_is_named_with_what_to_use(name, caplog):
    _, canaries = draw()
    config, explanation = DIFFERING[name]

    PrivacyAuditor(canaries).begin(with_adapter(config))

    assert "Before any training the model differs from its base" in caplog.text
    assert explanation in caplog.text
    assert "reference='" in caplog.text


@pytest.mark.parametrize("name", [*AGREEING, *DIFFERING])
@pytest.mark.parametrize("reference", ["auto", "adapter"])
def test_everything_about_the_adapters_is_as_before(name, reference):
    _, canaries = draw()
    config = AGREEING.get(name) or DIFFERING[name][0]
    model = with_adapter(config, attention_bias=name == "bias")
    for parameter in model.parameters():  # a user's own freeze, which PEFT's context would undo
        if parameter.requires_grad:
            parameter.requires_grad = False
            break
    before = state_of(model)

    auditor = PrivacyAuditor(canaries, reference=reference)
    auditor.begin(model)
    auditor.audit(model)

    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("name", [*AGREEING, *DIFFERING])
def test_training_never_moves_the_reference(name):
    """Trained biases and saved modules move the disabled base: a reference asked for again would be wrong."""
    _, canaries = draw()
    config = AGREEING.get(name) or DIFFERING[name][0]
    model = with_adapter(config, attention_bias=name == "bias")
    auditor = PrivacyAuditor(canaries, reference="adapter")
    auditor.begin(model)
    before = auditor.reference.log_probs.copy()

    perturb(model)
    auditor.audit(model)

    np.testing.assert_array_equal(auditor.reference.log_probs, before)


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_the_disabled_base_is_the_model_without_peft(name):
    _, canaries = draw()
    config = AGREEING.get(name) or DIFFERING[name][0]
    plain = PrivacyAuditor(canaries)
    plain.begin(make_llama())

    auditor = PrivacyAuditor(canaries, reference="adapter")
    auditor.begin(with_adapter(config))

    np.testing.assert_allclose(auditor.reference.log_probs, plain.reference.log_probs, atol=1e-5)


def test_a_continued_adapter_counts_from_the_base_or_from_this_run(caplog):
    _, canaries = draw()
    model = with_adapter(AGREEING["lora"])
    perturb(model)

    this_run, since_base = PrivacyAuditor(canaries), PrivacyAuditor(canaries, reference="adapter")
    start, total = this_run.begin(model), since_base.begin(model)

    assert start.metrics["auc"].value == 0.5
    assert total.metrics["auc"].value != 0.5
    assert "'adapter' to count what was learned since the base" in caplog.text


def test_the_other_adapter_stays_active_and_frozen():
    _, canaries = draw()
    model = with_adapter(AGREEING["lora"])
    model.add_adapter("second", peft.LoraConfig(**LORA))
    model.set_adapter("second")
    before = state_of(model)

    PrivacyAuditor(canaries, reference="adapter").begin(model)

    assert model.active_adapter == "second"
    assert_same_state(before, state_of(model))


def test_merged_adapters_are_refused_instead_of_unmerged():
    _, canaries = draw()
    model = with_adapter(AGREEING["lora"])
    model.merge_adapter()
    before = state_of(model)

    with pytest.raises(ConfigurationError, match="The adapters are merged into the base"):
        PrivacyAuditor(canaries, reference="adapter").begin(model)
    PrivacyAuditor(canaries).begin(model)

    assert_same_state(before, state_of(model))


def test_adapters_of_transformers_itself_are_found():
    _, canaries = draw()
    model = make_llama()
    model.add_adapter(peft.LoraConfig(**LORA, init_lora_weights=False))
    plain = PrivacyAuditor(canaries)
    plain.begin(make_llama())
    before = state_of(model)

    auditor = PrivacyAuditor(canaries, reference="adapter")
    auditor.begin(model)

    np.testing.assert_allclose(auditor.reference.log_probs, plain.reference.log_probs, atol=1e-5)
    assert_same_state(before, state_of(model))


def test_adapters_inside_another_module_are_found():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits

    _, canaries = draw()

    PrivacyAuditor(canaries, reference="adapter").begin(Wrapper(with_adapter(AGREEING["lora"])))


def test_no_adapters_to_disable_is_refused_before_training():
    _, canaries = draw()

    with pytest.raises(ConfigurationError, match="needs a model with PEFT adapters, got GPT2LMHeadModel"):
        PrivacyAuditor(canaries, reference="adapter").begin(make_model())


def test_peft_alone_would_have_unfrozen_what_the_user_froze():
    """The trap itself, so that its test above cannot pass by accident."""
    model = with_adapter(AGREEING["lora"])
    model.requires_grad_(requires_grad=False)

    with model.disable_adapter():
        pass
    trap = any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(requires_grad=False)
    with adapters_disabled(model):
        pass

    assert trap
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_copy_does_not_follow_and_agrees_with_the_start():
    _, canaries = draw()
    model = make_model()
    of_start, of_copy = PrivacyAuditor(canaries), PrivacyAuditor(canaries, reference="copy")
    of_start.begin(model)
    of_copy.begin(model)

    np.testing.assert_array_equal(of_start.reference.log_probs, of_copy.reference.log_probs)


def test_a_copy_of_a_model_with_a_patched_forward_is_really_frozen():
    """Libraries give an instance a forward that calls the original: a plain deep copy follows it."""
    import copy

    model = make_model().eval()
    original = model.forward
    model.forward = lambda **inputs: original(**inputs)
    ids = torch.arange(3, 9)[None]
    naive, frozen = copy.deepcopy(model), frozen_copy(model)
    with torch.no_grad():
        before = naive(input_ids=ids).logits, frozen(input_ids=ids).logits

        perturb(model)
        after = naive(input_ids=ids).logits, frozen(input_ids=ids).logits

    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert model.forward is not original


def test_a_copy_takes_device_and_precision():
    copied = frozen_copy(make_model(), device="cpu", dtype=torch.bfloat16)

    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in copied.parameters())


@pytest.mark.parametrize("lazily", [False, True])
def test_a_module_of_the_users_own_is_the_reference(lazily):
    _, canaries = draw()
    other = make_model(seed=7)
    plain = PrivacyAuditor(canaries)
    plain.begin(other)

    auditor = PrivacyAuditor(canaries, reference=(lambda: other) if lazily else other)
    auditor.begin(make_model())

    np.testing.assert_array_equal(auditor.reference.log_probs, plain.reference.log_probs)


def test_sources_are_never_mixed_within_one_run(tmp_path):
    _, canaries = draw()
    model = with_adapter(AGREEING["lora"])
    PrivacyAuditor(canaries, reference="adapter", output_dir=tmp_path).begin(model)

    with pytest.raises(ReferenceMismatchError, match="or another reference"):
        PrivacyAuditor(canaries, output_dir=tmp_path).resume(model, [], step=3)


def test_an_unknown_source_is_refused_when_built():
    _, canaries = draw()

    with pytest.raises(ConfigurationError, match="`reference` must be 'auto', 'adapter', 'copy' or a module"):
        PrivacyAuditor(canaries, reference="base")


@pytest.mark.parametrize("refusal", [RuntimeError("no deep copy"), AssertionError(), TypeError("no pickle")])
def test_a_model_that_cannot_be_copied_is_refused_with_what_to_use(refusal):
    class Sharded(nn.Module):
        def __deepcopy__(self, memo):
            raise refusal

    with pytest.raises(ConfigurationError, match=r"Sharded cannot .*: use reference='auto'"):
        frozen_copy(Sharded())


def test_a_copy_without_memory_for_it_is_no_matter_of_configuration():
    class Large(nn.Module):
        def __deepcopy__(self, memo):
            raise MemoryError

    with pytest.raises(MemoryError):
        frozen_copy(Large())
