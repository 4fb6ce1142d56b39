"""Optimizers that train on other weights than those that are meant to be used.

Schedule-free optimizers take gradients at one point and hand out another; their `eval()` and `train()`
swap the two by arithmetic, which does not give every bit back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__: list[str] = []


@contextmanager
def weights_for_use(optimizer: Any) -> Iterator[None]:
    """Have the model hold the weights that its optimizer means to be used, and give every bit back.

    Any other optimizer, or None, is left alone.

    Args:
        optimizer: The optimizer, wrapped by accelerate or not.
    """
    if not swaps_weights(optimizer):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    was_training = any(not torch.equal(p, kept) for p, kept in zip(parameters, trained, strict=True))
    try:
        yield
    finally:
        if was_training:
            optimizer.train()
            with torch.no_grad():
                for parameter, kept in zip(parameters, trained, strict=True):
                    parameter.copy_(kept)


def forget_undone_steps(optimizer: Any) -> None:
    """Clear what an optimizer remembers of steps that are being undone; it starts fresh from there.

    Args:
        optimizer: The optimizer, wrapped by accelerate or not; None does nothing.
    """
    if swaps_weights(optimizer):
        optimizer.eval()
    state = getattr(optimizer, "state", None)
    if state is not None:
        state.clear()


def swaps_weights(optimizer: Any) -> bool:
    """Whether an optimizer trains on other weights than those that are meant to be used.

    Args:
        optimizer: The optimizer, wrapped by accelerate or not; None is none.
    """
    # accelerate's wrapper has both methods whether or not the optimizer has them.
    inner = getattr(optimizer, "optimizer", optimizer)
    return callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))
