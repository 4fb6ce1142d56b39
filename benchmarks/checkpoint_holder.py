"""How should the audits of a run be combined for someone who holds every checkpoint?

    python benchmarks/checkpoint_holder.py run --cache PATH/TO/cache --data PATH/TO/data
    python benchmarks/checkpoint_holder.py tables

Fine-tunes the demo's small base model on real text, all weights and LoRA, and keeps the token statistics of
members and non-members four times an epoch. A step score compares an audit with the one before it; the step
scores of a record are then combined in many ways. The combination is **decided on WikiText-2 alone**: the
highest AUC, averaged over seeds, kinds of fine-tuning, cadences of the audits and moments of the run. It is
then **reported, untouched, on XSum articles and on package documentation**.

`run` makes what is not in the cache yet, one file for each base model and each run, so that it may be
broken off and started again. `compare` works with what is in the cache, and writes
`benchmarks/results/checkpoint_holder.json`; `tables` prints Markdown from it. `--data` is the folder of
`wikitext-2/{valid,test}.txt` and of `xsum-500.jsonl`.
"""

import argparse
import importlib.metadata
import io
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
from scipy import special, stats

from ezmia_callbacks import hold_out_canaries
from ezmia_callbacks.demo.base_model import train_base_model
from ezmia_callbacks.demo.corpus import package_docstrings, standard_library_docstrings
from ezmia_callbacks.files import write_atomically
from ezmia_callbacks.functional import auc, checkpoint_holder_score, ez_evidence, tpr_at_fpr
from ezmia_callbacks.scoring.forward import token_statistics
from ezmia_callbacks.scoring.rows import encode_canaries
from ezmia_callbacks.scoring.statistics import TokenStatistics, score_records

RESULT = Path(__file__).parent / "results" / "checkpoint_holder.json"
DECIDED_ON = "wikitext"
CORPORA = {
    "wikitext": "WikiText-2",
    "xsum": "XSum articles",
    "docs": "scipy, scikit-learn and numpy documentation",
}
N_PER_CLASS = {"wikitext": 400, "xsum": 250, "docs": 250}
N_TOKENS = (32, 64)
KINDS = {"full": 5e-4, "lora": 2e-3}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
EPOCHS, AUDITS_PER_EPOCH, BATCH_SIZE = 3, 4, 8
FPR = 0.1

# Which of the audits, counted from 1, four an epoch, the holder has a checkpoint of.
CADENCES = {
    "4 an epoch": tuple(range(1, 13)),
    "4 in the first epoch, then each": (1, 2, 3, 4, 8, 12),
    "each epoch": (4, 8, 12),
}
MOMENTS = {4: "end of epoch 1", 8: "end of epoch 2", 12: "end of epoch 3"}

# Mean AUCs that differ by less are as good.
AS_GOOD = 0.005

SCORES = ("ez", "loss_difference", "wbc")
START = "start"


# ----------------------------------------------------------------------------------- fine-tuning and cache


