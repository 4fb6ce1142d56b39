import json
import logging
import pickle
import random
from collections import Counter
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ezmia_callbacks.canaries import (
    CanarySet,
    hold_out_canaries,
    insert_canaries,
    removal_list,
    save_removal_list,
    strip_canaries,
)
from ezmia_callbacks.canaries.records import record_key, record_text
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError

N_ROWS = 400
RNG = np.random.default_rng(0)
TEXTS = [" ".join(f"word{j}" for j in RNG.integers(60, size=40)) for _ in range(N_ROWS)]
VOCABULARY = {*(f"word{j}" for j in range(60)), "Note:"}
# Begin and end of text are 1 and 2; 0 pads.
TOKENS = [[1, *row, 2] for row in RNG.integers(10, 90, size=(N_ROWS, 30)).tolist()]
# Small sets cannot keep to one percent.
ROOM = {"max_fraction": 0.4}

ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "prompt_completion": [{"prompt": "Note:", "completion": f" {text}"} for text in TEXTS],
    "chat_prompt_completion": [
        {
            "prompt": [{"role": "user", "content": "Note?"}],
            "completion": [{"role": "assistant", "content": text}],
        }
        for text in TEXTS
    ],
    "preference": [{"prompt": "Note:", "chosen": f" {text}", "rejected": " None."} for text in TEXTS],
    "implicit_preference": [{"chosen": f"Note: {text}", "rejected": "Note: none."} for text in TEXTS],
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Note?"},
                {"role": "assistant", "content": text},
            ]
        }
        for text in TEXTS
    ],
    "tokenized": [
        {"input_ids": ids, "labels": [-100, -100, -100, *ids[3:]], "attention_mask": [1] * len(ids)}
        for ids in TOKENS
    ],
}


class MapStyle(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "datasets": datasets.Dataset.from_list,
    "torch": lambda rows: MapStyle(list(rows)),
}


def inserted_rows(canaries: CanarySet) -> dict[int, str]:
    """Record id by row."""
    return {
        row: name
        for name, detail in zip(canaries.record_ids, canaries.details, strict=True)
        for row in detail.row_indices
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ROWS)
def test_members_and_only_they_are_in_the_training_set(kind, container):
    rows = ROWS[kind]

    mixed, canaries = insert_canaries(CONTAINERS[container](rows), n_canaries=60, **ROOM)

    mixed_rows = [mixed[i] for i in range(len(mixed))]
    inserted = inserted_rows(canaries)
    assert [row for i, row in enumerate(mixed_rows) if i not in inserted] == rows
    record_of = dict(zip(canaries.record_ids, canaries.records, strict=True))
    assert all(record_key(mixed_rows[i]) == record_key(record_of[name]) for i, name in inserted.items())
    members = {name for name, member in zip(canaries.record_ids, canaries.is_member, strict=True) if member}
    assert set(inserted.values()) == members
    keys = {record_key(row) for row in mixed_rows}
    assert not any(
        record_key(record) in keys
        for record, member in zip(canaries.records, canaries.is_member, strict=True)
        if not member
    )
    assert type(mixed) is (Subset if container == "torch" else type(CONTAINERS[container](rows)))


def test_strings_stay_strings():
    mixed, canaries = insert_canaries(TEXTS, n_canaries=50, **ROOM)

    assert {type(text) for text in mixed} == {str}
    assert {len(record.split()) for record in canaries.records} == {64}


def said(record, kind: str) -> str:
    if kind in ("messages",):
        return record["messages"][-1]["content"]
    value = record[
        {"text": "text", "preference": "chosen", "implicit_preference": "chosen"}.get(kind, "completion")
    ]
    return value if isinstance(value, str) else value[-1]["content"]


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "tokenized"])
def test_the_canary_is_on_the_side_that_is_learned(kind):
    _, canaries = insert_canaries(ROWS[kind], n_canaries=50, prompt="Write it.", **ROOM)

    for record in canaries.records:
        text = said(record, kind)
        assert set(text.split()[-64:]) <= VOCABULARY
        assert len(text.removeprefix("Write it.").split()) == 64
        assert ("Write it." in record_text(record)) == (kind != "text")


def test_the_last_turn_of_a_conversation_is_the_assistants():
    _, canaries = insert_canaries(ROWS["messages"], n_canaries=50, **ROOM)

    assert {tuple(turn["role"] for turn in record["messages"]) for record in canaries.records} == {
        ("user", "assistant")
    }


