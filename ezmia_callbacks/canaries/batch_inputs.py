"""Inputs of the model that are made for a whole batch of records, such as images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

__all__: list[str] = []


@dataclass(frozen=True, eq=False)
class BatchInputs:
    """What a run's own collator makes of records besides values of their tokens.

    Attributes:
        names: Names under which the model is given them.
        make: Makes the batch of the records with these ids, in this order: `input_ids` and the inputs by
            name, each time the same.
        lacking: Inputs that training rows have and the canaries do not: scored, they miss them.
    """

    names: frozenset[str]
    make: Callable[[Sequence[str]], Mapping[str, object]]
    lacking: frozenset[str] = frozenset()

    def without(self, names: frozenset[str]) -> "BatchInputs":
        """The same without some of the inputs."""
        return replace(self, names=self.names - names, lacking=frozenset())
