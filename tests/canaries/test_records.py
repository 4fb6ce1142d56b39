import numpy as np
import pytest
import torch

from ezmia_callbacks.canaries.records import (
    Record,
    canonical_record,
    exact_key,
    fingerprint,
    is_empty,
    is_pair,
    record_key,
    record_kind,
    record_text,
)
from ezmia_callbacks.errors import ConfigurationError

CHAT = {
    "messages": [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "In  Leeds."},
    ]
}
PAIR = {"prompt": "A ", "chosen": "b", "rejected": "c"}
CHAT_PAIR = {
    "chosen": CHAT["messages"],
    "rejected": [CHAT["messages"][0], {"role": "assistant", "content": "No."}],
}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("a", "text"),
        ({"text": "a", "label": 1}, "text"),
        ({"input_ids": [1], "text": "a"}, "tokenized"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "prompt_completion"),
        (CHAT, "messages"),
        (PAIR, "preference"),
        (CHAT_PAIR, "preference"),
        (CHAT_PAIR | CHAT | {"prompt": "Where?"}, "preference"),
        ({"text": "a", "messages": None}, "text"),
        ({"text": None}, "text"),
    ],
)
def test_kind_is_the_most_processed_shape_that_is_there(record: Record, expected: str) -> None:
    actual = record_kind(record)

    assert actual == expected


TOKENIZED_PAIR = {
    "input_ids": [5, 6, 7],
    "labels": [-100, 6, 7],
    "rejected_input_ids": [5, 8],
    "rejected_labels": [-100, 8],
}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (PAIR, True),
        (CHAT_PAIR, True),
        (TOKENIZED_PAIR, True),
        ("a", False),
        (CHAT, False),
        ({"input_ids": [1], "rejected_input_ids": None}, False),
    ],
)
def test_pairs_are_known_as_text_and_as_tokens(record: Record, expected: bool) -> None:
    assert is_pair(record) == expected


def test_a_tokenized_pair_keeps_its_rejected_side_which_may_have_another_length() -> None:
    assert canonical_record(TOKENIZED_PAIR | {"source": "web"}) == TOKENIZED_PAIR
    with pytest.raises(ConfigurationError, match="different lengths"):
        canonical_record(TOKENIZED_PAIR | {"rejected_labels": [8]})


def test_pairs_that_differ_in_the_rejected_side_alone_repeat_each_other_and_are_not_the_same() -> None:
    """What is trained on with another rejected side makes the chosen side likelier: it is no non-member."""
    other = TOKENIZED_PAIR | {"rejected_input_ids": [5, 9], "rejected_labels": [-100, 9]}

    assert record_key(other) == record_key(TOKENIZED_PAIR)
    assert exact_key(other) != exact_key(TOKENIZED_PAIR)


@pytest.mark.parametrize(
    "nothing", [{"rejected_labels": [-100, -100]}, {"rejected_input_ids": [], "rejected_labels": []}]
)
def test_a_pair_with_nothing_to_score_on_one_side_is_empty(nothing: dict[str, list[int]]) -> None:
    assert not is_empty(TOKENIZED_PAIR)
    assert is_empty(TOKENIZED_PAIR | nothing)


@pytest.mark.parametrize("record", [{"body": "a"}, {"prompt": "a"}, {"prompt": "a", "chosen": "b"}, {}])
def test_unknown_keys_are_named(record: Record) -> None:
    with pytest.raises(ConfigurationError, match=r"columns.* as a record; a record is a string"):
        record_kind(record)


def test_a_row_that_is_a_tuple_of_tensors_is_refused_by_its_type() -> None:
    with pytest.raises(ConfigurationError, match="Got a tuple as a record"):
        record_kind((torch.tensor([1]),))  # type: ignore[arg-type]  # the wrong use under test


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("A b", "A b"),
        ({"text": "A b"}, "A b"),
        ({"prompt": "A ", "completion": "b"}, "A b"),
        (
            {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
            "Where?\nIn  Leeds.",
        ),
        (CHAT, "Where?\nIn  Leeds."),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "Hi"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, '[{"name": "f"}]'),
        ({"input_ids": [1]}, None),
        (PAIR, "A b"),
        (CHAT_PAIR, "Where?\nIn  Leeds."),
    ],
)
def test_text_of_each_kind(record: Record, expected: str | None) -> None:
    actual = record_text(record)

    assert actual == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("One record", {"text": " one\n RECORD "}),
        ("ﬁle ①", "file 1"),
        ({"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, {"input_ids": [1, 2]}),
        ({"input_ids": np.array([1, 2])}, {"input_ids": torch.tensor([1, 2])}),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": (1, 2)}),
        (
            {"prompt": "A", "completion": "B", "id": 1},
            {"prompt": " a", "completion": "b "},
        ),
        (CHAT, {"messages": [dict(m, content=m["content"].upper()) for m in CHAT["messages"]]}),
        (PAIR, PAIR | {"chosen": " B", "rejected": "something else"}),
    ],
)
def test_records_that_differ_in_form_only_share_a_key(one: Record, other: Record) -> None:
    assert record_key(one) == record_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("one", "two"),
        ({"input_ids": [1, 23]}, {"input_ids": [12, 3]}),
        ({"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "b c"}),
        ({"prompt": "a", "completion": "b"}, "a b"),
        (PAIR, PAIR | {"chosen": "d"}),
        (PAIR, PAIR | {"prompt": "d"}),
        (PAIR, PAIR | {"prompt": None}),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            {"messages": [{"role": "system", "content": "a"}]},
        ),
    ],
)
def test_records_with_other_content_have_other_keys(one: Record, other: Record) -> None:
    assert record_key(one) != record_key(other)


