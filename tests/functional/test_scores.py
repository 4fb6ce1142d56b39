from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from ezmia_callbacks.errors import ConfigurationError, EmptyRecordError, NonFiniteLogitsError
from ezmia_callbacks.functional.scores import (
    WBC_WINDOW_SIZES,
    WBC_WINDOW_SIZES_PAPER,
    EzEvidence,
    EzMode,
    TokenMoments,
    calibrated_min_k_plus_plus_score,
    ez_evidence,
    ez_score,
    ez_score_from_evidence,
    loss_difference_score,
    loss_score,
    margin_score,
    min_k_plus_plus_score,
    min_k_score,
    ratio_score,
    wbc_score,
    zlib_score,
)

# Golden example of the EZ score, recomputed by hand from arXiv:2601.12104 (methods 1.1).
TARGET = np.array([-0.5, -2.0, -3.0, -1.0, -4.0])
REFERENCE = np.array([-0.6, -3.0, -2.5, -1.2, -6.0])
IS_CORRECT = np.array([True, False, False, True, False])


def evidence_of(
    positive: list[float],
    negative: list[float],
    *,
    n_errors: list[int] | None = None,
    n_reference_errors: list[int] | None = None,
    total_shift: list[float] | None = None,
) -> EzEvidence:
    n = len(positive)
    return EzEvidence(
        positive=np.array(positive, dtype=np.float64),
        negative=np.array(negative, dtype=np.float64),
        n_errors=np.array(n_errors or [3] * n),
        n_reference_errors=np.array(n_reference_errors or [3] * n),
        n_tokens=np.full(n, 10),
        total_shift=np.array(total_shift or [0.0] * n),
    )


