"""How often intervals of the AUC miss, where classes are small or unequal, and what the safe one costs.

    python benchmarks/auc_interval.py --processes 2        # a quarter of an hour on two idle cores
    python benchmarks/auc_interval.py --repetitions 500    # minutes; rates are rough, no file is written

No model is trained: scores are drawn from populations with a known AUC. A cell is a size of both classes, a
shape, and a true AUC; in each, both ends of several intervals are held against the truth. Negating all
scores and swapping the classes changes nothing, so that unequal sizes both ways stand for shapes both ways.
The grid is computed by formulas written anew here, for all draws at once, and compared with `delong_interval`
on the first draws of each cell. Prints Markdown tables, and writes them with seed, versions and machine to
`benchmarks/results/` and, between their marks, to `docs/statistics.md`.
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
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from ezmia_callbacks.functional import delong_interval

RESULTS = Path(__file__).parent / "results" / "auc_interval.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "statistics.md"
SIZES = (10, 30, 100, 300, 1000)
SHAPES = ("normal", "skewed", "unequal variance", "tied", "three values", "few", "part")
# Beyond what is promised, to say where the interval breaks.
HARD_SHAPES = ("ten times the spread", "some far below")
TRUE_AUCS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.995)
# One end of a 95 % interval, and of the interval that one of ten audits leaves.
SHARES = (0.025, 0.0025)
# Scores are moved by this, so that all are positive and their bits sort as they do.
_OFFSET = 128.0
_FAR_AWAY = 64.0
_CUTS = {
    "tied": stats.norm.ppf([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995]),
    "three values": np.array([0.0, 1.5]),
}


class Cell(NamedTuple):
    """A place of the grid."""

    n_members: int
    n_non_members: int
    shape: str
    true_auc: float


class Draws(NamedTuple):
    """What an interval reads of each draw: the AUC, and what each class adds to its variance, (n_draws,)."""

    auc: np.ndarray
    member_part: np.ndarray
    non_member_part: np.ndarray


# --- populations ------------------------------------------------------------------------------------------


def level_probabilities(shape: str, true_auc: float) -> tuple[np.ndarray, np.ndarray]:
    """Chances of each value, lowest first, of members and of non-members, for shapes of few values.

    `"tied"`: two unit normals rounded to 12 levels, a fifth of the non-members at the lowest;
    `"three values"`: to three; `"few"`: a share of the members scores high, and all other records the same.
    """
    if shape == "few":
        share = 2.0 * true_auc - 1.0
        return np.array([1.0 - share, share]), np.array([1.0, 0.0])

    def chances(shift: float) -> np.ndarray:
        return np.diff(np.concatenate([[0.0], stats.norm.cdf(_CUTS[shape] - shift), [1.0]]))

    non_members = chances(0.0)

    def auc_at(shift: float) -> float:
        below = np.cumsum(non_members) - non_members / 2.0
        return float(chances(shift) @ below)

    return chances(optimize.brentq(lambda shift: auc_at(shift) - true_auc, -1e-6, 12.0)), non_members


def continuous_scores(rng: np.random.Generator, cell: Cell, n_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of members and non-members, (n_draws, n) each, all of them positive.

    `"normal"`: two unit normals; `"skewed"`: two exponentials of different means; `"unequal variance"`:
    normals whose standard deviations are 3 and 1; `"part"`: a share of the members scores far above, the
    other members as non-members do. Of the hard ones, `"ten times the spread"`: standard deviations 10 and 1;
    `"some far below"`: members are three standard deviations above, but for a share below all others.
    """
    sizes = (n_draws, cell.n_members), (n_draws, cell.n_non_members)
    if cell.shape == "skewed":
        mean = cell.true_auc / (1.0 - cell.true_auc)
        return mean * rng.exponential(size=sizes[0]), rng.exponential(size=sizes[1])
    members, non_members = (_OFFSET + rng.normal(size=size) for size in sizes)
    if cell.shape == "part":
        members += _FAR_AWAY * (rng.random(sizes[0]) < 2.0 * cell.true_auc - 1.0)
        return members, non_members
    if cell.shape == "some far below":
        share = 1.0 - cell.true_auc / stats.norm.cdf(3.0 / math.sqrt(2.0))
        return members + 3.0 - _FAR_AWAY * (rng.random(sizes[0]) < share), non_members
    deviation = {"unequal variance": 3.0, "ten times the spread": 10.0}.get(cell.shape, 1.0)
    members = _OFFSET + deviation * (members - _OFFSET)
    return members + math.hypot(deviation, 1.0) * stats.norm.ppf(cell.true_auc), non_members


