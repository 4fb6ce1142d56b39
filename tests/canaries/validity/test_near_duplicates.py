import builtins
import random

import numpy as np
import pytest

from ezmia_callbacks.canaries.validity.near_duplicates import near_duplicates, record_units
from ezmia_callbacks.errors import MissingDependencyError

VOCABULARY = [f"word{i}" for i in range(2000)]


def texts(n_texts: int, *, length: int = 100, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(VOCABULARY, size=length)) for _ in range(n_texts)]


def with_word_changed(text: str, *, at: int) -> str:
    words = text.split()
    words[at] = "otherword"
    return " ".join(words)


@pytest.mark.parametrize("length", [20, 100, 400])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: with_word_changed(text, at=9),
        lambda text: text.upper().replace(" ", "\n  "),
        lambda text: text.replace(" ", ", "),
        lambda text: text + " and a little more",
    ],
    ids=["one word", "case and space", "punctuation", "appended"],
)
def test_a_changed_copy_is_found(change, length):
    records = texts(50, length=length)
    others = [*texts(200, length=length, seed=1), change(records[7])]

    found = near_duplicates(records, others)

    assert [(pair.record, pair.other) for pair in found] == [(7, 200)]
    assert 0.8 <= found[0].containment <= 1.0


def test_containment_is_the_share_of_the_shorter_record():
    # 100 words have 98 shingles; the changed word is in three of them.
    [record] = texts(1)

    [found] = near_duplicates([record], [with_word_changed(record, at=50)])

    assert found.containment == pytest.approx(95 / 98)


def test_a_record_with_a_quarter_of_its_words_changed_is_none():
    [record] = texts(1)
    changed = record
    for at in range(0, 100, 4):
        changed = with_word_changed(changed, at=at)

    assert near_duplicates([record], [changed]) == []


def test_the_same_words_in_another_order_are_none():
    [record] = texts(1)

    assert near_duplicates([record], [" ".join(reversed(record.split()))]) == []


def test_token_rows_are_compared_without_their_padding():
    tokens = list(range(100, 150))
    row = {"input_ids": [*tokens, 0, 0, 0], "attention_mask": [1] * 50 + [0] * 3}
    changed = {"input_ids": [*tokens[:25], 7, *tokens[26:]]}

    found = near_duplicates([row], [{"input_ids": list(range(50))}, changed])

    assert [(pair.record, pair.other) for pair in found] == [(0, 1)]
    assert record_units(row) == [str(token) for token in tokens]


def test_the_scored_side_of_a_conversation_counts():
    [text] = texts(1)
    record = {"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": text}]}

    found = near_duplicates([record], [text])

    assert len(found) == 1


def test_scripts_without_spaces_have_one_unit_per_character():
    assert record_units("猫が好き") == ["猫", "が", "好", "き"]


@pytest.mark.parametrize("records", [[], ["one", "?!", "two words"]])
def test_short_or_no_records_match_only_themselves(records):
    found = near_duplicates(records, ["one", "three words here", "words two"])

    assert [(pair.record, pair.other) for pair in found] == ([(0, 0)] if records else [])


def test_the_result_does_not_change_between_calls_nor_the_global_generators():
    records, others = texts(40), [with_word_changed(text, at=3) for text in texts(40)]
    states = random.getstate(), np.random.get_state()[1].tolist()

    first, second = near_duplicates(records, others), near_duplicates(records, others)

    assert first == second
    assert len(first) == 40
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_without_datasketch_the_error_names_the_extra(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasketch":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)

    with pytest.raises(MissingDependencyError, match="pip install datasketch"):
        near_duplicates(["a"], ["b"])
