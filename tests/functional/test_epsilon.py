from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from ezmia_callbacks.canaries.sets import Provenance, SplitMethod
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.epsilon import (
    AttackCounts,
    Guesses,
    bonferroni_epsilon,
    check_epsilon_is_allowed,
    counts_above,
    epsilon_from_rates,
    epsilon_from_rates_gdp,
    epsilon_of_gdp,
    epsilon_one_run,
    epsilon_one_run_gdp,
    one_run_guesses,
    one_run_p_value,
    pair_guesses,
    split_half_epsilon,
)

COUNTS = st.tuples(st.integers(1, 120), st.integers(0, 120), st.integers(0, 120)).map(sorted)


def guesses_of(counts: list[int]) -> Guesses:
    n_correct, n_guesses, n_canaries = counts
    return Guesses(n_canaries=n_canaries, n_guesses=max(1, n_guesses), n_correct=n_correct)


# --- published values -------------------------------------------------------------------------------------


# Kairouz region at 97.5 % one-sided each, delta 1e-5: methods 3b.
@pytest.mark.parametrize(
    ("counts", "epsilon"),
    [
        (AttackCounts(50, 100, 0, 100), 2.398),
        (AttackCounts(826, 1000, 10, 1000), 3.778),
        (AttackCounts(15, 1000, 10, 1000), 0.0),
    ],
)
def test_region_bound_matches_published_values(counts: AttackCounts, epsilon: float) -> None:
    assert epsilon_from_rates(counts, delta=1e-5).value == pytest.approx(epsilon, abs=5.1e-4)


@pytest.mark.parametrize(("n", "ceiling"), [(100, 3.281), (1000, 5.601), (10_000, 7.905)])
def test_ceiling_of_the_region_bound_matches_published_values(n: int, ceiling: float) -> None:
    bound = epsilon_from_rates(AttackCounts(0, n, 0, n), delta=1e-5)

    assert (bound.value, bound.n) == (0.0, 2 * n)
    assert bound.ceiling == pytest.approx(ceiling, abs=5.1e-4)


# Steinke, Nasr and Jagielski 2023: their appendix D, and the figures of their section 1 (truncated there).
@pytest.mark.parametrize(
    ("guesses", "delta", "epsilon"),
    [
        (Guesses(100, 100, 75), 0.0, 0.7022),
        (Guesses(100, 100, 75), 1e-4, 0.6995),
        (Guesses(1000, 100, 75), 1e-4, 0.6730),
        (Guesses(100_000, 1510, 1439), 1e-5, 2.6759),
        (Guesses(200, 200, 120), 0.0, 0.159),
        (Guesses(200, 40, 38), 0.0, 1.741),
        (Guesses(200, 20, 20), 0.0, 1.823),
    ],
)
def test_one_run_bound_matches_published_values(guesses: Guesses, delta: float, epsilon: float) -> None:
    assert epsilon_one_run(guesses, delta=delta).value == pytest.approx(
        epsilon, abs=6e-4 if delta == 0 else 6e-5
    )


