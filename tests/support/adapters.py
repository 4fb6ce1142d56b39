"""Saved adapters that change their base, without any training."""

import json

import peft
import torch
from tiny import make_model


def save_base(folder, *, seed=0, **overrides):
    """A base model with its tokenizer, as people keep it."""
    from tiny import make_tokenizer

    make_model(seed=seed, **overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder, *, base, seed=0, names=("default",), **overrides):
    """LoRA adapters of a base of the standard shape; those that are not called `default` go into subfolders.

    Args:
        folder: Folder to write.
        base: What the adapter names as its base; None for nothing.
        seed: Of its weights.
        names: Names of the adapters, each with other weights.
        overrides: Of the base that gives the shapes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        model = peft.get_peft_model(make_model(**overrides), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        model.save_pretrained(folder)
    for path in folder.rglob("adapter_config.json"):
        edit_json(path, base_model_name_or_path=base and str(base))
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
