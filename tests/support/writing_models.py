"""Language models that write to themselves in their forward pass, also in evaluation mode."""

import torch
from tiny import VOCABULARY, make_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutput


def make_rwkv(*, seed=0, n_layers=4):
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=VOCABULARY,
        context_length=32,
        hidden_size=32,
        num_hidden_layers=n_layers,
        rescale_every=2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RwkvForCausalLM(config)


class Counting(nn.Module):
    """A language model whose experts count their tokens; the busier one is held back, in training as well."""

    def __init__(self, *, seed=0):
        super().__init__()
        self.inner = make_model(seed=seed)
        self.config = self.inner.config
        self.experts = nn.ModuleList(nn.Linear(VOCABULARY, VOCABULARY, bias=False) for _ in range(2))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for expert in self.experts:
                expert.weight.copy_(torch.eye(VOCABULARY) + 0.05 * torch.randn(VOCABULARY, VOCABULARY))
        self.hold()

    def hold(self):
        self.register_buffer("count", torch.zeros(2))

    def note(self, chosen):
        raise NotImplementedError

    def bias(self):
        return -1e-2 * self.count / self.count.sum().clamp(min=1)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        votes = torch.stack([logits.detach()[..., 0], logits.detach()[..., 1]], dim=-1) + self.bias()
        self.note(torch.stack([(votes.argmax(-1) == i).sum() for i in range(2)]))
        gates = votes.softmax(-1)
        logits = sum(gates[..., i, None] * expert(logits) for i, expert in enumerate(self.experts))
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)


class CountsInPlace(Counting):
    def note(self, chosen):
        self.count.add_(chosen)


class CountsByReplacing(Counting):
    def hold(self):
        self.register_buffer("count", torch.zeros(2), persistent=False)

    def note(self, chosen):
        self.count = self.count + chosen


class CountsInAttributes(Counting):
    """No buffer: a number, a list, and a tensor in a dictionary."""

    def hold(self):
        self.n_seen, self.history, self.kept = 0, [], {"sums": torch.zeros(2)}

    @property
    def count(self):
        return self.kept["sums"] * (1 + self.n_seen % 7) + len(self.history)

    def note(self, chosen):
        self.n_seen += int(chosen.sum())
        self.history.append(self.n_seen)
        self.kept["sums"].add_(chosen)


class CountsInALargeBuffer(Counting):
    """More than is copied without being asked for."""

    def hold(self):
        self.register_buffer("counts", torch.zeros(2, 2**16))

    @property
    def count(self):
        return self.counts[:, -1]

    def note(self, chosen):
        self.counts[:, -1] += chosen


WRITING = {
    "rwkv": make_rwkv,
    "in-place": CountsInPlace,
    "replaced": CountsByReplacing,
    "attributes": CountsInAttributes,
    "large-buffer": CountsInALargeBuffer,
}


def times(factor):
    """A hook that overwrites the weights of a module in evaluation mode."""

    def overwrite(module, args):
        if not module.training:
            module.weight.mul_(factor)

    return overwrite


def past_everything(module, args):
    """A hook that overwrites a weight in evaluation mode as a kernel of one's own would: nobody is told."""
    if not module.training:
        module.weight.detach().numpy()[5, 5] += 1.0


def bits(model):
    """Every tensor and plain value that a model holds, however it holds it."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    tensors |= {name: tensor.detach().clone() for name, tensor in model.named_buffers()}
    values = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str):
                values[f"{prefix}.{name}"] = value
    for name in ("history", "kept"):
        held = getattr(model, name, None)
        if isinstance(held, list):
            values[name] = list(held)
        elif isinstance(held, dict):
            tensors |= {f"{name}.{key}": tensor.clone() for key, tensor in held.items()}
    return tensors, values


def assert_same_bits(found, expected):
    (tensors, values), (expected_tensors, expected_values) = found, expected
    assert values == expected_values
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected_tensors[name]), name