def ragged_tokens(seed: int, lengths: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    return {
        "target": -rng.exponential(2.0, n),
        "reference": -rng.exponential(2.0, n),
        "target_is_correct": rng.random(n) < 0.4,
        "reference_is_correct": rng.random(n) < 0.4,
        "means": -rng.exponential(2.0, n),
        "stds": rng.random(n) * (rng.random(n) < 0.9),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }


def all_scores(tokens: dict[str, np.ndarray], *, offsets: np.ndarray | None) -> dict[str, np.ndarray]:
    target, reference = tokens["target"], tokens["reference"]
    n_records = 1 if offsets is None else len(offsets) - 1
    statistics = TokenMoments(target, tokens["means"], tokens["stds"])
    reference_statistics = TokenMoments(reference, tokens["means"], tokens["stds"])
    flags = tokens["target_is_correct"], tokens["reference_is_correct"]
    return {
        "ez_ranked": ez_score(target, reference, *flags, offsets=offsets),
        "ez_bounded": ez_score(target, reference, *flags, offsets=offsets, mode="bounded"),
        "ez_paper_code": ez_score(target, reference, *flags, offsets=offsets, mode="paper_code"),
        "loss": loss_score(target, offsets=offsets),
        "difference": loss_difference_score(target, reference, offsets=offsets),
        "ratio": ratio_score(target, reference, offsets=offsets),
        "zlib": zlib_score(target, n_compressed_bytes=np.full(n_records, 20), offsets=offsets),
        "min_k": min_k_score(target, offsets=offsets),
        "min_k_plus_plus": min_k_plus_plus_score(*statistics, offsets=offsets),
        "calibrated": calibrated_min_k_plus_plus_score(statistics, reference_statistics, offsets=offsets),
        "wbc": wbc_score(target, reference, offsets=offsets),
    }


def test_ez_evidence_matches_the_worked_example() -> None:
    evidence = ez_evidence(TARGET, REFERENCE, IS_CORRECT, IS_CORRECT)

    assert evidence.positive == pytest.approx([3.0])
    assert evidence.negative == pytest.approx([0.5])
    assert evidence.total_shift == pytest.approx([2.8])
    assert (evidence.n_errors[0], evidence.n_reference_errors[0], evidence.n_tokens[0]) == (3, 3, 5)


def test_ez_scores_match_the_worked_example() -> None:
    bounded = ez_score(TARGET, REFERENCE, IS_CORRECT, IS_CORRECT, mode="bounded")
    ranked = ez_score(TARGET, REFERENCE, IS_CORRECT, IS_CORRECT)
    paper_code = ez_score(TARGET, REFERENCE, IS_CORRECT, IS_CORRECT, mode="paper_code")

    assert bounded == pytest.approx([0.857143], abs=1e-6)
    assert ranked == pytest.approx(bounded)
    assert paper_code == pytest.approx([6.0])
    assert np.log(paper_code) == pytest.approx([1.791759], abs=1e-6)


def test_record_without_downward_shift_is_top_except_in_the_released_code() -> None:
    reference = REFERENCE.copy()
    reference[2] = -3.5

    scores = {
        mode: ez_score(TARGET, reference, IS_CORRECT, IS_CORRECT, mode=mode).item()
        for mode in ("ranked", "bounded", "paper_code")
    }

    # Mean shift 3.8 / 5 = 0.76, so 1 + (1 + 0.76 / 1.76) / 2.
    assert scores == {
        "ranked": pytest.approx(1.7159091),
        "bounded": 1.0,
        "paper_code": 0.0,
    }


def test_record_without_errors_is_top_only_if_the_reference_made_one() -> None:
    is_correct = np.array([True, True, True, True])
    reference_is_correct = np.array([True, True, False, True])
    target, reference = np.array([-0.1] * 4), np.array([-0.2] * 4)
    offsets = np.array([0, 2, 4])

    bounded = ez_score(target, reference, is_correct, reference_is_correct, offsets=offsets, mode="bounded")
    ranked = ez_score(target, reference, is_correct, reference_is_correct, offsets=offsets)

    assert bounded.tolist() == [0.5, 1.0]
    assert ranked[0] == 0.5
    assert 1.0 < ranked[1] <= 2.0


def test_models_that_agree_give_one_half_on_every_record() -> None:
    tokens = ragged_tokens(1, [3, 1, 8])
    target, flags = tokens["target"], tokens["target_is_correct"]

    scores = ez_score(target, target, flags, flags, offsets=tokens["offsets"])

    assert scores.tolist() == [0.5, 0.5, 0.5]


def test_rounding_noise_below_the_tolerance_counts_as_agreement() -> None:
    wrong = np.array([False, False])
    target, reference = np.array([-1.0, -2.0]), np.array([-1.0 - 1e-7, -2.0])

    with_tolerance = ez_score(target, reference, wrong, wrong)
    without = ez_score(target, reference, wrong, wrong, tolerance=0.0)

    assert with_tolerance.item() == 0.5
    assert without.item() > 1.0


def test_released_code_mode_ignores_the_tolerance() -> None:
    wrong = np.array([False, False, False])
    target, reference = np.array([-4.0, -1.0, -2.0]), np.array([-4.0, -1.5, -2.0 + 5e-7])

    score = ez_score(target, reference, wrong, wrong, mode="paper_code", tolerance=1e-3)

    assert score == pytest.approx([0.5 / 5e-7], rel=1e-4)


def released_code_score(
    target: np.ndarray, reference: np.ndarray, is_correct: np.ndarray, *, offsets: np.ndarray
) -> list[float]:
    """The score of the released code, from its description: loops, and its own rules at the edges.

    The mask is that of the predicted tokens; `ignore_bos=True` zeroes its first entry.
    """
    scores = []
    for start, end in pairwise(offsets.tolist()):
        up, down, n_errors = 0.0, 0.0, 0
        for t in range(start + 1, end):
            if is_correct[t]:
                continue
            n_errors += 1
            shift = float(target[t]) - float(reference[t])
            if shift > 0:
                up += shift
            else:
                down -= shift
        ratio = up / (down + 1e-12)
        scores.append(0.0 if n_errors < 2 or down == 0 or not np.isfinite(ratio) else ratio)
    return scores


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_released_code_mode_is_the_released_score(seed: int, lengths: list[int]) -> None:
    tokens = ragged_tokens(seed, lengths)
    target, reference, offsets = tokens["target"], tokens["reference"], tokens["offsets"]
    is_correct = tokens["target_is_correct"]

    scores = ez_score(
        target, reference, is_correct, tokens["reference_is_correct"], offsets=offsets, mode="paper_code"
    )

    expected = released_code_score(target, reference, is_correct, offsets=offsets)
    assert scores.tolist() == pytest.approx(expected, rel=1e-9)


def test_released_code_mode_drops_the_first_predicted_token() -> None:
    wrong = np.array([False, False, False])
    target, reference = np.array([-1.0, -2.0, -3.0]), np.array([-9.0, -2.5, -2.75])

    assert ez_score(target, reference, wrong, wrong, mode="paper_code") == pytest.approx([2.0])
    assert ez_score(target[:2], reference[:2], wrong[:2], wrong[:2], mode="paper_code").tolist() == [0.0]
    assert ez_score(target[:1], reference[:1], wrong[:1], wrong[:1], mode="paper_code").tolist() == [0.0]


def test_released_code_mode_needs_two_errors() -> None:
    evidence = evidence_of([2.0, 2.0], [1.0, 1.0], n_errors=[1, 2])

    scores = ez_score_from_evidence(evidence, mode="paper_code")

    assert scores == pytest.approx([0.0, 2.0])


def test_top_records_are_ordered_by_mean_shift_and_not_by_length() -> None:
    shift = np.repeat([1.5, 1.0, 0.5], [4, 16, 64])
    reference = np.full(len(shift), -5.0)
    wrong = np.zeros(len(shift), dtype=np.bool_)

    scores = ez_score(reference + shift, reference, wrong, wrong, offsets=np.array([0, 4, 20, 84]))

    assert scores.tolist() == sorted(scores, reverse=True)


def test_members_whose_tokens_all_moved_up_are_found_at_any_length() -> None:
    """A domain that the base had never seen: every wrong token moves up, on non-members as well."""
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(8, 61, size=160)
    is_member = np.arange(160) < 80
    offsets = np.concatenate([[0], np.cumsum(n_tokens)])
    of_record = rng.normal(np.where(is_member, 1.1, 1.0), 0.05)
    shift = np.repeat(of_record, n_tokens) * rng.uniform(0.5, 1.5, size=offsets[-1])
    reference = np.full(offsets[-1], -6.0)
    wrong = np.zeros(offsets[-1], dtype=np.bool_)

    scores = ez_score(reference + shift, reference, wrong, wrong, offsets=offsets)

    assert 0.4 < roc_auc_score(is_member, np.add.reduceat(shift, offsets[:-1])) < 0.6
    assert roc_auc_score(is_member, scores) > 0.75


def test_top_records_of_one_length_are_ordered_by_their_shifts() -> None:
    shifts = [-1e9, -1.0, 0.0, 1.0, 50.0, 1e20]
    evidence = evidence_of([1.0] * 6, [0.0] * 6, total_shift=shifts)

    scores = ez_score_from_evidence(evidence)

    assert np.all(np.diff(scores) > 0)
    assert scores[2] == 1.5
    assert np.all((scores > 1.0) & (scores <= 2.0))


def test_tiny_downward_shift_ranks_below_every_top_record() -> None:
    evidence = evidence_of([1e9, 1e-3], [1e-10, 0.0], total_shift=[1e9, -1e30])

    bounded = ez_score_from_evidence(evidence, mode="bounded")
    ranked = ez_score_from_evidence(evidence, mode="ranked")

    assert bounded[0] < bounded[1] == 1.0
    assert ranked[0] < 1.0 < ranked[1]


def test_evidence_flags_its_edge_rows() -> None:
    evidence = evidence_of(
        [0.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 1.0, 0.0],
        n_errors=[0, 1, 3, 2],
        n_reference_errors=[1, 1, 1, 1],
    )

    assert evidence.has_no_errors.tolist() == [True, False, False, False]
    assert evidence.has_no_negative.tolist() == [False, True, False, False]
    assert evidence.is_low_evidence.tolist() == [False, True, False, False]
    assert evidence.is_top.tolist() == [True, True, False, False]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=2, max_size=20, unique=True))
