"""Subsets of the canaries: which records belong to them, and the smallest that will do."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_rows, make_texts

from ezmia_callbacks import hold_out_canaries, insert_canaries
from ezmia_callbacks.errors import TooFewCanariesError
from ezmia_callbacks.measuring.analysis_units import AnalysisUnits
from ezmia_callbacks.measuring.subset import CanarySubset, smallest_subset, subset_of
from ezmia_callbacks.scoring.rows import encode_canaries

N_MEMBERS, N_NON_MEMBERS = 100, 200


def draw(**how):
    how = how or {"n_members": N_MEMBERS, "n_non_members": N_NON_MEMBERS}
    return hold_out_canaries(make_rows(make_texts(500)), seed=0, **how)[1]


def everything():
    canaries = draw()
    return CanarySubset(encode_canaries(canaries), AnalysisUnits(canaries))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_a_smaller_part_lies_inside_a_larger_one(a, b):
    canaries = draw(n_members=30, n_non_members=60)
    small, large = (subset_of(canaries, share, seed=1) for share in sorted((a, b)))

    assert not np.any(small & ~large)
    for side in (canaries.is_member, ~canaries.is_member):
        assert (small & side).sum() == max(1, int(np.floor(round(min(a, b) * side.sum(), 9))))


def test_the_order_of_records_is_drawn():
    canaries = draw()

    parts = [subset_of(canaries, 0.5, seed=seed) for seed in (1, 1, 2)]

    np.testing.assert_array_equal(parts[0], parts[1])
    assert np.any(parts[0] != parts[2])
    assert 0 < parts[0][: len(parts[0]) // 2].mean() < 1


def test_groups_stay_whole():
    rows = [row | {"user": f"user {i // 5}"} for i, row in enumerate(make_rows(make_texts(1000)))]
    canaries = hold_out_canaries(rows, n_members=40, n_non_members=40, group_by="user", seed=0)[1]

    is_chosen = subset_of(canaries, 0.25, seed=0)

    chosen, every = (
        Counter(name for name, is_in in zip(canaries.groups, mask, strict=True) if is_in)
        for mask in (is_chosen, np.ones(len(canaries), dtype=bool))
    )
    assert all(chosen[name] == every[name] for name in chosen)
    assert len(chosen) == 20


def test_pairs_stay_whole_and_tiers_and_families_keep_their_share():
    texts = make_texts(3000, n_words=40)
    canaries = insert_canaries(
        texts, n_canaries=160, design="pairs", repetitions=(1, 4), max_fraction=0.5, seed=0
    )[1]

    is_chosen = subset_of(canaries, 0.5, seed=0)

    assert len(canaries.select(np.flatnonzero(is_chosen).tolist()).pair_indices) == is_chosen.sum() / 2
    kinds = [(detail.family, detail.n_repeats) for detail in canaries.details]
    every, chosen = Counter(kinds), Counter(k for k, is_in in zip(kinds, is_chosen, strict=True) if is_in)
    assert {kind: 2 * n for kind, n in chosen.items()} == every


def test_where_coins_were_thrown_the_part_is_drawn_without_a_look_at_membership():
    canaries = draw(n_canaries=300)
    flipped = type(canaries)(
        records=canaries.records,
        is_member=~canaries.is_member,
        record_ids=canaries.record_ids,
        provenance=canaries.provenance,
    )

    np.testing.assert_array_equal(subset_of(canaries, 0.3, seed=0), subset_of(flipped, 0.3, seed=0))


def test_the_subset_that_can_be_afforded_is_taken_where_it_can_judge():
    subset = smallest_subset(everything(), affordable_share=0.25, can_judge=lambda subset: True)

    assert (subset.n_members, subset.n_non_members, subset.share) == (25, 50, 0.25)
    assert len(subset.encoded.rows) == subset.is_chosen.sum() == 75


def test_a_subset_too_small_to_judge_grows_until_it_can():
    subset = smallest_subset(everything(), affordable_share=0.1, can_judge=lambda s: s.n_members >= 37)

    assert subset.n_members == 37


def test_where_no_subset_can_judge_all_are_taken():
    subset = smallest_subset(everything(), affordable_share=-1.0, can_judge=lambda subset: False)

    assert subset.share == 1.0


def test_a_subset_of_too_few_for_any_figure_says_so_when_it_is_counted():
    with pytest.raises(TooFewCanariesError):
        everything().of_share(0.01).n_members  # noqa: B018


def test_a_subset_knows_what_it_costs_in_certainty():
    whole = everything()

    assert whole.describe().startswith("Audits score all 100 members and 200 non-members")
    assert "25 members and 50 non-members from here on" in whole.of_share(0.25).describe()
