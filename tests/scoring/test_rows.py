import numpy as np
import pytest
from tiny import make_rows, make_texts, make_tokenizer
from trl_tiny import make_chat_tokenizer

from ezmia_callbacks import CanarySet
from ezmia_callbacks.canaries.records import IGNORED_LABEL
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.scoring.rows import encode_canaries


def as_canaries(members, non_members):
    return CanarySet.from_lists(members, non_members)


def with_padding(row, n):
    return {
        "input_ids": row["input_ids"] + [0] * n,
        "attention_mask": row["attention_mask"] + [0] * n,
    }


def test_text_is_truncated_like_training():
    texts = make_texts(20)

    encoded = encode_canaries(as_canaries(texts[:10], texts[10:]), make_tokenizer(), max_length=7)

    assert {len(row.input_ids) for row in encoded.rows} == {7}


def test_tokenized_rows_need_no_tokenizer_and_keep_their_label_mask():
    rows = make_rows(make_texts(20))
    for row in rows:
        row["labels"] = [IGNORED_LABEL] * 4 + row["input_ids"][4:]

    encoded = encode_canaries(as_canaries(rows[:10], rows[10:]))

    assert [row.n_scored for row in encoded.rows] == [8] * 20


def test_padding_in_a_row_is_dropped():
    rows = make_rows(make_texts(20))
    padded = [with_padding(row, 5) for row in rows]

    plain = encode_canaries(as_canaries(rows[:10], rows[10:]))
    encoded = encode_canaries(as_canaries(padded[:10], padded[10:]))

    assert encoded.fingerprint == plain.fingerprint


def test_prompt_tokens_are_not_scored():
    texts = make_texts(20)
    records = [{"prompt": text[:0] + "the river ", "completion": text} for text in texts]

    encoded = encode_canaries(as_canaries(records[:10], records[10:]), make_tokenizer())

    assert [row.n_scored for row in encoded.rows] == [12] * 20
    assert all(row.labels[:2].tolist() == [IGNORED_LABEL] * 2 for row in encoded.rows)


def test_records_with_fewer_than_two_scored_tokens_are_dropped_and_counted():
    rows = make_rows(make_texts(30))
    for row in rows[:3]:
        row["labels"] = [IGNORED_LABEL] * 11 + row["input_ids"][11:]

    encoded = encode_canaries(as_canaries(rows[:15], rows[15:]))

    assert encoded.n_dropped == 3
    assert (encoded.n_members, encoded.n_non_members) == (12, 15)
    assert "member-0" not in encoded.record_ids


def test_a_class_that_falls_under_its_minimum_is_refused():
    rows = make_rows(make_texts(30))
    for row in rows[:8]:
        row["labels"] = [IGNORED_LABEL] * 11 + row["input_ids"][11:]

    with pytest.raises(TooFewCanariesError, match="Only 7 members have at least 2 tokens that carry loss"):
        encode_canaries(as_canaries(rows[:15], rows[15:]))


def test_text_without_a_tokenizer_is_refused():
    texts = make_texts(20)

    with pytest.raises(ConfigurationError, match="need a tokenizer"):
        encode_canaries(as_canaries(texts[:10], texts[10:]))


def test_labels_that_are_not_the_input_are_refused():
    rows = make_rows(make_texts(20))
    for row in rows:
        row["labels"] = [*row["input_ids"][1:], IGNORED_LABEL]

    with pytest.raises(ConfigurationError, match="labels must not be shifted"):
        encode_canaries(as_canaries(rows[:10], rows[10:]))


@pytest.mark.parametrize("field", ["input_ids", "rejected_input_ids"])
def test_a_negative_token_id_is_refused_by_its_record(field):
    rows = [{"input_ids": [5, 6, i], "rejected_input_ids": [5, 7, i]} for i in range(20)]
    rows[3][field] = [5, -6]

    with pytest.raises(ConfigurationError, match=r"Record member-3.*: the token id -6; ids count from 0"):
        encode_canaries(as_canaries(rows[:10], rows[10:]))


def test_ids_of_padding_that_the_mask_takes_away_do_not_matter():
    rows = [{"input_ids": [5, 6, i, -100], "attention_mask": [1, 1, 1, 0]} for i in range(20)]

    encoded = encode_canaries(as_canaries(rows[:10], rows[10:]))

    assert [len(row.input_ids) for row in encoded.rows] == [3] * 20


def test_fingerprint_changes_with_tokens_labels_and_membership():
    rows = make_rows(make_texts(20))
    masked = [{**row, "labels": [IGNORED_LABEL, IGNORED_LABEL, *row["input_ids"][2:]]} for row in rows]
    sets = [
        as_canaries(rows[:10], rows[10:]),
        as_canaries(rows[10:], rows[:10]),
        as_canaries(masked[:10], masked[10:]),
        as_canaries(rows[:10], rows[10:19] + make_rows(make_texts(1, seed=9))),
    ]

    assert len({encode_canaries(canaries).fingerprint for canaries in sets}) == 4


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "left"
    texts = make_texts(20)

    encode_canaries(as_canaries(texts[:10], texts[10:]), tokenizer, max_length=5)

    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "left")
    assert len(tokenizer(texts[0])["input_ids"]) == 12