def test_white_space_around_a_completion_is_kept():
    _, canaries = insert_canaries(ROWS["prompt_completion"], n_canaries=50, **ROOM)

    assert {record["completion"][:5] for record in canaries.records} == {" word"}


def test_a_rejected_side_differs_from_its_chosen_one():
    mixed, canaries = insert_canaries(ROWS["preference"], n_canaries=50, **ROOM)

    rows = [mixed[i] for i in inserted_rows(canaries)]
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert len({row["rejected"] for row in rows}) == len(rows)


def test_tokenized_canaries_have_the_frame_and_the_mask_of_the_rows():
    mixed, canaries = insert_canaries(ROWS["tokenized"], n_canaries=50, length=40, **ROOM)

    # All rows are full with 32 tokens: canaries fill them, too.
    for record in canaries.records:
        assert len(record["input_ids"]) == 32
        assert record["labels"][:3] == [-100] * 3
        assert record["labels"][3:] == record["input_ids"][3:]
        assert record["input_ids"][-1] == 2
        assert 2 not in record["input_ids"][:-1]
    assert len({tuple(record["input_ids"][:3]) for record in canaries.records}) == 1
    assert len(next(iter(DataLoader(mixed, batch_size=4, collate_fn=list)))) == 4


def test_rows_of_different_lengths_take_canaries_of_the_length_asked_for():
    rows = [{"input_ids": ids[: 20 + i % 10]} for i, ids in enumerate(TOKENS)]

    _, canaries = insert_canaries(rows, n_canaries=50, length=40, **ROOM)

    # The begin of text is shared by all rows, the end by none.
    assert {len(record["input_ids"]) for record in canaries.records} == {41}
    assert {record["input_ids"][0] for record in canaries.records} == {1}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_take_padded_canaries(side):
    rows = []
    for i, ids in enumerate(TOKENS):
        n = 20 + i % 13
        parts = [ids[:n], [0] * (40 - n)]
        masks = [[1] * n, [0] * (40 - n)]
        order = 1 if side == "right" else -1
        rows.append(
            {
                "input_ids": [*chain(*parts[::order])],
                "attention_mask": [*chain(*masks[::order])],
                "token_type_ids": [0] * 40,
            }
        )

    mixed, canaries = insert_canaries(rows, n_canaries=50, length=24, **ROOM)

    row = mixed[next(iter(inserted_rows(canaries)))]
    padding = [0] * 15
    assert len(row["input_ids"]) == 40
    assert (row["input_ids"][-15:] if side == "right" else row["input_ids"][:15]) == padding
    assert sum(row["attention_mask"]) == 25
    assert (row["attention_mask"][-15:] if side == "right" else row["attention_mask"][:15]) == padding


def test_tensors_stay_tensors_of_their_type():
    rows = [
        {name: torch.tensor(column, dtype=torch.int32) for name, column in row.items()}
        for row in ROWS["tokenized"]
    ]

    mixed, canaries = insert_canaries(MapStyle(rows), n_canaries=50, **ROOM)

    row = mixed[next(iter(inserted_rows(canaries)))]
    assert {value.dtype for value in row.values()} == {torch.int32}
    assert len(list(DataLoader(mixed, batch_size=16))) > 0
    assert isinstance(canaries.records[0]["input_ids"], list)


def test_a_column_with_unknown_values_per_token_is_refused():
    rows = [row | {"importance": [0.5] * 32} for row in ROWS["tokenized"]]

    with pytest.raises(ConfigurationError, match="'importance' seems to hold one value per token"):
        insert_canaries(rows, n_canaries=50, **ROOM)


def test_columns_and_types_of_a_dataset_are_preserved():
    features = datasets.Features(
        {
            "weight": datasets.Value("float32"),
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.Value("string"),
                    "name": datasets.Value("string"),
                }
            )
            if hasattr(datasets, "List")
            else [
                {
                    "role": datasets.Value("string"),
                    "content": datasets.Value("string"),
                    "name": datasets.Value("string"),
                }
            ],
            "source": datasets.ClassLabel(names=["web", "book"]),
        }
    )
    rows = [
        {
            "weight": i / 7,
            "source": i % 2,
            "messages": [turn | {"name": None} for turn in row["messages"]],
        }
        for i, row in enumerate(ROWS["messages"])
    ]
    dataset = datasets.Dataset.from_list(rows, features=features).with_format("numpy")

    mixed, canaries = insert_canaries(dataset, n_canaries=50, **ROOM)

    assert mixed.features == dataset.features
    assert mixed.column_names == dataset.column_names
    assert {**mixed.format, "columns": None} == {**dataset.format, "columns": None}
    assert sorted(mixed.format["columns"]) == sorted(dataset.format["columns"])
    assert set(mixed.with_format(None)["source"]) == {0, 1}
    assert len(mixed) == N_ROWS + canaries.n_members