def read_texts(corpus: str, data: Path | None) -> list[str]:
    if corpus == "docs":
        return package_docstrings("scipy", "sklearn", "numpy")
    if data is None:
        raise SystemExit(f"{CORPORA[corpus]} is needed: pass --data, or --corpora docs.")
    if corpus == "xsum":
        lines = (data / "xsum-500.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]
    names = ("valid.txt", "test.txt")
    lines = [line.strip() for n in names for line in (data / "wikitext-2" / n).open(encoding="utf-8")]
    return [line for line in lines if line and not line.startswith("=")]


def base_model(seed: int, cache: Path) -> Any:
    """The demo's base model of a seed, from the cache where it is."""
    folder = cache / f"base_seed{seed}"
    if not folder.exists():
        trained = train_base_model(standard_library_docstrings(), seed=seed)
        partial = folder.with_suffix(".partial")
        trained.model.save_pretrained(partial)
        trained.tokenizer.save_pretrained(partial)
        partial.rename(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def collect(corpus: str, kind: str, seed: int, *, data: Path | None, cache: Path) -> Path:
    """Fine-tune once, with a learning rate that falls to 0; cache the statistics of all audits."""
    path = cache / f"{corpus}_{kind}_seed{seed}.npz"
    if path.exists():
        return path
    started = time.perf_counter()
    model, tokenizer = base_model(seed, cache)
    texts = read_texts(corpus, data)
    least, most = N_TOKENS
    encoded_texts = [tokenizer(text, add_special_tokens=False)["input_ids"][:most] for text in texts]
    pool = [{"input_ids": ids} for ids in encoded_texts if len(ids) >= least]
    n = N_PER_CLASS[corpus]
    order = np.random.default_rng(seed).permutation(len(pool))
    train_rows, canaries = hold_out_canaries(
        [pool[i] for i in order[: 2 * n]], n_members=n, n_non_members=n, seed=seed
    )
    encoded = encode_canaries(canaries)
    transformers.set_seed(seed)
    if kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=KINDS[kind])
    n_steps = -(-len(train_rows) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=EPOCHS * n_steps)
    rng = np.random.default_rng(seed)
    audited = [token_statistics(model, encoded.rows, batch_size=32)]
    for _ in range(EPOCHS):
        batches = np.array_split(rng.permutation(len(train_rows)), n_steps)
        for quarter in np.array_split(np.arange(n_steps), AUDITS_PER_EPOCH):
            model.train()
            for step in quarter:
                train_step(model, optimizer, [train_rows[i]["input_ids"] for i in batches[step]])
                schedule.step()
            audited.append(token_statistics(model, encoded.rows, batch_size=32))
    arrays = {
        f"audit{t}_{field.name}": getattr(statistics, field.name)
        for t, statistics in enumerate(audited)
        for field in fields(TokenStatistics)
    }
    content = io.BytesIO()
    np.savez_compressed(content, is_member=encoded.is_member, **arrays)
    write_atomically(path, content.getvalue())
    print(f"{path.stem}: {len(pool)} records in the pool, {time.perf_counter() - started:.0f} s", flush=True)
    return path


def train_step(model: Any, optimizer: Any, rows: Sequence[Sequence[int]]) -> None:
    ids = [torch.tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in ids])
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    labels = padded.masked_fill(~mask, -100)
    model(input_ids=padded, attention_mask=mask.long(), labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Run(NamedTuple):
    """The statistics before training and at each audit, as they were cached."""

    audited: list[TokenStatistics]
    is_member: np.ndarray


def load_run(path: Path) -> Run:
    with np.load(path) as arrays:
        audited = [
            TokenStatistics(**{f.name: arrays[f"audit{t}_{f.name}"] for f in fields(TokenStatistics)})
            for t in range(EPOCHS * AUDITS_PER_EPOCH + 1)
        ]
        return Run(audited, arrays["is_member"])


# ---------------------------------------------------------------------------------------- combinations


def normal_scores(scores: np.ndarray) -> np.ndarray:
    """Each row as normal quantiles of its ranks among all records, members or not."""
    ranks = stats.rankdata(scores, axis=-1)
    return np.asarray(special.ndtri((ranks - 0.5) / scores.shape[-1]))


def standard_scores(scores: np.ndarray) -> np.ndarray:
    """Each row less its median, by its interquartile range: unlike ranks it keeps how far out one is."""
    low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75], axis=-1, keepdims=True)
    return (scores - middle) / np.maximum(high - low, 1e-12)


SCALES = {"as it is": lambda x: x, "normal scores": normal_scores, "by spread": standard_scores}
WAYS = {
    "sum": lambda x: x.sum(axis=0),
    "maximum": lambda x: x.max(axis=0),
    "mean of the top 2": lambda x: np.sort(x, axis=0)[-2:].mean(axis=0),
    # The likelihood ratio of "one of these, one knows not which, is shifted by so many spreads".
    "log-sum-exp, shift 1": lambda x: special.logsumexp(x, axis=0),
    "log-sum-exp, shift 2": lambda x: special.logsumexp(2.0 * x, axis=0),
    "log-sum-exp, shift 3": lambda x: special.logsumexp(3.0 * x, axis=0),
}


