"""Logits of the scored positions only, in pieces of bounded size, through the model's own head.

At a vocabulary of 152,000 the logits of 1,024 tokens fill 594 MiB, and most of what they cost is thrown away
where only an answer carries loss. So the body of the model runs once over the batch, and the model is then
called again with pieces of the body's answer: whatever it does to logits (a bias, a scale, soft-capping, an
adapter in the head) it does itself. Whether that gives the same numbers is tried before it is relied on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ezmia_callbacks.distributed import is_sharded
from ezmia_callbacks.errors import UnsupportedModelError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__: list[str] = []

LogitsFunction = Callable[..., Tensor]
"""(model, input_ids (B, T), attention_mask (B, T)) -> logits (B, T, V).

One that takes `**inputs` is also given what else training feeds, by name.
"""

NO_INPUTS: Mapping[str, Any] = {}

# Logits in float32 that are computed at once; a soft-capped head holds them twice, the reduction in part.
_PIECE_BYTES = 32 * 2**20

# Of the largest logit: rounding of a product of matrices in another shape, in float32 and with fewer bits.
_TOLERANCE, _COARSE_TOLERANCE = 1e-4, 2e-2


@dataclass(frozen=True)
class Projection:
    """How the logits of a model are computed.

    Attributes:
        n_vocabulary: Size of the vocabulary, if the scored positions alone can go through the head.
        reason: Why they cannot; None if they can.
    """

    n_vocabulary: int | None
    reason: str | None = None

    def describe(self) -> str:
        """One line for people, and for the facts of a run.

        >>> Projection(64).describe()
        'of scored positions only'
        """
        return "of scored positions only" if self.reason is None else f"of all positions ({self.reason})"


def try_projection(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    *,
    logits_fn: LogitsFunction,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    attention_mask: Int[Tensor, "batch length"] | None = None,
    inputs: Mapping[str, Any] = NO_INPUTS,
) -> Projection:
    """Find out, on a few real tokens, whether pieces give the same logits as the whole.

    Args:
        model: The model, in evaluation mode and without gradients.
        input_ids: Some token ids, at least three in all.
        logits_fn: How to get logits out of the model.
        autocast: Makes the context under which training runs its forward pass.
        attention_mask: 1 for tokens, 0 for padding; None if there is no padding.
        inputs: What else the model is given, by name.
    """
    obstacle = _obstacle(model)
    if obstacle is not None:
        return Projection(None, obstacle)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    # What padding predicts need not be a number.
    positions = mask.flatten().nonzero().flatten()[1:]
    with autocast():
        whole = aligned(logits_fn(model, input_ids, mask, **inputs), input_ids, model)
        whole = whole.flatten(0, 1)[positions.to(whole.device)]
        size = math.ceil(len(positions) / 3)
        try:
            pieces = list(
                _pieces(model, input_ids, mask, positions, size=size, logits_fn=logits_fn, inputs=inputs)
            )
        except Exception as error:  # whatever a model may say to a body that answers something else
            return Projection(None, f"its head cannot be called in pieces: {type(error).__name__}")
        is_coarse = torch.is_autocast_enabled(whole.device.type)
    found = torch.cat(pieces)
    is_coarse |= torch.get_float32_matmul_precision() != "highest"
    is_coarse |= any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    if found.shape != whole.shape:
        return Projection(None, "its head gives pieces of another shape")
    scale = whole[whole.isfinite()].abs().max() if bool(whole.isfinite().any()) else 1.0
    tolerance = float(scale) * (_COARSE_TOLERANCE if is_coarse else _TOLERANCE)
    # Infinite logits are equal where both are.
    if not bool(torch.isclose(found.float(), whole.float(), rtol=0.0, atol=tolerance).all()):
        return Projection(None, "its head gives other logits in pieces")
    return Projection(whole.shape[-1])


def scored_logits(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"],
    positions: Int[Tensor, " n_scored"],
    *,
    projection: Projection,
    logits_fn: LogitsFunction,
    inputs: Mapping[str, Any] = NO_INPUTS,
) -> Iterator[Float[Tensor, "n_piece vocabulary"]]:
    """Logits at some positions of a batch, in their order, a piece at a time.

    Args:
        model: The model, in evaluation mode and without gradients.
        input_ids: Token ids.
        attention_mask: 1 for tokens, 0 for padding.
        positions: Indices into the flattened batch.
        projection: What `try_projection` found.
        logits_fn: How to get logits out of the model.
        inputs: What else the model is given, by name.

    Raises:
        UnsupportedModelError: if the model returns no logits.
    """
    if projection.n_vocabulary is None:
        logits = aligned(logits_fn(model, input_ids, attention_mask, **inputs), input_ids, model)
        logits = logits.flatten(0, 1)
        size, positions = _n_at_once(logits.shape[-1]), positions.to(logits.device)
        for start in range(0, len(positions), size):
            yield logits[positions[start : start + size]]
        return
    size = _n_at_once(projection.n_vocabulary)
    yield from _pieces(
        model, input_ids, attention_mask, positions, size=size, logits_fn=logits_fn, inputs=inputs
    )


def _n_at_once(n_vocabulary: int) -> int:
    return max(1, _PIECE_BYTES // (4 * n_vocabulary))


def aligned(
    logits: object, input_ids: Int[Tensor, "batch length"], model: nn.Module
) -> Float[Tensor, "batch length vocabulary"]:
    """The logits of the tokens themselves: prompt tuning prepends virtual ones.

    Raises:
        UnsupportedModelError: if they are no tensor of that shape.
    """
    length = input_ids.shape[1]
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < length:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} returned no logits of shape (batch, {length}, vocabulary), got {got}: "
            "a causal language model is needed, or a `logits_fn` that returns its logits."
        )
    return logits[:, -length:]


def _obstacle(model: nn.Module) -> str | None:
    """Why no piece should be tried: sharded weights must be called as often on every process."""
    if is_sharded(model):
        return "its weights are sharded"
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return "it is compiled"
    if _body_of(model) is None:
        return "it is no Hugging Face model with a body and a head"
    return None


def _body_of(model: nn.Module) -> nn.Module | None:
    """The model without its head, under adapters and wrappers; None if there is none, or more than one."""
    bodies = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        # Of the class: wrappers hand attributes of the model on as their own.
        body = module._modules.get(getattr(type(module), "base_model_prefix", None) or "")
        if body is not None:
            bodies.append(body)
            # An image encoder below has a body of its own.
            inside |= set(module.modules())
    return bodies[0] if len(bodies) == 1 else None


def _pieces(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    *,
    size: int,
    logits_fn: LogitsFunction,
    inputs: Mapping[str, Any],
) -> Iterator[Tensor]:
    body = _body_of(model)
    if body is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no body that can be called alone.")
    run = body.forward
    answers: list[Any] = []
    scored: list[Tensor] = []

    def first(*args: Any, **kwargs: Any) -> object:
        answer = run(*args, **kwargs)
        hidden = (answer if isinstance(answer, Tensor) else answer[0])[:, -input_ids.shape[1] :]
        answers.append(answer)
        scored.append(hidden.flatten(0, 1)[positions.to(hidden.device)])
        return _with_hidden(answer, scored[0][:size])

    for start in range(0, len(positions), size):

        def again(*args: Any, _start: int = start, **kwargs: Any) -> object:
            return _with_hidden(answers[0], scored[0][_start : _start + size])

        # Put back before anything is given out: an error outside must not leave the model like this.
        with _forward_as(body, first if start == 0 else again):
            logits = logits_fn(model, input_ids, attention_mask, **inputs)
        if len(answers) != 1 or logits.ndim != 3 or logits.shape[0] != 1:
            raise UnsupportedModelError(f"{type(model).__name__} calls its body more or less than once.")
        yield logits[0]


def _with_hidden(answer: Any, hidden: Tensor) -> object:
    """A body's answer with other hidden states, as those of a single record."""
    if isinstance(answer, Tensor):
        return hidden[None]
    if isinstance(answer, tuple):
        return (hidden[None], *answer[1:])
    return type(answer)(**{**answer, "last_hidden_state": hidden[None]})


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Let a module answer with another function, on the instance, where others may have put theirs."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
