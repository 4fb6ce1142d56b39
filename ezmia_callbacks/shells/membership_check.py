"""Whether members are among the rows that are trained on, and non-members are not.

Used by the shells alone. The mistakes that this catches read as "no leakage": keeping the
training set from before the hold-out, or training on rows that were made in another way.
"""

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.canaries.records import record_key
from ezmia_callbacks.errors import ConfigurationError, OverlappingCanariesError

__all__: list[str] = []

# Reading every training row of a huge set would cost more than the audit it protects.
_MAX_ROWS_CHECKED = 200_000
_ROWS_READ_AT_ONCE = 1000
# Some ten seconds of work.
_MAX_TOKENS_COMPARED = 2_000_000
_TOKEN_COLUMNS = ("input_ids", "attention_mask", "seq_lengths", "prompt_ids", "chosen_ids")
_IMAGE_COLUMNS = ("image", "images", "pixel_values")


def sample_training_rows(dataset: Any) -> list[dict[str, list[int]]] | None:
    """Training rows in which near copies of canaries can be looked for; None if there are none of that kind.

    Of a large set it is a sample, always the same: near copies tell how a set was made, not each of them.

    Args:
        dataset: The rows that will be trained on, one record each.
    """
    if not is_indexable(dataset) or not len(dataset):
        return None
    rows: list[dict[str, list[int]]] = []
    n_tokens = 0
    for index in np.random.default_rng(0).permutation(len(dataset)):
        row = dataset[int(index)]
        if not isinstance(row, Mapping) or "input_ids" not in row or "seq_lengths" in row:
            return None
        ids = np.asarray(row["input_ids"]).tolist()
        n_tokens += len(ids)
        if rows and n_tokens > _MAX_TOKENS_COMPARED:
            break
        rows.append({"input_ids": ids})
    return rows


def check_membership(dataset: Any, canaries: CanarySet, keys: Mapping[str, bytes]) -> list[str]:
    """What is wrong or could not be checked, in words; empty if the canaries are where they belong.

    Args:
        dataset: The rows that will be trained on.
        canaries: The canaries.
        keys: By record id, the key of each one's own training row (`keys_of`).

    Raises:
        OverlappingCanariesError: if a non-member is among the training rows.
    """
    if not is_indexable(dataset):
        return ["Training on a stream: it cannot be checked that non-members are absent from it."]
    index_of = {keys[record_id]: i for i, record_id in enumerate(canaries.record_ids) if record_id in keys}
    n_records, found = 0, set[int]()
    for row in islice(_rows(dataset), _MAX_ROWS_CHECKED):
        row_keys = keys_of(row)
        n_records += len(row_keys)
        found.update(index_of[key] for key in row_keys if key in index_of)
    if not n_records:
        return [
            "The training rows have neither token ids nor text under a known name: it cannot be checked "
            "that members are among them and non-members are not."
        ]
    trained_on = sorted(i for i in found if not canaries.is_member[i])
    if trained_on:
        examples = ", ".join(canaries.record_ids[i] for i in trained_on[:3])
        raise OverlappingCanariesError(
            f"{len(trained_on)} of {canaries.n_non_members} non-members are in the training set (first: "
            f"{examples}): leakage would read far too low. Train on the dataset that `hold_out_canaries` "
            "returned, not on the one it was given."
        )
    if len(dataset) > _MAX_ROWS_CHECKED:
        return [
            f"Only the first {_MAX_ROWS_CHECKED} of {len(dataset)} training rows were checked for canaries."
        ]
    n_missing = canaries.n_members - len(found)
    if n_missing:
        return [
            f"{n_missing} of {canaries.n_members} members were not found among the training rows, token for "
            "token. If the rows are packed or processed on the fly that is expected; otherwise the members "
            "are not trained on, or not in this form (template, truncation), and leakage will read too low."
        ]
    return []


def keys_of(row: Any) -> list[bytes]:
    """One key for each record in a training row: several if it is packed, none if it is not readable.

    Keys are the attended token ids, of a preference pair those of prompt and chosen side; of a row that is
    tokenized later they are `record_key`. The same words about another image have another key.
    """
    if not isinstance(row, Mapping):
        return []
    if row.get("input_ids") is not None:
        ids = _array(row["input_ids"])
        mask = row.get("attention_mask")
        # TRL cuts token ids and leaves the mask, which it does not read, as long as it was.
        if mask is not None and len(mask) == len(ids):
            ids = ids[_array(mask) != 0]
        lengths = row.get("seq_lengths")
        records = [ids] if lengths is None else np.split(ids, np.cumsum(_array(lengths))[:-1])
    elif row.get("prompt_ids") is not None and row.get("chosen_ids") is not None:
        records = [np.concatenate([_array(row["prompt_ids"]), _array(row["chosen_ids"])])]
    else:
        try:
            return [record_key(row).encode() + _image_key(row)]
        except ConfigurationError:
            return []
    return [record.tobytes() + _image_key(row) for record in records]


def _image_key(row: Mapping[str, Any]) -> bytes:
    """Stands for the images of a row, in whatever form they are stored; empty if it has none."""
    images = [row[name] for name in _IMAGE_COLUMNS if row.get(name) is not None]
    if not images:
        return b""
    digest = hashlib.sha256()
    for image in images:
        _add_image(digest, image)
    return digest.digest()


def _add_image(digest: Any, image: Any) -> None:
    if isinstance(image, Mapping):
        for _, item in sorted(image.items()):
            _add_image(digest, item)
    elif isinstance(image, list | tuple) and not all(isinstance(item, int | float) for item in image):
        for item in image:
            _add_image(digest, item)
    elif isinstance(image, str | bytes | None):
        digest.update(repr(image).encode())
    else:
        is_tensor = hasattr(image, "tolist") and not isinstance(image, np.ndarray)
        # Lists of lists, arrays and tensors of the same numbers are the same image.
        values = np.asarray(image.tolist() if is_tensor else image, dtype=np.float32)
        digest.update(values.tobytes())


def is_indexable(dataset: Any) -> bool:
    """Whether rows can be counted and read by number; streams inherit a `__getitem__` that only raises."""
    is_streamed = any(base.__name__ == "IterableDataset" for base in type(dataset).__mro__)
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not is_streamed


def _array(values: Any) -> np.ndarray:
    is_tensor = hasattr(values, "tolist") and not isinstance(values, np.ndarray)
    return np.asarray(values.tolist() if is_tensor else values, dtype=np.int64)


def _rows(dataset: Any) -> Iterator[Any]:
    """All rows; of a dataset with columns of tokens, these only."""
    names = getattr(dataset, "column_names", None) or ()
    columns = [name for name in names if name in _TOKEN_COLUMNS]
    columns += [name for name in names if columns and name in _IMAGE_COLUMNS]
    # A transform may replace any column when a row is read.
    if columns and dataset.format["type"] != "custom":
        # Five times as fast as row by row.
        for batch in dataset.select_columns(columns).with_format("numpy").iter(_ROWS_READ_AT_ONCE):
            yield from (
                dict(zip(columns, row, strict=True)) for row in zip(*map(batch.get, columns), strict=True)
            )
        return
    yield from (dataset[index] for index in range(len(dataset)))
