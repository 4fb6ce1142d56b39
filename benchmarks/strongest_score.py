"""What it costs, and what it finds, to judge several scores together instead of one.

    python benchmarks/strongest_score.py                   # a quarter of an hour on one idle core
    python benchmarks/strongest_score.py --runs 200        # rough rates, no file is written

No model is trained: each score of each record is a normal value, members shifted to a known AUC; scores of
one record resemble each other, and themselves from audit to audit. The band's ends are those of
`delong_interval`, computed for all runs at once by the formulas of `auc_interval.py` and compared with the
package on the first runs. Prints Markdown tables, and writes them with seed, versions and machine to
`benchmarks/results/` and, between their marks, to `docs/statistics.md`.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from auc_interval import Draws, _as_draws, markdown, misses, with_tables
from scipy import stats

from ezmia_callbacks.functional import (
    EndShares,
    Interval,
    JudgedFigure,
    LeakageBudget,
    alpha_for_audit,
    auc,
    canaries_needed,
    decide_by_strongest,
    delong_interval,
    end_shares,
)

RESULTS = Path(__file__).parent / "results" / "strongest_score.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "statistics.md"
LIMIT = 0.6
CONFIDENCE = 0.95
N_SCORES = 4
# Of a record's scores from audit to audit.
PERSISTENCE = 0.9
# Runs whose decisions the package makes as well.
N_COMPARED = 5
TRUTHS = (0.65, 0.7, 0.8)
LOWER = LeakageBudget(limit=LIMIT, confidence=CONFIDENCE)
UPPER = LeakageBudget(limit=LIMIT, confidence=CONFIDENCE, rule="upper")


class Case(NamedTuple):
    """A population of runs: the true AUC of each score, alike at every audit."""

    n_members: int
    n_non_members: int
    n_audits: int
    correlation: float
    true_aucs: tuple[float, ...]


def scores_of_runs(case: Case, rng: np.random.Generator, n_runs: int):
    """For each audit, scores (n_scores, n_runs, n_records), members first."""
    shape = (n_runs, case.n_members + case.n_non_members)
    shifts = math.sqrt(2.0) * stats.norm.ppf(case.true_aucs)
    is_member = np.arange(shape[1]) < case.n_members

    def values(count: int) -> np.ndarray:
        return rng.normal(size=(count, *shape))

    common, own = values(1), values(len(case.true_aucs))
    for _ in range(case.n_audits):
        mixed = math.sqrt(case.correlation) * common + math.sqrt(1.0 - case.correlation) * own
        yield mixed + shifts[:, None, None] * is_member
        fresh = math.sqrt(1.0 - PERSISTENCE**2)
        common = PERSISTENCE * common + fresh * values(1)
        own = PERSISTENCE * own + fresh * values(len(case.true_aucs))


def draws_of(scores: np.ndarray, n_members: int) -> Draws:
    """What the interval reads of each run, (n_runs, n_records) scores without ties."""
    n1, n0 = n_members, scores.shape[1] - n_members
    is_member = (np.argsort(scores, axis=1) < n1).astype(np.int64)
    n_members_so_far = np.cumsum(is_member, axis=1)
    below = 2 * (np.arange(n1 + n0) - n_members_so_far + 1) * is_member
    above = 2 * n_members_so_far * (1 - is_member)
    moments = [below.sum(axis=1), (below**2).sum(axis=1), above.sum(axis=1), (above**2).sum(axis=1)]
    return _as_draws(moments, n1, n0)


def is_over(draws: Draws, case: Case, share: float) -> np.ndarray:
    """Whether a lower end with this share of the error exceeds the limit, in either direction, per run."""
    sizes = case.n_members, case.n_non_members
    above, _ = misses(draws, *sizes, LIMIT, share)["now"]
    _, below = misses(draws, *sizes, 1.0 - LIMIT, share)["now"]
    return above | below


def is_within(draws: Draws, case: Case, share: float) -> np.ndarray:
    """Whether both upper ends with this share of the error keep to the limit, per run."""
    sizes = case.n_members, case.n_non_members
    _, below = misses(draws, *sizes, LIMIT, share)["now"]
    above, _ = misses(draws, *sizes, 1.0 - LIMIT, share)["now"]
    return below & above


def run_case(case: Case, *, n_runs: int, seed: int) -> dict[str, list[float]]:
    """Shares of the runs: at the first audit, and at any of them.

    Returns:
        `"one"`: over budget by the first score alone; `"together"`: by one of all, each with its share;
        `"undivided"`: by one of all, each with the whole share; `"within"`: within budget by all, rule
        `"upper"`.
    """
    rng = np.random.default_rng(zlib.crc32(f"{seed} {case}".encode()))
    alpha = alpha_for_audit(1, n_planned=case.n_audits, failure_probability=1.0 - CONFIDENCE)
    n_scores = len(case.true_aucs)
    divided = end_shares(LOWER, failure_probability=alpha, n_scores=n_scores).lower
    whole = end_shares(LOWER, failure_probability=alpha).lower
    upper = end_shares(UPPER, failure_probability=alpha, n_scores=n_scores).upper
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("one", "together", "undivided", "within")}
    for scores in scores_of_runs(case, rng, n_runs):
        draws = [draws_of(each, case.n_members) for each in scores]
        found["one"].append(is_over(draws[0], case, whole))
        found["together"].append(np.any([is_over(each, case, divided) for each in draws], axis=0))
        found["undivided"].append(np.any([is_over(each, case, whole) for each in draws], axis=0))
        found["within"].append(np.all([is_within(each, case, upper) for each in draws], axis=0))
        compare_with_package(scores, case, alpha, found)
    return {
        name: [float(np.mean(rows[0])), float(np.mean(np.any(rows, axis=0)))] for name, rows in found.items()
    }


def auc_and_band(scores: np.ndarray, is_member: np.ndarray, shares: EndShares) -> tuple[float, Interval]:
    """The AUC of one score of one run, and its band by the package's interval."""
    strict, loose = (
        delong_interval(scores, is_member, confidence=1.0 - 2.0 * share)
        for share in (shares.lower, shares.upper)
    )
    return auc(scores, is_member), Interval(strict.lower, loose.upper, shares.confidence, "delong")


