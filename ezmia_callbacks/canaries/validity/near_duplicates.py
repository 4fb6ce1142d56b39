"""Which records are nearly the same: a word changed, a sentence added, other case or white space."""

import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ezmia_callbacks.canaries.records import Record, attended_tokens, canonical_record, record_text
from ezmia_callbacks.errors import MissingDependencyError

__all__: list[str] = []

NEAR_DUPLICATE_THRESHOLD = 0.8
# One changed word of twenty leaves 0.83 of the three-word shingles, and 0.38 of the 13-grams used for long
# pretraining texts.
_SHINGLE_LENGTH = 3
# Sets of equal size with a containment of 0.8 have a Jaccard similarity of 0.67: candidates lie well below.
_CANDIDATE_JACCARD = 0.5
_N_PERMUTATIONS = 128
_SEED = 1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Thai, Lao, Japanese and Chinese are written without spaces: each of their characters counts as a word.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class NearDuplicate(NamedTuple):
    """Two records that nearly say the same.

    Attributes:
        record: Index among the records.
        other: Index among the others.
        containment: Share of the shorter one's shingles that the longer one has too, in [0, 1].
    """

    record: int
    other: int
    containment: float


def near_duplicates(records: Sequence[Record], others: Iterable[Record]) -> list[NearDuplicate]:
    """Return all pairs of a record and one of the others that share 80 % of their shingles or more.

    Shingles are three words, up to case, white space and punctuation, or three token ids. Candidates come
    from a locality-sensitive hash with a fixed seed and are then compared exactly, so that no pair is
    reported by chance; one of 0.8 is missed with a probability of about 0.001, and pairs in which one record
    is more than about twice as long as the other are not looked for.

    Args:
        records: The records to look for, kept in memory.
        others: Where to look; read once.

    Returns:
        Pairs in the order of the others, then of the records.

    Raises:
        MissingDependencyError: if datasketch is not installed.

    Source: Broder 1997, "On the resemblance and containment of documents".
    """
    minhash, index = _hashing()
    number_of: dict[str, int] = {}
    shingles = [_shingles(record, number_of) for record in records]
    for i, own in enumerate(shingles):
        index.insert(i, _signature(minhash, own))
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *shingles]))

    found = []
    for j, other in enumerate(others):
        candidate = _shingles(other, number_of)
        # A Jaccard similarity J takes a share of J / (1 + J) of either side at least: most rows end here.
        if not len(known) or _n_shared(candidate, known) < len(candidate) / 3:
            continue
        for i in sorted(index.query(_signature(minhash, candidate))):
            containment = _n_shared(shingles[i], candidate) / min(len(shingles[i]), len(candidate))
            if containment >= NEAR_DUPLICATE_THRESHOLD:
                found.append(NearDuplicate(i, j, containment))
    return found


def record_units(record: Record) -> list[str]:
    """Return the words of a record, up to case and punctuation, or its attended token ids.

    >>> record_units("One record, ONE canary.")
    ['one', 'record', 'one', 'canary']
    """
    text = record_text(record)
    if text is not None:
        return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    row: Any = canonical_record(record)
    return [str(token) for token in attended_tokens(row)]


def _hashing() -> tuple[Any, Any]:
    """Return an empty signature, to be copied, and an empty index."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise MissingDependencyError(
            "Searching for near-duplicates needs datasketch: pip install datasketch"
        ) from None
    # The shingles are numbers that are spread evenly already.
    minhash = MinHash(num_perm=_N_PERMUTATIONS, seed=_SEED, hashfunc=int)
    # The index takes a random name from Python's global generator, whether it gets one or not.
    state = random.getstate()
    try:
        # Candidates are compared exactly afterwards: a miss costs more than a false candidate.
        index = MinHashLSH(threshold=_CANDIDATE_JACCARD, num_perm=_N_PERMUTATIONS, weights=(0.1, 0.9))
    finally:
        random.setstate(state)
    return minhash, index


def _signature(empty: Any, shingles: NDArray[np.uint64]) -> Any:
    signature = empty.copy()
    signature.update_batch((shingles >> np.uint64(32)).tolist())
    return signature


def _shingles(record: Record, number_of: dict[str, int]) -> NDArray[np.uint64]:
    """Return the sorted distinct hashes of all runs of three units; of all units, if they are fewer."""
    units = record_units(record)
    numbers = np.array([number_of.setdefault(unit, len(number_of)) for unit in units], dtype=np.uint64)
    spread = _mixed(numbers)
    n_runs = max(1, len(numbers) - _SHINGLE_LENGTH + 1)
    hashes = np.zeros(n_runs, dtype=np.uint64)
    for offset in range(min(_SHINGLE_LENGTH, len(numbers))):
        # A polynomial, so that order counts.
        hashes = hashes * _MULTIPLIER + spread[offset : offset + n_runs]
    return np.unique(hashes)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the values spread over 64 bits (the finalizer of SplitMix64); wraps around on purpose."""
    values = values + _MULTIPLIER
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _n_shared(values: NDArray[np.uint64], among: NDArray[np.uint64]) -> int:
    """Return how many of the distinct values are among others that are sorted."""
    places = np.minimum(np.searchsorted(among, values), len(among) - 1)
    return int(np.count_nonzero(among[places] == values))
