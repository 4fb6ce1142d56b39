import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ezmia_callbacks.canaries import CanarySet, Record, hold_out_canaries
from ezmia_callbacks.canaries.records import exact_key, fingerprint, record_key
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.sizes import audit_reach

TEXTS = [f"Patient note number {i}" for i in range(60)]

ROWS: dict[str, list[dict[str, object]]] = {
    "text": [{"text": text} for text in TEXTS],
    "tokenized": [
        {"input_ids": [1, i, 0], "labels": [-100, i, -100], "attention_mask": [1, 1, 0]} for i in range(60)
    ],
    "prompt_completion": [{"prompt": "Note:", "completion": text} for text in TEXTS],
    "preference": [{"prompt": "Note:", "chosen": text, "rejected": "None."} for text in TEXTS],
    "implicit_preference": [{"chosen": f"Note: {text}", "rejected": "Note: none."} for text in TEXTS],
    "messages": [
        {"messages": [{"role": "user", "content": "Note?"}, {"role": "assistant", "content": text}]}
        for text in TEXTS
    ],
}


class MapStyle(Dataset[Record]):
    """The least that PyTorch asks of a dataset: no `__iter__`, no slices."""

    def __init__(self, rows: list[Record]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return self.rows[index]


def tensor_rows() -> MapStyle:
    rows = [{name: torch.tensor(column) for name, column in row.items()} for row in ROWS["tokenized"]]
    return MapStyle(list(rows))


CONTAINERS: dict[str, Callable[[list[dict[str, object]]], object]] = {
    "list": list,
    "tuple": tuple,
    "datasets": datasets.Dataset.from_list,
    "torch": lambda rows: MapStyle(list(rows)),
}


def rows_of(canaries: CanarySet, *, is_member: bool) -> list[int]:
    pairs = zip(canaries.record_ids, canaries.is_member, strict=True)
    return [int(name.removeprefix("row-")) for name, member in pairs if member == is_member]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ROWS)
def test_non_members_and_only_they_leave(container: str, kind: str) -> None:
    rows = ROWS[kind]
    dataset = CONTAINERS[container](rows)

    kept, canaries = hold_out_canaries(dataset, n_members=10, n_non_members=20)  # type: ignore[call-overload]  # any container

    left = set(rows_of(canaries, is_member=False))
    assert [kept[i] for i in range(len(kept))] == [r for i, r in enumerate(rows) if i not in left]
    assert (canaries.n_members, canaries.n_non_members, len(kept)) == (10, 20, 40)
    assert type(kept) is (Subset if container == "torch" else type(dataset))
    names = [int(name.removeprefix("row-")) for name in canaries.record_ids]
    assert canaries.records == tuple(rows[i] for i in names)
    assert names == sorted(names)


def test_strings_stay_strings() -> None:
    kept, canaries = hold_out_canaries(TEXTS, n_members=10, n_non_members=10)

    assert set(canaries.records) | set(kept) == set(TEXTS)
    assert len(kept) == 50


def test_tensors_become_lists_in_canaries_and_stay_in_training() -> None:
    kept, canaries = hold_out_canaries(tensor_rows(), n_members=10, n_non_members=10)

    first = int(canaries.record_ids[0].removeprefix("row-"))
    assert canaries.records[0] == ROWS["tokenized"][first]
    assert isinstance(kept[0]["input_ids"], torch.Tensor)  # type: ignore[index]  # rows are mappings


def test_other_columns_stay_in_training_and_out_of_canaries() -> None:
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "age": list(range(60))})

    kept, canaries = hold_out_canaries(dataset, n_members=10, n_non_members=10)

    assert kept.column_names == ["text", "age"]
    assert {tuple(record) for record in canaries.records} == {("text",)}


def test_output_format_of_a_dataset_survives() -> None:
    dataset = datasets.Dataset.from_list(ROWS["tokenized"]).with_format("torch")

    kept, canaries = hold_out_canaries(dataset, n_members=10, n_non_members=10)

    assert isinstance(kept[0]["input_ids"], torch.Tensor)
    assert isinstance(canaries.records[0]["input_ids"], list)