def draw(cell: Cell, rng: np.random.Generator, n_draws: int) -> tuple[Draws, np.ndarray]:
    """Draws of a cell, and the scores of the first few, members first."""
    n1, n0 = cell.n_members, cell.n_non_members
    if cell.shape in (*_CUTS, "few"):
        chances = level_probabilities(cell.shape, cell.true_auc)
        counts1, counts0 = (
            rng.multinomial(n, chance, size=n_draws) for n, chance in zip((n1, n0), chances, strict=True)
        )
        # Twice the number of the other class that lies below each level, ties one half.
        below0 = 2 * np.cumsum(counts0, axis=1) - counts0
        below1 = 2 * np.cumsum(counts1, axis=1) - counts1
        moments = [
            (counts1 * below0).sum(axis=1),
            (counts1 * below0**2).sum(axis=1),
            (counts0 * below1).sum(axis=1),
            (counts0 * below1**2).sum(axis=1),
        ]
        levels = np.arange(len(chances[0]), dtype=float)
        first = np.array(
            [
                np.concatenate([np.repeat(levels, row1), np.repeat(levels, row0)])
                for row1, row0 in zip(counts1[:N_COMPARED], counts0[:N_COMPARED], strict=True)
            ]
        )
        return _as_draws(moments, n1, n0), first
    members, non_members = continuous_scores(rng, cell, n_draws)
    scores = np.concatenate([members, non_members], axis=1)
    first = scores[:N_COMPARED].copy()
    # The lowest bit of a score becomes its class, so that one sort of whole numbers does for both.
    keys = scores.view(np.int64)
    keys &= ~1
    keys[:, :n1] |= 1
    keys.sort(axis=1)
    is_member = (keys & 1).astype(np.int64)
    n_members_so_far = np.cumsum(is_member, axis=1)
    below = 2 * (np.arange(n1 + n0) - n_members_so_far + 1) * is_member
    above = 2 * n_members_so_far * (1 - is_member)
    moments = [below.sum(axis=1), (below**2).sum(axis=1), above.sum(axis=1), (above**2).sum(axis=1)]
    return _as_draws(moments, n1, n0), first


def _as_draws(moments: list[np.ndarray], n1: int, n0: int) -> Draws:
    """From sums, and sums of squares, of twice the counts of the other class below: exact whole numbers."""
    sum1, squares1, sum0, squares0 = moments
    return Draws(
        sum1 / (2.0 * n1 * n0),
        (n1 * squares1 - sum1**2) / (n1 * (n1 - 1.0)) / (2.0 * n0) ** 2 / n1,
        (n0 * squares0 - sum0**2) / (n0 * (n0 - 1.0)) / (2.0 * n1) ** 2 / n0,
    )


# --- intervals --------------------------------------------------------------------------------------------


def hanley_mcneil_variance(auc: float, n1: int, n0: int) -> float:
    """The larger of both classes' forms."""
    spreads = sorted([auc / (2.0 - auc) - auc**2, 2.0 * auc**2 / (1.0 + auc) - auc**2])
    smaller, larger = sorted([n1, n0])
    return (auc * (1.0 - auc) + (larger - 1) * spreads[1] + (smaller - 1) * spreads[0]) / (n1 * n0)


def normal_equal_variance(auc: float, n1: int, n0: int) -> float:
    """Variance of the AUC of two unit normals."""
    quantile = stats.norm.ppf(auc)
    both = stats.multivariate_normal.cdf([quantile, quantile], cov=[[1.0, 0.5], [0.5, 1.0]])
    return (auc * (1.0 - auc) + (n1 + n0 - 2) * (float(both) - auc**2)) / (n1 * n0)


