"""What in one audit changes how its figures read: each detector says so in plain words, with what to do.

Detectors only read results; they change no figure and decide nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ezmia_callbacks.functional.budget import mirrored
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.results.result import AuditResult, Finding

__all__: list[str] = []

# Records that are placed by a rule can move the AUC by as much as their share; 0.1 is the whole distance
# between chance and a budget of 0.6.
NOTABLE_EDGE_SHARE = 0.1
# The EZ score compares tokens with one another: the method's authors score records below this as 0.
FEWEST_ERROR_TOKENS = 2


def detect(result: AuditResult, earlier: Sequence[AuditResult] = ()) -> tuple[Finding, ...]:
    """Everything about an audit that a reader of its figures must know; nothing on a normal run.

    * "baseline leakage": a score tells the sides apart before any training. Fair splits show that too in one
      of 20 cases, at a confidence of 0.95.
    * "saturation": many members have no wrongly predicted token left for EZ to look at.
    * "low evidence": many records have a single such token, or half of all records none or one.
    * "no downward shift": all wrongly predicted tokens of most non-members moved up.
    * "inversion": the AUC of EZ has fallen below an earlier one while that of the loss difference has not.
    * "reversed": members score lower than non-members, by more than chance.
    * "disagreement": a score that is only shown sees more leakage than those that are judged.

    The second to fifth are looked for where EZ alone decides. "Below" and "more" mean that the intervals of
    the two figures do not overlap, which chance alone makes far rarer than each interval's own error rate.

    Args:
        result: The audit.
        earlier: The audits before it, the baseline first; failed ones have no figures and do not matter.

    Returns:
        Only what was found, each flagged; nothing for a failed audit.
    """
    if result.status == "failed":
        return ()
    found = [detector(result, earlier) for detector in _DETECTORS]
    return tuple(finding for finding in found if finding is not None)


def _baseline_leakage(result: AuditResult, _earlier: Sequence[AuditResult]) -> Finding | None:
    if not result.is_baseline:
        return None
    apart = [
        f"AUC of {auc.name} {auc}"
        for auc in _aucs(result)
        if auc.name in {"loss", *result.judged} and 0.5 not in auc.interval
    ]
    if not apart:
        return None
    return _finding(
        "baseline leakage",
        f"Members and non-members differ before any training: {', '.join(apart)}, where 0.5 is chance. "
        "If they come from different sources, leakage figures will include this difference: draw both sides "
        "from one pool with hold_out_canaries. If both were drawn from one pool, the model has met one side "
        "before: compared with it, members that it has met read far too LOW. Give the model from before it "
        "met them as `reference=`; compared with that, the difference is leakage. A fair split can look like "
        "this by chance; another seed then will not.",
    )


def _saturation(result: AuditResult, _earlier: Sequence[AuditResult]) -> Finding | None:
    members, others = result.member_edges, result.non_member_edges
    if result.is_baseline or result.score != "ez" or members is None or others is None:
        return None
    n_members = members.n_records or result.n_members
    if members.n_no_errors < NOTABLE_EDGE_SHARE * n_members:
        return None
    return _finding(
        "saturation",
        f"{members.n_no_errors} of {n_members} member records have no wrongly predicted token left "
        f"({others.n_no_errors} of {others.n_records or result.n_non_members} of the non-members)"
        f"{_median(result)}. EZ uses only wrongly "
        "predicted tokens: it has little left to work with, and can read too low. The model has memorized "
        "these records; go by the AUC of loss_difference from here on, and train less.",
    )


def _low_evidence(result: AuditResult, _earlier: Sequence[AuditResult]) -> Finding | None:
    members, others = result.member_edges, result.non_member_edges
    if result.score != "ez" or members is None or others is None:
        return None
    n_single = members.n_low_evidence + others.n_low_evidence
    counted = members.n_records + others.n_records
    n_records = counted or result.n_members + result.n_non_members
    has_low_median = result.n_error_tokens is not None and result.n_error_tokens < FEWEST_ERROR_TOKENS
    if n_single < NOTABLE_EDGE_SHARE * n_records and not has_low_median:
        return None
    return _finding(
        "low evidence",
        f"The EZ score of {n_single} of {n_records} records rests on a single wrongly predicted token"
        f"{_median(result)}: it is all or nothing there, and the AUC can read too low. Use longer records, "
        "or let loss_difference decide.",
    )


def _no_downward_shift(result: AuditResult, _earlier: Sequence[AuditResult]) -> Finding | None:
    others = result.non_member_edges
    if result.is_baseline or result.score != "ez" or others is None:
        return None
    n_non_members = others.n_records or result.n_non_members
    if n_non_members == 0 or 2 * others.n_no_negative < n_non_members:
        return None
    return _finding(
        "no downward shift",
        f"All wrongly predicted tokens of {others.n_no_negative} of {n_non_members} non-members moved up, as "
        "in a domain or a language that the model had hardly seen before. EZ compares upward with downward "
        "shifts: it has nothing to compare there, and orders these records by their mean shift, as "
        "loss_difference does. Look at the AUC of loss_difference and wbc beside it, or let one decide.",
    )


def _inversion(result: AuditResult, earlier: Sequence[AuditResult]) -> Finding | None:
    ez, difference = _auc(result, "ez"), _auc(result, "loss_difference")
    if result.score != "ez" or ez is None or difference is None:
        return None
    before = [
        (then, then_difference, other)
        for other in earlier
        if (then := _auc(other, "ez")) is not None
        and (then_difference := _auc(other, "loss_difference")) is not None
        and not other.is_baseline
        and ez.interval.upper < then.interval.lower
        and difference.value >= then_difference.value
    ]
    if not before:
        return None
    then, then_difference, other = max(before, key=lambda candidate: candidate[0].value)
    return _finding(
        "inversion",
        f"EZ no longer detects what it detected before: its AUC fell from {then} at "
        f"step {other.step} to {ez}, while that of the loss difference went from "
        f"{then_difference.value:.3f} to {difference.value:.3f}. The model memorizes more, not less: do not "
        "read the fall as an improvement; go by loss_difference, and by the earlier figure.",
    )


def _reversed(result: AuditResult, _earlier: Sequence[AuditResult]) -> Finding | None:
    auc = _auc(result, result.decided_by)
    if result.is_baseline or auc is None or auc.interval.upper >= 0.5:
        return None
    return _finding(
        "reversed",
        f"Members score LOWER than non-members: AUC of {auc.name} {auc}, where 0.5 is chance. That is "
        "leakage as well, as after unlearning that went too far: an attacker turns the score around, and "
        f"reaches an AUC of {1.0 - auc.value:.3f}.",
    )


def _disagreement(result: AuditResult, earlier: Sequence[AuditResult]) -> Finding | None:
    deciding = _auc(result, result.decided_by)
    if result.is_baseline or deciding is None:
        return None
    deciding = deciding.as_leakage()
    # What told the sides apart before training says nothing about the training.
    was_apart = {
        auc.name
        for other in earlier[:1]
        if other.is_baseline
        for auc in map(_Auc.as_leakage, _aucs(other))
        if auc.interval.lower > 0.5
    }
    above = [
        auc
        for auc in map(_Auc.as_leakage, _aucs(result))
        if auc.interval.lower > deciding.interval.upper and auc.name not in was_apart
    ]
    # A reversed one keeps its name in front.
    above = [auc for auc in above if auc.name.partition(" ")[0] not in result.judged]
    if not above:
        return None
    best = max(above, key=lambda auc: auc.value)
    return _finding(
        "disagreement",
        f"{best.name} finds more leakage than {deciding.name}, which decides: AUC {best} against {deciding}. "
        f"An attacker would use the better one: read the figure of {result.decided_by} as a lower bound, and "
        f"let {best.name} decide in the next run.",
    )


_DETECTORS: tuple[Callable[[AuditResult, Sequence[AuditResult]], Finding | None], ...] = (
    _baseline_leakage,
    _saturation,
    _low_evidence,
    _no_downward_shift,
    _inversion,
    _reversed,
    _disagreement,
)


class _Auc(NamedTuple):
    """The AUC of one score at one audit."""

    name: str
    value: float
    interval: Interval

    def as_leakage(self) -> "_Auc":
        """What an attacker makes of it, who turns a score around that is below one half."""
        if self.value >= 0.5:
            return self
        return _Auc(f"{self.name} (reversed)", 1.0 - self.value, mirrored(self.interval))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.interval.lower:.3f}, {self.interval.upper:.3f}]"


def _aucs(result: AuditResult) -> list[_Auc]:
    """The AUC of the scores that are judged, then of the others, where they are resolved."""
    judged = {name: metrics.get("auc") for name, metrics in result.judged.items()}
    measured = [*judged.items(), *result.auc_by_score.items()]
    return [
        _Auc(name, figure.value, figure.interval)
        for name, figure in measured
        if figure is not None and figure.value is not None and figure.interval is not None
    ]


def _auc(result: AuditResult, score: str) -> _Auc | None:
    judged = result.judged.get(score)
    figure = result.auc_by_score.get(score) if judged is None else judged.get("auc")
    if figure is None or figure.value is None or figure.interval is None:
        return None
    return _Auc(score, figure.value, figure.interval)


def _median(result: AuditResult) -> str:
    if result.n_error_tokens is None:
        return ""
    return f"; half of all records have {result.n_error_tokens:g} or fewer"


def _finding(name: str, text: str) -> Finding:
    return Finding(name=name, is_flagged=True, text=text)
