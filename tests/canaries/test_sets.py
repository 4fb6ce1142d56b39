import copy
import dataclasses
import pickle

import datasets
import numpy as np
import pytest

from ezmia_callbacks.canaries import CanaryDetails, CanarySet, Provenance, hold_out_canaries
from ezmia_callbacks.canaries.sets import by_group
from ezmia_callbacks.errors import (
    ConfigurationError,
    EmptyRecordError,
    OverlappingCanariesError,
    TooFewCanariesError,
)
from ezmia_callbacks.functional import delong_interval

MEMBERS = [f"member text {i}" for i in range(12)]
NON_MEMBERS = [f"other text {i}" for i in range(15)]
USER_LISTS = Provenance("user_lists", False, None, None, 0, None)


def test_lists_become_members_then_non_members() -> None:
    canaries = CanarySet.from_lists(MEMBERS, NON_MEMBERS)

    assert canaries.records == (*MEMBERS, *NON_MEMBERS)
    assert canaries.is_member.tolist() == [True] * 12 + [False] * 15
    assert (canaries.n_members, canaries.n_non_members, len(canaries)) == (12, 15, 27)
    assert canaries.record_ids[:2] == ("member-0", "member-1")
    assert canaries.record_ids[-1] == "non-member-14"
    assert canaries.provenance == USER_LISTS


def test_datasets_are_accepted_as_sides() -> None:
    members = datasets.Dataset.from_dict({"text": MEMBERS, "id": list(range(12))})

    canaries = CanarySet.from_lists(members, (text for text in NON_MEMBERS))

    assert canaries.records[0] == {"text": "member text 0"}
    assert canaries.n_non_members == 15


def test_trainer_datasets_are_recorded_as_not_randomized() -> None:
    canaries = CanarySet.from_lists(MEMBERS, NON_MEMBERS, method="trainer_datasets")

    assert canaries.provenance == dataclasses.replace(USER_LISTS, method="trainer_datasets")


def test_repeated_records_of_a_side_are_dropped_and_counted() -> None:
    members = ["MEMBER  text 0", *MEMBERS]

    canaries = CanarySet.from_lists(members, [*NON_MEMBERS, NON_MEMBERS[3]])

    assert (canaries.n_members, canaries.n_non_members) == (12, 15)
    assert canaries.records[0] == "MEMBER  text 0"
    assert canaries.record_ids[:2] == ("member-0", "member-2")
    assert canaries.provenance.n_duplicates_removed == 2


def test_ten_copies_of_one_record_are_too_few() -> None:
    with pytest.raises(
        TooFewCanariesError,
        match=r"1 members and 15 non-members \(9 repeated records not counted\); at least 10",
    ):
        CanarySet.from_lists(["same"] * 10, NON_MEMBERS)


def test_own_record_ids_follow_their_records() -> None:
    ids = [f"id-{i}" for i in range(28)]

    canaries = CanarySet.from_lists([MEMBERS[0], *MEMBERS], NON_MEMBERS, record_ids=ids)

    assert canaries.record_ids == ("id-0", *ids[2:])


