"""One forward pass over the canaries, reduced on the spot to token statistics.

The pass must leave no trace: the model (`left_as_found`), the random state and the autocast cache are
restored exactly as they were found.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ezmia_callbacks.canaries.records import IGNORED_LABEL
from ezmia_callbacks.distributed import is_sharded
from ezmia_callbacks.errors import (
    BrokenPassError,
    ConfigurationError,
    NonFiniteLogitsError,
    UnsupportedModelError,
)
from ezmia_callbacks.safe_text import describe_error, get_logger
from ezmia_callbacks.scoring import dynamic_positions
from ezmia_callbacks.scoring.left_as_found import Traces, can_copy_on_write, left_as_found
from ezmia_callbacks.scoring.memory import is_out_of_memory, take_and_give_back
from ezmia_callbacks.scoring.projection import (
    LogitsFunction,
    Projection,
    aligned,
    scored_logits,
    try_projection,
)
from ezmia_callbacks.scoring.rows import MASK, TokenRow
from ezmia_callbacks.scoring.statistics import TokenStatistics

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__: list[str] = []

logger = get_logger(__name__)

# Logits are reduced in pieces of this size, in float32: on a CPU one that its cache can hold.
_CHUNK_BYTES = 16 * 2**20
_CHUNK_BYTES_ON_CPU = 2**20

_FLOAT32 = 4  # bytes

# The exponential of less is 0 in float32.
_LOWEST = -1e3

# Where the processor can use it, bitsandbytes packs 4-bit weights in place, with loss, at the first pass in
# evaluation mode. Training would go on with those, by a product that has no gradient.
_PACKS_IN_PLACE = "support_avx512bf16_for_cpu"

# What a model is called with by name, unless a `logits_fn` calls it.
_NEEDED = ("input_ids", "attention_mask")

# Tokens of a record that are enough to try a model on.
_N_PROBE_TOKENS = 16


@contextmanager
def evaluation_without_side_effects(
    model: nn.Module, traces: Traces | None = None, *, by_bits: bool = False, copies_on_write: bool = False
) -> Iterator[Callable[[], None]]:
    """Put a model in evaluation mode, without gradients, and leave no trace afterwards.

    Training flags are written directly: some adapters merge weights in an overridden `train()`/`eval()`,
    which costs bits, and a plain `model.train()` would wake submodules that the user froze in
    evaluation mode.

    Args:
        model: The model.
        traces: What is known of the traces that its forward passes leave.
        by_bits: Compare every bit of it before and after.
        copies_on_write: Find out what its forward passes overwrite.

    Yields:
        What puts the model back already, still in evaluation mode.

    Raises:
        ModelChangedError: if it could not be left as it was found.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_states = torch.cuda.get_rng_state_all() if has_cuda else []
    flags = [(module, module.training) for module in model.modules()]
    packing = [module for module, _ in flags if vars(module).get(_PACKS_IN_PLACE)]
    # Inside another wrapper, as in Lightning Fabric: to send buffers around overwrites them, and waits for
    # processes that make fewer passes.
    sending = [
        module
        for module, _ in flags
        if isinstance(module, nn.parallel.DistributedDataParallel) and module.require_forward_param_sync
    ]
    for module, _ in flags:
        module.training = False
    for module in packing:
        setattr(module, _PACKS_IN_PLACE, False)
    for wrapper in sending:
        wrapper.require_forward_param_sync = False
    try:
        with (
            left_as_found(
                model, traces or Traces(), by_bits=by_bits, copies_on_write=copies_on_write
            ) as put_back,
            torch.no_grad(),
        ):
            yield put_back
    finally:
        for module, was_training in flags:
            module.training = was_training
        for module in packing:
            setattr(module, _PACKS_IN_PLACE, True)
        for wrapper in sending:
            wrapper.require_forward_param_sync = True
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if has_cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        # Weights cast without gradients must not be found again by a training step under autocast.
        torch.clear_autocast_cache()


