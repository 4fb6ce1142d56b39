"""Put synthetic canaries into a training set, each by the flip of a coin."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ezmia_callbacks.canaries.hold_out import (
    ColumnarDataset,
    MapStyleDataset,
    check_number_of_coins,
    check_seed,
    checked_dataset,
    fair_coins,
    is_columnar,
    is_transformed,
    iterated,
    readable,
    select,
)
from ezmia_callbacks.canaries.records import (
    Record,
    RecordKind,
    canonical_record,
    fingerprint,
    is_empty,
    record_key,
    record_kind,
)
from ezmia_callbacks.canaries.sets import CanaryDetails, CanarySet, Provenance
from ezmia_callbacks.canaries.synthetic import families as texts
from ezmia_callbacks.canaries.synthetic.families import SECRET_TEMPLATES, Content, Family, Samples, UnitModel
from ezmia_callbacks.canaries.synthetic.placement import (
    TokenFrame,
    learned_units,
    text_row,
    token_frame,
    token_row,
)
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.files import write_atomically
from ezmia_callbacks.functional.planning import MINIMUM_PER_CLASS
from ezmia_callbacks.safe_text import get_logger

__all__: list[str] = []

logger = get_logger(__name__)

Design: TypeAlias = Literal["coins", "pairs"]
DatasetT = TypeVar("DatasetT")

# Below that, records hold too few wrongly predicted tokens for a score that tells members apart.
_RECOMMENDED_TOKENS = 32
_MAX_ROWS_LEARNED = 10_000
_MAX_ROUNDS = 10


def insert_canaries(
    train_dataset: DatasetT,
    *,
    n_canaries: int,
    families: Sequence[Family] = ("unigram", "bigram"),
    repetitions: Sequence[int] = (1,),
    design: Design = "coins",
    length: int = 64,
    samples: Samples | None = None,
    secret_templates: Sequence[str] = SECRET_TEMPLATES,
    prompt: str = "Write a short note.",
    max_fraction: float = 0.01,
    seed: int = 0,
) -> tuple[DatasetT, CanarySet]:
    """Make canaries, put some of them into the training set by fair coins, and return both.

    All canaries are made first, alike for both sides; then the coins are flipped, and epsilon can be
    bounded from them. Canaries of several families, and of several numbers of copies, come in equal
    shares. No canary repeats another one or a training row.

    A canary is what the model learns of its row: the text, the completion, the last assistant turn, the
    chosen side, or the tokens with loss. The rest of the row is the same short prompt for all. Columns
    without a part in the record are copied from a training row drawn at random.

    The model learns the canaries: strip them before a release, with `strip_canaries` or the file of
    `save_removal_list`, and train again, or be ready to see them generated.

    Args:
        train_dataset: Training records, as for `hold_out_canaries`.
        n_canaries: Canaries of both kinds. Coins need at least 50 for each number of copies, pairs 20.
        families: What canaries are made of: random words or tokens of the training rows that at least two
            rows share (`uniform`, or as frequent as there: `unigram`, `bigram`), the model's own `samples`,
            or `secrets` that a template states. Tokenized rows take the first four.
        repetitions: Numbers of copies that members get, such as (1, 4, 16). One copy is the leakage of a
            normal record; numbers are never pooled.
        design: `coins` flips an independent fair coin for each canary; `pairs` makes twins of one family
            and throws one for each pair, which of the two is inserted: both sides are equally large then.
        length: Words or tokens of a `uniform`, `unigram` or `bigram` canary. Tokenized rows that are all
            full and equally long decide themselves.
        samples: For the family `samples`: texts or rows of token ids, drawn from the model at a high
            temperature, or a function from a number to so many of them.
        secret_templates: Texts with the slots `{name}`, `{digits}` (six of them) and `{word}`.
        prompt: What canaries answer to, where raw rows have a prompt.
        max_fraction: Largest share of inserted rows in the result that is expected of the coins, in (0, 1).
        seed: Seed of every draw, non-negative. The global random generators are not used.

    Returns:
        The training set with the canaries at random places, of the type that `hold_out_canaries` returns,
        and the canaries, with ids that do not tell membership.

    Raises:
        ConfigurationError: if an argument is outside its range, the inserted rows would be too many, or the
            dataset is streamed, a dictionary of splits, transformed when read or not a dataset.
        TooFewCanariesError: if there are too few canaries for the design, or too few samples.

    Source: Panda et al. 2025, arXiv:2503.06808 (unigram and bigram canaries); Steinke et al. 2023,
    arXiv:2305.08846 (coins).

    >>> texts = [" ".join(f"word{(i * 7 + j * j) % 90}" for j in range(50)) for i in range(3000)]
    >>> train_texts, canaries = insert_canaries(texts, n_canaries=50, seed=1)
    >>> len(train_texts) - len(texts) == canaries.n_members
    True
    """
    cells = _checked_cells(families, repetitions, design, n_canaries)
    _check_choices(families, length=length, samples=samples, secret_templates=secret_templates, seed=seed)
    source = checked_dataset(train_dataset)
    if is_columnar(source) and is_transformed(cast(ColumnarDataset, source)):
        raise ConfigurationError(
            "Got a dataset whose rows are computed when they are read; canaries need stored rows: apply the "
            "transform with `map`, or insert the canaries before setting it."
        )
    rows = readable(source)
    _check_fraction(cells, n_rows=len(rows), design=design, max_fraction=max_fraction)
    content_rng, coin_rng, place_rng = np.random.default_rng(seed).spawn(3)

    maker = _Maker(
        rows,
        cast(MapStyleDataset[Any], _unformatted(source)),
        families,
        length=length,
        samples=samples,
        secret_templates=secret_templates,
        prompt=prompt,
        rng=content_rng,
    )
    made = maker.make([family for family, _ in cells])
    _warn_if_short(made)

    coins = fair_coins(n_canaries if design == "coins" else n_canaries // 2, coin_rng)
    is_member = coins if design == "coins" else np.stack([coins, ~coins], axis=1).ravel()
    copies = np.repeat(np.arange(n_canaries), [n * m for (_, n), m in zip(cells, is_member, strict=True)])
    order = _shuffled_order(len(rows), len(copies), place_rng)
    row_indices: list[list[int]] = [[] for _ in cells]
    for position in np.flatnonzero(order >= len(rows)):
        row_indices[copies[order[position] - len(rows)]].append(int(position))

    names = _names(cells, design)
    canaries = CanarySet(
        records=tuple(canary.record for canary in made),
        is_member=is_member,
        record_ids=tuple(name.record_id for name in names),
        provenance=Provenance(
            method="inserted_coins" if design == "coins" else "inserted_pairs",
            is_randomized=True,
            seed=int(seed),
            n_pool=n_canaries,
            n_duplicates_removed=maker.n_rejected,
            pool_fingerprint=fingerprint(record_key(canary.record) for canary in made),
        ),
        details=tuple(
            CanaryDetails(family, n_repeats, name.pair_id, tuple(places), canary.log2_n_candidates)
            for (family, n_repeats), name, places, canary in zip(cells, names, row_indices, made, strict=True)
        ),
        rows=[canary.row for canary in made],
    )
    joined = _joined(source, [made[i].row for i in copies])
    return cast(DatasetT, select(joined, order.tolist())), canaries


def removal_list(canaries: CanarySet) -> list[dict[str, object]]:
    """Return what has to leave the training set before a release: one entry per inserted canary.

    Each entry has the id, the rows of the returned training set that hold it, and the record itself, all
    fit for JSON. The records are synthetic; the file is safe to keep.

    Raises:
        ConfigurationError: if the canaries were not inserted.
    """
    if canaries.details is None:
        raise ConfigurationError(
            f"Got canaries of method '{canaries.provenance.method}', which are your own records; only "
            "inserted canaries can be removed."
        )
    return [
        {
            "record_id": record_id,
            "family": detail.family,
            "row_indices": list(detail.row_indices),
            "record": record,
        }
        for record_id, record, detail, member in zip(
            canaries.record_ids, canaries.records, canaries.details, canaries.is_member, strict=True
        )
        if member
    ]


def save_removal_list(canaries: CanarySet, path: str | Path) -> None:
    """Write `removal_list` as JSON, with the method and the seed.

    Raises:
        ConfigurationError: if the canaries were not inserted.
    """
    source = canaries.provenance
    content = {"method": source.method, "seed": source.seed, "canaries": removal_list(canaries)}
    write_atomically(Path(path), json.dumps(content, indent=1, ensure_ascii=False, default=str))


def strip_canaries(train_dataset: DatasetT, canaries: CanarySet) -> DatasetT:
    """Return the training set without the inserted canaries, which are found by their content.

    Args:
        train_dataset: What `insert_canaries` returned; rows may have moved since.
        canaries: The canaries.

    Raises:
        ConfigurationError: if the canaries were not inserted, or not all of their copies are there.
    """
    removals = removal_list(canaries)
    keys = {record_key(cast(Record, entry["record"])) for entry in removals}
    n_inserted = sum(len(cast(list[int], entry["row_indices"])) for entry in removals)
    source = checked_dataset(train_dataset)
    kept = [i for i, row in enumerate(iterated(readable(source))) if record_key(row) not in keys]
    n_found = len(source) - len(kept)
    if n_found != n_inserted:
        raise ConfigurationError(
            f"Found {n_found} of {n_inserted} inserted rows; they can be stripped only together: pass "
            "the training set that insert_canaries returned, before tokenization or filtering."
        )
    return cast(DatasetT, select(source, kept))


class _Made(NamedTuple):
    """One canary: its training row, the record that is audited, and the size of its secret."""

    row: Any
    record: Record
    content: Content

    @property
    def log2_n_candidates(self) -> float | None:
        return self.content.log2_n_candidates


class _Name(NamedTuple):
    record_id: str
    pair_id: str | None


class _Cell(NamedTuple):
    family: Family
    n_repeats: int


class _Maker:
    """Makes rows that repeat neither one another nor a training row; knows nothing of membership."""

    def __init__(
        self,
        rows: MapStyleDataset[Record],
        hosts: MapStyleDataset[Any],
        families: Sequence[Family],
        *,
        length: int,
        samples: Samples | None,
        secret_templates: Sequence[str],
        prompt: str,
        rng: np.random.Generator,
    ) -> None:
        self._hosts, self._samples, self._templates = hosts, samples, secret_templates
        self._prompt, self._length, self._rng = prompt, length, rng
        self._taken, self._usable = _keys_and_usable(rows)
        self._kind: RecordKind = record_kind(rows[self._usable[0]])
        self._frame: TokenFrame | None = None
        n_learned = min(len(self._usable), _MAX_ROWS_LEARNED)
        learned = [rows[i] for i in np.sort(rng.choice(self._usable, size=n_learned, replace=False)).tolist()]
        if {record_kind(row) for row in learned} != {self._kind}:
            raise ConfigurationError(
                "The training rows have different shapes, and canaries need a single one: map all rows to "
                "the same columns."
            )
        if self._kind == "tokenized":
            self._frame = token_frame([canonical_record(row) for row in learned])
            self._length = self._frame.n_content(length)
            if "secrets" in families:
                raise ConfigurationError(
                    "The family 'secrets' is text, but the training rows are token ids: insert the "
                    "canaries before tokenization, or leave out 'secrets'."
                )
        self._model: UnitModel | None = None
        if not {"samples", "secrets"}.issuperset(families):
            self._model = texts.learn_units([self._content_units(row) for row in learned])
        self._n_samples_drawn = 0
        self.n_rejected = 0

    def make(self, families: Sequence[Family]) -> list[_Made]:
        """Return one canary for each entry."""
        made: list[_Made | None] = [None] * len(families)
        for family in dict.fromkeys(families):
            open_places = [i for i, name in enumerate(families) if name == family]
            for _ in range(_MAX_ROUNDS):
                for place, canary in zip(open_places, self._draw_rows(family, len(open_places)), strict=True):
                    made[place] = canary
                open_places = [place for place in open_places if made[place] is None]
                if not open_places:
                    break
            else:
                raise TooFewCanariesError(
                    f"{len(open_places)} of {families.count(family)} canaries of the family '{family}' "
                    f"still repeat another canary or a training row after {_MAX_ROUNDS} rounds: ask for "
                    "fewer or longer ones."
                )
        return [canary for canary in made if canary is not None]

    def _draw_rows(self, family: Family, n_rows: int) -> list[_Made | None]:
        contents = self._draw(family, n_rows)
        others = self._draw(family, n_rows) if self._kind == "preference" else contents
        host_numbers = self._rng.choice(self._usable, size=n_rows)
        return [
            self._accepted(content, other, self._hosts[int(i)])
            for content, other, i in zip(contents, others, host_numbers, strict=True)
        ]

    def _draw(self, family: Family, n_texts: int) -> list[Content]:
        if family == "secrets":
            return texts.draw_secrets(self._templates, n_texts=n_texts, rng=self._rng)
        if family == "samples" and self._samples is not None:
            drawn = texts.draw_samples(self._samples, n_texts=n_texts, n_drawn=self._n_samples_drawn)
            self._n_samples_drawn += n_texts
            return drawn
        model = cast(UnitModel, self._model)
        return texts.draw_from_units(
            model, cast(Any, family), n_texts=n_texts, length=self._length, rng=self._rng
        )

    def _accepted(self, content: Content, other: Content, host: Any) -> _Made | None:
        is_text = isinstance(content.units, str)
        if is_text != (self._frame is None):
            raise ConfigurationError(
                f"Got {'texts' if is_text else 'token ids'} as samples for training rows of the kind "
                f"'{self._kind}': pass rows of token ids for tokenized rows, texts for all others."
            )
        if self._frame is not None:
            ids = cast(tuple[int, ...], content.units)
            room = self._frame.n_content(len(ids))
            if len(ids) < room:
                raise ConfigurationError(
                    f"Got a sample of {len(ids)} tokens, but training rows have room for {room}: pass "
                    "samples at least that long."
                )
            ids = ids[:room]
            row = token_row(host, ids, self._frame)
        else:
            row = text_row(
                host, self._kind, str(content.units), other_text=str(other.units), prompt=self._prompt
            )
        record = canonical_record(row)
        key = record_key(record)
        if is_empty(record) or key in self._taken:
            self.n_rejected += 1
            return None
        self._taken.add(key)
        return _Made(row, record, content)

    def _content_units(self, row: Record) -> list[str] | list[int]:
        units = learned_units(row, self._kind)
        if self._frame is None:
            return units
        # What frames every row is no content: an end-of-text token would end a canary early.
        return [unit for unit in cast(list[int], units) if unit not in (self._frame.first, self._frame.last)]


def _keys_and_usable(rows: MapStyleDataset[Record]) -> tuple[set[str], list[int]]:
    """Return the keys of all rows, and the indices of those that are not empty."""
    keys, usable = set(), []
    for i, row in enumerate(iterated(rows)):
        if not is_empty(row):
            keys.add(record_key(row))
            usable.append(i)
    if not usable:
        raise ConfigurationError(
            f"None of the {len(rows)} training rows has anything to learn, so there is nothing to model "
            "canaries on: pass the training set itself."
        )
    return keys, usable


def _checked_cells(
    families: Sequence[Family], repetitions: Sequence[int], design: Design, n_canaries: int
) -> list[_Cell]:
    """Return family and number of copies of each canary, in equal shares; twins share both."""
    known = set(families) <= set(texts.FAMILIES) and not isinstance(families, str)
    if not known or not families or len(set(families)) < len(families):
        raise ConfigurationError(
            f"Got families={families!r}; use one or more of {list(texts.FAMILIES)}, once each."
        )
    if not repetitions or min(repetitions) < 1 or len(set(repetitions)) < len(repetitions):
        raise ConfigurationError(
            f"Got repetitions={repetitions!r}; use different numbers of copies from 1, such as (1, 4, 16)."
        )
    if design not in ("coins", "pairs"):
        raise ConfigurationError(f"Got design={design!r}; use 'coins' or 'pairs'.")
    if design == "pairs" and n_canaries % 2:
        raise ConfigurationError(f"Got n_canaries={n_canaries} for pairs; use an even number.")
    kinds = [_Cell(family, n_repeats) for n_repeats, family in product(repetitions, families)]
    n_units = n_canaries if design == "coins" else n_canaries // 2
    cells = [kinds[i % len(kinds)] for i in range(n_units)]
    for n_repeats in repetitions:
        n_of_tier = sum(cell.n_repeats == n_repeats for cell in cells)
        if design == "coins":
            check_number_of_coins(
                n_of_tier, f"`n_canaries` (here {n_canaries} for repetitions={repetitions})"
            )
        elif n_of_tier < MINIMUM_PER_CLASS:
            raise TooFewCanariesError(
                f"Asked for {n_of_tier} pairs with {n_repeats} copies; at least {MINIMUM_PER_CLASS} for each "
                f"number of copies are needed: raise `n_canaries` (here {n_canaries} for "
                f"repetitions={repetitions})."
            )
    return cells if design == "coins" else [cell for cell in cells for _ in range(2)]


def _check_choices(
    families: Sequence[Family],
    *,
    length: int,
    samples: Samples | None,
    secret_templates: Sequence[str],
    seed: int,
) -> None:
    check_seed(seed)
    texts.check_templates(secret_templates)
    if length < 2:
        raise ConfigurationError(
            f"Got length={length}; at least 2 are needed, and 32 or more are recommended."
        )
    if ("samples" in families) != (samples is not None):
        raise ConfigurationError(
            "The family 'samples' and the argument `samples` go together: pass texts that the model "
            "generated, or a function that returns them, and name the family."
        )


def _check_fraction(cells: Sequence[_Cell], *, n_rows: int, design: Design, max_fraction: float) -> None:
    """Raise if too many rows would be inserted. Expected ones count: the coins decide about no error."""
    if not 0 < max_fraction < 1:
        raise ConfigurationError(f"Got max_fraction={max_fraction}; it needs to lie in (0, 1), such as 0.01.")
    n_inserted = sum(cell.n_repeats for cell in cells) / 2
    fraction = n_inserted / (n_rows + n_inserted)
    if fraction > max_fraction:
        n_allowed = int(max_fraction / (1 - max_fraction) * n_rows)
        raise ConfigurationError(
            f"About {n_inserted:g} inserted rows among {n_rows} would be {fraction:.2%} of the training set, "
            f"more than max_fraction={max_fraction:g}, which allows {n_allowed}: ask for fewer canaries or "
            "repetitions, or raise `max_fraction` (a larger share of canaries costs model quality)."
        )


def _warn_if_short(made: Sequence[_Made]) -> None:
    # A token is about four letters of English text, and words are one token or more.
    lengths = [
        max(len(units.split()), len(units) // 4) if isinstance(units, str) else len(units)
        for units in (canary.content.units for canary in made)
    ]
    n_short = sum(length < _RECOMMENDED_TOKENS for length in lengths)
    if n_short:
        logger.warning(
            "%d of %d canaries have fewer than about %d tokens (the shortest has %d): their scores will be "
            "noisy. Use longer ones.",
            n_short,
            len(made),
            _RECOMMENDED_TOKENS,
            min(lengths),
        )


def _names(cells: Sequence[_Cell], design: Design) -> list[_Name]:
    names = []
    for i, (family, n_repeats) in enumerate(cells):
        if design == "coins":
            names.append(_Name(f"{family}-x{n_repeats}-{i:05d}", None))
        else:
            pair_id = f"{family}-x{n_repeats}-{i // 2:05d}"
            names.append(_Name(pair_id + "ab"[i % 2], pair_id))
    return names


def _shuffled_order(n_rows: int, n_inserted: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return for each position of the result which row stands there; inserted rows count from `n_rows`."""
    order = np.full(n_rows + n_inserted, -1, dtype=np.int64)
    places = rng.choice(len(order), size=n_inserted, replace=False)
    order[places] = n_rows + np.arange(n_inserted)
    order[order < 0] = np.arange(n_rows)
    return order


def _unformatted(dataset: MapStyleDataset[Record]) -> object:
    return cast(ColumnarDataset, dataset).with_format(None) if is_columnar(dataset) else dataset


def _joined(dataset: Any, rows: list[Any]) -> MapStyleDataset[Record]:
    """Return the dataset with the rows behind it, of the same type where `select` keeps it."""
    joined: Any
    if isinstance(dataset, list | tuple):
        joined = [*dataset, *rows] if isinstance(dataset, list) else (*dataset, *rows)
    elif is_columnar(dataset):
        # Imported here, as torch below: other containers need neither.
        from datasets import Dataset, concatenate_datasets

        columns = {name: [row[name] for row in rows] for name in dataset.column_names}
        inserted = Dataset.from_dict(columns, features=dataset.features)
        shown = dict(dataset.format)
        joined = concatenate_datasets([dataset.with_format(None), inserted]).with_format(
            shown["type"], shown["columns"], shown["output_all_columns"], **shown["format_kwargs"]
        )
    else:
        from torch.utils.data import ConcatDataset

        joined = ConcatDataset([dataset, cast(Any, rows)])
    return cast(MapStyleDataset[Record], joined)
