"""Canaries that the callback draws itself, out of the training set of the trainer that it is given to.

This happens when the trainer is made: its data are prepared by then, and nothing has read them.
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import Subset

from ezmia_callbacks.canaries import CanarySet, hold_out_canaries
from ezmia_callbacks.console import say
from ezmia_callbacks.errors import CanaryError, ConfigurationError, TooFewCanariesError
from ezmia_callbacks.huggingface.trainer_access import Trainer
from ezmia_callbacks.huggingface.trl import is_packed, refuse_other_trainers
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.shells.membership_check import is_indexable

__all__: list[str] = []

logger = get_logger(__name__)

_BY_HAND = (
    "Draw them before the trainer is made, and pass them instead: "
    "`train_dataset, canaries = hold_out_canaries(train_dataset)`."
)


class HeldOut:
    """The canaries that were drawn out of the training set of each trainer.

    A copy in another process, as Ray makes them, has those that were drawn last: its trainer came along with
    what was left of the training set.

    Args:
        seed: Seed of the draw.
    """

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self._of: WeakKeyDictionary[Trainer, CanarySet] = WeakKeyDictionary()
        self._came_along: CanarySet | None = None

    def __getstate__(self) -> dict[str, Any]:
        last = next(reversed(list(self._of.values())), self._came_along)
        return {"seed": self.seed, "_came_along": last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _of=WeakKeyDictionary())

    def draw(self, trainer: Trainer, *, others: "list[HeldOut]") -> None:
        """Draw the trainer's canaries, and take the non-members out of its training set, once.

        Args:
            trainer: The trainer. Without a training set it is left as it is.
            others: Those of other callbacks of the trainer: what one of them has drawn is taken.

        Raises:
            ConfigurationError: if the training set is a stream, or others drew with another seed.
            CanaryError: if its rows hold several records each, or are too few.
        """
        if trainer in self._of or trainer.train_dataset is None:
            return
        drawn = [(other.seed, other.drawn_for(trainer)) for other in others]
        for seed, canaries in drawn:
            if canaries is not None and seed != self.seed:
                raise ConfigurationError(
                    f"Two PrivacyAuditCallbacks would hold out canaries with the seeds {seed} and "
                    f"{self.seed}, each some that the other one counts as trained on: give them one seed."
                )
        of_another = next((canaries for _, canaries in drawn if canaries is not None), None)
        self._of[trainer] = of_another or _hold_out(trainer, seed=self.seed)

    def drawn_for(self, trainer: Trainer) -> CanarySet | None:
        """The canaries of a trainer; None if none were drawn."""
        return self._of.get(trainer, self._came_along)

    def of(self, trainer: Trainer) -> CanarySet:
        """The canaries of a trainer.

        Raises:
            ConfigurationError: if none were drawn when it was made.
        """
        found = self.drawn_for(trainer)
        if found is None:
            raise ConfigurationError(
                'canaries="hold_out" draws when the trainer is made, and this one was made without the '
                "callback, or without a `train_dataset`: pass it in `callbacks=[...]`, or add it later by "
                '`trainer.add_callback(PrivacyAuditCallback("hold_out", trainer=trainer))`.'
            )
        return found


class _Rest(Subset[Any]):
    """A dataset of the user's without some of its rows.

    What it says of its rows one by one, such as the `lengths` that samplers ask for, goes without them, too.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(name)
        value = getattr(self.dataset, name)
        # Loaders tell a dataset its epoch, whatever its rows are; other methods would speak of all rows.
        if callable(value) and name != "set_epoch":
            raise AttributeError(
                f"The training set lacks the rows that the privacy audit holds out, and {name!r} of "
                f"{type(self.dataset).__name__} is for all of them. {_BY_HAND}"
            )
        is_by_row = hasattr(value, "__len__") and hasattr(value, "__getitem__")
        if not is_by_row or isinstance(value, str | Mapping) or len(value) != len(self.dataset):  # type: ignore[arg-type]  # it was drawn from by number
            return value
        return [value[i] for i in self.indices]


def _hold_out(trainer: Trainer, *, seed: int) -> CanarySet:
    """Canaries from a trainer's training set, which is left without the non-members."""
    refuse_other_trainers(trainer)
    dataset = trainer.train_dataset
    if not is_indexable(dataset):
        raise ConfigurationError(
            f'canaries="hold_out" got a stream ({type(dataset).__name__}), from which nothing can be drawn '
            "by number. Draw from its head, `head, canaries = hold_out_canaries(list(stream.take(10_000)))`, "
            "train on the head with the rest after it, and pass the canaries: docs/how-to/streams.md."
        )
    first = dataset[0] if len(dataset) else None
    if is_packed(trainer, "train_dataset") or (isinstance(first, Mapping) and "seq_lengths" in first):
        raise CanaryError(
            'canaries="hold_out" got a training set that is packed: a row holds several records. '
            f"{_BY_HAND} Or train with `packing=False`."
        )
    remaining: Any
    canaries: CanarySet
    try:
        remaining, canaries = hold_out_canaries(dataset, seed=seed)
    except TooFewCanariesError as error:
        raise TooFewCanariesError(
            f"{error} Draw such a split by `hold_out_canaries` before the trainer is made, and pass it."
        ) from error
    if isinstance(remaining, Subset):
        remaining = _Rest(remaining.dataset, remaining.indices)
    trainer.train_dataset = remaining
    say(
        logger,
        f"Held out of training: {len(dataset) - len(remaining)} of {len(dataset)} rows, drawn at random with "
        f"seed {seed}, are non-members. Training has {len(remaining)} rows left, and {canaries.n_members} of "
        "them are members.",
    )
    return canaries