def traces_of(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    logits_fn: LogitsFunction,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Traces:
    """Which tensors the forward passes of a model overwrite, from one short pass; the model stays as it is.

    Raises:
        ModelChangedError: if it changes bits in a way that cannot be followed.
    """
    traces = Traces()
    if not can_copy_on_write(model):
        return traces
    with evaluation_without_side_effects(model, traces, by_bits=True, copies_on_write=True), autocast():
        try:
            _inputs_refused(model, _probe(rows, device_of(model)), logits_fn=logits_fn)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # A model that is wrong is refused elsewhere; an operation that cannot be watched is none of it.
            logger.debug("What the model overwrites was not found out: %s", error)
    return traces


class InputNotTakenError(ConfigurationError):
    """The model's forward pass does not take some of what training's batches hold.

    Args:
        names: Their names.
    """

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(f"The model's forward pass does not take {', '.join(sorted(names))}.")
        self.names = names


def takes_further_inputs(logits_fn: LogitsFunction) -> bool:
    """Whether a function that gets logits also takes what else training feeds, as `**inputs`."""
    parameters = inspect.signature(logits_fn).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def call_for_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Tensor:
    """Logits of a Hugging Face causal language model, or of a module that returns them directly.

    No labels are passed: fused losses would return no logits.

    Raises:
        InputNotTakenError: if the model does not take one of the further inputs.
        UnsupportedModelError: if it does not take token ids and their mask by the names that these have.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    lacking = [name for name in _NEEDED if name not in parameters and not takes_any]
    if lacking:
        raise _needs_logits_fn(model, lacking[0])
    # Whoever takes any name reads numbers at most: names of files, say, are for somebody else.
    unknown = frozenset(
        name
        for name, value in inputs.items()
        if name not in parameters and not (takes_any and _holds_numbers(value))
    )
    if unknown:
        raise InputNotTakenError(unknown)
    # Old releases of PEFT hand a prefix over as a cache, which then has to be on.
    has_prefix = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    takes_use_cache = ("use_cache" in parameters or takes_any) and not has_prefix
    options = {"use_cache": False} if takes_use_cache else {}
    try:
        output = model(input_ids=input_ids, attention_mask=attention_mask, **inputs, **options)
    except TypeError as error:
        # Adapters take any name and hand it on.
        refused = frozenset(name for name in inputs if f"argument '{name}'" in str(error))
        if refused:
            raise InputNotTakenError(refused) from error
        for name in _NEEDED:
            if f"argument '{name}'" in str(error):
                raise _needs_logits_fn(model, name) from error
        raise
    # Anything else is refused by its shape.
    logits: Tensor = output if isinstance(output, Tensor) else getattr(output, "logits", output)
    return logits


def _needs_logits_fn(model: nn.Module, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The forward pass of {type(model).__name__} takes no `{name}`: say how it is called, by "
        "`logits_fn=lambda model, input_ids, attention_mask: model(input_ids)` or another function that "
        "returns its logits, of shape (batch, length, vocabulary). The callbacks and PrivacyAuditor take one."
    )


def inputs_not_named(model: nn.Module, names: frozenset[str]) -> frozenset[str]:
    """Names that the forward pass of a model does not name itself, though it may take any.

    What a training step of the user's hands the model cannot be seen from outside. A language model inside
    the user's own, which sees the images for it, would swallow them without a word.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    inner = getattr(inner, "get_base_model", lambda: inner)()
    return names - set(inspect.signature(inner.forward).parameters)


def check_model(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    logits_fn: LogitsFunction = call_for_logits,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    traces: Traces | None = None,
) -> Projection:
    """Find out how a model can be scored; refuse one that is not causal, or too small for the rows.

    Causality is tried, not guessed from a name: changing a token must not change what was predicted
    before it. `traces` are those of the model, found out first if None.

    Returns:
        How its logits are to be computed.

    Raises:
        UnsupportedModelError: for encoders, encoder-decoders and models without logits.
        ModelChangedError: if it could not be left as it was found.
        ConfigurationError: if a row is longer, or a token id larger, than the model can take.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder: only causal language models can be audited."
        )
    traces = traces or traces_of(model, rows, logits_fn=logits_fn, autocast=autocast)
    longest = max(rows, key=lambda row: len(row.input_ids))
    limit = getattr(config, "max_position_embeddings", None)
    if (
        isinstance(limit, int)
        and 0 < limit < len(longest.input_ids)
        and not _takes_length(model, longest, limit, logits_fn=logits_fn, autocast=autocast, traces=traces)
    ):
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
    with evaluation_without_side_effects(model, traces, by_bits=True) as put_back:
        probe = _probe(rows, device_of(model))
        ids, mask = probe.input_ids, probe.attention_mask
        changed = ids.clone()
        # Of rows with images the first token may stand for one; the last but one is text.
        first, last = ids[:, -2 if probe.inputs else 0], ids[:, -1]
        changed[:, -1] = torch.where(last != first, first, (last + 1) % (n_vocabulary or 2))
        with autocast():
            before = aligned(logits_fn(model, ids, mask, **probe.inputs), ids, model)[:, :-1].float()
            put_back()
            after = aligned(logits_fn(model, changed, mask, **probe.inputs), ids, model)[:, :-1].float()
            # Padding that attends to nothing may be made to attend to everything.
            is_token = mask[:, :-1].bool().to(before.device)
            before, after = before[is_token], after[is_token]
        projection = try_projection(
            model, ids, logits_fn=logits_fn, autocast=autocast, attention_mask=mask, inputs=probe.inputs
        )
    # A causal model computes the earlier positions from the same numbers and hits the same bits.
    if bool((before - after).abs().max() > 1e-3 * before.std()):
        raise UnsupportedModelError(
            f"{type(model).__name__} looks ahead: changing the last token changed earlier predictions. Only "
            "causal language models can be audited."
        )
    return projection


def _takes_length(
    model: nn.Module,
    row: TokenRow,
    limit: int,
    *,
    logits_fn: LogitsFunction,
    autocast: Callable[[], AbstractContextManager[object]],
    traces: Traces,
) -> bool:
    """Whether the model takes a row longer than its configuration says; rotary ones do.

    Learned positions are a table of that length. On a GPU a row that is looked up beyond it would end the
    process's use of it, so that they are not tried; whatever else has an end is.
    """
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        # Some tables begin with two rows of their own.
        if is_table and module.num_embeddings < len(row.input_ids) + (module.num_embeddings > limit) * 2:
            return False
    with evaluation_without_side_effects(model, traces, by_bits=True), autocast():
        batch = _collate([row], device_of(model))
        try:
            logits_fn(model, batch.input_ids, batch.attention_mask, **batch.inputs)
        except (IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return False
    return True


def check_inputs(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    logits_fn: LogitsFunction = call_for_logits,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    traces: Traces | None = None,
) -> frozenset[str]:
    """Names of further inputs of the rows that the model cannot be given; empty if it takes them all.

    They are tried: adapters and wrappers take any name and hand it on. `traces` are those of the model, found
    out first if None.
    """
    traces = traces or traces_of(model, rows, logits_fn=logits_fn, autocast=autocast)
    names = {name for row in rows for name in row.inputs} - {MASK}
    # Not every record has an image.
    tried = [row for row in rows if row.batch_inputs is not None][:1] or [_shortest(rows)]
    with evaluation_without_side_effects(model, traces, by_bits=True), autocast():
        batch = _collate(tried, device_of(model))
        names |= set(batch.inputs)
        if not names:
            return frozenset()
        if not takes_further_inputs(logits_fn):
            return frozenset(names)
        return _inputs_refused(model, batch, logits_fn=logits_fn)


def _inputs_refused(model: nn.Module, batch: _Batch, *, logits_fn: LogitsFunction) -> frozenset[str]:
    """Run a batch with as many of its further inputs as the model takes; the names of the others."""
    refused = frozenset[str]() if takes_further_inputs(logits_fn) else frozenset(batch.inputs)
    while True:
        inputs = {name: value for name, value in batch.inputs.items() if name not in refused}
        try:
            logits_fn(model, batch.input_ids, batch.attention_mask, **inputs)
        except InputNotTakenError as error:
            if not error.names & inputs.keys():
                raise
            refused |= error.names
        else:
            return refused


def _shortest(rows: Sequence[TokenRow]) -> TokenRow:
    return min(rows, key=lambda row: len(row.input_ids))


def _probe(rows: Sequence[TokenRow], device: torch.device) -> _Batch:
    """The first tokens of two records, whose logits take no memory to speak of; else the shortest record.

    Where there are further inputs a part of a record may not go with them.
    """
    if any(row.has_further_inputs for row in rows):
        return _collate([_shortest(rows)], device)
    length = min(_N_PROBE_TOKENS, *(len(row.input_ids) for row in rows))
    ids = torch.from_numpy(np.stack([row.input_ids[:length] for row in (rows[0], rows[-1])])).to(device)
    nothing = torch.empty(0, dtype=torch.int64)
    return _Batch(ids, torch.ones_like(ids), nothing, nothing, {})


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
    batches = batches_of(rows, batch_size=batch_size)
    return [
        [i for batch in batches[share::n_shares] or batches[:1] for i in batch] for share in range(n_shares)
    ]


def batches_of(rows: Sequence[TokenRow], *, batch_size: int) -> list[list[int]]:
    """Indices of the rows of each forward pass, the longest first.

    Rows with padding of their own stand with rows of their length only: more padding on the right could
    change what theirs predicts, and the first token of a record is predicted by it.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
    groups = [order]
    if any(MASK in row.inputs for row in rows):
        groups = [list(group) for _, group in groupby(order, key=lambda i: len(rows[i].input_ids))]
    return [
        group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)
    ]


