"""How often the package's intervals, decisions and bounds keep their promises, by simulation.

    python benchmarks/statistics_coverage.py                 # some minutes on two idle cores
    python benchmarks/statistics_coverage.py --scale 2       # twice the runs
    python benchmarks/statistics_coverage.py --quick         # a minute; rates are rough, no file is written

Truth is known by construction: each record has a latent standard normal value, and its score is a
nondecreasing function of it that differs between members and non-members. No model is trained. Prints
Markdown tables, and writes them with seed, versions and machine to `benchmarks/results/` and, between the
marks of each table, to `docs/statistics.md`.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from ezmia_callbacks.canaries import CanarySet, hold_out_canaries
from ezmia_callbacks.canaries.validity.checks import check_validity
from ezmia_callbacks.errors import TooFewCanariesError
from ezmia_callbacks.functional import (
    EpsilonBound,
    Interval,
    LeakageBudget,
    advantage_interval,
    alpha_for_audit,
    auc,
    bonferroni_epsilon,
    bootstrap_band,
    canaries_needed,
    check_resolvable,
    clopper_pearson,
    counts_above,
    decide,
    decision_power,
    delong_interval,
    epsilon_from_rates,
    epsilon_from_rates_gdp,
    epsilon_of_gdp,
    epsilon_one_run,
    epsilon_one_run_gdp,
    leakage_permutation_test,
    membership_advantage,
    n_non_members_needed,
    one_run_guesses,
    paired_delong_difference,
    realized_fpr_range,
    split_half_epsilon,
    tpr_at_fpr,
    tpr_at_fpr_interval,
    tpr_at_fpr_upper_bound,
)

RESULTS = Path(__file__).parent / "results" / "statistics_coverage.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "statistics.md"
SIZES = (100, 300, 1000)
N_AUDITS = 10
CORRELATION = 0.9

# Shares of non-members up to each level of the tied scores: EZ has many records at its ends.
_LEVELS = stats.norm.ppf([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995])


@dataclass(frozen=True)
class Population:
    """Where scores come from, and so what is true of them.

    Attributes:
        kind: `"smooth"`: two normal distributions; `"tied"`: the same, rounded to 12 levels, a fifth of the
            non-members at the lowest; `"few"`: a share of the members scores 1, all other records 0.5.
        strength: Shift between the classes, or that share; 0 leaks nothing.
    """

    kind: str
    strength: float

    def scores(self, latent: np.ndarray, is_member: np.ndarray) -> np.ndarray:
        """Scores of records with these latent values, of the same shape."""
        if self.kind == "few":
            cut = stats.norm.isf(self.strength) if self.strength > 0 else math.inf
            return np.where(is_member & (latent > cut), 1.0, 0.5)
        shifted = latent + self.strength * is_member
        return shifted if self.kind == "smooth" else np.searchsorted(_LEVELS, shifted) / len(_LEVELS)

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """The true ROC, (FPR, TPR), from (0, 0) to (1, 1)."""
        if self.kind == "few":
            return np.array([0.0, 0.0, 1.0]), np.array([0.0, self.strength, 1.0])
        cuts = _LEVELS[::-1] if self.kind == "tied" else np.linspace(8.0, -8.0, 4001)
        return tuple(
            np.concatenate([[0.0], stats.norm.sf(cuts - shift), [1.0]]) for shift in (0.0, self.strength)
        )

    @property
    def auc(self) -> float:
        if self.kind == "smooth":
            return float(stats.norm.cdf(self.strength / math.sqrt(2.0)))
        fpr, tpr = self.points()
        return float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2.0))

    @property
    def advantage(self) -> float:
        if self.kind == "smooth":
            return float(2.0 * stats.norm.cdf(self.strength / 2.0) - 1.0)
        fpr, tpr = self.points()
        return float(np.max(tpr - fpr))

    def tpr(self, fpr: float) -> float:
        if self.kind == "smooth":
            return float(stats.norm.sf(stats.norm.isf(fpr) - self.strength))
        fprs, tprs = self.points()
        return float(tprs[fprs <= fpr + 1e-12].max())

    def figure(self, budget: LeakageBudget) -> float:
        """The true value of a budget's metric."""
        return self.tpr(budget.fpr) if budget.metric == "tpr_at_fpr" else getattr(self, budget.metric)


@functools.cache
def population(kind: str, *, metric: str = "auc", value: float, fpr: float = 0.01) -> Population:
    """The population of that kind whose true `metric` is `value`."""
    if metric == "auc" and value == 0.5:
        return Population(kind, 0.0)
    budget = LeakageBudget(limit=0.99, metric=metric, fpr=fpr)
    high = 1.0 if kind == "few" else 8.0
    return Population(
        kind, optimize.brentq(lambda s: Population(kind, s).figure(budget) - value, 0.0, high, xtol=1e-12)
    )


def labels(n: int) -> np.ndarray:
    """`n` members and `n` non-members."""
    return np.arange(2 * n) < n