def _is_beyond(statistic: np.ndarray, quantile: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return statistic > quantile, statistic < -quantile


def _binomial(
    auc: np.ndarray, pairs: np.ndarray, truth: float, share: float, *, is_mid_p: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    at_least = special.betainc(pairs * auc, pairs * (1.0 - auc) + 1.0, truth)
    above = special.betainc(pairs * auc + 1.0, pairs * (1.0 - auc), truth)
    if is_mid_p:
        at_least = above = (at_least + above) / 2.0
    return at_least < share, above > 1.0 - share


def misses(
    draws: Draws, n1: int, n0: int, truth: float, share: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each interval, whether its lower end exceeds the truth, and its upper end falls short, per draw.

    All of them take the exact bounds where the variance is 0.
    """
    smaller = min(n1, n0)
    variance = draws.member_part + draws.non_member_part
    is_one, is_zero = draws.auc == 1.0, draws.auc == 0.0
    is_tied = (variance == 0.0) & ~is_one & ~is_zero
    is_usual = ~(is_one | is_zero | is_tied)
    exact, radius = share ** (1.0 / smaller), (1.0 - (2.0 * share) ** (1.0 / smaller)) / 2.0
    exact_below = (is_one & (exact > truth)) | (is_tied & (0.5 - radius > truth))
    exact_above = (is_zero & (1.0 - exact < truth)) | (is_tied & (0.5 + radius < truth))

    auc = np.where(is_usual, draws.auc, 0.5)
    part1, part0 = (np.where(is_usual, part, 1.0) for part in (draws.member_part, draws.non_member_part))
    variance = part1 + part0
    degrees = variance**2 / (part1**2 / (n1 - 1) + part0**2 / (n0 - 1))
    z, t = stats.norm.isf(share), stats.t.isf(share, degrees)
    on_logit = (special.logit(auc) - special.logit(truth)) * auc * (1.0 - auc) / np.sqrt(variance)
    on_probit = (
        (special.ndtri(auc) - special.ndtri(truth)) * stats.norm.pdf(special.ndtri(auc)) / np.sqrt(variance)
    )
    pairs = auc * (1.0 - auc) / variance
    bound = hanley_mcneil_variance(truth, n1, n0)
    allowed = truth * (1.0 - truth) / bound
    shrinkage = (z / t) ** 2
    score = (auc - truth) / math.sqrt(bound)
    spread = truth * (1.0 - truth)
    found = {
        "before": _is_beyond(on_logit, z),
        "logit, t": _is_beyond(on_logit, t),
        "probit, t": _is_beyond(on_probit, t),
        "Wilson, t": _is_beyond((auc - truth) / np.sqrt(spread / pairs), t),
        "Hanley-McNeil score": _is_beyond(score, z),
        "Wilson or Hanley-McNeil, t": _is_beyond(
            (auc - truth) / np.sqrt(np.maximum(spread / pairs, bound)), t
        ),
        "Wilson or normal, t": _is_beyond(
            (auc - truth) / np.sqrt(np.maximum(spread / pairs, _normal_bound(truth, n1, n0))), t
        ),
        "Korn-Graubard, t": _binomial(auc, shrinkage * pairs, truth, share),
        "now without t": _binomial(auc, np.minimum(pairs, allowed), truth, share),
        "now with mid-p": _binomial(auc, shrinkage * np.minimum(pairs, allowed), truth, share, is_mid_p=True),
        "now": _binomial(auc, shrinkage * np.minimum(pairs, allowed), truth, share),
    }
    return {
        name: (exact_below | (is_usual & below), exact_above | (is_usual & above))
        for name, (below, above) in found.items()
    }


_normal_bound = functools.cache(normal_equal_variance)


def before(draws: Draws, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of DeLong's interval on the logit scale, which `delong_interval` was until it was replaced."""
    deviation = np.sqrt(draws.member_part + draws.non_member_part)
    radius = stats.norm.isf(share) * deviation / (draws.auc * (1.0 - draws.auc))
    center = special.logit(draws.auc)
    return special.expit(center - radius), special.expit(center + radius)


# --- the grid ---------------------------------------------------------------------------------------------

# Draws of each cell whose interval is computed by the package as well.
N_COMPARED = 20
_SCORES_AT_ONCE = 4_000_000


def run_cell(cell: Cell, *, n_draws: int, seed: int) -> list[dict[str, object]]:
    """Rates of a cell at each share: by interval, [lower end above the truth, upper end below it]; widths.

    Raises:
        RuntimeError: if the package's interval and the formulas here disagree about a draw.
    """
    rng = np.random.default_rng(zlib.crc32(f"{seed} {cell}".encode()))
    n1, n0 = cell.n_members, cell.n_non_members
    at_once = max(N_COMPARED, _SCORES_AT_ONCE // (n1 + n0))
    parts = [draw(cell, rng, min(at_once, n_draws - start)) for start in range(0, n_draws, at_once)]
    draws = Draws(*(np.concatenate(columns) for columns in zip(*(part for part, _ in parts), strict=True)))
    rows = []
    for share in SHARES:
        found = misses(draws, n1, n0, cell.true_auc, share)
        ratio = compared_widths(draws, parts[0][1], found["now"], cell, share)
        rates = {name: [round(float(np.mean(side)), 6) for side in sides] for name, sides in found.items()}
        rows.append({**cell._asdict(), "share": share, "misses": rates, "width_ratio": ratio})
    return rows


def compared_widths(
    draws: Draws, first: np.ndarray, now: tuple[np.ndarray, np.ndarray], cell: Cell, share: float
) -> float | None:
    """Median width of the package's interval over that of the one before, in the first draws of a cell."""
    is_member = np.arange(first.shape[1]) < cell.n_members
    ratios = []
    few = Draws(*(column[: len(first)] for column in draws))
    for i, scores in enumerate(first):
        interval = delong_interval(scores, is_member, confidence=1.0 - 2.0 * share)
        said = interval.lower > cell.true_auc + 1e-9, interval.upper < cell.true_auc - 1e-9
        is_near = min(abs(end - cell.true_auc) for end in (interval.lower, interval.upper)) < 1e-6
        if said != (bool(now[0][i]), bool(now[1][i])) and not is_near:
            raise RuntimeError(f"{cell}, share {share}: the package says {interval}, the grid {now[0][i]}.")
        if interval.method == "delong":
            lower, upper = before(Draws(*(column[i] for column in few)), share)
            ratios.append((interval.upper - interval.lower) / (upper - lower))
    return round(float(np.median(ratios)), 4) if ratios else None


def all_cells() -> Iterable[Cell]:
    # Large sizes first, so that both processes end together.
    for n1, n0 in sorted(((a, b) for a in SIZES for b in SIZES), key=sum, reverse=True):
        for shape in (*SHAPES, *HARD_SHAPES):
            for true_auc in TRUE_AUCS:
                # Three values, and a shift of three, reach only so far.
                is_beyond = shape in ("three values", "some far below") and true_auc > 0.95
                # Where nobody is remembered all records are alike.
                is_alike = shape in ("few", "part") and true_auc == 0.5
                is_repeated = shape == "normal" and n1 > n0
                if not (is_beyond or is_alike or is_repeated):
                    yield Cell(n1, n0, shape, true_auc)


def cell_rates(n1: int, n0: int, shape: str, true_auc: float, *, n_draws: int, seed: int) -> list[dict]:
    """`run_cell` from plain values, for tests."""
    return run_cell(Cell(n1, n0, shape, true_auc), n_draws=n_draws, seed=seed)


# --- tables -----------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def worst(rows: list[dict], name: str, end: int) -> dict:
    return max(rows, key=lambda row: row["misses"][name][end])


def tables(rows: list[dict], n_draws: int) -> dict[str, str]:
    """The tables by name: the worst cell for each size, for each interval, and where the interval breaks."""
    promised = [row for row in rows if row["shape"] in SHAPES]
    hard = [row for row in rows if row["shape"] in HARD_SHAPES]

    def pair(cells: list[dict], name: str) -> str:
        return " / ".join(f"{100 * worst(cells, name, end)['misses'][name][end]:.2f}" for end in (0, 1))

    def columns(cells: list[dict]) -> list[str]:
        return [
            pair([row for row in cells if row["share"] == share], name)
            for share in SHARES
            for name in ("before", "now")
        ]

    def width(cells: list[dict], true_aucs: tuple[float, ...]) -> str:
        ratios = [
            row["width_ratio"]
            for row in cells
            if row["width_ratio"] and row["true_auc"] in true_aucs and row["shape"] not in _CUTS | {"few": 0}
        ]
        return f"{np.median(ratios):.2f}"

    header = ["2.5 %: before", "2.5 %: now", "0.25 %: before", "0.25 %: now"]
    sizes = [(low, high) for i, low in enumerate(SIZES) for high in SIZES[i:]]
    by_size = []
    for size in sizes:
        cells = [row for row in promised if sorted((row["n_members"], row["n_non_members"])) == list(size)]
        widths = [width(cells, chosen) for chosen in (TRUE_AUCS[:4], TRUE_AUCS[4:6], TRUE_AUCS[6:])]
        by_size.append([f"{size[0]} + {size[1]}", *columns(cells), *widths])
    by_shape = [[shape, *columns([row for row in rows if row["shape"] == shape])] for shape in SHAPES]
    by_hard = [
        [shape, f"{low} or more", *columns(cells)]
        for shape in HARD_SHAPES
        for low in (10, 100, 300)
        if (
            cells := [
                r for r in hard if r["shape"] == shape and min(r["n_members"], r["n_non_members"]) >= low
            ]
        )
    ]
    by_interval = [
        [
            name,
            *(
                pair(
                    [
                        row
                        for row in promised
                        if row["share"] == share and (row["n_members"] == row["n_non_members"]) == is_equal
                    ],
                    name,
                )
                for share in SHARES
                for is_equal in (True, False)
            ),
        ]
        for name in rows[0]["misses"]
    ]
    margins = [3.0 * math.sqrt(share * (1.0 - share) / n_draws) for share in SHARES]
    n_over = [
        sum(max(row["misses"]["now"]) > share + margin for row in promised if row["share"] == share)
        for share, margin in zip(SHARES, margins, strict=True)
    ]
    return {
        "auc grid": "How often the lower end lies above the truth / the upper end below it, in %: the worst "
        f"cell over {len(SHAPES)} shapes, true AUCs {TRUE_AUCS[0]} to {TRUE_AUCS[-1]} and both orders of the "
        "sizes. Width: that of the interval over that of the one before, the median over the continuous "
        "shapes.\n\n"
        + markdown(
            ["sizes", *header, "width at AUC 0.5 to 0.8", "at 0.9 and 0.95", "at 0.995"],
            by_size,
        )
        + f"\n\n{len(promised) // len(SHARES)} cells, {n_draws} draws each. Three standard errors of a rate "
        f"that equals its share are {100 * margins[0]:.2f} and {100 * margins[1]:.2f} percentage points; "
        f"{n_over[0]} and {n_over[1]} cells exceed 2.5 % and 0.25 % by more than that.\n\n"
        + markdown(["shape, all sizes", *header], by_shape),
        "auc hard": "Shapes beyond these, in the same way.\n\n"
        + markdown(["shape", "smaller class", *header], by_hard),
        "auc intervals": "Each interval that was tried, in the same way: the worst cell over equal, and over "
        "unequal sizes.\n\n"
        + markdown(
            ["interval", "2.5 %: equal", "2.5 %: unequal", "0.25 %: equal", "0.25 %: unequal"], by_interval
        ),
    }


COLUMNS = (*Cell._fields, "share", "width_ratio")


def packed(rows: list[dict]) -> list[list]:
    """Rows without the names of their columns: `COLUMNS`, then one for each interval."""
    return [[*(row[name] for name in COLUMNS), *row["misses"].values()] for row in rows]


def unpacked(columns: list[str], cells: list[list]) -> list[dict]:
    """The rows of a file with these columns: `packed`, the other way."""
    rows = [dict(zip(columns, cell, strict=True)) for cell in cells]
    return [
        {
            **{name: row[name] for name in COLUMNS},
            "misses": {name: rate for name, rate in row.items() if name not in COLUMNS},
        }
        for row in rows
    ]


def with_tables(document: str, found: dict[str, str]) -> str:
    """The document with the text between the marks of each table replaced.

    Raises:
        ValueError: if a mark is missing.
    """
    for name, text in found.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, rest = document.split(start)
        _, tail = rest.split(end)
        document = f"{head}{start}\n\n{text}\n\n{end}{tail}"
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    arguments = parser.parse_args()
    started = time.perf_counter()
    run = functools.partial(run_cell, n_draws=arguments.repetitions, seed=arguments.seed)
    cells = list(all_cells())
    rows: list[dict] = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for cell, found in zip(cells, pool.map(run, cells), strict=True):
            rows += found
            if cell.shape == SHAPES[-1] and cell.true_auc == TRUE_AUCS[-1]:
                seconds = time.perf_counter() - started
                print(f"{cell.n_members} + {cell.n_non_members}: {seconds:.0f} s", flush=True)
    texts = tables(rows, arguments.repetitions)
    for text in texts.values():
        print(f"\n{text}")
    if arguments.repetitions < 10_000:
        return
    content = {
        "command": f"python benchmarks/auc_interval.py --repetitions {arguments.repetitions} "
        f"--seed {arguments.seed}",
        "n_draws": arguments.repetitions,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "scipy")},
        },
        "seconds": round(time.perf_counter() - started),
        "columns": [*COLUMNS, *rows[0]["misses"]],
        "cells": rows,
    }
    lines = ",\n".join(json.dumps(row) for row in packed(content.pop("cells")))
    head = json.dumps(content, indent=1)[:-2]
    RESULTS.write_text(f'{head},\n "cells": [\n{lines}\n]}}\n', encoding="utf-8")
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), texts), encoding="utf-8")


if __name__ == "__main__":
    main()
