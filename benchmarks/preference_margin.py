"""Sum or mean: which margin of preference pairs tells members best, whatever the loss.

    python benchmarks/preference_margin.py [--seeds 3]

Trains a small GPT-2 of random weights by a hand-written loop of DPO on pairs of random tokens, 100 members
and 100 non-members, and prints the AUC of the margin as a sum over the tokens of each side, of the margin as
a mean over them, and of the loss difference on the chosen side alone. A few minutes on one CPU core; nothing
is read or downloaded.
"""

import argparse
import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ezmia_callbacks.functional import auc, loss_difference_score, margin_score

VOCABULARY, FIRST, END = 64, 3, 1
N_MEMBERS, N_PROMPT, BATCH_SIZE = 100, 6, 10
BETA = 0.1
EPOCHS = (2, 5)

LOSSES = {
    "sigmoid (sums)": lambda margins: -nn.functional.logsigmoid(BETA * margins).mean(),
    "sigmoid (means)": lambda margins: -nn.functional.logsigmoid(margins).mean(),
    "IPO (means)": lambda margins: ((margins - 1 / (2 * BETA)) ** 2).mean(),
}


class Pair(NamedTuple):
    """Token ids of a prompt and of its two answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def make_pair(kind: str, rng: np.random.Generator) -> Pair:
    """A pair of random tokens."""

    def tokens(fewest: int, most: int) -> list[int]:
        ids: list[int] = rng.integers(FIRST, VOCABULARY, int(rng.integers(fewest, most + 1))).tolist()
        return ids

    prompt = tokens(N_PROMPT, N_PROMPT)
    if kind == "one token differs":
        chosen = tokens(12, 12)
        rejected = list(chosen)
        at = int(rng.integers(12))
        n_ids = VOCABULARY - FIRST
        rejected[at] = int((chosen[at] - FIRST + rng.integers(1, n_ids)) % n_ids + FIRST)
    elif kind == "same beginning":
        start = tokens(4, 15)
        chosen, rejected = start + tokens(2, 8), start + tokens(2, 8)
    elif kind == "any lengths":
        chosen, rejected = tokens(3, 24), tokens(3, 24)
    else:
        chosen, rejected = tokens(10, 24), tokens(3, 9)
    return Pair(prompt, [*chosen, END], [*rejected, END])


KINDS = ("one token differs", "same beginning", "any lengths", "chosen is longer")


def log_probs(model: nn.Module, rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token of the answers, 0 elsewhere, and where they are, (n_rows, length - 1)."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, is_answer = torch.zeros_like(ids), torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        n = len(prompt) + len(answer)
        ids[i, :n], mask[i, :n] = torch.tensor(prompt + answer), 1
        is_answer[i, len(prompt) : n] = True
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    found = logits.gather(-1, ids[:, 1:, None])[..., 0]
    return found * is_answer[:, 1:], is_answer[:, 1:]


def sides(pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of the chosen sides, then of the rejected ones."""
    return [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]


def trained(pairs: list[Pair], loss: str, n_epochs: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """The model after so many epochs of DPO, and before."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=48,
            n_embd=64,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=END,
            eos_token_id=END,
        )
    ).train()
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rng = np.random.default_rng(seed)
    for _ in range(n_epochs):
        for numbers in np.array_split(rng.permutation(len(pairs)), len(pairs) // BATCH_SIZE):
            rows = sides([pairs[i] for i in numbers])
            with torch.no_grad():
                before, _ = log_probs(reference, rows)
            now, is_answer = log_probs(model, rows)
            shifts = (now - before).sum(1)
            if "means" in loss:
                shifts = shifts / is_answer.sum(1)
            chosen, rejected = shifts.chunk(2)
            optimizer.zero_grad()
            LOSSES[loss](chosen - rejected).backward()
            optimizer.step()
    return model.eval(), reference


def aucs(kind: str, loss: str, n_epochs: int, seed: int) -> tuple[float, float, float]:
    """AUC of the margin as a sum, of the margin as a mean, and of the chosen side's loss difference."""
    rng = np.random.default_rng(seed)
    pairs = [make_pair(kind, rng) for _ in range(2 * N_MEMBERS)]
    is_member = np.arange(len(pairs)) < N_MEMBERS
    models = trained(pairs[:N_MEMBERS], loss, n_epochs, seed)
    flat, borders = [], []
    for rows in (sides(pairs)[: len(pairs)], sides(pairs)[len(pairs) :]):
        for model in models:
            with torch.no_grad():
                found, is_answer = log_probs(model, rows)
            flat.append(found[is_answer].double().numpy())
        borders.append(np.concatenate([[0], np.cumsum(is_answer.sum(1).numpy())]))
    as_sum = margin_score(*flat, chosen_offsets=borders[0], rejected_offsets=borders[1])
    of_chosen, of_rejected = (
        loss_difference_score(*flat[2 * i : 2 * i + 2], offsets=borders[i]) for i in range(2)
    )
    scores = (as_sum, of_chosen - of_rejected, of_chosen)
    return tuple(auc(each, is_member) for each in scores)  # type: ignore[return-value]  # three of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case, whose AUCs are averaged")
    n_seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print("| Pairs | Loss | Epochs | Margin, sum | Margin, mean | Chosen side alone |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        for loss in LOSSES:
            for n_epochs in EPOCHS:
                found = np.mean([aucs(kind, loss, n_epochs, seed) for seed in range(n_seeds)], axis=0)
                print(
                    f"| {kind} | {loss} | {n_epochs} | " + " | ".join(f"{x:.3f}" for x in found) + " |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
