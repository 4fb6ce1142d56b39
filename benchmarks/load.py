"""How time and memory grow with the size of a history, of the canaries, of a comparison and of a file.

    python benchmarks/load.py                   # some twenty minutes on an idle core, 4 GiB of memory
    python benchmarks/load.py --scale 0.01      # a hundredth of every size: whether it runs
    python benchmarks/load.py --only page

No model: audits, scores and records are drawn from a seed. Each figure is of a process of its own; what it
works on is made before the clock starts. Seconds are of the processor: other work beside it counts less, and
waiting for the disk does not. Time is linear where that of one item stays the same. Memory is the peak above
what was there before. Prints a Markdown table for `docs/scaling.md`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

Run = Callable[[], object]

# Audits that are measured together where one alone is too quick for a clock.
N_MORE = 20


@dataclass(frozen=True)
class Part:
    """Something that is measured at several sizes.

    Attributes:
        name: What it is.
        unit: What the sizes count.
        sizes: How many there are of them.
        prepare: What is measured, given a size, a seed and an empty folder.
        n_items: How many items of a size the time is shared among; None for the size itself.
    """

    name: str
    unit: str
    sizes: tuple[int, ...]
    prepare: Callable[[int, int, Path], Run]
    n_items: int | None = None


def make_history(n_audits: int, seed: int, *, n_failed_of_ten: int = 0) -> Any:
    """A run of 100 members and 200 non-members under a budget that it exceeds at the end."""
    import numpy as np

    from ezmia_callbacks import AuditHistory, AuditResult, LeakageBudget
    from ezmia_callbacks.audit.judge import Judge
    from ezmia_callbacks.functional import Decision
    from ezmia_callbacks.functional.judged import judged_scores
    from ezmia_callbacks.results.result import EdgeCounts, Finding

    rng = np.random.default_rng(seed)
    budget = LeakageBudget(limit=0.6, patience=2)
    names = judged_scores("strongest", has_pairs=False)
    judge = Judge(budget, budget.confidence, n_audits, judge_only=True, n_scores=len(names))
    results: list[Any] = []
    for i in range(n_audits):
        is_baseline, is_failed = i == 0, i % 10 >= 10 - n_failed_of_ten
        before = AuditHistory(tuple(results[-3:]), budget)
        center = 0.5 if is_baseline else 0.5 + 0.35 * i / n_audits
        judged = {name: _metrics(center + 0.02 * rng.normal(), is_baseline=is_baseline) for name in names}
        decided_by = judge.strongest_of(judged)
        finding = Finding("saturation", True, f"{i} of 100 member records have no error left.")
        results.append(
            AuditResult(
                step=10 * i,
                epoch=i / 100,
                status="failed" if is_failed and not is_baseline else "ok",
                is_baseline=is_baseline,
                score="strongest",
                n_members=100,
                n_non_members=200,
                n_members_seen=None if is_baseline else 100,
                n_tokens=30_000,
                seconds=1.0,
                decision=judge.decide(judged, before, is_baseline=is_baseline),
                decided_by=decided_by,
                metrics=judged[decided_by],
                judged_beside={name: judged[name] for name in names if name != decided_by},
                auc_by_score={"calibrated_min_k_plus_plus": judged[names[0]]["auc"]},
                member_loss=3.0 - center,
                non_member_loss=3.0,
                n_error_tokens=20.0,
                member_edges=EdgeCounts(1, 2, 3, 100),
                non_member_edges=EdgeCounts(1, 2, 3, 200),
                findings=(finding,) if i % 3 == 0 and not is_baseline else (),
            )
        )
        if results[-1].status == "failed":
            failed = Decision(False, None, "the audit failed: leakage is unknown")
            results[-1] = replace(
                results[-1], decision=failed, metrics={}, judged_beside={}, error="no memory"
            )
    return AuditHistory(tuple(results), budget, about="100 members and 200 non-members", is_complete=True)


def _metrics(auc: float, *, is_baseline: bool) -> dict[str, Any]:
    from ezmia_callbacks.functional import Interval
    from ezmia_callbacks.results.result import Measurement

    def measured(value: float, turned: Any = None) -> Any:
        ends = [
            Interval(max(0.0, value - r), min(1.0, value + r), c, "delong")
            for r, c in ((0.06, 0.95), (0.1, 0.99))
        ]
        return Measurement(value, ends[0], None if is_baseline else ends[1], None, turned)

    rate = min(1.0, max(0.0, auc - 0.4))
    return {
        "auc": measured(auc),
        "tpr_at_fpr_0.1": measured(rate, measured(0.1)),
        "advantage": measured(rate, measured(0.1)),
    }


def save_history(size: int, seed: int, folder: Path) -> Run:
    history = make_history(size, seed)
    return lambda: history.save(folder / "history.jsonl")


def load_history(size: int, seed: int, folder: Path) -> Run:
    from ezmia_callbacks import AuditHistory

    make_history(size, seed).save(folder / "history.jsonl")
    return lambda: AuditHistory.load(folder / "history.jsonl")


def document(size: int, seed: int, folder: Path) -> Run:
    from ezmia_callbacks.report import write_json

    history = make_history(size, seed)
    return lambda: write_json(history, folder / "report.json")


def page(size: int, seed: int, folder: Path) -> Run:
    from ezmia_callbacks.report import write_report

    history = make_history(size, seed)
    return lambda: write_report(history, folder / "report.html")


def failed_page(size: int, seed: int, folder: Path) -> Run:
    from ezmia_callbacks.report import write_report

    history = make_history(size, seed, n_failed_of_ten=5)
    return lambda: write_report(history, folder / "report.html")


def markdown(size: int, seed: int, folder: Path) -> Run:
    from ezmia_callbacks.report import summarize

    history = make_history(size, seed)
    return lambda: (folder / "report.md").write_text(summarize(history))


def picture(size: int, seed: int, folder: Path) -> Run:
    history = make_history(size, seed)
    history.save(folder / "history.jsonl")
    return lambda: _ezmia("report", folder / "history.jsonl", "-o", folder / "report.png")


def report_command(size: int, seed: int, folder: Path) -> Run:
    make_history(size, seed).save(folder / "history.jsonl")
    return lambda: _ezmia("report", folder / "history.jsonl", "-o", folder / "report.html")


def _ezmia(*arguments: object) -> None:
    from ezmia_callbacks.cli import command

    sys.argv = ["ezmia", *map(str, arguments)]
    code = command._run()
    if code:
        raise SystemExit(code)


def _run_of(n_audits: int, seed: int) -> tuple[Any, Callable[[Any], Any]]:
    """A run with so many audits, and what makes it one audit longer."""
    import numpy as np

    from ezmia_callbacks import AuditHistory, hold_out_canaries
    from ezmia_callbacks.audit.judge import Judge
    from ezmia_callbacks.audit.run_state import RunState
    from ezmia_callbacks.measuring.analysis_units import AnalysisUnits
    from ezmia_callbacks.measuring.figures import figures
    from ezmia_callbacks.measuring.subset import CanarySubset
    from ezmia_callbacks.results.findings import detect
    from ezmia_callbacks.scoring.rows import encode_canaries

    rng = np.random.default_rng(seed)
    canaries = hold_out_canaries(_token_rows(1_000, rng), n_members=100, n_non_members=200, seed=seed)[1]
    encoded = encode_canaries(canaries)
    history = make_history(n_audits, seed)
    score_names = list(history[0].judged)
    state = RunState.before_training(
        CanarySubset(encoded, AnalysisUnits(canaries)),
        replace(history, results=(), is_complete=False),
        fingerprint="none",
        score_names=score_names,
        chooses_subset=False,
    )
    reference = _statistics(encoded, rng)
    state = replace(state, reference=reference)
    for result in history:
        state = state.with_result(_with_scores(result, score_names, rng), reference)
    judge = Judge(history.budget, 0.95, n_audits + N_MORE, judge_only=True, n_scores=len(score_names))

    def next_audit(state: Any) -> Any:
        target = _statistics(encoded, rng)
        measured = figures(
            target,
            reference,
            state.subset,
            judged=score_names,
            strongest_of=judge.strongest_of,
            own_scores={},
            fpr_levels=(0.1,),
            confidence=0.95,
            band=judge.band(state.history),
            has_epsilon=False,
            previous=state.previous_of_subset,
            earlier_steps=state.blocks.earlier_steps,
        )
        judged = {measured.decided_by: measured.metrics, **measured.judged_beside}
        result = replace(
            state.history[-1],
            step=state.history[-1].step + 10,
            findings=(),
            decision=judge.decide(judged, state.history),
            **vars(measured),
        )
        result = replace(result, findings=detect(result, state.history.results))
        assert AuditHistory.is_past_budget.fget(state.history) in (True, False)
        return state.with_result(result, target)

    return state, next_audit


def _token_rows(n: int, rng: Any) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids} for ids in rng.integers(5, 30_000, size=(n, 32)).tolist()]


def _statistics(encoded: Any, rng: Any) -> Any:
    import numpy as np

    from ezmia_callbacks.scoring.statistics import TokenStatistics

    offsets = np.concatenate([[0], np.cumsum([row.n_scored for row in encoded.rows])]).astype(np.int64)
    log_probs = -rng.exponential(3.0, size=offsets[-1]).astype(np.float32)
    return TokenStatistics(log_probs, log_probs > -1.0, log_probs - 1.0, np.ones_like(log_probs), offsets)


def _with_scores(result: Any, names: Sequence[str], rng: Any) -> Any:
    draw = rng.random
    beside = {name: draw(300) for name in names if name != result.decided_by}
    return replace(result, scores=draw(300), scores_beside=beside, step_scores=draw(300))


def one_more_written(size: int, seed: int, folder: Path) -> Run:
    from ezmia_callbacks.audit.run_folder import RunFolder

    state, next_audit = _run_of(size, seed)
    states = [state]
    for _ in range(N_MORE):
        states.append(next_audit(states[-1]))
    written = RunFolder(folder)
    written.save_audits(states[0])

    def run() -> None:
        for before, after in pairwise(states):
            written.save_audits(after, after=before)

    return run


def one_more_judged(size: int, seed: int, _folder: Path) -> Run:
    state, next_audit = _run_of(size, seed)
    # A run sums the steps of a block up when it is full, not all at once.
    next_audit(state)

    def run() -> None:
        now = state
        for _ in range(N_MORE):
            now = next_audit(now)

    return run


def findings_of_ez(size: int, seed: int, _folder: Path) -> Run:
    """The findings of one score, which are looked for in all audits before."""
    from ezmia_callbacks.results.findings import detect

    audits = [
        replace(
            result,
            score="ez",
            decided_by="ez",
            metrics=result.judged["ez"],
            judged_beside={},
            auc_by_score={"loss_difference": result.judged["loss_difference"]["auc"]},
        )
        for result in make_history(size, seed)
    ]

    def run() -> None:
        for _ in range(N_MORE):
            detect(audits[-1], audits[:-1])

    return run


def judge_anew(size: int, seed: int, _folder: Path) -> Run:
    """Of a run that is resumed under another budget."""
    from ezmia_callbacks import LeakageBudget
    from ezmia_callbacks.audit.judge import Judge

    history = make_history(size, seed)
    judge = Judge(LeakageBudget(limit=0.7), 0.95, size, n_scores=len(history[0].judged))
    results = [replace(result, n_members_seen=None) for result in history]
    subset = _run_of(2, seed)[0].subset
    return lambda: judge.rejudged(results, subset, judged_by=history.judged_by)


def _texts(n: int, seed: int) -> list[str]:
    """Texts of 40 words, each of which another text has as well."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in ids) for ids in rng.zipf(1.3, size=(n, 40)).clip(max=50_000).tolist()]


