"""One forward pass over the canaries, reduced on the spot to token statistics.

The pass must leave no trace: dropout and the random state, the training flag of every submodule and the
autocast cache are put back exactly as they were found.
"""

from __future__ import annotations

import gc
import inspect
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ezmia_callbacks.distributed import everywhere, gather, reshard
from ezmia_callbacks.encoding import IGNORED_LABEL, TokenRow
from ezmia_callbacks.errors import (
    AuditMemoryError,
    ConfigurationError,
    NonFiniteLogitsError,
    UnsupportedModelError,
)
from ezmia_callbacks.token_statistics import TokenStatistics

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "LogitsFunction",
    "check_model",
    "deal_rows",
    "fit_into_memory",
    "is_out_of_memory",
    "token_statistics",
    "undisturbed",
]

logger = logging.getLogger(__name__)

LogitsFunction = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, input_ids (B, T), attention_mask (B, T)) -> logits (B, T, V)."""

# float32 copies of the logits are made in pieces of this size: on a CPU one that its cache can hold.
_CHUNK_BYTES = 64 * 2**20
_CHUNK_BYTES_ON_CPU = 2**20

_Result = TypeVar("_Result")

# What allocators say; only some of them raise a type of their own.
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def fit_into_memory(run: Callable[[int], _Result], *, batch_size: int) -> tuple[_Result, int]:
    """What `run(batch_size)` returns at the first size that fits into memory, and that size.

    When memory runs out the batch is halved and the run made again from its start, so that all of its
    batches have one size. Every process must call this: they halve together.

    Args:
        run: The run, given a batch size; leaves nothing behind when it fails.
        batch_size: Size to try first.

    Raises:
        AuditMemoryError: if a batch of one does not fit.

    >>> fit_into_memory(lambda size: "done", batch_size=8)
    ('done', 8)
    """
    while True:
        outcome = everywhere(partial(_attempt, run, batch_size))
        reasons = gather(outcome.reason if isinstance(outcome, _OutOfMemory) else None)
        if not isinstance(outcome, _OutOfMemory) and not any(reasons):
            return outcome, batch_size
        del outcome
        if batch_size == 1:
            raise AuditMemoryError(
                "One canary at a time is too much for the memory that is left "
                f"({next(filter(None, reasons))}): pass shorter canaries (`max_length=`), or leave more of "
                "the memory to the audit."
            )
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        logger.warning(
            "The audit ran out of memory with %d records in a batch; from here on it takes %d.",
            batch_size,
            batch_size // 2,
        )
        batch_size //= 2


class _OutOfMemory(NamedTuple):
    reason: str


def _attempt(run: Callable[[int], _Result], batch_size: int) -> _Result | _OutOfMemory:
    try:
        return run(batch_size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Not kept: its frames hold the tensors, and its message makes trainers shrink their batch.
        return _OutOfMemory(type(error).__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator said that there is no memory left."""
    is_by_name = isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    return is_by_name or isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, without gradients, and leave no trace afterwards.

    Training flags are written directly: some adapters merge weights in an overridden `train()`/`eval()`,
    which costs bits, and a plain `model.train()` would wake submodules that the user froze in
    evaluation mode.
    """
    flags = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_states = torch.cuda.get_rng_state_all() if has_cuda else []
    for module, _ in flags:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(model)
        for module, was_training in flags:
            module.training = was_training
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if has_cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        # Weights cast without gradients must not be found again by a training step under autocast.
        torch.clear_autocast_cache()


def call_for_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits of a Hugging Face causal language model, or of a module that returns them directly.

    No labels are passed: fused losses would return no logits.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    # Old releases of PEFT hand a prefix over as a cache, which then has to be on.
    has_prefix = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    takes_use_cache = ("use_cache" in parameters or takes_any) and not has_prefix
    options = {"use_cache": False} if takes_use_cache else {}
    output = model(input_ids=input_ids, attention_mask=attention_mask, **options)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    length = input_ids.shape[1]
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < length:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} returned no logits of shape (batch, {length}, vocabulary), got {got}: "
            "a causal language model is needed, or a `logits_fn` that returns its logits."
        )
    # Prompt tuning prepends virtual tokens.
    return logits[:, -length:]


def check_model(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    logits_fn: LogitsFunction = call_for_logits,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Refuse a model that is not causal, returns no logits, or is too small for the rows.

    Causality is tried, not guessed from a name: changing a token must not change what was predicted
    before it.

    Raises:
        UnsupportedModelError: for encoders, encoder-decoders and models without logits.
        ConfigurationError: if a row is longer, or a token id larger, than the model can take.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder: only causal language models can be audited."
        )
    longest = max(rows, key=lambda row: len(row.input_ids))
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < len(longest.input_ids):
        raise ConfigurationError(
            f"A canary has {len(longest.input_ids)} tokens, the model takes {limit}: pass `max_length=`, the "
            "truncation that training uses."
        )
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    n_vocabulary = getattr(embeddings, "num_embeddings", None)
    largest = max(int(row.input_ids.max()) for row in rows)
    if isinstance(n_vocabulary, int) and largest >= n_vocabulary:
        raise ConfigurationError(
            f"A canary holds token id {largest}, the model has {n_vocabulary} embeddings: was it encoded "
            "with this model's tokenizer?"
        )
    shortest = min(rows, key=lambda row: len(row.input_ids))
    ids = torch.from_numpy(shortest.input_ids[None].copy()).to(_device_of(model))
    changed = ids.clone()
    changed[0, -1] = ids[0, 0] if ids[0, -1] != ids[0, 0] else (ids[0, -1] + 1) % (n_vocabulary or 2)
    mask = torch.ones_like(ids)
    with undisturbed(model), autocast():
        before = logits_fn(model, ids, mask)[:, :-1].float()
        after = logits_fn(model, changed, mask)[:, :-1].float()
    # A causal model computes the earlier positions from the same numbers and hits the same bits.
    if bool((before - after).abs().max() > 1e-3 * before.std()):
        raise UnsupportedModelError(
            f"{type(model).__name__} looks ahead: changing the last token changed earlier predictions. Only "
            "causal language models can be audited."
        )


def deal_rows(rows: Sequence[TokenRow], *, batch_size: int, n_shares: int) -> list[list[int]]:
    """Indices of the rows that each of several processes scores, in whole batches of one process's audit.

    The batches, and with them every bit of the result, are those that one process alone would make.
    With fewer batches than processes the surplus ones repeat the first batch, so that none is idle while
    others wait for it.

    >>> from ezmia_callbacks.encoding import TokenRow
    >>> rows = [TokenRow(np.arange(n), np.arange(n)) for n in (2, 5, 3, 4)]
    >>> deal_rows(rows, batch_size=1, n_shares=2)
    [[1, 2], [3, 0]]
    """
    order = _longest_first(rows)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [
        [i for batch in batches[share::n_shares] or batches[:1] for i in batch] for share in range(n_shares)
    ]


def _longest_first(rows: Sequence[TokenRow]) -> list[int]:
    return sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))


def token_statistics(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    batch_size: int = 16,
    n_batches: int = 0,
    logits_fn: LogitsFunction = call_for_logits,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    is_progress_shown: bool = False,
) -> TokenStatistics:
    """Statistics of every scored token, from one forward pass over the rows.

    Rows are sorted by length, padded on the right, and scored on the model's device; logits of one batch
    at most are held. The result is in the order of `rows`, and the batches are the same at each call with
    the same rows, so that rounding is the same for the reference and for every audit.

    Args:
        model: A causal language model; left exactly as it was found.
        rows: Token rows.
        batch_size: Rows in a forward pass.
        n_batches: Forward passes to make at least: processes that share a model's weights must make the
            same number of them. The last batch is run again, for nothing, until they are made.
        logits_fn: How to get logits out of the model.
        autocast: Makes the context under which training runs its forward pass.
        is_progress_shown: Show a bar if the pass takes longer than two seconds.

    Raises:
        NonFiniteLogitsError: if a logit that matters is NaN or infinite.
        UnsupportedModelError: if the model returns no logits.
    """
    longest_first = _longest_first(rows)
    n_scored = np.array([row.n_scored for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(n_scored)]).astype(np.int64)
    log_probs = np.empty(offsets[-1], dtype=np.float32)
    is_correct = np.empty(offsets[-1], dtype=np.bool_)
    means = np.empty(offsets[-1], dtype=np.float32)
    deviations = np.empty(offsets[-1], dtype=np.float32)
    device = _device_of(model)
    with undisturbed(model):
        for start in tqdm(
            range(0, len(rows), batch_size),
            desc="privacy audit",
            leave=False,
            delay=2.0,
            disable=not is_progress_shown,
        ):
            chosen = longest_first[start : start + batch_size]
            batch = _collate([rows[i] for i in chosen], device)
            with autocast():
                logits = logits_fn(model, batch.input_ids, batch.attention_mask)
            reduced = _reduce(logits[:, :-1], batch.input_ids[:, 1:], batch.is_scored)
            del logits
            position = 0
            for i in chosen:
                into, out = slice(offsets[i], offsets[i + 1]), slice(position, position + n_scored[i])
                log_probs[into] = reduced.log_probs[out]
                is_correct[into] = reduced.is_correct[out]
                means[into] = reduced.means[out]
                deviations[into] = reduced.standard_deviations[out]
                position += int(n_scored[i])
        for _ in range(math.ceil(len(rows) / batch_size), n_batches):
            with autocast():
                logits_fn(model, batch.input_ids, batch.attention_mask)
    return TokenStatistics(log_probs, is_correct, means, deviations, offsets)


class _Batch(NamedTuple):
    input_ids: Int[Tensor, "batch length"]
    attention_mask: Int[Tensor, "batch length"]
    is_scored: Bool[Tensor, "batch length_minus_1"]


def _collate(rows: Sequence[TokenRow], device: torch.device) -> _Batch:
    length = max(len(row.input_ids) for row in rows)
    ids = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED_LABEL, dtype=np.int64)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], mask[i, :n], labels[i, :n] = row.input_ids, 1, row.labels
    is_scored = labels[:, 1:] != IGNORED_LABEL
    return _Batch(*(torch.from_numpy(array).to(device) for array in (ids, mask, is_scored)))


def _reduce(
    logits: Float[Tensor, "batch length vocabulary"],
    targets: Int[Tensor, "batch length"],
    is_scored: Bool[Tensor, "batch length"],
) -> TokenStatistics:
    """Statistics of the scored positions, row by row, in float32 and in pieces of bounded size."""
    positions = is_scored.flatten().nonzero().squeeze(1)
    flat_logits, flat_targets = logits.flatten(0, 1), targets.flatten()[positions]
    n_bytes = _CHUNK_BYTES_ON_CPU if logits.device.type == "cpu" else _CHUNK_BYTES
    size = max(1, n_bytes // (4 * flat_logits.shape[-1]))
    pieces = []
    for start in range(0, len(positions), size):
        piece = slice(start, start + size)
        scored = flat_logits[positions[piece]].float()
        pieces.append(_reduce_piece(scored, flat_targets[piece, None]))
    log_probs, is_correct, means, deviations, is_finite = (
        torch.cat(columns) for columns in zip(*pieces, strict=True)
    )
    if not bool(is_finite.all()):
        raise NonFiniteLogitsError(
            f"{int((~is_finite).sum())} of {len(is_finite)} scored tokens in a batch have NaN or infinite "
            "logits: the model has diverged, or its precision overflows."
        )
    return TokenStatistics(
        log_probs.cpu().numpy(),
        is_correct.cpu().numpy(),
        means.cpu().numpy(),
        deviations.cpu().numpy(),
        np.array([0, len(positions)], dtype=np.int64),
    )


def _reduce_piece(
    logits: Float[Tensor, "n vocabulary"], targets: Int[Tensor, "n 1"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    true_logits = logits.gather(1, targets)
    # A tie with the true token counts as correct: argmax alone would depend on the order of the vocabulary.
    is_correct = (true_logits >= logits.amax(1, keepdim=True)).squeeze(1)
    all_log_probs = logits.log_softmax(1)
    log_probs = all_log_probs.gather(1, targets).squeeze(1)
    probs = all_log_probs.exp()
    # Tokens that a model rules out have log-probability -inf and weight 0.
    all_log_probs = all_log_probs.masked_fill_(probs == 0, 0.0)
    means = (probs * all_log_probs).sum(1)
    centered = all_log_probs.sub_(means[:, None]).square_()
    deviations = centered.mul_(probs).sum(1).sqrt()
    is_finite = log_probs.isfinite() & means.isfinite() & deviations.isfinite()
    return log_probs, is_correct, means, deviations, is_finite


def _device_of(model: nn.Module) -> torch.device:
    """Device that takes the token ids: that of the input embeddings, else of the first parameter."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    first = next(embeddings.parameters() if embeddings is not None else model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
