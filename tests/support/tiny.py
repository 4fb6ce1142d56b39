"""Small real models and text, made on the spot: no download, no network."""

import numpy as np
import torch

VOCABULARY = 64
WORDS = (
    "the a one some of in on at from with by and or but river stone field cloud winter garden letter road "
    "house window harbor lantern keeps finds carries opens leaves turns old small bright silent heavy"
).split()


def make_texts(n: int, *, seed: int = 0, n_words: int = 12) -> list[str]:
    """Distinct sentences of common words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=n_words)) for _ in range(n)]


def make_tokenizer():
    """A word-level tokenizer that has seen every word of `make_texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        # As the tokenizers of GPT-2 and Llama; the default of older releases has `token_type_ids`, too.
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(*, seed: int = 0, dropout: float = 0.0, **overrides):
    """A two-layer GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        loss_type="ForCausalLM",
        **{"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, **overrides},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def make_rows(texts, tokenizer=None):
    """Tokenized rows, as a script's `map` would leave them."""
    tokenizer = tokenizer or make_tokenizer()
    return [dict(tokenizer(text)) for text in texts]