def _canaries(size: int, seed: int) -> Any:
    from ezmia_callbacks import hold_out_canaries

    return hold_out_canaries(_texts(2 * size, seed), n_canaries=size, seed=seed)[1]


def draw_canaries(size: int, seed: int, _folder: Path) -> Run:
    from ezmia_callbacks import hold_out_canaries

    texts = _texts(2 * size, seed)
    return lambda: hold_out_canaries(texts, n_canaries=size, seed=seed)


def save_and_load_canaries(size: int, seed: int, folder: Path) -> Run:
    from ezmia_callbacks.canaries import load_canaries, save_canaries

    canaries = _canaries(size, seed)

    def run() -> None:
        save_canaries(canaries, folder / "canaries.json")
        load_canaries(folder / "canaries.json")

    return run


def _encoded(size: int, seed: int) -> tuple[Any, Any]:
    import numpy as np

    from ezmia_callbacks import hold_out_canaries
    from ezmia_callbacks.scoring.rows import encode_canaries

    rows = _token_rows(2 * size, np.random.default_rng(seed))
    canaries = hold_out_canaries(rows, n_canaries=size, seed=seed)[1]
    return canaries, encode_canaries(canaries)


def encode(size: int, seed: int, _folder: Path) -> Run:
    from ezmia_callbacks.scoring.rows import encode_canaries

    canaries, _ = _encoded(size, seed)
    return lambda: encode_canaries(canaries).fingerprint


