"""Draw canaries from a training set, and take the non-members out of it."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from ezmia_callbacks.canaries.records import (
    RECORD_FIELDS,
    Record,
    fingerprint,
    is_empty,
    record_key,
    record_kind,
)
from ezmia_callbacks.canaries.sets import CanarySet, Provenance, RowsByNumber
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.planning import MINIMUM_PER_CLASS
from ezmia_callbacks.functional.sizes import audit_reach, sizes_for, useful_sizes, way_out
from ezmia_callbacks.safe_text import describe_columns, get_logger

__all__: list[str] = []

logger = get_logger(__name__)

# Fewer than 10 on a side have a probability below 1e-5 then: sizes are never made up for after the draw,
# which would tie the coins together.
MINIMUM_COINS = 50

RowT_co = TypeVar("RowT_co", covariant=True)
RowT = TypeVar("RowT", bound=Record)
ColumnarT = TypeVar("ColumnarT", bound="ColumnarDataset")
GroupBy: TypeAlias = str | Callable[[Any], Hashable]


class MapStyleDataset(Protocol[RowT_co]):
    """What is borrowed from a PyTorch map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RowT_co: ...


class ColumnarDataset(Protocol):
    """What is borrowed from a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]:
        """Names of all columns."""
        ...

    @property
    def format(self) -> dict[str, object]:
        """Output format; its `type` is `custom` where rows are transformed when read."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def select(self: ColumnarT, indices: Sequence[int]) -> ColumnarT:
        """Return the rows with these indices."""
        ...

    def select_columns(self: ColumnarT, column_names: list[str]) -> ColumnarT:
        """Return the dataset without its other columns."""
        ...

    def with_format(self: ColumnarT, type: None) -> ColumnarT:
        """Return the dataset with rows as plain Python values."""
        ...


