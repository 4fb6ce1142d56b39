"""What keeping the weights costs a training: seconds in which it stands still, and bytes that are written.

    python benchmarks/kept_weights.py                # 135 million parameters; some minutes on two idle cores
    python benchmarks/kept_weights.py --layers 12

A Llama of SmolLM2-135M's shape with random float32 weights is trained for a few steps; between them its
weights are kept. Side by side, in turn: written at once, as the first version did it (`torch.save`, wait for
the disk, rename); in the background; and by a second name of the trainer's own checkpoint. Medians of rounds;
a step is timed with and without a write under way. Prints a Markdown table and writes it, with machine and
versions, to `benchmarks/results/kept_weights.json`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from ezmia_callbacks.audit.checkpoint_check import other_weights_in
from ezmia_callbacks.audit.imprint import Imprint
from ezmia_callbacks.audit.kept_weights import KeptWeights

RESULTS = Path(__file__).parent / "results" / "kept_weights.json"


def make_model(n_layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1_536,
            num_hidden_layers=n_layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def bytes_in(folder: Path) -> int:
    """Bytes on the disk that no other folder has a name for, too."""
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1
    )


def write_at_once(model: torch.nn.Module, folder: Path) -> None:
    """What the first version did at each audit within the budget."""
    temporary = folder / ".weights.tmp"
    with temporary.open("wb") as file:
        torch.save({"step": 1, "tensors": dict(model.named_parameters())}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "weights.pt")


def measure(n_layers: int, n_rounds: int) -> dict[str, object]:
    model = make_model(n_layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 49_152, (2, 64))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    taken: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        taken.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "once").mkdir()
        background, pinned = KeptWeights(root / "background"), KeptWeights(root / "pinned")
        for kept in (background, pinned):
            kept.begin(model, Imprint.of(model))
        for i in range(n_rounds):
            note("a step", seconds(step))
            note("at once: stands still", seconds(lambda: write_at_once(model, root / "once")))
            note("imprint", seconds(lambda: Imprint.of(model)))
            present = Imprint.of(model)
            note(
                "background: stands still",
                seconds(lambda i=i, p=present: background.save(model, step=i, present=p)),
            )
            note("background: a step meanwhile", seconds(step))
            background.settle()
            checkpoint = root / f"checkpoint-{i}"
            model.save_pretrained(checkpoint)
            present = Imprint.of(model)
            note(
                "checkpoint: stands still",
                seconds(lambda i=i, p=present, c=checkpoint: expect_and_pin(pinned, model, i, p, c)),
            )
            note("checkpoint: a step meanwhile", seconds(step))
            pinned.settle()
            if i:
                remove(root / f"checkpoint-{i - 1}")
        written = {
            "at once": bytes_in(root / "once"),
            "background": bytes_in(root / "background"),
            "checkpoint": bytes_in(root / "pinned"),
        }
        note("put back and compared", seconds(lambda: background.restore(model)))
    return {
        "bytes_of_weights": n_bytes,
        "bytes_written": written,
        "seconds": {name: statistics.median(values) for name, values in taken.items()},
    }


def expect_and_pin(
    kept: KeptWeights, model: torch.nn.Module, step: int, present: Imprint, checkpoint: Path
) -> None:
    kept.expect_checkpoint(model, step=step, present=present)
    # Read, and compared with what was audited.
    assert not other_weights_in(checkpoint, model, present)
    kept.pin(model, checkpoint)


def remove(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()


def table(found: dict) -> str:
    took, wrote = found["seconds"], found["bytes_written"]
    rows = [
        ("written at once (first version)", took["at once: stands still"], None, wrote["at once"]),
        (
            "in the background",
            took["background: stands still"],
            took["background: a step meanwhile"],
            wrote["background"],
        ),
        (
            "by the trainer's checkpoint",
            took["checkpoint: stands still"],
            took["checkpoint: a step meanwhile"],
            wrote["checkpoint"],
        ),
    ]
    lines = [
        "| Kept | training stands still | a step meanwhile / a step | bytes written |",
        "| --- | --- | --- | --- |",
    ]
    for name, still, meanwhile, n_bytes in rows:
        ratio = "" if meanwhile is None else f"{meanwhile / took['a step']:.2f}"
        lines.append(f"| {name} | {still:.2f} s | {ratio} | {n_bytes / 1e6:,.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found = measure(arguments.layers, arguments.rounds)
    found["machine"] = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(table(found))
    print(json.dumps(found, indent=1))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