def check_split(size: int, seed: int, _folder: Path) -> Run:
    from ezmia_callbacks.canaries import check_validity

    canaries = _canaries(size, seed)
    return lambda: check_validity(canaries)


def look_at_batches(size: int, seed: int, _folder: Path) -> Run:
    """Ten batches of 8 x 32 tokens."""
    import numpy as np
    import torch

    from ezmia_callbacks.audit.seen import SeenCanaries

    _, encoded = _encoded(size, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(5, 30_000, size=(10, 8, 32)))

    def run() -> None:
        seen = SeenCanaries(encoded.rows)
        for batch in ids:
            seen.look({"input_ids": batch})
            seen.step_done()
        seen.exposures()

    return run


def all_figures(size: int, seed: int, _folder: Path) -> Run:
    import numpy as np

    from ezmia_callbacks import LeakageBudget
    from ezmia_callbacks.audit.judge import Judge
    from ezmia_callbacks.functional import EndShares
    from ezmia_callbacks.functional.judged import judged_scores
    from ezmia_callbacks.measuring.analysis_units import AnalysisUnits
    from ezmia_callbacks.measuring.figures import figures
    from ezmia_callbacks.measuring.subset import CanarySubset

    canaries, encoded = _encoded(size, seed)
    rng = np.random.default_rng(seed)
    target, reference = _statistics(encoded, rng), _statistics(encoded, rng)
    names = judged_scores("strongest", has_pairs=False)
    judge = Judge(LeakageBudget(limit=0.6), 0.95, 10, n_scores=len(names))
    return lambda: figures(
        target,
        reference,
        CanarySubset(encoded, AnalysisUnits(canaries)),
        judged=names,
        strongest_of=judge.strongest_of,
        own_scores={},
        fpr_levels=(0.01, 0.1),
        confidence=0.95,
        band=EndShares(0.001, 0.001),
        has_epsilon=True,
        previous=reference,
    )