@pytest.mark.parametrize(
    ("n", "ceiling"),
    [(20, 1.823), (50, 2.785), (100, 3.493), (200, 4.194), (500, 5.114), (1000, 5.809), (5000, 7.420)],
)
def test_ceiling_of_one_run_matches_published_values(n: int, ceiling: float) -> None:
    bound = epsilon_one_run(Guesses(n, n, n // 2), delta=0.0)

    assert bound.value == 0.0
    assert bound.ceiling == pytest.approx(ceiling, abs=5.1e-4)


def test_one_run_p_value_matches_the_published_one() -> None:
    p_value = one_run_p_value(np.log(3.0), Guesses(100, 100, 75), delta=0.0)

    assert p_value == pytest.approx(0.55347, abs=5.1e-6)


# Mahloujifar, Melis and Chaudhuri 2024, as two independent implementations agree on: methods 3b.
@pytest.mark.parametrize(
    ("guesses", "mu", "epsilon"),
    [
        (Guesses(100, 100, 75), 0.4043, 1.574),
        (Guesses(1000, 100, 75), 0.2695, 1.006),
        (Guesses(1000, 1000, 600), 0.1638, 0.584),
        (Guesses(1000, 1000, 750), 0.4606, 1.819),
        (Guesses(200, 40, 38), 0.7197, 3.003),
    ],
)
def test_one_run_gdp_matches_published_values(guesses: Guesses, mu: float, epsilon: float) -> None:
    bound = epsilon_one_run_gdp(guesses, delta=1e-5)

    assert bound.mu == pytest.approx(mu, abs=6e-5)
    assert bound.value == pytest.approx(epsilon, abs=6e-4)


# Printed by jax_privacy 2.0.0, `auditing._epsilon_one_run` and `auditing._epsilon_one_run_fdp`, to its
# tolerance of 1e-6: canaries, guesses, right ones, delta, confidence, epsilon, epsilon if Gaussian.
@pytest.mark.parametrize(
    ("n_canaries", "n_guesses", "n_correct", "delta", "confidence", "epsilon", "epsilon_gdp"),
    [
        (100, 100, 75, 1e-5, 0.95, 0.70194089, 1.57357608),
        (100, 100, 75, 1e-4, 0.9, 0.77953212, 1.62616713),
        (1000, 100, 75, 1e-4, 0.95, 0.67298473, 0.84172370),
        (200, 40, 38, 1e-5, 0.9, 1.92016926, 3.48088672),
        (1000, 1000, 600, 1e-5, 0.95, 0.29722696, 0.58354037),
        (1000, 1000, 750, 1e-5, 0.95, 0.97636747, 1.81889567),
        (60, 20, 20, 1e-5, 0.9, 2.10212933, 4.38184675),
        (300, 150, 90, 1e-3, 0.95, 0.06225594, 0.10297339),
        (2000, 50, 27, 1e-5, 0.95, 0.0, 0.0),
        (500, 500, 500, 1e-6, 0.95, 5.11308216, 12.23431080),
    ],
)
def test_one_run_bounds_match_another_implementation(
    n_canaries: int,
    n_guesses: int,
    n_correct: int,
    delta: float,
    confidence: float,
    epsilon: float,
    epsilon_gdp: float,
) -> None:
    guesses = Guesses(n_canaries, n_guesses, n_correct)

    plain = epsilon_one_run(guesses, delta=delta, confidence=confidence)
    gdp = epsilon_one_run_gdp(guesses, delta=delta, confidence=confidence)

    assert plain.value == pytest.approx(epsilon, abs=3e-6)
    assert gdp.value == pytest.approx(epsilon_gdp, abs=3e-6)


# Printed by jax_privacy 2.0.0, `CanaryScoreAuditor.epsilon_clopper_pearson(0.05, delta, one_sided=False,
# threshold_strategy=Explicit(0.5))`.
@pytest.mark.parametrize(
    ("counts", "delta", "epsilon"),
    [
        (AttackCounts(50, 100, 0, 100), 1e-5, 2.3977132969689405),
        (AttackCounts(826, 1000, 10, 1000), 1e-5, 3.778290343458947),
        (AttackCounts(70, 100, 20, 100), 0.0, 0.7210235594582973),
        (AttackCounts(99, 100, 60, 120), 1e-3, 2.009807070259146),
        (AttackCounts(30, 40, 2, 80), 1e-5, 1.9061974446210295),
    ],
)
def test_region_bound_matches_another_implementation(
    counts: AttackCounts, delta: float, epsilon: float
) -> None:
    assert epsilon_from_rates(counts, delta=delta).value == pytest.approx(epsilon, abs=1e-9)


def test_bounds_match_jax_privacy_where_it_is_installed() -> None:
    auditing = pytest.importorskip("jax_privacy.auditing")
    rng = np.random.default_rng(0)
    for _ in range(30):
        n_members, n_non_members = rng.integers(20, 300, size=2)
        members = rng.normal(0.8, size=n_members)
        non_members = rng.normal(size=n_non_members)
        scores = np.concatenate([members, non_members])
        is_member = np.arange(len(scores)) < n_members
        oracle = auditing.CanaryScoreAuditor(members, non_members)
        fixed = auditing.Explicit(1.0)

        counts = counts_above(scores, is_member, threshold=1.0)
        guesses = Guesses(
            len(scores), counts.n_true_positives + counts.n_false_positives, counts.n_true_positives
        )

        assert epsilon_from_rates(counts, delta=1e-4).value == pytest.approx(
            oracle.epsilon_clopper_pearson(0.05, 1e-4, one_sided=False, threshold_strategy=fixed), abs=1e-9
        )
        assert epsilon_one_run(guesses, delta=1e-4).value == pytest.approx(
            oracle.epsilon_one_run(0.05, 1e-4, threshold_strategy=fixed), abs=3e-6
        )
        assert epsilon_one_run_gdp(guesses, delta=1e-4).value == pytest.approx(
            oracle.epsilon_one_run_fdp(0.05, 1e-4, threshold_strategy=fixed), abs=3e-6
        )


# Dong, Roth and Su 2022, corollary 2.13, evaluated directly.
@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-3])
def test_gdp_conversion_inverts_the_formula(mu: float, delta: float) -> None:
    epsilon = epsilon_of_gdp(mu, delta=delta)

    reached = stats.norm.cdf(-epsilon / mu + mu / 2) - np.exp(epsilon) * stats.norm.cdf(
        -epsilon / mu - mu / 2
    )
    assert reached == pytest.approx(delta, rel=1e-4)


