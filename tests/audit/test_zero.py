import json
from types import SimpleNamespace

import pytest
from torch import nn

from ezmia_callbacks.audit.zero import refuse_unproven, zero_masters
from ezmia_callbacks.errors import ConfigurationError

PROVEN = {
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "none"},
        "stage3_param_persistence_threshold": 10_000,
    },
}


def engine(config):
    return SimpleNamespace(zero_optimization_stage=lambda: 3, config=config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "`fp16.enabled: true`"),
        ({"bf16": {"enabled": True}}, "`bf16` without ZeRO"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "`bf16` without ZeRO"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/local"}}},
            '`zero_optimization.offload_param.device: "nvme"`',
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
            "`zero_optimization.zero_hpz_partition_size: 8`",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "`zero_optimization.zero_quantized_weights: true`",
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "`zero_optimization.zenflow: {}`"),
    ],
)
def test_a_setting_with_which_weights_were_never_put_back_is_named(config, named):
    with pytest.raises(ConfigurationError) as caught:
        refuse_unproven(engine(config))

    assert str(caught.value) == (
        f"DeepSpeed with {named} keeps weights where they were never seen to be restored whole: pass "
        "`restore=False` and keep checkpoints to return to, or train without it."
    )


def test_settings_that_tests_have_seen_are_not_refused(tmp_path):
    (tmp_path / "deepspeed.json").write_text(json.dumps(PROVEN))

    refuse_unproven(engine(PROVEN))
    refuse_unproven(engine(str(tmp_path / "deepspeed.json")))


def test_a_model_without_deepspeed_has_no_such_settings_and_no_such_masters():
    model = nn.Linear(2, 2)
    model.config = {"fp16": {"enabled": True}}

    refuse_unproven(model)

    assert zero_masters(model) == []
