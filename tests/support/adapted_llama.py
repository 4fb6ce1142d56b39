"""A small Llama to put adapters on."""

import torch
from tiny import make_rows, make_texts
from transformers import LlamaConfig, LlamaForCausalLM

from ezmia_callbacks import hold_out_canaries


def make_llama(*, hidden_size=32, attention_bias=False):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        attention_bias=attention_bias,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def draw():
    return hold_out_canaries(make_rows(make_texts(90)), n_members=20, n_non_members=30, seed=0)


def perturb(model):
    """Training, as far as a reference is concerned: every trainable weight moves."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