def test_bounded_form_ranks_records_as_the_ratio_does(pairs: list[tuple[float, float]]) -> None:
    positive, negative = [p for p, _ in pairs], [n for _, n in pairs]
    evidence = evidence_of(positive, negative)

    bounded = ez_score_from_evidence(evidence)

    order = np.argsort(np.array(positive) / np.array(negative))
    assert np.all(np.diff(bounded[order]) >= -1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_ranked_scores_stay_in_range_and_top_rows_lie_above_one(seed: int, lengths: list[int]) -> None:
    tokens = ragged_tokens(seed, lengths)
    evidence = ez_evidence(
        tokens["target"],
        tokens["reference"],
        tokens["target_is_correct"],
        tokens["reference_is_correct"],
        offsets=tokens["offsets"],
    )

    scores = ez_score_from_evidence(evidence)

    assert np.all((scores >= 0.0) & (scores <= 2.0))
    assert np.array_equal(scores > 1.0, evidence.is_top)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_scores_of_a_record_do_not_depend_on_its_neighbors(seed: int, lengths: list[int]) -> None:
    tokens = ragged_tokens(seed, lengths)
    offsets = tokens.pop("offsets")

    together = all_scores(tokens, offsets=offsets)

    for record, (start, end) in enumerate(pairwise(offsets)):
        alone = all_scores({k: v[start:end] for k, v in tokens.items()}, offsets=None)
        for name, score in alone.items():
            assert score.dtype == np.float64
            assert score.tolist() == [together[name][record]], name


def test_scores_of_a_record_do_not_depend_on_how_many_share_its_length() -> None:
    tokens = ragged_tokens(13, [257] * 20)
    offsets = tokens.pop("offsets")

    together = all_scores(tokens, offsets=offsets)
    alone = all_scores({k: v[-257:] for k, v in tokens.items()}, offsets=None)

    for name, score in alone.items():
        assert score.tolist() == [together[name][-1]], name


def test_every_score_ranks_members_higher_when_the_target_learned_them() -> None:
    rng = np.random.default_rng(7)
    n_records, n_tokens = 60, 64
    is_member = np.arange(n_records) < 30
    reference = -rng.exponential(3.0, (n_records, n_tokens)) - 1.0
    target = reference + np.where(is_member[:, None], 0.5, 0.0)
    target += rng.normal(0.0, 0.3, target.shape)
    tokens = {
        "target": target.ravel(),
        "reference": reference.ravel(),
        "target_is_correct": rng.random(target.size) < 0.3,
        "reference_is_correct": rng.random(target.size) < 0.3,
        "means": np.full(target.size, -3.0),
        "stds": np.full(target.size, 2.0),
    }
    offsets = np.arange(0, target.size + 1, n_tokens)

    areas = {
        name: roc_auc_score(is_member, score) for name, score in all_scores(tokens, offsets=offsets).items()
    }

    assert all(area > 0.6 for area in areas.values()), areas


def test_mean_scores_match_a_loop_over_records() -> None:
    tokens = ragged_tokens(3, [5, 1, 7])
    target, reference, offsets = tokens["target"], tokens["reference"], tokens["offsets"]
    records = list(pairwise(offsets))

    assert loss_score(target, offsets=offsets) == pytest.approx([target[a:b].mean() for a, b in records])
    assert loss_difference_score(target, reference, offsets=offsets) == pytest.approx(
        [(target - reference)[a:b].mean() for a, b in records]
    )
    assert ratio_score(target, reference, offsets=offsets) == pytest.approx(
        [-target[a:b].mean() / reference[a:b].mean() for a, b in records]
    )


def test_ratio_of_two_certain_models_is_that_of_models_that_agree() -> None:
    certain, unsure = np.zeros(3), np.array([-1.0, -2.0, -3.0])

    both_certain = ratio_score(certain, certain).item()
    both_unsure = ratio_score(unsure, unsure).item()
    forgotten = ratio_score(unsure, certain).item()

    assert both_certain == both_unsure == -1.0
    assert np.isfinite(forgotten)
    assert forgotten < -1e6


def test_zlib_score_divides_by_compressed_bytes() -> None:
    log_probs = np.array([-2.0, -4.0, -1.0])

    scores = zlib_score(log_probs, n_compressed_bytes=np.array([30, 10]), offsets=np.array([0, 2, 3]))

    assert scores == pytest.approx([-0.1, -0.1])


@pytest.mark.parametrize("sizes", [np.array([0, 3]), np.array([3]), np.array([2.5, 3.0])])
def test_zlib_score_rejects_impossible_sizes(sizes: np.ndarray) -> None:
    with pytest.raises(ConfigurationError, match=r"zlib\.compress"):
        zlib_score(TARGET, n_compressed_bytes=sizes, offsets=np.array([0, 2, 5]))


@pytest.mark.parametrize(
    ("n_tokens", "k", "n_kept"), [(1, 0.2, 1), (4, 0.2, 1), (5, 0.2, 1), (10, 0.2, 2), (100, 0.29, 29)]
)
def test_min_k_keeps_the_floor_of_the_fraction_and_at_least_one(n_tokens: int, k: float, n_kept: int) -> None:
    log_probs = -np.arange(n_tokens, dtype=np.float64)

    score = min_k_score(log_probs, k=k)

    assert score == pytest.approx([np.sort(log_probs)[:n_kept].mean()])


def test_min_k_of_all_tokens_is_the_loss_score() -> None:
    tokens = ragged_tokens(5, [4, 9, 1])

    actual = min_k_score(tokens["target"], k=1.0, offsets=tokens["offsets"])

    assert actual == pytest.approx(loss_score(tokens["target"], offsets=tokens["offsets"]))


# Moments of the two vocabularies, recomputed from arXiv:2404.02936 (methods 2.1).
@pytest.mark.parametrize(
    ("probabilities", "mean", "std", "standardized"),
    [
        ([0.5, 0.25, 0.25], -1.039721, 0.346574, [1.0, -1.0, -1.0]),
        ([0.7, 0.2, 0.1], -0.801819, 0.703126, [0.633092, -1.148612, -2.134419]),
    ],
)
def test_min_k_plus_plus_matches_the_worked_vocabularies(
    probabilities: list[float], mean: float, std: float, standardized: list[float]
) -> None:
    log_probs = np.log(probabilities)

    scores = min_k_plus_plus_score(log_probs, np.full(3, mean), np.full(3, std), offsets=np.arange(4))

    assert scores == pytest.approx(standardized, abs=1e-5)


def test_flat_distribution_standardizes_to_zero() -> None:
    log_probs, means, stds = np.array([-1.0, -3.0]), np.array([-1.0, -2.0]), np.array([0.0, 2.0])

    scores = min_k_plus_plus_score(log_probs, means, stds, offsets=np.array([0, 1, 2]))

    assert scores.tolist() == [0.0, -0.5]


def test_calibrated_score_is_target_minus_reference() -> None:
    tokens = ragged_tokens(9, [6, 20])
    target = TokenMoments(tokens["target"], tokens["means"], tokens["stds"])
    reference = TokenMoments(tokens["reference"], tokens["means"] - 1.0, tokens["stds"] + 1.0)
    offsets = tokens["offsets"]

    actual = calibrated_min_k_plus_plus_score(target, reference, k=0.5, offsets=offsets)

    assert actual == pytest.approx(
        min_k_plus_plus_score(*target, k=0.5, offsets=offsets)
        - min_k_plus_plus_score(*reference, k=0.5, offsets=offsets)
    )


def test_window_sizes_are_those_of_the_code_and_of_the_formula() -> None:
    assert WBC_WINDOW_SIZES == (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)
    assert WBC_WINDOW_SIZES_PAPER == (2, 3, 4, 5, 8, 11, 15, 21, 29, 40)


# Worked windows of arXiv:2601.02751 (methods 2.1).
@pytest.mark.parametrize(
    ("shifts", "size", "share"),
    [
        ([0.1, 1.0, -0.5, 0.2, 2.0], 2, 0.75),
        ([0.1, 1.0, -0.5, 0.2, 2.0], 3, 1.0),
        ([0.1, 1.0, -0.5, 0.2, 2.0], 1, 0.8),
        ([0.1, -0.3, 0.25, 0.4, -1.0], 2, 0.25),
        ([0.1, -0.3, 0.25, 0.4, -1.0], 3, 2 / 3),
    ],
)
def test_window_shares_match_the_worked_examples(shifts: list[float], size: int, share: float) -> None:
    score = wbc_score(np.array(shifts), np.zeros(len(shifts)), window_sizes=[size])

    assert score == pytest.approx([share])


def naive_wbc(shifts: np.ndarray, window_sizes: tuple[int, ...]) -> float:
    shares = []
    for window_size in window_sizes:
        size = min(window_size, len(shifts))
        sums = [shifts[i : i + size].sum() for i in range(len(shifts) - size + 1)]
        shares.append(np.mean([s > 0 for s in sums]))
    return float(np.mean(shares))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_window_score_matches_a_loop_over_windows(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    # Quarters add up exactly, so that windows with sum 0 are exact in the loop, too.
    shifts = rng.integers(-4, 5, sum(lengths)) / 4
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    actual = wbc_score(shifts, np.zeros(len(shifts)), offsets=offsets)

    expected = [naive_wbc(part, WBC_WINDOW_SIZES) for part in np.split(shifts, offsets[1:-1])]
    assert actual == pytest.approx(expected)


def test_window_sums_of_zero_do_not_count() -> None:
    score = wbc_score(np.full(50, -1.0), np.full(50, -1.0))

    assert score.item() == 0.0


def test_shuffled_labels_make_the_score_uninformative() -> None:
    rng = np.random.default_rng(11)
    tokens = ragged_tokens(11, [32] * 400)
    scores = ez_score(
        tokens["target"],
        tokens["reference"],
        tokens["target_is_correct"],
        tokens["reference_is_correct"],
        offsets=tokens["offsets"],
    )
    is_member = rng.permutation(np.arange(400) < 200)

    p_value = stats.mannwhitneyu(scores[is_member], scores[~is_member]).pvalue

    assert p_value > 0.01


def test_no_records_give_no_scores() -> None:
    nothing = np.zeros(0)

    assert len(loss_score(nothing, offsets=np.array([0]))) == 0
    assert len(min_k_score(nothing, offsets=np.array([0]))) == 0
    assert len(wbc_score(nothing, nothing, offsets=np.array([0]))) == 0


@pytest.mark.parametrize("offsets", [np.array([0, 2, 2, 5]), np.array([0, 0, 5])])
def test_record_without_tokens_is_refused(offsets: np.ndarray) -> None:
    with pytest.raises(EmptyRecordError, match="has no scored token"):
        loss_score(TARGET, offsets=offsets)


def test_single_record_without_tokens_is_refused() -> None:
    with pytest.raises(EmptyRecordError, match="Record 0"):
        loss_score(np.zeros(0))


@pytest.mark.parametrize(
    "offsets",
    [
        np.array([1, 5]),
        np.array([0, 4]),
        np.array([0, 6]),
        np.array([0, 3, 2, 5]),
        np.array([0.0, 5.0]),
        np.array([[0, 5]]),
        np.array([], dtype=np.int64),
    ],
)
def test_offsets_that_do_not_cover_the_tokens_are_refused(offsets: np.ndarray) -> None:
    with pytest.raises(ConfigurationError, match="cumulative token counts"):
        loss_score(TARGET, offsets=offsets)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("score", [loss_difference_score, ratio_score, wbc_score])
def test_non_finite_log_probabilities_are_refused(
    bad: float, score: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    spoiled = TARGET.copy()
    spoiled[3] = bad

    with pytest.raises(NonFiniteLogitsError, match="at flat token 3"):
        score(spoiled, REFERENCE)
    with pytest.raises(NonFiniteLogitsError, match="reference_log_probs"):
        score(TARGET, spoiled)


def test_token_arrays_of_unequal_length_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="same tokens"):
        loss_difference_score(TARGET, REFERENCE[:4])
    with pytest.raises(ConfigurationError, match="one entry per scored token"):
        ez_score(TARGET, REFERENCE, IS_CORRECT[:4], IS_CORRECT)
    with pytest.raises(ConfigurationError, match="one entry per scored token"):
        min_k_plus_plus_score(TARGET, TARGET[:4], -TARGET)
    with pytest.raises(ConfigurationError, match="same tokens"):
        calibrated_min_k_plus_plus_score(
            TokenMoments(TARGET, TARGET, -TARGET),
            TokenMoments(TARGET[:4], TARGET[:4], -TARGET[:4]),
        )


def test_padded_matrices_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="tokens are needed flat"):
        loss_score(TARGET[np.newaxis])


def test_token_ids_in_place_of_flags_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not token ids"):
        ez_score(TARGET, REFERENCE, np.arange(5), IS_CORRECT)


def test_arguments_outside_their_range_are_refused() -> None:
    unknown: EzMode = "exact"  # type: ignore[assignment]  # what an untyped caller may pass
    with pytest.raises(ConfigurationError, match="ranked, bounded, paper_code"):
        ez_score(TARGET, REFERENCE, IS_CORRECT, IS_CORRECT, mode=unknown)
    with pytest.raises(ConfigurationError, match="tolerance"):
        ez_score(TARGET, REFERENCE, IS_CORRECT, IS_CORRECT, tolerance=-1.0)
    with pytest.raises(ConfigurationError, match="`k` is 20"):
        min_k_score(TARGET, k=20)
    with pytest.raises(ConfigurationError, match="never negative"):
        min_k_plus_plus_score(TARGET, TARGET, TARGET)
    with pytest.raises(ConfigurationError, match="WBC_WINDOW_SIZES"):
        wbc_score(TARGET, REFERENCE, window_sizes=[])
    with pytest.raises(ConfigurationError, match="WBC_WINDOW_SIZES"):
        wbc_score(TARGET, REFERENCE, window_sizes=[0, 2])


def test_evidence_with_unequal_fields_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="one entry per record"):
        evidence_of([1.0, 2.0], [1.0])


