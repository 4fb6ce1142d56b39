from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ezmia_callbacks.canaries.synthetic.families import (
    SECRET_TEMPLATES,
    check_templates,
    draw_from_units,
    draw_samples,
    draw_secrets,
    learn_units,
)
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError

UNITS = [f"w{i:02}" for i in range(40)]
# Each unit is followed by the next one, or by the first.
RING = [[*UNITS, UNITS[0]]] * 2


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def words_of(contents) -> list[list[str]]:
    return [content.units.split() for content in contents]


def test_units_of_one_record_alone_are_never_learned():
    model = learn_units([[*UNITS, "Alice"], [*UNITS, "Bob", "Bob"]])

    assert set(model.units) == set(UNITS)
    assert model.counts.tolist() == [2] * 40


def test_too_few_shared_units_are_refused_with_numbers():
    with pytest.raises(ConfigurationError, match=r"Only 29 distinct .* 30 are needed"):
        learn_units([UNITS[:29], UNITS])


def test_uniform_units_ignore_frequency_and_unigrams_follow_it():
    rows = [[*UNITS, *[UNITS[0]] * 40]] * 2
    model = learn_units(rows)

    shares = {
        family: Counter(
            word
            for words in words_of(draw_from_units(model, family, n_texts=100, length=100, rng=rng()))
            for word in words
        )[UNITS[0]]
        / 10_000
        for family in ("uniform", "unigram")
    }

    # Binomial(10,000): standard deviations 0.0016 and 0.005.
    assert shares["uniform"] == pytest.approx(1 / 40, abs=0.008)
    assert shares["unigram"] == pytest.approx(41 / 80, abs=0.025)


def test_bigrams_follow_the_unit_before():
    model = learn_units(RING)

    for words in words_of(draw_from_units(model, "bigram", n_texts=50, length=60, rng=rng())):
        numbers = np.array([UNITS.index(word) for word in words])
        assert ((numbers[1:] - numbers[:-1]) % 40 == 1).all()


def test_bigrams_have_the_frequencies_of_the_rows():
    # After w00 comes w01 three times in four, w02 otherwise.
    rows = [[UNITS[0], UNITS[1]] * 3 + [UNITS[0], UNITS[2]] + UNITS[3:]] * 2
    model = learn_units(rows)

    followers = Counter(
        follower
        for words in words_of(draw_from_units(model, "bigram", n_texts=200, length=100, rng=rng()))
        for unit, follower in pairwise(words)
        if unit == UNITS[0]
    )

    assert set(followers) == {UNITS[1], UNITS[2]}
    assert followers[UNITS[1]] / followers.total() == pytest.approx(0.75, abs=0.05)


def test_a_unit_that_nothing_follows_is_followed_by_any():
    model = learn_units([UNITS] * 2)

    texts = words_of(draw_from_units(model, "bigram", n_texts=5, length=100, rng=rng()))

    assert {len(words) for words in texts} == {100}
    assert any(UNITS[-1] in words[:-1] for words in texts)


@pytest.mark.parametrize("family", ["uniform", "unigram", "bigram"])
def test_token_ids_stay_token_ids(family):
    model = learn_units([list(range(50))] * 2)

    contents = draw_from_units(model, family, n_texts=3, length=10, rng=rng())

    assert [len(content.units) for content in contents] == [10] * 3
    assert {type(token) for content in contents for token in content.units} == {int}


def test_secrets_fill_every_slot_and_count_their_candidates():
    template = "{name} has {digits}, {word} and {digits}; so says {name}."

    contents = draw_secrets([template], n_texts=50, rng=rng())

    texts = [content.units for content in contents]
    assert len(set(texts)) == 50
    assert not any("{" in text for text in texts)
    first, second = texts[0].split(" has ")[0], texts[0].split("so says ")[1]
    assert second == f"{first}."
    # 10^6 numbers twice, and 64 words.
    assert contents[0].log2_n_candidates == pytest.approx(np.log2(1e12 * 64))


def test_digits_are_uniform():
    contents = draw_secrets(["{digits}"], n_texts=2000, rng=rng())

    counts = Counter("".join(content.units for content in contents))
    # Binomial(12,000, 0.1): standard deviation 33.
    assert all(abs(counts[str(digit)] - 1200) < 165 for digit in range(10))


def test_built_in_templates_are_fit_for_use_and_long_enough():
    check_templates(SECRET_TEMPLATES)

    texts = [content.units for content in draw_secrets(SECRET_TEMPLATES, n_texts=60, rng=rng())]
    # About four letters to a token.
    assert min(len(text) / 4 for text in texts) >= 32


@pytest.mark.parametrize(
    "templates", [["{name} only"], ["{digits} {other}"], [], "{digits}", ["no slot"], ["{digits} {"]]
)
def test_templates_without_a_secret_are_refused(templates):
    with pytest.raises(ConfigurationError):
        check_templates(templates)


def test_samples_are_taken_in_order_and_never_twice():
    samples = [f"text {i}" for i in range(10)]

    contents = draw_samples(samples, n_texts=3, n_drawn=4)

    assert [content.units for content in contents] == ["text 4", "text 5", "text 6"]


@pytest.mark.parametrize("samples", [["a", "b"], lambda n: ["a", "b"]], ids=["list", "function"])
def test_samples_that_run_out_are_refused_with_numbers(samples):
    with pytest.raises(TooFewCanariesError, match="returned 2 where 3 more are needed"):
        draw_samples(samples, n_texts=3, n_drawn=0)
