"""The leakage budget, and the decision that one measurement leads to.

Measuring and judging are kept apart: a figure with its interval comes in, a verdict with its reason goes
out. "Within budget" never means "private": it means that this attack, on these canaries, gave no reason
to stop under the chosen rule.

Leakage counts in both directions. Members that score *lower* than non-members, as after unlearning, are told
apart as well: an attacker turns the score around.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.intervals import (
    Interval,
    auc_half_width,
    n_non_members_needed,
)
from ezmia_callbacks.functional.search import smallest_enough

__all__: list[str] = []

BudgetMetric = Literal["auc", "tpr_at_fpr", "advantage"]
BudgetRule = Literal["lower", "point", "upper"]

_TPR_PREFIX = "tpr_at_fpr_"

# What each metric reads when nothing leaks, and the largest limit that still means something.
_CHANCE: dict[str, float] = {"auc": 0.5, "advantage": 0.0}


def metric_name(metric: BudgetMetric, *, fpr: float = 0.01) -> str:
    """Name under which a metric is stored in results and trackers.

    >>> metric_name("tpr_at_fpr", fpr=0.01)
    'tpr_at_fpr_0.01'
    """
    return f"{_TPR_PREFIX}{fpr:g}" if metric == "tpr_at_fpr" else metric


def fpr_of_metric(name: str) -> float | None:
    """False-positive rate in the name of a metric, as `metric_name` wrote it; None for other metrics.

    >>> fpr_of_metric("tpr_at_fpr_0.01")
    0.01
    >>> fpr_of_metric("auc") is None
    True
    """
    if not name.startswith(_TPR_PREFIX):
        return None
    # Names come from files, too.
    try:
        fpr = float(name.removeprefix(_TPR_PREFIX))
    except ValueError:
        return None
    return fpr if 0.0 < fpr < 1.0 else None


def metric_label(name: str) -> str:
    """Name of a metric for a reader; of one that is unknown, its name in results.

    >>> metric_label("tpr_at_fpr_0.01")
    'TPR at 1 % FPR'
    """
    if (fpr := fpr_of_metric(name)) is not None:
        return f"TPR at {100 * fpr:g} % FPR"
    return {"auc": "AUC", "advantage": "membership advantage"}.get(name, name)


@dataclass(frozen=True)
class LeakageBudget:
    """How much membership leakage a run may show before it is stopped.

    Attributes:
        limit: Largest tolerated value of `metric`; strictly between chance (0.5 for `"auc"`, 0 for
            `"advantage"`, `fpr` for `"tpr_at_fpr"`) and 1.
        metric: `"auc"`, `"tpr_at_fpr"` (true-positive rate at false-positive rate `fpr`) or
            `"advantage"` (largest TPR - FPR).
        fpr: False-positive rate of `"tpr_at_fpr"`, in (0, 1); ignored otherwise.
        rule: What has to cross `limit`. `"lower"`: the lower end of the simultaneous band, evidence of
            excess; a run whose true leakage stays at or under the limit is stopped with probability at
            most 1 - confidence over all its audits. `"upper"`: the upper end, excess cannot be ruled
            out; weights whose true leakage exceeds the limit are found within budget, at any audit, with
            probability at most 1 - confidence (with `patience`, a run that is over budget still goes on
            for a while). `"point"`: the bare estimate, no guarantee either way. The band of the AUC is
            a large-sample approximation, the others are exact. Each rule reads every score that is judged,
            as it is and turned around, and takes what leaks most.
        confidence: Confidence of all decisions of the run together, over all audits and all scores that are
            judged, in (0, 1).
        patience: Number of consecutive audits over budget that are tolerated before the stop.

    Raises:
        ConfigurationError: if a field is outside its range.

    >>> LeakageBudget(metric="auc", limit=0.6).describe()
    'stop when the lower bound of AUC exceeds 0.600'
    """

    limit: float
    metric: BudgetMetric = "auc"
    fpr: float = 0.01
    rule: BudgetRule = "lower"
    confidence: float = 0.95
    patience: int = 0

    def __post_init__(self) -> None:
        if self.metric not in ("auc", "tpr_at_fpr", "advantage"):
            raise ConfigurationError(
                f"Unknown budget metric {self.metric!r}: use 'auc', 'tpr_at_fpr' or 'advantage'."
            )
        if self.rule not in ("lower", "point", "upper"):
            raise ConfigurationError(f"Unknown budget rule {self.rule!r}: use 'lower', 'point' or 'upper'.")
        if not 0.0 < self.fpr < 1.0:
            raise ConfigurationError(f"`fpr` must lie in (0, 1), got {self.fpr!r}.")
        if not 0.0 < self.confidence < 1.0:
            raise ConfigurationError(f"`confidence` must lie in (0, 1), got {self.confidence!r}.")
        chance = self.chance
        if not (isinstance(self.limit, int | float) and chance < self.limit < 1.0):
            raise ConfigurationError(
                f"The limit of {metric_name(self.metric, fpr=self.fpr)} must lie strictly between "
                f"{chance:g} (chance) and 1, got {self.limit!r}."
            )
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 0:
            raise ConfigurationError(f"`patience` must be an integer >= 0, got {self.patience!r}.")

    @property
    def chance(self) -> float:
        """Value of the metric when nothing leaks."""
        return _CHANCE.get(self.metric, self.fpr)

    @property
    def name(self) -> str:
        """Name of the metric in results and trackers, e.g. `tpr_at_fpr_0.01`."""
        return metric_name(self.metric, fpr=self.fpr)

    @property
    def label(self) -> str:
        """Name of the metric for a reader, e.g. `TPR at 1 % FPR`."""
        return metric_label(self.name)

    def describe(self) -> str:
        """The rule as one plain sentence."""
        what = {"lower": "the lower bound of ", "upper": "the upper bound of ", "point": ""}
        text = f"stop when {what[self.rule]}{self.label} exceeds {self.limit:.3f}"
        if self.patience:
            text += f" in {self.patience + 1} consecutive audits"
        return text


@dataclass(frozen=True)
class Decision:
    """What one audit means for the run.

    Attributes:
        stop: True if training is to end now.
        is_within_budget: True or False by the budget's rule; None if there is no verdict: the audit failed,
            the canaries could not carry one, or no budget is set.
        message: The reason, as one plain sentence.
        compared: The number that was compared with the limit; None if there was none.
        limit: The budget's limit; None without a budget.
        n_over_in_a_row: Consecutive audits over budget, this one included.
        is_reversed: Whether `compared` is of the score turned around: members score lower than non-members.
        score: Name of the score that `compared` is of, where several are judged together; else empty.
    """

    stop: bool
    is_within_budget: bool | None
    message: str
    compared: float | None = None
    limit: float | None = None
    n_over_in_a_row: int = 0
    is_reversed: bool = False
    score: str = ""


@dataclass(frozen=True)
class EndShares:
    """How often each end of a band may miss the truth.

    Attributes:
        lower: Probability that the truth lies below the lower end, in (0, 0.5).
        upper: Probability that it lies above the upper end, in (0, 0.5).

    >>> EndShares(0.0025, 0.0025).confidence
    0.995
    """

    lower: float
    upper: float

    @property
    def confidence(self) -> float:
        """Probability with which both ends hold."""
        return 1.0 - (self.lower + self.upper)


@dataclass(frozen=True)
class JudgedFigure:
    """The budget's metric of one score.

    Attributes:
        value: Point estimate.
        band: Its simultaneous interval at this audit.
        reversed_value: Point estimate for the score turned around; None for an AUC whose band is its own
            mirror image, where it is 1 - value. Another metric without it is judged in one direction alone.
        reversed_band: Its simultaneous interval, likewise.
    """

    value: float
    band: Interval
    reversed_value: float | None = None
    reversed_band: Interval | None = None


def mirrored(interval: Interval) -> Interval:
    """The interval of the AUC of a score turned around, which is 1 - AUC.

    >>> mirrored(Interval(lower=0.0, upper=0.25, confidence=0.95, method="delong")).lower
    0.75
    """
    return Interval(1.0 - interval.upper, 1.0 - interval.lower, interval.confidence, interval.method)


def decide(
    budget: LeakageBudget,
    value: float,
    *,
    band: Interval,
    reversed_value: float | None = None,
    reversed_band: Interval | None = None,
    n_over_before: int = 0,
) -> Decision:
    """The verdict on the measurement of one score, in the direction that leaks more.

    Both directions together keep the share a of the error rate that the bands were made with, for each end
    of a band has a share of its own, a / 2. Rule `"lower"` is wrong where a lower end exceeds a limit that
    the truth keeps to, in either direction: a / 2 + a / 2. For the AUC these are the two ends of one band;
    for the advantage and TPR at FPR, the lower ends of two bands. Rule `"upper"` is wrong where both upper
    ends keep to a limit that the truth exceeds in one direction, whose own upper end errs with a / 2 at most.

    Args:
        budget: The budget.
        value: Point estimate of the budget's metric.
        band: Its simultaneous interval at this audit.
        reversed_value: Point estimate for the score turned around; None for the AUC, where it is 1 - value.
            Without it another metric is judged in one direction alone.
        reversed_band: Its simultaneous interval, likewise.
        n_over_before: Consecutive audits over budget just before this one.

    Raises:
        ConfigurationError: if `value` is not finite, for a missing figure is never "within budget".

    >>> band = Interval(lower=0.62, upper=0.71, confidence=0.95, method="delong")
    >>> decide(LeakageBudget(metric="auc", limit=0.6), 0.66, band=band).stop
    True
    """
    figure = JudgedFigure(value, band, reversed_value, reversed_band)
    return decide_by_strongest(budget, {"": figure}, n_over_before=n_over_before)


def decide_by_strongest(
    budget: LeakageBudget, figures: Mapping[str, JudgedFigure], *, n_over_before: int = 0
) -> Decision:
    """The verdict on the measurements of several scores: that on the one that leaks most.

    An attacker uses the best score at hand, so a run leaks as much as the strongest of them finds. With bands
    of `end_shares` the scores together keep the share of the error rate that an audit may spend.

    Args:
        budget: The budget.
        figures: Its metric by the name of each score; of equal ones the first is named.
        n_over_before: Consecutive audits over budget just before this one.

    Raises:
        ConfigurationError: if there is no score, or a value is not finite.

    Source: Bonferroni over the scores for the lower ends; for the upper ones intersection-union (Berger 1982,
    Technometrics 24:295): the strongest score's own upper end has to fall below the limit by mistake.

    >>> of_score = {
    ...     "ez": JudgedFigure(0.57, Interval(0.52, 0.62, 0.95, "delong")),
    ...     "wbc": JudgedFigure(0.68, Interval(0.63, 0.73, 0.95, "delong")),
    ... }
    >>> decision = decide_by_strongest(LeakageBudget(metric="auc", limit=0.6), of_score)
    >>> decision.is_within_budget, decision.score, decision.message
    (False, 'wbc', 'over budget: lower bound of AUC (wbc) 0.630 > 0.600')
    """
    if not figures:
        raise ConfigurationError(f"There is no {budget.label} to be judged: pass that of one score at least.")
    found = [
        (compared, is_reversed, score)
        for score, figure in figures.items()
        for compared, is_reversed in _by_direction(budget, figure)
    ]
    compared, is_reversed, score = max(found, key=lambda each: each[0])
    what = {"lower": "lower bound of ", "upper": "upper bound of ", "point": ""}[budget.rule]
    what += f"{budget.label} ({score})" if score else budget.label
    turned_around = " with the score reversed" if is_reversed else ""
    if compared <= budget.limit:
        message = f"within budget: {what} {compared:.3f} <= {budget.limit:.3f}{turned_around}"
        return Decision(False, True, message, compared, budget.limit, is_reversed=is_reversed, score=score)
    n_over = n_over_before + 1
    stop = n_over > budget.patience
    message = f"over budget: {what} {compared:.3f} > {budget.limit:.3f}{turned_around}"
    if is_reversed:
        message += ": members score LOWER than non-members"
    if not stop:
        message += f", patience {n_over} of {budget.patience}"
    return Decision(stop, False, message, compared, budget.limit, n_over, is_reversed, score)


def end_shares(budget: LeakageBudget | None, *, failure_probability: float, n_scores: int = 1) -> EndShares:
    """How often the ends of each score's bands may miss, so that all scores together keep their promise.

    Every lower end has a share of its own, for any of them may stop a run. Under rule `"upper"` the upper
    ends need none: a model that exceeds the limit by some score is found within only where that score's own
    upper end misses. The band of the score that `decide_by_strongest` names therefore holds for the strongest
    of them, although it was chosen by looking.

    Args:
        budget: The budget; None only measures, and divides both ends.
        failure_probability: Error rate that the audit may spend, both ends together, in (0, 1).
        n_scores: Number of scores that are judged together, >= 1.

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: see `decide_by_strongest`.

    >>> end_shares(LeakageBudget(limit=0.6, rule="upper"), failure_probability=0.03, n_scores=3)
    EndShares(lower=0.005, upper=0.015)
    """
    if not 0.0 < failure_probability < 1.0 or n_scores < 1:
        raise ConfigurationError(
            f"Got a failure probability of {failure_probability!r} for {n_scores} scores: a probability in "
            "(0, 1) and at least one score are needed."
        )
    side = failure_probability / 2.0
    is_upper = budget is not None and budget.rule == "upper"
    return EndShares(side / n_scores, side if is_upper else side / n_scores)


def _by_direction(budget: LeakageBudget, figure: JudgedFigure) -> list[tuple[float, bool]]:
    """What the rule compares with the limit, and whether it is of the score turned around."""
    turned, turned_band = figure.reversed_value, figure.reversed_band
    if budget.metric == "auc" and (turned is None or turned_band is None):
        turned, turned_band = 1.0 - figure.value, mirrored(figure.band)
    found = [(_compared(budget, figure.value, figure.band), False)]
    if turned is not None and turned_band is not None:
        found.append((_compared(budget, turned, turned_band), True))
    return found


def _compared(budget: LeakageBudget, value: float, band: Interval) -> float:
    """The number that the rule compares with the limit, in one direction."""
    compared = {"lower": band.lower, "point": value, "upper": band.upper}[budget.rule]
    if not (math.isfinite(value) and math.isfinite(compared)):
        raise ConfigurationError(f"Cannot judge a {budget.label} of {value!r} ({compared!r}).")
    return compared


def alpha_for_audit(look: int, *, n_planned: int | None, failure_probability: float) -> float:
    """Share of the error rate that one of several audits may spend (union bound).

    With a known number of audits each gets an equal share; without one, audit t gets 6/(pi^2 t^2), which
    sums to one. The canaries are the same at every audit, so neither independence nor fresh data may be
    assumed; the union bound needs neither. Audits beyond the plan get shares of a second
    `failure_probability`, so that the total never exceeds twice of what was promised: leakage in one
    direction, which spends half of each share, keeps the promise even then.

    Args:
        look: Number of this audit, from 1.
        n_planned: Number of audits that the run will make, or None.
        failure_probability: Error rate of the whole run, in (0, 1).

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: Bonferroni; the series is the Basel sum.

    >>> alpha_for_audit(3, n_planned=10, failure_probability=0.05)
    0.005
    >>> round(alpha_for_audit(1, n_planned=None, failure_probability=0.05), 4)
    0.0304
    """
    if look < 1 or (n_planned is not None and n_planned < 1):
        raise ConfigurationError(
            f"Audits are numbered from 1 and at least one must be planned, got audit {look} of {n_planned}."
        )
    if not 0.0 < failure_probability < 1.0:
        raise ConfigurationError(f"`failure_probability` must lie in (0, 1), got {failure_probability!r}.")
    if n_planned is not None and look <= n_planned:
        return failure_probability / n_planned
    extra = look - (n_planned or 0)
    return 6.0 * failure_probability / (math.pi**2 * extra**2)


def check_resolvable(
    budget: LeakageBudget,
    *,
    n_members: int,
    n_non_members: int,
    failure_probability: float,
    n_scores: int = 1,
) -> None:
    """Refuse a budget on which this canary set could never give the answer that matters.

    `"lower"`: total leakage (every member above every non-member) must be able to cross the limit.
    `"upper"`: a run that leaks nothing must be able to stay inside. TPR at FPR needs, under each rule, so
    many non-members that it has an interval at all.

    Args:
        budget: The budget.
        n_members: Number of member canaries.
        n_non_members: Number of non-member canaries.
        failure_probability: Error rate that the least favored audit may spend.
        n_scores: Number of scores that are judged together, >= 1.

    Raises:
        TooFewCanariesError: naming the number of records that would do.

    Source: exact pairs bound for AUC and advantage, order statistics for the threshold of TPR at FPR
    (1 - (1 - fpr)^n), the end of the AUC's interval with the variance of Hanley and McNeil 1982.

    >>> check_resolvable(LeakageBudget(metric="auc", limit=0.6), n_members=100, n_non_members=100,
    ...                  failure_probability=0.005)
    """
    shares = end_shares(budget, failure_probability=failure_probability, n_scores=n_scores)
    side = shares.upper if budget.rule == "upper" else shares.lower
    n_smaller = min(n_members, n_non_members)
    have = f"{n_members} members and {n_non_members} non-members"
    if budget.metric == "tpr_at_fpr":
        _check_tpr_is_resolved(budget, n_members, n_non_members, side / 2.0)
        return
    if budget.rule == "upper":
        _check_no_leakage_can_pass(budget, n_members, n_non_members, side)
        return
    if budget.rule == "lower":
        if budget.metric == "auc":
            needed = math.ceil(math.log(side) / math.log(budget.limit))
        else:
            # Both empirical distribution functions are off by at most sqrt(ln(1/b) / 2n), b = side / 2.
            needed = math.ceil(2.0 * math.log(2.0 / side) / (1.0 - budget.limit) ** 2)
        if n_smaller < needed:
            raise TooFewCanariesError(
                f"Even total leakage could not exceed {budget.label} {budget.limit:g} at this confidence "
                f"with {have}: at least {needed} of each are needed."
            )


def _check_tpr_is_resolved(budget: LeakageBudget, n_members: int, n_non_members: int, piece: float) -> None:
    """Raise unless threshold and members, each with its piece of the error rate, can carry a decision."""
    needed = n_non_members_needed(fpr=budget.fpr, failure_probability=piece)
    if n_non_members < needed:
        raise TooFewCanariesError(
            f"A budget on {budget.label} needs at least {needed} non-members, got {n_non_members}: "
            "add non-members, raise `fpr`, or set the budget on AUC, which needs far fewer."
        )
    # The exact bounds when all members, or none, are above the threshold: piece^(1/n) and 1 - piece^(1/n).
    if budget.rule == "lower":
        fewest, outcome = math.log(piece) / math.log(budget.limit), "total leakage could not exceed"
    elif budget.rule == "upper":
        fewest, outcome = (
            math.log(piece) / math.log1p(-budget.limit),
            "a model that leaks nothing could not stay within",
        )
    else:
        return
    if n_members < fewest:
        raise TooFewCanariesError(
            f"Even {outcome} {budget.label} {budget.limit:g} at this confidence with {n_members} members: "
            f"at least {math.ceil(fewest)} are needed."
        )


def _check_no_leakage_can_pass(
    budget: LeakageBudget, n_members: int, n_non_members: int, side: float
) -> None:
    """Raise if a run that leaks nothing would be over budget already."""
    if budget.metric == "auc":

        def excess(n1: int, n0: int) -> float:
            return 0.5 + auc_half_width(n1, n0, failure_probability=side) - budget.limit

    else:

        def excess(n1: int, n0: int) -> float:
            radius = sum(math.sqrt(math.log(2.0 / side) / (2.0 * n)) for n in (n1, n0))
            return radius - budget.limit

    if excess(n_members, n_non_members) <= 0.0:
        return
    needed = smallest_enough(lambda n: excess(n, n) <= 0.0, fewest=1)
    raise TooFewCanariesError(
        f"With {n_members} members and {n_non_members} non-members, the upper bound of {budget.label} would "
        f"exceed {budget.limit:g} even for a model that leaks nothing: use {needed} of each, a higher limit, "
        "or rule='lower'."
    )