def test_margin_is_what_dpo_raises():
    """Golden: two pairs by hand; beta 0.1 times the margin are the logits of the DPO loss, eq. 7."""
    sides = {
        "target_chosen": np.array([-1.0, -2.0, -0.5]),
        "reference_chosen": np.array([-1.5, -2.5, -0.25]),
        "target_rejected": np.array([-3.0, -1.0, -2.0]),
        "reference_rejected": np.array([-2.0, -1.0, -1.0]),
    }

    margins = margin_score(**sides, chosen_offsets=np.array([0, 2, 3]), rejected_offsets=np.array([0, 1, 3]))

    assert margins.tolist() == [(0.5 + 0.5) - (-1.0), -0.25 - (0.0 - 1.0)]


def test_tokens_that_both_sides_have_in_common_cancel_whatever_became_of_them():
    rng = np.random.default_rng(0)
    common = rng.normal(-2, 1, size=(2, 30))
    first = margin_score(np.array([-1.0]), np.array([-2.0]), np.array([-4.0]), np.array([-3.0]))

    with_common = margin_score(
        *(np.append(common[i], value) for i, value in ((0, -1.0), (1, -2.0), (0, -4.0), (1, -3.0)))
    )

    np.testing.assert_allclose(with_common, first, atol=1e-12)


def test_swapped_sides_turn_the_margin_around():
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(-2, 1, size=(2, 7)), rng.normal(-2, 1, size=(2, 5))
    borders = {"chosen_offsets": np.array([0, 3, 7]), "rejected_offsets": np.array([0, 1, 5])}
    swapped = dict(zip(borders, reversed(borders.values()), strict=True))

    np.testing.assert_allclose(
        margin_score(*chosen, *rejected, **borders), -margin_score(*rejected, *chosen, **swapped)
    )


def test_sides_of_different_numbers_of_pairs_are_refused():
    one, two = np.array([-1.0]), np.array([-1.0, -2.0])

    with pytest.raises(ConfigurationError, match="2 chosen sides and 1 rejected ones"):
        margin_score(two, two, one, one, chosen_offsets=np.array([0, 1, 2]))
