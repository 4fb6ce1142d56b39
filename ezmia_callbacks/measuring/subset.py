"""The canaries that audits score: all of them, or a part that stays the same in a run."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.errors import TooFewCanariesError
from ezmia_callbacks.functional.budget import LeakageBudget, check_resolvable
from ezmia_callbacks.functional.intervals import hanley_mcneil_standard_error
from ezmia_callbacks.functional.planning import describe_power, has_enough_power
from ezmia_callbacks.functional.search import smallest_between
from ezmia_callbacks.measuring.analysis_units import AnalysisUnits

if TYPE_CHECKING:
    from jaxtyping import Bool

    from ezmia_callbacks.canaries.sets import CanarySet
    from ezmia_callbacks.scoring.rows import EncodedCanaries

__all__ = ["CanarySubset", "smallest_subset", "subset_of"]

# Parts are chosen in steps of this share.
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
        """Another part of the same canaries; smaller parts lie inside larger ones."""
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
        """What it costs in certainty to score this part alone, in one sentence."""
        whole = self.of_share(1.0)
        widths = [
            1.96
            * hanley_mcneil_standard_error(0.5, n_members=part.n_members, n_non_members=part.n_non_members)
            for part in (self, whole)
        ]
        sizes = f"{self.n_members} members and {self.n_non_members} non-members"
        known = f"an AUC of 0.5 is then known to ±{widths[0]:.3f} at 95 % confidence"
        if self.share == 1.0:
            return f"Audits score all {sizes}: {known}."
        return f"Audits score {sizes} from here on: {known}; all canaries would make it ±{widths[1]:.3f}."

    def check_resolvable(self, budget: LeakageBudget, *, failure_probability: float) -> None:
        """Refuse a budget that these canaries could never answer.

        Raises:
            TooFewCanariesError: naming the number that would do.
        """
        check_resolvable(
            budget,
            n_members=self.n_members,
            n_non_members=self.n_non_members,
            failure_probability=failure_probability,
        )

    def describe_power(self, budget: LeakageBudget, *, failure_probability: float) -> str:
        """What an audit of these canaries can find out about a budget, in one sentence."""
        return describe_power(
            budget,
            n_members=self.n_members,
            n_non_members=self.n_non_members,
            failure_probability=failure_probability,
        )

    def can_judge(self, budget: LeakageBudget | None, *, failure_probability: float) -> bool:
        """Whether these canaries are enough for figures, and to find a run that is far over budget."""
        try:
            counts = {"n_members": self.n_members, "n_non_members": self.n_non_members}
            if budget is None:
                return True
            self.check_resolvable(budget, failure_probability=failure_probability)
        except TooFewCanariesError:
            return False
        return has_enough_power(budget, **counts, failure_probability=failure_probability)


def smallest_subset(
    everything: CanarySubset,
    *,
    affordable_share: float,
    budget: LeakageBudget | None,
    failure_probability: float,
) -> CanarySubset:
    """The part that can be afforded; where it cannot judge the budget, the smallest one that can, or all.

    Args:
        everything: All canaries.
        affordable_share: Share of them that the time allows; may be 0 or less.
        budget: What the figures are for.
        failure_probability: Error rate that the least favored audit may spend.
    """

    @cache
    def part(n: int) -> CanarySubset:
        return everything.of_share(n / _N_SHARES)

    def can_judge(n: int) -> bool:
        return part(n).can_judge(budget, failure_probability=failure_probability)

    n_affordable = min(math.floor(affordable_share * _N_SHARES), _N_SHARES)
    if n_affordable == _N_SHARES or (n_affordable >= 1 and can_judge(n_affordable)):
        return part(n_affordable)
    return part(smallest_between(can_judge, too_few=max(0, n_affordable), enough=_N_SHARES))


def subset_of(canaries: CanarySet, share: float, *, seed: int) -> Bool[np.ndarray, " n_records"]:
    """Which records belong to a part of the canaries; smaller parts lie inside larger ones.

    Groups and pairs stay whole, and every side, tier and family keeps its share. Where coins decided on
    membership the part is drawn without a look at it, so that the coins in it are fair.

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
