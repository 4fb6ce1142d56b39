"""Records through the dataset preparation of a TRL trainer.

TRL is not imported. Borrowing the trainer's own method is what keeps template, end-of-sequence token,
truncation and label mask those of the training, in every version.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

from ezmia_callbacks.canaries.records import Record
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.huggingface.trainer_access import (
    Trainer,
    formatting_function,
    is_trl,
    preparation_parameters,
    prepare_dataset,
    skips_preparation,
    tokenizer_of,
)
from ezmia_callbacks.safe_text import describe_columns, describe_error
from ezmia_callbacks.shells.feed import PreparedRows, as_row

__all__: list[str] = []

_INDEX = "canary"
_BY_HAND = (
    "Audit its checkpoints with `ezmia audit`, or call `PrivacyAuditor` from a TrainerCallback of your own "
    "(docs/how-to/chat-trl.md has one)"
)
_PAIRS = (
    f"it prepares its preference pairs in a form of its own. {_BY_HAND}, with the pairs as canaries: both "
    "sides are scored, and the margin between them is among the scores."
)
_LABELED = (
    "it makes answers with label True likelier and others less likely, and one score cannot stand for both. "
    f"{_BY_HAND}, with canaries drawn from the records with label True alone. Leakage of the others is "
    "not seen so; drawn apart, for an audit of their own, it shows as an AUC below 0.5."
)
_REWARD = (
    "it trains a model that rates texts and gives no probabilities of tokens, by which this audit tells "
    "members."
)
_SAMPLED = (
    "it trains on answers that the model samples, so that no answer in the dataset is one that was trained "
    "on. What leaks of the prompts is not seen by this audit."
)
# Trainers that are not audited, by the name of a class of theirs: TRL moves them from place to place.
_NOT_AUDITED = {
    **dict.fromkeys(("ORPOTrainer", "CPOTrainer"), _PAIRS),
    **dict.fromkeys(("KTOTrainer", "BCOTrainer"), _LABELED),
    **dict.fromkeys(("RewardTrainer", "PRMTrainer"), _REWARD),
    **dict.fromkeys(("GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer", "PPOTrainer"), _SAMPLED),
}
_OLDEST_SFT = "0.17"
_OLDEST_DPO = "0.29"


def prepares_rows(trainer: Trainer) -> bool:
    """Whether the trainer prepared its training rows: one of TRL's that was not told to skip that."""
    return is_trl(trainer) and not skips_preparation(trainer)


def refuse_other_trainers(trainer: Trainer) -> None:
    """Refuse a trainer of TRL that does not train as SFT and DPO do, with what can be done instead.

    Raises:
        ConfigurationError: if it is one.
    """
    names = [base.__name__ for base in type(trainer).__mro__]
    reasons = [_NOT_AUDITED[name] for name in names if name in _NOT_AUDITED]
    if reasons:
        raise ConfigurationError(f"{type(trainer).__name__} cannot be audited by the callback: {reasons[0]}")


def is_packed(trainer: Trainer, name: Literal["train_dataset", "eval_dataset"]) -> bool:
    """Whether the trainer packed several records into each row of a dataset."""
    is_packed = bool(getattr(trainer.args, "packing", False))
    for_evaluation = getattr(trainer.args, "eval_packing", None)
    if name == "eval_dataset" and for_evaluation is not None:
        is_packed = bool(for_evaluation)
    return is_packed and prepares_rows(trainer)


def is_cut_by_packing(trainer: Trainer) -> bool:
    """Whether packing cut training records wherever a row was full, so that none can be told from another."""
    # TRL before 0.19 has no choice of strategies.
    strategy = getattr(trainer.args, "packing_strategy", "wrapped")
    return is_packed(trainer, "train_dataset") and strategy == "wrapped"


def prepared_by_trl(trainer: Trainer, records: Sequence[Record]) -> PreparedRows:
    """Rows made of records by the trainer's own preparation, one a record even where training packs them.

    Raises:
        ConfigurationError: if the preparation fails on the records, or asks for what is not known here.
    """
    from datasets import Dataset

    args: Any = copy.copy(trainer.args)
    args.dataset_num_proc = None
    if is_packed(trainer, "train_dataset"):
        # Packing keeps the start of a record that is too long, whatever this says.
        args.truncation_mode = "keep_start"
    known = {
        "processing_class": tokenizer_of(trainer),
        "args": args,
        "packing": False,
        "formatting_func": formatting_function(trainer),
        "dataset_name": _INDEX,
    }
    parameters = preparation_parameters(trainer)
    unknown = [name for name, p in parameters.items() if name not in known and p.default is p.empty]
    if unknown:
        raise ConfigurationError(
            f"The dataset preparation of {type(trainer).__name__} asks for {unknown}, which this version of "
            f"ezmia-callbacks does not know: use TRL {_OLDEST_SFT} or newer, or tokenize the dataset before "
            "the hold-out and train with `dataset_kwargs={'skip_prepare_dataset': True}`."
        )
    text_field = getattr(args, "dataset_text_field", "text")
    rows = [as_row(record, text_field=text_field) for record in records]
    # `from_list` would take only the columns of the first row.
    columns = {
        name: [row.get(name) for row in rows] for name in sorted({name for row in rows for name in row})
    }
    try:
        prepared = prepare_dataset(
            trainer,
            Dataset.from_dict({**columns, _INDEX: list(range(len(rows)))}),
            {name: known[name] for name in parameters if name in known},
        )
    except Exception as error:
        raise ConfigurationError(
            f"The {type(trainer).__name__}'s preparation cannot process canaries with "
            f"{describe_columns(columns)}: {describe_error(error)}. Draw them from the dataset that the "
            "trainer is given. If a `formatting_func` reads other columns, apply it before: "
            "`dataset.map(lambda row: {'text': formatting_func(row)}, remove_columns=dataset.column_names)`."
        ) from error
    if "chosen_input_ids" in prepared.column_names:
        # Prompt and answers are joined, and cut, only in the model's forward pass.
        raise ConfigurationError(
            f"The preference pairs of this version of TRL cannot be audited: use TRL {_OLDEST_DPO} or newer."
        )
    # Preparation may shuffle.
    made = sorted((dict(row) for row in prepared), key=lambda row: int(row[_INDEX]))
    kept = [int(row.pop(_INDEX)) for row in made]
    return PreparedRows(made, kept)
