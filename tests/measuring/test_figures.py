from dataclasses import replace

import numpy as np
import pytest

from ezmia_callbacks import hold_out_canaries
from ezmia_callbacks.functional import (
    EndShares,
    advantage_interval,
    auc,
    checkpoint_holder_score,
    delong_interval,
    membership_advantage,
    n_non_members_needed,
    tpr_at_fpr,
    tpr_at_fpr_interval,
)
from ezmia_callbacks.functional.checkpoint_holder import EarlierSteps
from ezmia_callbacks.measuring.analysis_units import AnalysisUnits
from ezmia_callbacks.measuring.figures import (
    Counted,
    edge_counts,
    figures,
    mean_loss,
    measure_auc,
    measure_scores,
)
from ezmia_callbacks.measuring.subset import CanarySubset
from ezmia_callbacks.results.result import EdgeCounts
from ezmia_callbacks.scoring.rows import encode_canaries
from ezmia_callbacks.scoring.statistics import TokenStatistics, score_records

LEVELS = {"confidence": 0.95, "band": EndShares(0.005, 0.005)}


def draw_scores(n_members=200, n_non_members=600):
    is_member = np.arange(n_members + n_non_members) < n_members
    scores = np.random.default_rng(0).normal(size=len(is_member)) + is_member
    return scores, is_member


def statistics(log_probs, is_correct, offsets):
    log_probs = np.array(log_probs, dtype=np.float32)
    return TokenStatistics(
        log_probs=log_probs,
        is_correct=np.array(is_correct, dtype=bool),
        means=log_probs,
        standard_deviations=np.ones_like(log_probs),
        offsets=np.array(offsets, dtype=np.int64),
    )


def test_auc_and_its_intervals_are_the_functional_ones():
    scores, is_member = draw_scores()

    measured = measure_auc(scores, is_member, **LEVELS)

    assert measured.value == auc(scores, is_member)
    assert measured.interval == delong_interval(scores, is_member, confidence=0.95)
    assert measured.band == delong_interval(scores, is_member, confidence=0.99)


def test_auc_without_a_band_confidence_has_no_band():
    assert measure_auc(*draw_scores(), confidence=0.95).band is None


def test_every_figure_is_the_functional_one():
    scores, is_member = draw_scores()

    measured = measure_scores(scores, is_member, fpr_levels=(0.1, 0.25), **LEVELS)

    assert list(measured) == ["auc", "tpr_at_fpr_0.1", "tpr_at_fpr_0.25", "advantage"]
    assert measured["auc"] == measure_auc(scores, is_member, **LEVELS)
    assert measured["advantage"].value == membership_advantage(scores, is_member)
    assert measured["advantage"].interval == advantage_interval(scores, is_member, confidence=0.95)
    assert measured["advantage"].band == advantage_interval(scores, is_member, confidence=0.99)
    for fpr in (0.1, 0.25):
        figure = measured[f"tpr_at_fpr_{fpr}"]
        assert figure.value == tpr_at_fpr(scores, is_member, fpr=fpr)
        assert figure.interval == tpr_at_fpr_interval(scores, is_member, fpr=fpr, confidence=0.95)
        assert figure.band == tpr_at_fpr_interval(scores, is_member, fpr=fpr, confidence=0.99)
        assert figure.note is None


def test_bands_are_wider_than_intervals():
    measured = measure_scores(*draw_scores(), fpr_levels=(0.1,), **LEVELS)

    for figure in measured.values():
        assert figure.band.lower <= figure.interval.lower <= figure.value
        assert figure.value <= figure.interval.upper <= figure.band.upper
        assert figure.band.upper - figure.band.lower > figure.interval.upper - figure.interval.lower


def test_a_rate_below_one_false_positive_has_no_value_and_says_how_many_would_do():
    figure = measure_scores(*draw_scores(n_non_members=99), fpr_levels=(0.01,), **LEVELS)["tpr_at_fpr_0.01"]

    assert (figure.value, figure.interval, figure.band) == (None, None, None)
    assert figure.note == "needs 100 non-members for a value, got 99"