def compare_with_package(
    scores: np.ndarray, case: Case, alpha: float, found: dict[str, list[np.ndarray]]
) -> None:
    """Hold the decisions on the first runs against those of the package.

    Raises:
        RuntimeError: if one differs.
    """
    is_member = np.arange(scores.shape[2]) < case.n_members
    for budget, name, is_expected in ((LOWER, "together", False), (UPPER, "within", True)):
        shares = end_shares(budget, failure_probability=alpha, n_scores=len(scores))
        for run in range(min(N_COMPARED, scores.shape[1])):
            figures = {
                f"score {i}": JudgedFigure(
                    *auc_and_band(scores[i, run], is_member, shares),
                    *auc_and_band(-scores[i, run], is_member, shares),
                )
                for i in range(len(scores))
            }
            decision = decide_by_strongest(budget, figures)
            if (decision.is_within_budget is is_expected) != bool(found[name][-1][run]):
                raise RuntimeError(f"{case}: the package says {decision.message}.")


# --- tables -----------------------------------------------------------------------------------------------

AT_LIMIT = {
    "all at the limit": (LIMIT,) * N_SCORES,
    "one at the limit, the others at chance": (LIMIT, 0.5, 0.5, 0.5),
}
SIZES = ((100, 100), (300, 300), (30, 1000))


def false_stops(n_runs: int, seed: int) -> list[dict]:
    rows = []
    for n_members, n_non_members in SIZES:
        for n_audits in (3, 10):
            for correlation in (0.0, 0.9):
                for name, true_aucs in AT_LIMIT.items():
                    case = Case(n_members, n_non_members, n_audits, correlation, true_aucs)
                    rates = run_case(case, n_runs=n_runs, seed=seed)
                    rows.append({**case._asdict(), "case": name, "rates": rates})
                    print(rows[-1], flush=True)
    return rows


