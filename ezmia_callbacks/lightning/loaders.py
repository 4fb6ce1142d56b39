"""What a Lightning run feeds from: its dataloaders, as a `Feed`, and canaries drawn from them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.canaries.records import is_pair
from ezmia_callbacks.distributed import is_main_process
from ezmia_callbacks.errors import CanaryError
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.scoring.rows import Tokenizer
from ezmia_callbacks.shells.feed import ADVICE, Feed, Source, canaries_as_fed, draw_canaries
from ezmia_callbacks.shells.membership_check import is_indexable

__all__: list[str] = []

logger = get_logger(__name__)

# Where none is known.
_BATCH_SIZE = 8


def draw_from_loaders(
    train: Any,
    validation: Any,
    *,
    n_members: int,
    n_non_members: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
) -> CanarySet:
    """Canaries from a run's own data: members from the training loader, non-members from the validation one.

    Args:
        train: The training dataloader, alone or in a list or mapping.
        validation: The validation dataloader, likewise.
        n_members: Members drawn, at most.
        n_non_members: Non-members drawn, at most.
        seed: Seed of the draw.
        tokenizer: Says with which token a text ends.

    Raises:
        CanaryError: if there is not one loader of each kind, or its records cannot be drawn.
        OverlappingCanariesError: if a record of the validation set is trained on.
        ConfigurationError: if the collator returns no token ids and labels.
    """
    loaders = {"training": _loaders(train), "validation": _loaders(validation)}
    for name, found in loaders.items():
        if len(found) != 1:
            raise CanaryError(
                f"No canaries were given, and one {name} dataloader is needed to draw them from, got "
                f"{len(found)}. (Loaders that Lightning has not made at the start of training do not count.) "
                + ADVICE
            )
        dataset = getattr(found[0], "dataset", None)
        if not is_indexable(dataset):
            raise CanaryError(
                f"No canaries were given, and the {name} dataloader reads a stream "
                f"({type(dataset).__name__}) that cannot be drawn from. " + ADVICE
            )
        if not _has_rows(dataset):
            raise CanaryError(
                f"No canaries were given, and the rows of the {name} dataset are not mappings with "
                "`input_ids`. " + ADVICE
            )
    (training,), (validating,) = loaders.values()
    return draw_canaries(
        Feed(
            Source("train_dataset", training.dataset),
            training.collate_fn,
            tokenizer=tokenizer,
            batch_size=_batch_size(training),
        ),
        Source("eval_dataset", validating.dataset),
        n_members=n_members,
        n_non_members=n_non_members,
        seed=seed,
    )


def as_fed_by_loaders(
    train: Any, canaries: CanarySet, *, tokenizer: Tokenizer | None, max_length: int | None
) -> CanarySet:
    """The same canaries as token rows, with the labels that the training loader's collator gives them.

    Where the loader's rows are not mappings there is nothing to compare with, and the canaries are scored as
    they were given. So are preference pairs, of which each module makes batches in a form of its own.

    Args:
        train: The training dataloader, alone or in a list or mapping.
        canaries: The canaries.
        tokenizer: Tokenizer of raw text.
        max_length: Truncation of raw text, in tokens.

    Raises:
        ConfigurationError: if the canaries are text and there is no tokenizer, or the collator fails on them.
        TooFewCanariesError: if too few records are left.
        OverlappingCanariesError: if a non-member is among the training rows.
    """
    found = _loaders(train)
    dataset: Any = getattr(found[0], "dataset", None) if len(found) == 1 else None
    is_stream = dataset is not None and not is_indexable(dataset)
    if not (is_stream or _has_rows(dataset)):
        if is_main_process():
            logger.warning(
                "The training data are not one dataset of mappings with `input_ids`: the canaries are scored "
                "as they were given, and it cannot be checked that members are trained on and non-members "
                "are not."
            )
        return canaries
    if any(map(is_pair, canaries.records)):
        if is_main_process():
            logger.warning(
                "The canaries are preference pairs: both sides are scored as they were given. Pairs that "
                "training feeds in another form (template, truncation) are reported as not fed."
            )
        return canaries
    feed = Feed(
        Source("train_dataset", dataset),
        found[0].collate_fn,
        tokenizer=tokenizer,
        tokenizer_advice="`tokenizer=`, give the LightningModule a `tokenizer` attribute",
        batch_size=_batch_size(found[0]),
    )
    return canaries_as_fed(feed, canaries, max_length=max_length)


def _loaders(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    is_several = isinstance(loaders, Sequence) and not hasattr(loaders, "dataset")
    return list(loaders) if is_several else [loaders]


def _batch_size(loader: Any) -> int:
    """Rows in a batch of a loader; a sampler of batches of the user's own may not say."""
    sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None) or _BATCH_SIZE


def _has_rows(dataset: Any) -> bool:
    return is_indexable(dataset) and len(dataset) > 0 and isinstance(dataset[0], Mapping)
