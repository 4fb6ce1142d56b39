import numpy as np
import pytest
from tiny import make_texts

from ezmia_callbacks import CanarySet, hold_out_canaries, insert_canaries
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.epsilon import epsilon_one_run, one_run_guesses, pair_guesses
from ezmia_callbacks.measuring.analysis_units import AnalysisUnits


def insert(**arguments):
    return insert_canaries(make_texts(3000, n_words=40), max_fraction=0.5, **arguments)[1]


def with_signal(canaries, amount):
    rng = np.random.default_rng(0)
    return rng.normal(size=len(canaries)) + amount * canaries.is_member


def test_records_of_the_user_are_units_themselves():
    _, canaries = hold_out_canaries(make_texts(100), n_members=20, n_non_members=30, seed=0)
    units, scores = AnalysisUnits(canaries), with_signal(canaries, 1.0)

    np.testing.assert_array_equal(units.headline(scores), scores)
    np.testing.assert_array_equal(units.is_member, canaries.is_member)
    assert not units.others


def test_the_headline_is_that_of_the_fewest_copies_and_never_pooled():
    canaries = insert(n_canaries=240, repetitions=(2, 8), families=("unigram", "bigram"), seed=1)
    units = AnalysisUnits(canaries)
    scores = np.array([d.n_repeats for d in canaries.details], dtype=float)

    assert set(units.headline(scores)) == {2.0}
    assert len(units.headline(scores)) == len(units.is_member) == 120
    assert set(units.others) == {"x2", "x8", "unigram", "bigram"}
    assert {canaries.details[i].n_repeats for i in np.flatnonzero(units.others["unigram"])} == {2}


def test_the_group_is_the_unit_where_there_are_groups():
    texts = make_texts(90)
    groups = tuple(f"person {i // 3}" for i in range(90))
    canaries = CanarySet(
        records=tuple(texts),
        is_member=np.arange(90) < 45,
        record_ids=tuple(f"r{i}" for i in range(90)),
        provenance=CanarySet.from_lists(texts[:45], texts[45:]).provenance,
        groups=groups,
    )
    units, scores = AnalysisUnits(canaries), np.arange(90.0)

    np.testing.assert_allclose(units.headline(scores), np.arange(90.0).reshape(30, 3).mean(1))
    assert units.is_member.tolist() == [True] * 15 + [False] * 15


def test_epsilon_is_refused_where_no_coins_were_thrown():
    _, canaries = hold_out_canaries(make_texts(100), n_members=20, n_non_members=30, seed=0)

    with pytest.raises(ConfigurationError, match="in a split of fixed sizes"):
        AnalysisUnits(canaries).epsilon(with_signal(canaries, 1.0), delta=1e-5, confidence=0.95)


def test_epsilon_of_coins_guesses_a_fixed_share_at_each_end():
    canaries = insert(n_canaries=200, seed=2)
    scores = with_signal(canaries, 1.5)
    guesses = one_run_guesses(scores, canaries.is_member, n_guess_members=40, n_guess_non_members=40)

    bound = AnalysisUnits(canaries).epsilon(scores, delta=1e-5, confidence=0.95)

    assert bound == epsilon_one_run(guesses, delta=1e-5, confidence=0.95)
    assert 0 < bound.value < bound.ceiling


def test_epsilon_of_pairs_compares_twins():
    canaries = insert(n_canaries=200, design="pairs", seed=3)
    scores = with_signal(canaries, 2.5)
    twins = [(i, j) if canaries.is_member[i] else (j, i) for i, j in canaries.pair_indices]
    members, others = np.array(twins).T

    bound = AnalysisUnits(canaries).epsilon(scores, delta=1e-5, confidence=0.95)

    expected = pair_guesses(scores[members], scores[others], n_guesses=40)
    assert bound == epsilon_one_run(expected, delta=1e-5, confidence=0.95)
    assert bound.n == 40


def test_scores_without_a_signal_show_no_epsilon():
    canaries = insert(n_canaries=200, seed=4)

    assert AnalysisUnits(canaries).epsilon(np.zeros(200), delta=1e-5, confidence=0.95).value == 0.0
