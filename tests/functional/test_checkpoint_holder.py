import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional import auc, checkpoint_holder_score, epsilon_one_run, one_run_guesses

# Of the ranks 1 to 4 of four records: the quantiles of 1/8, 3/8, 5/8 and 7/8.
Z = dict(zip((1, 2, 3, 4), map(NormalDist().inv_cdf, (0.125, 0.375, 0.625, 0.875)), strict=True))

# Few values, so that there are ties.
matrices = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-3, 3))


def by_hand(*z):
    """The log-likelihood ratio of a shift by 3 at one of the steps, from the densities."""
    shifted, still = NormalDist(3.0), NormalDist()
    return math.log(sum(shifted.pdf(value) / still.pdf(value) for value in z) / len(z))


def naive(step_scores):
    n_records = step_scores.shape[1]
    found = []
    for i in range(n_records):
        z = []
        for row in step_scores:
            n_below, n_equal = sum(row < row[i]), sum(row == row[i])
            z.append(NormalDist().inv_cdf((n_below + (n_equal + 1) / 2 - 0.5) / n_records))
        found.append(by_hand(*z))
    return np.array(found)


def test_a_record_scores_by_the_likelihood_that_it_stood_out_at_one_step():
    steps = np.array([[0.9, 0.5, 0.4, 0.6], [0.3, 0.9, 0.5, 0.4]])

    found = checkpoint_holder_score(steps)

    expected = [by_hand(Z[4], Z[1]), by_hand(Z[2], Z[4]), by_hand(Z[1], Z[3]), by_hand(Z[3], Z[2])]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_ties_share_their_mean_rank():
    found = checkpoint_holder_score(np.array([[1.0, 2.0, 2.0]]))

    low, high = (by_hand(NormalDist().inv_cdf(p)) for p in (1 / 6, 2 / 3))
    np.testing.assert_allclose(found, [low, high, high])


@given(matrices)
def test_it_equals_a_naive_loop(step_scores):
    found = checkpoint_holder_score(step_scores)

    np.testing.assert_allclose(found, naive(step_scores), rtol=1e-9, atol=1e-12)


@given(matrices, st.randoms(use_true_random=False))
def test_the_order_of_the_records_does_not_matter(step_scores, random):
    order = list(range(step_scores.shape[1]))
    random.shuffle(order)

    found = checkpoint_holder_score(step_scores[:, order])

    np.testing.assert_array_equal(found, checkpoint_holder_score(step_scores)[order])


@given(matrices, st.randoms(use_true_random=False))
def test_the_order_of_the_steps_does_not_matter(step_scores, random):
    order = list(range(step_scores.shape[0]))
    random.shuffle(order)

    found = checkpoint_holder_score(step_scores[order])

    np.testing.assert_allclose(found, checkpoint_holder_score(step_scores), rtol=1e-12, atol=1e-12)


@given(matrices)
def test_any_increasing_scale_of_a_step_gives_the_same(step_scores):
    rescaled = np.exp(step_scores) + 100.0 * np.arange(len(step_scores))[:, np.newaxis]

    np.testing.assert_array_equal(checkpoint_holder_score(rescaled), checkpoint_holder_score(step_scores))


@given(arrays(np.float64, st.integers(1, 20), elements=st.integers(-5, 5)))
def test_one_step_has_the_order_of_its_own_scores(scores):
    found = checkpoint_holder_score(scores[np.newaxis])

    np.testing.assert_array_equal(found[:, np.newaxis] > found, scores[:, np.newaxis] > scores)


@given(matrices)
def test_a_step_at_which_nothing_moved_changes_no_order(step_scores):
    still = np.full((1, step_scores.shape[1]), 0.5)

    without = checkpoint_holder_score(step_scores)
    found = checkpoint_holder_score(np.concatenate([step_scores, still]))

    is_apart = np.abs(without[:, np.newaxis] - without) > 1e-9
    np.testing.assert_array_equal(
        (found[:, np.newaxis] > found)[is_apart], (without[:, np.newaxis] > without)[is_apart]
    )


def test_without_any_movement_no_record_is_told_from_another():
    found = checkpoint_holder_score(np.full((3, 6), 0.5))

    assert auc(found, np.arange(6) < 3) == 0.5


def test_a_record_that_stood_out_once_is_found_where_the_last_step_has_forgotten_it():
    rng = np.random.default_rng(0)
    is_member = np.arange(600) < 300
    steps = rng.normal(size=(4, 600))
    # Each member is fed before one of the four audits.
    steps[np.arange(300) % 4, np.arange(300)] += 2.0

    found = checkpoint_holder_score(steps)

    assert auc(found, is_member) > 0.75
    assert auc(found, is_member) > max(auc(steps.sum(axis=0), is_member), *(auc(s, is_member) for s in steps))


def test_the_best_of_each_step_are_told_apart_by_their_other_steps():
    steps = np.array([[9.0, 5.0, 1.0, 0.0], [5.0, 9.0, 0.0, 1.0], [2.0, 1.0, 9.0, 0.0]])

    found = checkpoint_holder_score(steps)

    assert found[0] > found[1] > found[2] > found[3]


def released_steps(rng, *, is_member, epsilon, n_steps):
    """Each step releases every coin with Laplace noise: epsilon / n_steps each, epsilon for all together."""
    noise = rng.laplace(scale=n_steps / epsilon, size=(n_steps, len(is_member)))
    return is_member + noise


def bound_of(scores, is_member):
    each = len(scores) // 5
    guesses = one_run_guesses(scores, is_member, n_guess_members=each, n_guess_non_members=each)
    return epsilon_one_run(guesses, delta=0.0, confidence=0.95).value


def test_its_epsilon_is_one_of_all_steps_together_not_of_the_last():
    rng = np.random.default_rng(0)
    of_all, of_last = [], []
    for _ in range(60):
        is_member = rng.random(1000) < 0.5
        steps = released_steps(rng, is_member=is_member, epsilon=4.0, n_steps=4)
        of_all.append(bound_of(checkpoint_holder_score(steps), is_member))
        of_last.append(bound_of(steps[-1], is_member))

    # The last step alone has epsilon 1: most bounds from all steps are no bounds of that.
    assert np.mean(np.array(of_last) > 1.0) <= 0.05
    assert np.mean(np.array(of_all) > 1.0) > 0.9
    assert max(of_all) < 4.0


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 0), (1, 2, 3)])
def test_scores_that_are_no_table_of_steps_are_refused(shape):
    with pytest.raises(ConfigurationError, match=r"needs \(n_steps, n_records\)"):
        checkpoint_holder_score(np.zeros(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_without_a_rank_are_refused(bad):
    with pytest.raises(ConfigurationError, match="leave out audits that failed"):
        checkpoint_holder_score(np.array([[0.5, bad]]))