def latent_path(rng: np.random.Generator, *, n_looks: int, n: int, correlation: float) -> np.ndarray:
    """AR(1) of standard normals from audit to audit, (n_looks, n)."""
    path = rng.normal(size=(n_looks, n))
    for look in range(1, n_looks):
        path[look] = correlation * path[look - 1] + math.sqrt(1 - correlation**2) * path[look]
    return path


# --- one interval -----------------------------------------------------------------------------------------


class Misses(NamedTuple):
    """How often the truth lay below the lower end, and above the upper end; None if there was no end."""

    below: float | None
    above: float | None

    def cell(self) -> str:
        if self.below is None and self.above is None:
            return "refused"
        return " / ".join("refused" if rate is None else f"{100 * rate:.1f}" for rate in self)


def _misses(ends: Sequence[tuple[float | None, float | None]], truth: float) -> Misses:
    def share(values: Iterable[float | None], is_missed: Callable[[float], bool]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean([is_missed(value) for value in known])) if known else None

    # Rounding in the last digit is no miss.
    return Misses(
        share((lower for lower, _ in ends), lambda lower: lower > truth + 1e-9),
        share((upper for _, upper in ends), lambda upper: upper < truth - 1e-9),
    )


def certificate_ends(
    scores: np.ndarray, is_member: np.ndarray, *, fpr: float, confidence: float
) -> tuple[float | None, float | None]:
    """Both ends of the TPR certificate; the upper one alone where there is no lower one."""
    try:
        interval = tpr_at_fpr_interval(scores, is_member, fpr=fpr, confidence=confidence)
    except TooFewCanariesError:
        side = (1.0 - confidence) / 2.0
        return None, tpr_at_fpr_upper_bound(scores, is_member, fpr=fpr, failure_probability=side)
    return interval.lower, interval.upper


def coverage(
    source: Population, *, n: int, n_runs: int, seed: int, n_bootstrapped: int = 0, confidence: float = 0.95
) -> dict[str, Misses]:
    """How often each interval misses the truth, from `n_runs` draws of `n` records a class."""
    rng = np.random.default_rng(seed)
    is_member = labels(n)
    ends: dict[str, list[tuple[float | None, float | None]]] = {}

    def note(name: str, interval: Interval) -> None:
        ends.setdefault(name, []).append((interval.lower, interval.upper))

    for run in range(n_runs):
        scores = source.scores(rng.normal(size=2 * n), is_member)
        note("auc", delong_interval(scores, is_member, confidence=confidence))
        note("advantage", advantage_interval(scores, is_member, confidence=confidence))
        for fpr in (0.01, 0.1):
            ends.setdefault(f"tpr {fpr:g}", []).append(
                certificate_ends(scores, is_member, fpr=fpr, confidence=confidence)
            )
        n_above = round(n * tpr_at_fpr(scores, is_member, fpr=0.01))
        note("members only 0.01", clopper_pearson(n_above, n, confidence=confidence))
        if run < n_bootstrapped:
            band = bootstrap_band(
                scores, is_member, fpr=[0.01, 0.1], confidence=confidence, n_resamples=200, seed=run
            )
            for i, fpr in enumerate((0.01, 0.1)):
                ends.setdefault(f"bootstrap {fpr:g}", []).append((band.lower[i], band.upper[i]))
    truth = {
        "auc": source.auc,
        "advantage": source.advantage,
        **{f"{name} {fpr:g}": source.tpr(fpr) for name in ("tpr", "bootstrap") for fpr in (0.01, 0.1)},
        "members only 0.01": source.tpr(0.01),
    }
    return {name: _misses(values, truth[name]) for name, values in ends.items()}


def shuffled_misses(*, n: int, n_runs: int, seed: int) -> Misses:
    """How often the AUC interval misses 0.5 when the labels of one leaking set are shuffled."""
    rng = np.random.default_rng(seed)
    is_member = labels(n)
    scores = population("tied", value=0.9).scores(rng.normal(size=2 * n), is_member)
    ends = []
    for _ in range(n_runs):
        interval = delong_interval(scores, rng.permutation(is_member))
        ends.append((interval.lower, interval.upper))
    return _misses(ends, 0.5)


def few_remembered_misses(*, n: int, n_audits: int, limits: Sequence[float]) -> list[Misses]:
    """Exact chance that one audit's AUC band misses, for the kind `"few"` with these true AUCs."""
    is_member = labels(n)
    share = alpha_for_audit(1, n_planned=n_audits, failure_probability=0.05)
    counts = np.arange(n + 1)
    bands = [
        delong_interval(np.where(np.arange(2 * n) < count, 1.0, 0.5), is_member, confidence=1.0 - share)
        for count in counts
    ]
    lower, upper = np.array([[band.lower, band.upper] for band in bands]).T
    found = []
    for limit in limits:
        probability = stats.binom.pmf(counts, n, 2.0 * (limit - 0.5))
        found.append(Misses(float(probability[lower > limit].sum()), float(probability[upper < limit].sum())))
    return found


# --- many looks -------------------------------------------------------------------------------------------


class RunRates(NamedTuple):
    """What happened over many simulated runs.

    Attributes:
        stopped: Share of runs that were stopped at some audit.
        over: Share of audits that found the run over budget.
        within_once: Share of runs that some audit found within budget.
    """

    stopped: float
    over: float
    within_once: float


