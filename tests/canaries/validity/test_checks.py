import random

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ezmia_callbacks.canaries import CanarySet, hold_out_canaries
from ezmia_callbacks.canaries.validity.checks import (
    BlindCheck,
    EvidenceCheck,
    NearDuplicateCheck,
    _out_of_fold_scores,
    _word_check,
    check_validity,
)
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional import hanley_mcneil_standard_error

WORDS = np.array([f"w{i}" for i in range(400)])


def texts(n_texts: int, *, seed: int, extra: str = "", share: float = 1.0) -> list[str]:
    """Texts of 30 to 50 words with Zipf frequencies; a share of them holds an extra word."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(WORDS) + 1)
    made = []
    for _ in range(n_texts):
        words = list(rng.choice(WORDS, size=rng.integers(30, 51), p=weights / weights.sum()))
        if extra and rng.random() < share:
            words[3] = extra
        made.append(" ".join(words))
    return made


def random_split(n: int, *, seed: int) -> CanarySet:
    return hold_out_canaries(texts(2 * n, seed=seed), n_members=n, n_non_members=n, seed=seed)[1]


def check_of(report, name: str):
    return next(check for check in report.checks if check.name == name)


def test_a_random_split_is_not_flagged_and_reads_as_it_is():
    canaries = random_split(150, seed=3)

    report = check_validity(canaries, training_records=texts(300, seed=99))

    assert not report.is_flagged
    assert report.blind_auc == 0.5
    assert report.headline == ""
    assert "Nothing found that would distort" in report.describe()


@pytest.mark.slow
def test_random_splits_are_flagged_at_the_nominal_rate():
    n_flagged = 0

    for seed in range(200):
        canaries = random_split(50, seed=seed)
        losses = np.random.default_rng(10_000 + seed).normal(size=100)
        n_flagged += check_validity(canaries, reference_losses=losses).is_flagged

    # Binomial(200, 0.05): above 20 with a probability of 0.001.
    assert n_flagged <= 20


def test_the_word_check_alone_keeps_its_rate():
    n_outside = 0

    for seed in range(40):
        check = _word_check(random_split(100, seed=1000 + seed), confidence=0.9, seed=seed)
        n_outside += 0.5 not in check.interval

    # Binomial(40, 0.1): above 9 with a probability of 0.005. DeLong's variance alone leaves out 12.
    assert n_outside <= 9


def test_words_of_one_side_are_found():
    canaries = CanarySet.from_lists(
        texts(200, seed=0, extra="yesterday", share=0.5), texts(200, seed=1, extra="tomorrow", share=0.5)
    )

    report = check_validity(canaries)

    check = check_of(report, "words")
    assert check.is_flagged
    assert check.auc > 0.65
    assert report.blind_auc == check.interval.lower
    assert "told apart without the model (AUC at least 0.7" in report.headline
    assert report.describe().count("FLAGGED") == 1


def test_token_ids_of_one_side_are_found():
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(50, size=40).tolist()} for _ in range(200)]
    others = [{"input_ids": [60, *rng.integers(50, size=39).tolist()]} for _ in range(200)]

    report = check_validity(CanarySet.from_lists(rows, others))

    assert check_of(report, "words").auc > 0.95


@pytest.mark.parametrize("longer_side", ["members", "non_members"])
def test_lengths_that_differ_are_found_on_either_side(longer_side):
    sides = {"members": texts(100, seed=0), "non_members": texts(100, seed=1)}
    sides[longer_side] = [f"{text} {text[:80]}" for text in sides[longer_side]]

    report = check_validity(CanarySet.from_lists(**sides))

    check = check_of(report, "length")
    assert check.is_flagged
    assert (check.auc > 0.5) == (longer_side == "members")
    assert check.blind_auc > 0.6


def test_given_values_are_compared():
    canaries = random_split(100, seed=5)
    shift = np.where(canaries.is_member, 1.5, 0.0)
    noise = np.random.default_rng(0).normal(size=200)

    report = check_validity(
        canaries,
        reference_losses=noise - shift,
        is_truncated=canaries.is_member & (np.arange(200) % 2 == 0),
        n_scored_tokens=40 + noise,
        n_error_tokens=20 + 4 * shift,
    )

    assert check_of(report, "mean loss before training").blind_auc > 0.7
    assert check_of(report, "truncation").is_flagged
    assert not check_of(report, "number of scored tokens").is_flagged
    assert check_of(report, "number of wrongly predicted tokens before training").auc == 1.0
    assert report.blind_auc > 0.9


def test_the_error_rate_is_shared_by_the_blind_checks_that_were_asked_for():
    canaries = random_split(50, seed=0)
    losses = np.random.default_rng(0).normal(size=100)

    two = check_validity(canaries)
    three = check_validity(canaries, reference_losses=losses)

    confidences = [
        {check.interval.confidence for check in report.checks if isinstance(check, BlindCheck)}
        for report in (two, three)
    ]
    assert confidences == [{1 - 0.05 / 2}, {1 - 0.05 / 3}]


def test_the_power_that_the_sizes_leave_is_said():
    canaries = random_split(100, seed=0)

    said = check_of(check_validity(canaries), "length").describe()

    # Hanley and McNeil at 100 + 100 and AUC 0.5.
    assert "the standard error is 0.041 or more" in said
    assert "below an AUC of about 0.63 are likely to be missed" in said


def test_scores_come_from_classifiers_that_did_not_see_the_record():
    # Every record holds a word of its own: whoever sees it in training knows its label.
    records = [f"unique{i} shared words" for i in range(100)]
    rng = np.random.default_rng(0)
    is_member = rng.permutation(np.arange(100) < 50)

    scores = _out_of_fold_scores(records, is_member, rng)

    assert abs(roc_auc_score(is_member, scores.actual) - 0.5) < 0.3
    assert (scores.permuted[1].sum(axis=1) == 50).all()


def test_pooled_folds_vary_more_than_the_formula_says():
    rng = np.random.default_rng(0)
    is_member = rng.permutation(np.arange(100) < 50)

    permuted = _out_of_fold_scores(texts(100, seed=0), is_member, rng).permuted
    spread = np.std([roc_auc_score(labels, row) for row, labels in zip(*permuted, strict=True)])

    assert spread > 1.2 * hanley_mcneil_standard_error(0.5, n_members=50, n_non_members=50)


def test_near_copies_of_non_members_are_listed_by_id():
    members, non_members = texts(20, seed=0), texts(20, seed=1)
    members[4] = non_members[6].replace("w1 ", "W1  ") + " more"
    rows = [*members, f"Also: {non_members[9]}"]

    report = check_validity(CanarySet.from_lists(members, non_members), training_records=iter(rows))

    among_members = check_of(report, "near copies among members")
    among_rows = check_of(report, "near copies among training rows")
    assert [pair[:2] for pair in among_members.pairs] == [("non-member-6", "member-4")]
    assert [pair[:2] for pair in among_rows.pairs] == [
        ("non-member-6", "row 4"),
        ("non-member-9", "row 20"),
    ]
    assert (among_rows.n_affected, among_rows.n_searched) == (2, 21)
    assert report.is_flagged
    assert report.blind_auc == 0.5
    assert "2 of 20 non-members have near copies" in report.headline
    assert "the leakage figure is likely too low" in report.headline


def test_what_was_not_drawn_at_random_is_said_even_where_nothing_is_found():
    canaries = CanarySet.from_lists(texts(60, seed=0), texts(60, seed=1))

    report = check_validity(canaries)

    assert not report.is_flagged
    assert report.headline.startswith("Membership was not drawn at random")


def test_records_that_are_mostly_too_short_are_flagged():
    canaries = random_split(50, seed=0)

    report = check_validity(canaries, n_scored_tokens=np.full(100, 20), n_error_tokens=np.full(100, 10))

    scored, errors = (check for check in report.checks if isinstance(check, EvidenceCheck))
    assert (scored.is_flagged, scored.n_below, errors.is_flagged) == (True, 100, False)
    assert "too short" in report.headline


@pytest.mark.parametrize("losses", [np.zeros(3), np.full(40, np.nan)])
def test_values_that_do_not_fit_the_records_are_refused(losses):
    canaries = random_split(20, seed=0)

    with pytest.raises(ConfigurationError, match="one finite value for each of 40 records"):
        check_validity(canaries, reference_losses=losses)


def test_a_confidence_outside_its_range_is_refused():
    with pytest.raises(ConfigurationError, match="`confidence` is 95"):
        check_validity(random_split(20, seed=0), confidence=95)


def test_records_without_words_are_compared_by_length_only():
    canaries = CanarySet.from_lists(["?" * i for i in range(1, 21)], ["!" * i for i in range(1, 21)])

    report = check_validity(canaries)

    assert check_of(report, "words").auc == 0.5
    assert not check_of(report, "words").is_flagged


def test_the_report_repeats_and_leaves_the_global_generators_alone():
    canaries = random_split(50, seed=0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    first, second = check_validity(canaries), check_validity(canaries)

    assert first == second
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_checks_are_immutable_and_all_describe_themselves():
    report = check_validity(random_split(20, seed=0), n_scored_tokens=np.full(40, 50))

    assert {type(check) for check in report.checks} == {BlindCheck, NearDuplicateCheck, EvidenceCheck}
    assert all(len(check.describe()) > 20 for check in report.checks)
    with pytest.raises(AttributeError):
        report.checks = ()
