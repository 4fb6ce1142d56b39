"""What to do now: concrete steps that follow from how a run ended."""

from __future__ import annotations

from collections.abc import Iterator

from ezmia_callbacks.report.labels import moment
from ezmia_callbacks.report.statements import verdict_of
from ezmia_callbacks.report.view import VerdictName
from ezmia_callbacks.results.history import AuditHistory

__all__: list[str] = []


def next_steps(history: AuditHistory, *, state: VerdictName, names_records: bool) -> tuple[str, ...]:
    """What whoever reads the report can do, the nearest first.

    Args:
        history: The run.
        state: State of the weights that are left.
        names_records: Whether the report names the most exposed records.
    """
    steps = list(_about_what_is_left(history, state))
    if history.stopped is not None or state in ("over budget", "nothing kept"):
        steps += _against_leakage(names_records)
    if state == "no budget":
        steps.append(
            "Set a limit, `LeakageBudget(limit=0.6)`, so that the next run stops before it exceeds it."
        )
    steps += _towards_a_verdict(history)
    return tuple(steps)


def _about_what_is_left(history: AuditHistory, state: VerdictName) -> Iterator[str]:
    if state == "within budget":
        yield (
            "If these weights are released, release no others: a merge, a quantization or another checkpoint "
            "is another model. `ezmia audit` measures what ships."
        )
        if _is_open(history):
            yield (
                "The limit may be exceeded all the same, for the band reaches across it: more canaries make "
                'it narrower, and `rule="upper"` lets go on only what is shown to keep the limit.'
            )
    elif state == "over budget":
        yield "Do not release these weights; let the callback put earlier ones back (`restore=True`)."
    elif state == "nothing kept":
        yield (
            "Audit more often, such as four times an epoch (`every=0.25`): the first audit was too late to "
            "find trained weights within the budget."
        )
    elif state == "not judged":
        yield "Treat these weights as over budget until an audit has judged them: `ezmia audit` does so."


def _is_open(history: AuditHistory) -> bool:
    """Whether the band of the weights that are left holds the limit."""
    left, budget = history.final_audit or history[-1], history.budget
    judged = [] if budget is None else [metrics.get(budget.name) for metrics in left.judged.values()]
    bands = [figure.band for figure in judged if figure is not None and figure.band is not None]
    return budget is not None and any(band.upper > budget.limit for band in bands)


def _against_leakage(names_records: bool) -> Iterator[str]:
    yield "Train for fewer epochs, or with a smaller learning rate: leakage grows with each repetition."
    yield (
        "Train an adapter (LoRA) where all weights were trained: in the paper of this attack GPT-2 gave away "
        "82.6 % of its members with full weights and 1.5 % with LoRA (arXiv 2601.12104)."
    )
    where = "the records below" if names_records else "the most exposed records (`most_exposed` names them)"
    yield f"Remove duplicates from the training set, and look at {where}: rare and repeated texts leak most."
    yield (
        "Train with differential privacy (DP-SGD) where a guarantee is needed: an audit gives none, however "
        "low it reads."
    )


def _towards_a_verdict(history: AuditHistory) -> Iterator[str]:
    failed = next((result for result in reversed(history.results) if result.status == "failed"), None)
    if failed is not None:
        yield f"Find out why the audit at {moment(failed)} failed: its error stands in the decision log."
    judged = [result for result in history.audits_after_baseline if result.status == "ok"]
    if judged and verdict_of(judged[-1], history) == "not judged":
        yield (
            "Hold out more canaries: with more records the band is narrower and more can be judged; "
            "`ezmia plan` says how many."
        )