def band_of(
    budget: LeakageBudget, scores: np.ndarray, is_member: np.ndarray, *, confidence: float
) -> tuple[float, Interval]:
    """Point estimate and interval of the budget's metric, as an audit makes them."""
    if budget.metric == "auc":
        return auc(scores, is_member), delong_interval(scores, is_member, confidence=confidence)
    if budget.metric == "advantage":
        return membership_advantage(scores, is_member), advantage_interval(
            scores, is_member, confidence=confidence
        )
    return tpr_at_fpr(scores, is_member, fpr=budget.fpr), tpr_at_fpr_interval(
        scores, is_member, fpr=budget.fpr, confidence=confidence
    )


def run_rates(
    source: Population,
    budgets: Sequence[LeakageBudget],
    *,
    n: int,
    n_runs: int,
    seed: int,
    n_planned: int | None = N_AUDITS,
    is_shared: bool = True,
    n_looks: int = N_AUDITS,
    correlation: float = CORRELATION,
) -> list[RunRates]:
    """Runs of `n_looks` audits on one set of records each, judged by budgets on the same metric.

    Scores move from audit to audit with that correlation; their distribution stays the same. A run is
    followed to its end even if it was stopped, so that each audit counts. Without `is_shared` each audit
    spends the whole error rate.
    """
    rng = np.random.default_rng(seed)
    is_member, failure = labels(n), 1.0 - budgets[0].confidence
    stopped, over, within = (np.zeros((len(budgets), n_runs, n_looks), dtype=bool) for _ in range(3))
    for run in range(n_runs):
        path = source.scores(latent_path(rng, n_looks=n_looks, n=2 * n, correlation=correlation), is_member)
        n_over = [0] * len(budgets)
        for look in range(n_looks):
            share = failure
            if is_shared:
                share = alpha_for_audit(look + 1, n_planned=n_planned, failure_probability=failure)
            (value, band), (turned, turned_band) = (
                band_of(budgets[0], scores, is_member, confidence=1.0 - share)
                for scores in (path[look], -path[look])
            )
            for i, budget in enumerate(budgets):
                decision = decide(
                    budget,
                    value,
                    band=band,
                    reversed_value=turned,
                    reversed_band=turned_band,
                    n_over_before=n_over[i],
                )
                n_over[i] = decision.n_over_in_a_row
                stopped[i, run, look] = decision.stop
                over[i, run, look] = not decision.is_within_budget
                within[i, run, look] = bool(decision.is_within_budget)
    return [
        RunRates(
            float(stopped[i].any(axis=1).mean()), float(over[i].mean()), float(within[i].any(axis=1).mean())
        )
        for i in range(len(budgets))
    ]


def all_rules(limit: float, *, metric: str = "auc") -> list[LeakageBudget]:
    """A budget for each rule, without patience and with a patience of 2."""
    return [
        LeakageBudget(limit=limit, metric=metric, rule=rule, patience=patience)
        for rule in ("lower", "upper", "point")
        for patience in (0, 2)
    ]


def is_refused(budget: LeakageBudget, *, n: int, n_planned: int | None) -> bool:
    """Whether `n` members and `n` non-members do not carry the budget at one of ten audits."""
    share = min(
        alpha_for_audit(look, n_planned=n_planned, failure_probability=1.0 - budget.confidence)
        for look in range(1, N_AUDITS + 1)
    )
    return not _is_accepted(budget, n=n, share=share)


def _is_accepted(budget: LeakageBudget, *, n: int, share: float) -> bool:
    try:
        check_resolvable(budget, n_members=n, n_non_members=n, failure_probability=share)
    except TooFewCanariesError:
        return False
    return True


# --- permutation and paired tests -------------------------------------------------------------------------


def permutation_p_values(source: Population, *, n: int, n_runs: int, seed: int) -> np.ndarray:
    """p-values of the joint test over ten audits, (n_runs,)."""
    rng = np.random.default_rng(seed)
    is_member = labels(n)
    p_values = []
    for run in range(n_runs):
        path = latent_path(rng, n_looks=N_AUDITS, n=2 * n, correlation=CORRELATION)
        test = leakage_permutation_test(
            source.scores(path, is_member), is_member, n_permutations=399, seed=run
        )
        p_values.append(test.p_value)
    return np.array(p_values)


def per_audit_detection(source: Population, *, n: int, n_runs: int, seed: int) -> float:
    """Share of runs in which some audit's one-sided DeLong bound, at a tenth of 5 %, is above 0.5."""
    rng = np.random.default_rng(seed)
    is_member = labels(n)
    n_found = 0
    for _ in range(n_runs):
        path = latent_path(rng, n_looks=N_AUDITS, n=2 * n, correlation=CORRELATION)
        n_found += any(
            delong_interval(row, is_member, confidence=1.0 - 2.0 * 0.05 / N_AUDITS).lower > 0.5
            for row in source.scores(path, is_member)
        )
    return n_found / n_runs


