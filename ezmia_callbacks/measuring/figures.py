"""From token statistics to figures with intervals: pure, no model in sight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.errors import TooFewCanariesError
from ezmia_callbacks.functional import intervals, roc
from ezmia_callbacks.functional.budget import EndShares, metric_name
from ezmia_callbacks.functional.checkpoint_holder import EarlierSteps
from ezmia_callbacks.functional.epsilon import bonferroni_epsilon
from ezmia_callbacks.functional.scores import ez_evidence
from ezmia_callbacks.results.result import EdgeCounts, Measurement
from ezmia_callbacks.scoring.statistics import TokenStatistics, score_records

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

    from ezmia_callbacks.functional.epsilon import EpsilonBound
    from ezmia_callbacks.measuring.subset import CanarySubset

    Scores = Float64[np.ndarray, " n_records"]
    Membership = Bool[np.ndarray, " n_records"]

__all__: list[str] = []

# Of (epsilon, delta), where coins were thrown.
_DELTA = 1e-5

# Shown beside the scores that are judged; they decide nothing.
_COMPARED_SCORES = ("ez", "loss_difference", "wbc", "calibrated_min_k_plus_plus", "loss")
# The same of preference pairs, whose two sides training compares.
_COMPARED_SCORES_OF_PAIRS = ("margin", *_COMPARED_SCORES)


@dataclass(frozen=True, eq=False)
class Figures:
    """Everything that one audit measures; what each figure means is said at `AuditResult`.

    Attributes:
        decided_by: Name of the deciding score: of those that are judged, the one that leaks most.
        metrics: Figures of the deciding score.
        judged_beside: Figures of the other scores that are judged, by their names.
        auc_by_score: AUC of the scores that are only shown.
        auc_by_group: AUC of the deciding score within each group of canaries.
        epsilon: Lower bound of epsilon; None where it has no proof.
        auc_recent: AUC of the deciding score for the members that were fed last.
        checkpoint_holder: AUC of someone who holds the weights of all audits; None before there are two.
        checkpoint_holder_epsilon: Lower bound of the epsilon of handing them all out.
        n_checkpoints: Audits after the baseline whose weights are compared for it.
        member_loss: Mean loss over the members' tokens, nats per token; None if no member counts.
        non_member_loss: Mean loss over the non-members' tokens, nats per token.
        n_error_tokens: Median number of wrongly predicted tokens of a record.
        member_edges: Edge records among the members.
        non_member_edges: Edge records among the non-members.
        n_members: Members that are scored.
        n_non_members: Non-members that count.
        n_members_seen: Members that count, for they were fed; None where that was not looked at.
        n_tokens: Scored tokens of all records.
        scores: float64, (n_records,): the deciding score of each record.
        scores_beside: float64, (n_records,) each: the other scores that are judged, by their names.
        step_scores: float64, (n_records,): EZ against the audit before; 0.5 where there is none.
    """

    decided_by: str
    metrics: Mapping[str, Measurement]
    judged_beside: Mapping[str, Mapping[str, Measurement]]
    auc_by_score: Mapping[str, Measurement]
    auc_by_group: Mapping[str, Measurement]
    auc_recent: Measurement | None
    epsilon: EpsilonBound | None
    checkpoint_holder: Measurement | None
    checkpoint_holder_epsilon: EpsilonBound | None
    n_checkpoints: int | None
    member_loss: float | None
    non_member_loss: float | None
    n_error_tokens: float
    member_edges: EdgeCounts
    non_member_edges: EdgeCounts
    n_members: int
    n_non_members: int
    n_members_seen: int | None
    n_tokens: int
    scores: Scores
    scores_beside: Mapping[str, Scores]
    step_scores: Scores


@dataclass(frozen=True, eq=False)
class Counted:
    """Which of the records that are scored figures count, by what training was fed.

    Attributes:
        is_counted: bool, (n_records,): members that were fed, and non-members that were not.
        last_step: int64, (n_records,): optimizer step that was fed a record last; -1 for none.
    """

    is_counted: Membership
    last_step: Int64[np.ndarray, " n_records"]


def figures(
    target: TokenStatistics,
    reference: TokenStatistics,
    subset: CanarySubset,
    *,
    judged: Sequence[str],
    strongest_of: Callable[[Mapping[str, Mapping[str, Measurement]]], str],
    own_scores: Mapping[str, Scores],
    fpr_levels: Sequence[float],
    confidence: float,
    band: EndShares | None,
    has_epsilon: bool,
    counted: Counted | None = None,
    previous: TokenStatistics | None = None,
    earlier_steps: EarlierSteps | None = None,
) -> Figures:
    """The figures of one audit.

    Args:
        target: Statistics of the model under audit.
        reference: Statistics of the model before training, for the same tokens.
        subset: The canaries that both speak of, and what figures count of them.
        judged: Names of the scores that are judged, each one of `own_scores` or a built-in one.
        strongest_of: Which of them decides, by their figures; where nothing is decided it is the first.
        own_scores: Scores of the user's attack, by its name.
        fpr_levels: False-positive rates at which the true-positive rate is reported.
        confidence: Confidence of each figure's own interval, in (0, 1); those of the scores that are judged
            hold together with it, for the one that is shown is chosen by looking.
        band: How often the ends of the bands may miss at this audit, so that those of all audits hold
            together; None for an audit that nothing is decided by.
        has_epsilon: Whether this score may carry an epsilon, if the canaries' membership was drawn by coins.
            It is that of all records: who was fed is what is to be found out.
        counted: Which records the other figures are of; None for all.
        previous: Statistics of the model at the audit before this one; None at the baseline.
        earlier_steps: Step scores of the audits between the baseline and this one; None if there are none.
            With `previous` it says what all these models together tell, which decides nothing.
    """
    encoded, is_member = subset.encoded, subset.encoded.is_member
    n_bytes = encoded.n_compressed_bytes
    compared = _COMPARED_SCORES_OF_PAIRS if encoded.has_pairs else _COMPARED_SCORES
    is_counted = np.ones(len(is_member), dtype=np.bool_) if counted is None else counted.is_counted
    scores = {
        name: score_records(name, target, reference, n_compressed_bytes=n_bytes)
        for name in {*judged, *compared} - own_scores.keys()
    }
    scores.update(own_scores)
    # Where nothing is decided yet, none of them is chosen by looking.
    confidence_together = confidence if band is None else 1.0 - (1.0 - confidence) / len(judged)
    members, others = is_counted & is_member, is_counted & ~is_member
    member_edges, non_member_edges = edge_counts(target, reference, members, others)
    n_errors = np.diff(target.offsets) * mean_of_records(~target.is_correct, target.offsets)
    is_by_coins = subset.units.canaries.provenance.has_independent_coins
    try:
        units = subset.units_of(is_counted)
    except TooFewCanariesError as error:
        metrics = {name: _no_metrics(fpr_levels, note=str(error)) for name in judged}
        decided_by = judged[0]
        auc_by_score: dict[str, Measurement] = {}
        auc_by_group: dict[str, Measurement] = {}
    else:
        metrics = {
            name: measure_scores(
                units.headline(scores[name][is_counted]),
                units.is_member,
                fpr_levels=fpr_levels,
                confidence=confidence_together,
                band=band,
            )
            for name in judged
        }
        decided_by = judged[0] if band is None else strongest_of(metrics)
        auc_by_score = {
            name: measure_auc(
                units.headline(scores[name][is_counted]), units.is_member, confidence=confidence
            )
            for name in compared
            if name not in judged
        }
        auc_by_group = {
            name: measure_auc(
                scores[decided_by][is_counted][chosen],
                is_member[is_counted][chosen],
                confidence=confidence_together,
            )
            for name, chosen in units.others.items()
        }
    deciding = scores[decided_by]
    holder, step_scores = None, np.full(len(is_member), 0.5)
    if previous is not None:
        step_scores = score_records("ez", target, previous)
        # With a single step it is the order of that step: nothing that the other figures do not say.
        if earlier_steps is not None and earlier_steps.n_steps:
            holder = earlier_steps.score_with(step_scores), earlier_steps.n_steps + 1
    n_members_counted, n_non_members = subset.count(is_counted)
    return Figures(
        decided_by=decided_by,
        metrics=metrics[decided_by],
        judged_beside={name: metrics[name] for name in judged if name != decided_by},
        auc_by_score=auc_by_score,
        auc_by_group=auc_by_group,
        auc_recent=None
        if counted is None
        else _auc_recent(deciding, subset, counted, confidence=confidence_together),
        epsilon=_epsilon([scores[name] for name in judged], subset, confidence=confidence)
        if has_epsilon and is_by_coins
        else None,
        checkpoint_holder=None
        if holder is None
        else _auc_of_holder(holder[0], subset, is_counted, confidence=confidence),
        # Ranks among all that is scored, and a bound of all of it: who was fed is what is to be found out.
        checkpoint_holder_epsilon=subset.units.epsilon(holder[0], delta=_DELTA, confidence=confidence)
        if holder is not None and has_epsilon and is_by_coins
        else None,
        n_checkpoints=None if holder is None else holder[1],
        member_loss=mean_loss(target, members) if members.any() else None,
        non_member_loss=mean_loss(target, others) if others.any() else None,
        n_error_tokens=float(np.median(n_errors)),
        member_edges=member_edges,
        non_member_edges=non_member_edges,
        n_members=subset.n_members,
        n_non_members=n_non_members,
        n_members_seen=None if counted is None else n_members_counted,
        n_tokens=target.n_tokens,
        scores=deciding,
        scores_beside={name: scores[name] for name in judged if name != decided_by},
        step_scores=step_scores,
    )


def _epsilon(scores: Sequence[Scores], subset: CanarySubset, *, confidence: float) -> EpsilonBound:
    """The best bound of the scores that are judged, which together hold at the confidence."""

    def bound(each: Scores, confidence: float) -> EpsilonBound:
        return subset.units.epsilon(each, delta=_DELTA, confidence=confidence)

    # A single score is no choice.
    if len(scores) == 1:
        return bound(scores[0], confidence)
    return bonferroni_epsilon(scores, bound, confidence=confidence)


def _no_metrics(fpr_levels: Sequence[float], *, note: str) -> dict[str, Measurement]:
    """What would be measured, each figure without a value."""
    names = ["auc", *(metric_name("tpr_at_fpr", fpr=fpr) for fpr in fpr_levels), "advantage"]
    return {name: Measurement(value=None, note=note) for name in names}


def _auc_recent(
    scores: Scores, subset: CanarySubset, counted: Counted, *, confidence: float
) -> Measurement | None:
    """AUC of the quarter of the members that was fed last; None if that is too few."""
    is_member = subset.encoded.is_member
    members = np.flatnonzero(counted.is_counted & is_member)
    latest_first = members[np.argsort(-counted.last_step[members], kind="stable")]
    is_chosen = counted.is_counted & ~is_member
    is_chosen[latest_first[: -(-len(members) // 4)]] = True
    try:
        units = subset.units_of(is_chosen)
    except TooFewCanariesError:
        return None
    return measure_auc(units.headline(scores[is_chosen]), units.is_member, confidence=confidence)


def _auc_of_holder(
    scores: Scores, subset: CanarySubset, is_counted: Membership, *, confidence: float
) -> Measurement:
    """AUC of scores that are made of all audits: no band, for no decision reads it."""
    try:
        units = subset.units_of(is_counted)
    except TooFewCanariesError as error:
        return Measurement(value=None, note=str(error))
    measured = measure_auc(units.headline(scores[is_counted]), units.is_member, confidence=confidence)
    return replace(measured, note="no band: it is no part of the budget, which is about the last weights")


def measure_auc(
    scores: Scores, is_member: Membership, *, confidence: float, band: EndShares | None = None
) -> Measurement:
    """AUC with its DeLong interval: for this audit alone, and, if asked for, for all audits together."""

    def interval_at(confidence: float) -> intervals.Interval:
        return intervals.delong_interval(scores, is_member, confidence=confidence)

    return Measurement(
        value=roc.auc(scores, is_member),
        interval=interval_at(confidence),
        band=None if band is None else _band(interval_at, band),
    )


def _band(interval_at: Callable[[float], intervals.Interval], shares: EndShares) -> intervals.Interval:
    """An interval each of whose ends has its own share of the error."""
    lower = interval_at(1.0 - 2.0 * shares.lower)
    if shares.lower == shares.upper:
        return lower
    upper = interval_at(1.0 - 2.0 * shares.upper)
    return intervals.Interval(lower.lower, upper.upper, shares.confidence, lower.method)


def measure_scores(
    scores: Scores,
    is_member: Membership,
    *,
    fpr_levels: Sequence[float],
    confidence: float,
    band: EndShares | None = None,
) -> dict[str, Measurement]:
    """Every figure of one score: AUC, membership advantage, and TPR at each false-positive rate.

    What the canary set cannot resolve has no value, and a note with the number of non-members needed. TPR and
    advantage carry those of the score turned around; the AUC is its own mirror image, and so is its band if
    both ends have the same share.

    Args:
        scores: float64, (n_records,); higher means more likely a member.
        is_member: bool, (n_records,).
        fpr_levels: False-positive rates, each in (0, 1).
        confidence: Confidence of each figure's own interval.
        band: How often the ends of the bands may miss at this audit, so that those of all audits hold
            together; None for an audit that nothing is decided by.
    """
    of_both_directions = [
        _measure_one_direction(each, is_member, fpr_levels=fpr_levels, confidence=confidence, band=band)
        for each in (scores, -scores)
    ]
    measured = {}
    for name, found in of_both_directions[0].items():
        turned = of_both_directions[1][name]
        is_mirror_image = name == "auc" and (band is None or band.lower == band.upper)
        is_known = turned.value is not None and not is_mirror_image
        measured[name] = replace(found, reversed=turned if is_known else None)
    return measured


def _measure_one_direction(
    scores: Scores,
    is_member: Membership,
    *,
    fpr_levels: Sequence[float],
    confidence: float,
    band: EndShares | None,
) -> dict[str, Measurement]:
    """Every figure where high scores speak for members."""

    def interval_at(confidence: float) -> intervals.Interval:
        return intervals.advantage_interval(scores, is_member, confidence=confidence)

    measured = {"auc": measure_auc(scores, is_member, confidence=confidence, band=band)}
    for fpr in fpr_levels:
        measured[metric_name("tpr_at_fpr", fpr=fpr)] = _measure_tpr(
            scores, is_member, fpr=fpr, confidence=confidence, shares=band
        )
    measured["advantage"] = Measurement(
        value=roc.membership_advantage(scores, is_member),
        interval=interval_at(confidence),
        band=None if band is None else _band(interval_at, band),
    )
    return measured


def _measure_tpr(
    scores: Scores, is_member: Membership, *, fpr: float, confidence: float, shares: EndShares | None
) -> Measurement:
    n_non_members = int((~is_member).sum())
    # Below one allowed false positive the threshold lies beyond every non-member that was seen.
    if n_non_members * fpr < 1.0:
        needed = int(np.ceil(1.0 / fpr))
        return Measurement(value=None, note=f"needs {needed} non-members for a value, got {n_non_members}")
    interval = _certificate(scores, is_member, fpr=fpr, confidence=confidence)
    band, lacking = None, None if interval is not None else confidence
    if shares is not None:
        band, lacking_band = _certified_band(scores, is_member, fpr=fpr, shares=shares)
        lacking = lacking or lacking_band
    note = None
    if lacking is not None:
        # Two sides, each shared between the threshold and the members.
        needed = intervals.n_non_members_needed(fpr=fpr, failure_probability=(1.0 - lacking) / 4.0)
        note = f"bounds need {needed} non-members, got {n_non_members}"
    return Measurement(
        value=roc.tpr_at_fpr(scores, is_member, fpr=fpr), interval=interval, band=band, note=note
    )


def _certified_band(
    scores: Scores, is_member: Membership, *, fpr: float, shares: EndShares
) -> tuple[intervals.Interval | None, float | None]:
    """The band of a TPR, or the confidence that would take more non-members."""
    lower_at, upper_at = (1.0 - 2.0 * share for share in (shares.lower, shares.upper))
    lower = _certificate(scores, is_member, fpr=fpr, confidence=lower_at)
    if shares.lower == shares.upper:
        return lower, lower_at if lower is None else None
    upper = _certificate(scores, is_member, fpr=fpr, confidence=upper_at)
    if upper is None:
        return None, upper_at
    # The end that decides nothing is 0 where it takes more records than there are.
    end = 0.0 if lower is None else lower.lower
    return intervals.Interval(end, upper.upper, shares.confidence, upper.method), None


def _certificate(
    scores: Scores, is_member: Membership, *, fpr: float, confidence: float
) -> intervals.Interval | None:
    try:
        return intervals.tpr_at_fpr_interval(scores, is_member, fpr=fpr, confidence=confidence)
    except TooFewCanariesError:
        return None


def mean_loss(statistics: TokenStatistics, chosen: Membership) -> float:
    """Mean loss over all scored tokens of the chosen records, in nats per token."""
    of_token = np.repeat(chosen, np.diff(statistics.offsets))
    return float(-statistics.log_probs[of_token].mean(dtype=np.float64))


def mean_of_records(
    values: Float64[np.ndarray, " n_tokens"], offsets: Int64[np.ndarray, " n_records_plus_1"]
) -> Float64[np.ndarray, " n_records"]:
    """Mean over the tokens of each record.

    >>> mean_of_records(np.array([1.0, 2.0, 5.0]), np.array([0, 2, 3])).tolist()
    [1.5, 5.0]
    """
    sums = np.add.reduceat(np.asarray(values, dtype=np.float64), offsets[:-1])
    means: Float64[np.ndarray, " n_records"] = sums / np.diff(offsets)
    return means


def edge_counts(
    target: TokenStatistics, reference: TokenStatistics, members: Membership, others: Membership
) -> tuple[EdgeCounts, EdgeCounts]:
    """Records that stand on the edge rules of the EZ ratio: among the members, among the others."""
    evidence = ez_evidence(
        target.log_probs,
        reference.log_probs,
        target.is_correct,
        reference.is_correct,
        offsets=target.offsets,
    )

    def count(chosen: Membership) -> EdgeCounts:
        return EdgeCounts(
            n_no_errors=int(evidence.has_no_errors[chosen].sum()),
            n_no_negative=int(evidence.has_no_negative[chosen].sum()),
            n_low_evidence=int(evidence.is_low_evidence[chosen].sum()),
            n_records=int(chosen.sum()),
        )

    return count(members), count(others)
