"""What a forward pass in evaluation mode changes in a model is put back, and what cannot be is refused."""

from types import SimpleNamespace

import pytest
import torch
from tiny import make_model
from token_rows import mixed_rows
from torch import nn
from writing_models import WRITING, CountsInPlace, assert_same_bits, bits, make_rwkv, past_everything, times

from ezmia_callbacks.errors import ModelChangedError
from ezmia_callbacks.scoring.forward import (
    call_for_logits,
    evaluation_without_side_effects,
    traces_of,
)
from ezmia_callbacks.scoring.left_as_found import Traces, bytes_of
from ezmia_callbacks.scoring.scorer import Scorer


def found_out(model):
    return traces_of(model, mixed_rows(), logits_fn=call_for_logits)


@pytest.mark.parametrize("make", WRITING.values(), ids=WRITING)
def test_scoring_leaves_every_bit_and_every_value(make):
    model, scorer = make().train(), Scorer()
    before = bits(model)

    scorer.prepare(model, mixed_rows())
    assert_same_bits(bits(model), before)
    for _ in range(2):
        scorer.statistics(model, mixed_rows())
        assert_same_bits(bits(model), before)


def test_the_model_writes_to_itself_when_nobody_looks():
    """Else the tests above would say nothing."""
    for make in WRITING.values():
        model = make().eval()
        before = bits(model)
        with torch.no_grad():
            model(input_ids=torch.arange(9)[None])
        with pytest.raises(AssertionError):
            assert_same_bits(bits(model), before)


def test_figures_of_a_model_that_is_rescaled_are_the_same_at_each_audit():
    model, scorer = make_rwkv(), Scorer()
    scorer.prepare(model, mixed_rows())

    first, second = (scorer.statistics(model, mixed_rows()) for _ in range(2))

    assert first.log_probs.tolist() == second.log_probs.tolist()


def test_figures_do_not_depend_on_the_batches_before():
    rows = mixed_rows()
    together, alone = Scorer(batch_size=1), Scorer(batch_size=1)

    found = together.statistics(CountsInPlace(), rows)

    for i in (0, len(rows) - 1):
        expected = alone.statistics(CountsInPlace(), [rows[i]])
        assert (
            found.log_probs[found.offsets[i] : found.offsets[i + 1]].tolist() == expected.log_probs.tolist()
        )


def test_only_weights_that_are_overwritten_are_copied():
    rwkv, plain = found_out(make_rwkv()), found_out(make_model())

    assert plain.names == set()
    assert {name.split(".", 3)[3] for name in rwkv.names} == {
        "attention.output.weight",
        "feed_forward.value.weight",
    }


def test_no_optimizer_step_is_seen_where_weights_were_put_back():
    model = make_rwkv().train()
    traces = found_out(model)
    before = [parameter._version for parameter in model.parameters()]

    with evaluation_without_side_effects(model, traces):
        model(input_ids=torch.arange(9)[None])

    assert [parameter._version for parameter in model.parameters()] == before


def test_a_backward_pass_that_waits_goes_on():
    model = make_rwkv().train()
    traces = found_out(model)
    loss = model(input_ids=torch.arange(9)[None]).logits.square().mean()

    with evaluation_without_side_effects(model, traces):
        model(input_ids=torch.arange(9)[None])

    loss.backward()


