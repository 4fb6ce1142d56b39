import pytest
import torch
from torch import nn

from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.audit.masters import masters


class MastersInGroups(torch.optim.SGD):
    """As Apex and Megatron have it: the groups hold float32 copies, the model follows after a step."""

    def __init__(self, parameters, lr):
        self.model_parameters = list(parameters)
        copies = [nn.Parameter(p.detach().float().clone()) for p in self.model_parameters]
        super().__init__(copies, lr=lr, momentum=0.9)

    def step(self, closure=None):
        (group,) = self.param_groups
        for master, parameter in zip(group["params"], self.model_parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        super().step(closure)
        with torch.no_grad():
            for master, parameter in zip(group["params"], self.model_parameters, strict=True):
                parameter.copy_(master)


class MastersInState(torch.optim.Optimizer):
    """As many optimizers for bfloat16 have it: one more entry in the state of each parameter."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "fp32": parameter.detach().float().clone(),
                    "step": torch.tensor(0.0),
                }

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                state["fp32"] -= group["lr"] * parameter.grad.float()
                parameter.copy_(state["fp32"])


class FlatCopiesElsewhere:
    """As engines have it: no torch optimizer, one float32 row for each parameter, inside another object."""

    def __init__(self, parameters, lr):
        class Engine:
            pass

        self.engine, self.lr, self.parameters = Engine(), lr, list(parameters)
        self.engine.rows = {i: p.detach().float().flatten() for i, p in enumerate(self.parameters)}

    @torch.no_grad()
    def step(self):
        for i, parameter in enumerate(self.parameters):
            self.engine.rows[i] -= self.lr * parameter.grad.float().flatten()
            parameter.copy_(self.engine.rows[i].view(parameter.shape))

    def set_lr(self, lr):
        self.lr = lr


class Wrapper:
    """As accelerate wraps an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


OPTIMIZERS = [MastersInGroups, MastersInState, FlatCopiesElsewhere]


def make_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 7)).to(dtype)


def step(model, optimizer, *, lr=None):
    if lr is not None:
        if hasattr(optimizer, "set_lr"):
            optimizer.set_lr(lr)
        else:
            for group in optimizer.param_groups:
                group["lr"] = lr
    for parameter in model.parameters():
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def is_equal(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_at_learning_rate_zero_leaves_the_restored_weights(kind, is_wrapped):
    model = make_model()
    optimizer = kind(model.parameters(), 0.1)
    kept = KeptWeights(None)
    step(model, optimizer)
    kept.save(model, step=1)
    expected = values(model)
    step(model, optimizer)
    assert not is_equal(values(model), expected)
    if kind is MastersInGroups:
        optimizer.state.clear()  # the momentum of the undone step, as the callbacks forget it

    kept.restore(model, optimizer=Wrapper(optimizer) if is_wrapped else optimizer)
    step(model, optimizer, lr=0.0)

    assert is_equal(values(model), expected)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_the_optimizer_the_undone_steps_come_back(kind):
    """Why `optimizer` is passed."""
    model = make_model()
    optimizer = kind(model.parameters(), 0.1)
    kept = KeptWeights(None)
    step(model, optimizer)
    kept.save(model, step=1)
    expected = values(model)
    step(model, optimizer)

    kept.restore(model)
    step(model, optimizer, lr=0.0)

    assert not is_equal(values(model), expected)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_parameter_has_its_master(kind):
    model = make_model()
    optimizer = kind(model.parameters(), 0.1)
    step(model, optimizer)

    found = masters(optimizer, model)

    assert [id(each.parameter) for each in found] == [id(p) for p in model.parameters()]
    assert {each.tensor.dtype for each in found} == {torch.float32}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_without_masters_have_none(kind, dtype):
    model = make_model(dtype)
    with torch.no_grad():
        model[1].bias.zero_()  # like any sum that has not begun
    optimizer = kind(model.parameters(), lr=1e-3)
    assert masters(optimizer, model) == []
    step(model, optimizer)
    assert masters(optimizer, model) == []
    assert masters(None, model) == []


def test_a_wrapped_module_and_its_parameters_are_no_masters():
    model = make_model()
    optimizer = MastersInState(model.parameters(), 0.1)
    step(model, optimizer)
    optimizer.module, optimizer.same = model, [p.detach() for p in model.parameters()]

    assert len(masters(optimizer, model)) == len(list(model.parameters()))


def test_equal_parameters_have_a_master_each():
    model = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]).bfloat16()
    optimizer = MastersInGroups([p for p in model.parameters() if p.any()], 0.1)

    found = masters(optimizer, model)

    assert [(id(each.tensor), id(each.parameter)) for each in found] == [
        (id(master), id(layer.weight))
        for master, layer in zip(optimizer.param_groups[0]["params"], model, strict=True)
    ]


def test_tensors_without_values_in_an_optimizer_are_no_masters():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.shapes = [torch.empty(9, device="meta")]  # as engines remember them

    assert masters(optimizer, model) == []