def test_rows_that_are_tokenized_when_read_give_tokenized_canaries() -> None:
    dataset = datasets.Dataset.from_dict({"body": TEXTS})
    dataset.set_transform(lambda rows: {"input_ids": [[ord(c) for c in b] for b in rows["body"]]})

    kept, canaries = hold_out_canaries(dataset, n_members=10, n_non_members=10)

    first = int(canaries.record_ids[0].removeprefix("row-"))
    assert canaries.records[0] == {"input_ids": [ord(c) for c in TEXTS[first]]}
    assert list(kept[0]) == ["input_ids"]


def test_data_loader_iterates_the_remaining_rows() -> None:
    kept, _ = hold_out_canaries(tensor_rows(), n_members=10, n_non_members=20)

    batches = list(DataLoader(kept, batch_size=8))  # type: ignore[arg-type]  # a Subset

    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(8, 3)] * 5


def test_same_seed_gives_the_same_split_for_every_container() -> None:
    splits = [
        hold_out_canaries(make(ROWS["text"]), n_members=10, n_non_members=20, seed=7)[1]  # type: ignore[call-overload]  # any container
        for make in CONTAINERS.values()
    ]

    assert len({canaries.fingerprint for canaries in splits}) == 1
    assert len({canaries.provenance for canaries in splits}) == 1


def test_another_seed_gives_another_split() -> None:
    fingerprints = {
        hold_out_canaries(TEXTS, n_members=10, n_non_members=20, seed=seed)[1].fingerprint
        for seed in range(5)
    }

    assert len(fingerprints) == 5


def test_every_row_is_drawn_and_made_a_member_equally_often() -> None:
    n_draws = 400
    n_drawn, n_member = np.zeros(30), np.zeros(30)

    for seed in range(n_draws):
        _, canaries = hold_out_canaries(TEXTS[:30], n_members=10, n_non_members=10, seed=seed)
        n_drawn[rows_of(canaries, is_member=True) + rows_of(canaries, is_member=False)] += 1
        n_member[rows_of(canaries, is_member=True)] += 1

    # Binomial: five standard deviations around 2/3 and 1/3, both sd = sqrt(2/9 / n_draws).
    tolerance = 5 * np.sqrt(2 / 9 / n_draws)
    assert np.abs(n_drawn / n_draws - 2 / 3).max() < tolerance
    assert np.abs(n_member / n_draws - 1 / 3).max() < tolerance


def test_provenance_tells_how_the_split_was_drawn() -> None:
    _, canaries = hold_out_canaries([*TEXTS, TEXTS[0]], n_members=10, n_non_members=20, seed=3)

    source = canaries.provenance
    assert (source.method, source.is_randomized, source.seed) == ("hold_out", True, 3)
    assert (source.n_pool, source.n_duplicates_removed) == (59, 2)
    assert "drawn at random (seed 3) from 59 records after 2 repeated" in canaries.describe()


def test_repeated_and_empty_records_never_become_canaries_and_stay() -> None:
    repeated = ["Twice told", "twice  TOLD ", "Thrice", "thrice", "\uff34hrice"]
    dataset = [*repeated, *TEXTS[:20], "", "  "]

    kept, canaries = hold_out_canaries(dataset, n_members=10, n_non_members=10)

    assert set(canaries.records) == set(TEXTS[:20])
    assert kept[:5] == repeated
    assert kept[-2:] == ["", "  "]
    assert canaries.provenance.n_duplicates_removed == 5


def test_pairs_with_the_same_prompt_and_chosen_side_are_repeats() -> None:
    pairs: list[dict[str, object]] = [{"prompt": "Note:", "chosen": t, "rejected": "None."} for t in TEXTS]
    repeats = [{"prompt": "Note:", "chosen": t, "rejected": "Nothing."} for t in TEXTS[:30]]

    kept, canaries = hold_out_canaries([*pairs, *repeats], n_members=10, n_non_members=20)

    assert set(rows_of(canaries, is_member=True) + rows_of(canaries, is_member=False)) == set(range(30, 60))
    assert len(kept) == 70


def test_too_small_a_pool_is_refused_with_numbers() -> None:
    dataset = [*TEXTS[:19], "Twice", "twice", ""]

    with pytest.raises(
        TooFewCanariesError,
        match=r"20 in all, but only 19 of 22 rows .* \(2 repeat another row, 1 are empty\)",
    ):
        hold_out_canaries(dataset, n_members=10, n_non_members=10)


