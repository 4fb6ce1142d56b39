"""What is borrowed of a Hugging Face trainer; the one file that touches its and TRL's private parts.

Every private or undocumented name stands in `PRIVATE`: whose it is, what for, the releases it was tried with
(the oldest and the newest that the tests run with) and what follows if it is missing. The protocols name the
public attributes that are read.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

from torch import nn

from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError
from ezmia_callbacks.scoring.rows import Tokenizer

try:
    import transformers

    # It is loaded only here, and with it whatever of the installation is broken.
    TrainerCallback = transformers.TrainerCallback
except Exception as error:
    raise MissingDependencyError.because(
        error,
        "transformers",
        'The Hugging Face callback needs transformers: pip install "ezmia-callbacks[huggingface]"',
    ) from error

__all__: list[str] = []

# By name: the third needs IPython, the last is TRL's.
_PRINTING_CALLBACKS = {
    "PrinterCallback",
    "ProgressCallback",
    "NotebookProgressCallback",
    "RichProgressCallback",
}

PRIVATE: Mapping[str, str] = {
    "_getframe": (
        "sys: the stack of the hook that is called. Tried: CPython 3.11. "
        "Missing: no training begins, unless the callback is given `trainer=`."
    ),
    "_get_output_dir": (
        "Trainer: the folder of this run; the trials of a search have one each. "
        "Tried: transformers 4.46.3, 5.23.0. Missing: no training begins."
    ),
    "_trial": (
        "Trainer: the trial that a hyper-parameter search runs. Tried: transformers 4.46.3, 5.23.0. "
        "Missing, as it is before the first trial: the run is no trial, and its folder the trainer's own."
    ),
    "_set_signature_columns_if_needed": (
        "Trainer: finds out which columns reach the collator. Tried: transformers 4.46.3, 5.23.0. "
        "Missing: no training begins where the trainer removes unused columns."
    ),
    "_signature_columns": (
        "Trainer: those columns. Tried: transformers 4.46.3, 5.23.0. "
        "Missing: no training begins where the trainer removes unused columns."
    ),
    "hp_search_backend": (
        "Trainer: what runs a hyper-parameter search, None outside one. Tried: transformers 4.46.3, 5.23.0. "
        "Missing: the first evaluation in training fails."
    ),
    "compute_objective": (
        "Trainer: what a search minimizes; read in a search alone. Tried: transformers 4.46.3, 5.23.0. "
        "Missing: the first evaluation in a search fails."
    ),
    "stateful_callbacks": (
        "TrainerState: what goes into each checkpoint beside the state. Tried: transformers 4.46.3, 5.23.0. "
        "Missing: no training begins."
    ),
    "_prepare_dataset": (
        "SFTTrainer, DPOTrainer: makes training rows of a dataset's records. Tried: TRL 0.17.0, 1.16.0. "
        "Missing: the trainer is taken for a plain one."
    ),
    "_formatting_func": (
        "SFTTrainer: the user's function that makes text of a record. Tried: TRL 1.16.0; 0.17.0 has none. "
        "Missing: canaries are prepared without it, and members are reported as not found."
    ),
    "_skip_prepare_dataset": (
        "SFTTrainer: whether the dataset is taken as it is. Tried: TRL 1.16.0; 0.17.0 has none. "
        "Missing: `dataset_kwargs` alone tells."
    ),
    "_is_vision_dataset": (
        "SFTTrainer, DPOTrainer: whether rows hold images. Tried: TRL 1.16.0; 0.17.0 has none. "
        "Missing: they do not."
    ),
}


class TrainingArguments(Protocol):
    """The settings of a trainer that are read."""

    output_dir: str
    disable_tqdm: bool
    eval_strategy: str
    gradient_accumulation_steps: int
    load_best_model_at_end: bool
    max_steps: int
    metric_for_best_model: str | None
    num_train_epochs: float
    per_device_eval_batch_size: int
    per_device_train_batch_size: int
    push_to_hub: bool
    save_strategy: str


class TrainerState(Protocol):
    """The state of a training that is read; the best checkpoint and the callbacks' states are written too."""

    best_global_step: int | None
    best_metric: float | None
    best_model_checkpoint: str | None
    epoch: float | None
    eval_steps: int
    global_step: int
    max_steps: int
    num_train_epochs: int
    save_steps: int
    stateful_callbacks: MutableMapping[str, Any]


class TrainerControl(Protocol):
    """What a callback may ask of the trainer."""

    should_evaluate: bool
    should_log: bool
    should_save: bool
    should_training_stop: bool


class CallbackHandler(Protocol):
    """The trainer's list of callbacks, in the order in which they are called."""

    callbacks: list[Any]


class Trainer(Protocol):
    """The parts of a trainer that are read."""

    accelerator: Any
    args: TrainingArguments
    callback_handler: CallbackHandler
    compute_objective: Callable[[Any], float] | None
    data_collator: Callable[[list[dict[str, Any]]], Any]
    eval_dataset: Any
    hp_search_backend: Any
    is_in_train: bool
    model_wrapped: nn.Module
    train_dataset: Any


def calling_trainer(callback: object) -> Trainer:
    """The trainer that is calling a hook of this callback: no argument carries it, so the stack is searched.

    Raises:
        ConfigurationError: if the hook was not called by a trainer that has the callback.
    """
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, transformers.Trainer) and any(
            one is callback for one in candidate.callback_handler.callbacks
        ):
            return cast(Trainer, candidate)
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    raise ConfigurationError(
        "No Trainer was found: pass the callback in `callbacks=[...]`, or give it `trainer=`."
    )


