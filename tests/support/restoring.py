"""What a stopped run is held against: its weights at every step, its checkpoints, its history."""

from pathlib import Path

import torch
from tiny import make_model
from transformers import TrainerCallback

from ezmia_callbacks.shells.checkpoint_folders import step_of

N_STEPS_IN_EPOCH = 8


def make_adapted_model(*, dropout=0.0):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8,
        lora_dropout=dropout,
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(make_model(), config)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model, expected):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


class Witness(TrainerCallback):
    """Weights at every step, before anything could be restored; and what the trainer thought of them."""

    def __init__(self):
        self.weights = {}
        self.evaluated = {}
        self.saved = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.setdefault(state.global_step, weights(model))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluated[state.global_step] = dict(metrics)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.at_end = weights(model)


class LastWitness(Witness):
    """The same, after the audit: its figures are among the metrics."""


def checkpoints(folder):
    return sorted(step for path in Path(folder).glob("checkpoint-*") if (step := step_of(path)) is not None)


def in_budget_steps(history):
    return [result.step for result in history if result.decision.is_within_budget]