@pytest.mark.parametrize(("n_members", "n_non_members"), [(9, 20), (20, 9), (0, 0), (-1, 20)])
def test_fewer_than_ten_of_a_kind_are_refused(n_members: int, n_non_members: int) -> None:
    message = f"{n_members} members and {n_non_members} non-members; at least 10 of each"

    with pytest.raises(TooFewCanariesError, match=message):
        hold_out_canaries(TEXTS, n_members=n_members, n_non_members=n_non_members)


@pytest.mark.parametrize("seed", [-1, None, 0.5])
def test_a_seed_that_cannot_be_drawn_again_is_refused(seed: object) -> None:
    with pytest.raises(ConfigurationError, match="a non-negative integer is needed"):
        hold_out_canaries(TEXTS, n_members=10, n_non_members=10, seed=seed)  # type: ignore[call-overload]  # wrong use


class Streamed(IterableDataset[str]):
    def __iter__(self):  # type: ignore[no-untyped-def]  # never called
        return iter(TEXTS)

    def __len__(self) -> int:
        return len(TEXTS)


@pytest.mark.parametrize(
    "stream",
    [
        Streamed(),
        datasets.Dataset.from_list(ROWS["text"]).to_iterable_dataset(),
        (text for text in TEXTS),
    ],
    ids=["torch", "datasets", "generator"],
)
def test_streams_are_refused_with_the_way_out(stream: object) -> None:
    with pytest.raises(ConfigurationError, match="materialize the part"):
        hold_out_canaries(stream, n_members=10, n_non_members=10)  # type: ignore[call-overload]  # wrong use


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS["text"])),
            r"DatasetDict; one training set.*dataset\['train'\]",
        ),
        ("one long text", "Got one str; a collection of records is needed"),
        (datasets.Dataset.from_dict({"body": TEXTS, "id": TEXTS}), "the columns 'body', 'id' as a record"),
        ([(1, 2)] * 60, "Got a tuple as a record"),
    ],
    ids=["splits", "string", "unknown columns", "tuples"],
)
def test_what_is_no_training_set_is_refused(dataset: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        hold_out_canaries(dataset, n_members=10, n_non_members=10)  # type: ignore[call-overload]  # wrong use


def test_global_random_states_are_untouched() -> None:
    dataset = tensor_rows()
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()

    hold_out_canaries(dataset, n_members=10, n_non_members=10)

    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    actual = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(actual, numpy_state, strict=True))


def test_the_given_list_is_not_changed() -> None:
    texts = list(TEXTS)

    hold_out_canaries(texts, n_members=10, n_non_members=10)

    assert texts == TEXTS


def test_canaries_pickle() -> None:
    _, canaries = hold_out_canaries(tensor_rows(), n_members=10, n_non_members=10)

    actual = pickle.loads(pickle.dumps(canaries))

    assert actual.records == canaries.records
    assert actual.fingerprint == canaries.fingerprint
    assert not actual.is_member.flags.writeable


@settings(max_examples=50, deadline=None)
@given(
    extra=st.lists(st.text(alphabet="aA\u00df \uff21", max_size=3), max_size=30),
    seed=st.integers(0, 2**64),
    order=st.randoms(use_true_random=False),
)
def test_members_stay_and_no_copy_of_a_non_member_does(
    extra: list[str], seed: int, order: random.Random
) -> None:
    dataset = [*TEXTS[:22], *extra]
    order.shuffle(dataset)

    kept, canaries = hold_out_canaries(dataset, n_members=10, n_non_members=11, seed=seed)

    kept_keys = {record_key(record) for record in kept}
    keys = np.array([record_key(record) for record in canaries.records])
    assert set(keys[canaries.is_member]) <= kept_keys
    assert set(keys[~canaries.is_member]).isdisjoint(kept_keys)
    assert len(kept) == len(dataset) - 11


def test_coins_leave_sizes_to_chance_and_keep_members_in_training() -> None:
    texts = [f"note {i}" for i in range(300)]
    sizes = []

    for seed in range(40):
        kept, canaries = hold_out_canaries(texts, n_canaries=100, seed=seed)
        sizes.append(canaries.n_members)
        keys = {record_key(text) for text in kept}
        is_kept = [record_key(record) in keys for record in canaries.records]
        assert is_kept == canaries.is_member.tolist()
        assert len(kept) == 300 - canaries.n_non_members

    # 100 fair coins: mean 50, variance 25; a split of fixed sizes would have variance 0.
    assert abs(np.mean(sizes) - 50) < 5 * 5 / np.sqrt(40)
    assert 8 < np.var(sizes, ddof=1) < 55


