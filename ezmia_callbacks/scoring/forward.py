"""One forward pass over the canaries, reduced on the spot to token statistics.

The pass must leave no trace: dropout and the random state, the training flag of every submodule and the
autocast cache are restored exactly as they were found.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ezmia_callbacks.canaries.records import IGNORED_LABEL
from ezmia_callbacks.distributed import reshard
from ezmia_callbacks.errors import (
    ConfigurationError,
    NonFiniteLogitsError,
    UnsupportedModelError,
)
from ezmia_callbacks.scoring.projection import (
    LogitsFunction,
    Projection,
    aligned,
    scored_logits,
    try_projection,
)
from ezmia_callbacks.scoring.rows import TokenRow
from ezmia_callbacks.scoring.statistics import TokenStatistics

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__: list[str] = []

# Logits are reduced in pieces of this size, in float32: on a CPU one that its cache can hold.
_CHUNK_BYTES = 16 * 2**20
_CHUNK_BYTES_ON_CPU = 2**20

# The exponential of less is 0 in float32.
_LOWEST = -1e3

# Where the processor can use it, bitsandbytes packs 4-bit weights in place, with loss, at the first pass in
# evaluation mode. Training would go on with those, by a product that has no gradient.
_PACKS_IN_PLACE = "support_avx512bf16_for_cpu"

# Tokens of a record that are enough to try a model on.
_N_PROBE_TOKENS = 16


@contextmanager
def evaluation_without_side_effects(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, without gradients, and leave no trace afterwards.

    Training flags are written directly: some adapters merge weights in an overridden `train()`/`eval()`,
    which costs bits, and a plain `model.train()` would wake submodules that the user froze in
    evaluation mode.
    """
    flags = [(module, module.training) for module in model.modules()]
    packing = [module for module, _ in flags if vars(module).get(_PACKS_IN_PLACE)]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_states = torch.cuda.get_rng_state_all() if has_cuda else []
    for module, _ in flags:
        module.training = False
    for module in packing:
        setattr(module, _PACKS_IN_PLACE, False)
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(model)
        for module, was_training in flags:
            module.training = was_training
        for module in packing:
            setattr(module, _PACKS_IN_PLACE, True)
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
    # Anything else is refused by its shape.
    logits: Tensor = output if isinstance(output, Tensor) else getattr(output, "logits", output)
    return logits


