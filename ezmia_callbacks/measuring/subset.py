"""The canaries that audits score: all of them, or a subset that stays the same in a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.functional.intervals import hanley_mcneil_standard_error
from ezmia_callbacks.functional.search import smallest_between
from ezmia_callbacks.measuring.analysis_units import AnalysisUnits

if TYPE_CHECKING:
    from jaxtyping import Bool

    from ezmia_callbacks.canaries.sets import CanarySet
    from ezmia_callbacks.scoring.rows import EncodedCanaries

__all__: list[str] = []

# Subsets are chosen in steps of this share.
_N_SHARES = 1_000


@dataclass(frozen=True, eq=False)
class CanarySubset:
    """Canaries as audits score them, and what figures count of them.

    Attributes:
        all_encoded: All canaries, as rows.
        all_units: What figures would count of all.
        share: Share of them that is scored, in (0, 1].
    """

    all_encoded: EncodedCanaries
    all_units: AnalysisUnits
    share: float = 1.0

    def of_share(self, share: float) -> CanarySubset:
        """Another subset of the same canaries; smaller ones lie inside larger ones."""
        return replace(self, share=share)

    @cached_property
    def is_chosen(self) -> Bool[np.ndarray, " n_all"]:
        """Which of all records are scored."""
        if self.share == 1.0:
            return np.ones(len(self.all_encoded.rows), dtype=np.bool_)
        return subset_of(self.all_units.canaries, self.share, seed=int(self.all_encoded.fingerprint, 16))

    @cached_property
    def encoded(self) -> EncodedCanaries:
        """The records that are scored."""
        return self.all_encoded if self.share == 1.0 else self.all_encoded.select(self.is_chosen)

    @cached_property
    def units(self) -> AnalysisUnits:
        """What figures count of them.

        Raises:
            TooFewCanariesError: if they are too few for any figure.
        """
        if self.share == 1.0:
            return self.all_units
        return AnalysisUnits(self.all_units.canaries.select(np.flatnonzero(self.is_chosen).tolist()))

    @property
    def n_members(self) -> int:
        """Members that figures count."""
        return int(self.units.is_member.sum())

    @property
    def n_non_members(self) -> int:
        """Non-members that figures count."""
        return int((~self.units.is_member).sum())

    def describe(self) -> str:
        """What it costs in certainty to score this subset alone, in one sentence."""
        whole = self.of_share(1.0)
        widths = [
            1.96
            * hanley_mcneil_standard_error(
                0.5, n_members=subset.n_members, n_non_members=subset.n_non_members
            )
            for subset in (self, whole)
        ]
        sizes = f"{self.n_members} members and {self.n_non_members} non-members"
        known = f"an AUC of 0.5 is then known to ±{widths[0]:.3f} at 95 % confidence"
        if self.share == 1.0:
            return f"Audits score all {sizes}: {known}."
        return f"Audits score {sizes} from here on: {known}; all canaries would make it ±{widths[1]:.3f}."


def smallest_subset(
    everything: CanarySubset, *, affordable_share: float, can_judge: Callable[[CanarySubset], bool]
) -> CanarySubset:
    """The subset that can be afforded; where it cannot judge the run, the smallest one that can, or all.

    Args:
        everything: All canaries.
        affordable_share: Share of them that the time allows; may be 0 or less.
        can_judge: Whether a subset is enough for the figures, and for a verdict.
    """

    @cache
    def subset(n: int) -> CanarySubset:
        return everything.of_share(n / _N_SHARES)

    n_affordable = min(math.floor(affordable_share * _N_SHARES), _N_SHARES)
    if n_affordable == _N_SHARES or (n_affordable >= 1 and can_judge(subset(n_affordable))):
        return subset(n_affordable)
    too_few = max(0, n_affordable)
    return subset(smallest_between(lambda n: can_judge(subset(n)), too_few=too_few, enough=_N_SHARES))


def subset_of(canaries: CanarySet, share: float, *, seed: int) -> Bool[np.ndarray, " n_records"]:
    """Which records belong to a subset of the canaries; smaller ones lie inside larger ones.

    Groups and pairs stay whole, and every side, tier and family keeps its share. Where coins decided on
    membership the subset is drawn without a look at it, so that the coins in it are fair.

    Args:
        canaries: All canaries.
        share: Share of the units of each kind, in (0, 1]; rounded down, but to no less than one.
        seed: Of the order in which records are taken.
    """
    has_coins = canaries.provenance.has_independent_coins
    kinds: dict[Hashable, dict[Hashable, list[int]]] = {}
    for i in range(len(canaries)):
        detail = None if canaries.details is None else canaries.details[i]
        unit: Hashable = canaries.record_ids[i]
        if canaries.groups is not None:
            unit = canaries.groups[i]
        elif detail is not None and detail.pair_id is not None:
            unit = ("pair", detail.pair_id)
        kind = (
            None if has_coins else bool(canaries.is_member[i]),
            None if detail is None else (detail.n_repeats, detail.family),
        )
        kinds.setdefault(kind, {}).setdefault(unit, []).append(i)
    rng = np.random.default_rng(seed)
    is_chosen = np.zeros(len(canaries), dtype=np.bool_)
    for units in kinds.values():
        members = list(units.values())
        # Rounded before it is rounded down: 0.29 of 100 is 29.
        n = max(1, math.floor(round(share * len(members), 9)))
        for position in rng.permutation(len(members))[:n]:
            is_chosen[members[position]] = True
    return is_chosen