def test_gdp_conversion_of_little_noise_and_of_none() -> None:
    assert epsilon_of_gdp(0.0, delta=1e-5) == 0.0
    # At epsilon 0 the mechanism needs delta 2 Phi(mu / 2) - 1 = 0.0399.
    assert epsilon_of_gdp(0.1, delta=0.04) == 0.0
    assert epsilon_of_gdp(0.1, delta=0.039) > 0.0


# --- validity: how often a bound exceeds the truth --------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 1.5])
@pytest.mark.parametrize(("n_canaries", "delta"), [(60, 0.0), (60, 1e-3), (2000, 1e-4)])
def test_randomized_response_is_refuted_no_more_often_than_promised(
    epsilon: float, n_canaries: int, delta: float
) -> None:
    # The mechanism that reveals most at its epsilon: each guess is right with probability q.
    n_guesses = 60
    q = special.expit(epsilon)

    false_claim_rate = sum(
        stats.binom.pmf(n_correct, n_guesses, q)
        for n_correct in range(n_guesses + 1)
        if epsilon_one_run(Guesses(n_canaries, n_guesses, n_correct), delta=delta).value > epsilon
    )

    assert false_claim_rate <= 0.05


@pytest.mark.parametrize("mu", [1e-6, 0.3, 1.0])
@pytest.mark.parametrize("n", [20, 100])
def test_gaussian_mechanism_is_refuted_no_more_often_than_promised(mu: float, n: int) -> None:
    # A canary's score is its membership times mu plus noise: guessed at mu / 2, right with Phi(mu / 2).
    q = stats.norm.cdf(mu / 2)

    false_claim_rate = sum(
        stats.binom.pmf(n_correct, n, q)
        for n_correct in range(n + 1)
        if epsilon_one_run_gdp(Guesses(n, n, n_correct), delta=1e-5).mu > mu
    )

    assert false_claim_rate <= 0.05


@pytest.mark.parametrize("epsilon_bound", [epsilon_one_run, epsilon_one_run_gdp])
def test_shuffled_labels_rarely_show_an_epsilon(epsilon_bound) -> None:
    rng = np.random.default_rng(1)
    n_runs = 2000
    shows_epsilon = cache(lambda guesses: epsilon_bound(guesses, delta=1e-5).value > 0)

    n_claims = sum(
        shows_epsilon(
            # Few different values: ties at the edges of the groups, too.
            one_run_guesses(
                rng.integers(0, 400, size=80).astype(float),
                rng.random(80) < 0.5,
                n_guess_members=20,
                n_guess_non_members=20,
            )
        )
        for _ in range(n_runs)
    )

    assert 0 < n_claims <= stats.binom.ppf(0.999, n_runs, 0.05)


def test_pairs_without_leakage_rarely_show_an_epsilon() -> None:
    rng = np.random.default_rng(2)
    n_runs = 2000
    shows_epsilon = cache(lambda guesses: epsilon_one_run(guesses, delta=1e-5).value > 0)

    n_claims = sum(
        shows_epsilon(pair_guesses(rng.normal(size=60), rng.normal(size=60), n_guesses=25))
        for _ in range(n_runs)
    )

    assert 0 < n_claims <= stats.binom.ppf(0.999, n_runs, 0.05)