def false_rises(source: Population, *, n: int, n_runs: int, seed: int) -> tuple[float, float]:
    """How often the paired test finds a rise where there is none: last against first, lowest to highest."""
    rng = np.random.default_rng(seed)
    is_member = labels(n)
    fixed = chosen = 0
    for _ in range(n_runs):
        path = source.scores(latent_path(rng, n_looks=N_AUDITS, n=2 * n, correlation=CORRELATION), is_member)
        aucs = [auc(row, is_member) for row in path]
        fixed += paired_delong_difference(path[-1], path[0], is_member).interval.lower > 0
        best = paired_delong_difference(path[np.argmax(aucs)], path[np.argmin(aucs)], is_member)
        chosen += best.interval.lower > 0
    return fixed / n_runs, chosen / n_runs


# --- epsilon ----------------------------------------------------------------------------------------------

N_COINS = 1000
GUESSES = (10, 25, 50, 100, 200, 400)


@dataclass(frozen=True)
class Mechanism:
    """A mechanism whose epsilon is known, as the scores that it leaves behind.

    Attributes:
        name: `"nothing"`: pure noise; `"randomized response"`: the coin itself, flipped with probability
            1 / (1 + e^epsilon); `"gaussian"`: the coin plus noise, mu-GDP with mu = 1.
        epsilon: Its true epsilon, at delta 0 or, for `"gaussian"`, at 1e-5.
    """

    name: str
    epsilon: float

    def scores(self, rng: np.random.Generator, coins: np.ndarray) -> np.ndarray:
        if self.name == "gaussian":
            return coins + rng.normal(size=len(coins))
        if self.name == "nothing":
            return rng.normal(size=len(coins))
        kept = rng.random(len(coins)) < 1.0 / (1.0 + math.exp(-self.epsilon))
        # Noise breaks ties, which would make guesses abstain.
        return np.where(kept, coins, ~coins) + 0.1 * rng.random(len(coins))


MECHANISMS = (
    Mechanism("nothing", 0.0),
    Mechanism("randomized response", 1.0),
    Mechanism("gaussian", epsilon_of_gdp(1.0, delta=1e-5)),
)


def one_run_bound(
    method: str, scores: np.ndarray, coins: np.ndarray, n_guesses: int, confidence: float
) -> EpsilonBound:
    """Bound of an attack that guesses `n_guesses` on either side."""
    guesses = one_run_guesses(scores, coins, n_guess_members=n_guesses, n_guess_non_members=n_guesses)
    if method == "one_run":
        return epsilon_one_run(guesses, delta=0.0, confidence=confidence)
    return epsilon_one_run_gdp(guesses, delta=1e-5, confidence=confidence)


def rates_bound(
    method: str, scores: np.ndarray, coins: np.ndarray, threshold: float, confidence: float
) -> EpsilonBound:
    """Bound of an attack with a fixed threshold."""
    counts = counts_above(scores, coins, threshold=threshold)
    if method == "rates":
        return epsilon_from_rates(counts, delta=0.0, confidence=confidence)
    return epsilon_from_rates_gdp(counts, delta=1e-5, confidence=confidence)


def epsilon_bounds(mechanism: Mechanism, *, method: str, choice: str, n_runs: int, seed: int) -> np.ndarray:
    """Lower bounds of epsilon from runs with a thousand coins each, (n_runs,).

    `choice`: `"fixed"` uses one candidate; `"best"` the largest bound over all, without paying for it;
    `"bonferroni"` and `"split_half"` pay.
    """
    rng = np.random.default_rng(seed)
    thresholds = tuple(np.linspace(-1.0, 2.0, 13))
    candidates = GUESSES if method.startswith("one_run") else thresholds
    fixed = 100 if method.startswith("one_run") else 0.5
    of_candidate = one_run_bound if method.startswith("one_run") else rates_bound
    values = []
    for run in range(n_runs):
        coins = rng.random(N_COINS) < 0.5
        scores = mechanism.scores(rng, coins)

        def bound(candidate, confidence, scores=scores, coins=coins):
            return of_candidate(method, scores, coins, candidate, confidence)

        def half(candidate, rows, confidence, scores=scores, coins=coins):
            # Half of the canaries carry half of the guesses.
            scaled = candidate // 2 if method.startswith("one_run") else candidate
            return of_candidate(method, scores[rows], coins[rows], scaled, confidence)

        if choice == "fixed":
            values.append(bound(fixed, 0.95).value)
        elif choice == "best":
            values.append(max(bound(candidate, 0.95).value for candidate in candidates))
        elif choice == "bonferroni":
            values.append(bonferroni_epsilon(candidates, bound).value)
        else:
            values.append(split_half_epsilon(candidates, half, n_rows=N_COINS, seed=run).value)
    return np.array(values)


# --- blind checks -----------------------------------------------------------------------------------------

_WORDS = np.array([f"w{i}" for i in range(400)])


def make_texts(rng: np.random.Generator, n: int, *, n_words: int = 30, marked: float = 0.0) -> list[str]:
    """Texts of `n_words` to `n_words` + 20 words with Zipf frequencies; a share holds one word of its own."""
    weights = 1.0 / np.arange(1, len(_WORDS) + 1)
    made = []
    for _ in range(n):
        words = list(rng.choice(_WORDS, size=rng.integers(n_words, n_words + 21), p=weights / weights.sum()))
        if rng.random() < marked:
            words[3] = "yesterday"
        made.append(" ".join(words))
    return made