def test_the_types_of_token_columns_are_preserved():
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int32")),
            "attention_mask": datasets.Sequence(datasets.Value("int8")),
        }
    )
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in TOKENS]
    dataset = datasets.Dataset.from_list(rows, features=features)

    mixed, _ = insert_canaries(dataset, n_canaries=50, **ROOM)

    assert mixed.features == features


def test_coins_are_fair_independent_and_not_those_of_the_texts():
    flips = np.array(
        [insert_canaries(TEXTS, n_canaries=50, seed=seed, **ROOM)[1].is_member for seed in range(30)]
    )

    # Fixed sizes would give a variance of 0; independent coins 50 / 4. Binomial standard deviations.
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(flips.size)
    assert 3 < flips.sum(axis=1).var(ddof=1) < 28
    correlations = np.corrcoef(flips[:, :25].T)[np.triu_indices(25, k=1)]
    assert abs(correlations.mean()) < 0.05


def test_texts_do_not_depend_on_the_coins():
    # Same seed, other designs and places: only the coins' stream differs.
    _, coins = insert_canaries(TEXTS, n_canaries=60, seed=4, **ROOM)
    _, pairs = insert_canaries(TEXTS, n_canaries=60, seed=4, design="pairs", families=("unigram",), **ROOM)
    _, again = insert_canaries(TEXTS, n_canaries=60, seed=4, families=("unigram",), **ROOM)

    assert pairs.records == again.records
    assert pairs.is_member.tolist() != again.is_member.tolist()
    assert coins.records != pairs.records


def test_the_same_seed_repeats_everything_and_another_one_nothing():
    first, second, other = (insert_canaries(TEXTS, n_canaries=50, seed=seed, **ROOM) for seed in (1, 1, 2))

    assert first[0] == second[0]
    assert first[1].fingerprint == second[1].fingerprint
    assert first[1].details == second[1].details
    assert not set(first[1].records) & set(other[1].records)


def test_positions_are_spread_over_the_training_set():
    _, canaries = insert_canaries(TEXTS, n_canaries=200, max_fraction=0.5)

    rows = np.array(sorted(inserted_rows(canaries))) / (N_ROWS + canaries.n_members)
    # Uniform: the mean of about 100 has a standard deviation of 0.029.
    assert abs(rows.mean() - 0.5) < 0.12
    assert np.histogram(rows, bins=4, range=(0, 1))[0].min() > 8


def test_pairs_have_one_member_each_and_equal_tiers():
    _, canaries = insert_canaries(
        TEXTS, n_canaries=80, design="pairs", repetitions=(1, 2), families=("uniform", "secrets"), **ROOM
    )

    twins = canaries.pair_indices
    assert twins.shape == (40, 2)
    assert (canaries.is_member[twins].sum(axis=1) == 1).all()
    # Which of the twins: 40 fair coins.
    assert 8 < canaries.is_member[twins[:, 0]].sum() < 32
    for a, b in twins:
        assert canaries.details[a].describe() == canaries.details[b].describe()
        assert canaries.record_ids[a][:-1] == canaries.record_ids[b][:-1] == canaries.details[a].pair_id
    assert canaries.provenance.method == "inserted_pairs"


def test_tiers_have_their_copies_and_are_never_pooled():
    mixed, canaries = insert_canaries(TEXTS, n_canaries=160, repetitions=(1, 4, 16), max_fraction=0.9)

    assert canaries.tiers == (1, 4, 16)
    n_copies = Counter(mixed)
    parts = [canaries.of_tier(n) for n in canaries.tiers]
    assert sum(len(part) for part in parts) == len(canaries)
    assert len({name for part in parts for name in part.record_ids}) == len(canaries)
    for n_repeats, part in zip(canaries.tiers, parts, strict=True):
        assert {detail.n_repeats for detail in part.details} == {n_repeats}
        assert part.tiers == (n_repeats,)
        for record, member in zip(part.records, part.is_member, strict=True):
            assert n_copies[record] == (n_repeats if member else 0)
    # Copies are not neighbors.
    rows = [detail.row_indices for detail in parts[-1].details if detail.row_indices]
    assert all(max(places) - min(places) > 100 for places in rows)