@pytest.mark.parametrize("epsilon_bound", [epsilon_from_rates, epsilon_from_rates_gdp])
@pytest.mark.parametrize("choice", ["bonferroni", "split_half"])
def test_choosing_a_threshold_on_noise_rarely_shows_an_epsilon(epsilon_bound, choice: str) -> None:
    rng = np.random.default_rng(3)
    n_runs, is_member = 200, np.arange(120) < 60
    thresholds = list(np.linspace(-2.0, 2.0, 15))
    bound_of = cache(lambda counts, confidence: epsilon_bound(counts, delta=1e-5, confidence=confidence))

    def claims(scores: np.ndarray) -> bool:
        def bound(threshold, rows, confidence):
            return bound_of(counts_above(scores[rows], is_member[rows], threshold=threshold), confidence)

        if choice == "bonferroni":
            return bonferroni_epsilon(thresholds, lambda t, c: bound(t, slice(None), c)).value > 0
        return split_half_epsilon(thresholds, bound, n_rows=120, seed=0).value > 0

    n_claims = sum(claims(rng.normal(size=120)) for _ in range(n_runs))

    assert n_claims <= stats.binom.ppf(0.999, n_runs, 0.05)


# --- properties -------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(COUNTS, st.sampled_from([0.0, 1e-5, 1e-2]), st.floats(0.6, 0.99))
def test_one_run_bounds_grow_with_right_guesses_up_to_the_ceiling(
    counts: list[int], delta: float, confidence: float
) -> None:
    guesses = guesses_of(counts)
    for bound_of in (epsilon_one_run,) if delta == 0.0 else (epsilon_one_run, epsilon_one_run_gdp):
        bound = bound_of(guesses, delta=delta, confidence=confidence)

        assert 0.0 <= bound.value <= bound.ceiling
        if guesses.n_correct < guesses.n_guesses:
            more = replace(guesses, n_correct=guesses.n_correct + 1)
            assert bound_of(more, delta=delta, confidence=confidence).value >= bound.value


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.sampled_from([1e-5, 1e-3]))
def test_one_run_p_value_rises_with_epsilon_until_it_stops_refuting(counts: list[int], delta: float) -> None:
    # The search takes the first crossing; a later one would be another answer.
    guesses = guesses_of(counts)
    p_values = [one_run_p_value(epsilon, guesses, delta=delta) for epsilon in np.linspace(0.0, 8.0, 60)]

    refuted = np.array(p_values) < 0.05
    assert np.all(refuted[:-1] >= refuted[1:])


@settings(max_examples=100, deadline=None)
@given(COUNTS)
def test_one_run_bound_is_where_the_p_value_crosses(counts: list[int]) -> None:
    guesses = guesses_of(counts)

    epsilon = epsilon_one_run(guesses, delta=1e-4).value

    assert one_run_p_value(epsilon + 1e-6, guesses, delta=1e-4) >= 0.05
    if epsilon > 1e-6:
        assert one_run_p_value(epsilon - 1e-6, guesses, delta=1e-4) < 0.05


def test_unguessed_canaries_cost_as_much_as_delta_says() -> None:
    few = epsilon_one_run(Guesses(100, 100, 75), delta=1e-4)
    many = epsilon_one_run(Guesses(1000, 100, 75), delta=1e-4)

    assert many.value < few.value
    assert epsilon_one_run(Guesses(1000, 100, 75), delta=0.0).value == pytest.approx(0.7022, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.data(), st.sampled_from([1e-5, 0.05]))
def test_rate_bounds_stay_between_zero_and_their_ceiling(n1: int, n0: int, data, delta: float) -> None:
    counts = AttackCounts(data.draw(st.integers(0, n1)), n1, data.draw(st.integers(0, n0)), n0)

    for bound_of in (epsilon_from_rates, epsilon_from_rates_gdp):
        bound = bound_of(counts, delta=delta)
        assert 0.0 <= bound.value <= bound.ceiling
        assert (bound.n, bound.delta, bound.confidence) == (n1 + n0, delta, 0.95)