@pytest.mark.parametrize(
    ("record_ids", "message"),
    [
        (["a"], "1 record_ids for 12 members and 15 non-members"),
        (["a"] * 27, "26 repeated record_ids among 27"),
    ],
)
def test_record_ids_must_be_one_and_unique_per_record(record_ids: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CanarySet.from_lists(MEMBERS, NON_MEMBERS, record_ids=record_ids)


def test_overlap_is_refused_with_ids_and_without_text() -> None:
    non_members = [*NON_MEMBERS, *(text.upper() for text in MEMBERS[:4])]

    with pytest.raises(OverlappingCanariesError, match="Got 4 records") as error:
        CanarySet.from_lists(MEMBERS, non_members)

    assert "'member-2' = 'non-member-17')" in str(error.value)
    assert "member-3" not in str(error.value)
    assert "text" not in str(error.value).casefold()


def test_empty_records_are_refused_with_index_and_id() -> None:
    with pytest.raises(EmptyRecordError, match=r"Got 2 canary records .* at index 12 \('non-member-0'\)"):
        CanarySet.from_lists(MEMBERS, [" ", *NON_MEMBERS, ""])


@pytest.mark.parametrize(("n_members", "n_non_members"), [(9, 15), (12, 9), (0, 0)])
def test_too_few_records_are_refused_with_numbers(n_members: int, n_non_members: int) -> None:
    message = f"Got {n_members} members and {n_non_members} non-members .*at least 10"

    with pytest.raises(TooFewCanariesError, match=message):
        CanarySet.from_lists(MEMBERS[:n_members], NON_MEMBERS[:n_non_members])


@pytest.mark.parametrize("side", ["one text", {"text": "one row"}])
def test_a_single_record_is_not_a_side(side: object) -> None:
    with pytest.raises(ConfigurationError, match="as `members`, which needs a collection"):
        CanarySet.from_lists(side, NON_MEMBERS)  # type: ignore[arg-type]  # the wrong use under test


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_member": np.ones(27)}, r"dtype float64 and shape \(27,\) for 27 records"),
        ({"is_member": np.ones(5, dtype=bool)}, r"shape \(5,\) for 27 records"),
        ({"record_ids": ("a",)}, "1 record_ids for 27 records"),
    ],
)
def test_columns_must_fit_the_records(changes: dict[str, object], message: str) -> None:
    canaries = CanarySet.from_lists(MEMBERS, NON_MEMBERS)

    with pytest.raises(ConfigurationError, match=message):
        dataclasses.replace(canaries, **changes)  # type: ignore[arg-type]  # wrong use


def test_membership_is_a_read_only_copy() -> None:
    is_member = np.arange(27) < 12
    ids = tuple(f"id-{i}" for i in range(27))

    canaries = CanarySet((*MEMBERS, *NON_MEMBERS), is_member, ids, USER_LISTS)
    is_member[:] = False

    assert canaries.n_members == 12
    with pytest.raises(ValueError, match="read-only"):
        canaries.is_member[0] = False


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_are_equal_and_read_only(copied: object) -> None:
    canaries = CanarySet.from_lists(MEMBERS, NON_MEMBERS)

    actual = copied(canaries)  # type: ignore[operator]  # a function, given as a parameter

    assert actual.fingerprint == canaries.fingerprint
    assert actual.record_ids == canaries.record_ids
    assert actual.provenance == canaries.provenance
    assert not actual.is_member.flags.writeable


def test_fingerprint_sees_membership_order_case_and_method() -> None:
    variants = [
        CanarySet.from_lists(MEMBERS, NON_MEMBERS),
        CanarySet.from_lists(NON_MEMBERS, MEMBERS),
        CanarySet.from_lists(MEMBERS[::-1], NON_MEMBERS),
        CanarySet.from_lists([text.upper() for text in MEMBERS], NON_MEMBERS),
        CanarySet.from_lists(MEMBERS, NON_MEMBERS, method="trainer_datasets"),
    ]

    fingerprints = [canaries.fingerprint for canaries in variants]

    assert len(set(fingerprints)) == 5


def test_description_of_lists_says_that_no_epsilon_follows() -> None:
    description = CanarySet.from_lists(MEMBERS, NON_MEMBERS).describe()

    assert description.startswith("12 members and 15 non-members, taken from two lists")
    assert "may include distribution shift and no epsilon can be derived." in description


def test_only_the_librarys_own_draw_counts_as_randomized() -> None:
    with pytest.raises(ConfigurationError, match="is_randomized=True with method 'user_lists'"):
        dataclasses.replace(USER_LISTS, is_randomized=True)


def inserted(**changes: object) -> CanarySet:
    """Ten pairs of twins, the first of each trained on."""
    arguments: dict[str, object] = {
        "records": tuple(f"canary {i}" for i in range(20)),
        "is_member": np.arange(20) % 2 == 0,
        "record_ids": tuple(f"id-{i}" for i in range(20)),
        "provenance": Provenance("inserted_pairs", True, 0, 20, 0, None),
        "details": tuple(
            CanaryDetails("bigram", 1, pair_id=f"pair-{i // 2}", row_indices=(i,) * (i % 2 == 0))
            for i in range(20)
        ),
    }
    return CanarySet(**(arguments | changes))  # type: ignore[arg-type]  # built by name


