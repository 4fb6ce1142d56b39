"""How often each canary was fed to the model in training, and when last: counted, not worked out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.typed_rows import read_value

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

__all__: list[str] = []

NEVER = -1

DIFFERENT_BATCHES = "processes that compute each batch together were fed different ones"

# Records that show where training cuts: one or two may end there by chance.
_FEWEST_CUT = 3


@dataclass(frozen=True, eq=False)
class Exposures:
    """What training was fed of each canary, up to one point.

    A preference pair is fed where both of its sides are; see `of_pairs`.

    Attributes:
        n_times: int64, (n_canaries,): how often a batch held the whole record.
        last_step: int64, (n_canaries,): optimizer step that did so last, counted from 1; -1 if none did.
        share: float64, (n_canaries,): share of the record, in [0, 1], that was in batches at all, be it in
            several pieces; of a record that can only be told as a whole it is 0 or 1.
        cut_at: int64, (n_canaries,): tokens after which a record was cut, where its start alone was fed; else
            -1.
        n_batches: Batches that were looked at.
        longest_row: Tokens in the longest row of a batch, padding included.
        cut_to: Tokens to which canaries are cut, because training cuts its records so; 0 if they are whole.
        problem: Why batches could not be looked at; empty if they could.
    """

    n_times: Int64[np.ndarray, " n_canaries"]
    last_step: Int64[np.ndarray, " n_canaries"]
    share: Float64[np.ndarray, " n_canaries"]
    cut_at: Int64[np.ndarray, " n_canaries"]
    n_batches: int = 0
    longest_row: int = 0
    cut_to: int = 0
    problem: str = ""

    @classmethod
    def none(cls, n_canaries: int) -> Exposures:
        """Nothing was fed yet."""
        return cls(
            np.zeros(n_canaries, dtype=np.int64),
            np.full(n_canaries, NEVER, dtype=np.int64),
            np.zeros(n_canaries),
            np.full(n_canaries, NEVER, dtype=np.int64),
        )

    @property
    def is_seen(self) -> Bool[np.ndarray, " n_canaries"]:
        """Which canaries the model was fed whole, at least once."""
        return np.asarray(self.n_times > 0)

    @property
    def is_seen_in_pieces(self) -> Bool[np.ndarray, " n_canaries"]:
        """Which canaries were fed to the last token, though never in one row: a block boundary cut them."""
        return np.asarray(~self.is_seen & (self.share >= 1.0))

    @property
    def is_seen_in_part(self) -> Bool[np.ndarray, " n_canaries"]:
        """Which canaries were fed, but never whole: truncation, a block boundary, or a near copy."""
        return np.asarray(~self.is_seen & (self.share > 0.0))

    def select(
        self, is_chosen: Bool[np.ndarray, " n_canaries"] | Int64[np.ndarray, " n_chosen"]
    ) -> Exposures:
        """The exposures of some of the canaries, in their order, or of those with these indices."""
        return replace(
            self,
            n_times=self.n_times[is_chosen],
            last_step=self.last_step[is_chosen],
            share=self.share[is_chosen],
            cut_at=self.cut_at[is_chosen],
        )

    def to_dict(self) -> dict[str, Any]:
        """The exposures as plain lists and numbers."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Exposures:
        """The exposures that `to_dict` was called on.

        Raises:
            ConfigurationError: if something in it is not what `to_dict` writes; names the place.
        """
        return read_value(cls, fields, name="exposures")


def truncation(
    exposures: Exposures,
    n_tokens: Int64[np.ndarray, " n_canaries"],
    *,
    tolerance: Int64[np.ndarray, " n_canaries"],
) -> int:
    """Tokens after which training cuts its records, as the batches show; 0 if they do not.

    Every record that is longer than any row and was fed at all ends where the longest row does. Blocks cut
    from running text do not look like that: there a record is cut wherever its block ends.

    Args:
        exposures: What was fed.
        n_tokens: Tokens of each record.
        tolerance: Tokens by which the end of what was fed is uncertain.
    """
    longest = exposures.longest_row
    is_cut = (n_tokens > longest) & exposures.is_seen_in_part
    ends_there = (exposures.cut_at <= longest) & (exposures.cut_at > longest - tolerance)
    return longest if is_cut.sum() >= _FEWEST_CUT and bool(ends_there[is_cut].all()) else 0