def combinations(chosen: Sequence[TokenStatistics]) -> Iterator[tuple[str, np.ndarray]]:
    """Every combination by its name: score, scale, way, and whether the score against the start is added."""
    start, last = chosen[0], chosen[-1]
    against_start = {name: score_records(name, last, start) for name in SCORES}
    steps = {
        name: np.stack([score_records(name, b, a) for a, b in itertools.pairwise(chosen)]) for name in SCORES
    }
    for name, values in against_start.items():
        yield f"{name} | {START}", values
        yield f"{name} | last step", steps[name][-1]
        every = np.stack([score_records(name, audit, start) for audit in chosen[1:]])
        yield f"{name} | {START} | maximum", every.max(axis=0)
    scaled = {
        (name, scale): SCALES[scale](values)
        for (name, values), scale in itertools.product(steps.items(), SCALES)
    }
    # All three scores vote at each step.
    scaled["all three", "normal scores"] = np.mean([scaled[n, "normal scores"] for n in SCORES], axis=0)
    against_start["all three"] = np.mean([normal_scores(v) for v in against_start.values()], axis=0)
    yield f"all three | {START}", against_start["all three"]
    for ((name, scale), values), (way, combine) in itertools.product(scaled.items(), WAYS.items()):
        found = combine(values)
        yield f"{name} | {scale} | {way}", found
        yield f"{name} | {scale} | {way} + {START}", normal_scores(found) + normal_scores(against_start[name])
    # What the package has must be what was decided on.
    ours = checkpoint_holder_score(steps["ez"])
    theirs = WAYS["log-sum-exp, shift 3"](scaled["ez", "normal scores"])
    assert np.array_equal(stats.rankdata(ours.round(9)), stats.rankdata(theirs.round(9)))
    # The upward and the downward path of the error tokens, over all steps.
    evidence = [
        ez_evidence(b.log_probs, a.log_probs, b.is_correct, a.is_correct, offsets=b.offsets)
        for a, b in itertools.pairwise(chosen)
    ]
    up, down = (sum(getattr(e, side) for e in evidence) for side in ("positive", "negative"))
    yield "ez | path", up / np.maximum(up + down, 1e-12)


def compare(corpus: str, kind: str, seed: int, path: Path) -> list[dict[str, Any]]:
    """A row for each cadence and moment: AUC and TPR of every combination."""
    run = load_run(path)
    rows = []
    for (cadence, audits), moment in itertools.product(CADENCES.items(), MOMENTS):
        chosen = [run.audited[t] for t in (0, *(t for t in audits if t <= moment))]
        found = dict(combinations(chosen))
        rows.append(
            {
                "corpus": corpus,
                "kind": kind,
                "seed": seed,
                "cadence": cadence,
                "moment": MOMENTS[moment],
                "n_steps": len(chosen) - 1,
                "auc": {name: round(auc(values, run.is_member), 4) for name, values in found.items()},
                "tpr": {
                    name: round(tpr_at_fpr(values, run.is_member, fpr=FPR), 4)
                    for name, values in found.items()
                },
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------- tables


def mean_of(rows: Sequence[dict[str, Any]], name: str, figure: str = "auc") -> float:
    return float(np.mean([row[figure][name] for row in rows]))


def ranking(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Every combination with its mean AUC on the corpus that decides, the best first.

    Every cell of kind, cadence and moment weighs the same. A single step has nothing to combine: those rows
    do not count.
    """
    cells = cells_of([row for row in rows if row["corpus"] == DECIDED_ON and row["n_steps"] > 1])
    means = {name: float(np.mean([mean_of(cell, name) for cell in cells])) for name in cells[0][0]["auc"]}
    return sorted(means.items(), key=lambda pair: -pair[1])


def cells_of(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each kind, cadence and moment, one for each seed."""
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["kind"], row["cadence"], row["moment"]), []).append(row)
    return list(cells.values())


def decide(rows: Sequence[dict[str, Any]]) -> str:
    """The best combination; of those that are as good, the one with the EZ score, then normal scores.

    EZ is the package's headline, and ranks need no spread, which is 0 where few records moved.
    """
    ranked = ranking(rows)
    good = [name for name, mean in ranked if mean > ranked[0][1] - AS_GOOD]
    return min(
        good,
        key=lambda name: (
            name.endswith(f"+ {START}"),
            not name.startswith("ez |"),
            "normal scores" not in name,
            good.index(name),
        ),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "/") for c in cells) + " |" for cells in lines)