def test_twins_are_found_by_their_pair() -> None:
    assert inserted().pair_indices.tolist() == [[i, i + 1] for i in range(0, 20, 2)]
    assert CanarySet.from_lists(MEMBERS, NON_MEMBERS).pair_indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"details": None}, "'inserted_pairs' without details"),
        ({"details": (CanaryDetails("bigram", 1),) * 19}, "19 details for 20 records"),
        ({"details": (CanaryDetails("bigram", 1, pair_id="one"),) * 20}, "one member and one non-member"),
        ({"is_member": np.arange(20) < 10}, "row_indices for a non-member"),
        (
            {
                "is_member": np.arange(20) < 10,
                "details": tuple(CanaryDetails("bigram", 1, pair_id=f"pair-{i // 2}") for i in range(20)),
            },
            "one member and one non-member",
        ),
    ],
)
def test_details_that_contradict_the_records_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        inserted(**changes)


def test_details_change_the_fingerprint() -> None:
    canaries = CanarySet.from_lists(MEMBERS, NON_MEMBERS)
    details = tuple(CanaryDetails("samples", 1) for _ in range(27))
    other = tuple(CanaryDetails("samples", 4) for _ in range(27))

    fingerprints = {
        dataclasses.replace(canaries, details=changed).fingerprint for changed in (None, details, other)
    }

    assert len(fingerprints) == 3


def test_only_coins_of_this_library_count_as_such() -> None:
    assert inserted().provenance.has_independent_coins
    assert not USER_LISTS.has_independent_coins
    with pytest.raises(ConfigurationError, match="coin flips by this library"):
        Provenance("inserted_coins", False, 0, 20, 0, None)


def test_records_of_the_user_are_one_tier() -> None:
    canaries = CanarySet.from_lists(MEMBERS, NON_MEMBERS)

    assert canaries.tiers == (1,)
    assert canaries.of_tier(1) is canaries
    with pytest.raises(ConfigurationError, match=r"n_repeats=4; the tiers are \(1,\)"):
        canaries.of_tier(4)


def test_no_copy_is_no_canary() -> None:
    with pytest.raises(ConfigurationError, match="Got n_repeats=0"):
        CanaryDetails("bigram", 0)


def grouped(**changes: object) -> CanarySet:
    """Forty records of twenty people, half of whom are trained on."""
    arguments: dict[str, object] = {
        "records": tuple(f"record {i}" for i in range(40)),
        "is_member": np.arange(40) % 20 < 10,
        "record_ids": tuple(f"id-{i}" for i in range(40)),
        "provenance": USER_LISTS,
        "groups": [f"person {i % 20}" for i in range(40)],
    }
    return CanarySet(**(arguments | changes))  # type: ignore[arg-type]  # built by name


def test_records_are_selected_by_their_ids_in_the_order_asked_for() -> None:
    canaries = CanarySet.from_lists(MEMBERS, NON_MEMBERS)
    wanted = [*canaries.record_ids[:2:-1], canaries.record_ids[0]]

    actual = canaries.select(canaries.indices_of(wanted))

    assert actual.record_ids == tuple(wanted)
    assert actual.records == (*canaries.records[:2:-1], MEMBERS[0])
    assert canaries.indices_of(canaries.record_ids) == list(range(len(canaries)))


def test_an_id_of_another_set_has_no_index() -> None:
    canaries = CanarySet.from_lists(MEMBERS, NON_MEMBERS)

    with pytest.raises(
        ConfigurationError, match="Got 2 record_ids that are not in this set, such as 'row-1'"
    ):
        canaries.indices_of(["member-0", "row-1", "row-2"])