def test_only_coins_carry_epsilon() -> None:
    _, coins = hold_out_canaries(TEXTS, n_canaries=50, seed=2)
    _, fixed = hold_out_canaries(TEXTS, n_members=25, n_non_members=25, seed=2)

    assert (coins.provenance.method, coins.provenance.is_randomized) == ("hold_out_coins", True)
    assert coins.provenance.has_independent_coins
    assert not fixed.provenance.has_independent_coins
    assert "an independent fair coin flip for each record (seed 2)" in coins.describe()


def test_a_coin_for_fewer_than_fifty_records_is_refused() -> None:
    with pytest.raises(TooFewCanariesError, match="Asked for coin flips for 49 rows; at least 50"):
        hold_out_canaries(TEXTS, n_canaries=49)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_members": 10},
        {"n_non_members": 10},
        {"n_canaries": 50, "n_members": 10},
        {"n_canaries": 50, "n_non_members": 10},
        {"n_canaries": 50, "n_members": 10, "n_non_members": 10},
    ],
)
def test_sizes_that_are_half_given_or_contradict_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="or n_canaries alone for a coin per record"):
        hold_out_canaries(TEXTS, **sizes)


def sizes_of(canaries: CanarySet) -> tuple[int, int]:
    return canaries.n_members, canaries.n_non_members


@pytest.mark.parametrize(
    ("n_rows", "sizes"), [(100, (20, 10)), (1_500, (300, 150)), (4_000, (500, 400)), (12_000, (500, 1_000))]
)
def test_without_sizes_at_most_a_tenth_of_the_rows_leaves_training(
    n_rows: int, sizes: tuple[int, int]
) -> None:
    texts = [f"note {i}" for i in range(n_rows)]

    kept, canaries = hold_out_canaries(texts)

    assert sizes_of(canaries) == sizes
    assert len(kept) == n_rows - sizes[1] >= 0.9 * n_rows
    assert canaries.provenance.method == "hold_out"
    explicit = hold_out_canaries(texts, n_members=sizes[0], n_non_members=sizes[1])[1]
    assert canaries.fingerprint == explicit.fingerprint


def test_without_sizes_as_many_are_drawn_as_repeats_leave() -> None:
    dataset = [f"note {i}" for i in range(150)] + ["the same"] * 1_850

    kept, canaries = hold_out_canaries(dataset)

    assert sizes_of(canaries) == (75, 75)
    assert len(kept) == 1_925


def test_without_sizes_groups_are_counted_and_not_their_rows() -> None:
    rows = [{"text": f"Note {n} of {i}", "user": i} for i in range(200) for n in range(3)]

    kept, canaries = hold_out_canaries(rows, group_by="user")

    assert len(set(canaries.groups or ())) == 60
    assert sizes_of(canaries) == (120, 60)
    assert len(kept) == 540


@pytest.mark.parametrize(("n_rows", "level"), [(110, "WARNING"), (2_000, "INFO")])
def test_what_an_audit_finds_with_the_chosen_sizes_is_said(
    n_rows: int, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _, canaries = hold_out_canaries([f"note {i}" for i in range(n_rows)])

    (record,) = caplog.records
    assert record.levelname == level
    message = record.getMessage()
    assert message.startswith(f"Chose canaries among {n_rows} rows; {n_rows // 10} of {n_rows} rows (10 %)")
    assert audit_reach(*sizes_of(canaries)).describe() in message
    assert bool(PROPOSAL.search(message)) == (level == "WARNING")


def test_sizes_that_were_asked_for_are_not_commented_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        hold_out_canaries(TEXTS, n_members=10, n_non_members=10)

    assert caplog.records == []


PROPOSAL = re.compile(r"\bn_(?:members|non_members|canaries)=\d+(?:, n_non_members=\d+)?(?= can be drawn)")


def proposal_of(message: str) -> dict[str, int]:
    (found,) = PROPOSAL.findall(message)
    return {name: int(n) for name, n in (each.split("=") for each in found.split(", "))}


@pytest.mark.parametrize("n_rows", [20, 48, 60, 99, 500, 3_000])
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_members": 500, "n_non_members": 5_000},
        {"n_members": 5, "n_non_members": 5},
        {"n_canaries": 9_000},
        {"n_canaries": 10},
    ],
)
@pytest.mark.parametrize("n_repeats", [0, 300])
def test_sizes_that_a_refusal_proposes_can_be_drawn(
    sizes: dict[str, int], n_rows: int, n_repeats: int
) -> None:
    dataset = [*(f"note {i}" for i in range(n_rows)), *["the same"] * n_repeats]

    with pytest.raises(TooFewCanariesError) as caught:
        hold_out_canaries(dataset, **sizes)
    proposed = proposal_of(str(caught.value))
    _, canaries = hold_out_canaries(dataset, **proposed)

    assert ("n_canaries" in proposed) == ("n_canaries" in sizes and n_rows >= 50)
    assert min(sizes_of(canaries)) >= 10