def try_memory(model: nn.Module, rows: Sequence[TokenRow], *, batch_size: int) -> None:
    """Take the memory that the largest tensors of a pass need, and give it back.

    These are as wide as the widest weights: the logits, in most models. They are there in the model's type,
    and some models make float32 of them.

    Args:
        model: A model whose passes must not break off, for processes make them together.
        rows: Token rows.
        batch_size: Rows in a forward pass.

    Raises:
        RuntimeError: if there is not so much memory.
    """
    weights = [p for p in model.parameters() if p.is_floating_point() and len(_shape(p)) > 1]
    width = max((max(_shape(weight)[-2:]) for weight in weights), default=0)
    n_bytes = max((weight.element_size() for weight in weights), default=0) + _FLOAT32
    n_tokens = max(
        len(batch) * len(rows[batch[0]].input_ids) for batch in batches_of(rows, batch_size=batch_size)
    )
    take_and_give_back(n_tokens * width * n_bytes, device_of(model))


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, also where DeepSpeed's third stage has taken it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def token_statistics(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    batch_size: int = 16,
    n_batches: int = 0,
    projection: Projection | None = None,
    traces: Traces | None = None,
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
            same number of them. A short one is made, for nothing, until they are.
        projection: How the logits are computed, from `check_model`; found out first if None.
        traces: Those of the model, from `traces_of`; none if None.
        logits_fn: How to get logits out of the model.
        autocast: Makes the context under which training runs its forward pass.
        show_progress: Show a bar if the pass takes longer than two seconds.

    Raises:
        NonFiniteLogitsError: if a logit that matters is NaN or infinite.
        UnsupportedModelError: if the model returns no logits.
        ModelChangedError: if the model could not be left as it was found.
    """
    traces = traces or Traces()
    passes = _Passes(logits_fn, is_shared=is_sharded(model))
    batches = batches_of(rows, batch_size=batch_size)
    n_scored = np.array([row.n_scored for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(n_scored)]).astype(np.int64)
    log_probs = np.empty(offsets[-1], dtype=np.float32)
    is_correct = np.empty(offsets[-1], dtype=np.bool_)
    means = np.empty(offsets[-1], dtype=np.float32)
    deviations = np.empty(offsets[-1], dtype=np.float32)
    device = device_of(model)
    with evaluation_without_side_effects(model, traces, by_bits=not traces.is_proven) as put_back:
        if projection is None:
            probe = _probe(rows, device)
            projection = try_projection(
                model,
                probe.input_ids,
                logits_fn=logits_fn,
                autocast=autocast,
                attention_mask=probe.attention_mask,
                inputs=probe.inputs,
            )
        for chosen in tqdm(
            batches,
            desc="privacy audit",
            leave=False,
            delay=2.0,
            disable=not show_progress,
        ):
            with passes.to_be_finished():
                batch = _collate([rows[i] for i in chosen], device)
                # What the model remembers of one batch must not show in the figures of the next.
                if traces.is_restless:
                    put_back()
                dynamic_positions.forget(model)
                with autocast():
                    pieces = scored_logits(
                        model,
                        batch.input_ids,
                        batch.attention_mask,
                        batch.positions,
                        projection=projection,
                        logits_fn=passes.logits_fn,
                        inputs=batch.inputs,
                    )
                    reduced = _reduce(pieces, batch.targets)
            if passes.failure is not None:
                break
            position = 0
            for i in chosen:
                into, out = slice(offsets[i], offsets[i + 1]), slice(position, position + n_scored[i])
                log_probs[into] = reduced.log_probs[out]
                is_correct[into] = reduced.is_correct[out]
                means[into] = reduced.means[out]
                deviations[into] = reduced.standard_deviations[out]
                position += int(n_scored[i])
        for _ in range(passes.n_made, max(len(batches), n_batches)):
            probe = _probe(rows, device)
            with autocast():
                passes.logits_fn(model, probe.input_ids, probe.attention_mask, **probe.inputs)
    if passes.failure is not None:
        raise passes.failure
    traces.is_proven = True
    return TokenStatistics(log_probs, is_correct, means, deviations, offsets)


class _Passes:
    """The forward passes over one set of rows.

    Processes that hold parts of a model make each pass together, so that one which fails between two passes
    makes the others all the same, for nothing, and tells afterwards.

    Args:
        logits_fn: How to get logits out of the model.
        is_shared: Whether processes hold parts of the model.

    Attributes:
        n_made: Passes made.
        failure: What went wrong between two passes.
    """

    def __init__(self, logits_fn: LogitsFunction, *, is_shared: bool) -> None:
        self._logits_fn = logits_fn
        self.is_shared = is_shared
        self.n_made = 0
        self.failure: Exception | None = None

    def logits_fn(self, model: nn.Module, *args: Any, **inputs: Any) -> Tensor:
        """The logits; an error here breaks off what all processes do together."""
        try:
            logits = self._logits_fn(model, *args, **inputs)
        except Exception as error:
            if not self.is_shared:
                raise
            raise BrokenPassError(describe_error(error)) from error
        self.n_made += 1
        return logits

    @contextmanager
    def to_be_finished(self) -> Iterator[None]:
        """What may fail here and nowhere else, and must not keep the others waiting."""
        try:
            yield
        except BrokenPassError:
            raise
        except Exception as error:
            if not self.is_shared:
                raise
            self.failure = error


class _Batch(NamedTuple):
    input_ids: Int[Tensor, "batch length"]
    attention_mask: Int[Tensor, "batch length"]
    # Of the flattened batch: where the logits of scored tokens are, row by row.
    positions: Int[Tensor, " n_scored"]
    targets: Int[Tensor, " n_scored"]
    # What else the model is given, by name.
    inputs: dict[str, Any]


def _collate(rows: Sequence[TokenRow], device: torch.device) -> _Batch:
    of_batch = rows[0].batch_inputs
    made: dict[str, Any] = {}
    if of_batch is not None:
        made.update(of_batch.make([row.record_id for row in rows]))
    # What is made for a batch may have the collator's width.
    width = np.shape(made["input_ids"])[-1] if made else 0
    length = max(width, *(len(row.input_ids) for row in rows))
    ids = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    is_scored = np.zeros((len(rows), length), dtype=np.bool_)
    names = {name: values.dtype for row in rows for name, values in row.inputs.items() if name != MASK}
    further = {name: np.zeros((len(rows), length), dtype=dtype) for name, dtype in names.items()}
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], mask[i, :n] = row.input_ids, row.attention_mask
        for name in further:
            if name in row.inputs:
                further[name][i, :n] = row.inputs[name]
        is_scored[i, : n - 1] = row.labels[1:] != IGNORED_LABEL
    # Position t predicts token t + 1.
    positions = np.flatnonzero(is_scored)
    targets = ids.ravel()[positions + 1]
    inputs: dict[str, Any] = {name: torch.from_numpy(array) for name, array in further.items()}
    if of_batch is not None:
        inputs |= {name: value for name, value in made.items() if name in of_batch.names}

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return _Batch(
        moved(ids),
        moved(mask),
        moved(positions),
        moved(targets),
        {name: _moved(value, device) for name, value in inputs.items()},
    )


def _holds_numbers(value: Any) -> bool:
    """Whether it is a tensor or a number, or holds nothing else."""
    if isinstance(value, Mapping | list | tuple):
        return all(map(_holds_numbers, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, Tensor | int | float | None)


def _moved(value: Any, device: torch.device) -> Any:
    """A further input on the model's device, whatever its tensors lie in."""
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_moved(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


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


def device_of(model: nn.Module) -> torch.device:
    """Device that takes the token ids: that of the input embeddings, else of the first parameter.

    Of weights that hooks of `accelerate` bring in when they are needed, the one they are brought to.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    owner = next(
        (m for m in (embeddings or model).modules() if next(m.parameters(recurse=False), None) is not None),
        None,
    )
    if owner is None:
        return torch.device("cpu")
    first: Tensor = next(owner.parameters(recurse=False))
    return _execution_device(owner) if first.is_meta else first.device


def _execution_device(module: nn.Module) -> torch.device:
    hook = vars(module).get("_hf_hook")
    for each in (hook, *getattr(hook, "hooks", ())):
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise ConfigurationError(
        f"The weights of {type(module).__name__} are on the device `meta`, and nothing brings them in: load "
        "the model with its weights."
    )
