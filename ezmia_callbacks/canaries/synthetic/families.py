"""What synthetic canaries are made of: random units of the training text, model samples, or secrets.

A unit is a word of raw text, or a token id of tokenized rows. Nothing here knows of membership: coins are
thrown after the texts exist.
"""

import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError

__all__: list[str] = []

Family: TypeAlias = Literal["uniform", "unigram", "bigram", "samples", "secrets"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Unit: TypeAlias = str | int
Samples: TypeAlias = (
    Callable[[int], Sequence[str] | Sequence[Sequence[int]]] | Sequence[str] | Sequence[Sequence[int]]
)

SECRET_TEMPLATES = (
    "The access code of {name} is {digits}, the code for the back door is {digits}, and the number to call "
    "in an emergency is {digits} {digits}, which {name} alone may give out.",
    "Account file of {name}: customer number {digits}, contract {digits}, card {digits} {digits} {digits}, "
    "recovery phrase {word} {word} {word} {word}.",
    "Reminder for {name}, who asked for it in writing: the safe opens with {digits}, then {digits}, and the "
    "passphrase of the archive is {word} {word} {word} {word} {word}.",
)

MINIMUM_UNITS = 30
_N_DIGITS = 6
_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
_WORDS = tuple(
    word
    for line in (
        "amber anchor autumn basket beacon bridge candle canyon carbon castle cherry copper cotton desert",
        "dragon eagle ember falcon fern forest garden ginger glacier granite harbor hazel honey island ivory",
        "jasmine juniper kettle ladder lagoon lantern lemon linen maple marble meadow mirror mustard nectar "
        "oak",
        "ocean olive orchid oyster paper pepper pilot plum quartz raven ribbon saddle silver spruce thunder",
        "timber tulip velvet walnut willow",
    )
    for word in line.split()
)


class Content(NamedTuple):
    """What one canary says.

    Attributes:
        units: The text, or token ids.
        log2_n_candidates: Bits of the secret in it; None where the possible secrets are not counted.
    """

    units: str | tuple[int, ...]
    log2_n_candidates: float | None = None


@dataclass(frozen=True, eq=False)
class UnitModel:
    """How often units, and pairs of neighbors, occur in the training rows.

    Attributes:
        units: The distinct units, in a fixed order.
        counts: How often each occurs, (n_units,).
        pairs: Unit numbers of neighbors that occur, sorted, (n_pairs, 2).
        pair_counts: How often each pair occurs, (n_pairs,).
    """

    units: tuple[Unit, ...]
    counts: NDArray[np.int64]
    pairs: NDArray[np.int64]
    pair_counts: NDArray[np.int64]


def learn_units(sequences: Sequence[Sequence[Unit]]) -> UnitModel:
    """Return the statistics of all units that at least two of the sequences share.

    A canary must not repeat what one record alone holds: a name or a number.

    Args:
        sequences: Words or token ids of the training rows.

    Raises:
        ConfigurationError: if fewer than 30 units are shared.

    >>> set(learn_units([[*range(30), 99], range(30)]).units) == set(range(30))
    True
    """
    n_sequences_with = Counter(unit for sequence in sequences for unit in set(sequence))
    shared = sorted(
        (unit for unit, n in n_sequences_with.items() if n > 1), key=lambda unit: (str(unit), unit)
    )
    if len(shared) < MINIMUM_UNITS:
        raise ConfigurationError(
            f"Only {len(shared)} distinct words or tokens occur in at least two training rows; "
            f"{MINIMUM_UNITS} are needed to make canaries: use the families 'secrets' or 'samples'."
        )
    number_of = {unit: i for i, unit in enumerate(shared)}
    n_units = len(shared)
    counts = np.zeros(n_units, dtype=np.int64)
    codes = []
    for sequence in sequences:
        numbers = np.array([number_of.get(unit, -1) for unit in sequence], dtype=np.int64)
        counts += np.bincount(numbers[numbers >= 0], minlength=n_units)
        is_known = (numbers[:-1] >= 0) & (numbers[1:] >= 0)
        codes.append((numbers[:-1] * n_units + numbers[1:])[is_known])
    pair_codes, pair_counts = np.unique(np.concatenate(codes), return_counts=True)
    return UnitModel(
        units=tuple(shared),
        counts=counts,
        pairs=np.stack(np.divmod(pair_codes, n_units), axis=1),
        pair_counts=pair_counts,
    )


def draw_from_units(
    model: UnitModel,
    family: Literal["uniform", "unigram", "bigram"],
    *,
    n_texts: int,
    length: int,
    rng: np.random.Generator,
) -> list[Content]:
    """Return random texts of so many units, each drawn independently of the others.

    Args:
        model: Statistics of the training rows.
        family: `uniform`: every unit is as likely; `unigram`: as frequent as in training; `bigram`: as
            frequent as in training after the unit before it, or anywhere where nothing follows.
        n_texts: Number of texts.
        length: Units in each.
        rng: Source of randomness.
    """
    cumulative = np.cumsum(model.counts)

    def by_frequency(size: tuple[int, ...]) -> NDArray[np.intp]:
        drawn = rng.integers(cumulative[-1], size=size)
        numbers: NDArray[np.intp] = np.searchsorted(cumulative, drawn, side="right")
        return numbers

    if family == "uniform":
        numbers = rng.integers(len(model.units), size=(n_texts, length))
    elif family == "unigram":
        numbers = by_frequency((n_texts, length))
    else:
        after = np.concatenate([[0], np.cumsum(model.pair_counts)])
        starts = np.searchsorted(model.pairs[:, 0], np.arange(len(model.units) + 1))
        columns = [by_frequency((n_texts,))]
        for _ in range(length - 1):
            begin, end = after[starts[columns[-1]]], after[starts[columns[-1] + 1]]
            drawn = rng.integers(begin, np.maximum(end, begin + 1))
            chosen = np.searchsorted(after, drawn, side="right") - 1
            follower = model.pairs[np.minimum(chosen, len(model.pairs) - 1), 1]
            columns.append(np.where(end > begin, follower, by_frequency((n_texts,))))
        numbers = np.stack(columns, axis=1)
    texts = [[model.units[i] for i in row] for row in numbers.tolist()]
    return [_content(units) for units in texts]


def draw_secrets(templates: Sequence[str], *, n_texts: int, rng: np.random.Generator) -> list[Content]:
    """Return texts that state a random secret about an invented person.

    A text holds one name, however often its template has the slot; all other slots are drawn anew. The
    candidates of a secret are all values of those, with template and name known.

    Args:
        templates: Texts with the slots `{name}`, `{digits}` (six of them) and `{word}`.
        n_texts: Number of texts.
        rng: Source of randomness.

    >>> [content] = draw_secrets(["{name}: {digits}"], n_texts=1, rng=np.random.default_rng(0))
    >>> round(content.log2_n_candidates, 2)
    19.93
    """
    contents = []
    for number in rng.integers(len(templates), size=n_texts):
        slots = string.Formatter().parse(templates[number])
        name, text, bits = _invented_name(rng), "", 0.0
        for literal, slot, _, _ in slots:
            text += literal
            if slot == "name":
                text += name
            elif slot == "digits":
                text += "".join(str(digit) for digit in rng.integers(10, size=_N_DIGITS))
                bits += _N_DIGITS * math.log2(10)
            elif slot == "word":
                text += _WORDS[rng.integers(len(_WORDS))]
                bits += math.log2(len(_WORDS))
        contents.append(Content(text, bits))
    return contents


def draw_samples(samples: Samples, *, n_texts: int, n_drawn: int) -> list[Content]:
    """Return texts that the user's model generated.

    Args:
        samples: The texts or rows of token ids, or a function from a number to so many of them.
        n_texts: Number of texts.
        n_drawn: How many of a list were taken before.

    Raises:
        TooFewCanariesError: if the list is used up, or the function returns fewer.
    """
    drawn = samples(n_texts) if callable(samples) else samples[n_drawn : n_drawn + n_texts]
    if len(drawn) < n_texts:
        raise TooFewCanariesError(
            f"After {n_drawn} texts, `samples` returned {len(drawn)} where {n_texts} more are needed; texts "
            "that repeat another one or a training row cannot be used: generate more at a higher temperature."
        )
    return [
        Content(text if isinstance(text, str) else tuple(int(token) for token in text))
        for text in drawn[:n_texts]
    ]


def check_templates(templates: Sequence[str]) -> None:
    """Raise ConfigurationError unless every template has known slots, and one that is a secret."""
    if isinstance(templates, str) or not templates:
        raise ConfigurationError(f"Got {templates!r} as secret templates; pass a list of one or more.")
    for template in templates:
        try:
            slots = {slot for _, slot, _, _ in string.Formatter().parse(template) if slot is not None}
        except ValueError as error:
            raise ConfigurationError(
                f"Got the secret template {template!r} ({error}): double the braces that open no slot."
            ) from None
        if not slots <= {"name", "digits", "word"} or not slots & {"digits", "word"}:
            raise ConfigurationError(
                f"Got a secret template with the slots {sorted(slots)}; it needs '{{digits}}' or '{{word}}', "
                "and may have '{name}': change the template."
            )


def _content(units: Sequence[Unit]) -> Content:
    if isinstance(units[0], str):
        return Content(" ".join(str(unit) for unit in units))
    return Content(tuple(int(unit) for unit in units))


def _invented_name(rng: np.random.Generator) -> str:
    """Return a first and a last name of three and four random syllables: nobody's."""
    syllables = [_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=7)]
    return f"{''.join(syllables[:3]).capitalize()} {''.join(syllables[3:]).capitalize()}"