def test_families_come_in_equal_shares_in_every_tier():
    _, canaries = insert_canaries(
        TEXTS,
        n_canaries=200,
        families=("uniform", "unigram", "bigram", "secrets"),
        repetitions=(1, 2),
        **ROOM,
    )

    counts = Counter((detail.family, detail.n_repeats) for detail in canaries.details)
    assert set(counts.values()) == {25}
    secrets = [detail.log2_n_candidates for detail in canaries.details if detail.family == "secrets"]
    assert min(secrets) > 50


def test_ids_do_not_tell_membership_and_provenance_allows_epsilon():
    _, canaries = insert_canaries(TEXTS, n_canaries=50, families=("bigram",), seed=9, **ROOM)

    assert canaries.record_ids[:2] == ("bigram-x1-00000", "bigram-x1-00001")
    source = canaries.provenance
    assert (source.method, source.is_randomized, source.seed) == ("inserted_coins", True, 9)
    assert source.has_independent_coins
    assert "bigram x1" in canaries.describe()
    assert not hold_out_canaries(TEXTS, n_members=20, n_non_members=20)[1].provenance.has_independent_coins


def test_no_canary_repeats_another_or_a_training_row():
    samples = [TEXTS[0].upper(), *["same words"] * 5, *[f"sample number {i}" for i in range(80)]]

    _, canaries = insert_canaries(TEXTS, n_canaries=50, families=("samples",), samples=samples, **ROOM)

    assert len({record_key(record) for record in canaries.records}) == 50
    assert TEXTS[0].upper() not in canaries.records
    assert canaries.provenance.n_duplicates_removed == 5


def test_samples_may_be_made_on_demand():
    asked = []

    def generate(n: int) -> list[str]:
        asked.append(n)
        return [f"sample {len(asked)} {i // (2 if len(asked) == 1 else 1)}" for i in range(n)]

    _, canaries = insert_canaries(TEXTS, n_canaries=50, families=("samples",), samples=generate, **ROOM)

    assert asked == [50, 25]
    assert len(set(canaries.records)) == 50


def test_samples_for_tokenized_rows_are_token_ids():
    rows = [{"input_ids": ids[: 20 + i % 10]} for i, ids in enumerate(TOKENS)]
    samples = [[100 + i, *range(10, 50)] for i in range(50)]

    _, canaries = insert_canaries(rows, n_canaries=50, families=("samples",), samples=samples, **ROOM)

    assert canaries.records[3]["input_ids"] == [1, 103, *range(10, 50)]
    with pytest.raises(ConfigurationError, match="Got texts as samples"):
        insert_canaries(rows, n_canaries=50, families=("samples",), samples=["text"] * 50, **ROOM)


def test_too_few_distinct_texts_are_refused():
    with pytest.raises(TooFewCanariesError, match="repeat another canary or a training row"):
        insert_canaries(TEXTS, n_canaries=50, families=("samples",), samples=lambda n: ["same"] * n, **ROOM)


def test_stripping_leaves_the_training_set_as_it_was():
    dataset = datasets.Dataset.from_list(ROWS["text"])
    mixed, canaries = insert_canaries(dataset, n_canaries=120, repetitions=(1, 3), max_fraction=0.5)

    stripped = strip_canaries(mixed.shuffle(seed=0), canaries)

    assert sorted(stripped["text"]) == sorted(dataset["text"])
    assert strip_canaries(mixed, canaries)["text"][:] == dataset["text"][:]


def test_stripping_what_is_not_all_there_is_refused():
    mixed, canaries = insert_canaries(TEXTS, n_canaries=50, **ROOM)
    row = next(iter(inserted_rows(canaries)))

    with pytest.raises(
        ConfigurationError, match=f"Found {canaries.n_members - 1} of {canaries.n_members} inserted"
    ):
        strip_canaries([*mixed[:row], *mixed[row + 1 :]], canaries)


def test_the_saved_removal_list_names_every_row_and_only_these(tmp_path):
    mixed, canaries = insert_canaries(TEXTS, n_canaries=100, repetitions=(1, 2), seed=3, **ROOM)

    save_removal_list(canaries, tmp_path / "canaries.json")

    saved = json.loads((tmp_path / "canaries.json").read_text(encoding="utf-8"))
    rows = {row: entry["record"] for entry in saved["canaries"] for row in entry["row_indices"]}
    assert (saved["method"], saved["seed"]) == ("inserted_coins", 3)
    assert [text for i, text in enumerate(mixed) if i not in rows] == TEXTS
    assert all(mixed[i] == record for i, record in rows.items())
    assert len(saved["canaries"]) == canaries.n_members