@overload
def hold_out_canaries(
    dataset: list[RowT],
    *,
    n_members: int | None = None,
    n_non_members: int | None = None,
    n_canaries: int | None = None,
    group_by: GroupBy | None = None,
    seed: int = 0,
) -> tuple[list[RowT], CanarySet]: ...
@overload
def hold_out_canaries(
    dataset: tuple[RowT, ...],
    *,
    n_members: int | None = None,
    n_non_members: int | None = None,
    n_canaries: int | None = None,
    group_by: GroupBy | None = None,
    seed: int = 0,
) -> tuple[tuple[RowT, ...], CanarySet]: ...
@overload
def hold_out_canaries(
    dataset: ColumnarT,
    *,
    n_members: int | None = None,
    n_non_members: int | None = None,
    n_canaries: int | None = None,
    group_by: GroupBy | None = None,
    seed: int = 0,
) -> tuple[ColumnarT, CanarySet]: ...
@overload
def hold_out_canaries(
    dataset: MapStyleDataset[RowT],
    *,
    n_members: int | None = None,
    n_non_members: int | None = None,
    n_canaries: int | None = None,
    group_by: GroupBy | None = None,
    seed: int = 0,
) -> tuple[MapStyleDataset[RowT], CanarySet]: ...
def hold_out_canaries(
    dataset: object,
    *,
    n_members: int | None = None,
    n_non_members: int | None = None,
    n_canaries: int | None = None,
    group_by: GroupBy | None = None,
    seed: int = 0,
) -> tuple[object, CanarySet]:
    """Draw canaries at random, and return the training set without the non-members.

    Canaries are drawn from the pool of records that occur exactly once, up to case and white
    space, and are not empty: a record that occurs several times leaks more than one does, and a
    copy of a non-member would leave half of it in training. Repeated and empty records stay in the
    training set as they are. Which of the drawn records are members is a second random draw, so
    that membership is exchangeable. Members stay where they are; the order of rows is kept.

    Without sizes, non-members are a tenth of the rows, at most 1000, and members, which stay, twice as
    many, at most 500. What an audit finds out with them is logged, as a warning where it is little.
    Sizes are asked for in one of two ways. `n_members` and `n_non_members` are met exactly.
    `n_canaries` draws that many records and flips an independent fair coin for each: about half
    become members. Only such coins carry a lower bound on epsilon.

    Where a person or a document has several records, one of them in training gives the others away: with
    `group_by`, whole groups are drawn, and sizes count groups. All rows of a non-member group leave the
    training set, repeated and empty ones too; members keep theirs. Canaries then are the records of the
    drawn groups that the pool holds, and `by_group` scores their groups.

    Args:
        dataset: Training records: a list or tuple, a `datasets.Dataset` (one split), or any
            dataset with a length and integer indexing, such as a PyTorch map-style dataset.
        n_members: Canaries that stay in the training set, at least 10.
        n_non_members: Canaries that leave it, at least 10.
        n_canaries: Canaries of both kinds, at least 50; instead of the two numbers above.
        group_by: What a row belongs to: a column, such as "user_id", or a function of the row. Groups get
            the names `group-<index>`, by their first row, which tell no one's identity.
        seed: Seed of the draw, non-negative. The global random generators are not used.

    Returns:
        The remaining training set, and the canaries in row order with ids `row-<index>` that
        count rows of the given dataset. A list, a tuple and a `datasets.Dataset` keep their type;
        other datasets come back as a `torch.utils.data.Subset`.

    Raises:
        ConfigurationError: if the dataset is streamed, a dictionary of splits or not a dataset, a
            row has no accepted shape or no group, the seed is not a non-negative integer, or sizes
            contradict each other.
        TooFewCanariesError: if fewer canaries are asked for than are needed, or the pool is too small;
            it names sizes that can be drawn.

    >>> texts = [f"patient note {i}" for i in range(300)]
    >>> hold_out_canaries(texts)[1]
    CanarySet(60 members, 30 non-members, drawn at random, seed 0)
    >>> train_texts, canaries = hold_out_canaries(texts, n_members=10, n_non_members=20, seed=0)
    >>> len(train_texts), canaries.n_members, canaries.n_non_members
    (280, 10, 20)
    """
    check_seed(seed)
    _check_ways(n_members, n_non_members, n_canaries)
    source = checked_dataset(dataset)
    rows = readable(source)
    keys = [None if is_empty(row) else record_key(row) for row in iterated(rows)]
    n_copies = Counter(key for key in keys if key is not None)
    pool = [i for i, key in enumerate(keys) if key is not None and n_copies[key] == 1]
    n_empty = keys.count(None)
    n_duplicates = len(keys) - n_empty - len(pool)
    # The unit of the draw, by its first row: without groups, each row is one.
    units = np.arange(len(keys)) if group_by is None else _first_rows_of_groups(source, group_by)
    drawable = np.unique(units[pool])
    available = _Available(
        n_all=len(np.unique(units)),
        n_drawable=len(drawable),
        unit="row" if group_by is None else "group",
        why=f"{n_duplicates} repeat another row, {n_empty} are empty",
    )
    is_chosen = n_members is None and n_non_members is None and n_canaries is None
    n_drawn, n_kept = sizes = _sizes(n_members, n_non_members, n_canaries, available)

    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(drawable, size=n_drawn, replace=False))
    if n_kept is None:
        is_kept = fair_coins(n_drawn, rng)
    else:
        is_kept = np.zeros(n_drawn, dtype=np.bool_)
        is_kept[rng.choice(n_drawn, size=n_kept, replace=False)] = True

    is_held_out = np.isin(units, drawn[~is_kept])
    chosen = np.array(pool)[np.isin(units[pool], drawn)]
    canaries = CanarySet(
        records=tuple(rows[int(i)] for i in chosen),
        is_member=~is_held_out[chosen],
        record_ids=tuple(f"row-{i}" for i in chosen),
        provenance=Provenance(
            method="hold_out_coins" if n_kept is None else "hold_out",
            is_randomized=True,
            seed=int(seed),
            n_pool=len(drawable),
            n_duplicates_removed=n_duplicates,
            pool_fingerprint=fingerprint(str(keys[i]) for i in pool),
        ),
        groups=None if group_by is None else tuple(f"group-{units[i]}" for i in chosen),
        rows=RowsByNumber(source, chosen),
    )
    if is_chosen:
        _say_what_was_chosen(sizes, available, n_rows=len(keys), n_held_out=int(is_held_out.sum()))
    return select(source, np.flatnonzero(~is_held_out).tolist()), canaries


def _first_rows_of_groups(source: MapStyleDataset[Record], group_by: GroupBy) -> NDArray[np.intp]:
    """Return the first row of the group that each row belongs to, (n_rows,)."""
    first_of: dict[Hashable, int] = {}
    groups = [_group(row, group_by) for row in iterated(_groupable(source, group_by))]
    n_without = sum(group is None for group in groups)
    if n_without:
        raise ConfigurationError(
            f"{n_without} of {len(groups)} rows have no group, the first is row {groups.index(None)}; they "
            "could put a group on both sides: fill the gaps, or drop these rows."
        )
    return np.array([first_of.setdefault(group, i) for i, group in enumerate(groups)], dtype=np.intp)


