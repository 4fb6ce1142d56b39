"""The verdict on an audit: figures and the audits before go in, a decision comes out; no model, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.budget import (
    Decision,
    EndShares,
    LeakageBudget,
    alpha_for_audit,
    check_resolvable,
    decide_by_strongest,
    end_shares,
)
from ezmia_callbacks.functional.planning import (
    MINIMUM_PER_CLASS,
    canaries_needed,
    describe_power,
    has_enough_power,
)
from ezmia_callbacks.measuring.split_checks import MET_BEFORE
from ezmia_callbacks.results.history import AuditHistory

if TYPE_CHECKING:
    from ezmia_callbacks.functional.intervals import Interval
    from ezmia_callbacks.measuring.subset import CanarySubset
    from ezmia_callbacks.results.result import AuditResult, Measurement

__all__: list[str] = []

# Findings of an audit that leave no verdict on it: nobody knows what was fed, it was scored otherwise, or the
# model that it was compared with had met one side before.
NO_VERDICT = frozenset({"batches not seen", "not scored as fed", MET_BEFORE})


@dataclass(frozen=True)
class Judge:
    """Holds figures against a budget so that the decisions of all audits keep one error rate together.

    Attributes:
        budget: The budget; None only measures.
        confidence: Confidence with which the bands of all audits hold together, in (0, 1).
        n_audits: Audits that share the error rate, the baseline not counted; None if unknown: then early ones
            get more of it and late ones less.
        judge_only: Never stop, whatever the verdict: the run is over.
        n_scores: Number of scores that are judged together, >= 1.

    Raises:
        ConfigurationError: if the plan has no audit, or a budget on TPR at FPR has no plan.
    """

    budget: LeakageBudget | None
    confidence: float
    n_audits: int | None
    judge_only: bool = False
    n_scores: int = 1

    def __post_init__(self) -> None:
        """Refuse a plan that no decision could be made by."""
        if self.n_audits is not None and self.n_audits < 1:
            raise ConfigurationError(f"`n_audits` must be at least 1 or None, got {self.n_audits!r}.")
        if self.budget is not None and self.budget.metric == "tpr_at_fpr" and self.n_audits is None:
            raise ConfigurationError(
                f"A budget on {self.budget.label} needs to know how many audits will share its error rate: "
                "pass `n_audits`, or give the trainer a length (`max_steps`); or set the budget on AUC."
            )

    @property
    def smallest_alpha(self) -> float:
        """Error rate of the audit that may spend least; of the first one where their number is unknown."""
        return self._alpha(self.n_audits or 1)

    def band(self, history: AuditHistory) -> EndShares:
        """How often the ends of the next audit's bands may miss, so that all bands hold together."""
        # The baseline comes first, and spends nothing: whoever looked for it would look through all audits.
        n_before = len(history) - sum(result.is_baseline for result in history.results[:1])
        alpha = self._alpha(n_before + 1)
        return end_shares(self.budget, failure_probability=alpha, n_scores=self.n_scores)

    def strongest_of(self, judged: Mapping[str, Mapping[str, Measurement]]) -> str:
        """Name of the score that decides: that for which the budget's rule reads most, in either direction.

        Without a budget it is the one with the largest AUC. Of equal ones it is the first.

        Args:
            judged: Figures of each score that is judged.
        """

        def leakage(score: str) -> float:
            metrics = judged[score]
            figure = None if self.budget is None else metrics[self.budget.name].to_judge()
            if self.budget is not None and figure is not None:
                return decide_by_strongest(self.budget, {score: figure}).compared or 0.0
            auc = metrics["auc"].value
            return 0.0 if auc is None else max(auc, 1.0 - auc)

        return max(judged, key=leakage)

    def lacks(self, n_members: int, n_non_members: int, everything: CanarySubset) -> str:
        """What so few canaries lack for a verdict; empty for nothing, or if all of them would lack it too.

        Args:
            n_members: Members that were fed.
            n_non_members: Non-members that were not.
            everything: All canaries that are scored.
        """
        if self.budget is None:
            return ""
        alpha = self.smallest_alpha
        counts = {"n_members": n_members, "n_non_members": n_non_members, "n_scores": self.n_scores}
        are_enough = min(n_members, n_non_members) >= MINIMUM_PER_CLASS
        try:
            check_resolvable(self.budget, **counts, failure_probability=alpha)
        except TooFewCanariesError:
            are_enough = False
        if are_enough and self.can_judge(everything):
            are_enough = has_enough_power(self.budget, **counts, failure_probability=alpha)
        if are_enough:
            return ""
        return f"members fed: {n_members}, non-members: {n_non_members}, which is too few"

    def decide(
        self,
        judged: Mapping[str, Mapping[str, Measurement]],
        history: AuditHistory,
        *,
        is_baseline: bool = False,
        why_unknown: str = "",
        lacks: str = "",
    ) -> Decision:
        """The verdict on an audit, by the score and in the direction that leaks most.

        Args:
            judged: Its figures by the name of each score that is judged, with bands of `band`.
            history: The audits before it.
            is_baseline: Whether it is the one before the first step.
            why_unknown: Why nothing is known of what was fed; empty if something is.
            lacks: What `lacks` says of the canaries that were fed so far. It leaves no verdict but one that
                more of them could not undo: over a limit that even the lower end of the band exceeds, or
                within one that even the upper end keeps to.
        """
        if is_baseline:
            return Decision(False, True, "baseline: nothing was trained yet")
        if self.budget is None:
            return Decision(False, None, "no budget")
        # Unknown is not within budget: nothing is kept, and nothing is ended either.
        not_yet = Decision(False, None, f"not judged yet: {why_unknown or lacks}", limit=self.budget.limit)
        measured = {score: metrics[self.budget.name] for score, metrics in judged.items()}
        figures = {score: each.to_judge() for score, each in measured.items()}
        missing = [measured[score].note for score, figure in figures.items() if figure is None]
        if why_unknown or (lacks and missing):
            return not_yet
        if missing:
            # Audits beyond the plan have less of the error rate, until the canaries cannot carry them. Going
            # on would be to go on without a budget.
            message = (
                f"{self.budget.label} cannot be judged any more ({missing[0]}): the run was to end by now"
            )
            return Decision(not self.judge_only, None, message)
        n_over_before = history.n_over_in_a_row
        known = {score: figure for score, figure in figures.items() if figure is not None}
        if len(known) == 1:
            # A single score needs no name.
            known = {"": next(iter(known.values()))}
        decision = decide_by_strongest(self.budget, known, n_over_before=n_over_before)
        is_certain = self.budget.rule == ("upper" if decision.is_within_budget else "lower")
        if lacks and not is_certain:
            return not_yet
        return replace(decision, stop=False) if self.judge_only else decision

    def rejudged(
        self,
        results: Sequence[AuditResult],
        everything: CanarySubset,
        *,
        judged_by: Mapping[str, Any] | None,
    ) -> tuple[AuditResult, ...]:
        """The audits of an interrupted run as this budget has them: what another let pass may be over it.

        Under the same budget every decision stays as it was. Under another, figures and bands are judged
        anew; an audit that lacks what this budget asks for has no verdict. None of them stops the run, which
        goes on: its next audit may.

        Args:
            results: The audits.
            everything: All canaries that are scored.
            judged_by: `AuditHistory.judged_by` of the interrupted run; None if it is not known.
        """
        history = AuditHistory(budget=self.budget)
        if judged_by is not None and judged_by["budget"] == history.judged_by["budget"]:
            return tuple(results)
        confidence = None if judged_by is None else float(judged_by["confidence"])
        for result in results:
            if result.status == "ok" and not result.is_baseline:
                decision = self._anew(result, history, everything, confidence=confidence)
                result = replace(result, decision=decision)
            history = history.with_result(result)
        return history.results

    def _anew(
        self,
        result: AuditResult,
        before: AuditHistory,
        everything: CanarySubset,
        *,
        confidence: float | None,
    ) -> Decision:
        old, budget = result.decision, self.budget
        if budget is None:
            return self.decide(result.judged, before)
        measured = [metrics.get(budget.name) for metrics in result.judged.values()]
        # Within budget by some of the scores is not within it.
        measured += [None] * (self.n_scores - len(measured))
        lacks = (self._lacking(each, before, confidence=confidence) for each in measured)
        if lacking := next(filter(None, lacks), ""):
            return Decision(False, None, f"not judged under this budget: {lacking}", limit=budget.limit)
        seen = result.n_members_seen
        new = self.decide(
            result.judged,
            before,
            why_unknown=next((f.text for f in result.findings if f.name in NO_VERDICT), ""),
            lacks="" if seen is None else self.lacks(seen, result.n_non_members, everything),
        )
        if new.is_within_budget and any(_is_of_one_direction(each, budget) for each in measured):
            message = f"not judged under this budget: {budget.label} was measured in one direction alone"
            return Decision(False, None, message, limit=budget.limit)
        is_same = replace(new, stop=old.stop, message=old.message) == old
        # A stop and the reason why there was no verdict stay, where this budget says the same.
        if is_same and (new.message == old.message or new.is_within_budget is None):
            return old
        return replace(new, stop=False)

    def _lacking(
        self, measured: Measurement | None, before: AuditHistory, *, confidence: float | None
    ) -> str:
        """What an older figure lacks to be judged by this budget; empty for nothing."""
        budget = self.budget
        if budget is None:
            return ""
        if measured is None:
            return f"{budget.label} was not measured"
        if measured.value is None or measured.band is None:
            return measured.note or f"{budget.label} has no band"
        if budget.rule == "point" or (confidence is not None and confidence >= budget.confidence):
            return ""
        if _is_at_least(measured.band, self.band(before).confidence):
            return ""
        return f"the band of {budget.label} was made for a lower confidence than this budget asks for"

    def check_resolvable(self, subset: CanarySubset) -> None:
        """Refuse a budget that these canaries could never answer.

        Raises:
            TooFewCanariesError: naming the number that would do.
        """
        if self.budget is None:
            return
        try:
            check_resolvable(
                self.budget,
                n_members=subset.n_members,
                n_non_members=subset.n_non_members,
                failure_probability=self.smallest_alpha,
                n_scores=self.n_scores,
            )
        except TooFewCanariesError as error:
            if self.n_audits is None:
                raise
            plan = canaries_needed(self.budget, n_audits=self.n_audits, n_scores=self.n_scores)
            raise TooFewCanariesError(f"{error} {plan.describe()}") from None

    def can_judge(self, subset: CanarySubset) -> bool:
        """Whether canaries are enough for figures, and to find a run that is far over budget."""
        try:
            counts = {
                "n_members": subset.n_members,
                "n_non_members": subset.n_non_members,
                "n_scores": self.n_scores,
            }
            if self.budget is None:
                return True
            check_resolvable(self.budget, **counts, failure_probability=self.smallest_alpha)
        except TooFewCanariesError:
            return False
        return has_enough_power(self.budget, **counts, failure_probability=self.smallest_alpha)

    def describe_power(self, subset: CanarySubset) -> str | None:
        """What one audit of these canaries can find out about the budget, in a sentence; None without one."""
        if self.budget is None:
            return None
        return describe_power(
            self.budget,
            n_members=subset.n_members,
            n_non_members=subset.n_non_members,
            failure_probability=self.smallest_alpha,
            n_scores=self.n_scores,
        )

    def _alpha(self, audit: int) -> float:
        return alpha_for_audit(audit, n_planned=self.n_audits, failure_probability=1.0 - self.confidence)


def _is_of_one_direction(measured: Measurement | None, budget: LeakageBudget) -> bool:
    """Whether an older figure leaves open what the score turned around would show."""
    return budget.metric != "auc" and (measured is None or measured.reversed is None)


def _is_at_least(band: Interval, confidence: float) -> bool:
    # The plan's share of the error rate is a quotient: the last bits do not count.
    return band.confidence >= confidence - 1e-12