def test_compressed_sizes_are_known_for_text_and_with_a_tokenizer_only():
    texts = make_texts(20)
    rows = make_rows(texts)

    of_text = encode_canaries(as_canaries(texts[:10], texts[10:]), make_tokenizer())
    of_rows = encode_canaries(as_canaries(rows[:10], rows[10:]), make_tokenizer())

    np.testing.assert_array_equal(of_text.n_compressed_bytes, of_rows.n_compressed_bytes)
    assert of_text.n_compressed_bytes.dtype == np.int64
    assert encode_canaries(as_canaries(rows[:10], rows[10:])).n_compressed_bytes is None


PAIR_OF = {
    "text": lambda a, b, c: {"prompt": a, "chosen": f" {b}", "rejected": f" {c}"},
    "implicit": lambda a, b, c: {"chosen": f"{a} {b}", "rejected": f"{a} {c}"},
    "chat": lambda a, b, c: {
        "prompt": said(user=a),
        "chosen": said(assistant=b),
        "rejected": said(assistant=c),
    },
    "implicit_chat": lambda a, b, c: {
        "chosen": said(user=a, assistant=b),
        "rejected": said(user=a, assistant=c),
    },
}


def said(**turns):
    return [{"role": role, "content": text} for role, text in turns.items()]


def make_pairs(kind="text", n=20):
    chosen, rejected = make_texts(n, seed=1), make_texts(n, seed=2, n_words=5)
    # The two sides begin with different words, so that their common beginning is the prompt.
    rows = [
        PAIR_OF[kind](a, f"river {b}", f"stone {c}")
        for a, b, c in zip(make_texts(n, n_words=4), chosen, rejected, strict=True)
    ]
    return CanarySet.from_lists(rows[: n // 2], rows[n // 2 :])


@pytest.mark.parametrize("kind", PAIR_OF)
def test_both_sides_of_a_preference_pair_are_scored_after_their_prompt(kind):
    tokenizer = make_chat_tokenizer() if "chat" in kind else make_tokenizer()

    encoded = encode_canaries(make_pairs(kind), tokenizer)

    end = " <end>" if "chat" in kind else ""
    texts = zip(make_texts(20, seed=1), make_texts(20, seed=2, n_words=5), strict=True)
    assert encoded.has_pairs
    for row, (chosen, rejected) in zip(encoded.rows, texts, strict=True):
        words = [tokenizer.decode(side.input_ids[1:][side.is_scored]) for side in row.sides]
        assert words == [f"river {chosen}{end}", f"stone {rejected}{end}"]


def test_a_common_beginning_that_is_a_whole_side_leaves_nothing_to_score():
    pairs = [{"chosen": f"{text} river", "rejected": text} for text in make_texts(20)]

    with pytest.raises(TooFewCanariesError, match="2 tokens that carry loss, one of a rejected side"):
        encode_canaries(CanarySet.from_lists(pairs[:10], pairs[10:]), make_tokenizer())


def test_long_pairs_are_cut_on_both_sides():
    encoded = encode_canaries(make_pairs(), make_tokenizer(), max_length=7)

    assert {len(side.input_ids) for row in encoded.rows for side in row.sides} == {7}
    assert {side.n_scored for row in encoded.rows for side in row.sides} == {3}


def test_pairs_keep_their_sides_where_some_are_chosen_or_cut():
    encoded = encode_canaries(make_pairs(), make_tokenizer())
    rejected = [row.rejected.input_ids.tolist() for row in encoded.rows]

    chosen = encoded.select(np.arange(20) % 2 == 0).cut(7)

    assert [row.rejected.input_ids.tolist() for row in chosen.rows] == [ids[:7] for ids in rejected[::2]]
    assert [len(row.rejected.labels) for row in chosen.rows] == [7] * 10


def test_tokenized_pairs_are_those_that_they_were_made_of():
    encoded = encode_canaries(make_pairs(), make_tokenizer())
    records = [row.as_record() for row in encoded.rows]

    again = encode_canaries(CanarySet.from_lists(records[:10], records[10:]))

    assert again.fingerprint == encoded.fingerprint
    assert [row.as_record() for row in again.rows] == records


def test_pairs_mixed_with_other_records_are_refused():
    rows = [row.as_record() for row in encode_canaries(make_pairs(), make_tokenizer()).rows]
    plain = [{name: row[name] for name in ("input_ids", "labels")} for row in rows[:3]]

    with pytest.raises(ConfigurationError, match="17 of 20 canaries are preference pairs and the others are"):
        encode_canaries(CanarySet.from_lists([*plain, *rows[3:10]], rows[10:]))


def test_the_fingerprint_changes_with_a_token_of_a_rejected_side():
    encoded = encode_canaries(make_pairs(), make_tokenizer())
    records = [row.as_record() for row in encoded.rows]
    records[7]["rejected_input_ids"][-1] = records[7]["rejected_labels"][-1] = 3

    changed = encode_canaries(CanarySet.from_lists(records[:10], records[10:]))

    assert changed.fingerprint != encoded.fingerprint


def test_labels_of_a_rejected_side_that_are_not_its_tokens_are_refused():
    records = [row.as_record() for row in encode_canaries(make_pairs(), make_tokenizer()).rows]
    records[0]["rejected_labels"][-1] += 1

    with pytest.raises(ConfigurationError, match=r"\(rejected side\): labels differ from the input ids"):
        encode_canaries(CanarySet.from_lists(records[:10], records[10:]))


def chat(text, **fields):
    question, *answer = text.split()
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(answer)}]
    return {"messages": messages, **fields}


