"""Trainings that feed more than token ids, and the loss that their own batches have."""

import numpy as np
import torch
from tiny import make_model, make_rows, make_texts
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from ezmia_callbacks import hold_out_canaries

# Images are this many numbers.
N_PIXELS = 6
IMAGE_TOKEN = 3


def make_mixed_rows(n_each=20):
    """Rows of several lengths, 4 to 12 tokens."""
    return [row for n in (4, 6, 9, 12) for row in make_rows(make_texts(n_each, seed=n, n_words=n))]


def make_image_rows(n=80):
    """Rows that begin with a token for the image; some say the same words about another."""
    rng = np.random.default_rng(0)
    rows = make_mixed_rows(n // 4)
    for row in rows:
        row |= {
            name: [IMAGE_TOKEN if name == "input_ids" else 1, *row[name]]
            for name in ("input_ids", "attention_mask")
        }
        row["image"] = rng.normal(size=N_PIXELS).astype(np.float32)
    return rows


def draw(rows):
    return hold_out_canaries(rows, n_members=20, n_non_members=25, seed=0)


def collator(*, side="left", padding="longest", extra=None):
    """Pads on a side; `extra` adds further inputs, given the rows and the batch."""

    def collate(rows):
        length = 16 if padding == "max_length" else max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            where = slice(length - n, length) if side == "left" else slice(0, n)
            ids[i, where], mask[i, where] = torch.tensor(list(row["input_ids"])), 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        return batch | ({} if extra is None else extra(rows, batch))

    return collate


def token_types(rows, batch):
    """Two types, which GPT-2 embeds like words."""
    return {"token_type_ids": (batch["input_ids"] % 2) * batch["attention_mask"]}


def shifted_positions(rows, batch):
    return {"position_ids": (batch["attention_mask"].cumsum(1) - 1 + 5).clamp(min=0)}


def stored_positions(rows, batch):
    """From a column of the rows, padded on the right."""
    found = torch.zeros_like(batch["input_ids"])
    for i, row in enumerate(rows):
        found[i, : len(row["position_ids"])] = torch.tensor(row["position_ids"])
    return {"position_ids": found}


def plain_positions(rows, batch):
    return {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def images(rows, batch):
    """All images of a batch, one after the other; by chance a little brighter, as augmentation makes them."""
    pixels = [torch.as_tensor(np.asarray(row["image"], dtype=np.float32)) for row in rows]
    return {"pixel_values": torch.cat(pixels) + 1e-6 * torch.rand(1)}


class SeesImages(nn.Module):
    """A language model whose predictions depend on the image of the record, with a Hugging Face face."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.language = make_model()
            self.eye = nn.Linear(N_PIXELS, 32)
        self.config = self.language.config

    def get_input_embeddings(self):
        return self.language.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language.get_output_embeddings()

    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None):
        embedded = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = 3 * self.eye(pixel_values.view(len(input_ids), N_PIXELS))
            is_image = (input_ids == IMAGE_TOKEN)[..., None]
            embedded = torch.where(is_image, seen[:, None], embedded)
        logits = self.language(inputs_embeds=embedded, attention_mask=attention_mask).logits
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def make_dynamic_llama():
    """Takes 8 tokens by its configuration, and more by dynamic scaling of its positions."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8,
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


FORMS = {
    "left padding": (make_model, make_mixed_rows, collator()),
    "left padding to one length": (make_model, make_mixed_rows, collator(padding="max_length")),
    "token types": (make_model, make_mixed_rows, collator(side="right", extra=token_types)),
    "token types, left padding": (make_model, make_mixed_rows, collator(extra=token_types)),
    "positions": (make_model, make_mixed_rows, collator(side="right", extra=shifted_positions)),
    "positions, left padding": (make_model, make_mixed_rows, collator(extra=shifted_positions)),
    "images": (SeesImages, make_image_rows, collator(side="right", extra=images)),
}


def batches_of(rows, collate, *, batch_size=8):
    """Batches of rows in the order in which canaries are dealt to batches."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [
        (
            [int(i) for i in order[at : at + batch_size]],
            collate([rows[i] for i in order[at : at + batch_size]]),
        )
        for at in range(0, len(order), batch_size)
    ]


def losses_as_trained(model, rows, collate, *, batch_size=8):
    """Mean loss of each row in the collator's own batches, handed to the model as a trainer does."""
    found = np.zeros(len(rows))
    was_training = model.training
    model.eval()
    for numbers, batch in batches_of(rows, collate, batch_size=batch_size):
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        found[numbers] = (losses.sum(1) / (labels != -100).sum(1)).numpy()
    model.train(was_training)
    return found


def losses_as_audited(auditor):
    """Mean loss of each record at the last audit."""
    target = auditor.target
    return np.array(
        [-target.log_probs[a:b].mean() for a, b in zip(target.offsets, target.offsets[1:], strict=False)]
    )
