"""The canaries that audits score: all of them, or a subset that stays the same in a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.errors import TooFewCanariesError
from ezmia_callbacks.functional.intervals import auc_half_width
from ezmia_callbacks.functional.planning import MINIMUM_PER_CLASS
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
        cut_to: Tokens after which training cuts its records, and so are these; None if it does not.
    """

    all_encoded: EncodedCanaries
    all_units: AnalysisUnits
    share: float = 1.0
    cut_to: int | None = None

    def of_share(self, share: float) -> CanarySubset:
        """Another subset of the same canaries; smaller ones lie inside larger ones."""
        return replace(self, share=share)

    def units_of(self, is_counted: Bool[np.ndarray, " n_records"]) -> AnalysisUnits:
        """What figures count of some of the records that are scored.

        Raises:
            TooFewCanariesError: if they are too few for any figure.
        """
        if is_counted.all():
            return self.units
        n_members, n_non_members = self.count(is_counted)
        if min(n_members, n_non_members) < MINIMUM_PER_CLASS:
            raise TooFewCanariesError(
                f"{n_members} members and {n_non_members} non-members count, and {MINIMUM_PER_CLASS} of each "
                "are needed"
            )
        return AnalysisUnits(self.units.canaries.select(np.flatnonzero(is_counted).tolist()))

    def count(self, is_counted: Bool[np.ndarray, " n_records"]) -> tuple[int, int]:
        """Members and non-members that figures of some of the records would count."""
        units = self.units
        is_counted = is_counted & units.is_headline
        groups = units.canaries.groups
        names = np.asarray(units.canaries.record_ids if groups is None else groups)
        is_member = units.canaries.is_member
        n_members, n_non_members = (
            len(np.unique(names[is_counted & side])) for side in (is_member, ~is_member)
        )
        return n_members, n_non_members

    @cached_property
    def is_chosen(self) -> Bool[np.ndarray, " n_all"]:
        """Which of all records are scored."""
        if self.share == 1.0:
            return np.ones(len(self.all_encoded.rows), dtype=np.bool_)
        return subset_of(self.all_units.canaries, self.share, seed=int(self.all_encoded.fingerprint, 16))

    @cached_property
    def encoded(self) -> EncodedCanaries:
        """The records that are scored."""
        chosen = self.all_encoded if self.share == 1.0 else self.all_encoded.select(self.is_chosen)
        return chosen if self.cut_to is None else chosen.cut(self.cut_to)

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
            auc_half_width(subset.n_members, subset.n_non_members, failure_probability=0.025)
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