def as_completion(record):
    question, answer = record.pop("messages")
    return {"prompt": [question], "completion": [answer], **record}


@pytest.mark.parametrize("shape", [dict, as_completion], ids=["messages", "prompt and completion"])
@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"name": "harbor"}]},
        {"tools": '[{"name": "harbor"}]'},
        {"chat_template_kwargs": {"says_lantern": True}},
    ],
    ids=["tools", "tools as JSON", "template settings"],
)
def test_a_template_gets_the_tools_and_settings_of_a_chat(fields, shape):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if tools or says_lantern %}lantern {% endif %}"
        "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    )
    texts = make_texts(20)
    records = [shape(chat(text, **fields)) for text in texts]

    encoded = encode_canaries(as_canaries(records[:10], records[10:]), tokenizer)

    expected = [tokenizer(f"lantern {text}")["input_ids"] for text in texts]
    assert [row.input_ids.tolist() for row in encoded.rows] == expected


def test_no_tools_are_the_same_as_an_empty_list_of_them():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if tools is not none %}lantern {% endif %}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    texts = make_texts(20)
    records = [chat(text, tools=[], chat_template_kwargs=None) for text in texts]

    encoded = encode_canaries(as_canaries(records[:10], records[10:]), tokenizer)

    assert [row.input_ids.tolist() for row in encoded.rows] == [tokenizer(t)["input_ids"] for t in texts]


def fed_rows():
    """Rows with padding of their own and a further input, as a trainer feeds them."""
    return [
        {
            "input_ids": [0, *row["input_ids"]],
            "labels": [IGNORED_LABEL, *row["input_ids"]],
            "further_inputs": {
                "attention_mask": [0, *row["attention_mask"]],
                "token_type_ids": [0, *([1] * len(row["input_ids"]))],
            },
        }
        for row in make_rows(make_texts(20))
    ]


def test_a_row_as_it_is_fed_keeps_its_padding_and_further_inputs():
    rows = fed_rows()

    encoded = encode_canaries(as_canaries(rows[:10], rows[10:]))

    assert (encoded.input_names, encoded.padding_side) == ({"token_type_ids"}, "left")
    assert [row.as_record() for row in encoded.rows] == rows
    chosen = encoded.select(np.arange(20) % 2 == 0)
    assert [row.as_record() for row in chosen.rows] == rows[::2]


def test_without_some_inputs_the_rows_are_still_those_of_the_run():
    rows = fed_rows()
    encoded = encode_canaries(as_canaries(rows[:10], rows[10:]))

    stripped = encoded.without_inputs(frozenset({"token_type_ids"}))

    assert (stripped.input_names, stripped.padding_side) == (frozenset(), "left")
    assert stripped.fingerprint == encoded.fingerprint


def test_rows_of_which_the_images_are_gone_are_refused():
    rows = [{**row, "inputs_digest": str(i)} for i, row in enumerate(make_rows(make_texts(20)))]

    with pytest.raises(ConfigurationError, match="20 canaries were trained on with images"):
        encode_canaries(as_canaries(rows[:10], rows[10:]))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("half a character \ud800", "lone surrogates"),
        ({"prompt": "a", "completion": "b \udfff"}, "lone surrogates"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "one is text and one a list"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]},
            "of prompt, chosen and rejected one is text and one a list",
        ),
        ({"chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}, "chosen and rejected one is"),
        ({"messages": [{"role": "user", "content": "b"}], "tools": "["}, "not JSON"),
        (
            {"messages": [{"role": "user", "content": "b"}], "chat_template_kwargs": ["a"]},
            "a mapping is needed",
        ),
    ],
)
def test_a_record_that_no_tokenizer_reads_is_named(record, message):
    others = make_texts(24)
    canaries = CanarySet.from_lists([record, *others[:12]], others[12:])

    with pytest.raises(ConfigurationError, match=message):
        encode_canaries(canaries, make_tokenizer())