def test_exact_region_is_never_exceeded_by_randomized_response() -> None:
    # 30 runs with and 30 without: TPR = q, FPR = 1 - q meets the region of epsilon exactly.
    epsilon, n = 1.0, 30
    q = special.expit(epsilon)
    tp, fp = stats.binom.pmf(np.arange(n + 1), n, q), stats.binom.pmf(np.arange(n + 1), n, 1 - q)

    false_claim_rate = sum(
        tp[i] * fp[j]
        for i in range(n + 1)
        for j in range(n + 1)
        if epsilon_from_rates(AttackCounts(i, n, j, n), delta=0.0).value > epsilon
    )

    assert false_claim_rate <= 0.05


def test_gdp_from_rates_never_turns_noise_around() -> None:
    # Swapped or useless attacks once gave an epsilon of 3.5 to 5.9 elsewhere.
    for counts in (
        AttackCounts(0, 500, 500, 500),
        AttackCounts(5, 500, 5, 500),
        AttackCounts(250, 500, 250, 500),
    ):
        assert epsilon_from_rates_gdp(counts, delta=1e-5).value == 0.0


def test_gdp_from_rates_does_not_exceed_the_true_mu() -> None:
    n, mu = 40, 1.0
    tp = stats.binom.pmf(np.arange(n + 1), n, stats.norm.sf(0.5 - mu))
    fp = stats.binom.pmf(np.arange(n + 1), n, stats.norm.sf(0.5))

    false_claim_rate = sum(
        tp[i] * fp[j]
        for i in range(n + 1)
        for j in range(n + 1)
        if epsilon_from_rates_gdp(AttackCounts(i, n, j, n), delta=1e-5).mu > mu
    )

    assert false_claim_rate <= 0.05


# --- from scores to guesses -------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=3, max_size=30), st.data(), st.floats(-5, 5))
def test_constant_scores_have_no_right_guess(labels: list[bool], data, value: float) -> None:
    is_member = np.array([*labels, True, False])
    n_in = data.draw(st.integers(1, len(is_member) - 1))
    n_out = data.draw(st.integers(0, min(len(is_member) - n_in, len(is_member) - 1)))

    guesses = one_run_guesses(
        np.full(len(is_member), value), is_member, n_guess_members=n_in, n_guess_non_members=n_out
    )

    assert guesses == Guesses(len(is_member), n_in + n_out, 0)
    assert epsilon_one_run(guesses, delta=1e-5).value == 0.0
    assert epsilon_one_run(guesses, delta=1e-5).ceiling >= 0.0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=4, max_size=12), st.data())
def test_right_guesses_with_ties_are_the_fewest_over_all_tie_breaks(rows, data) -> None:
    scores = np.array([score for score, _ in rows], dtype=float)
    is_member = np.array([label for _, label in rows])
    if is_member.all() or not is_member.any():
        is_member[0] = not is_member[0]
    n_in = data.draw(st.integers(1, len(rows) - 2))
    n_out = data.draw(st.integers(0, len(rows) - n_in))

    n_correct = one_run_guesses(scores, is_member, n_guess_members=n_in, n_guess_non_members=n_out).n_correct

    for seed in range(5):
        broken = scores + np.random.default_rng(seed).uniform(0, 0.5, size=len(rows))
        assert (
            n_correct
            <= one_run_guesses(broken, is_member, n_guess_members=n_in, n_guess_non_members=n_out).n_correct
        )


def test_distinct_scores_are_all_guessed() -> None:
    scores = np.arange(6.0)
    is_member = np.array([False, True, False, True, False, True])

    guesses = one_run_guesses(scores, is_member, n_guess_members=3, n_guess_non_members=3)

    assert guesses == Guesses(6, 6, 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=15), st.data())
def test_swapping_the_twins_never_changes_which_pairs_are_guessed(pairs, data) -> None:
    members = np.array([a for a, _ in pairs], dtype=float)
    others = np.array([b for _, b in pairs], dtype=float)
    n_guesses = data.draw(st.integers(1, len(pairs)))

    one = pair_guesses(members, others, n_guesses=n_guesses)
    swapped = pair_guesses(others, members, n_guesses=n_guesses)

    # Each guessed pair is right one way around and wrong the other; ties are right in neither.
    assert one.n_correct + swapped.n_correct <= n_guesses
    assert (one.n_canaries, one.n_guesses) == (len(pairs), n_guesses)
    gaps = np.sort(np.abs(members - others))[::-1]
    if len(set(gaps)) == len(gaps) and gaps[n_guesses - 1] > 0:
        assert one.n_correct + swapped.n_correct == n_guesses


