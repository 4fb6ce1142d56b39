"""A small causal language model, trained from nothing in under a minute on two CPU cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__: list[str] = []

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

_MAX_GRADIENT_NORM = 1.0
_WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class BaseModelRecipe:
    """Sizes and schedule of the base model; the number of steps is fixed, so a run can be repeated.

    Attributes:
        vocabulary_size: Tokens of the byte-level BPE tokenizer, at least 258.
        hidden_size: Width of the model, a multiple of `2 * n_heads`.
        n_layers: Transformer blocks.
        n_heads: Attention heads per block.
        n_positions: Longest sequence, in tokens.
        n_steps: Optimizer steps.
        batch_size: Blocks per step.
        block_length: Tokens per block, at most `n_positions`.
        learning_rate: Peak of the cosine schedule.
        weight_decay: AdamW's decoupled weight decay.
    """

    vocabulary_size: int = 2048
    hidden_size: int = 192
    n_layers: int = 2
    n_heads: int = 4
    n_positions: int = 256
    n_steps: int = 500
    batch_size: int = 4
    block_length: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Reject sizes that cannot be built."""
        if self.vocabulary_size < 258:
            raise ConfigurationError(
                f"`vocabulary_size` must be at least 258 (256 bytes and 2 special tokens), "
                f"got {self.vocabulary_size}."
            )
        if self.hidden_size % (2 * self.n_heads):
            raise ConfigurationError(
                f"`hidden_size` must be a multiple of 2 * n_heads = {2 * self.n_heads}, "
                f"got {self.hidden_size}."
            )
        if not 2 <= self.block_length <= self.n_positions:
            raise ConfigurationError(
                f"`block_length` must be in [2, n_positions = {self.n_positions}], got {self.block_length}."
            )
        if self.n_steps < 1 or self.batch_size < 1:
            raise ConfigurationError(
                f"`n_steps` and `batch_size` must be positive, got {self.n_steps} and {self.batch_size}."
            )


class BaseModel(NamedTuple):
    """A trained model in evaluation mode, its tokenizer, and its last training loss in nats."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    final_loss: float


def train_base_model(
    records: Sequence[str],
    *,
    seed: int,
    recipe: BaseModelRecipe | None = None,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> BaseModel:
    """A small Llama-shaped model and its tokenizer, both trained on `records` from nothing.

    No dropout, tied embeddings, packed blocks at random offsets, AdamW with a warmed-up cosine. The
    same seed, machine and thread count give the same model; the global random state is restored.

    Args:
        records: Pre-training texts, together longer than one block.
        seed: Seeds the initial weights and the order of the blocks.
        recipe: Sizes and schedule; None is `BaseModelRecipe()`.
        device: Where to train, and where the model is left.
        show_progress: True shows a tqdm bar on standard error.

    Raises:
        ConfigurationError: if the records have fewer tokens than one block.
        MissingDependencyError: if transformers is not installed.
    """
    recipe = recipe or BaseModelRecipe()
    tokenizer = train_tokenizer(
        records, vocabulary_size=recipe.vocabulary_size, n_positions=recipe.n_positions
    )
    tokens = _packed_tokens(records, tokenizer)
    if len(tokens) < recipe.block_length:
        raise ConfigurationError(
            f"The records have {len(tokens)} tokens, one block needs {recipe.block_length}: "
            "give more text or a shorter `block_length`."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _untrained_model(recipe, tokenizer).to(device)
    final_loss = _train(
        model,
        tokens,
        recipe=recipe,
        rng=np.random.default_rng(seed),
        show_progress=show_progress,
    )
    return BaseModel(model, tokenizer, final_loss)


def train_tokenizer(
    records: Sequence[str], *, vocabulary_size: int, n_positions: int
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with an end and a padding token, trained on `records`.

    Encodes any text without loss. It adds no special token by itself and pads on the right.

    Raises:
        MissingDependencyError: if transformers is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except Exception as error:  # whatever a broken installation raises
        raise _missing_transformers(error) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        records,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[END_OF_TEXT, PADDING],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="right",
        model_max_length=n_positions,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _packed_tokens(records: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    encoded = tokenizer(list(records), add_special_tokens=False)["input_ids"] if records else []
    return torch.tensor(
        [token for tokens in encoded for token in (*tokens, tokenizer.eos_token_id)],
        dtype=torch.long,
    )


def _untrained_model(recipe: BaseModelRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except Exception as error:  # whatever a broken installation raises
        raise _missing_transformers(error) from error
    return LlamaForCausalLM(
        LlamaConfig(
            # The requested size, also where a short text yielded fewer merges.
            vocab_size=recipe.vocabulary_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=3 * recipe.hidden_size,
            num_hidden_layers=recipe.n_layers,
            num_attention_heads=recipe.n_heads,
            num_key_value_heads=recipe.n_heads,
            max_position_embeddings=recipe.n_positions,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    recipe: BaseModelRecipe,
    rng: np.random.Generator,
    show_progress: bool,
) -> float:
    """The loss of the last step, in nats per token; trains `model` in place."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": gains, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_share(step, n_steps=recipe.n_steps)
    )
    offsets = torch.arange(recipe.block_length)
    final_loss = math.nan
    model.train()
    steps = tqdm(range(recipe.n_steps), desc="Training the base model", disable=not show_progress)
    for _ in steps:
        n_starts = len(tokens) - recipe.block_length + 1
        starts = torch.from_numpy(rng.integers(n_starts, size=(recipe.batch_size, 1)))
        blocks = tokens[starts + offsets].to(model.device)
        loss = model(input_ids=blocks, labels=blocks).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        final_loss = float(loss.detach())
        steps.set_postfix(loss=f"{final_loss:.3f}", refresh=False)
    model.eval()
    return final_loss


def _learning_rate_share(step: int, *, n_steps: int) -> float:
    """The share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    n_warmup = max(1, round(_WARMUP_SHARE * n_steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))


def _missing_transformers(error: Exception) -> MissingDependencyError:
    of_others = {"peft", "tokenizers"} & {getattr(error, "name", None)}
    return MissingDependencyError.because(
        error,
        of_others.pop() if of_others else "transformers",
        'The demo needs transformers and peft: pip install "ezmia-callbacks[huggingface]".',
    )