@pytest.mark.parametrize(("n_rows", "n_repeats"), [(20, 0), (48, 0), (99, 0), (25, 70)])
def test_sizes_that_cannot_be_chosen_are_proposed(n_rows: int, n_repeats: int) -> None:
    dataset = [*(f"note {i}" for i in range(n_rows)), *["the same"] * n_repeats]

    with pytest.raises(
        TooFewCanariesError, match="too few for an audit that takes at most a tenth"
    ) as caught:
        hold_out_canaries(dataset)
    _, canaries = hold_out_canaries(dataset, **proposal_of(str(caught.value)))

    assert min(sizes_of(canaries)) >= 10


def test_where_no_larger_split_can_be_drawn_other_records_are_proposed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hold_out_canaries([*TEXTS[:20], *["the same"] * 300])

    (record,) = caplog.records
    assert "insert_canaries" in record.getMessage()
    assert not PROPOSAL.search(record.getMessage())


def test_groups_that_a_refusal_proposes_can_be_drawn() -> None:
    with pytest.raises(TooFewCanariesError, match="Got 60 groups: too few") as caught:
        hold_out_canaries(NOTES, group_by="user_id")

    _, canaries = hold_out_canaries(NOTES, group_by="user_id", **proposal_of(str(caught.value)))

    assert len(set(canaries.groups or ())) > 50


def test_where_no_split_can_be_drawn_the_refusal_says_what_else_can_be_done() -> None:
    with pytest.raises(TooFewCanariesError, match=r"fewer than 20 rows: add different .*insert_canaries"):
        hold_out_canaries(TEXTS[:19])


# Person i has i % 3 + 1 notes; the rows of a person do not stand together.
PEOPLE = [f"person-{i}@example.org" for k in range(3) for i in range(60) if i % 3 >= k]
NOTES: list[dict[str, object]] = [
    {"text": f"Note {n} of {name}", "user_id": name} for n, name in enumerate(PEOPLE)
]


def people_of(canaries: CanarySet, *, is_member: bool) -> set[str]:
    return {PEOPLE[i] for i in rows_of(canaries, is_member=is_member)}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "group_by", ["user_id", lambda row: row["text"].split()[-1]], ids=["column", "function"]
)
def test_whole_groups_go_to_one_side(container: str, group_by: object) -> None:
    dataset = CONTAINERS[container](NOTES)

    kept, canaries = hold_out_canaries(dataset, n_members=10, n_non_members=20, group_by=group_by)  # type: ignore[call-overload]  # any container

    members, others = people_of(canaries, is_member=True), people_of(canaries, is_member=False)
    assert (len(members), len(others), len(members & others)) == (10, 20, 0)
    assert [kept[i] for i in range(len(kept))] == [row for row in NOTES if row["user_id"] not in others]
    drawn = [i for i, name in enumerate(PEOPLE) if name in members | others]
    assert canaries.record_ids == tuple(f"row-{i}" for i in drawn)
    assert canaries.groups == tuple(f"group-{PEOPLE.index(PEOPLE[i])}" for i in drawn)
    assert canaries.provenance.n_pool == 60
    assert f"10 member groups ({canaries.n_members} records)" in canaries.describe()
    assert "drawn at random (seed 0) from 60 groups, so the" in canaries.describe()


def test_all_rows_of_a_non_member_group_leave_even_those_that_are_no_canaries() -> None:
    empty = [{"text": " ", "user_id": name} for name in dict.fromkeys(PEOPLE)]
    repeated = [{"text": "The same.", "user_id": name} for name in dict.fromkeys(PEOPLE)]

    kept, canaries = hold_out_canaries(
        [*NOTES, *empty, *repeated], n_members=10, n_non_members=20, group_by="user_id"
    )

    others = people_of(canaries, is_member=False)
    assert others.isdisjoint({row["user_id"] for row in kept})
    assert len(kept) == sum(name not in others for name in PEOPLE) + 2 * 40
    assert all(record["text"] not in (" ", "The same.") for record in canaries.records)  # type: ignore[index]  # rows are mappings