def test_pairs_of_equal_twins_show_no_epsilon() -> None:
    guesses = pair_guesses(np.zeros(50), np.zeros(50), n_guesses=50)

    assert guesses.n_correct == 0
    assert epsilon_one_run(guesses, delta=0.0).value == 0.0


def test_pairs_accept_the_largest_scores() -> None:
    huge = np.finfo(float).max

    assert pair_guesses(np.array([huge]), np.array([-huge]), n_guesses=1).n_correct == 1


def test_counts_above_leave_ties_with_the_threshold_out() -> None:
    is_member = np.arange(10) < 4

    assert counts_above(np.ones(10), is_member, threshold=1.0) == AttackCounts(0, 4, 0, 6)
    assert counts_above(np.ones(10), is_member, threshold=0.9) == AttackCounts(4, 4, 6, 6)


# --- choice of the attack ---------------------------------------------------------------------------------


def test_bonferroni_over_one_candidate_is_the_fixed_bound() -> None:
    guesses = Guesses(100, 100, 75)

    best = bonferroni_epsilon([guesses], lambda g, c: epsilon_one_run(g, delta=0.0, confidence=c))

    assert best.value == pytest.approx(epsilon_one_run(guesses, delta=0.0).value)


def test_each_candidate_pays_its_share() -> None:
    candidates = [Guesses(100, 100, 75), Guesses(100, 20, 12)]

    best = bonferroni_epsilon(candidates, lambda g, c: epsilon_one_run(g, delta=0.0, confidence=c))

    assert best.value == epsilon_one_run(candidates[0], delta=0.0, confidence=0.975).value
    assert (best.confidence, best.choice) == (0.95, "bonferroni")
    assert best.ceiling == epsilon_one_run(candidates[0], delta=0.0, confidence=0.975).ceiling


def test_split_half_bounds_on_records_that_it_did_not_choose_on() -> None:
    rows_of_calls = []

    def bound(candidate, rows, confidence):
        rows_of_calls.append(set(rows.tolist()))
        return epsilon_one_run(Guesses(50, 50, candidate), delta=0.0, confidence=confidence)

    best = split_half_epsilon([30, 45, 20], bound, n_rows=100, seed=4)

    *chosen_on, bounded_on = rows_of_calls
    assert all(rows == chosen_on[0] for rows in chosen_on)
    assert not chosen_on[0] & bounded_on
    assert chosen_on[0] | bounded_on == set(range(100))
    assert best.value == epsilon_one_run(Guesses(50, 50, 45), delta=0.0).value


# --- words and refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bound",
    [
        epsilon_one_run(Guesses(100, 100, 50), delta=1e-5),
        epsilon_one_run_gdp(Guesses(100, 100, 50), delta=1e-5),
        epsilon_from_rates(AttackCounts(1, 100, 1, 100), delta=1e-5),
        epsilon_from_rates_gdp(AttackCounts(1, 100, 1, 100), delta=1e-5),
    ],
)
def test_an_epsilon_of_zero_says_what_a_perfect_attack_would_have_shown(bound) -> None:
    assert bound.value == 0.0
    assert bound.ceiling > 0.0
    assert bound.describe().startswith("no epsilon above 0 detected (delta 1e-05, 95 % confidence; ")
    assert bound.describe().endswith(f"n = {bound.n}: {bound.ceiling:.3f})")