def over_seeds(rows: Sequence[dict[str, Any]], name: str, figure: str = "auc") -> str:
    values = [row[figure][name] for row in rows]
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def print_tables(content: dict[str, Any], *, n_best: int = 25) -> None:
    rows, ranked, chosen = content["rows"], ranking(content["rows"]), content["decided"]
    print(f"{content['machine']}\n\n{content['setting']}\n\nRuns: {'; '.join(content['runs'])}\n")
    deciding = [row for row in rows if row["corpus"] == DECIDED_ON and row["n_steps"] > 1]
    groups = list(itertools.product(KINDS, CADENCES))

    def line(name: str, mean: float) -> list[str]:
        within = [[row for row in deciding if (row["kind"], row["cadence"]) == group] for group in groups]
        worst = min(mean_of(cell, name) - mean_of(cell, f"ez | {START}") for cell in cells_of(deciding))
        tpr = float(np.mean([mean_of(cell, name, "tpr") for cell in cells_of(deciding)]))
        return [
            name,
            f"{mean:.3f}",
            f"{tpr:.3f}",
            f"{worst:+.3f}",
            *(f"{mean_of(w, name):.3f}" for w in within),
        ]

    baselines = [pair for pair in ranked[n_best:] if f"| {START}" in pair[0] or "last step" in pair[0]]
    print(
        f"### Decided on {CORPORA[DECIDED_ON]}: the best {n_best} of {len(ranked)}, and what uses no path\n"
    )
    header = ["combination", "AUC", f"TPR at FPR {FPR:g}", "worst cell less EZ against the start"]
    header += [f"{kind}, {cadence}" for kind, cadence in groups]
    print(table(header, [line(*pair) for pair in [*ranked[:n_best], *baselines]]))
    print(f"\nDecided: {chosen}")
    for corpus, name in CORPORA.items():
        of_corpus = [row for row in rows if row["corpus"] == corpus]
        if of_corpus:
            kind = "decided on" if corpus == DECIDED_ON else "reported on"
            print(f"\n### {kind.capitalize()}: {name}\n\n{report(of_corpus, chosen)}")


def report(rows: Sequence[dict[str, Any]], chosen: str) -> str:
    """What the chosen combination finds, against EZ with the start as its reference."""
    plain = f"ez | {START}"
    lines = [
        [
            *(cell[0][name] for name in ("kind", "cadence", "moment")),
            *(over_seeds(cell, name) for name in (plain, chosen)),
            over_seeds([{"auc": {chosen: row["auc"][chosen] - row["auc"][plain]}} for row in cell], chosen),
            *(f"{mean_of(cell, name, 'tpr'):.3f}" for name in (plain, chosen)),
        ]
        for cell in cells_of(rows)
    ]
    header = ["weights", "audits", "moment", "AUC, last against start", "AUC, all checkpoints", "more"]
    return table([*header, f"TPR at FPR {FPR:g}, last", "TPR, all checkpoints"], lines)


def compare_all(cache: Path) -> dict[str, Any]:
    """Compare on every run in the cache."""
    found = {
        (corpus, kind, seed): path
        for corpus, kind in itertools.product(CORPORA, KINDS)
        for path in sorted(cache.glob(f"{corpus}_{kind}_seed*.npz"))
        for seed in [int(path.stem.split("seed")[1])]
    }
    rows = [row for (corpus, kind, seed), path in found.items() for row in compare(corpus, kind, seed, path)]
    packages = ("torch", "transformers", "peft", "numpy", "scipy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, "
        + versions,
        "setting": f"The demo's base model; records of {N_TOKENS[0]} to {N_TOKENS[1]} tokens; members, which "
        f"are the training set, and as many non-members: {N_PER_CLASS}; {EPOCHS} epochs, batch {BATCH_SIZE}, "
        f"AdamW, learning rate falling linearly from {KINDS}; LoRA {LORA}",
        "runs": [f"{corpus}, {kind}, seed {seed}" for corpus, kind, seed in found],
        "decided_on": DECIDED_ON,
        "decided": decide(rows),
        "rows": rows,
    }


def write(content: dict[str, Any]) -> None:
    """As JSON, with the names of the combinations once."""
    names = list(content["rows"][0]["auc"])
    rows = [
        {**row, **{f: [row[f][name] for name in names] for f in ("auc", "tpr")}} for row in content["rows"]
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({**content, "combinations": names, "rows": []}, indent=1)
    RESULT.write_text(head.replace('"rows": []', f'"rows": [\n{lines}\n]') + "\n", encoding="utf-8")


def read() -> dict[str, Any]:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    for row in content["rows"]:
        row |= {f: dict(zip(content["combinations"], row[f], strict=True)) for f in ("auc", "tpr")}
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "compare", "tables"])
    parser.add_argument("--cache", type=Path, help="folder for base models and token statistics")
    parser.add_argument("--data", type=Path, help="folder with wikitext-2/ and xsum-500.jsonl")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.what != "tables":
        if arguments.cache is None:
            parser.error(f"`{arguments.what}` needs --cache")
        arguments.cache.mkdir(parents=True, exist_ok=True)
        if arguments.what == "run":
            for corpus, seed, kind in itertools.product(arguments.corpora, arguments.seeds, arguments.kinds):
                collect(corpus, kind, seed, data=arguments.data, cache=arguments.cache)
        write(compare_all(arguments.cache))
    print_tables(read())


if __name__ == "__main__":
    main()
