"""Does an attack that is trained on the canaries themselves find more leakage than the EZ score?

    python benchmarks/learned_attack.py demo --cache PATH/TO/cache
    python benchmarks/learned_attack.py smollm2 --cache PATH/TO/cache --data PATH/TO/wikitext-2

Fine-tunes a model on 1,000 member canaries, keeps the token statistics of 1,000 members and 1,000
non-members before training and after each epoch, and compares the package's scores with classifiers on
pooled features of the same statistics. Classifiers score only records that they were not trained on. The
statistics are cached, one file an epoch: the comparison can be made again without training, and of a run
that was broken off, with the epochs that there are (`--no-training`).

The demo's data are the docstrings of installed packages, its model is trained on the spot; SmolLM2-135M comes
out of a wheel, see `smollm2.py`. Prints Markdown tables, and writes all figures to `benchmarks/results/`.
"""

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
from scipy import stats
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer

from ezmia_callbacks import hold_out_canaries
from ezmia_callbacks.demo.base_model import train_base_model
from ezmia_callbacks.demo.corpus import package_docstrings, standard_library_docstrings
from ezmia_callbacks.files import write_atomically
from ezmia_callbacks.functional import (
    auc,
    delong_interval,
    hanley_mcneil_standard_error,
    paired_delong_difference,
    tpr_at_fpr,
    tpr_at_fpr_lower_bound,
)
from ezmia_callbacks.scoring.forward import token_statistics
from ezmia_callbacks.scoring.rows import encode_canaries
from ezmia_callbacks.scoring.statistics import TokenStatistics, score_records

RESULTS = Path(__file__).parent / "results"
SCORES = ("ez", "loss_difference", "wbc", "calibrated_min_k_plus_plus")
FPR_LEVELS = (0.01, 0.1)
N_FOLDS = 5
# Each repeats the folds with another shuffle; a record's score is its mean over them.
N_REPEATS = 3
# Permuted labels show how much wider than DeLong's formula the AUC of cross-fitted scores spreads.
N_PERMUTATIONS = 20
CONFIDENCE = 0.95


# ---------------------------------------------------------------------------------- fine-tuning and cache


class Material(NamedTuple):
    """A base model and the token rows of one setting."""

    fresh: Callable[[], Any]
    pool: list[dict[str, list[int]]]
    learning_rates: dict[str, float]
    lora: dict[str, int]
    description: str


def demo_material(arguments: argparse.Namespace, seed: int) -> Material:
    """The demo's small model, and documentation of five packages that its tokenizer did not see."""
    trained = train_base_model(standard_library_docstrings(), seed=seed)
    state = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}

    def fresh() -> Any:
        model = type(trained.model)(trained.model.config)
        model.load_state_dict(state)
        return model

    texts = package_docstrings("scipy", "sklearn", "numpy", "torch", "transformers")
    order = np.random.default_rng(seed).permutation(len(texts))
    n_pool = arguments.members + arguments.non_members + 500
    rows = [
        {"input_ids": trained.tokenizer(texts[i], truncation=True, max_length=128)["input_ids"]}
        for i in order[:n_pool]
    ]
    return Material(
        fresh,
        rows,
        {"full": 5e-4, "lora": 2e-3},
        {"r": 8, "lora_alpha": 16},
        f"the demo's base model ({trained.model.num_parameters() / 1e6:.1f} M weights), package "
        "documentation, records of at most 128 tokens",
    )


def smollm2_material(arguments: argparse.Namespace, seed: int) -> Material:
    """SmolLM2-135M and paragraphs of WikiText-2."""
    from smollm2 import load_base, read_records

    _, tokenizer = load_base()
    pool = read_records(arguments.data, tokenizer, n_tokens=32).shuffle(seed=seed)
    return Material(
        lambda: load_base()[0],
        [{"input_ids": row} for row in pool["input_ids"][: arguments.members + arguments.non_members]],
        {"full": 1e-4, "lora": 5e-4},
        {"r": 16, "lora_alpha": 32},
        "SmolLM2-135M-Instruct (Q4_1 weights, dequantized to float32), WikiText-2, records of 32 tokens",
    )


