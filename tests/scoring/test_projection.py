"""Logits in pieces are those of the whole, or pieces are not used."""

import numpy as np
import pytest
import torch
import transformers
from tiny import VOCABULARY, make_model, make_rows, make_texts
from token_rows import as_rows, mixed_rows
from torch import nn

from ezmia_callbacks import PrivacyAuditor, hold_out_canaries
from ezmia_callbacks.errors import NonFiniteLogitsError
from ezmia_callbacks.scoring.forward import call_for_logits, evaluation_without_side_effects, token_statistics
from ezmia_callbacks.scoring.projection import Projection, try_projection

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

WHOLE = Projection(None, "asked for by the test")

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# What each does to the output of its head.
HEADS = {
    "llama": ("Llama", SMALL),
    "tied": ("Qwen2", SMALL | {"tie_word_embeddings": True}),
    "soft-capped": ("Gemma2", SMALL | {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16}),
    "multiplied": ("Cohere", SMALL | {"logit_scale": 3.0}),
    "divided": ("Granite", SMALL | {"logits_scaling": 4.0}),
    "bias": ("Phi", SMALL),
    "recurrent": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}),
    "experts": ("Mixtral", SMALL | {"num_local_experts": 2, "output_router_logits": True}),
}


def make_other(kind):
    name, options = HEADS[kind]
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        # Biases start at 0, where leaving them out would not be seen.
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias)
    return model


def with_adapter(kind):
    import peft

    configs = {
        "lora in the head": peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False),
        "head of its own": peft.LoraConfig(
            r=4, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"]
        ),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    return peft.get_peft_model(make_model(tie_word_embeddings=False), configs[kind])


class Wrapper(nn.Module):
    """A model of the user's around one from Transformers."""

    def __init__(self, change=lambda logits: logits):
        super().__init__()
        self.inner, self.change = make_model(), change

    def forward(self, input_ids, attention_mask):
        return self.change(self.inner(input_ids=input_ids, attention_mask=attention_mask).logits)


def tried(model, *, logits_fn=call_for_logits):
    ids = torch.tensor(np.stack([row.input_ids for row in as_rows(make_texts(2, n_words=9))]))
    with evaluation_without_side_effects(model):
        return try_projection(model, ids, logits_fn=logits_fn)


def n_projected(model, head):
    """How many positions each call of the head gets."""
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    return seen


def assert_same(found, expected):
    for name in ("log_probs", "means", "standard_deviations"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(found.is_correct, expected.is_correct)
    np.testing.assert_array_equal(found.offsets, expected.offsets)


@pytest.fixture
def small_pieces(monkeypatch):
    """Seven positions at once."""
    monkeypatch.setattr("ezmia_callbacks.scoring.projection._PIECE_BYTES", 7 * 4 * VOCABULARY)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", HEADS)
def test_pieces_go_through_whatever_a_model_does_to_its_logits(kind):
    model, rows = make_other(kind).train(), mixed_rows()
    expected = token_statistics(model, rows, batch_size=5, projection=WHOLE)

    found = token_statistics(model, rows, batch_size=5, projection=tried(model))

    assert tried(model) == Projection(VOCABULARY)
    assert_same(found, expected)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["lora in the head", "head of its own", "prompt", "prefix"])
def test_pieces_go_through_adapters(kind):
    model, rows = with_adapter(kind), mixed_rows()
    expected = token_statistics(model, rows, batch_size=5, projection=WHOLE)

    found = token_statistics(model, rows, batch_size=5)

    assert tried(model).reason is None
    assert_same(found, expected)


@pytest.mark.usefixtures("small_pieces")
def test_a_wrapper_of_the_users_is_called_as_it_is():
    model, rows = Wrapper(lambda logits: 2.0 * logits), mixed_rows()
    expected = token_statistics(model, rows, projection=WHOLE)

    assert tried(model).reason is None
    assert_same(token_statistics(model, rows), expected)


@pytest.mark.usefixtures("small_pieces")
def test_under_autocast_pieces_round_like_the_whole():
    model, rows = make_model(), mixed_rows()
    autocast = {"autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16)}
    expected = token_statistics(model, rows, projection=WHOLE, **autocast)

    found = token_statistics(model, rows, **autocast)

    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=0.02)


