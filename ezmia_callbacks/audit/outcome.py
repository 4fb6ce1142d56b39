"""What a run came to, in lines of its own: at a restore, and when it ends. Plain values in, texts out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from ezmia_callbacks.results.history import NOTHING_KEPT
from ezmia_callbacks.results.tables import plain_table

if TYPE_CHECKING:
    from pathlib import Path

    from ezmia_callbacks.results.history import AuditHistory
    from ezmia_callbacks.results.result import AuditResult

__all__: list[str] = []

# Audits in the table at the end of a run.
_LONGEST_TABLE = 30


class Line(NamedTuple):
    """One line, and its level of logging."""

    level: int
    text: str


def lines_of_restore(
    kept: AuditResult, history: AuditHistory, *, rejected: Path | None = None
) -> tuple[Line, ...]:
    """At which step the run ended and why, what the model holds now, and what became of the rest.

    Args:
        kept: The audit of the weights that were restored.
        history: All audits.
        rejected: Folder to which the weights over the budget were written; None if they are gone.
    """
    texts = [how_it_ended(history)] if history.is_past_budget else []
    last, step = history.last_within_budget, history[-1].step
    if not kept.is_baseline:
        which = "the last audit within it"
        if last is None or last.step != kept.step:
            which += " that could be kept"
        texts.append(f"Restored the weights of step {kept.step}, {which} (every weight was checked).")
    elif not history.audits_after_baseline:
        texts.append("Restored the starting weights (every weight was checked).")
    elif last is None or last.is_baseline:
        texts.append(f"{NOTHING_KEPT}: no audit was within the budget. Restored the starting weights.")
        texts.append(f"To keep a part of it, {_earlier_audits(history)}.")
    else:
        texts.append(f"{NOTHING_KEPT}: the weights of step {last.step}, within it, could not be kept.")
        texts.append("Restored the starting weights (every weight was checked).")
    if rejected is not None:
        texts.append(f"The weights over the budget are in {rejected}.")
    elif kept.step != step:
        texts.append(
            f"What was trained after step {kept.step}, until step {step}, is gone (`keep_rejected=True` "
            "would keep it aside)."
        )
    return tuple(Line(logging.WARNING, text) for text in texts)


def lines_of_failed_restore(reason: object, history: AuditHistory) -> tuple[Line, ...]:
    """That the model is over budget, or may be, and stays so.

    Args:
        reason: Why no earlier weights are in the model.
        history: All audits.
    """
    verdict = "may be" if _is_stopped_unjudged(history) else "is"
    texts = (
        how_it_ended(history),
        f"{NOTHING_KEPT} within the budget: the model {verdict} OVER BUDGET.",
        f"Earlier weights could not be restored: {reason}",
    )
    return tuple(Line(logging.ERROR, text) for text in texts)


def lines_of_end(
    history: AuditHistory, left: AuditResult | None, *, is_restored: bool, can_restore: bool = False
) -> tuple[Line, ...]:
    """The audits as a table, which ones failed, and what is known of the model that is left.

    Args:
        history: All audits.
        left: The audit of the weights that it holds; None if none saw them.
        is_restored: Whether they were put back, which was said then.
        can_restore: Whether earlier weights are still there to be put back.
    """
    audits = history.audits_after_baseline
    lines = [Line(logging.INFO, _table(history))] if audits else []
    if history.n_failed:
        lines.append(
            Line(
                logging.WARNING,
                f"{history.n_failed} of {len(audits)} privacy audits failed: at those points leakage is "
                "unknown, not absent.",
            )
        )
    found = _unknown(history) if left is None else _of_the_model(history, left, is_restored=is_restored)
    if found is not None:
        lines.append(found)
    if can_restore:
        lines.append(
            Line(
                logging.ERROR,
                "The weights kept within the budget were not put back: call `restore_within_budget(model, "
                "optimizer)`.",
            )
        )
    return tuple(lines)


def how_it_ended(history: AuditHistory) -> str:
    """At which step, and what the last audits found."""
    # With patience, training can end over budget before anything stops it.
    ended = "Training ended" if history.stopped is None else "Stopped"
    why = "could no longer be judged against" if _is_stopped_unjudged(history) else "exceeded"
    return f"{ended} at step {history[-1].step}: leakage {why} the budget."


def _of_the_model(history: AuditHistory, left: AuditResult, *, is_restored: bool) -> Line | None:
    decision, is_last = left.decision, left is history[-1]
    holds = f"holds the {'starting weights' if left.is_baseline else f'weights of step {left.step}'}"
    if left.is_baseline:
        is_trained = any(audit.weights != left.weights for audit in history.audits_after_baseline)
        return Line(logging.WARNING, f"{NOTHING_KEPT}: the model {holds}.") if is_trained else None
    of_another = "" if is_last or is_restored else ", not the last ones: its figures are those of that audit"
    if history.budget is None:
        return Line(logging.INFO, f"The model {holds}{of_another}.") if of_another else None
    if decision.is_within_budget:
        return Line(logging.INFO, f"The model {holds}{of_another}: within budget.")
    if decision.is_within_budget is False:
        return Line(logging.ERROR, f"The model {holds}{of_another}: it is OVER BUDGET.")
    return Line(
        logging.ERROR,
        f"Training ended without a verdict, so that the model may be OVER BUDGET: {decision.message}.",
    )


def _unknown(history: AuditHistory) -> Line:
    over = "" if history.budget is None else ", and it may be OVER BUDGET"
    return Line(
        logging.WARNING,
        "The model that is left does not hold the weights of any audit: its leakage is unknown"
        f"{over}. Audit it before it is finished.",
    )


def _is_stopped_unjudged(history: AuditHistory) -> bool:
    return history.stopped is not None and history.is_unjudged(history.stopped)


def _earlier_audits(history: AuditHistory) -> str:
    """How to audit before the audit that was the first, if there is a step before it, and what else helps."""
    first = history.audits_after_baseline[0]
    less = "give the model less room to memorize (LoRA, a smaller learning rate)"
    if first.epoch is None or first.epoch > 0.25:
        return f"audit more often (`every=0.25`), or {less}"
    if first.step > 1:
        return f"audit more often (`every={first.step // 2}`, in steps), or {less}"
    return less


def _table(history: AuditHistory) -> str:
    budget = "no budget" if history.budget is None else history.budget.describe()
    n_left_out = max(0, len(history) - _LONGEST_TABLE)
    which = f", the last {_LONGEST_TABLE} of {len(history)}" if n_left_out else ""
    return f"Privacy audits{which} ({budget}):\n{plain_table(history.results[n_left_out:])}"