def test_records_of_the_users_own_have_no_removal_list():
    _, canaries = hold_out_canaries(TEXTS, n_members=20, n_non_members=20)

    with pytest.raises(ConfigurationError, match="your own records"):
        removal_list(canaries)


def test_too_large_a_share_is_refused_with_numbers_whatever_the_coins():
    for seed in range(5):
        with pytest.raises(
            ConfigurationError, match=r"About 25 inserted rows among 400 would be 5.88% .* allows 4"
        ):
            insert_canaries(TEXTS, n_canaries=50, seed=seed)


@pytest.mark.parametrize("size", [49, 10])
def test_too_few_coins_are_refused(size):
    with pytest.raises(TooFewCanariesError, match=f"coin flips for {size} records; at least 50"):
        insert_canaries(TEXTS, n_canaries=size, **ROOM)


def test_every_tier_needs_its_own_numbers():
    with pytest.raises(TooFewCanariesError, match="coin flips for 33 records"):
        insert_canaries(TEXTS, n_canaries=99, repetitions=(1, 4, 16), families=("bigram",), **ROOM)
    with pytest.raises(TooFewCanariesError, match="9 pairs with 1 copies; at least 10"):
        insert_canaries(TEXTS, n_canaries=18, design="pairs", **ROOM)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": ("trigram",)}, "use one or more of"),
        ({"families": "bigram"}, "use one or more of"),
        ({"families": ()}, "use one or more of"),
        ({"repetitions": (0,)}, "different numbers of copies from 1"),
        ({"repetitions": (2, 2)}, "different numbers of copies from 1"),
        ({"design": "fixed"}, "use 'coins' or 'pairs'"),
        ({"design": "pairs", "n_canaries": 51}, "use an even number"),
        ({"max_fraction": 1.0}, "needs to lie in"),
        ({"seed": -1}, "a non-negative integer"),
        ({"length": 1}, "Got length=1"),
        ({"samples": ["a"]}, "go together"),
        ({"families": ("samples",)}, "go together"),
        ({"secret_templates": ("no slot",)}, "it needs"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        insert_canaries(TEXTS, **{"n_canaries": 50, **ROOM, **arguments})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (datasets.Dataset.from_list(ROWS["text"]).to_iterable_dataset(), "materialize the part"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS["text"])), r"dataset\['train'\]"),
        (
            datasets.Dataset.from_list(ROWS["text"]).with_transform(lambda rows: rows),
            "computed when they are read",
        ),
        ([*TEXTS[:200], *ROWS["messages"]], "have different shapes"),
        (["", " "] * 100, "None of the 200 training rows"),
        (["short text"] * 200, "Only 2 distinct words"),
    ],
    ids=["stream", "splits", "transform", "mixed", "empty", "few words"],
)
def test_what_cannot_take_canaries_is_refused(dataset, message):
    with pytest.raises(ConfigurationError, match=message):
        insert_canaries(dataset, n_canaries=50, **ROOM)


def test_secrets_need_text():
    with pytest.raises(ConfigurationError, match="insert the canaries before tokenization"):
        insert_canaries(ROWS["tokenized"], n_canaries=50, families=("secrets",), **ROOM)


def test_short_canaries_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        insert_canaries(TEXTS, n_canaries=50, length=8, **ROOM)
        assert "50 of 50 canaries have fewer than about 32 tokens" in caplog.text
        caplog.clear()
        insert_canaries(TEXTS, n_canaries=50, families=("bigram", "secrets"), **ROOM)
        assert caplog.text == ""


@pytest.mark.parametrize("kind", ["text", "tokenized"])
def test_global_random_states_and_the_given_rows_are_untouched(kind):
    rows = [dict(row) for row in ROWS[kind]]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    insert_canaries(rows, n_canaries=50, **ROOM)

    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert rows == ROWS[kind]


def test_canaries_pickle_with_their_details():
    _, canaries = insert_canaries(TEXTS, n_canaries=50, **ROOM)

    actual = pickle.loads(pickle.dumps(canaries))

    assert actual.details == canaries.details
    assert actual.fingerprint == canaries.fingerprint


def test_prepared_rows_keep_their_details_and_half_pairs_are_no_pairs():
    _, canaries = insert_canaries(TEXTS, n_canaries=60, design="pairs", **ROOM)
    kept = list(range(1, 60))

    prepared = canaries.select(kept, records=[f"prepared {i}" for i in kept])

    assert prepared.records[0] == "prepared 1"
    assert prepared.details == canaries.details[1:]
    assert prepared.pair_indices.shape == (29, 2)