def blind_flags(case: str, *, n: int, n_runs: int, seed: int) -> float:
    """Share of canary sets that the blind checks flag."""
    rng = np.random.default_rng(seed)
    n_flagged = 0
    for run in range(n_runs):
        losses = rng.normal(size=2 * n)
        if case == "random split":
            canaries = hold_out_canaries(make_texts(rng, 2 * n), n_members=n, n_non_members=n, seed=run)[1]
        else:
            changed = {"3 words longer": {"n_words": 33}, "a word in 40 %": {"marked": 0.4}}.get(case, {})
            canaries = CanarySet.from_lists(make_texts(rng, n, **changed), make_texts(rng, n))
            if case == "loss lower by half a deviation":
                losses -= 0.5 * canaries.is_member
        n_flagged += check_validity(canaries, reference_losses=losses).is_flagged
    return n_flagged / n_runs


_LIMIT_NAMES = {"auc": "AUC 0.6", "tpr_at_fpr": "TPR at 1 % FPR 0.05"}


# --- tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One table of the output."""

    name: str
    caption: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)


class Job(NamedTuple):
    """A simulation, and the part of a table that its result fills."""

    function: Callable[..., object]
    arguments: dict[str, object]


def _run(job: Job) -> object:
    return job.function(**job.arguments)


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


class Simulations:
    """Runs jobs on two processes, each with a seed of its own that depends on nothing else."""

    def __init__(self, *, seed: int, scale: float, n_processes: int) -> None:
        self._seed, self._scale, self._n_processes = seed, scale, n_processes

    def n_runs(self, usual: int) -> int:
        return max(20, round(usual * self._scale))

    def __call__(self, function: Callable[..., object], cases: Sequence[dict[str, object]]) -> list:
        jobs = [
            Job(function, {**case, "seed": zlib.crc32(f"{self._seed} {function.__name__} {case}".encode())})
            for case in cases
        ]
        if self._n_processes == 1:
            return [_run(job) for job in jobs]
        with ProcessPoolExecutor(self._n_processes) as pool:
            return list(pool.map(_run, jobs))


def coverage_table(simulate: Simulations) -> Table:
    n_runs = simulate.n_runs(500)
    keys = [
        *((kind, true, n) for kind in ("smooth", "tied") for true in (0.5, 0.6, 0.75, 0.9) for n in SIZES),
        *(("few", true, n) for true in (0.6, 0.75, 0.9) for n in (100, 1000)),
    ]
    cases = [
        {
            "source": population(kind, value=true),
            "n": n,
            "n_runs": n_runs,
            "n_bootstrapped": 0 if kind == "few" else simulate.n_runs(200),
        }
        for kind, true, n in keys
    ]
    columns = [
        "auc",
        "advantage",
        "tpr 0.01",
        "tpr 0.1",
        "members only 0.01",
        "bootstrap 0.01",
        "bootstrap 0.1",
    ]
    rows = [
        [kind, f"{true:g}", str(n), *(found[name].cell() if name in found else "" for name in columns)]
        for (kind, true, n), found in zip(keys, simulate(coverage, cases), strict=True)
    ]
    return Table(
        "coverage",
        "How often the truth lies below the lower end / above the upper end of a 95 % interval, in "
        "%; promised: "
        f"at most 2.5 each. {n_runs} draws (bootstrap: {simulate.n_runs(200)}), n members and n non-members.",
        [
            "scores",
            "true AUC",
            "n",
            "AUC (DeLong)",
            "advantage (DKW)",
            "TPR at 1 % (certificate)",
            "TPR at 10 % (certificate)",
            "wrong: Clopper-Pearson on members at 1 %",
            "bootstrap at 1 %",
            "bootstrap at 10 %",
        ],
        rows,
    )


def shuffled_table(simulate: Simulations) -> Table:
    n_runs = simulate.n_runs(1000)
    found = simulate(shuffled_misses, [{"n": n, "n_runs": n_runs} for n in SIZES])
    return Table(
        "shuffled",
        "Shuffled labels: how often 0.5 lies below / above the 95 % interval of the AUC, in %; "
        f"{n_runs} shuffles.",
        ["n", "below / above"],
        [[str(n), misses.cell()] for n, misses in zip(SIZES, found, strict=True)],
    )


