"""Verdicts by the number of the audit, whatever it finds."""

from ezmia_callbacks.audit import run_state
from ezmia_callbacks.audit.judge import Judge
from ezmia_callbacks.functional.budget import Decision

WITHIN = Decision(False, True, "within budget: so says the test", 0.6, 0.65)


def judge_by_number(monkeypatch, first_over, *, patience=0):
    """Have audit number so and so, of those after the baseline, be the first one over budget."""
    decide = Judge.decide

    def judge(self, metrics, history, *, is_baseline=False, **of_feeding):
        if is_baseline:
            return decide(self, metrics, history, is_baseline=True)
        n_over = len(history) - first_over + 1
        if n_over <= 0:
            return WITHIN
        return Decision(n_over > patience, False, "over budget: so says the test", 0.7, 0.65, n_over)

    monkeypatch.setattr(Judge, "decide", judge)
    # A resumed run would see that these verdicts do not follow from the figures.
    monkeypatch.setattr(run_state, "judged_anew", lambda history: history)