MATERIALS = {"demo": demo_material, "smollm2": smollm2_material}


def collect(material: Material, kind: str, *, arguments: argparse.Namespace, seed: int, folder: Path) -> None:
    """Fine-tune once at a constant learning rate; cache the statistics after each epoch."""
    train_rows, canaries = hold_out_canaries(
        material.pool, n_members=arguments.members, n_non_members=arguments.non_members, seed=seed
    )
    encoded = encode_canaries(canaries)
    transformers.set_seed(seed)
    model = material.fresh()
    if kind == "lora":
        model = peft.get_peft_model(
            model, peft.LoraConfig(**material.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    reference = token_statistics(model, encoded.rows, batch_size=32)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=material.learning_rates[kind])
    rng = np.random.default_rng(seed)
    for epoch in range(1, arguments.epochs + 1):
        started = time.perf_counter()
        loss = train_epoch(model, optimizer, train_rows, rng)
        target = token_statistics(model, encoded.rows, batch_size=32)
        save_epoch(
            folder / f"{kind}_seed{seed}_epoch{epoch}.npz",
            target,
            reference,
            encoded.is_member,
            note=f"{material.description}; {len(train_rows)} training records; learning rate "
            f"{material.learning_rates[kind]:g}; {material.lora if kind == 'lora' else 'all weights'}",
        )
        spent = time.perf_counter() - started
        print(f"trained {kind}, seed {seed}, epoch {epoch}: loss {loss:.3f}, {spent:.0f} s", flush=True)


def train_epoch(
    model: Any, optimizer: Any, rows: Sequence[dict[str, Any]], rng: np.random.Generator
) -> float:
    """Mean training loss of one pass over the rows, 8 at a time."""
    model.train()
    losses = []
    order = rng.permutation(len(rows))
    for start in range(0, len(order), 8):
        ids = [torch.tensor(rows[i]["input_ids"]) for i in order[start : start + 8]]
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        loss = model(
            input_ids=padded, attention_mask=mask.long(), labels=padded.masked_fill(~mask, -100)
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def save_epoch(
    path: Path, target: TokenStatistics, reference: TokenStatistics, is_member: np.ndarray, *, note: str
) -> None:
    arrays = {
        f"{side}_{field.name}": getattr(statistics, field.name)
        for side, statistics in (("target", target), ("reference", reference))
        for field in fields(TokenStatistics)
    }
    # Whole or not at all: the run may be stopped at any moment.
    content = io.BytesIO()
    np.savez_compressed(content, is_member=is_member, note=note, **arrays)
    write_atomically(path, content.getvalue())


class Epoch(NamedTuple):
    """The statistics of one epoch, as they were cached."""

    target: TokenStatistics
    reference: TokenStatistics
    is_member: np.ndarray
    note: str


def load_epoch(path: Path) -> Epoch:
    with np.load(path) as arrays:
        sides = [
            TokenStatistics(**{f.name: arrays[f"{side}_{f.name}"] for f in fields(TokenStatistics)})
            for side in ("target", "reference")
        ]
        return Epoch(*sides, arrays["is_member"], str(arrays["note"]))


# -------------------------------------------------------------------------------------- learned attacks


def pooled_features(target: TokenStatistics, reference: TokenStatistics) -> np.ndarray:
    """What the token statistics of each record say, pooled: (n_records, n_features), finite."""
    shifts = target.log_probs.astype(np.float64) - reference.log_probs
    z_shifts = z_values(target) - z_values(reference)
    rows = []
    for start, stop in zip(target.offsets[:-1], target.offsets[1:], strict=True):
        span = slice(start, stop)
        rows.append(
            record_features(
                shifts[span],
                z_shifts[span],
                target.log_probs[span].astype(np.float64),
                reference.log_probs[span].astype(np.float64),
                (target.means - reference.means)[span],
                ~target.is_correct[span],
                ~reference.is_correct[span],
            )
        )
    return np.array(rows)


def record_features(
    shifts: np.ndarray,
    z_shifts: np.ndarray,
    target: np.ndarray,
    reference: np.ndarray,
    entropy_shifts: np.ndarray,
    is_error: np.ndarray,
    was_error: np.ndarray,
) -> list[float]:
    """34 numbers. The difference of the first two is the logarithm of the EZ score: a linear model has it."""
    # A record without error tokens has shifts of 0 on them: its counts say that there are none.
    errors = shifts[is_error] if is_error.any() else np.zeros(1)
    others = shifts[~is_error] if not is_error.all() else np.zeros(1)
    hard = shifts[np.argsort(reference)[: max(1, len(shifts) // 5)]]
    return [
        np.log(np.maximum(errors, 0.0).sum() + 1e-3),
        np.log(np.maximum(-errors, 0.0).sum() + 1e-3),
        errors.mean(),
        errors.std(),
        *np.quantile(errors, [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]),
        (errors > 0).mean(),
        others.mean(),
        *np.quantile(others, [0.0, 0.5, 1.0]),
        (others > 0).mean(),
        shifts.mean(),
        shifts.std(),
        *np.quantile(shifts, [0.1, 0.5, 0.9]),
        (shifts > 0).mean(),
        hard.mean(),
        z_shifts.mean(),
        np.sort(z_shifts)[: max(1, len(shifts) // 5)].mean(),
        entropy_shifts.mean(),
        target.mean(),
        reference.mean(),
        float(len(shifts)),
        is_error.mean(),
        was_error.mean(),
        (was_error & ~is_error).mean(),
        (is_error & ~was_error).mean(),
    ]


def z_values(statistics: TokenStatistics) -> np.ndarray:
    """Log-probabilities in units of the model's own spread, as in Min-K%++."""
    spread = np.maximum(statistics.standard_deviations.astype(np.float64), 1e-6)
    return (statistics.log_probs - statistics.means) / spread


def logistic_regression(seed: int) -> Any:
    # Shifts are heavy-tailed: each feature by its quantiles in the training folds, as normal scores.
    scaler = QuantileTransformer(n_quantiles=200, output_distribution="normal", random_state=seed)
    return make_pipeline(scaler, LogisticRegression(C=0.05, max_iter=500))


def boosted_trees(seed: int) -> Any:
    return HistGradientBoostingClassifier(
        learning_rate=0.05, max_iter=100, max_leaf_nodes=8, min_samples_leaf=20, random_state=seed
    )


CLASSIFIERS = {"logistic regression": logistic_regression, "boosted trees": boosted_trees}


def out_of_fold_scores(
    make_classifier: Callable[[int], Any],
    features: np.ndarray,
    is_member: np.ndarray,
    *,
    seed: int,
    permutation: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of records by classifiers that were not trained on them, and the labels that were used.

    Folds are stratified and of one size, so that log-odds of different folds can be compared. A permutation
    of the labels stays within folds, which leaves them stratified.
    """
    folds = list(StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed).split(features, is_member))
    labels = is_member.copy()
    if permutation is not None:
        for _, tested in folds:
            labels[tested] = permutation.permutation(labels[tested])
    scores = np.empty(len(labels))
    for trained, tested in folds:
        classifier = make_classifier(seed).fit(features[trained], labels[trained])
        scores[tested] = classifier.decision_function(features[tested])
    return scores, labels


class LearnedScores(NamedTuple):
    """Mean out-of-fold log-odds over the repeats, (n_records,), and the AUC of each repeat alone."""

    scores: np.ndarray
    aucs: list[float]


def learned_scores(name: str, features: np.ndarray, is_member: np.ndarray) -> LearnedScores:
    repeats = [
        out_of_fold_scores(CLASSIFIERS[name], features, is_member, seed=seed)[0] for seed in range(N_REPEATS)
    ]
    return LearnedScores(np.mean(repeats, axis=0), [auc(scores, is_member) for scores in repeats])


def widening(name: str, features: np.ndarray, is_member: np.ndarray) -> float:
    """Spread of the AUC under permuted labels, by that of independent scores; DeLong's formula says 1."""
    rng = np.random.default_rng(0)
    permuted = [
        auc(*out_of_fold_scores(CLASSIFIERS[name], features, is_member, seed=0, permutation=rng))
        for _ in range(N_PERMUTATIONS)
    ]
    n_members = int(is_member.sum())
    expected = hanley_mcneil_standard_error(
        0.5, n_members=n_members, n_non_members=len(is_member) - n_members
    )
    # Around the known mean of one half.
    return float(np.sqrt(np.mean(np.square(np.array(permuted) - 0.5)))) / expected


def normal_ranks(scores: np.ndarray) -> np.ndarray:
    """Scores as normal quantiles of their ranks: two scores then weigh the same in a sum."""
    return np.asarray(stats.norm.ppf((stats.rankdata(scores) - 0.5) / len(scores)))


# ------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Row:
    """One attack on one epoch; differences are to the EZ score, intervals DeLong's, not widened."""

    kind: str
    seed: int
    epoch: int
    attack: str
    auc: float
    auc_lower: float
    auc_upper: float
    difference: float
    difference_lower: float
    difference_upper: float
    tpr_at_1_percent: float
    certified_tpr_at_1_percent: float
    tpr_at_10_percent: float
    certified_tpr_at_10_percent: float
    aucs_of_repeats: list[float] | None


def compare(path: Path) -> list[Row]:
    """A row for each attack on a cached epoch."""
    epoch = load_epoch(path)
    kind, seed, number = path.stem.split("_")
    is_member = epoch.is_member
    features = pooled_features(epoch.target, epoch.reference)
    scores = {name: score_records(name, epoch.target, epoch.reference) for name in SCORES}
    # What can be had without training: an equal vote of all four.
    vote = np.sum([normal_ranks(values) for values in scores.values()], axis=0)
    scores["vote of the four scores"] = vote
    learned = {name: learned_scores(name, features, is_member) for name in CLASSIFIERS}
    for name, found in learned.items():
        scores[name] = found.scores
        scores[f"ez + {name}"] = normal_ranks(scores["ez"]) + normal_ranks(found.scores)
    rows = []
    for name, values in scores.items():
        interval = delong_interval(values, is_member, confidence=CONFIDENCE)
        against = paired_delong_difference(values, scores["ez"], is_member, confidence=CONFIDENCE)
        rates = [
            rate
            for fpr in FPR_LEVELS
            for rate in (
                tpr_at_fpr(values, is_member, fpr=fpr),
                tpr_at_fpr_lower_bound(values, is_member, fpr=fpr, failure_probability=1.0 - CONFIDENCE),
            )
        ]
        rows.append(
            Row(
                kind,
                int(seed.removeprefix("seed")),
                int(number.removeprefix("epoch")),
                name,
                auc(values, is_member),
                interval.lower,
                interval.upper,
                against.difference,
                against.interval.lower,
                against.interval.upper,
                *rates,
                learned[name].aucs if name in learned else None,
            )
        )
    return rows


def widenings_of(path: Path) -> dict[str, float]:
    """The widening of each classifier's AUC, by its name."""
    epoch = load_epoch(path)
    features = pooled_features(epoch.target, epoch.reference)
    return {name: widening(name, features, epoch.is_member) for name in CLASSIFIERS}


COLUMNS = (
    "fine-tuning",
    "seed",
    "epoch",
    "attack",
    "AUC [95 %]",
    "AUC less that of EZ [95 %]",
    "TPR at 1 % FPR (certified)",
    "TPR at 10 % FPR (certified)",
)


def cells(row: Row) -> list[str]:
    """One line of the table."""
    difference = f"{row.difference:+.3f} [{row.difference_lower:+.3f}, {row.difference_upper:+.3f}]"
    return [
        row.kind,
        str(row.seed),
        str(row.epoch),
        row.attack.replace("_", " "),
        f"{row.auc:.3f} [{row.auc_lower:.3f}, {row.auc_upper:.3f}]",
        "" if row.attack == "ez" else difference,
        f"{row.tpr_at_1_percent:.3f} ({row.certified_tpr_at_1_percent:.3f})",
        f"{row.tpr_at_10_percent:.3f} ({row.certified_tpr_at_10_percent:.3f})",
    ]


def print_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    for line in (columns, ["---"] * len(columns), *lines):
        print("| " + " | ".join(line) + " |")
    print(flush=True)


def widened_lower(row: Row, widenings: dict[str, dict[str, float]]) -> float:
    """Lower bound of the difference to EZ, further away where a classifier is part of the attack."""
    factors = [factor for name, factor in widenings[row.kind].items() if row.attack.endswith(name)]
    return row.difference - max([1.0, *factors]) * (row.difference - row.difference_lower)


def print_means(rows: Sequence[Row], widenings: dict[str, dict[str, float]]) -> None:
    """The mean over seeds, and in how many runs an attack is surely better than the EZ score by 0.01."""
    groups: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.kind, row.epoch, row.attack].append(row)
    print_table(
        ("fine-tuning", "epoch", "attack", "runs", "AUC", "less that of EZ, smallest to largest",
         "lower bound above +0.01", "TPR at 1 % FPR (certified)"),
        [
            [
                kind,
                str(epoch),
                attack.replace("_", " "),
                str(len(group)),
                f"{np.mean([row.auc for row in group]):.3f}",
                f"{np.mean([row.difference for row in group]):+.3f}, "
                f"{min(row.difference for row in group):+.3f} to "
                f"{max(row.difference for row in group):+.3f}",
                f"{sum(widened_lower(row, widenings) > 0.01 for row in group)} of {len(group)}",
                f"{np.mean([row.tpr_at_1_percent for row in group]):.3f} "
                f"({np.mean([row.certified_tpr_at_1_percent for row in group]):.3f})",
            ]
            for (kind, epoch, attack), group in groups.items()
        ],
    )  # fmt: skip


def compare_all(folder: Path, *, setting: str) -> None:
    """Compare on every epoch in the cache; print the tables, and write all figures."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "peft", "scikit-learn", "numpy")
    )
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    print(f"{machine}, {versions}\n")
    paths = sorted(folder.glob("*.npz"))
    notes = {path.stem: load_epoch(path).note for path in paths}
    last_of_kind = {path.stem.split("_")[0]: path for path in paths}
    # Started afresh: OpenMP threads of a training process do not survive a fork.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        compared = pool.map(compare, paths)
        widened = pool.map(widenings_of, last_of_kind.values())
        rows = [row for found in compared for row in found]
        widenings = dict(zip(last_of_kind, widened, strict=True))
    print("\n".join(dict.fromkeys(notes.values())), end="\n\n")
    print_table(COLUMNS, map(cells, rows))
    print_means(rows, widenings)
    repeats = [np.std(row.aucs_of_repeats, ddof=1) for row in rows if row.aucs_of_repeats]
    print(f"AUC of another shuffle of the folds: standard deviation {np.mean(repeats):.4f} on average.")
    for kind, factors in widenings.items():
        print(f"{kind}: permuted labels spread the AUC " + ", ".join(
            f"{factor:.2f} times ({name})" for name, factor in factors.items()
        ) + f" as much as independent scores would ({N_PERMUTATIONS} permutations).")  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    content = {
        "machine": machine,
        "versions": versions,
        "settings": notes,
        "widening": widenings,
        "rows": [asdict(row) for row in rows],
    }
    path = RESULTS / f"learned_attack_{setting}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=MATERIALS)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the token statistics")
    parser.add_argument("--data", type=Path, help="folder of WikiText-2, for smollm2")
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--non-members", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--no-training", action="store_true", help="compare what is cached already")
    parser.add_argument("--no-comparison", action="store_true", help="only fill the cache")
    arguments = parser.parse_args()
    folder = arguments.cache / arguments.setting
    if not arguments.no_training:
        for seed in arguments.seeds:
            material = MATERIALS[arguments.setting](arguments, seed)
            for kind in arguments.kinds:
                if not (folder / f"{kind}_seed{seed}_epoch{arguments.epochs}.npz").exists():
                    collect(material, kind, arguments=arguments, seed=seed, folder=folder)
    if not arguments.no_comparison:
        compare_all(folder, setting=arguments.setting)


if __name__ == "__main__":
    main()