def few_remembered_table() -> Table:
    rows = []
    for n in SIZES:
        for n_audits in (1, 10, 100):
            share = 0.05 / n_audits
            limits = [
                limit / 100
                for limit in range(51, 100)
                if _is_accepted(LeakageBudget(limit=limit / 100, rule="upper"), n=n, share=share)
            ]
            found = few_remembered_misses(n=n, n_audits=n_audits, limits=limits)
            worst = max(range(len(limits)), key=lambda i: found[i].above)
            rows.append(
                [
                    str(n),
                    str(n_audits),
                    f"{100 * share:.3g}",
                    f"{100 * max(misses.below for misses in found):.3f}",
                    f"{100 * found[worst].above:.3f}",
                    f"{limits[worst]:.2f}",
                ]
            )
    return Table(
        "few remembered",
        "Worst case of the AUC band: a share of the members scores 1, every other record 0.5. Exact "
        "chance, in %, "
        "that one audit's band misses a true AUC that equals the limit; the largest over all limits 0.51, "
        '0.52, ... 0.99 that rule "upper" accepts.',
        ["n", "audits", "share of one audit", "truth below the band", "truth above the band", "at AUC"],
        rows,
    )


def looks_table(simulate: Simulations) -> Table:
    n_runs = simulate.n_runs(500)
    limits = {"auc": 0.6, "tpr_at_fpr": 0.05}
    usual = {"n_planned": 10, "is_shared": True, "correlation": CORRELATION}
    unknown, unshared = {**usual, "n_planned": None}, {**usual, "is_shared": False}
    too_few, unrelated = {**usual, "n_planned": 5}, {**usual, "correlation": 0.0}
    keys = [
        *(("auc", "smooth", n, how) for n in SIZES for how in (usual, unknown)),
        *(("auc", "smooth", 300, how) for how in (too_few, unshared)),
        *(("auc", "tied", n, usual) for n in SIZES),
        *(("auc", "few", n, how) for n in (300, 1000) for how in (usual, unrelated)),
        *(("tpr_at_fpr", kind, 1000, usual) for kind in ("smooth", "tied")),
        # Without a plan the tenth audit gets so little that 1000 do not carry it.
        *(("tpr_at_fpr", kind, 1100, unknown) for kind in ("smooth", "tied")),
    ]
    cases = [
        {
            "source": population(kind, metric=metric, value=limits[metric]),
            "budgets": all_rules(limits[metric], metric=metric),
            "n": n,
            "n_runs": n_runs,
            **how,
        }
        for metric, kind, n, how in keys
    ]
    rows = []
    for (metric, kind, n, how), rates in zip(keys, simulate(run_rates, cases), strict=True):
        lower, lower_2, upper, upper_2, point, point_2 = rates
        budget = LeakageBudget(limit=limits[metric], metric=metric, rule="upper")
        refused = how["is_shared"] and is_refused(budget, n=n, n_planned=how["n_planned"])
        planned = "not known" if how["n_planned"] is None else str(how["n_planned"])
        rows.append(
            [
                _LIMIT_NAMES[metric],
                kind,
                f"{how['correlation']:g}",
                str(n),
                planned if how["is_shared"] else "wrong: 5 % at each",
                percent(lower.stopped),
                percent(lower_2.stopped),
                "refused" if refused else percent(upper.within_once),
                "refused" if refused else percent(1.0 - upper_2.stopped),
                percent(point.stopped),
                percent(point_2.stopped),
            ]
        )
    return Table(
        "looks",
        "Ten audits of a run whose true leakage is exactly the limit at each of them, share of "
        f"{n_runs} runs, in "
        '%. Rule "lower": stopped; its promise is at most 5. Rule "upper": found within budget at '
        "one audit or "
        "more; its promise, without patience, is at most 5. With patience 2: never stopped. Rule "
        '"point": stopped; it promises nothing.',
        [
            "limit = truth",
            "scores",
            "correlation",
            "n",
            "planned audits",
            "lower",
            "lower, patience 2",
            "upper: went on",
            "upper, patience 2: never stopped",
            "point",
            "point, patience 2",
        ],
        rows,
    )


def no_leakage_table(simulate: Simulations) -> Table:
    n_runs = simulate.n_runs(200)
    keys = [("auc", kind, n) for kind in ("smooth", "tied") for n in SIZES]
    keys += [("tpr_at_fpr", kind, 1000) for kind in ("smooth", "tied")]
    limits = {"auc": 0.6, "tpr_at_fpr": 0.05}
    cases = [
        {
            "source": population(kind, value=0.5),
            "budgets": all_rules(limits[metric], metric=metric),
            "n": n,
            "n_runs": n_runs,
        }
        for metric, kind, n in keys
    ]
    rows = []
    for (metric, kind, n), rates in zip(keys, simulate(run_rates, cases), strict=True):
        refused = is_refused(
            LeakageBudget(limit=limits[metric], metric=metric, rule="upper"), n=n, n_planned=10
        )
        lower, _, upper, upper_2, point, point_2 = rates
        rows.append(
            [
                _LIMIT_NAMES[metric],
                kind,
                str(n),
                percent(lower.stopped),
                "refused" if refused else percent(upper.stopped),
                "refused" if refused else percent(upper_2.stopped),
                percent(point.stopped),
                percent(point_2.stopped),
            ]
        )
    return Table(
        "no leakage",
        f"Ten planned audits of a run that leaks nothing, share of {n_runs} runs that is stopped, in %.",
        [
            "limit",
            "scores",
            "n",
            "lower",
            "upper",
            "upper, patience 2",
            "point",
            "point, patience 2",
        ],
        rows,
    )