def test_selected_records_keep_their_groups() -> None:
    canaries = grouped()

    actual = canaries.select(list(range(20, 40)), records=[f"other {i}" for i in range(20)])

    assert actual.groups == tuple(f"person {i}" for i in range(20))
    assert canaries.of_tier(1).groups == canaries.groups
    assert pickle.loads(pickle.dumps(canaries)).groups == canaries.groups


def test_groups_change_the_fingerprint() -> None:
    changed = [grouped(), grouped(groups=None), grouped(groups=[f"person {i}" for i in range(40)])]

    assert len({canaries.fingerprint for canaries in changed}) == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"is_member": np.arange(40) < 20}, OverlappingCanariesError, "Got 20 groups with records on both"),
        ({"groups": ["one"]}, ConfigurationError, "1 groups for 40 records"),
        (
            {"groups": [f"person {i % 20 // 2}" for i in range(40)]},
            TooFewCanariesError,
            "Got 5 member groups and 5 non-member groups .*at least 10",
        ),
        (
            {"details": tuple(CanaryDetails("bigram", 1 + i % 2) for i in range(40))},
            ConfigurationError,
            "tiers of copies instead of groups: leave out `groups`",
        ),
    ],
)
def test_groups_that_contradict_the_records_are_refused(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        grouped(**changes)

    assert "person" not in str(raised.value)


def test_the_score_of_a_group_is_the_mean_of_its_records_at_each_audit() -> None:
    scores = np.arange(8.0).reshape(2, 4)
    is_member = np.array([True, False, True, False])

    actual = by_group(scores, ["b", "a", "b", "c"], is_member)

    assert actual.scores.tolist() == [[1.0, 1.0, 3.0], [5.0, 5.0, 7.0]]
    assert actual.group_ids == ("b", "a", "c")
    assert actual.is_member.tolist() == [True, False, False]


def test_groups_on_both_sides_and_other_lengths_have_no_group_score() -> None:
    with pytest.raises(OverlappingCanariesError, match="Got 1 groups"):
        by_group([1.0, 2.0], ["a", "a"], np.array([True, False]))
    with pytest.raises(ConfigurationError, match=r"scores of shape \(3,\), 2 groups"):
        by_group([1.0, 2.0, 3.0], ["a", "b"], np.array([True, False]))


def test_intervals_of_group_scores_hold_where_those_of_records_do_not() -> None:
    """A person's eight records share half of what makes their scores differ; nothing leaks."""
    rng = np.random.default_rng(0)
    groups = [str(i) for i in range(40) for _ in range(8)]
    is_member = np.arange(320) < 160
    n_covered = {"record": 0, "group": 0}

    for _ in range(200):
        scores = np.repeat(rng.normal(size=40), 8) + rng.normal(size=320)
        n_covered["record"] += 0.5 in delong_interval(scores, is_member)
        means = by_group(scores, groups, is_member)
        n_covered["group"] += 0.5 in delong_interval(means.scores, means.is_member)

    assert n_covered["group"] >= 0.9 * 200
    assert n_covered["record"] < 0.75 * 200


def test_rows_that_records_were_taken_from_are_kept_with_all_columns():
    rows = [{"text": f"text {i}", "image": i} for i in range(40)]

    _, canaries = hold_out_canaries(rows, n_members=10, n_non_members=12, seed=0)

    for chosen in (canaries, canaries.select(range(22)), pickle.loads(pickle.dumps(canaries))):
        assert [row["text"] for row in chosen.rows] == [record["text"] for record in canaries.records]
        assert all("image" in row for row in chosen.rows)
    assert all("image" not in record for record in canaries.records)


def test_a_pickled_set_does_not_carry_the_whole_dataset():
    rows = [{"text": f"text {i}", "image": "x" * 1000} for i in range(400)]

    _, canaries = hold_out_canaries(rows, n_members=10, n_non_members=10, seed=0)

    assert len(pickle.dumps(canaries)) < 100_000


def test_as_many_rows_as_records_are_needed():
    texts = [f"text {i}" for i in range(20)]
    canaries = CanarySet.from_lists(texts[:10], texts[10:])

    with pytest.raises(ConfigurationError, match="19 rows for 20 records"):
        dataclasses.replace(canaries, rows=texts[:19])