def check_model(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    logits_fn: LogitsFunction = call_for_logits,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Projection:
    """Find out how a model can be scored; refuse one that is not causal, or too small for the rows.

    Causality is tried, not guessed from a name: changing a token must not change what was predicted
    before it.

    Returns:
        How its logits are to be computed.

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
    ids = _probe_ids(rows, _device_of(model))
    changed = ids.clone()
    first, last = ids[:, 0], ids[:, -1]
    changed[:, -1] = torch.where(last != first, first, (last + 1) % (n_vocabulary or 2))
    mask = torch.ones_like(ids)
    with evaluation_without_side_effects(model):
        with autocast():
            before = aligned(logits_fn(model, ids, mask), ids, model)[:, :-1].float()
            after = aligned(logits_fn(model, changed, mask), ids, model)[:, :-1].float()
        projection = try_projection(model, ids, logits_fn=logits_fn, autocast=autocast)
    # A causal model computes the earlier positions from the same numbers and hits the same bits.
    if bool((before - after).abs().max() > 1e-3 * before.std()):
        raise UnsupportedModelError(
            f"{type(model).__name__} looks ahead: changing the last token changed earlier predictions. Only "
            "causal language models can be audited."
        )
    return projection


def _probe_ids(rows: Sequence[TokenRow], device: torch.device) -> Int[Tensor, "2 length"]:
    """The first tokens of two records: their logits take no memory to speak of."""
    length = min(_N_PROBE_TOKENS, *(len(row.input_ids) for row in rows))
    return torch.from_numpy(np.stack([row.input_ids[:length] for row in (rows[0], rows[-1])])).to(device)


def deal_rows(rows: Sequence[TokenRow], *, batch_size: int, n_shares: int) -> list[list[int]]:
    """Indices of the rows that each of several processes scores, in whole batches of one process's audit.

    The batches, and with them every bit of the result, are those that one process alone would make.
    With fewer batches than processes the surplus ones repeat the first batch, so that none is idle while
    others wait for it.

    >>> from ezmia_callbacks.scoring.rows import TokenRow
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
    projection: Projection | None = None,
    logits_fn: LogitsFunction = call_for_logits,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    show_progress: bool = False,
) -> TokenStatistics:
    """Statistics of every scored token, from one forward pass over the rows.

    Rows are sorted by length, padded on the right, and scored on the model's device. Where the model's head
    can be called in pieces no more than 32 MiB of logits are held, else those of one batch. The result is in
    the order of `rows`, and the batches are the same at each call with the same rows, so that rounding is the
    same for the reference and for every audit.

    Args:
        model: A causal language model; left exactly as it was found.
        rows: Token rows.
        batch_size: Rows in a forward pass.
        n_batches: Forward passes to make at least: processes that share a model's weights must make the
            same number of them. The last batch is run again, for nothing, until they are made.
        projection: How the logits are computed, from `check_model`; found out first if None.
        logits_fn: How to get logits out of the model.
        autocast: Makes the context under which training runs its forward pass.
        show_progress: Show a bar if the pass takes longer than two seconds.

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
    with evaluation_without_side_effects(model):
        if projection is None:
            ids = _probe_ids(rows, device)
            projection = try_projection(model, ids, logits_fn=logits_fn, autocast=autocast)
        for start in tqdm(
            range(0, len(rows), batch_size),
            desc="privacy audit",
            leave=False,
            delay=2.0,
            disable=not show_progress,
        ):
            chosen = longest_first[start : start + batch_size]
            batch = _collate([rows[i] for i in chosen], device)
            with autocast():
                pieces = scored_logits(
                    model,
                    batch.input_ids,
                    batch.attention_mask,
                    batch.positions,
                    projection=projection,
                    logits_fn=logits_fn,
                )
                reduced = _reduce(pieces, batch.targets)
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
    # Of the flattened batch: where the logits of scored tokens are, row by row.
    positions: Int[Tensor, " n_scored"]
    targets: Int[Tensor, " n_scored"]


def _collate(rows: Sequence[TokenRow], device: torch.device) -> _Batch:
    length = max(len(row.input_ids) for row in rows)
    ids = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    is_scored = np.zeros((len(rows), length), dtype=np.bool_)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], mask[i, :n] = row.input_ids, 1
        is_scored[i, : n - 1] = row.labels[1:] != IGNORED_LABEL
    # Position t predicts token t + 1.
    positions = np.flatnonzero(is_scored)
    targets = ids.ravel()[positions + 1]
    return _Batch(*(torch.from_numpy(array).to(device) for array in (ids, mask, positions, targets)))


def _reduce(
    pieces: Iterable[Float[Tensor, "n_piece vocabulary"]], targets: Int[Tensor, " n_scored"]
) -> TokenStatistics:
    """Statistics of the scored positions, in float32 and in pieces of bounded size."""
    reduced, start = [], 0
    for logits in pieces:
        n_bytes = _CHUNK_BYTES_ON_CPU if logits.device.type == "cpu" else _CHUNK_BYTES
        size = max(1, n_bytes // (4 * logits.shape[-1]))
        own_targets = targets[start : start + len(logits), None].to(logits.device)
        start += len(logits)
        for at in range(0, len(logits), size):
            reduced.append(_reduce_chunk(logits[at : at + size], own_targets[at : at + size]))
    log_probs, is_correct, means, deviations, is_finite = (
        torch.cat(columns) for columns in zip(*reduced, strict=True)
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
        np.array([0, len(log_probs)], dtype=np.int64),
    )


def _reduce_chunk(
    logits: Float[Tensor, "n vocabulary"], targets: Int[Tensor, "n 1"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of the target, whether it is the largest, mean and deviation of log-probabilities.

    Few passes over the vocabulary and two buffers: this is what an audit adds to a forward pass.
    """
    true_logits, top = logits.gather(1, targets), logits.amax(1, keepdim=True)
    # A tie with the true token counts as correct: argmax alone would depend on the order of the vocabulary.
    is_correct = (true_logits >= top).squeeze(1)
    shifted = logits.float() - top.float() if logits.dtype != torch.float32 else logits - top
    probs = shifted.exp()
    total = probs.sum(1)
    log_total = total.log()
    log_probs = (true_logits.float() - top.float()).squeeze(1) - log_total
    # Tokens that a model rules out have logit -inf and weight 0.
    shifted.clamp_(min=_LOWEST)
    mean = _dot(probs, shifted) / total
    deviations = (_dot(probs, shifted.sub_(mean[:, None]).square_()) / total).sqrt()
    means = mean - log_total
    is_finite = log_probs.isfinite() & means.isfinite() & deviations.isfinite()
    return log_probs, is_correct, means, deviations, is_finite


def _dot(a: Float[Tensor, "n vocabulary"], b: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
    """Row by row, without a buffer for the products."""
    return torch.bmm(a[:, None], b[:, :, None]).flatten()


def _device_of(model: nn.Module) -> torch.device:
    """Device that takes the token ids: that of the input embeddings, else of the first parameter."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    first = next(embeddings.parameters() if embeddings is not None else model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