def permutations(size: int, seed: int, _folder: Path) -> Run:
    import numpy as np

    from ezmia_callbacks.functional import leakage_permutation_test

    rng = np.random.default_rng(seed)
    scores, is_member = rng.normal(size=(4, size)), rng.random(size) < 0.5
    return lambda: leakage_permutation_test(scores, is_member, n_permutations=999, seed=seed)


def _runs(size: int, seed: int, folder: Path) -> list[Path]:
    history = make_history(4, seed)
    for i in range(size):
        history.save(folder / f"run-{i}" / "history.jsonl")
    return [folder / f"run-{i}" for i in range(size)]


def compare(size: int, seed: int, folder: Path) -> Run:
    runs = _runs(size, seed, folder)
    return lambda: _ezmia("compare", *runs)


def compare_page(size: int, seed: int, folder: Path) -> Run:
    runs = _runs(size, seed, folder)
    return lambda: _ezmia("compare", *runs, "-o", folder / "report.html")


def compare_page_apart(size: int, seed: int, folder: Path) -> Run:
    """Every run with steps of its own."""
    from ezmia_callbacks.report import write_report

    history = make_history(4, seed)
    runs = {
        f"run {i}": replace(
            history, results=tuple(replace(r, epoch=None, step=r.step * size + i) for r in history)
        )
        for i in range(size)
    }
    return lambda: write_report(runs, folder / "report.html")


def split(size: int, seed: int, folder: Path) -> Run:
    path = folder / "records.jsonl"
    texts = _texts(1_000, seed)
    with path.open("w") as file:
        i = n_written = 0
        while n_written < size * 1_000_000:
            n_written += file.write(json.dumps({"text": f"{i} {texts[i % 1_000]}", "source": "load"}) + "\n")
            i += 1
    return lambda: _ezmia("split", path, "-o", folder / "out", "--members", 500, "--non-members", 1_000)