def power(n_runs: int, seed: int) -> list[dict]:
    rows = []
    for n_audits in (3, 10):
        for truth in TRUTHS:
            needed = {
                n_scores: canaries_needed(
                    LOWER, n_audits=n_audits, expected=truth, n_scores=n_scores
                ).n_members
                for n_scores in (1, N_SCORES, N_SCORES + 1)
            }
            row = {"n_audits": n_audits, "truth": truth, "needed": needed, "found": {}}
            for name, n, true_aucs, key in (
                ("one score", needed[1], (truth,) * N_SCORES, "one"),
                ("four, one has it", needed[N_SCORES], (truth, 0.5, 0.5, 0.5), "together"),
                ("four, all have it", needed[N_SCORES], (truth,) * N_SCORES, "together"),
                ("four, all have it, at the number for one", needed[1], (truth,) * N_SCORES, "together"),
            ):
                # The first of so many audits has the share of all.
                case = Case(n, n, n_audits, 0.9, true_aucs)
                row["found"][name] = run_case(case, n_runs=n_runs, seed=seed)[key][0]
            rows.append(row)
            print(row, flush=True)
    return rows


def gain(n_runs: int, seed: int) -> list[dict]:
    rows = []
    for other in (0.65, 0.7, 0.8, 0.95):
        for n in (100, 300):
            case = Case(n, n, 10, 0.5, (0.58, other, other, other))
            rates = run_case(case, n_runs=n_runs, seed=seed)
            rows.append({**case._asdict(), "other": other, "rates": rates})
            print(rows[-1], flush=True)
    return rows


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def tables(stops: list[dict], powers: list[dict], gains: list[dict], n_runs: int) -> dict[str, str]:
    return {
        "strongest stops": f"Runs whose true leakage is at the limit of AUC {LIMIT} by no more than the "
        f'stated scores, at every audit; share of {n_runs} runs, in %. Rule "lower", stopped at any audit; '
        'promised: at most 5. Rule "upper", found within budget at any audit; promised: at most 5. Scores of '
        "a record "
        f"correlate as stated with each other, and {PERSISTENCE} from audit to audit.\n\n"
        + markdown(
            [
                "members + non-members",
                "audits",
                "correlation",
                "scores",
                "lower: one score alone",
                "lower: four together",
                "wrong: four, share not divided",
                "upper: four together",
            ],
            [
                [
                    f"{row['n_members']} + {row['n_non_members']}",
                    str(row["n_audits"]),
                    f"{row['correlation']:g}",
                    row["case"],
                    percent(row["rates"]["one"][1]),
                    percent(row["rates"]["together"][1]),
                    percent(row["rates"]["undivided"][1]),
                    percent(row["rates"]["within"][1]),
                ]
                for row in stops
            ],
        ),
        "strongest power": f"Members (and as many non-members) that a budget of AUC {LIMIT} needs so that "
        "one audit finds a run over budget with 80 % probability, by `canaries_needed`; and the share of "
        f"runs in which it did, in %, of {n_runs} each, scores that correlate by 0.9.\n\n"
        + markdown(
            [
                "audits",
                "true AUC",
                "one score",
                "four",
                "five",
                "four / one",
                "found: one score",
                "found: four, one has it",
                "found: four, all have it",
                "found: four, all have it, with the number for one",
            ],
            [
                [
                    str(row["n_audits"]),
                    f"{row['truth']:.2f}",
                    *(str(n) for n in row["needed"].values()),
                    f"{row['needed'][N_SCORES] / row['needed'][1]:.2f}",
                    *(percent(rate) for rate in row["found"].values()),
                ]
                for row in powers
            ],
        ),
        "strongest gain": f"EZ has a true AUC of 0.58, within a limit of {LIMIT}, and the other scores "
        f"see more: share of {n_runs} runs that are stopped at any of ten audits, in %.\n\n"
        + markdown(
            ["true AUC of the others", "members = non-members", "EZ alone", "strongest of four"],
            [
                [
                    f"{row['other']:.2f}",
                    str(row["n_members"]),
                    percent(row["rates"]["one"][1]),
                    percent(row["rates"]["together"][1]),
                ]
                for row in gains
            ],
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    options = {"n_runs": arguments.runs, "seed": arguments.seed}
    found = {"stops": false_stops(**options), "powers": power(**options), "gains": gain(**options)}
    texts = tables(**found, n_runs=arguments.runs)
    for text in texts.values():
        print(f"\n{text}")
    if arguments.runs < 1_000:
        return
    content = {
        "command": f"python benchmarks/strongest_score.py --runs {arguments.runs} --seed {arguments.seed}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "scipy")},
        },
        "seconds": round(time.perf_counter() - started),
        **found,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), texts), encoding="utf-8")


if __name__ == "__main__":
    main()