def _groupable(source: MapStyleDataset[Record], group_by: GroupBy) -> MapStyleDataset[Record]:
    """Return a view on a columnar dataset with plain values and the columns that `group_by` may read."""
    if not is_columnar(source) or is_transformed(cast(ColumnarDataset, source)):
        return source
    columnar = cast(ColumnarDataset, source)
    if isinstance(group_by, str) and group_by in columnar.column_names:
        columnar = columnar.select_columns([group_by])
    return columnar.with_format(None)


def _group(row: Any, group_by: GroupBy) -> Hashable:
    """Return what the row belongs to; None if nothing is known."""
    if callable(group_by):
        group = group_by(row)
    elif isinstance(row, Mapping) and group_by in row:
        group = row[group_by]
    else:
        columns = describe_columns(row if isinstance(row, Mapping) else ())
        raise ConfigurationError(
            f"Got group_by={group_by!r}, which must be a column of each row, and a {type(row).__name__} with "
            f"{columns}: name one of them, or pass a function of the row."
        )
    # Tensors of equal value are not equal keys.
    if hasattr(group, "tolist"):
        group = group.tolist()
    if not isinstance(group, Hashable):
        raise ConfigurationError(
            f"Got a {type(group).__name__} as a group, which needs a value that can be compared, such as a "
            "string or a number: pass a function of the row that makes one."
        )
    # NaN, which is how a missing value often arrives, equals nothing.
    return None if group != group else group


class _Sizes(NamedTuple):
    """How many units to draw, and how many of them to keep; None leaves that to coins."""

    n_drawn: int
    n_kept: int | None


class _Available(NamedTuple):
    """What there is to draw from, in rows or groups, and why the rest is not."""

    n_all: int
    n_drawable: int
    unit: str
    why: str


def _check_ways(n_members: int | None, n_non_members: int | None, n_canaries: int | None) -> None:
    """Raise if sizes are asked for in two ways, or in half of one."""
    is_half = (n_members is None) != (n_non_members is None)
    if is_half or (n_canaries is not None and n_members is not None):
        raise ConfigurationError(
            f"Got n_members={n_members}, n_non_members={n_non_members}, n_canaries={n_canaries}; pass the "
            "first two for a split of exactly these sizes, or n_canaries alone for a coin per record, or "
            "nothing for sizes that suit the number of rows."
        )


def _sizes(
    n_members: int | None, n_non_members: int | None, n_canaries: int | None, available: _Available
) -> _Sizes:
    """The sizes that were asked for, or those that suit the number of rows.

    Raises:
        TooFewCanariesError: if they are too small or cannot be drawn, naming sizes that can.
    """
    n_all, n_drawable, unit, _ = available
    if n_canaries is not None:
        sizes = _Sizes(n_canaries, None)
        asked = f"coin flips for {n_canaries} {unit}s"
        is_enough = n_canaries >= MINIMUM_COINS
        least = f"{MINIMUM_COINS} are needed, so that {MINIMUM_PER_CLASS} end up on each side"
    elif n_members is not None and n_non_members is not None:
        sizes = _Sizes(n_members + n_non_members, n_members)
        asked = f"{n_members} members and {n_non_members} non-members"
        is_enough = min(n_members, n_non_members) >= MINIMUM_PER_CLASS
        least = f"{MINIMUM_PER_CLASS} of each are needed"
    else:
        n_members, n_non_members = sizes_for(n_all, n_drawable=n_drawable, unit=unit)
        return _Sizes(n_members + n_non_members, n_members)
    if is_enough and sizes.n_drawn <= n_drawable:
        return sizes
    advice = way_out(n_all, n_drawable, unit=unit) if n_canaries is None else _way_out_for_coins(available)
    if not is_enough:
        raise TooFewCanariesError(
            f"Asked for {asked}; at least {least}, and a few hundred for useful intervals. {advice}"
        )
    raise TooFewCanariesError(
        f"Asked for {asked}, {sizes.n_drawn} in all, but only {n_drawable} of {n_all} {unit}s can be drawn "
        f"({available.why}). {advice}"
    )


def _way_out_for_coins(available: _Available) -> str:
    n_all, n_drawable, unit, _ = available
    sizes = useful_sizes(n_all, n_drawable)
    if sizes is None or n_drawable < MINIMUM_COINS:
        return way_out(n_all, n_drawable, unit=unit)
    n_coins = min(n_drawable, max(MINIMUM_COINS, 2 * sizes.n_non_members))
    return f"n_canaries={n_coins} can be drawn, about half of which leave training."


