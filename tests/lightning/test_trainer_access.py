"""What is borrowed of Lightning that it keeps private: all of it in one file, and all of it there."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_tiny import TinyModule, draw, make_loader, make_trainer
from private_names import private_names_in, private_names_outside
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

PACKAGE = Path(trainer_access.__file__).parent


def test_no_other_file_touches_what_is_private():
    # One callback asks another of its kind.
    own = {"_folder"}

    assert private_names_outside(PACKAGE, file="trainer_access.py", own=own) == {}


def test_every_private_name_that_is_touched_is_listed():
    touched = set(private_names_in(Path(trainer_access.__file__).read_text("utf-8")))

    assert touched == {name for name in PRIVATE if name.startswith("_")}


@pytest.mark.parametrize("name", [name for name in PRIVATE if name.startswith("_")])
def test_the_checkpoint_callback_of_this_release_has_what_is_borrowed(name):
    assert hasattr(ModelCheckpoint(), name)


class Look(Callback):
    """What a trainer tells when training begins, which is when it is asked."""

    def on_train_start(self, trainer, pl_module):
        self.found = {}
        for name in [name for name in PRIVATE if not name.startswith("_")]:
            owner = trainer
            for part in name.split("."):
                owner = getattr(owner, part)
            self.found[name] = owner
        self.told = (
            strategy_in_pieces(trainer),
            n_batches_done(trainer),
            batches_between_validations(trainer),
        )
        with forward_context(trainer)():
            pass


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_trainer_that_begins_has_what_is_borrowed(tmp_path):
    look = Look()

    make_trainer(tmp_path, [look], max_epochs=1).fit(TinyModule(make_model()), make_loader(draw()[0]))

    assert set(look.found) == {name for name in PRIVATE if not name.startswith("_")}
    assert (look.strategy, look.n_batches_done) == (None, 0)
    assert look.between is None or look.between > 0


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