class TrainerReference:
    """The trainer of a callback: given, or found when a hook is called; it is not kept alive.

    Args:
        trainer: The trainer, if it is known.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self._trainer = None if trainer is None else weakref.ref(trainer)

    def __getstate__(self) -> dict[str, None]:
        # Callbacks are pickled by Ray and spawn; the trainer belongs to this process.
        return {"_trainer": None}

    def of(self, callback: object) -> Trainer:
        """The trainer, while it calls a hook of the callback.

        Raises:
            ConfigurationError: if there is none.
        """
        trainer = None if self._trainer is None else self._trainer()
        return self.anew(callback) if trainer is None else trainer

    def anew(self, callback: object) -> Trainer:
        """The trainer that calls a hook of the callback now, where another one may have done so before.

        Raises:
            ConfigurationError: if there is none.
        """
        known = None if self._trainer is None else self._trainer()
        try:
            trainer = calling_trainer(callback)
        except ConfigurationError:
            if known is None:
                raise
            trainer = known
        self._trainer = weakref.ref(trainer)
        return trainer


def run_folder(trainer: Trainer) -> Path:
    """Where the trainer saves this run: the trials of a hyper-parameter search have a folder each."""
    owner: Any = trainer
    return Path(owner._get_output_dir(getattr(owner, "_trial", None)))


def would_be_pushed(trainer: Trainer, folder: Path) -> bool:
    """Whether the trainer uploads a folder to the hub: all in its own but what begins with an underscore.

    It leaves out checkpoints as well, and uploads them by themselves if `hub_strategy` says so.
    """
    top, folder = Path(trainer.args.output_dir).resolve(), folder.resolve()
    if not trainer.args.push_to_hub or not folder.is_relative_to(top):
        return False
    return not folder.relative_to(top).as_posix().startswith("_")


def tokenizer_of(trainer: Trainer) -> Tokenizer | None:
    """The trainer's tokenizer, by its present name or its former one."""
    found: Tokenizer | None = getattr(trainer, "processing_class", None) or getattr(
        trainer, "tokenizer", None
    )
    return found


def columns_kept(trainer: Trainer) -> frozenset[str] | None:
    """Columns of a row that reach the collator; None for all."""
    owner: Any = trainer
    if not getattr(owner.args, "remove_unused_columns", True):
        return None
    owner._set_signature_columns_if_needed()
    return frozenset(owner._signature_columns)


def n_batches(loader: object) -> int | None:
    """Length of a dataloader; None if unknown."""
    return len(loader) if transformers.trainer_utils.has_length(loader) else None  # type: ignore[arg-type]


def autocast(trainer: Trainer) -> AbstractContextManager[object]:
    """The context under which the trainer runs its forward pass."""
    context: AbstractContextManager[object] = trainer.accelerator.autocast()
    return context


def sums_all_metrics(trainer: Trainer) -> bool:
    """Whether a hyper-parameter search minimizes the sum of whatever is among the metrics."""
    is_search = trainer.hp_search_backend is not None
    return is_search and trainer.compute_objective is transformers.trainer_utils.default_compute_objective


def saved_state(state: TrainerState, key: str) -> object:
    """What a checkpoint kept under a key; an empty mapping if it has none."""
    found: object = state.stateful_callbacks.get(key, {})
    return found


def save_state(state: TrainerState, key: str, value: Mapping[str, Any]) -> None:
    """Have every checkpoint from here on keep a value under a key."""
    state.stateful_callbacks[key] = value


def called_by_loop(trainer: Trainer) -> nn.Module:
    """The object that the training loop calls: the model in its wrappers, compiled if it is."""
    return trainer.model_wrapped


def log_unprinted(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log to `log_history`, trackers and callbacks, but not to those that print dictionaries of all that is.

    By the base class's method: TRL's would drain its own metrics into this record.
    """
    handler = trainer.callback_handler
    callbacks = handler.callbacks
    # Another list: the one that is there is being walked along.
    handler.callbacks = [callback for callback in callbacks if not _prints_logs(callback)]
    try:
        transformers.Trainer.log(trainer, dict(metrics))
    finally:
        handler.callbacks = callbacks


def _prints_logs(callback: object) -> bool:
    """Whether a callback is one of the libraries' own that show what is logged on the console."""
    return any(one.__name__ in _PRINTING_CALLBACKS for one in type(callback).__mro__)


def is_trl(trainer: Trainer) -> bool:
    """Whether the trainer prepares datasets itself, as those of TRL do."""
    return hasattr(trainer, "_prepare_dataset")


def skips_preparation(trainer: Trainer) -> bool:
    """Whether one of TRL's trainers takes its dataset as it is."""
    options = getattr(trainer.args, "dataset_kwargs", None) or {}
    return bool(
        options.get("skip_prepare_dataset", False)
        or getattr(trainer, "_skip_prepare_dataset", False)
        or getattr(trainer, "_is_vision_dataset", False)
    )


def formatting_function(trainer: Trainer) -> Any:
    """The user's function that makes text of a record, for one of TRL's trainers; None if there is none."""
    return getattr(trainer, "_formatting_func", None)


def preparation_parameters(trainer: Trainer) -> dict[str, inspect.Parameter]:
    """What one of TRL's trainers needs to prepare a dataset, but for the dataset itself."""
    owner: Any = trainer
    _, *parameters = inspect.signature(owner._prepare_dataset).parameters.values()
    return {parameter.name: parameter for parameter in parameters}


def prepare_dataset(trainer: Trainer, dataset: Any, arguments: Mapping[str, Any]) -> Any:
    """A dataset of training rows, made as one of TRL's trainers made its own."""
    owner: Any = trainer
    return owner._prepare_dataset(dataset, **arguments)
