"""Small Lightning modules, loaders and runs."""

import numpy as np
import torch
from lightning import pytorch as pl
from tiny import make_model, make_rows, make_texts, make_tokenizer
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from ezmia_callbacks import hold_out_canaries

N_STEPS_IN_EPOCH = 8


def draw():
    """60 training rows, 8 steps of 8 an epoch; 30 members and 60 non-members."""
    return hold_out_canaries(make_rows(make_texts(120)), n_members=30, n_non_members=60, seed=0)


def collator():
    return DataCollatorForLanguageModeling(make_tokenizer(), mlm=False)


def make_loader(rows, *, is_shuffled=False, batch_size=8):
    return DataLoader(rows, batch_size=batch_size, shuffle=is_shuffled, collate_fn=collator())


def validation_loader():
    return make_loader(make_rows(make_texts(20, seed=8)), batch_size=16)


class Module:
    """What a user writes, for either package's `LightningModule`."""

    def __init__(self, model=None, learning_rate=1e-2):
        super().__init__()
        self.model = make_model() if model is None else model
        self.learning_rate = learning_rate

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate)


class TinyModule(Module, pl.LightningModule):
    """Holds a Hugging Face model."""


class Bare:
    """A language model of the user's own making, for either package; quick to train."""

    def __init__(self, learning_rate=1e-3, *, seed=0):
        super().__init__()
        self.learning_rate = learning_rate
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = torch.nn.Embedding(64, 32)
            self.head = torch.nn.Linear(32, 64)

    def loss(self, batch):
        logits = bare_logits(self, batch["input_ids"], None)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class BareModule(Bare, pl.LightningModule):
    """Holds no Hugging Face model."""


class DataModule(pl.LightningDataModule):
    """60 training rows and 20 for validation."""

    def train_dataloader(self):
        return make_loader(draw()[0], is_shuffled=True)

    def val_dataloader(self):
        return validation_loader()


def bare_logits(pl_module, input_ids, attention_mask) -> torch.Tensor:
    return pl_module.head(pl_module.embedding(input_ids))


def make_trainer(path, callbacks=(), *, package=pl, **arguments):
    settings = {
        "default_root_dir": path,
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 4,
        "callbacks": list(callbacks),
    } | arguments
    return package.Trainer(**settings)


def seed_everything(seed=3):
    torch.manual_seed(seed)
    np.random.seed(seed)


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_weights(module, expected):
    found = module if isinstance(module, dict) else module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def differs(module, other):
    return any(not torch.equal(tensor, other[name]) for name, tensor in module.state_dict().items())
