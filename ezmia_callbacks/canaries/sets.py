"""The canaries of one audit: the records, which of them are trained on, and who decided it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from html import escape
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ezmia_callbacks.canaries.batch_inputs import BatchInputs
from ezmia_callbacks.canaries.records import (
    Record,
    canonical_record,
    exact_key,
    fingerprint,
    is_empty,
    record_key,
)
from ezmia_callbacks.errors import (
    ConfigurationError,
    EmptyRecordError,
    OverlappingCanariesError,
    TooFewCanariesError,
)
from ezmia_callbacks.functional.planning import MINIMUM_PER_CLASS

__all__: list[str] = []

SplitMethod: TypeAlias = Literal[
    "hold_out", "hold_out_coins", "inserted_coins", "inserted_pairs", "user_lists", "trainer_datasets"
]
_RANDOMIZED_METHODS = ("hold_out", "hold_out_coins", "inserted_coins", "inserted_pairs")
# How a split came about, in a few words.
_DRAWN: dict[SplitMethod, str] = {
    "hold_out": "drawn at random",
    "hold_out_coins": "drawn by coins",
    "inserted_coins": "inserted by coins",
    "inserted_pairs": "inserted in pairs by coins",
    "user_lists": "from two lists",
    "trainer_datasets": "from a trainer's datasets",
}
_COIN_METHODS = ("hold_out_coins", "inserted_coins", "inserted_pairs")


@dataclass(frozen=True)
class Provenance:
    """How the split into members and non-members came about.

    Attributes:
        method: `hold_out` if this library drew a split of fixed sizes, `hold_out_coins` if it flipped a
            coin for each record; `inserted_coins` and `inserted_pairs` if it put synthetic canaries
            into the training set, by a coin for each or for each pair of twins; `user_lists` if the
            user supplied both sides, `trainer_datasets` if they are a trainer's own two datasets.
        is_randomized: True only where this library drew membership at random.
        seed: Seed of that draw.
        n_pool: Number of records that were drawn from, after deduplication; of groups, where whole groups
            were drawn. The coins are then flipped for groups, too.
        n_duplicates_removed: Records that could not be canaries because another one has the same
            normalized content. `hold_out` leaves out all copies; lists keep the first.
        pool_fingerprint: Short digest of the records that were drawn from.

    Raises:
        ConfigurationError: if a split that this library did not draw is called randomized, or coins
            that it threw are not.

    >>> Provenance("user_lists", False, None, None, 0, None).is_randomized
    False
    """

    method: SplitMethod
    is_randomized: bool
    seed: int | None
    n_pool: int | None
    n_duplicates_removed: int
    pool_fingerprint: str | None

    def __post_init__(self) -> None:
        if self.is_randomized and self.method not in _RANDOMIZED_METHODS:
            raise ConfigurationError(
                f"Got is_randomized=True with method '{self.method}'; only a split that this "
                "library drew counts as randomized: use hold_out_canaries or insert_canaries."
            )
        if self.method in _COIN_METHODS and not self.is_randomized:
            raise ConfigurationError(
                f"Got is_randomized=False with method '{self.method}', which means coin flips by this "
                "library: pass is_randomized=True, or another method."
            )

    @property
    def has_independent_coins(self) -> bool:
        """Whether this library flipped an independent fair coin per record or pair, as epsilon needs.

        A random split of fixed sizes is not enough: there, one record's membership tells of another's.
        """
        return self.method in _COIN_METHODS


@dataclass(frozen=True)
class CanaryDetails:
    """How one synthetic canary was made, and where it went.

    Attributes:
        family: What it was made of, such as `bigram`.
        n_repeats: Copies that training holds if it is a member: its tier. Tiers are never pooled.
        pair_id: Name of its pair; None without the pair design.
        row_indices: Rows of the returned training set that hold it; empty for non-members.
        log2_n_candidates: Bits of the random secret in it, the cap of its exposure; None where the
            number of possible secrets is unknown.

    Raises:
        ConfigurationError: if `n_repeats` is below 1.

    >>> CanaryDetails("bigram", 4).describe()
    'bigram x4'
    """

    family: str
    n_repeats: int
    pair_id: str | None = None
    row_indices: tuple[int, ...] = ()
    log2_n_candidates: float | None = None

    def __post_init__(self) -> None:
        if self.n_repeats < 1:
            raise ConfigurationError(
                f"Got n_repeats={self.n_repeats}; a canary is inserted at least once: use 1 or more."
            )

    def describe(self) -> str:
        """Name the group of canaries that this one is like."""
        return f"{self.family} x{self.n_repeats}"


class GroupScores(NamedTuple):
    """The scores of groups of records.

    Attributes:
        scores: float64, (n_groups,), or (n_audits, n_groups): mean score of each group's records.
        is_member: (n_groups,): True where the group is in the training set.
        group_ids: Name of each group, in the order in which they first occur.
    """

    scores: NDArray[np.float64]
    is_member: NDArray[np.bool_]
    group_ids: tuple[str, ...]


def by_group(scores: ArrayLike, groups: Sequence[str], is_member: NDArray[np.bool_]) -> GroupScores:
    """Return the mean score of each group's records, so that the group is the unit of every figure.

    One person's records resemble each other: intervals and tests that count each of them as independent are
    too narrow. Those of the groups' scores are right, and answer whether a person was trained on at all.

    Args:
        scores: Score of each record, (n_records,), or of each record at each audit, (n_audits, n_records).
        groups: Name of each record's group.
        is_member: True where the record is in the training set, (n_records,).

    Raises:
        ConfigurationError: if the lengths differ.
        OverlappingCanariesError: if a group has members and non-members.

    >>> scores = by_group([1.0, 5.0, 3.0], ["ann", "bob", "ann"], np.array([True, False, True]))
    >>> scores.scores.tolist(), scores.is_member.tolist(), scores.group_ids
    ([2.0, 5.0], [True, False], ('ann', 'bob'))
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim == 0 or not values.shape[-1] == len(groups) == len(is_member):
        raise ConfigurationError(
            f"Got scores of shape {values.shape}, {len(groups)} groups and membership of {len(is_member)} "
            "records; one of each per record is needed."
        )
    _check_membership_of_groups(groups, is_member)
    number_of = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    numbers = np.array([number_of[name] for name in groups], dtype=np.intp)
    sums = [np.bincount(numbers, weights=row) for row in values.reshape(-1, len(numbers))]
    means = (np.array(sums) / np.bincount(numbers)).reshape(*values.shape[:-1], len(number_of))
    sides = np.zeros(len(number_of), dtype=np.bool_)
    sides[numbers] = is_member
    return GroupScores(means, sides, tuple(number_of))


