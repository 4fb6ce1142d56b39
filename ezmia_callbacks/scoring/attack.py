"""Room for a stronger attacker: another attack than the built-in scores may decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from ezmia_callbacks.errors import AuditError
from ezmia_callbacks.scoring.rows import EncodedCanaries
from ezmia_callbacks.scoring.statistics import TokenStatistics

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import nn

__all__: list[str] = []


@runtime_checkable
class Attack(Protocol):
    """A membership attack of the user's, to be passed as `score=`.

    It gets the model and the canaries, so that it may make forward passes of its own (on top-k logits, or
    with a reference model that it has trained), and the token statistics of the pass that is made anyway.
    The model is in evaluation mode, without gradients, and restored to what it was afterwards. In several
    processes each calls it, with the same canaries, and the main process's scores count.

    `canaries.is_member` is there, too: an attack may be trained on the canaries. It must then score each
    record by a classifier that has not seen it (cross-fitting), or it will find its own training set. It
    has no epsilon, whose proof needs guesses that do not depend on the other canaries' membership; its
    intervals are too narrow, by a factor of 1.2 to 1.5 where it was measured; and it is refused on groups and
    on several tiers of copies, which its folds would tear apart.

    A resumed run does not call `begin` again, for the weights are trained by then: keep what it computes in a
    file if `score` needs it.

    Attributes:
        name: Name of the score in results and files.
        is_trained_on_membership: Whether it looks at `canaries.is_member`.
    """

    name: str
    is_trained_on_membership: bool

    def begin(self, model: nn.Module, canaries: EncodedCanaries) -> None:
        """Prepare, before the first optimizer step; the model is still the start."""

    def score(
        self,
        model: nn.Module,
        canaries: EncodedCanaries,
        target: TokenStatistics,
        reference: TokenStatistics,
    ) -> Float64[np.ndarray, " n_records"]:
        """One finite score for each record of `canaries`; higher means more likely a member."""


def checked_scores(scores: object, *, name: str, n_records: int) -> Float64[np.ndarray, " n_records"]:
    """An attack's scores as an array.

    Raises:
        AuditError: if there is not one finite number for each record.
    """
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise AuditError(f"The attack {name!r} returned no numbers ({type(error).__name__}).") from error
    if array.shape != (n_records,) or not np.isfinite(array).all():
        raise AuditError(
            f"The attack {name!r} returned scores of shape {array.shape}, "
            f"{int((~np.isfinite(array)).sum())} of them not finite; one finite score for each of "
            f"{n_records} records is needed."
        )
    return array