AUDITS, CANARIES = (100, 1_000, 10_000), (1_000, 10_000, 100_000)

PARTS = (
    Part("history: save", "audits", AUDITS, save_history),
    Part("history: load", "audits", AUDITS, load_history),
    Part("history: JSON document", "audits", AUDITS, document),
    Part("history: page", "audits", AUDITS, page),
    Part("history: page, half of the audits failed", "audits", AUDITS, failed_page),
    Part("history: Markdown", "audits", AUDITS, markdown),
    Part("history: picture", "audits", AUDITS, picture),
    Part("history: `ezmia report -o page.html`", "audits", AUDITS, report_command),
    Part("one audit more after so many: written", "audits", AUDITS, one_more_written, N_MORE),
    Part("one audit more after so many: figures and verdict", "audits", AUDITS, one_more_judged, N_MORE),
    Part('one audit more after so many: findings of `score="ez"`', "audits", AUDITS, findings_of_ez, N_MORE),
    Part("history: judged anew by another budget", "audits", AUDITS, judge_anew),
    Part("canaries: `hold_out_canaries`", "canaries", CANARIES, draw_canaries),
    Part("canaries: save and load", "canaries", CANARIES, save_and_load_canaries),
    Part("canaries: encode, fingerprint", "canaries", CANARIES, encode),
    Part("canaries: checks of the split, near copies", "canaries", CANARIES, check_split),
    Part("canaries: look at ten batches", "canaries", CANARIES, look_at_batches),
    Part("canaries: figures of an audit, with epsilon", "canaries", CANARIES, all_figures),
    Part("canaries: 999 permutations of four scores", "canaries", CANARIES, permutations),
    Part("`ezmia compare`", "runs", (10, 100, 1_000), compare),
    Part("`ezmia compare -o page.html`", "runs", (10, 100, 1_000), compare_page),
    Part("page of runs that share no step", "runs", (10, 100, 1_000), compare_page_apart),
    Part("`ezmia split`", "MB of JSONL", (2, 20, 200), split),
)


def measure(part: Part, size: int, seed: int) -> dict[str, float]:
    """Seconds and MiB of one size, in this process."""
    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as nothing:
        run = part.prepare(size, seed, Path(name))
        before = _start_of_peak()
        stdout, sys.stdout = sys.stdout, nothing
        started = time.process_time()
        run()
        seconds = time.process_time() - started
        sys.stdout = stdout
        return {"seconds": seconds, "mib": _peak() - before}


def _start_of_peak() -> float:
    """MiB that are in use now; from here on the peak counts."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def in_its_own_process(part: Part, size: int, seed: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", part.name, str(size), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part.name}, {size} {part.unit}: {done.stderr[-2_000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of every size")
    parser.add_argument("--only", default="", help="parts whose names hold this")
    parser.add_argument("--largest", type=int, default=10**9, help="leave larger sizes out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, size = arguments.one
        part = next(part for part in PARTS if part.name == name)
        print(json.dumps(measure(part, int(size), arguments.seed)))
        return
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions()}; seed {arguments.seed}\n")
    print("| What | Sizes | Seconds | of one, ms | MiB |\n|---|---|---|---|---|")
    for part in PARTS:
        sizes = sorted({max(2, int(size * arguments.scale)) for size in part.sizes})
        sizes = [size for size in sizes if size <= arguments.largest]
        if arguments.only not in part.name or not sizes:
            continue
        found = [in_its_own_process(part, size, arguments.seed) for size in sizes]
        of_one = [1e3 * each["seconds"] / (part.n_items or n) for each, n in zip(found, sizes, strict=True)]
        row = (
            part.name,
            f"{'; '.join(f'{size:,}' for size in sizes)} {part.unit}",
            "; ".join(f"{each['seconds']:.2g}" for each in found),
            "; ".join(f"{each:.3g}" for each in of_one),
            "; ".join(f"{each['mib']:.0f}" for each in found),
        )
        print(f"| {' | '.join(row)} |", flush=True)


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "torch", "jinja2"))


if __name__ == "__main__":
    main()