def cut_exposures(
    exposures: Exposures, n_tokens: Int64[np.ndarray, " n_canaries"], *, to: int, step: int
) -> Exposures:
    """The exposures of the same records, cut: of those that training cut the start is all there is.

    Args:
        exposures: What was fed.
        n_tokens: Tokens of each record.
        to: Tokens after which training cuts them.
        step: Optimizer steps done: they were fed by then.
    """
    is_cut = (n_tokens > to) & exposures.is_seen_in_part
    return replace(
        exposures,
        n_times=np.where(is_cut, 1, exposures.n_times),
        last_step=np.where(is_cut, step, exposures.last_step),
        share=np.where(is_cut, 1.0, exposures.share),
        cut_at=np.where(is_cut, NEVER, exposures.cut_at),
        cut_to=to,
    )


def whole_again(exposures: Exposures, n_tokens: Int64[np.ndarray, " n_canaries"]) -> Exposures:
    """The exposures of records that are cut no longer: what was fed of those that were is not known.

    Args:
        exposures: What was fed while they were cut.
        n_tokens: Tokens of each whole record.
    """
    was_cut = n_tokens > exposures.cut_to
    return replace(
        exposures,
        n_times=np.where(was_cut, 0, exposures.n_times),
        last_step=np.where(was_cut, NEVER, exposures.last_step),
        share=np.where(was_cut, 0.0, exposures.share),
        cut_at=np.where(was_cut, NEVER, exposures.cut_at),
        cut_to=0,
    )


def of_pairs(sides: Sequence[Exposures]) -> Exposures:
    """The exposures of preference pairs by those of their sides; of other canaries they are the only side.

    A pair was fed as often as the side of it that was fed less often. If one side alone was fed whole, as one
    of another pair, its `share` is 1 all the same: as a member it does not count, for the contrast was not
    trained, and as a non-member neither, for half of it was.

    >>> chosen = replace(Exposures.none(2), n_times=np.array([3, 1]), share=np.array([1.0, 1.0]))
    >>> rejected = replace(Exposures.none(2), n_times=np.array([1, 0]), share=np.array([1.0, 0.2]))
    >>> pairs = of_pairs([chosen, rejected])
    >>> pairs.n_times.tolist(), pairs.is_seen_in_pieces.tolist()
    ([1, 0], [False, True])
    """

    def least(name: str) -> np.ndarray:
        return np.asarray(np.min([getattr(side, name) for side in sides], axis=0))

    def most(name: str) -> np.ndarray:
        return np.asarray(np.max([getattr(side, name) for side in sides], axis=0))

    return replace(
        sides[0],
        n_times=least("n_times"),
        last_step=least("last_step"),
        share=most("share"),
        cut_at=most("cut_at"),
    )


def add_exposures(parts: Iterable[Exposures]) -> Exposures:
    """What several processes, or the parts of an interrupted run, fed together.

    A record of which two parts fed different pieces counts with the larger one alone.

    >>> once = replace(Exposures.none(1), n_times=np.array([1]), last_step=np.array([3]))
    >>> twice = add_exposures([once, once])
    >>> twice.n_times.tolist(), twice.last_step.tolist()
    ([2], [3])
    """
    return reduce(_add, parts)


def same_exposures(parts: Sequence[Exposures]) -> Exposures:
    """What processes that compute each batch together were fed: each what the others were, counted once.

    >>> once = replace(Exposures.none(1), n_times=np.array([1]), n_batches=1)
    >>> same_exposures([once, once]).n_times.tolist()
    [1]
    >>> same_exposures([once, Exposures.none(1)]).problem
    'processes that compute each batch together were fed different ones'
    """
    first = parts[0]
    is_same = all(
        part.n_batches == first.n_batches
        and np.array_equal(part.n_times, first.n_times)
        and np.array_equal(part.share, first.share)
        for part in parts
    )
    problem = next((part.problem for part in parts if part.problem), "" if is_same else DIFFERENT_BATCHES)
    return replace(first, problem=problem)


def _add(one: Exposures, other: Exposures) -> Exposures:
    return Exposures(
        n_times=one.n_times + other.n_times,
        last_step=np.maximum(one.last_step, other.last_step),
        share=np.maximum(one.share, other.share),
        cut_at=np.where(one.share >= other.share, one.cut_at, other.cut_at),
        n_batches=one.n_batches + other.n_batches,
        longest_row=max(one.longest_row, other.longest_row),
        cut_to=max(one.cut_to, other.cut_to),
        problem=one.problem or other.problem,
    )
