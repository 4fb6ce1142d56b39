"""Exposure of single canaries: how far up they rank among records that were not trained on, in bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import scipy

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.roc import split_by_class

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64

__all__: list[str] = []

# Bits. A skew-normal tail is a difference of two numbers near 1e-16 below 2^-53: noise, not evidence.
EXTRAPOLATION_CEILING = 40.0
# Below this the fit is a guess: the third moment of so few records says next to nothing.
_MINIMUM_TO_FIT = 30
_N_SIMULATED_FITS = 199


@dataclass(frozen=True, eq=False)
class Exposure:
    """Exposure of each member canary, or why there is none.

    Attributes:
        values: Bits per member, in their given order, in [0, ceiling]; None if an extrapolation would not
            have been sound.
        ceiling: Largest value that can be shown. A value that reaches it means "at least".
        n_references: Number of non-members that the members are ranked among.
        method: `"rank"`, or `"skew_normal"` for an extrapolation beyond the references.
        goodness_of_fit: p-value of "the references are skew-normal", for an extrapolation.
    """

    values: Float64[np.ndarray, " n_members"] | None
    ceiling: float
    n_references: int
    method: Literal["rank", "skew_normal"]
    goodness_of_fit: float | None = None

    def describe(self) -> str:
        """Median and largest exposure, with what limits them, as one plain sentence."""
        if self.values is None:
            return (
                f"no extrapolated exposure: the scores of the {self.n_references} references are not "
                f"skew-normal (p = {self.goodness_of_fit:.3g})"
            )
        largest = float(np.max(self.values))
        at_least = "at least " if largest >= self.ceiling else ""
        how = "among" if self.method == "rank" else "extrapolated from"
        return (
            f"exposure {how} {self.n_references} references: median {np.median(self.values):.2f} bits, "
            f"largest {at_least}{largest:.2f} (ceiling {self.ceiling:.2f}; 1.44 on average without leakage)"
        )


class _SkewNormal(NamedTuple):
    """Parameters of skew-normal distributions: one, or one per row."""

    shape: Float64[np.ndarray, " rows"]
    location: Float64[np.ndarray, " rows"]
    scale: Float64[np.ndarray, " rows"]


def exposure_of_rank(rank: int, n_candidates: int) -> float:
    """Bits by which a rank beats a random one, in [0, log2(n_candidates)].

    Args:
        rank: Rank of the canary, from 1 (most likely a member).
        n_candidates: Size of the space that it is ranked in, the canary itself included.

    Raises:
        ConfigurationError: if the rank is not in [1, n_candidates].

    Source: Carlini et al. 2019, arXiv:1802.08232, definition 4: log2 |R| - log2 rank.

    >>> round(exposure_of_rank(5, 1000), 3)
    7.644
    """
    if not 1 <= rank <= n_candidates:
        raise ConfigurationError(f"`rank` is {rank}, but it needs to lie in [1, {n_candidates}].")
    return math.log2(n_candidates) - math.log2(rank)


def rank_exposure(scores: Float[np.ndarray, " n"], is_member: Bool[np.ndarray, " n"]) -> Exposure:
    """Exposure of each member by its rank among the non-members.

    Candidates are the canary itself and all non-members, and a tie puts the non-member first. So a model
    that leaks nothing shows every rank equally often: 1.44 bits on average, and 4.3 or more for one canary
    in 20. No value can exceed log2(n_non_members + 1): rank 1 means "at least" that.

    Args:
        scores: Membership scores, finite; higher means more likely a member. Scores relative to the
            reference model rank better than raw losses.
        is_member: True where the record was in the training set.

    Raises:
        ConfigurationError: if the arrays do not match, or a score is not finite.
        TooFewCanariesError: if either class is empty.

    Source: Carlini et al. 2019, arXiv:1802.08232, section 4.3 (exposure by sampling).

    >>> exposure = rank_exposure(np.array([9.0, 0.0, 0.0, 1.0, 2.0]), np.arange(5) < 2)
    >>> exposure.values.tolist(), exposure.ceiling
    ([2.0, 0.0], 2.0)
    """
    members, non_members = split_by_class(scores, is_member)
    n_references = len(non_members)
    n_before = n_references - np.searchsorted(np.sort(non_members), members, side="left")
    ceiling = math.log2(n_references + 1)
    return Exposure(ceiling - np.log2(n_before + 1.0), ceiling, n_references, "rank")


def extrapolated_exposure(
    scores: Float[np.ndarray, " n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    significance: float = 0.05,
    seed: int = 0,
) -> Exposure:
    """Exposure of each member from a skew-normal distribution fitted to the non-members.

    Goes beyond what the number of non-members can show, on trust in the fitted tail. The trust is checked:
    if the non-members do not look skew-normal (Kolmogorov-Smirnov distance, compared with that of fits to
    simulated skew-normal samples), there are no values. A passed check is weak evidence about the far
    tail all the same, so quote `rank_exposure` beside it.

    Args:
        scores: Membership scores, finite; higher means more likely a member.
        is_member: True where the record was in the training set.
        significance: Values are suppressed if the fit's p-value is below it, in (0, 1).
        seed: Seed of the simulated samples.

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, or `significance` is outside
            (0, 1).
        TooFewCanariesError: if there is no member, or fewer than 30 non-members.

    Source: Carlini et al. 2019, arXiv:1802.08232, section 4.3 (-log2 of the fitted tail); fit by moments,
    Azzalini 1985; check after Lilliefors 1967.

    >>> scores = np.concatenate([[2.0, 5.0], np.random.default_rng(0).normal(size=500)])
    >>> extrapolated_exposure(scores, np.arange(502) < 2).values.round(1).tolist()
    [5.8, 25.0]
    """
    if not 0 < significance < 1:
        raise ConfigurationError(
            f"`significance` is {significance}, but it needs to lie in (0, 1): use 0.05."
        )
    members, non_members = split_by_class(scores, is_member)
    n_references = len(non_members)
    if n_references < _MINIMUM_TO_FIT:
        raise TooFewCanariesError(
            f"Extrapolated exposure needs at least {_MINIMUM_TO_FIT} non-members to fit, got {n_references}: "
            "add non-members, or use `rank_exposure`."
        )
    # Exposure does not depend on the unit: from here on the references lie within [-1, 1].
    unit = float(np.max(np.abs(non_members))) or 1.0
    center = float(np.median(non_members / unit))
    references = non_members / unit - center
    spread = float(np.max(np.abs(references)))
    if spread == 0.0:
        return Exposure(None, EXTRAPOLATION_CEILING, n_references, "skew_normal", 0.0)
    references = references / spread
    p_value = _goodness_of_fit(references, seed=seed)
    values = None
    if p_value >= significance:
        fitted = _fit_skew_normal(references[None])
        standard = ((members / unit - center) / spread - fitted.location) / fitted.scale
        tail = scipy.special.ndtr(-standard) + 2.0 * scipy.special.owens_t(standard, fitted.shape)
        # Plus 0, for an exposure of -0.0 looks like a mistake.
        values = -np.log2(np.clip(tail, 2.0**-EXTRAPOLATION_CEILING, 1.0)) + 0.0
    return Exposure(values, EXTRAPOLATION_CEILING, n_references, "skew_normal", p_value)


def _goodness_of_fit(sample: Float64[np.ndarray, " n"], *, seed: int) -> float:
    """P-value of "skew-normal", its parameters unknown, by simulation of the fitted distribution."""
    fitted = _fit_skew_normal(sample[None])
    delta = fitted.shape / np.sqrt(1.0 + fitted.shape**2)
    rng = np.random.default_rng(seed)
    size = (_N_SIMULATED_FITS, len(sample))
    # The distance depends on the shape alone, so location 0 and scale 1 do.
    simulated = delta * np.abs(rng.normal(size=size)) + np.sqrt(1.0 - delta**2) * rng.normal(size=size)
    observed = _distances(sample[None])[0]
    n_at_least = int(np.count_nonzero(_distances(simulated) >= observed))
    return (1 + n_at_least) / (_N_SIMULATED_FITS + 1)


def _fit_skew_normal(samples: Float64[np.ndarray, "rows n"]) -> _SkewNormal:
    """Skew-normal distribution with mean, variance and skewness of each row, as far as one has them."""
    mean, deviation = samples.mean(axis=1), samples.std(axis=1)
    third_moment = ((samples - mean[:, None]) ** 3).mean(axis=1)
    # The largest skewness of the family is 0.9953.
    skewness = np.clip(third_moment / deviation**3, -0.995, 0.995)
    power = np.abs(skewness) ** (2.0 / 3.0)
    size = np.sqrt(np.pi / 2.0 * power / (power + ((4.0 - np.pi) / 2.0) ** (2.0 / 3.0)))
    delta = np.sign(skewness) * size
    scale = deviation / np.sqrt(1.0 - 2.0 * delta**2 / np.pi)
    location = mean - scale * delta * np.sqrt(2.0 / np.pi)
    return _SkewNormal(delta / np.sqrt(1.0 - delta**2), location, scale)


def _distances(samples: Float64[np.ndarray, "rows n"]) -> Float64[np.ndarray, " rows"]:
    """Kolmogorov-Smirnov distance between each row and the skew-normal distribution fitted to it."""
    fitted = _fit_skew_normal(samples)
    n = samples.shape[1]
    standard = (np.sort(samples, axis=1) - fitted.location[:, None]) / fitted.scale[:, None]
    expected = scipy.special.ndtr(standard) - 2.0 * scipy.special.owens_t(standard, fitted.shape[:, None])
    above = np.arange(1, n + 1) / n - expected
    below = expected - np.arange(n) / n
    distances: Float64[np.ndarray, " rows"] = np.maximum(above, below).max(axis=1)
    return distances