class RowsByNumber(Sequence[Any]):
    """Some rows of a dataset, read when they are asked for: images fill no memory until then.

    Args:
        rows: The dataset.
        numbers: Which of its rows.
    """

    def __init__(self, rows: Any, numbers: Iterable[int]) -> None:
        self._rows = rows
        self._numbers = [int(number) for number in numbers]

    @property
    def dataset(self) -> Any:
        """The dataset that was given first, where rows were chosen from chosen rows."""
        return self._rows.dataset if isinstance(self._rows, RowsByNumber) else self._rows

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._numbers[index]]

    def __getstate__(self) -> dict[str, Any]:
        # Not with the whole dataset.
        return {"_rows": list(self), "_numbers": list(range(len(self)))}


class _Sizes(NamedTuple):
    members: int
    non_members: int


@dataclass(frozen=True, eq=False)
class CanarySet:
    """Records with known membership, on which leakage is measured.

    Build one with `hold_out_canaries` or `insert_canaries` (numbers with guarantees), or with
    `CanarySet.from_lists`.

    Attributes:
        records: The canary records, reduced to the fields that matter.
        is_member: True where the record is in the training set; shape (n_records,), read-only.
        record_ids: One unique name per record. Safe to log, unlike the records.
        provenance: How the split was made.
        details: How each synthetic canary was made; None for records of the user's own.
        groups: Name of the group that each record belongs to, such as the person it is about; None if each
            stands for itself. Records of a group are not independent: score groups with `by_group`.
        rows: The rows that the records were taken from, with all their columns (images among them), one
            per record; None if unknown. Neither saved nor compared.
        batch_inputs: Inputs that the model is given for whole batches; None if there are none. Neither saved
            nor compared.

    Raises:
        ConfigurationError: if lengths differ, ids repeat, a record has no accepted shape, the details
            contradict the membership, or there are details and groups.
        EmptyRecordError: if a record holds nothing to score.
        TooFewCanariesError: if either side has fewer than 10 records, or groups.
        OverlappingCanariesError: if a record, up to case and white space, or a group is on both sides.
    """

    records: tuple[Record, ...]
    is_member: NDArray[np.bool_]
    record_ids: tuple[str, ...]
    provenance: Provenance
    details: tuple[CanaryDetails, ...] | None = None
    groups: tuple[str, ...] | None = None
    rows: Sequence[object] | None = field(default=None, repr=False, compare=False)
    batch_inputs: BatchInputs | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_member = np.array(self.is_member)
        is_member.setflags(write=False)
        object.__setattr__(self, "records", tuple(canonical_record(r) for r in self.records))
        object.__setattr__(self, "is_member", is_member)
        object.__setattr__(self, "record_ids", tuple(self.record_ids))
        self._check_shapes()
        self._check_details()
        self._check_groups()
        self._check_empty_records()
        self._check_class_sizes()
        self._check_overlap()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        # Pickle and deepcopy bring arrays back writable.
        self.is_member.setflags(write=False)

    def __repr__(self) -> str:
        # Not the records: notebooks, logs and tracebacks show what this returns.
        source = self.provenance
        seed = "" if source.seed is None else f", seed {source.seed}"
        groups = "" if self.groups is None else f", in {len(set(self.groups))} groups"
        sizes = f"{self.n_members} members, {self.n_non_members} non-members"
        return f"CanarySet({sizes}{groups}, {_DRAWN[source.method]}{seed})"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.describe())}</p>"

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def from_lists(
        cls,
        members: Iterable[Record],
        non_members: Iterable[Record],
        *,
        record_ids: Sequence[str] | None = None,
        method: Literal["user_lists", "trainer_datasets"] = "user_lists",
    ) -> "CanarySet":
        """Build a canary set from two collections whose membership the caller knows.

        Nothing shows that the two sides come from the same distribution. The leakage numbers may
        therefore include distribution shift (an attack may tell the sides apart without any help
        from the model), and no epsilon can be derived from them. Where possible, let
        `hold_out_canaries` draw the split.

        A record that repeats an earlier one of its own side, up to case and white space, is
        dropped: copies are not independent evidence.

        Args:
            members: Records that the model is trained on: a list, a `datasets.Dataset`, or
                anything else that yields records.
            non_members: Records that it is never trained on.
            record_ids: One unique name per record, members first; by default `member-0`, ...,
                `non-member-0`, ..., counted before repeated records are dropped.
            method: `trainer_datasets` if the two sides are a trainer's own datasets.

        Raises:
            ConfigurationError: if a side is a single record or a dictionary of splits, the number
                of ids is wrong, ids repeat, or a record has no accepted shape.
            EmptyRecordError: if a record holds nothing to score.
            TooFewCanariesError: if either side has fewer than 10 different records.
            OverlappingCanariesError: if a record is on both sides, up to case and white space.

        >>> members = [f"member text {i}" for i in range(10)]
        >>> canaries = CanarySet.from_lists(members, [f"other text {i}" for i in range(12)])
        >>> canaries.n_members, canaries.n_non_members
        (10, 12)
        """
        sides = {"members": members, "non_members": non_members}
        for name, side in sides.items():
            if isinstance(side, str | Mapping):
                raise ConfigurationError(
                    f"Got a {type(side).__name__} as `{name}`, which needs a collection of "
                    "records: pass a list of records, or one split of a DatasetDict."
                )
        member_rows, other_rows = list(members), list(non_members)
        records = [*member_rows, *other_rows]
        is_member = np.arange(len(records)) < len(member_rows)
        if record_ids is None:
            record_ids = [f"member-{i}" for i in range(len(member_rows))]
            record_ids += [f"non-member-{i}" for i in range(len(other_rows))]
        elif len(record_ids) != len(records):
            raise ConfigurationError(
                f"Got {len(record_ids)} record_ids for {len(member_rows)} members and "
                f"{len(other_rows)} non-members; one per record is needed, members first."
            )
        kept = _first_of_each(records, is_member)
        return cls(
            records=tuple(records[i] for i in kept),
            is_member=is_member[kept],
            record_ids=tuple(record_ids[i] for i in kept),
            provenance=Provenance(
                method=method,
                is_randomized=False,
                seed=None,
                n_pool=None,
                n_duplicates_removed=len(records) - len(kept),
                pool_fingerprint=None,
            ),
            rows=[records[i] for i in kept],
        )

    @property
    def n_members(self) -> int:
        """Number of records in the training set."""
        return int(np.count_nonzero(self.is_member))

    @property
    def n_non_members(self) -> int:
        """Number of records held out of the training set."""
        return len(self.records) - self.n_members

    @property
    def _n_units(self) -> "_Sizes":
        """Members and non-members, as groups where there are groups."""
        if self.groups is None:
            return _Sizes(self.n_members, self.n_non_members)
        sides = dict(zip(self.groups, self.is_member.tolist(), strict=True))
        n_member_groups = sum(sides.values())
        return _Sizes(n_member_groups, len(sides) - n_member_groups)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that stand for the exact records, their order, and all that is said of them.

        Case, labels and masks count here: statistics saved for one set must not be read for
        another that only looks alike after normalization.
        """
        return fingerprint([self.split_fingerprint, *map(exact_key, self.records)])

    @cached_property
    def split_fingerprint(self) -> str:
        """16 hex digits that stand for membership, ids, groups, details, and how the split came about.

        What figures may claim rests on these: a lower bound of epsilon on the word that coins were flipped.
        """
        details = None if self.details is None else [asdict(detail) for detail in self.details]
        said = (asdict(self.provenance), self.record_ids, self.is_member.tolist(), self.groups, details)
        return fingerprint(json.dumps(each, sort_keys=True, default=str) for each in said)

    @property
    def tiers(self) -> tuple[int, ...]:
        """Numbers of copies that members have in training, ascending; (1,) for the user's records."""
        return (1,) if self.details is None else tuple(sorted({d.n_repeats for d in self.details}))

    def of_tier(self, n_repeats: int) -> "CanarySet":
        """Return the members with this many copies in training, and the non-members meant for it.

        Raises:
            ConfigurationError: if there is no such tier.
            TooFewCanariesError: if the tier has fewer than 10 records of a side.
        """
        if n_repeats not in self.tiers:
            raise ConfigurationError(
                f"Got n_repeats={n_repeats}; the tiers are {self.tiers}: use one of them."
            )
        if self.details is None:
            return self
        return self.select([i for i, d in enumerate(self.details) if d.n_repeats == n_repeats])

    def indices_of(self, record_ids: Iterable[str]) -> list[int]:
        """Return the index of each of these records, in the order given; `select` takes them.

        Raises:
            ConfigurationError: if an id is none of this set's.

        >>> texts = [f"text {i}" for i in range(20)]
        >>> canaries = CanarySet.from_lists(texts[:10], texts[10:])
        >>> canaries.indices_of(["non-member-0", "member-2"])
        [10, 2]
        """
        index_of = {record_id: i for i, record_id in enumerate(self.record_ids)}
        wanted = list(record_ids)
        unknown = [record_id for record_id in wanted if record_id not in index_of]
        if unknown:
            raise ConfigurationError(
                f"Got {len(unknown)} record_ids that are not in this set, such as '{unknown[0]}': use ids of "
                "its own `record_ids`."
            )
        return [index_of[record_id] for record_id in wanted]

    def select(self, indices: Sequence[int], *, records: Sequence[Record] | None = None) -> "CanarySet":
        """Return the records with these indices, with all that is known of them.

        Args:
            indices: Which records, in the order wanted.
            records: The same records in another form, such as tokenized, one per index.

        Raises:
            ConfigurationError: if `records` does not hold one per index.
            TooFewCanariesError: if fewer than 10 records, or groups, of a side are left.
        """
        return CanarySet(
            records=tuple(self.records[i] for i in indices) if records is None else tuple(records),
            is_member=self.is_member[np.asarray(indices, dtype=np.intp)],
            record_ids=tuple(self.record_ids[i] for i in indices),
            provenance=self.provenance,
            details=None if self.details is None else tuple(self.details[i] for i in indices),
            groups=None if self.groups is None else tuple(self.groups[i] for i in indices),
            rows=None if self.rows is None else RowsByNumber(self.rows, indices),
            batch_inputs=self.batch_inputs,
        )

    @property
    def pair_indices(self) -> NDArray[np.intp]:
        """Record indices of the twins of each complete pair, (n_pairs, 2), members in no special column."""
        index_of: dict[str, list[int]] = {}
        for i, detail in enumerate(self.details or ()):
            if detail.pair_id is not None:
                index_of.setdefault(detail.pair_id, []).append(i)
        complete = [twins for twins in index_of.values() if len(twins) == 2]
        return np.array(complete, dtype=np.intp).reshape(-1, 2)

    def describe(self) -> str:
        """Say in one sentence how large the set is, how it was split, and what follows from it."""
        source = self.provenance
        if self.groups is None:
            sizes, unit = f"{self.n_members} members and {self.n_non_members} non-members", "record"
        else:
            n_groups = self._n_units
            sizes = (
                f"{n_groups.members} member groups ({self.n_members} records) and {n_groups.non_members} "
                f"non-member groups ({self.n_non_members} records)"
            )
            unit = "group"
        if source.method in ("inserted_coins", "inserted_pairs"):
            unit = "pair" if source.method == "inserted_pairs" else "canary"
            kinds = ", ".join(dict.fromkeys(detail.describe() for detail in self.details or ()))
            return (
                f"{sizes}, synthetic canaries ({kinds}), inserted by an independent fair coin flip for "
                f"each {unit} (seed {source.seed}), so the two sides differ only by chance and training. "
                "Strip them, or train without them, before a release."
            )
        repeated = "ones" if self.groups is None else "records"
        n_repeated = source.n_duplicates_removed
        left_out = f" after {n_repeated} repeated {repeated} were set aside" if n_repeated else ""
        if source.method == "hold_out_coins":
            return (
                f"{sizes}, by an independent fair coin flip for each {unit} (seed {source.seed}) drawn from "
                f"{source.n_pool} {unit}s{left_out}, so the two sides differ only by chance and training."
            )
        if source.is_randomized:
            return (
                f"{sizes}, drawn at random (seed {source.seed}) from {source.n_pool} {unit}s{left_out}, so "
                "the two sides differ only by chance and training."
            )
        origin = {
            "hold_out": "held out without a random draw",
            "user_lists": "taken from two lists that the user supplied",
            "trainer_datasets": "taken from the trainer's training and evaluation datasets",
        }[source.method]
        return (
            f"{sizes}, {origin} ({source.n_duplicates_removed} repeated records dropped): "
            "membership was not randomized, so the leakage numbers may include distribution shift "
            "and no epsilon can be derived."
        )

    def _check_shapes(self) -> None:
        n_records = len(self.records)
        if self.is_member.dtype != np.bool_ or self.is_member.shape != (n_records,):
            raise ConfigurationError(
                f"Got is_member of dtype {self.is_member.dtype} and shape {self.is_member.shape} "
                f"for {n_records} records; one boolean per record is needed."
            )
        if self.rows is not None and len(self.rows) != n_records:
            raise ConfigurationError(
                f"Got {len(self.rows)} rows for {n_records} records; one per record is needed."
            )
        if len(self.record_ids) != n_records:
            raise ConfigurationError(
                f"Got {len(self.record_ids)} record_ids for {n_records} records; one per record is needed."
            )
        if len(set(self.record_ids)) != n_records:
            n_repeated = n_records - len(set(self.record_ids))
            raise ConfigurationError(
                f"Got {n_repeated} repeated record_ids among {n_records}; each must name one "
                "record: make them unique."
            )

    def _check_details(self) -> None:
        if self.details is None:
            if self.provenance.method in ("inserted_coins", "inserted_pairs"):
                raise ConfigurationError(
                    f"Got method '{self.provenance.method}' without details; inserted canaries carry them: "
                    "use insert_canaries."
                )
            return
        object.__setattr__(self, "details", tuple(self.details))
        if len(self.details) != len(self.records):
            raise ConfigurationError(
                f"Got {len(self.details)} details for {len(self.records)} records; one per record is needed."
            )
        if any(d.row_indices and not m for d, m in zip(self.details, self.is_member, strict=True)):
            raise ConfigurationError(
                "Got row_indices for a non-member; only members have rows in the training set."
            )
        pair_ids = [detail.pair_id for detail in self.details if detail.pair_id is not None]
        is_split = [int(self.is_member[twins].sum()) == 1 for twins in self.pair_indices]
        if len(pair_ids) - len(set(pair_ids)) != len(is_split) or not all(is_split):
            raise ConfigurationError(
                "Got a pair that is not made of one member and one non-member: give the two canaries of "
                "each pair a `pair_id` of their own."
            )

    def _check_groups(self) -> None:
        if self.groups is None:
            return
        object.__setattr__(self, "groups", tuple(self.groups))
        if self.details is not None:
            raise ConfigurationError(
                "Got groups for inserted canaries, which have tiers of copies instead of groups: leave out "
                "`groups`, or draw groups of real records with hold_out_canaries."
            )
        if len(self.groups) != len(self.records):
            raise ConfigurationError(
                f"Got {len(self.groups)} groups for {len(self.records)} records; one per record is needed."
            )
        _check_membership_of_groups(self.groups, self.is_member)

    def _check_empty_records(self) -> None:
        empty = [i for i, record in enumerate(self.records) if is_empty(record)]
        if empty:
            raise EmptyRecordError(
                f"Got {len(empty)} canary records with no text, token or label to score, the first "
                f"at index {empty[0]} ('{self.record_ids[empty[0]]}'): remove them."
            )

    def _check_class_sizes(self) -> None:
        n_units = self._n_units
        if min(n_units) < MINIMUM_PER_CLASS:
            unit = "members" if self.groups is None else "member groups"
            raise TooFewCanariesError(
                f"Got {n_units.members} {unit} and {n_units.non_members} non-{unit} "
                f"({self.provenance.n_duplicates_removed} repeated records not counted); at least "
                f"{MINIMUM_PER_CLASS} of each are needed: add different records."
            )

    def _check_overlap(self) -> None:
        member_id_of_key: dict[str, str] = {}
        other_id_of_key: dict[str, str] = {}
        rows = zip(self.records, self.record_ids, self.is_member, strict=True)
        for record, record_id, member in rows:
            side = member_id_of_key if member else other_id_of_key
            side.setdefault(record_key(record), record_id)
        shared = [key for key in member_id_of_key if key in other_id_of_key]
        if shared:
            examples = ", ".join(
                f"'{member_id_of_key[key]}' = '{other_id_of_key[key]}'" for key in shared[:3]
            )
            raise OverlappingCanariesError(
                f"Got {len(shared)} records that are both a member and a non-member, up to case and "
                f"white space ({examples}); the sides must be disjoint: remove them from one side."
            )


def _check_membership_of_groups(groups: Sequence[str], is_member: NDArray[np.bool_]) -> None:
    sides: dict[str, bool] = {}
    pairs = zip(groups, is_member.tolist(), strict=True)
    n_split = len({name for name, member in pairs if sides.setdefault(name, member) != member})
    if n_split:
        raise OverlappingCanariesError(
            f"Got {n_split} groups with records on both sides; a group must be trained on as a whole or not "
            "at all: draw groups with hold_out_canaries(..., group_by=...)."
        )


def _first_of_each(records: Sequence[Record], is_member: NDArray[np.bool_]) -> list[int]:
    """Return the indices of the records that repeat no earlier one of their own side."""
    index_of: dict[tuple[str, bool], int] = {}
    for i, record in enumerate(records):
        # Empty records are all alike; each stays, for the error to count it.
        key = f"empty-{i}" if is_empty(record) else record_key(record)
        index_of.setdefault((key, bool(is_member[i])), i)
    return list(index_of.values())
