"""Token statistics: all that is kept of a forward pass, and every score computed from it.

No text, no token ids and no logits are kept: 13 bytes for each scored token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.array_files import UNREADABLE, load_arrays, save_arrays
from ezmia_callbacks.errors import ConfigurationError, ReferenceMismatchError
from ezmia_callbacks.functional import scores
from ezmia_callbacks.typed_rows import read_value

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Float64, Int64

__all__: list[str] = []


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """What a model says about the scored tokens of a set of records.

    Only scored positions are held (label != -100), all records one after the other: the tokens of record
    `i` are `offsets[i]:offsets[i + 1]`.

    Attributes:
        log_probs: float32, (n_tokens,): natural logarithm of the true token's probability, <= 0.
        is_correct: bool, (n_tokens,): no other token was more probable than the true one.
        means: float32, (n_tokens,): mean log-probability under the model's own distribution, <= 0.
        standard_deviations: float32, (n_tokens,): its standard deviation, >= 0.
        offsets: int64, (n_records + 1,), from 0 to n_tokens.
        rejected: The same of the rejected sides, where the records are preference pairs and these are their
            chosen sides; else None.
    """

    log_probs: Float32[np.ndarray, " n_tokens"]
    is_correct: Bool[np.ndarray, " n_tokens"]
    means: Float32[np.ndarray, " n_tokens"]
    standard_deviations: Float32[np.ndarray, " n_tokens"]
    offsets: Int64[np.ndarray, " n_records_plus_1"]
    # Files hold its arrays beside these, under names of their own.
    rejected: TokenStatistics | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check that the arrays belong together."""
        if len(self.offsets) == 0 or self.offsets[0] != 0 or np.any(np.diff(self.offsets) < 0):
            raise ConfigurationError("`offsets` must begin with 0 and never fall.")
        if self.rejected is not None and self.rejected.n_records != self.n_records:
            raise ConfigurationError(
                f"{self.n_records} chosen sides and {self.rejected.n_records} rejected ones: pairs need both."
            )
        n_tokens = int(self.offsets[-1])
        for name in ("log_probs", "is_correct", "means", "standard_deviations"):
            if getattr(self, name).shape != (n_tokens,):
                raise ConfigurationError(
                    f"`{name}` has shape {getattr(self, name).shape}, `offsets` ends at {n_tokens}."
                )

    @property
    def n_records(self) -> int:
        """Number of records."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.offsets[-1])

    def select(self, is_chosen: Bool[np.ndarray, " n_records"]) -> TokenStatistics:
        """Statistics of some of the records, in their order."""
        lengths = np.diff(self.offsets)
        of_tokens = np.repeat(is_chosen, lengths)
        return TokenStatistics(
            self.log_probs[of_tokens],
            self.is_correct[of_tokens],
            self.means[of_tokens],
            self.standard_deviations[of_tokens],
            np.concatenate([[0], np.cumsum(lengths[is_chosen])]).astype(np.int64),
            None if self.rejected is None else self.rejected.select(is_chosen),
        )

    def split(self, n_chosen: int) -> TokenStatistics:
        """The records after so many as the rejected sides of those before; itself if there are none.

        Args:
            n_chosen: Records that are no rejected sides; these are first, and there are as many of the others
                or none.
        """
        if n_chosen == self.n_records:
            return self
        is_first = np.arange(self.n_records) < n_chosen
        return replace(self.select(is_first), rejected=self.select(~is_first))

    def cut(
        self,
        n_scored: Int64[np.ndarray, " n_records"],
        n_scored_of_rejected: Int64[np.ndarray, " n_records"] | None = None,
    ) -> TokenStatistics:
        """Statistics of the first scored tokens of each record alone.

        Args:
            n_scored: int64, (n_records,): how many of them, at most as many as there are.
            n_scored_of_rejected: The same of the rejected sides; None keeps them whole.
        """
        lengths = np.diff(self.offsets)
        place = np.arange(self.n_tokens) - np.repeat(self.offsets[:-1], lengths)
        of_tokens = place < np.repeat(n_scored, lengths)
        return TokenStatistics(
            self.log_probs[of_tokens],
            self.is_correct[of_tokens],
            self.means[of_tokens],
            self.standard_deviations[of_tokens],
            np.concatenate([[0], np.cumsum(n_scored)]).astype(np.int64),
            self.rejected
            if self.rejected is None or n_scored_of_rejected is None
            else self.rejected.cut(n_scored_of_rejected),
        )


def join_statistics(parts: Sequence[TokenStatistics], indices: Sequence[Sequence[int]]) -> TokenStatistics:
    """One set of statistics of what several processes scored.

    Args:
        parts: Statistics of each process's records.
        indices: For each part, where its records belong in the whole. Of a record that several parts hold
            the first counts.

    >>> part = lambda *values: TokenStatistics(
    ...     *(np.array(values, dtype=t) for t in ("f4", "?", "f4", "f4")), np.arange(len(values) + 1)
    ... )
    >>> join_statistics([part(-1, -3), part(-2)], [[2, 0], [1]]).log_probs.tolist()
    [-3.0, -2.0, -1.0]
    """
    owners = list(zip(parts, indices, strict=True))
    where = {i: (part, k) for part, own in reversed(owners) for k, i in enumerate(own)}
    spans = [
        (part, slice(part.offsets[k], part.offsets[k + 1])) for part, k in (where[i] for i in sorted(where))
    ]
    lengths = [span.stop - span.start for _, span in spans]
    rejected = [part.rejected for part in parts if part.rejected is not None]
    return TokenStatistics(
        rejected=join_statistics(rejected, indices) if rejected else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        **{
            name: np.concatenate([getattr(part, name)[span] for part, span in spans])
            for name in _ARRAYS
            if name != "offsets"
        },
    )


_ARRAYS = ("log_probs", "is_correct", "means", "standard_deviations", "offsets")
# Before the names of the arrays of the rejected sides.
_REJECTED = "rejected_"

Scorer = Callable[
    [TokenStatistics, TokenStatistics, "Int64[np.ndarray, ' n_records'] | None"],
    "Float64[np.ndarray, ' n_records']",
]

SCORES: Mapping[str, Scorer] = {
    "ez": lambda target, reference, _: scores.ez_score(
        target.log_probs,
        reference.log_probs,
        target.is_correct,
        reference.is_correct,
        offsets=target.offsets,
    ),
    "loss_difference": lambda target, reference, _: scores.loss_difference_score(
        target.log_probs, reference.log_probs, offsets=target.offsets
    ),
    "wbc": lambda target, reference, _: scores.wbc_score(
        target.log_probs, reference.log_probs, offsets=target.offsets
    ),
    "calibrated_min_k_plus_plus": lambda target, reference, _: scores.calibrated_min_k_plus_plus_score(
        _moments(target), _moments(reference), offsets=target.offsets
    ),
    "ratio": lambda target, reference, _: scores.ratio_score(
        target.log_probs, reference.log_probs, offsets=target.offsets
    ),
    "loss": lambda target, _reference, _: scores.loss_score(target.log_probs, offsets=target.offsets),
    "min_k": lambda target, _reference, _: scores.min_k_score(target.log_probs, offsets=target.offsets),
    "min_k_plus_plus": lambda target, _reference, _: scores.min_k_plus_plus_score(
        target.log_probs, target.means, target.standard_deviations, offsets=target.offsets
    ),
    "margin": lambda target, reference, _: scores.margin_score(
        target.log_probs,
        reference.log_probs,
        _rejected(target).log_probs,
        _rejected(reference).log_probs,
        chosen_offsets=target.offsets,
        rejected_offsets=_rejected(target).offsets,
    ),
    "zlib": lambda target, _reference, n_bytes: scores.zlib_score(
        target.log_probs, n_compressed_bytes=_required(n_bytes), offsets=target.offsets
    ),
}
"""Every score by its name: (target statistics, reference statistics, compressed bytes) -> scores."""


def _moments(statistics: TokenStatistics) -> scores.TokenMoments:
    return scores.TokenMoments(statistics.log_probs, statistics.means, statistics.standard_deviations)


def _rejected(statistics: TokenStatistics) -> TokenStatistics:
    if statistics.rejected is None:
        raise ConfigurationError(
            "The margin compares the two sides of preference pairs, and these records have no rejected side: "
            "give records with 'chosen' and 'rejected' (or 'input_ids' and 'rejected_input_ids'), or use "
            "another score, such as 'ez'."
        )
    return statistics.rejected


def _required(n_bytes: Int64[np.ndarray, " n_records"] | None) -> Int64[np.ndarray, " n_records"]:
    if n_bytes is None:
        raise ConfigurationError("The zlib score needs the text of every record: these have none.")
    return n_bytes


def score_records(
    name: str,
    target: TokenStatistics,
    reference: TokenStatistics,
    *,
    n_compressed_bytes: Int64[np.ndarray, " n_records"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Membership score of every record; higher means more likely a member.

    Args:
        name: A key of `SCORES`.
        target: Statistics of the model under audit.
        reference: Statistics of the model before fine-tuning, for the same tokens.
        n_compressed_bytes: zlib-compressed size of each record's text; needed by `"zlib"` alone.

    Raises:
        ConfigurationError: if the score is unknown, the two statistics do not cover the same tokens, or the
            score needs a rejected side, or text, and there is none.
    """
    if name not in SCORES:
        raise ConfigurationError(f"Unknown score {name!r}: use one of {', '.join(SCORES)}.")
    _check_same_tokens(target, reference, name="Target and reference")
    if target.rejected is not None and reference.rejected is not None:
        _check_same_tokens(
            target.rejected, reference.rejected, name="The rejected sides of target and reference"
        )
    return SCORES[name](target, reference, n_compressed_bytes)