class Restless(nn.Module):
    """Changes in its forward pass whatever a module holds."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(attention="eager")
        self.generation_config = SimpleNamespace(length=3)
        self.weight = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("gone", torch.ones(3))
        self.register_buffer("expanded", torch.arange(3).expand(2, 3), persistent=False)
        self.inner = nn.Sequential(nn.Identity(), nn.ReLU())
        self.cache, self.seen, self.by_name, self.last = [], set(), {"a": [1]}, None

    def forward(self, x):
        self.config.attention = "flash"
        self.config.other = 1
        self.generation_config.length = 4
        self.weight = nn.Parameter(self.weight.detach() * 2)
        self.frozen.requires_grad_(True)
        self.kept.data = self.kept.data * 2
        self.register_buffer("new", torch.ones(1))
        self.late = nn.Linear(2, 2)
        del self.gone
        self.inner.register_forward_hook(lambda *_: None)
        self.inner[0] = nn.Tanh()
        self.cache.append(x)
        self.seen.add(len(self.cache))
        self.by_name["a"].append(2)
        self.last = x
        return x


def held(model):
    return [
        (name, key, id(value) if isinstance(value, torch.Tensor | nn.Module) else repr(value))
        for name, module in model.named_modules()
        for holder in (vars(module), *(v for v in vars(module).values() if isinstance(v, dict)))
        for key, value in holder.items()
    ]


def test_whatever_a_module_holds_is_held_again():
    model = Restless()
    before, memory = (
        held(model),
        {name: bytes_of(tensor)[0].data_ptr() for name, tensor in model.state_dict().items()},
    )

    with evaluation_without_side_effects(model):
        model(torch.ones(2))
        assert held(model) != before

    assert held(model) == before
    assert not model.frozen.requires_grad
    assert {name: bytes_of(tensor)[0].data_ptr() for name, tensor in model.state_dict().items()} == memory
    assert torch.equal(model.kept, torch.ones(3))


def test_it_is_put_back_after_an_error_too():
    model = CountsInPlace()
    before = bits(model)

    with pytest.raises(IndexError), evaluation_without_side_effects(model):
        model(input_ids=torch.full((1, 9), 5)).logits[3]

    assert_same_bits(bits(model), before)


def test_what_cannot_be_seen_is_found_by_its_bits_and_refused_at_the_start():
    model = make_model()
    model.transformer.wte.register_forward_pre_hook(past_everything)

    with pytest.raises(ModelChangedError, match=r"`transformer\.wte\.weight` of GPT2LMHeadModel.*kernel"):
        Scorer().prepare(model, mixed_rows())


def test_an_overwritten_weight_that_was_not_before_is_refused_later():
    model, scorer = make_model(), Scorer()
    scorer.prepare(model, mixed_rows())
    scorer.statistics(model, mixed_rows())

    model.transformer.wte.register_forward_pre_hook(times(0.5))

    with pytest.raises(ModelChangedError, match=r"`transformer\.wte\.weight`.*overwritten in place"):
        scorer.statistics(model, mixed_rows())


def test_overwriting_with_the_same_bits_is_no_change():
    model, scorer = make_model(), Scorer()
    model.transformer.wte.register_forward_pre_hook(times(1.0))
    before = bits(model)

    scorer.prepare(model, mixed_rows())
    for _ in range(3):
        scorer.statistics(model, mixed_rows())

    assert_same_bits(bits(model), before)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(3).expand(4, 3),
        torch.arange(20)[3::4],
        torch.ones(3, dtype=torch.bfloat16)[1:],
        torch.ones(2, dtype=torch.complex64),
    ],
    ids=["transposed", "expanded", "strided", "offset", "complex"],
)
def test_any_strides_are_put_back(tensor):
    before = tensor.clone()
    (place,) = bytes_of(tensor)
    kept = place.clone()
    tensor.untyped_storage().fill_(1)
    assert not torch.equal(tensor, before)

    place.copy_(kept)

    assert torch.equal(tensor, before)


@pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.ones(0)])
def test_what_has_no_bytes_has_none(tensor):
    assert bytes_of(tensor) == []


def test_tensors_of_the_inference_mode_have_no_counter_and_no_trouble():
    with torch.inference_mode():
        model = make_model()

    with evaluation_without_side_effects(model, Traces(), by_bits=True):
        model(input_ids=torch.arange(9)[None])


def test_tied_weights_are_copied_once_and_put_back():
    model = make_model()
    model.transformer.wte.register_forward_pre_hook(times(0.5))
    before = bits(model)

    traces = found_out(model)

    assert traces.names == {"transformer.wte.weight"}
    assert_same_bits(bits(model), before)


@pytest.mark.filterwarnings("ignore")
def test_a_trial_compiles_nothing_and_leaves_the_compiled_as_it_is():
    torch._dynamo.reset()
    n_compiled = []

    def backend(graph, _):
        n_compiled.append(1)
        return graph.forward

    model = make_model()
    model.compile(backend=backend)
    ids = torch.arange(9)[None]
    model.train()(input_ids=ids)
    implementation, before = model._compiled_call_impl, len(n_compiled)

    traces = found_out(model)
    assert len(n_compiled) == before
    with evaluation_without_side_effects(model, traces):
        model(input_ids=ids)
    in_evaluation = len(n_compiled)
    with evaluation_without_side_effects(model, traces):
        model(input_ids=ids)
    model(input_ids=ids)

    assert len(n_compiled) == in_evaluation
    assert before
    assert model._compiled_call_impl is implementation
    torch._dynamo.reset()
