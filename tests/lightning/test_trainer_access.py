"""What is borrowed of Lightning that it keeps private: all of it in one file, and all of it there."""

import re
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_tiny import TinyModule, draw, make_loader, make_trainer, validation_loader
from private_names import (
    borrowed_names_in,
    files_that_touch,
    private_names_in,
    private_names_outside,
)
from tiny import make_model

from ezmia_callbacks.lightning import trainer_access
from ezmia_callbacks.lightning.trainer_access import (
    PRIVATE,
    batches_between_validations,
    forward_context,
    n_batches_done,
    saves_by_the_clock,
    saving_intervals,
    skip_this_save,
    strategy_in_pieces,
)

FILE = Path(trainer_access.__file__)
LAST_PARTS = {name.rpartition(".")[2] for name in PRIVATE}


def test_no_other_file_of_the_package_touches_what_is_borrowed():
    assert files_that_touch(LAST_PARTS, but=FILE) == {}


def test_no_other_file_for_lightning_touches_anything_private():
    # One callback asks another of its kind.
    assert private_names_outside(FILE.parent, file=FILE.name, own={"_folder"}) == {}


def test_every_private_name_that_is_touched_is_listed_and_every_listed_one_is_touched():
    source = FILE.read_text("utf-8")

    assert set(private_names_in(source)) == {name for name in PRIVATE if name.startswith("_")}
    assert set(borrowed_names_in(source)) >= LAST_PARTS


@pytest.mark.parametrize("name", PRIVATE)
def test_of_every_name_it_is_said_whose_it_is_what_was_tried_and_what_follows_without_it(name):
    assert re.fullmatch(r"(Trainer|ModelCheckpoint): .+\. Tried: Lightning .+\. Missing: .+\.", PRIVATE[name])


@pytest.mark.parametrize("name", [name for name in PRIVATE if name.startswith("_")])
def test_the_checkpoint_callback_of_this_release_has_what_is_borrowed(name):
    assert hasattr(ModelCheckpoint(), name)


class Look(Callback):
    """Asks a trainer when training begins, as the audit does; older releases do not know all of it before."""

    def on_train_start(self, trainer, pl_module):
        self.found = set()
        for name in [name for name in PRIVATE if not name.startswith("_")]:
            owner = trainer
            for part in name.split("."):
                owner = getattr(owner, part)
            self.found.add(name)
        self.strategy = strategy_in_pieces(trainer)
        self.n_batches_done = n_batches_done(trainer)
        self.between = batches_between_validations(trainer)
        with forward_context(trainer)():
            pass


@pytest.mark.filterwarnings(
    # Raised by Lightning and torch of themselves.
    "ignore:.*does not have many workers.*",
    "ignore:.*isinstance.treespec, LeafSpec.*",
    "ignore:.*pin_memory.*:UserWarning",
)
def test_a_trainer_that_begins_has_what_is_borrowed(tmp_path):
    look, loader = Look(), make_loader(draw()[0])

    make_trainer(tmp_path, [look], max_epochs=1).fit(TinyModule(make_model()), loader, validation_loader())

    assert look.found == {name for name in PRIVATE if not name.startswith("_")}
    assert (look.strategy, look.n_batches_done, look.between) == (None, 0, len(loader))


def test_checkpoints_by_steps_and_by_the_clock_are_told_apart(tmp_path):
    from datetime import timedelta

    by_steps = ModelCheckpoint(tmp_path, every_n_train_steps=5)
    by_clock = ModelCheckpoint(tmp_path, train_time_interval=timedelta(minutes=1))
    trainer = make_trainer(tmp_path, [by_steps, by_clock], enable_checkpointing=True)

    assert list(saving_intervals(trainer)) == [5]
    assert [saves_by_the_clock(callback) for callback in (by_steps, by_clock)] == [False, True]


def test_a_save_that_is_skipped_counts_as_made(tmp_path):
    saver = ModelCheckpoint(tmp_path)
    trainer = make_trainer(tmp_path, [saver], enable_checkpointing=True)

    skip_this_save(trainer)

    assert saver._last_global_step_saved == trainer.global_step
