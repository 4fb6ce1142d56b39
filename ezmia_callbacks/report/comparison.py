"""Several runs side by side: which of them kept to its budget, and which of those learned most."""

from __future__ import annotations

from collections.abc import Mapping

from ezmia_callbacks.report.labels import moment
from ezmia_callbacks.report.statements import verdict_of
from ezmia_callbacks.report.view import ComparisonView
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.results.tables import figure, loss

__all__: list[str] = []


def comparison(runs: Mapping[str, AuditHistory]) -> ComparisonView | None:
    """What may be compared, and the runs in order; None for a single run.

    First come those whose weights are within the budget, by their held-out loss, then the others as they were
    given. Losses of different canaries are no order, and neither are runs without a budget.
    """
    if len(runs) < 2:
        return None
    within = {label: left for label, history in runs.items() if (left := _left_within(history)) is not None}
    are_same = len({_canaries(history) for history in runs.values()}) == 1
    if are_same and all(left.non_member_loss is not None for left in within.values()):
        within = dict(sorted(within.items(), key=lambda item: item[1].non_member_loss or 0.0))
    ranking = [*within, *(label for label in runs if label not in within)]
    differs_in = _differs_in(runs)
    return ComparisonView(
        text=_first_sentence(runs, within, are_same=are_same),
        ranking=tuple(ranking),
        differs_in=differs_in,
        note=(
            f"The runs differ in: {', '.join(differs_in)}. Compare their figures with that in mind."
            if differs_in
            else "The runs were audited with the same attack, number of canaries and budget."
        ),
    )


def _first_sentence(
    runs: Mapping[str, AuditHistory], within: Mapping[str, AuditResult], *, are_same: bool
) -> str:
    if all(history.budget is None for history in runs.values()):
        return "No run has a budget: the table shows how much each leaks at its end."
    if not within:
        return f"None of the {len(runs)} runs has left trained weights within its budget."
    if not are_same:
        return (
            f"{len(within)} of {len(runs)} runs have left weights within their budgets: "
            f"{', '.join(within)}. Their held-out losses are of different records and cannot be compared."
        )
    label, best = next(iter(within.items()))
    of_several = "the only one" if len(within) == 1 else f"the best by held-out loss of {len(within)}"
    return (
        f"{label} is {of_several} within its budget: held-out loss {loss(best.non_member_loss)} at "
        f"{moment(best)}, AUC {figure(best.metrics.get('auc'))}."
    )


def _left_within(history: AuditHistory) -> AuditResult | None:
    """The audit of the weights that a run has left, if they were trained and are within its budget."""
    left = history.final_audit or (None if history.final_weights else history[-1])
    if left is None or verdict_of(left, history) != "within budget":
        return None
    return left


def _canaries(history: AuditHistory) -> tuple[object, ...]:
    first = history[0]
    return (history.run_metadata.canaries, first.n_members, first.n_non_members, history.about)


def _differs_in(runs: Mapping[str, AuditHistory]) -> tuple[str, ...]:
    histories = list(runs.values())
    looked_at: dict[str, set[object]] = {
        "attack": {history[0].score for history in histories},
        "number of canaries": {(history[0].n_members, history[0].n_non_members) for history in histories},
        "canaries": {history.run_metadata.canaries for history in histories},
        "description of the canaries": {history.about for history in histories},
        "budget": {history.budget for history in histories},
    }
    return tuple(name for name, values in looked_at.items() if len(values) > 1)
