import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional import attempts_needed, extraction_probability, suffix_log_probability

LOG_PROBS = np.log([0.9, 0.5, 0.2, 0.8, 0.1])
OFFSETS = np.array([0, 3, 5])


@pytest.mark.parametrize(
    ("n_suffix_tokens", "expected"),
    [(None, (0.9 * 0.5 * 0.2, 0.08)), (2, (0.1, 0.08)), (1, (0.2, 0.1)), (9, (0.09, 0.08))],
)
def test_the_suffix_is_the_product_of_its_tokens(n_suffix_tokens, expected):
    found = suffix_log_probability(LOG_PROBS, offsets=OFFSETS, n_suffix_tokens=n_suffix_tokens)

    np.testing.assert_allclose(np.exp(found), expected)


@given(st.floats(1e-6, 0.999), st.integers(1, 1000))
def test_one_of_many_attempts_succeeds_unless_all_fail(p, n):
    found = extraction_probability(np.array([math.log(p)]), n_attempts=n)[0]

    assert found == pytest.approx(1 - (1 - p) ** n, rel=1e-6, abs=1e-12)


@given(st.floats(1e-4, 0.9), st.floats(0.01, 0.99))
def test_the_attempts_are_the_fewest_that_do(p, wanted):
    log_p = np.array([math.log(p)])
    n = attempts_needed(log_p, probability=wanted)[0]

    assert extraction_probability(log_p, n_attempts=int(n))[0] >= wanted - 1e-9
    if n > 1:
        assert extraction_probability(log_p, n_attempts=int(n) - 1)[0] < wanted + 1e-9


def test_small_probabilities_are_not_rounded_away():
    log_p = np.array([-100.0])

    assert extraction_probability(log_p, n_attempts=1)[0] == pytest.approx(math.exp(-100), rel=1e-9)
    assert attempts_needed(log_p, probability=0.5)[0] == pytest.approx(math.log(2) * math.exp(100), rel=1e-9)


def test_certain_and_impossible_records():
    log_p = np.array([0.0, -np.inf])

    assert extraction_probability(log_p, n_attempts=3).tolist() == [1.0, 0.0]
    assert attempts_needed(log_p, probability=0.5).tolist() == [1.0, np.inf]


@pytest.mark.parametrize(
    "call",
    [
        lambda: suffix_log_probability(LOG_PROBS, offsets=OFFSETS, n_suffix_tokens=0),
        lambda: suffix_log_probability(LOG_PROBS, offsets=np.array([0, 0, 5])),
        lambda: extraction_probability(np.array([0.1]), n_attempts=1),
        lambda: extraction_probability(np.array([np.nan]), n_attempts=1),
        lambda: extraction_probability(np.array([-1.0]), n_attempts=0),
        lambda: attempts_needed(np.array([-1.0]), probability=1.0),
    ],
)
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(ConfigurationError):
        call()
