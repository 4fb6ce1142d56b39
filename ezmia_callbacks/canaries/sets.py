"""The canaries of one audit: the records, which of them are trained on, and who decided it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

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

MINIMUM_PER_CLASS = 10
SplitMethod: TypeAlias = Literal["hold_out", "user_lists", "trainer_datasets"]


@dataclass(frozen=True)
class Provenance:
    """How the split into members and non-members came about.

    Attributes:
        method: `hold_out` if this library drew the split, `user_lists` if the user supplied both
            sides, `trainer_datasets` if they are a trainer's training and evaluation sets.
        is_randomized: True only where this library drew membership at random.
        seed: Seed of that draw.
        n_pool: Number of records that were drawn from, after deduplication.
        n_duplicates_removed: Records that could not be canaries because another one has the same
            normalized content. `hold_out` leaves out all copies; lists keep the first.
        pool_fingerprint: Short digest of the records that were drawn from.

    Raises:
        ConfigurationError: if a split that this library did not draw is called randomized.

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
        if self.is_randomized and self.method != "hold_out":
            raise ConfigurationError(
                f"Got is_randomized=True with method '{self.method}'; only a split that this "
                "library drew counts as randomized: use hold_out_canaries."
            )


@dataclass(frozen=True, eq=False)
class CanarySet:
    """Records with known membership, on which leakage is measured.

    Build one with `hold_out_canaries` (numbers with guarantees) or `CanarySet.from_lists`.

    Attributes:
        records: The canary records, reduced to the fields that matter.
        is_member: True where the record is in the training set; shape (n_records,), read-only.
        record_ids: One unique name per record. Safe to log, unlike the records.
        provenance: How the split was made.

    Raises:
        ConfigurationError: if lengths differ, ids repeat, or a record has no accepted shape.
        EmptyRecordError: if a record holds nothing to score.
        TooFewCanariesError: if either side has fewer than 10 records.
        OverlappingCanariesError: if a record is on both sides, up to case and white space.
    """

    records: tuple[Record, ...]
    is_member: NDArray[np.bool_]
    record_ids: tuple[str, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        is_member = np.array(self.is_member)
        is_member.setflags(write=False)
        object.__setattr__(self, "records", tuple(canonical_record(r) for r in self.records))
        object.__setattr__(self, "is_member", is_member)
        object.__setattr__(self, "record_ids", tuple(self.record_ids))
        self._check_shapes()
        self._check_empty_records()
        self._check_class_sizes()
        self._check_overlap()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        # Pickle and deepcopy bring arrays back writable.
        self.is_member.setflags(write=False)

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
        )

    @property
    def n_members(self) -> int:
        """Number of records in the training set."""
        return int(np.count_nonzero(self.is_member))

    @property
    def n_non_members(self) -> int:
        """Number of records held out of the training set."""
        return len(self.records) - self.n_members

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that stand for the exact records, their order and their membership.

        Case, labels and masks count here: statistics saved for one set must not be read for
        another that only looks alike after normalization.
        """
        pairs = zip(self.records, self.is_member, strict=True)
        return fingerprint(f"{exact_key(record)}:{int(member)}" for record, member in pairs)

    def describe(self) -> str:
        """Say in one sentence how large the set is, how it was split, and what follows from it."""
        sizes = f"{self.n_members} members and {self.n_non_members} non-members"
        source = self.provenance
        if source.is_randomized:
            return (
                f"{sizes}, drawn at random (seed {source.seed}) from {source.n_pool} records after "
                f"{source.n_duplicates_removed} repeated ones were set aside, so that the two "
                "sides differ by chance and training only."
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

    def _check_empty_records(self) -> None:
        empty = [i for i, record in enumerate(self.records) if is_empty(record)]
        if empty:
            raise EmptyRecordError(
                f"Got {len(empty)} canary records with no text, token or label to score, the first "
                f"at index {empty[0]} ('{self.record_ids[empty[0]]}'): remove them."
            )

    def _check_class_sizes(self) -> None:
        if min(self.n_members, self.n_non_members) < MINIMUM_PER_CLASS:
            raise TooFewCanariesError(
                f"Got {self.n_members} members and {self.n_non_members} non-members "
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
                f"Got {len(shared)} records that are member and non-member at once, up to case and "
                f"white space ({examples}); the sides must be disjoint: remove them from one side."
            )


def _first_of_each(records: Sequence[Record], is_member: NDArray[np.bool_]) -> list[int]:
    """Return the indices of the records that repeat no earlier one of their own side."""
    index_of: dict[tuple[str, bool], int] = {}
    for i, record in enumerate(records):
        # Empty records are all alike; each stays, for the error to count it.
        key = f"empty-{i}" if is_empty(record) else record_key(record)
        index_of.setdefault((key, bool(is_member[i])), i)
    return list(index_of.values())