def power_table(simulate: Simulations) -> Table:
    n_runs = simulate.n_runs(200)
    keys = [("auc", 0.6, true, n) for true in (0.65, 0.7) for n in SIZES]
    keys += [("tpr_at_fpr", 0.05, true, 1000) for true in (0.2, 0.3)]
    cases = [
        {
            "source": population("smooth", metric=metric, value=true),
            "budgets": [LeakageBudget(limit=limit, metric=metric, patience=p) for p in (0, 2)],
            "n": n,
            "n_runs": n_runs,
        }
        for metric, limit, true, n in keys
    ]
    rows = []
    for (metric, limit, true, n), rates in zip(keys, simulate(run_rates, cases), strict=True):
        budget = LeakageBudget(limit=limit, metric=metric)
        planned = decision_power(
            budget, expected=true, n_members=n, n_non_members=n, failure_probability=0.05 / N_AUDITS
        )
        rows.append(
            [
                _LIMIT_NAMES[metric],
                f"{true:g}",
                str(n),
                percent(rates[0].over),
                percent(planned),
                percent(rates[0].stopped),
                percent(rates[1].stopped),
            ]
        )
    return Table(
        "power",
        'Rule "lower", ten planned audits, true leakage above the limit at each: share of audits that '
        f"find it, and of {n_runs} runs that are stopped, in %. Smooth scores.",
        [
            "limit",
            "truth",
            "n",
            "one audit",
            "`decision_power`",
            "stopped within 10",
            "patience 2",
        ],
        rows,
    )


def permutation_table(simulate: Simulations) -> Table:
    n_runs = simulate.n_runs(400)
    keys = [(kind, true) for kind in ("smooth", "tied") for true in (0.5, 0.56, 0.6)]
    cases = [{"source": population(kind, value=true), "n": 100, "n_runs": n_runs} for kind, true in keys]
    joint = simulate(permutation_p_values, cases)
    single = simulate(per_audit_detection, cases)
    rows = [
        [
            kind,
            f"{true:g}",
            *(percent(np.mean(p <= level)) for level in (0.01, 0.05, 0.2, 0.5)),
            percent(alone),
        ]
        for (kind, true), p, alone in zip(keys, joint, single, strict=True)
    ]
    return Table(
        "permutation",
        "Joint permutation test over ten audits, 100 members and 100 non-members: share of p-values "
        "at or below "
        f"a level, in %, {n_runs} runs. Beside it one DeLong bound per audit at a tenth of 5 %.",
        ["scores", "true AUC", "p <= 0.01", "p <= 0.05", "p <= 0.2", "p <= 0.5", "per audit, 5 % shared"],
        rows,
    )


def rises_table(simulate: Simulations) -> Table:
    n_runs = simulate.n_runs(400)
    keys = [(kind, true, n) for kind in ("smooth", "tied") for true in (0.5, 0.75) for n in (100, 300)]
    cases = [{"source": population(kind, value=true), "n": n, "n_runs": n_runs} for kind, true, n in keys]
    return Table(
        "rises",
        "AUC the same at all ten audits: share of runs in which the paired interval says that it rose, in %; "
        f"promised: at most 2.5 for two audits named beforehand. {n_runs} runs.",
        ["scores", "true AUC", "n", "last against first", "wrong: highest against lowest"],
        [
            [kind, f"{true:g}", str(n), percent(fixed), percent(chosen)]
            for (kind, true, n), (fixed, chosen) in zip(keys, simulate(false_rises, cases), strict=True)
        ],
    )


def epsilon_table(simulate: Simulations) -> Table:
    n_runs = simulate.n_runs(400)
    nothing, response, gaussian = MECHANISMS
    keys = [
        (mechanism, method, choice)
        for method in ("one_run", "rates", "one_run_gdp", "rates_gdp")
        # The Gaussian mechanism has no finite epsilon at delta 0, which the other two bounds are made for.
        for mechanism in (nothing, gaussian if method.endswith("gdp") else response)
        for choice in ("fixed", "best", "bonferroni", "split_half")
    ]
    keys.append((response, "one_run_gdp", "fixed"))
    cases = [
        {"mechanism": mechanism, "method": method, "choice": choice, "n_runs": n_runs}
        for mechanism, method, choice in keys
    ]
    rows = []
    for (mechanism, method, choice), values in zip(keys, simulate(epsilon_bounds, cases), strict=True):
        is_wrong = choice == "best" or (method == "one_run_gdp" and mechanism is response)
        rows.append(
            [
                {"one_run": "one run", "one_run_gdp": "one run, GDP", "rates_gdp": "rates, GDP"}.get(
                    method, method
                ),
                mechanism.name,
                f"{mechanism.epsilon:.2f}",
                ("wrong: " if is_wrong else "") + choice.replace("_", "-"),
                percent(np.mean(values > mechanism.epsilon)),
                f"{np.median(values):.2f}",
            ]
        )
    return Table(
        "epsilon",
        f"Lower bounds of epsilon at 95 %, {N_COINS} coins, {n_runs} runs: share above the true "
        "epsilon, in % "
        "(promised: at most 5), and median.",
        ["bound", "mechanism", "true epsilon", "attack chosen", "above the truth", "median bound"],
        rows,
    )


