"""What is borrowed of a trainer that its makers keep private: all of it in one file, and all of it there."""

import inspect
import pickle
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import transformers
from huggingface_tiny import make_trainer
from private_names import (
    PACKAGE,
    borrowed_names_in,
    files_that_touch,
    private_names_in,
    private_names_outside,
)
from tiny import make_rows, make_texts

from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError
from ezmia_callbacks.huggingface import trainer_access
from ezmia_callbacks.huggingface.trainer_access import (
    PRIVATE,
    TrainerReference,
    columns_kept,
    run_folder,
    save_state,
    saved_state,
    tokenizer_of,
)

FILE = Path(trainer_access.__file__)
TRAINERS = inspect.getsource(transformers.Trainer)
# What TRL 0.17.0, the oldest, does not have.
NEWER_THAN_OLDEST = {"_formatting_func", "_skip_prepare_dataset", "_is_vision_dataset"}


def borrowed_of(owner):
    return [name for name, told in PRIVATE.items() if owner in told.partition(":")[0].split(", ")]


def test_no_other_file_of_the_package_touches_what_is_borrowed():
    assert files_that_touch(PRIVATE, but=FILE) == {}


def test_no_other_file_for_hugging_face_touches_anything_private():
    # One callback asks another of its kind.
    assert private_names_outside(FILE.parent, file=FILE.name, own={"_folder", "_held_out"}) == {}
    assert list(private_names_in((PACKAGE / "axolotl.py").read_text("utf-8"))) == []


def test_what_the_shells_share_touches_nothing_private_but_the_trackers_clients():
    found = private_names_outside(PACKAGE / "shells", file="")

    assert found == {"trackers.py": ["_ml_flow", "_trackio", "_wandb"]}


def test_every_private_name_that_is_touched_is_listed_and_every_listed_one_is_touched():
    source = FILE.read_text("utf-8")

    assert set(private_names_in(source)) == {name for name in PRIVATE if name.startswith("_")}
    assert set(PRIVATE) <= set(borrowed_names_in(source))


@pytest.mark.parametrize("name", PRIVATE)
def test_of_every_name_it_is_said_whose_it_is_what_was_tried_and_what_follows_without_it(name):
    assert re.fullmatch(r"\w+(, \w+)*: .+\. Tried: \w+ \d.+\. Missing.+\.", PRIVATE[name])


def test_every_name_belongs_to_somebody_whose_release_is_looked_at():
    owners = ("sys", "Trainer", "TrainerState", "SFTTrainer", "DPOTrainer")

    assert {name for owner in owners for name in borrowed_of(owner)} == set(PRIVATE)


@pytest.mark.parametrize("name", borrowed_of("Trainer"))
def test_the_trainer_of_this_release_has_what_is_borrowed(name):
    assert hasattr(transformers.Trainer, name) or f"self.{name} =" in TRAINERS


def test_the_stack_and_the_state_of_this_release_have_what_is_borrowed():
    assert [hasattr(sys, name) for name in borrowed_of("sys")] == [True]
    assert [hasattr(transformers.TrainerState(), name) for name in borrowed_of("TrainerState")] == [True]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner in ("SFTTrainer", "DPOTrainer") for name in borrowed_of(owner)],
)
def test_trl_of_this_release_has_what_is_borrowed(owner, name):
    trl = pytest.importorskip("trl")
    trainer = getattr(trl, owner)
    # Base classes of TRL's own count, too.
    source = "".join(inspect.getsource(base) for base in trainer.__mro__ if base.__module__.startswith("trl"))

    has_it = hasattr(trainer, name) or f"self.{name} =" in source

    assert has_it == (name not in NEWER_THAN_OLDEST or trl.__version__ != "0.17.0")


@pytest.mark.parametrize(
    ("options", "flags", "is_skipped"),
    [
        ({}, {}, False),
        ({"skip_prepare_dataset": True}, {}, True),
        ({}, {"_skip_prepare_dataset": True}, True),
        ({}, {"_is_vision_dataset": True}, True),
    ],
)
def test_preparation_is_skipped_where_the_user_or_the_trainer_says_so(options, flags, is_skipped):
    trainer = SimpleNamespace(args=SimpleNamespace(dataset_kwargs=options), **flags)

    assert trainer_access.skips_preparation(trainer) is is_skipped


def test_the_scan_sees_a_private_name():
    assert list(private_names_in("trainer._trial")) == ["_trial"]
    assert list(private_names_in("other._trial")) == ["_trial"]
    assert list(private_names_in("getattr(trainer, '_trial', None)")) == ["_trial"]
    assert list(private_names_in("self._own, trainer.args, trainer.__dict__")) == []
    assert list(borrowed_names_in("self.own, trainer.args.packing")) == ["packing", "args"]


def test_a_state_is_kept_under_its_key():
    state = transformers.TrainerState()

    save_state(state, "ezmia/one", {"history": [1]})

    assert saved_state(state, "ezmia/one") == {"history": [1]}
    assert saved_state(state, "ezmia/two") == {}
    assert state.stateful_callbacks["ezmia/one"] == {"history": [1]}


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


def broken_package(name, *, loads_lazily):
    """A package that is there, and needs one that is not."""
    missing = ModuleNotFoundError("No module named 'regex'", name="regex")

    class Broken(ModuleType):
        def __getattr__(self, attribute):
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            if not loads_lazily:
                raise missing
            raise RuntimeError(
                f"Failed to import {name}.{attribute} (look up to see its traceback)"
            ) from missing

    return Broken(name)


@pytest.mark.parametrize("loads_lazily", [True, False])
def test_a_broken_transformers_is_shown_as_what_it_is(monkeypatch, loads_lazily):
    monkeypatch.setitem(
        sys.modules, "transformers", broken_package("transformers", loads_lazily=loads_lazily)
    )

    with pytest.raises(MissingDependencyError) as raised:
        runpy.run_path(trainer_access.__file__)

    assert "installed and cannot be imported: ModuleNotFoundError: No module named 'regex'." in str(
        raised.value
    )
    assert "pip install" not in str(raised.value)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(MissingDependencyError, match=r'pip install "ezmia-callbacks\[huggingface\]"'):
        runpy.run_path(trainer_access.__file__)
