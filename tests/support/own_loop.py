"""A hand-written training loop on the models of `tiny`."""

import torch
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import hold_out_canaries


def draw(*, n=120, n_members=30, n_non_members=60, seed=0):
    return hold_out_canaries(
        make_rows(make_texts(n)), n_members=n_members, n_non_members=n_non_members, seed=seed
    )


def train_one_epoch(model, rows, optimizer):
    model.train()
    for start in range(0, len(rows), 8):
        ids = torch.tensor([row["input_ids"] for row in rows[start : start + 8]])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def run(auditor, rows, *, learning_rate=1e-2, n_epochs=6, model=None):
    model = model or make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    auditor.begin(model)
    for epoch in range(1, n_epochs + 1):
        train_one_epoch(model, rows, optimizer)
        if auditor.audit(model, epoch=epoch).decision.stop:
            break
    return model
