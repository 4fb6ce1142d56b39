"""Whether the verdicts of a history follow from its figures: a file can be edited, or damaged.

Whoever edits the figures as well is not found out.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from ezmia_callbacks.functional.budget import (
    Decision,
    JudgedFigure,
    LeakageBudget,
    decide_by_strongest,
)
from ezmia_callbacks.functional.judged import judged_scores
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult, Finding

__all__: list[str] = []

# Name of the finding about an audit whose file says something else than its figures.
CONTRADICTION = "verdict contradicts figures"

_TOLERANCE = 1e-9
_VERDICTS = ("within budget", "over budget")
_THREE_DIGITS = re.compile(r"\d+\.\d{3}\b")


def judged_anew(history: AuditHistory) -> AuditHistory:
    """A history in which every verdict is the one that its figures lead to.

    Where the file says something else the audit has a flagged finding about it. All others are as they were,
    those without a verdict among them: that is never within budget.
    """
    results: list[AuditResult] = []
    n_over = 0
    for claimed in history:
        result, is_second_baseline = claimed, claimed.is_baseline and bool(results)
        if is_second_baseline:
            result = replace(claimed, is_baseline=False)
        said = list(contradictions_of(result, history.budget))
        if is_second_baseline:
            said.insert(0, "that it is a baseline, and it is not the first audit")
        if said:
            text = (
                f"The file says {'; '.join(said)}. What is shown follows from the figures: the file was "
                "edited, or damaged."
            )
            decision = _anew(result, history.budget, n_over_before=n_over)
            findings = (*result.findings, Finding(CONTRADICTION, True, text))
            result = replace(result, decision=decision, findings=findings)
        results.append(result)
        # As `AuditHistory.n_over_in_a_row` of the audits so far.
        if result.decision.is_within_budget is not None:
            n_over = result.decision.n_over_in_a_row
    return replace(history, results=tuple(results))


def contradictions_of(result: AuditResult, budget: LeakageBudget | None) -> tuple[str, ...]:
    """What an audit says of itself that does not follow from its figures, each after "the file says".

    Args:
        result: The audit.
        budget: What it was held against; None if that is not known.
    """
    claimed = result.decision
    claims_verdict = claimed.is_within_budget is not None or claimed.message.startswith(_VERDICTS)
    if result.is_baseline or not claims_verdict:
        return ()
    if result.status == "failed":
        return (f"{claimed.message!r} of an audit that failed",)
    if budget is None:
        return (f"{claimed.message!r}, and names no budget",)
    follows = _verdict_of_figures(result, budget)
    if follows is None:
        return (f"{claimed.message!r}, and has no {budget.label} with a band of every score that is judged",)
    said = []
    if claimed.is_within_budget is not follows.is_within_budget:
        name = {True: _VERDICTS[0], False: _VERDICTS[1], None: "no verdict"}[claimed.is_within_budget]
        said.append(f"{name!r} where the figures say {follows.message!r}")
    if not _are_equal(claimed.compared, follows.compared) or claimed.is_reversed is not follows.is_reversed:
        said.append(f"that {claimed.compared!r} was compared, not {follows.compared!r}")
    if not _are_equal(claimed.limit, follows.limit):
        said.append(f"that the limit was {claimed.limit!r}, not {follows.limit!r}")
    if not said and _told(claimed.message) != _told(follows.message):
        said.append(f"{claimed.message!r} where the figures say {follows.message!r}")
    return tuple(said)


def _verdict_of_figures(
    result: AuditResult, budget: LeakageBudget, *, n_over_before: int = 0
) -> Decision | None:
    """The verdict that the figures lead to; None if they are missing.

    The one place that knows which figures decide.
    """
    # What the strongest score would have been is not known where one of them is missing.
    if not set(judged_scores(result.score)) <= result.judged.keys():
        return None
    figures: dict[str, JudgedFigure] = {}
    for score, metrics in result.judged.items():
        measured = metrics.get(budget.name)
        figure = None if measured is None else measured.to_judge()
        if figure is None:
            return None
        # As in a decision, a single score needs no name.
        figures[score if result.judged_beside else ""] = figure
    return decide_by_strongest(budget, figures, n_over_before=n_over_before)


def _anew(result: AuditResult, budget: LeakageBudget | None, *, n_over_before: int) -> Decision:
    claimed = result.decision
    if result.status == "failed":
        return Decision(False, None, "the audit failed")
    if budget is None:
        return Decision(False, None, "no budget")
    follows = _verdict_of_figures(result, budget, n_over_before=n_over_before)
    if follows is None:
        message = f"{budget.label} cannot be judged: it has no band"
        return Decision(False, None, message, limit=budget.limit)
    # Whether the run ended there is no question of figures, but within budget none does.
    return replace(follows, stop=claimed.stop and not follows.is_within_budget)


def _are_equal(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=0.0, abs_tol=_TOLERANCE)


def _told(message: str) -> tuple[str, list[str]]:
    """Verdict and figures in a message, whatever its words."""
    return message.partition(":")[0], _THREE_DIGITS.findall(message)
