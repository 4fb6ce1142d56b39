"""Models whose weights `accelerate` keeps elsewhere and brings in for each layer's forward pass."""

from itertools import count

import accelerate
import numpy as np
import pytest
import torch
from huggingface_tiny import NEVER_CROSSED, draw
from tiny import make_model

from ezmia_callbacks import PrivacyAuditor
from ezmia_callbacks.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def make(*, seed=0):
    return make_model(seed=seed).eval()


def in_memory(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def on_disk(model, folder):
    return accelerate.disk_offload(model, str(folder), execution_device="cpu", offload_buffers=True)


def dispatched(model, folder):
    device_map = {
        "transformer.wte": "disk",
        "lm_head": "disk",
        "transformer.wpe": "cpu",
        "transformer.drop": "cpu",
    }
    device_map |= {"transformer.h.0": "disk", "transformer.h.1": "cpu", "transformer.ln_f": "cpu"}
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


OFFLOADS = {"memory": in_memory, "disk": on_disk, "dispatched": dispatched}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    folders = (tmp_path / str(i) for i in count())
    return lambda model: OFFLOADS[request.param](model, next(folders))


def audited(model, *, reference="auto", later=None):
    auditor = PrivacyAuditor(draw()[1], reference=reference)
    auditor.begin(model)
    result = auditor.audit(later or model)
    return auditor.reference.log_probs, auditor.target.log_probs, result.to_metrics()


def test_figures_are_those_of_the_model_in_memory(offload):
    plain = audited(make(), later=make(seed=1))

    found = audited(offload(make()), later=offload(make(seed=1)))

    for values, expected in zip(found[:2], plain[:2], strict=True):
        np.testing.assert_array_equal(values, expected)
    assert not np.array_equal(*found[:2])


def test_an_offloaded_reference_gives_the_same_reference(offload):
    plain = audited(make(), reference=make(seed=1))

    found = audited(make(), reference=offload(make(seed=1)))

    np.testing.assert_array_equal(found[0], plain[0])


def test_the_model_is_offloaded_as_before(offload):
    model = offload(make())
    before = {name: (id(p), p.device) for name, p in model.named_parameters()}
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]

    audited(model)

    assert {name: (id(p), p.device) for name, p in model.named_parameters()} == before
    assert [getattr(module, "_hf_hook", None) for module in model.modules()] == hooks
    assert any(p.is_meta for p in model.parameters())
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, make()(input_ids=ids).logits)


def test_a_budget_that_restores_weights_is_refused_before_the_first_step(offload):
    auditor = PrivacyAuditor(draw()[1], budget=NEVER_CROSSED)

    with pytest.raises(ConfigurationError, match=r"offloaded.*`meta`.*restore=False"):
        auditor.begin(offload(make()))


def test_a_budget_that_restores_nothing_is_judged(offload):
    auditor = PrivacyAuditor(draw()[1], budget=NEVER_CROSSED, restore=False)

    assert auditor.begin(offload(make())).status == "ok"


def test_weights_that_nobody_brings_in_are_refused():
    with torch.device("meta"):
        model = make_model()

    with pytest.raises(ConfigurationError, match="`meta`"):
        PrivacyAuditor(draw()[1]).begin(model)