def _say_what_was_chosen(sizes: _Sizes, available: _Available, *, n_rows: int, n_held_out: int) -> None:
    """Log the sizes that nobody asked for, and what an audit finds out with them."""
    n_all, n_drawable, unit, _ = available
    n_members = sizes.n_kept or 0
    reach = audit_reach(n_members, sizes.n_drawn - n_members)
    advice = ""
    if not reach.is_useful and useful_sizes(n_all, n_drawable) == (reach.n_members, reach.n_non_members):
        advice = " To find more, add different records, or put synthetic canaries in (insert_canaries)."
    elif not reach.is_useful:
        advice = f" {way_out(n_all, n_drawable, unit=unit)}"
    logger.log(
        logging.INFO if reach.is_useful else logging.WARNING,
        "Chose canaries among %d %ss; %d of %d rows (%.2g %%) leave the training set. %s%s",
        n_all,
        unit,
        n_held_out,
        n_rows,
        100.0 * n_held_out / n_rows,
        reach.describe(),
        advice,
    )


def check_number_of_coins(n_coins: int, name: str) -> None:
    """Raise unless coins for so many records all but surely leave enough on either side."""
    if n_coins < MINIMUM_COINS:
        raise TooFewCanariesError(
            f"Asked for coin flips for {n_coins} records; at least {MINIMUM_COINS} are needed, so that "
            f"{MINIMUM_PER_CLASS} end up on each side, and a few hundred for useful intervals: raise {name}."
        )


def fair_coins(n_coins: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return independent fair coins, (n_coins,)."""
    return rng.integers(2, size=n_coins).astype(np.bool_)


def check_seed(seed: int) -> None:
    """Raise unless the seed lets the draw be repeated."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ConfigurationError(
            f"Got seed={seed!r}; a non-negative integer is needed to make the split reproducible: "
            "pass one, such as seed=0."
        )


def checked_dataset(dataset: object) -> MapStyleDataset[Record]:
    """Return the dataset if its rows can be counted and indexed."""
    name = type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise ConfigurationError(
            f"Got a {name}; one training set is needed: pass one split, such as dataset['train']."
        )
    # A streamed PyTorch dataset may have a length, and inherits a __getitem__ that only raises.
    is_streamed = any(base.__name__ == "IterableDataset" for base in type(dataset).__mro__)
    has_rows = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if is_streamed or not has_rows:
        raise ConfigurationError(
            f"Got a {name}, whose rows cannot be counted and indexed; the split needs both: "
            "materialize the part that canaries are drawn from, such as "
            "list(dataset.take(10_000)), hold out from that, and chain the rest after it."
        )
    if isinstance(dataset, str | bytes):
        raise ConfigurationError(
            f"Got one {name}; a collection of records is needed: pass a list with one string per record."
        )
    if not is_columnar(dataset):
        return cast(MapStyleDataset[Record], dataset)
    columnar = cast(ColumnarDataset, dataset)
    # Refuses unknown columns by their full list, before any row is read.
    if not is_transformed(columnar):
        record_kind(dict.fromkeys(columnar.column_names))
    return columnar


def is_columnar(dataset: object) -> bool:
    """Tell whether this is a `datasets.Dataset`, or built like one."""
    return hasattr(dataset, "select") and hasattr(dataset, "column_names")


def is_transformed(dataset: ColumnarDataset) -> bool:
    """Tell whether rows are made when they are read."""
    return dataset.format.get("type") == "custom"


def readable(dataset: MapStyleDataset[Record]) -> MapStyleDataset[Record]:
    """Return a view on a columnar dataset with plain values and only the columns that matter."""
    if not is_columnar(dataset):
        return dataset
    columnar = cast(ColumnarDataset, dataset)
    if is_transformed(columnar):
        return columnar
    columns = [name for name in columnar.column_names if name in RECORD_FIELDS]
    return columnar.select_columns(columns).with_format(None)


def iterated(rows: MapStyleDataset[Record]) -> Iterable[Record]:
    """Return the rows in order, in the fastest way that the dataset offers."""
    # Columnar datasets read ahead when iterated; others need not be iterable.
    if is_columnar(rows):
        return cast(Iterable[Record], rows)
    return (rows[i] for i in range(len(rows)))


def select(dataset: MapStyleDataset[Record], indices: list[int]) -> object:
    """Return the rows with these indices; lists, tuples and `datasets` keep their type."""
    if isinstance(dataset, list):
        return [dataset[i] for i in indices]
    if isinstance(dataset, tuple):
        return tuple(dataset[i] for i in indices)
    if is_columnar(dataset):
        return cast(ColumnarDataset, dataset).select(indices)
    # Imported here: drawing from lists and `datasets` needs no torch.
    from torch.utils.data import Dataset, Subset

    return Subset(cast("Dataset[Record]", dataset), indices)