def blind_table(simulate: Simulations) -> Table:
    keys = ["random split", "3 words longer", "a word in 40 %", "loss lower by half a deviation"]
    cases = [
        {"case": case, "n": n, "n_runs": simulate.n_runs(200 if case == "random split" else 60)}
        for case in keys
        for n in (50, 150)
    ]
    found = simulate(blind_flags, cases)
    return Table(
        "blind",
        "Blind checks: share of canary sets that are flagged, in %; promised for random splits: "
        "about 5 at most. "
        f"{simulate.n_runs(200)} random splits, {simulate.n_runs(60)} sets of each other kind.",
        ["members differ by", "n", "flagged"],
        [
            [
                "nothing (random split)" if c["case"] == "random split" else str(c["case"]),
                str(c["n"]),
                percent(rate),
            ]
            for c, rate in zip(cases, found, strict=True)
        ],
    )


def counts_table() -> Table:
    rows = []
    for fpr in (0.1, 0.01, 0.001):
        needed = [
            canaries_needed(LeakageBudget(metric="tpr_at_fpr", limit=0.5, fpr=fpr), n_audits=n_audits)
            for n_audits in (1, 10, 100)
        ]
        rows.append(
            [
                f"{100 * fpr:g} %",
                str(n_non_members_needed(fpr=fpr, failure_probability=0.05)),
                *(str(plan.n_non_members_to_resolve) for plan in needed),
            ]
        )
    return Table(
        "counts",
        "Fewest non-members for a true-positive rate at a certified false-positive rate, 95 %.",
        ["FPR", "once, threshold alone, one-sided", "decision, 1 audit", "10 audits", "100 audits"],
        rows,
    )


def realized_table() -> Table:
    rows = []
    for n, n_allowed in ((100, 1), (300, 3), (1000, 10), (10_000, 100)):
        interval = realized_fpr_range(n, n_allowed=n_allowed)
        above = float(stats.beta.sf(0.01, n_allowed + 1, n - n_allowed))
        rows.append(
            [
                str(n),
                str(n_allowed),
                f"{100 * interval.lower:.2f} to {100 * interval.upper:.2f}",
                percent(above),
            ]
        )
    return Table(
        "realized",
        "True false-positive rate of a threshold that was set on n non-members for an empirical rate of 1 %.",
        [
            "n",
            "false positives among them",
            "true rate in 95 % of draws, %",
            "chance that it is above 1 %, %",
        ],
        rows,
    )


def text_of_run(content: dict) -> str:
    """How the tables were made, for the reader."""
    about = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return f"`{content['command']}`: {content['machine']}, {about}, seed {content['seed']}"


def with_tables(document: str, content: dict) -> str:
    """The document with the text between the marks of each table, and of the run, replaced.

    Raises:
        ValueError: if a mark is missing.
    """
    parts = {"run": text_of_run(content)}
    for table in content["tables"]:
        parts[table["name"]] = f"{table['caption']}\n\n{Table(**table).markdown()}"
    for name, text in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = document.split(start)
        _, after = rest.split(end)
        document = f"{before}{start}\n\n{text}\n\n{end}{after}"
    return document


def make_again(table: Table) -> None:
    """Write one table into the results and the page, where the same seed and scale made the others."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    content["tables"] = [
        asdict(table) if before["name"] == table.name else before for before in content["tables"]
    ]
    print(f"{table.caption}\n\n{table.markdown()}")
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), content), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a twentieth of the runs; writes no file")
    parser.add_argument("--scale", type=float, default=1.0, help="number of runs, relative to the usual one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2))
    parser.add_argument("--only", help="name of one table to make again; the others stay as they are written")
    arguments = parser.parse_args()
    started = time.perf_counter()
    scale = 0.05 if arguments.quick else arguments.scale
    simulate = Simulations(seed=arguments.seed, scale=scale, n_processes=arguments.processes)
    exact = (counts_table, realized_table, few_remembered_table)
    simulated = (
        looks_table,
        coverage_table,
        shuffled_table,
        no_leakage_table,
        power_table,
        permutation_table,
        rises_table,
        epsilon_table,
        blind_table,
    )
    makers = {
        maker.__name__.removesuffix("_table"): maker
        for maker in (
            *exact,
            *(functools.wraps(maker)(functools.partial(maker, simulate)) for maker in simulated),
        )
    }
    if arguments.only is not None:
        make_again(makers[arguments.only]())
        return
    tables = []
    for make in makers.values():
        table = make()
        tables.append(table)
        print(f"\n{table.caption}\n\n{table.markdown()}", flush=True)
    content = {
        "command": f"python benchmarks/statistics_coverage.py --scale {scale:g} --seed {arguments.seed}",
        "seed": arguments.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "scipy", "scikit-learn")},
        },
        "seconds": round(time.perf_counter() - started),
        "tables": [asdict(table) for table in tables],
    }
    print(f"\n{text_of_run(content)}; {content['seconds']} s")
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), content), encoding="utf-8")


if __name__ == "__main__":
    main()