def test_sizes_and_coins_count_groups() -> None:
    _, canaries = hold_out_canaries(NOTES, n_canaries=55, group_by="user_id", seed=4)

    n_groups = [len(people_of(canaries, is_member=side)) for side in (True, False)]
    assert sum(n_groups) == 55
    assert min(n_groups) >= 10
    assert "an independent fair coin flip for each group (seed 4) drawn from 60 groups" in canaries.describe()
    with pytest.raises(TooFewCanariesError, match="61 in all, but only 60 of 60 groups can be drawn"):
        hold_out_canaries(NOTES, n_members=31, n_non_members=30, group_by="user_id")


def test_groups_of_one_record_give_the_split_without_groups() -> None:
    kept, canaries = hold_out_canaries(NOTES, n_members=10, n_non_members=20, seed=5)

    alone, grouped = hold_out_canaries(
        NOTES, n_members=10, n_non_members=20, seed=5, group_by=lambda row: row["text"]
    )

    assert alone == kept
    assert grouped.record_ids == canaries.record_ids
    assert grouped.is_member.tolist() == canaries.is_member.tolist()
    assert canaries.groups is None


def test_a_split_without_groups_is_the_one_of_earlier_versions() -> None:
    _, canaries = hold_out_canaries(TEXTS, n_members=10, n_non_members=20, seed=7)

    # As version 0.1.0.dev0 drew it before there were groups; its fingerprint was of records and membership.
    drawn = zip(canaries.records, canaries.is_member, strict=True)
    assert fingerprint(f"{exact_key(record)}:{int(side)}" for record, side in drawn) == "bb1f93911be4b38d"
    assert canaries.provenance.pool_fingerprint == "44c5182a23f777df"


@pytest.mark.parametrize("make", [np.int64, torch.tensor], ids=["numpy", "torch"])
def test_scalars_of_equal_value_are_one_group(make: Callable[[int], object]) -> None:
    rows = [{"text": f"Note {i}", "user_id": make(i // 3)} for i in range(90)]

    _, canaries = hold_out_canaries(rows, n_members=10, n_non_members=10, group_by="user_id")

    assert len(canaries) == 60
    assert len(set(canaries.groups or ())) == 20


@pytest.mark.parametrize(
    ("rows", "group_by", "message"),
    [
        (NOTES, "user", "columns 'text', 'user_id': name one of them"),
        (datasets.Dataset.from_list(NOTES), "user", "columns 'text', 'user_id'"),
        (TEXTS, "user_id", "a str with no columns: name one of them, or pass a function"),
        ([*NOTES, {"text": "Whose?", "user_id": None}], "user_id", "1 of 121 rows have no group, .* row 120"),
        ([*NOTES, {"text": "Whose?", "user_id": float("nan")}], "user_id", "1 of 121 rows have no group"),
        (NOTES, lambda row: [row["user_id"]], "Got a list as a group"),
        (NOTES, lambda row: torch.tensor([1]), "Got a list as a group"),
    ],
)
def test_rows_without_a_usable_group_are_refused(rows: object, group_by: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        hold_out_canaries(rows, n_members=10, n_non_members=10, group_by=group_by)  # type: ignore[call-overload]  # wrong use


SECRET = "My number is 42"


# Older releases of datasets leave the file open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("group_by", [None, "user"])
def test_columns_that_are_a_record_of_a_file_without_a_header_are_not_shown(
    tmp_path: Path, group_by: str | None
) -> None:
    (tmp_path / "data.csv").write_text("".join(f"{SECRET}{end}\n" for end in range(90)))
    dataset = datasets.Dataset.from_csv(str(tmp_path / "data.csv"), cache_dir=str(tmp_path / "cache"))

    with pytest.raises(ConfigurationError) as caught:
        hold_out_canaries(dataset, n_members=10, n_non_members=10, group_by=group_by)

    assert SECRET not in str(caught.value)


def test_keys_of_what_is_no_dataset_are_not_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        hold_out_canaries({SECRET: 7}, n_members=10, n_non_members=10)  # type: ignore[call-overload]  # wrong use

    assert SECRET not in str(caught.value)