def _check_same_tokens(target: TokenStatistics, reference: TokenStatistics, *, name: str) -> None:
    if not np.array_equal(target.offsets, reference.offsets):
        raise ConfigurationError(
            f"{name} cover different tokens: {target.n_records} records with "
            f"{target.n_tokens} tokens against {reference.n_records} with {reference.n_tokens}."
        )


def save_statistics(path: Path, statistics: TokenStatistics, *, fingerprint: str) -> None:
    """Write statistics to a safetensors file, whole or not at all.

    Args:
        path: File to write; its folder is created.
        statistics: What to write.
        fingerprint: Identifies the scored tokens; `load_statistics` asks for it again.
    """
    save_arrays(path, arrays_of(statistics), {"version": 1, "fingerprint": fingerprint})


def load_statistics(path: Path, *, fingerprint: str) -> TokenStatistics:
    """Statistics read back from a file that `save_statistics` wrote.

    Raises:
        ReferenceMismatchError: if the file is missing, damaged, or was made for other canaries.
    """
    advice = (
        "Resume in the folder of the original run with the same canaries, or start again from the "
        "original weights: the trained weights cannot stand in for the reference."
    )
    try:
        file = load_arrays(path, _ARRAYS, optional=[_REJECTED + name for name in _ARRAYS])
        found, is_intact = str(file.metadata["fingerprint"]), file.is_intact()
    except FileNotFoundError:
        raise ReferenceMismatchError(f"No reference statistics at {path}. {advice}") from None
    except UNREADABLE as error:
        raise ReferenceMismatchError(
            f"The reference statistics at {path} cannot be read ({error}). {advice}"
        ) from error
    if found != fingerprint:
        raise ReferenceMismatchError(
            f"The reference statistics at {path} belong to other canaries or another reference (fingerprint "
            f"{found:.40}, these have {fingerprint}). {advice}"
        )
    if not is_intact:
        raise ReferenceMismatchError(f"The reference statistics at {path} are damaged. {advice}")
    try:
        return statistics_of(file.arrays)
    except ConfigurationError as error:
        raise ReferenceMismatchError(
            f"The reference statistics at {path} are damaged ({error}). {advice}"
        ) from error


