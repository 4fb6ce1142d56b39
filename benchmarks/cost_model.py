"""What audits cost, by arithmetic: nothing here is measured. Prints the tables of `docs/scaling.md`.

python benchmarks/cost_model.py
"""

import math

CANARY_SETS = [(1_000, 128), (1_000, 512), (10_000, 128), (10_000, 512)]  # canaries, tokens each
MODELS = {"135M": 135e6, "1B": 1e9, "8B": 8e9, "32B": 32e9, "70B": 70e9}  # parameters
TRAINING_TOKENS = [1e6, 10e6, 100e6]  # in one epoch
BATCH_SIZE = 16
PROCESSES = [1, 8, 64]

# Of a scored token: true-token log-probability, mean and deviation in float32, and one flag.
BYTES_PER_TOKEN = 13
# A weight as it is kept: as training holds it, not as it computes. FSDP2 with a mixed-precision policy, and
# autocast, compute in bfloat16 and hold float32.
BYTES_PER_WEIGHT = {"bfloat16": 2, "float32, or a mixed policy": 4}
N_SHARDS = 8


def n_forwards(n_canaries: int, *, n_processes: int) -> int:
    """Forward passes of each process in one audit, where processes share the records."""
    return math.ceil(math.ceil(n_canaries / BATCH_SIZE) / n_processes)


def flop_of_audit(n_parameters: float, n_tokens: int) -> float:
    """Two floating-point operations per parameter and token: one forward pass."""
    return 2 * n_parameters * n_tokens


def flop_of_training(n_parameters: float, n_tokens: float) -> float:
    """Six per parameter and token: forward pass, and a backward pass that costs twice as much."""
    return 6 * n_parameters * n_tokens


def bytes_of_kept_weights(n_parameters: float, *, held_in: str, n_shards: int = 1) -> float:
    """What each process that keeps a part writes, for weights that are all trained."""
    return n_parameters * BYTES_PER_WEIGHT[held_in] / n_shards


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def canary_table() -> str:
    """What does not depend on the model."""
    rows = []
    for n_canaries, length in CANARY_SETS:
        n_tokens = n_canaries * length
        forwards = [str(n_forwards(n_canaries, n_processes=n)) for n in PROCESSES]
        # The number of parameters cancels.
        shares = [flop_of_audit(1, n_tokens) / flop_of_training(1, n) for n in TRAINING_TOKENS]
        size = f"{BYTES_PER_TOKEN * n_tokens / 1e6:.1f} MB"
        rows.append([f"{n_canaries:,} of {length}", *forwards, size, *map(percent, shares)])
    header = ["canaries", *(f"passes, {n} proc." for n in PROCESSES), "statistics"]
    return table([*header, *(f"of an epoch of {n / 1e6:g}M" for n in TRAINING_TOKENS)], rows)


def model_table() -> str:
    """What depends on the model."""
    rows = []
    for name, n_parameters in MODELS.items():
        flops = [f"{flop_of_audit(n_parameters, n * length) / 1e15:.3g}" for n, length in CANARY_SETS]
        rows.append([name, *flops])
    return table(["PFLOP of an audit", *(f"{n:,} of {length}" for n, length in CANARY_SETS)], rows)


def kept_table() -> str:
    """Files of kept weights; the older ones stay until the new ones are whole."""
    rows = []
    for name, n_parameters in MODELS.items():
        cells = []
        for held_in in BYTES_PER_WEIGHT:
            whole = bytes_of_kept_weights(n_parameters, held_in=held_in) / 1e9
            shard = bytes_of_kept_weights(n_parameters, held_in=held_in, n_shards=N_SHARDS) / 1e9
            cells += [f"{whole:.3g} GB", f"{shard:.2g} GB", f"{2 * whole:.3g} GB"]
        rows.append([name, *cells])
    header = [
        f"{held_in}: {what}"
        for held_in in BYTES_PER_WEIGHT
        for what in ("whole", f"one of {N_SHARDS} shards", "at most on the disk")
    ]
    return table(["kept weights", *header], rows)


if __name__ == "__main__":
    print(canary_table(), model_table(), kept_table(), sep="\n\n")
