"""Adapters on a quantized base: the audit of the kind of fine-tuning that most people can afford."""

import numpy as np
import peft
import pytest
import torch
from adapted_llama import LORA, draw, make_llama, perturb
from huggingface_tiny import make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback, PrivacyAuditor
from ezmia_callbacks.reference.sources import frozen_copy

pytest.importorskip("bitsandbytes")  # not in the oldest environment, whose transformers needs a GPU for it

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    # peft reads a name that transformers 5 renamed.
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    # bitsandbytes computes 8-bit products in half precision.
    "ignore:MatMul8bitLt.*:UserWarning",
)

QUANTIZED = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


def make_base():
    # On some processors bitsandbytes computes only with layers whose width is a multiple of its block size.
    return make_llama(hidden_size=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    return folder


@pytest.fixture(params=QUANTIZED)
def make_model(request, checkpoint):
    """Makes a model with a LoRA of PEFT on a quantized base, or with the same one of transformers itself."""

    def make(*, is_peft=True, dtype=torch.float32):
        base = AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=BitsAndBytesConfig(**QUANTIZED[request.param]), dtype=dtype
        )
        config = peft.LoraConfig(**LORA, lora_dropout=0.2)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            if is_peft:
                return peft.get_peft_model(base, config)
            base.add_adapter(config)
            return base

    return make


def adapter_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def is_quantized(model):
    return any(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())


def reference_of(model, source):
    auditor = PrivacyAuditor(draw()[1], reference=source)
    auditor.begin(model)
    return auditor.reference.log_probs


@pytest.mark.parametrize("is_peft", [True, False], ids=["peft", "transformers"])
def test_all_references_are_the_quantized_base(make_model, is_peft):
    """Not the base before quantization: what training changed is all that counts."""
    start, base, copied = (
        reference_of(make_model(is_peft=is_peft), source) for source in ("auto", "adapter", "copy")
    )

    np.testing.assert_array_equal(base, start)
    np.testing.assert_array_equal(copied, start)
    assert np.abs(start - reference_of(make_base(), "auto")).max() > 1e-4


@pytest.mark.parametrize("is_peft", [True, False], ids=["peft", "transformers"])
def test_a_copy_stays_quantized_and_does_not_follow(make_model, is_peft):
    model = make_model(is_peft=is_peft)
    ids = torch.arange(3, 9)[None]
    copied = frozen_copy(model)
    with torch.no_grad():
        before = copied(input_ids=ids).logits

        perturb(model)
        after = copied(input_ids=ids).logits

        assert torch.equal(after, before)
        assert not torch.equal(model.eval()(input_ids=ids).logits, before)
    assert is_quantized(copied)


def test_a_copy_of_a_half_precision_model_differs_by_rounding_alone(make_model):
    start, copied = (reference_of(make_model(dtype=torch.bfloat16), source) for source in ("auto", "copy"))

    np.testing.assert_allclose(copied, start, atol=0.02)


@pytest.mark.parametrize("reference", ["auto", "adapter", "copy"])
def test_training_ends_with_the_same_bits_as_without_the_audit(tmp_path, make_model, reference):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, every=2, reference=reference)
    plain, audited = make_model(), make_model()

    make_trainer(tmp_path / "without", rows, model=plain, max_steps=6).train()
    make_trainer(tmp_path / "with", rows, [audit], model=audited, max_steps=6).train()

    assert [result.step for result in audit.history] == [0, 2, 4, 6]
    assert audit.history.n_failed == 0
    assert is_quantized(audited)
    assert_same(dict(audited.named_parameters()), dict(plain.named_parameters()))
    assert not torch.equal(*(list(adapter_weights(m).values())[1] for m in (audited, make_model())))


class Watch(TrainerCallback):
    """Adapter weights after every step, before anything could be restored."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = adapter_weights(model)


def test_a_stop_puts_the_adapter_inside_the_budget_back(tmp_path, make_model):
    rows, canaries = draw()
    watch, model = Watch(), make_model()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.75, rule="point"), every="epoch")

    make_trainer(tmp_path, rows, [watch, audit], model=model, num_train_epochs=20, learning_rate=3e-2).train()

    good, last = audit.history.last_within_budget, audit.history[-1]
    assert last.decision.stop
    assert 0 < good.step < last.step
    assert_same(adapter_weights(model), watch.seen[good.step])
    assert not torch.equal(*(next(iter(watch.seen[step].values())) for step in (good.step, last.step)))


def test_a_quantized_base_raises_no_question(make_model, caplog):
    reference_of(make_model(), "auto")

    assert "differs from its base" not in caplog.text