def test_exactly_the_draws_with_independent_coins_allow_an_epsilon() -> None:
    for method in get_args(SplitMethod):
        is_randomized = method not in ("user_lists", "trainer_datasets")
        provenance = Provenance(method, is_randomized, None, None, 0, None)
        if provenance.has_independent_coins:
            check_epsilon_is_allowed(method)
        else:
            with pytest.raises(ConfigurationError, match="give no epsilon"):
                check_epsilon_is_allowed(method)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("hold_out", "split of fixed sizes"),
        ("user_lists", "not decided by coin flips"),
        ("trainer_datasets", "not decided by coin flips"),
        (None, "distribution shift"),
        ("other", "'other' is not a draw"),
    ],
)
def test_other_draws_are_refused_with_a_way_out(method: str | None, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{reason}.*an independent coin for each canary"):
        check_epsilon_is_allowed(method)


@pytest.mark.parametrize("counts", [(5, 6, 3), (5, 5, 6), (5, 5, -1), (5, 4.0, 3), (5, 0, 0), (0, 0, 0)])
def test_impossible_guesses_are_refused(counts) -> None:
    with pytest.raises(ConfigurationError, match="guesses"):
        Guesses(*counts)


@pytest.mark.parametrize("counts", [(4, 3, 0, 3), (1, 3, 4, 3), (-1, 3, 0, 3), (1.5, 3, 0, 3)])
def test_impossible_counts_are_refused(counts) -> None:
    with pytest.raises(ConfigurationError, match="check the counts"):
        AttackCounts(*counts)


def test_an_empty_class_is_refused() -> None:
    with pytest.raises(TooFewCanariesError, match="at least one of each"):
        AttackCounts(0, 0, 0, 5)


@pytest.mark.parametrize("delta", [-0.1, 1.0, float("nan")])
def test_delta_outside_its_range_is_refused(delta: float) -> None:
    with pytest.raises(ConfigurationError, match="`delta` is"):
        epsilon_one_run(Guesses(10, 10, 8), delta=delta)
    with pytest.raises(ConfigurationError, match="`delta` is"):
        epsilon_from_rates(AttackCounts(5, 10, 1, 10), delta=delta)
    with pytest.raises(ConfigurationError, match="`delta` is"):
        one_run_p_value(1.0, Guesses(10, 10, 8), delta=delta)


def test_gdp_refuses_a_delta_of_zero() -> None:
    with pytest.raises(ConfigurationError, match="mu-GDP gives a finite epsilon only"):
        epsilon_one_run_gdp(Guesses(10, 10, 8), delta=0.0)
    with pytest.raises(ConfigurationError, match="mu-GDP gives a finite epsilon only"):
        epsilon_from_rates_gdp(AttackCounts(5, 10, 1, 10), delta=0.0)


def test_arguments_outside_their_range_are_refused() -> None:
    scores, is_member = np.arange(4.0), np.array([True, False, True, False])
    with pytest.raises(ConfigurationError, match="no more guesses than canaries"):
        one_run_guesses(scores, is_member, n_guess_members=3, n_guess_non_members=2)
    with pytest.raises(ConfigurationError, match="at least one guess"):
        one_run_guesses(scores, is_member, n_guess_members=0, n_guess_non_members=0)
    with pytest.raises(ConfigurationError, match="All 4 canaries"):
        one_run_guesses(scores, is_member, n_guess_members=4, n_guess_non_members=0)
    with pytest.raises(ConfigurationError, match="infinite"):
        one_run_guesses(
            scores / np.array([1, 1, 1, np.nan]), is_member, n_guess_members=1, n_guess_non_members=1
        )
    with pytest.raises(ConfigurationError, match="infinite"):
        pair_guesses(np.array([np.inf]), np.array([0.0]), n_guesses=1)
    with pytest.raises(ConfigurationError, match=r"\[1, 4\]"):
        pair_guesses(scores, scores, n_guesses=5)
    with pytest.raises(ConfigurationError, match="same order"):
        pair_guesses(scores, scores[:3], n_guesses=1)
    with pytest.raises(ConfigurationError, match="threshold is NaN"):
        counts_above(scores, is_member, threshold=float("nan"))
    with pytest.raises(ConfigurationError, match="`epsilon` is -1"):
        one_run_p_value(-1.0, Guesses(10, 10, 8), delta=0.0)
    with pytest.raises(ConfigurationError, match="`mu` is inf"):
        epsilon_of_gdp(float("inf"), delta=1e-5)
    with pytest.raises(ConfigurationError, match=r"use 0\.95"):
        epsilon_one_run(Guesses(10, 10, 8), delta=0.0, confidence=95.0)
    with pytest.raises(ConfigurationError, match="no candidates"):
        bonferroni_epsilon([], lambda g, c: epsilon_one_run(g, delta=0.0, confidence=c))
    with pytest.raises(TooFewCanariesError, match="at least 4"):
        split_half_epsilon([1], lambda g, rows, c: None, n_rows=3)