@pytest.mark.usefixtures("small_pieces")
def test_the_head_sees_scored_positions_only_and_few_at_once():
    model = make_model()
    rows = as_rows(make_texts(10, n_words=12), n_masked=8)
    seen = n_projected(model, model.lm_head)

    token_statistics(model, rows, batch_size=10, projection=Projection(VOCABULARY))

    # Four of twelve tokens in each of ten records.
    assert seen == [7, 7, 7, 7, 7, 5]


def test_the_body_runs_once_a_batch(small_pieces):
    model, n_calls = make_model(), []
    model.transformer.h[0].register_forward_hook(lambda *_: n_calls.append(1))

    token_statistics(model, mixed_rows(), batch_size=10, projection=Projection(VOCABULARY))

    assert len(n_calls) == 2


def shuffled(logits):
    return logits.flip(1)


def summed(logits):
    return logits.cumsum(1)


def reshaped(logits):
    return logits.reshape(2, -1, VOCABULARY)


@pytest.mark.parametrize("change", [shuffled, summed, reshaped])
def test_what_mixes_positions_after_the_head_is_scored_as_a_whole(change):
    model = Wrapper(change)

    found = tried(model)

    assert found.n_vocabulary is None
    assert "its head" in found.reason


def test_a_model_that_calls_its_body_twice_is_scored_as_a_whole():
    class Twice(Wrapper):
        def forward(self, input_ids, attention_mask):
            again = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
            return again + self.inner(input_ids=input_ids.flip(0), attention_mask=attention_mask).logits

    assert tried(Twice()).n_vocabulary is None


def test_a_model_that_passes_its_body_by_is_scored_as_a_whole():
    """OPT calls the decoder inside its body."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2
    )

    assert tried(transformers.OPTForCausalLM(config)).n_vocabulary is None


def test_two_models_in_one_are_scored_as_a_whole():
    class Two(Wrapper):
        def __init__(self):
            super().__init__()
            self.other = make_model(seed=1)

    assert "no Hugging Face model" in tried(Two()).reason


def test_a_compiled_model_is_scored_as_a_whole():
    whole, inner = make_model(), make_model()
    inner.transformer.h[0].compile(backend="eager")

    assert "compiled" in tried(torch.compile(whole, backend="eager")).reason
    assert "compiled" in tried(inner).reason


@pytest.mark.parametrize("mark", ["device_mesh", "ds_id"])
def test_sharded_weights_are_scored_as_a_whole(mark):
    """Their processes would make different numbers of calls."""
    model = make_model()
    setattr(model.lm_head.weight, mark, 1)

    assert "sharded" in tried(model).reason


def test_a_forward_of_the_users_on_the_body_is_there_afterwards():
    """Accelerate's device hooks are such functions."""
    model, n_calls = make_model(), []
    own = model.transformer.forward

    def hooked(*args, **kwargs):
        n_calls.append(1)
        return own(*args, **kwargs)

    model.transformer.forward = hooked
    token_statistics(model, mixed_rows(), batch_size=64, projection=Projection(VOCABULARY))

    assert model.transformer.forward is hooked
    assert n_calls == [1]


@pytest.mark.usefixtures("small_pieces")
def test_an_error_leaves_the_model_as_it_was():
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = float("nan")

    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
        token_statistics(model, mixed_rows(), projection=Projection(VOCABULARY))

    assert "forward" not in model.transformer.__dict__


@pytest.mark.usefixtures("small_pieces")
def test_the_fused_head_of_trl_is_passed_through():
    utilities = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utilities, "add_fused_lm_head"):
        pytest.skip("this release of TRL fuses no head")
    model, rows = make_model(), mixed_rows()
    expected = token_statistics(model, rows, projection=WHOLE)
    utilities.add_fused_lm_head(model)

    assert tried(model).reason is None
    assert_same(token_statistics(model, rows), expected)


@pytest.mark.parametrize(
    ("change", "said"), [(None, "of scored positions only"), (summed, "of all positions")]
)
def test_an_audit_says_how_its_logits_are_computed(change, said):
    model = make_model() if change is None else Wrapper(change)
    _, canaries = hold_out_canaries(make_rows(make_texts(30)), n_members=10, n_non_members=10, seed=0)
    auditor = PrivacyAuditor(canaries)

    auditor.begin(model)

    assert said in auditor.history.run_metadata.logits