def test_key_is_stable_across_versions() -> None:
    # SHA-256 of '["text","a b"]', computed with the `sha256sum` command.
    expected = "07e6a0df340e756b"

    actual = record_key("A  b")

    assert actual.startswith(expected)
    assert len(actual) == 64


def test_text_with_lone_surrogates_has_a_key() -> None:
    assert len(record_key("\ud800 a")) == 64


def test_exact_key_sees_case_and_labels() -> None:
    assert exact_key("a") != exact_key("A")
    assert exact_key({"input_ids": [1, 2]}) != exact_key({"input_ids": [1, 2], "labels": [-100, 2]})


@pytest.mark.parametrize(
    "record",
    [
        " \n\t",
        {"text": ""},
        {"text": None},
        {"input_ids": []},
        {"input_ids": None},
        {"input_ids": [0, 0], "attention_mask": [0, 0]},
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"prompt": "a", "completion": " "},
        {"prompt": "a", "completion": []},
        {"messages": []},
        {"prompt": "a", "chosen": " ", "rejected": "b"},
        {"chosen": None, "rejected": "b"},
        {"messages": [{"role": "user", "content": None}]},
    ],
)
def test_records_without_anything_to_score_are_empty(record: Record) -> None:
    assert is_empty(record)


@pytest.mark.parametrize(
    "record", ["a", {"input_ids": [0]}, {"prompt": "", "completion": "b"}, CHAT, PAIR, CHAT_PAIR]
)
def test_records_with_something_to_score_are_not_empty(record: Record) -> None:
    assert not is_empty(record)


def test_canonical_record_drops_other_columns_and_arrays() -> None:
    row = {"input_ids": torch.tensor([1, 2]), "labels": np.array([-100, 2]), "text": "a", "id": 7}

    actual = canonical_record(row)

    assert actual == {"input_ids": [1, 2], "labels": [-100, 2]}


def test_canonical_record_keeps_what_the_chat_template_reads() -> None:
    row = CHAT | {"tools": ["t"], "chat_template_kwargs": {"k": 1}, "source": "web"}

    actual = canonical_record(row)

    assert actual == CHAT | {"tools": ["t"], "chat_template_kwargs": {"k": 1}}


def test_canonical_preference_pair_keeps_both_sides_and_the_prompt_if_there_is_one():
    assert canonical_record(PAIR | {"score": 1}) == PAIR
    assert canonical_record(CHAT_PAIR | {"prompt": None}) == CHAT_PAIR


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [[1, 2]]}, "'input_ids' that is not a flat sequence of integers"),
        ({"input_ids": torch.tensor(3)}, "'input_ids' that is not a flat sequence of integers"),
        ({"input_ids": [1.5]}, "'input_ids' that is not a flat sequence of integers"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "2 input_ids and 1 attention_mask"),
        ({"text": ["a", "b"]}, "list in the field 'text' of a record, which needs a string"),
        ({"messages": "Hi"}, "str in the field 'messages'"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "list of {'role', 'content'}"),
        ({"prompt": 3, "completion": "b"}, "int in the field 'prompt'"),
    ],
)
def test_malformed_fields_are_named(record: Record, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        record_key(record)


def test_token_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'input_ids': 2, 'labels': 1"):
        canonical_record({"input_ids": [1, 2], "labels": [1]})


def test_fingerprint_depends_on_order_and_borders() -> None:
    fingerprints = {fingerprint(keys) for keys in (["ab", "c"], ["a", "bc"], ["c", "ab"], [])}

    assert len(fingerprints) == 4
    assert {len(digits) for digits in fingerprints} == {16}


def test_a_row_as_it_is_fed_is_the_same_record_as_without_padding():
    fed = {"input_ids": [0, 5, 6], "further_inputs": {"attention_mask": np.array([0, 1, 1])}}

    assert canonical_record(fed) == {"input_ids": [0, 5, 6], "further_inputs": {"attention_mask": [0, 1, 1]}}
    assert record_key(fed) == record_key({"input_ids": [5, 6]})
    assert exact_key(fed) != exact_key({"input_ids": [5, 6]})


def test_further_inputs_of_another_length_are_refused():
    with pytest.raises(ConfigurationError, match="token columns of different lengths"):
        canonical_record({"input_ids": [5, 6], "further_inputs": {"token_type_ids": [0]}})


def test_the_same_tokens_about_another_image_are_another_record():
    first, second = ({"input_ids": [5, 6], "inputs_digest": digest} for digest in ("a", "b"))

    assert record_key(first) != record_key(second)
    assert record_key(first) != record_key({"input_ids": [5, 6]})


@pytest.mark.parametrize(
    "record",
    [
        {"input_ids": [1, 2**63]},
        {"input_ids": [1, -(2**63) - 1]},
        {"input_ids": [1, 2], "further_inputs": [1]},
        {"input_ids": [1, 2], "further_inputs": {"token_type_ids": 5}},
        {"input_ids": [1, 2], "further_inputs": {"token_type_ids": ["a", "b"]}},
        {"input_ids": [1, 2], "further_inputs": {"token_type_ids": [float("nan"), 1]}},
        {"input_ids": [1, 2], "further_inputs": {"token_type_ids": [1, 10**400]}},
    ],
)
def test_token_columns_that_no_array_can_hold_are_refused(record):
    with pytest.raises(ConfigurationError):
        canonical_record(record)
