import random

import numpy as np
import pytest
import torch
from tiny import make_model, make_texts
from token_rows import as_rows, mixed_rows
from torch import nn

from ezmia_callbacks.canaries.records import IGNORED_LABEL
from ezmia_callbacks.errors import ConfigurationError, NonFiniteLogitsError, UnsupportedModelError
from ezmia_callbacks.scoring import forward
from ezmia_callbacks.scoring.forward import (
    batches_of,
    check_model,
    deal_rows,
    evaluation_without_side_effects,
    token_statistics,
)
from ezmia_callbacks.scoring.memory import is_out_of_memory, take_and_give_back
from ezmia_callbacks.scoring.rows import TokenRow


def naive_statistics(model, row):
    """One record at a time, in float64, by the definitions."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(row.input_ids)[None]).logits[0, :-1].double()
    log_p = logits.log_softmax(-1)
    targets = torch.tensor(row.input_ids[1:])
    chosen = log_p[torch.arange(len(targets)), targets]
    mean = (log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p**2).sum(-1) - mean**2
    keep = torch.tensor(row.labels[1:] != IGNORED_LABEL)
    columns = (chosen, log_p.argmax(-1) == targets, mean, variance.clamp(min=0).sqrt())
    return [column[keep].numpy() for column in columns]


def test_statistics_are_those_of_one_record_at_a_time():
    model, rows = make_model().eval(), mixed_rows()

    found = token_statistics(model, rows, batch_size=3)

    expected = [naive_statistics(model, row) for row in rows]
    for name, column in zip(
        ("log_probs", "is_correct", "means", "standard_deviations"), zip(*expected, strict=True), strict=True
    ):
        np.testing.assert_allclose(getattr(found, name), np.concatenate(column), atol=2e-6, err_msg=name)
    assert found.offsets.tolist() == np.cumsum([0] + [len(row.input_ids) - 1 for row in rows]).tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batch_size_and_padding_do_not_matter(batch_size):
    model, rows = make_model(), mixed_rows()

    found = token_statistics(model, rows, batch_size=batch_size)

    expected = token_statistics(model, rows, batch_size=7)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)


def test_order_of_the_records_does_not_matter():
    model, rows = make_model(), mixed_rows()
    order = np.random.default_rng(0).permutation(len(rows))

    shuffled = token_statistics(model, [rows[i] for i in order], batch_size=4)

    straight = token_statistics(model, rows, batch_size=4)
    for position, i in enumerate(order):
        np.testing.assert_allclose(
            shuffled.log_probs[shuffled.offsets[position] : shuffled.offsets[position + 1]],
            straight.log_probs[straight.offsets[i] : straight.offsets[i + 1]],
            atol=1e-5,
        )


def test_only_positions_that_carry_loss_are_scored():
    model = make_model()
    texts = make_texts(5, n_words=10)

    masked = token_statistics(model, as_rows(texts, n_masked=6))

    everything = token_statistics(model, as_rows(texts))
    assert masked.offsets.tolist() == [0, 4, 8, 12, 16, 20]
    np.testing.assert_array_equal(masked.log_probs[:4], everything.log_probs[5:9])


def test_memory_is_tried_for_the_logits_of_the_largest_batch(monkeypatch):
    asked = []
    monkeypatch.setattr(forward, "take_and_give_back", lambda n_bytes, device: asked.append(n_bytes))
    model, rows = make_model(vocab_size=500).bfloat16(), mixed_rows()

    for batch_size in (4, 2):
        forward.try_memory(model, rows, batch_size=batch_size)

    # The longest records have 20 tokens; logits in bfloat16, and once more in float32.
    assert asked == [4 * 20 * 500 * (2 + 4), 2 * 20 * 500 * (2 + 4)]


def test_memory_that_is_not_there_is_said_by_the_allocator():
    with pytest.raises(RuntimeError) as raised:
        take_and_give_back(2**62, torch.device("cpu"))

    assert is_out_of_memory(raised.value)


def test_a_small_chunk_changes_nothing(monkeypatch):
    model, rows = make_model(), mixed_rows()
    expected = token_statistics(model, rows)

    monkeypatch.setattr("ezmia_callbacks.scoring.forward._CHUNK_BYTES_ON_CPU", 1000)
    found = token_statistics(model, rows)

    np.testing.assert_array_equal(found.log_probs, expected.log_probs)
    np.testing.assert_array_equal(found.is_correct, expected.is_correct)


def test_dropout_is_off_during_and_flags_are_exact_afterwards():
    model = make_model(dropout=0.5).train()
    model.transformer.h[0].eval()  # frozen in evaluation mode on purpose
    before = [module.training for module in model.modules()]

    first = token_statistics(model, mixed_rows())
    second = token_statistics(model, mixed_rows())

    np.testing.assert_array_equal(first.log_probs, second.log_probs)
    assert [module.training for module in model.modules()] == before


def test_no_module_method_is_called_to_change_modes():
    """Old LoRA code merges weights in `train()`/`eval()`, and merging back and forth loses bits."""

    class Merging(nn.Linear):
        def train(self, mode=True):
            raise RuntimeError("merged")

    model = nn.Sequential(Merging(2, 2))

    with evaluation_without_side_effects(model):
        assert not model[0].training

    assert model[0].training


def test_weights_that_would_be_packed_in_place_stay_as_they_are():
    """As 4-bit layers of bitsandbytes do at an evaluation, on processors that have the instructions."""

    class Packing(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.support_avx512bf16_for_cpu = True

        def forward(self, x):
            if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
                self.weight.data = self.weight.data.bfloat16().float()
            return super().forward(x)

    model = nn.Sequential(Packing())
    before = model[0].weight.detach().clone()

    with evaluation_without_side_effects(model):
        model(torch.ones(1, 4))

    assert torch.equal(model[0].weight, before)
    assert model[0].support_avx512bf16_for_cpu
    model.eval()(torch.ones(1, 4))
    assert not torch.equal(model[0].weight, before)


def test_random_states_are_put_back():
    model = make_model()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    with evaluation_without_side_effects(model):
        random.random(), np.random.rand(), torch.rand(1)

    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().tolist() == states[2]


def test_everything_is_put_back_after_an_error():
    model = make_model().train()

    with pytest.raises(RuntimeError, match="in the middle"), evaluation_without_side_effects(model):
        raise RuntimeError("in the middle")

    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_weights_cast_without_gradients_do_not_reach_a_training_step():
    """Inside the user's own autocast, a cached cast from the audit would cut the graph."""
    model = make_model()
    rows = as_rows(make_texts(4))
    ids = torch.tensor(np.stack([row.input_ids for row in rows]))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        token_statistics(model, rows)
        model(input_ids=ids, labels=ids).loss.backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = value

    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
        token_statistics(model, mixed_rows())


