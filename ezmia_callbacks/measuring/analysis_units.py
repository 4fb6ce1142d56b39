"""What figures count: records, or whole groups of them, of the tier that stands for a normal record."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.canaries.sets import CanarySet, by_group
from ezmia_callbacks.functional.epsilon import (
    EpsilonBound,
    check_epsilon_is_allowed,
    epsilon_one_run,
    one_run_guesses,
    pair_guesses,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Bool, Float64, Int

__all__: list[str] = []

# Share of the canaries on which the attack behind epsilon guesses, half of it at each end. Fixed here, before
# any score is seen: whoever tunes it on the result has to pay for the choice.
GUESSED_SHARE = 0.4


@dataclass(frozen=True, eq=False)
class AnalysisUnits:
    """How the scores of records become the scores that figures are made of.

    Canaries that are trained on in several copies leak more than a normal record: headlines are those of the
    fewest copies, and the others stand beside them. Records of one group are not independent: then the
    group, with the mean of its scores, is the unit.

    Attributes:
        canaries: The records, in the order in which they are scored.
    """

    canaries: CanarySet

    @cached_property
    def is_headline(self) -> Bool[np.ndarray, " n_records"]:
        """Which records the headline is about."""
        details, fewest = self.canaries.details, self.canaries.tiers[0]
        if details is None:
            return np.ones(len(self.canaries), dtype=np.bool_)
        return np.array([detail.n_repeats == fewest for detail in details], dtype=np.bool_)

    @cached_property
    def is_member(self) -> Bool[np.ndarray, " n_units"]:
        """Membership of the headline's units."""
        if self.canaries.groups is not None:
            zeros = np.zeros(len(self.canaries))
            return by_group(zeros, self.canaries.groups, self.canaries.is_member).is_member
        is_member: Bool[np.ndarray, " n_units"] = self.canaries.is_member[self.is_headline]
        return is_member

    def headline(self, scores: Float64[np.ndarray, " n_records"]) -> Float64[np.ndarray, " n_units"]:
        """Scores of the headline's units."""
        if self.canaries.groups is not None:
            return by_group(scores, self.canaries.groups, self.canaries.is_member).scores
        chosen: Float64[np.ndarray, " n_units"] = scores[self.is_headline]
        return chosen

    @cached_property
    def others(self) -> Mapping[str, Bool[np.ndarray, " n_records"]]:
        """Records of each tier, and of each family within the headline's tier, where there are several."""
        details = self.canaries.details
        if details is None:
            return {}
        tiers = self.canaries.tiers if len(self.canaries.tiers) > 1 else ()
        families = sorted(
            {d.family for d, is_first in zip(details, self.is_headline, strict=True) if is_first}
        )
        masks = {f"x{n}": np.array([d.n_repeats == n for d in details], dtype=np.bool_) for n in tiers}
        if len(families) > 1:
            masks |= {f: self.is_headline & np.array([d.family == f for d in details]) for f in families}
        # A family of a small tier may have fallen to one side alone.
        return {name: mask for name, mask in masks.items() if len({*self.canaries.is_member[mask]}) == 2}

    def epsilon(
        self, scores: Float64[np.ndarray, " n_records"], *, delta: float, confidence: float
    ) -> EpsilonBound:
        """Lower bound of epsilon from this one training run.

        Args:
            scores: Score of each record.
            delta: The delta of (epsilon, delta), in [0, 1).
            confidence: Confidence of the bound, in (0, 1).

        Raises:
            ConfigurationError: if membership was not drawn by independent coins.

        Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846.
        """
        check_epsilon_is_allowed(self.canaries.provenance.method)
        if self.canaries.provenance.method == "inserted_pairs":
            pairs = self._headline_pairs()
            is_first = self.canaries.is_member[pairs[:, 0]]
            members = np.where(is_first, scores[pairs[:, 0]], scores[pairs[:, 1]])
            others = np.where(is_first, scores[pairs[:, 1]], scores[pairs[:, 0]])
            n_guesses = max(1, round(GUESSED_SHARE * len(pairs)))
            guesses = pair_guesses(members, others, n_guesses=n_guesses)
        else:
            units, is_member = self.headline(scores), self.is_member
            each = max(1, round(GUESSED_SHARE / 2 * len(units)))
            guesses = one_run_guesses(units, is_member, n_guess_members=each, n_guess_non_members=each)
        return epsilon_one_run(guesses, delta=delta, confidence=confidence)

    def _headline_pairs(self) -> Int[np.ndarray, "n_pairs 2"]:
        pairs = self.canaries.pair_indices
        return pairs[self.is_headline[pairs].all(axis=1)]