def check_numbers(statistics: TokenStatistics) -> None:
    """Refuse statistics, of either side, in which something is no number.

    Raises:
        ConfigurationError: naming the array.
    """
    for name, array in arrays_of(statistics).items():
        if np.isnan(array).any():
            raise ConfigurationError(f"`{name}` holds NaN")


def arrays_of(statistics: TokenStatistics) -> dict[str, Any]:
    """The arrays of statistics by name, those of the rejected sides under names of their own."""
    arrays: dict[str, Any] = {name: getattr(statistics, name) for name in _ARRAYS}
    if statistics.rejected is not None:
        arrays |= {_REJECTED + name: getattr(statistics.rejected, name) for name in _ARRAYS}
    return arrays


def statistics_of(arrays: Mapping[str, object], *, name: str = "") -> TokenStatistics:
    """The statistics that `arrays_of` was called on.

    Args:
        arrays: What it returned, from a file or a checkpoint.
        name: Name of it, for the error.

    Raises:
        ConfigurationError: if something in it is not what `arrays_of` returns; names the place.
    """
    own = {key: array for key, array in arrays.items() if not key.startswith(_REJECTED)}
    others = {key.removeprefix(_REJECTED): arrays[key] for key in arrays.keys() - own.keys()}
    chosen = read_value(TokenStatistics, own, name=name)
    if not others:
        return chosen
    return replace(chosen, rejected=read_value(TokenStatistics, others, name=f"{name}.rejected".lstrip(".")))