def test_a_token_that_the_model_rules_out_is_no_error():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, input_ids, attention_mask):
            logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits.index_fill(-1, torch.tensor([60, 61]), float("-inf"))

    found = token_statistics(Masked(), mixed_rows())

    assert np.isfinite(found.means).all()
    assert np.isfinite(found.standard_deviations).all()


def test_ties_with_the_true_token_count_as_correct():
    class Flat(nn.Module):
        def forward(self, input_ids, attention_mask):
            return torch.zeros(*input_ids.shape, 64)

    found = token_statistics(Flat(), mixed_rows())

    assert found.is_correct.all()


def test_a_model_without_logits_is_refused():
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))

    with pytest.raises(UnsupportedModelError, match="GPT2Model returned no logits"):
        check_model(model, mixed_rows())


def test_an_encoder_is_refused():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )

    with pytest.raises(UnsupportedModelError, match="looks ahead"):
        check_model(BertForMaskedLM(config), mixed_rows())


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)

    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        check_model(T5ForConditionalGeneration(config), mixed_rows())


def test_a_record_longer_than_the_model_takes_is_refused_before_training():
    with pytest.raises(ConfigurationError, match="has 40 tokens, the model takes 32"):
        check_model(make_model(), as_rows(make_texts(2, n_words=40)))