def test_a_rate_has_a_value_from_the_number_that_the_note_names():
    figure = measure_scores(*draw_scores(n_non_members=100), fpr_levels=(0.01,), **LEVELS)["tpr_at_fpr_0.01"]

    assert figure.value is not None


@pytest.mark.parametrize("fpr", [0.02, 0.05])
def test_a_rate_without_bounds_names_the_number_at_which_they_appear(fpr):
    name = f"tpr_at_fpr_{fpr}"

    figure = measure_scores(*draw_scores(n_non_members=60), fpr_levels=(fpr,), **LEVELS)[name]

    needed_for_interval = n_non_members_needed(fpr=fpr, failure_probability=0.05 / 4)
    needed_for_band = n_non_members_needed(fpr=fpr, failure_probability=0.01 / 4)
    assert figure.value is not None
    assert (figure.interval, figure.band) == (None, None)
    assert figure.note == f"bounds need {needed_for_interval} non-members, got 60"
    for n, has_interval, has_band in (
        (needed_for_interval - 1, False, False),
        (needed_for_interval, True, False),
        (needed_for_band - 1, True, False),
        (needed_for_band, True, True),
    ):
        figure = measure_scores(*draw_scores(n_non_members=n), fpr_levels=(fpr,), **LEVELS)[name]
        assert (figure.interval is not None, figure.band is not None) == (has_interval, has_band)
        if has_interval and not has_band:
            assert figure.note == f"bounds need {needed_for_band} non-members, got {n}"


def test_equal_scores_show_no_leakage():
    is_member = np.arange(200) < 80

    measured = measure_scores(np.zeros(200), is_member, fpr_levels=(0.1,), **LEVELS)

    assert {name: figure.value for name, figure in measured.items()} == {
        "auc": 0.5,
        "tpr_at_fpr_0.1": 0.0,
        "advantage": 0.0,
    }


def test_mean_loss_weighs_tokens_not_records():
    rows = statistics([-1, -2, -3, -10, -20, -30], [True] * 6, [0, 3, 4, 6])

    assert mean_loss(rows, np.array([True, True, False])) == pytest.approx((1 + 2 + 3 + 10) / 4)
    assert mean_loss(rows, np.array([False, False, True])) == pytest.approx(25.0)


def test_mean_loss_is_summed_in_double_precision():
    # In float32 the sum of 2^24 and ones would stop growing.
    rows = statistics([-(2.0**24), -1, -1, -1], [True] * 4, [0, 4])

    assert mean_loss(rows, np.array([True])) == (2.0**24 + 3) / 4


def test_edge_records_are_counted_by_class():
    # (shift, is_correct) of two tokens per record; the reference is at -5 everywhere and always wrong.
    rows = {
        "no errors": [(1, True), (2, True)],
        "one error, up": [(1, False), (2, True)],
        "one error, down": [(-1, False), (2, True)],
        "two errors, all up": [(1, False), (2, False)],
        "two errors, both ways": [(1, False), (-2, False)],
        "two errors, unmoved": [(0, False), (0, False)],
    }
    tokens = [token for row in rows.values() for token in row]
    offsets = range(0, 13, 2)
    target = statistics([-5 + shift for shift, _ in tokens], [correct for _, correct in tokens], offsets)
    reference = statistics([-5] * 12, [False] * 12, offsets)

    is_member = np.array([True, True, True, True, False, False])
    members, non_members = edge_counts(target, reference, is_member, ~is_member)

    assert members == EdgeCounts(n_no_errors=1, n_no_negative=2, n_low_evidence=2, n_records=4)
    assert non_members == EdgeCounts(n_no_errors=0, n_no_negative=0, n_low_evidence=0, n_records=2)
    assert edge_counts(target, reference, ~is_member, is_member) == (non_members, members)


