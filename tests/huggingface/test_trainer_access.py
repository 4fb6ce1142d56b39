"""What is borrowed of a trainer that its makers keep private: all of it in one file, and all of it there."""

import inspect
import pickle
from pathlib import Path

import pytest
import transformers
from huggingface_tiny import make_trainer
from private_names import private_names_in, private_names_outside
from tiny import make_rows, make_texts

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.huggingface import trainer_access
from ezmia_callbacks.huggingface.trainer_access import (
    PRIVATE,
    TrainerReference,
    columns_kept,
    run_folder,
    tokenizer_of,
)

PACKAGE = Path(trainer_access.__file__).parent
TRAINERS = inspect.getsource(transformers.Trainer)


def test_no_other_file_touches_what_is_private():
    # One callback asks another of its kind.
    own = {"_folder"}

    assert private_names_outside(PACKAGE, file="trainer_access.py", own=own) == {}


def test_every_private_name_that_is_touched_is_listed_and_every_listed_one_is_touched():
    touched = set(private_names_in(Path(trainer_access.__file__).read_text("utf-8"))) - {"_getframe"}

    assert touched == set(PRIVATE)


@pytest.mark.parametrize("name", [name for name, of in PRIVATE.items() if of.startswith("Trainer")])
def test_the_trainer_of_this_release_has_what_is_borrowed(name):
    if name == "_trial":
        # Set when a search begins.
        assert "self._trial" in TRAINERS
    else:
        assert name in TRAINERS


@pytest.mark.parametrize("name", [name for name, of in PRIVATE.items() if of.startswith("TRL")])
def test_trl_of_this_release_has_what_is_borrowed(name):
    trl = pytest.importorskip("trl")

    if PRIVATE[name].endswith("older releases"):
        # What is absent there is false.
        assert trainer_access.skips_preparation.__doc__
    else:
        assert name in inspect.getsource(trl.SFTTrainer) or name == "_formatting_func"
        assert hasattr(trl.SFTTrainer, "_prepare_dataset")


def test_the_scan_sees_a_private_name():
    assert list(private_names_in("trainer._trial")) == ["_trial"]
    assert list(private_names_in("getattr(trainer, '_trial', None)")) == ["_trial"]
    assert list(private_names_in("self._own, trainer.args, trainer.__dict__")) == []


class Hook:
    """Called back as a trainer calls its callbacks."""

    def __init__(self):
        self.reference = TrainerReference()

    def on_train_begin(self, *args, **kwargs):
        self.found = self.reference.of(self)

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_trainer_that_calls_a_hook_is_found(tmp_path):
    hook = Hook()
    trainer = make_trainer(tmp_path, make_rows(make_texts(16)), [hook], max_steps=1)

    trainer.train()

    assert hook.found is trainer


def test_without_a_trainer_up_the_stack_it_is_said_what_to_pass():
    with pytest.raises(ConfigurationError, match="No Trainer was found: pass the callback in"):
        TrainerReference().of(object())


def test_a_given_trainer_is_taken_and_stays_in_its_process(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(make_texts(16)))
    reference = TrainerReference(trainer)

    assert reference.of(object()) is trainer
    with pytest.raises(ConfigurationError, match="No Trainer was found"):
        pickle.loads(pickle.dumps(reference)).of(object())


def test_a_trainer_tells_its_folder_its_tokenizer_and_its_columns(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(make_texts(16)))

    assert run_folder(trainer) == tmp_path
    assert tokenizer_of(trainer) is trainer.processing_class
    assert {"input_ids", "labels"} <= columns_kept(trainer)