def test_token_ids_of_another_tokenizer_are_refused():
    rows = [TokenRow(np.array([1, 2, 900]), np.array([1, 2, 900]))]

    with pytest.raises(ConfigurationError, match="token id 900, the model has 64"):
        check_model(make_model(), rows)


def test_a_causal_model_passes_the_check_under_autocast():
    check_model(make_model(), mixed_rows(), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))


def padded_rows():
    """Rows of three lengths with padding on their left, as batches of a trainer leave them."""
    found = []
    for row in mixed_rows():
        n = len(row.input_ids)
        width = 8 if n <= 7 else 24
        padding = np.zeros(width - n, dtype=np.int64)
        found.append(
            TokenRow(
                np.concatenate([padding, row.input_ids]),
                np.concatenate([padding + IGNORED_LABEL, row.labels]),
                {"attention_mask": np.concatenate([padding, np.ones(n, dtype=np.int64)])},
            )
        )
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_of_its_own_is_scored_as_in_a_batch_of_its_length(batch_size, attention):
    model, rows = make_model(attn_implementation=attention).eval(), padded_rows()

    found = token_statistics(model, rows, batch_size=batch_size)

    for i, row in enumerate(rows):
        mask = torch.tensor(row.attention_mask)[None]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(row.input_ids)[None], attention_mask=mask).logits[0, :-1]
        log_p = logits.log_softmax(-1).numpy()
        expected = log_p[np.flatnonzero(row.is_scored), row.input_ids[1:][row.is_scored]]
        np.testing.assert_allclose(
            found.log_probs[found.offsets[i] : found.offsets[i + 1]], expected, atol=1e-5
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_causal_model_passes_the_check_with_padding_of_its_own(attention):
    assert check_model(make_model(attn_implementation=attention), padded_rows()).reason is None


@pytest.mark.parametrize("n_shares", [2, 3])
def test_shares_of_padded_rows_are_the_batches_of_one_process(n_shares):
    rows = padded_rows()

    shares = deal_rows(rows, batch_size=3, n_shares=n_shares)

    whole = batches_of(rows, batch_size=3)
    own = [
        [share[i] for i in batch]
        for share in shares
        for batch in batches_of([rows[i] for i in share], batch_size=3)
    ]
    assert sorted(own) == sorted(whole)


def make_rotary(**rope):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=8, **sizes, **rope))


@pytest.mark.parametrize("rope", [{}, {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}], ids=str)
def test_a_rotary_model_takes_records_longer_than_its_configuration_says(rope):
    check_model(make_rotary(**rope), mixed_rows())


def test_memory_that_runs_out_on_a_long_record_is_no_limit_of_the_model(monkeypatch):
    model = make_rotary()

    def forward(*args, **kwargs):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", forward)

    with pytest.raises(RuntimeError, match="out of memory"):
        check_model(model, mixed_rows())


class OwnModel(nn.Module):
    """Its forward pass has names of its own, and it returns logits alone."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 64)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


class Wrapped(nn.Module):
    """Takes any name, and hands it on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("make", [OwnModel, lambda: Wrapped(OwnModel())], ids=["own", "wrapped"])
def test_a_model_that_takes_no_input_ids_is_refused_with_a_function_that_works_as_typed(make):
    model, rows = make(), as_rows(make_texts(4))

    with pytest.raises(UnsupportedModelError, match="takes no `input_ids`") as raised:
        check_model(model, rows)
    typed = str(raised.value).partition("`logits_fn=")[2].partition("`")[0]

    assert check_model(model, rows, logits_fn=eval(typed)).reason is not None