def make_subset(n_members=30, n_non_members=60, rows=None):
    rows = rows or [{"input_ids": [i % 50 + 3, i // 50 + 3, 5, 7]} for i in range(500)]
    canaries = hold_out_canaries(rows, n_members=n_members, n_non_members=n_non_members, seed=0)[1]
    return CanarySubset(encode_canaries(canaries), AnalysisUnits(canaries))


def two_models(subset):
    """Token statistics of a model before and after something like training."""
    rng = np.random.default_rng(0)
    n_records = len(subset.encoded.rows)
    offsets = np.arange(0, 3 * n_records + 1, 3)
    before = -rng.uniform(1.0, 5.0, size=3 * n_records)
    gain = rng.normal(size=3 * n_records) + np.repeat(subset.encoded.is_member, 3)
    is_correct = rng.random(3 * n_records) < 0.2
    after = np.minimum(before + 0.3 * gain, -0.01)
    return statistics(after, is_correct, offsets), statistics(before, is_correct, offsets)


def figures_of(subset, **options):
    target, reference = two_models(subset)
    settings = {
        "judged": ["ez"],
        "strongest_of": lambda metrics: next(iter(metrics)),
        "own_scores": {},
        "fpr_levels": (0.1,),
        "confidence": 0.95,
        "band": EndShares(0.005, 0.005),
        "has_epsilon": False,
    }
    return figures(target, reference, subset, **{**settings, **options})


def test_the_figures_of_an_audit_are_those_of_its_parts():
    subset = make_subset()
    target, reference = two_models(subset)

    found = figures_of(subset)

    scores = score_records("ez", target, reference)
    np.testing.assert_array_equal(found.scores, scores)
    assert found.metrics == measure_scores(scores, subset.encoded.is_member, fpr_levels=(0.1,), **LEVELS)
    assert set(found.auc_by_score) == {"loss_difference", "wbc", "calibrated_min_k_plus_plus", "loss"}
    assert (found.n_members, found.n_non_members, found.n_tokens) == (30, 60, 270)
    assert found.member_loss == mean_loss(target, subset.encoded.is_member)
    assert found.epsilon is None


def test_of_preference_pairs_the_margin_stands_beside_the_other_scores():
    rows = [{"input_ids": [i % 50 + 3, i // 50 + 3, 5, 7]} for i in range(500)]
    pairs = [row | {"rejected_input_ids": [*row["input_ids"][:3], 8]} for row in rows]
    subset = make_subset(rows=pairs)
    target, reference = two_models(subset)
    # The rejected sides stay where they were.
    pair_statistics = replace(target, rejected=reference), replace(reference, rejected=reference)
    settings = {"own_scores": {}, "fpr_levels": (0.1,), "band": EndShares(0.005, 0.005)}
    settings |= {
        "confidence": 0.95,
        "has_epsilon": False,
        "strongest_of": lambda metrics: next(iter(metrics)),
    }

    of_ez, of_margin = (
        figures(*pair_statistics, subset, judged=[score], **settings) for score in ("ez", "margin")
    )

    margins = score_records("margin", *pair_statistics)
    expected = measure_auc(margins, subset.encoded.is_member, confidence=0.95)
    assert of_ez.auc_by_score["margin"] == expected
    assert of_margin.metrics["auc"].value == expected.value
    assert "ez" in of_margin.auc_by_score
    assert "margin" not in figures_of(make_subset()).auc_by_score


def test_a_score_of_the_users_decides_and_the_built_in_ones_stand_beside_it():
    subset = make_subset()
    perfect = subset.encoded.is_member.astype(float)

    found = figures_of(subset, judged=["mine"], own_scores={"mine": perfect})

    assert found.metrics["auc"].value == 1.0
    assert "ez" in found.auc_by_score
    np.testing.assert_array_equal(found.scores, perfect)


def test_the_score_that_leaks_most_decides_and_the_others_are_measured_alike():
    subset = make_subset()
    judged = ["ez", "loss_difference", "wbc"]

    found = figures_of(subset, judged=judged, strongest_of=lambda metrics: "wbc")

    # Intervals hold for three scores together; bands were asked for as they are.
    alone = {name: figures_of(subset, judged=[name], confidence=1 - 0.05 / 3) for name in judged}
    assert found.decided_by == "wbc"
    assert found.metrics == alone["wbc"].metrics
    assert found.judged_beside == {name: alone[name].metrics for name in ("ez", "loss_difference")}
    assert set(found.auc_by_score) == {"calibrated_min_k_plus_plus", "loss"}
    np.testing.assert_array_equal(found.scores, alone["wbc"].scores)
    np.testing.assert_equal(found.scores_beside, {n: alone[n].scores for n in ("ez", "loss_difference")})


def test_before_training_nothing_is_chosen_by_looking():
    subset = make_subset()

    found = figures_of(subset, judged=["ez", "loss"], strongest_of=lambda metrics: "loss", band=None)

    alone = figures_of(subset, judged=["loss"], band=None).metrics
    assert found.decided_by == "ez"
    assert found.judged_beside["loss"] == alone


@pytest.mark.parametrize("name", ["auc", "advantage", "tpr_at_fpr_0.1"])
def test_each_end_of_a_band_has_its_own_share_of_the_error(name):
    scores, is_member = draw_scores()
    measures = {"auc": delong_interval, "advantage": advantage_interval}
    if name.startswith("tpr"):
        measures[name] = lambda *arrays, confidence: tpr_at_fpr_interval(
            *arrays, fpr=0.1, confidence=confidence
        )

    found = measure_scores(
        scores, is_member, fpr_levels=(0.1,), confidence=0.95, band=EndShares(0.0025, 0.01)
    )[name]

    def ends(sign):
        strict, loose = (measures[name](sign * scores, is_member, confidence=c) for c in (0.995, 0.98))
        return strict.lower, loose.upper

    assert (found.band.lower, found.band.upper) == ends(1)
    # No mirror image any more, so the AUC, too, carries that of the score turned around.
    assert (found.reversed.band.lower, found.reversed.band.upper) == ends(-1)
    assert found.band.confidence == pytest.approx(0.9875)


def test_a_lower_end_that_decides_nothing_needs_no_further_non_members():
    """60 non-members carry a band at 10 % with a share of 0.01, and none with 0.0001."""
    scores, is_member = draw_scores(n_non_members=60)

    found = measure_scores(scores, is_member, fpr_levels=(0.1,), confidence=0.9, band=EndShares(1e-4, 0.01))[
        "tpr_at_fpr_0.1"
    ]

    assert (found.band.lower, found.note) == (0.0, None)
    assert found.band.upper == tpr_at_fpr_interval(scores, is_member, fpr=0.1, confidence=0.98).upper


def test_epsilon_is_the_best_of_the_scores_that_are_judged_and_pays_for_the_choice():
    rows = [{"input_ids": [i % 50 + 3, i // 50 + 3, 5, 7]} for i in range(500)]
    by_coins = hold_out_canaries(rows, n_canaries=200, seed=0)[1]
    subset = CanarySubset(encode_canaries(by_coins), AnalysisUnits(by_coins))
    perfect = subset.encoded.is_member.astype(float)
    own = {"mine": perfect, "noise": np.random.default_rng(0).normal(size=len(perfect))}

    together = figures_of(subset, judged=["noise", "mine"], own_scores=own, has_epsilon=True).epsilon
    alone = figures_of(subset, judged=["mine"], own_scores=own, has_epsilon=True, confidence=0.975).epsilon

    assert together == replace(alone, confidence=0.95, choice="bonferroni")


def test_an_audit_that_nothing_is_decided_by_has_no_bands():
    assert figures_of(make_subset(), band=None).metrics["auc"].band is None


def test_epsilon_needs_coins_and_a_score_that_may_carry_it():
    rows = [{"input_ids": [i % 50 + 3, i // 50 + 3, 5, 7]} for i in range(500)]
    by_coins = hold_out_canaries(rows, n_canaries=100, seed=0)[1]
    subset = CanarySubset(encode_canaries(by_coins), AnalysisUnits(by_coins))

    assert by_coins.provenance.has_independent_coins
    assert figures_of(subset, has_epsilon=True).epsilon.n > 0
    assert figures_of(subset, has_epsilon=False).epsilon is None
    assert figures_of(make_subset(), has_epsilon=True).epsilon is None


def test_tpr_and_advantage_carry_those_of_the_score_turned_around():
    scores, is_member = draw_scores()

    found = measure_scores(scores, is_member, fpr_levels=(0.1, 0.001), **LEVELS)
    turned = measure_scores(-scores, is_member, fpr_levels=(0.1, 0.001), **LEVELS)

    for name in ("tpr_at_fpr_0.1", "advantage"):
        assert found[name].reversed == replace(turned[name], reversed=None)
    assert found["tpr_at_fpr_0.1"].reversed.value < 0.1 < found["tpr_at_fpr_0.1"].value
    # One is the mirror image of the other; what is not resolved is so in both directions.
    assert found["auc"].reversed is None
    assert found["tpr_at_fpr_0.001"].reversed is None


def counted_of(subset, *, n_members):
    """The first members, and all non-members."""
    is_member = subset.encoded.is_member
    is_counted = ~is_member | (np.cumsum(is_member) <= n_members)
    return Counted(is_counted, np.where(is_member & is_counted, 5, -1))


def test_a_holder_of_all_checkpoints_ranks_all_records_and_is_measured_by_those_that_count():
    subset = make_subset()
    target, reference = two_models(subset)
    earlier = np.random.default_rng(1).normal(size=(2, 90))
    counted = counted_of(subset, n_members=20)

    found = figures_of(subset, counted=counted, previous=reference, earlier_steps=EarlierSteps(earlier))

    step = score_records("ez", target, reference)
    combined = checkpoint_holder_score(np.concatenate([earlier, step[np.newaxis]]))
    is_counted = counted.is_counted
    expected = measure_auc(combined[is_counted], subset.encoded.is_member[is_counted], confidence=0.95)
    np.testing.assert_array_equal(found.step_scores, step)
    assert replace(found.checkpoint_holder, note=None) == expected
    assert "no part of the budget" in found.checkpoint_holder.note
    assert found.n_checkpoints == 3
    assert {*found.metrics, *found.judged_beside, *found.auc_by_score}.isdisjoint({"checkpoint_holder"})


def test_all_other_figures_are_the_same_with_a_holder_of_all_checkpoints():
    subset = make_subset()
    earlier = np.random.default_rng(1).normal(size=(1, 90))

    with_it = figures_of(subset, previous=two_models(subset)[1], earlier_steps=EarlierSteps(earlier))
    without = figures_of(subset)

    own = ("checkpoint_holder", "n_checkpoints", "step_scores")
    found, expected = ({k: v for k, v in vars(each).items() if k not in own} for each in (with_it, without))
    np.testing.assert_equal(found, expected)


def test_one_checkpoint_says_nothing_that_the_other_figures_do_not():
    subset = make_subset()
    none = np.zeros((0, 90))

    found = figures_of(subset, previous=two_models(subset)[1], earlier_steps=EarlierSteps(none))

    assert (found.checkpoint_holder, found.n_checkpoints) == (None, None)
    assert len(np.unique(found.step_scores)) > 1
    assert set(figures_of(subset).step_scores) == {0.5}


def test_what_too_few_members_cannot_say_of_all_checkpoints_has_no_value():
    subset = make_subset()
    counted = counted_of(subset, n_members=1)

    found = figures_of(
        subset,
        counted=counted,
        previous=two_models(subset)[1],
        earlier_steps=EarlierSteps(np.full((1, 90), 0.5)),
    )

    assert found.checkpoint_holder.value is None
    assert "1 members" in found.checkpoint_holder.note
