import math

import pytest
import torch

from ezmia_callbacks.demo.base_model import (
    BaseModelRecipe,
    train_base_model,
    train_tokenizer,
)
from ezmia_callbacks.errors import ConfigurationError

pytest.importorskip("transformers")

TEXTS = [f"Record {number} says that herons stand still for {number} hours." for number in range(50)]
TINY = BaseModelRecipe(
    vocabulary_size=300,
    hidden_size=16,
    n_layers=1,
    n_heads=2,
    n_positions=32,
    n_steps=3,
    batch_size=2,
    block_length=16,
)


def test_three_steps_give_a_finite_loss_and_a_model_in_evaluation_mode():
    trained = train_base_model(TEXTS, seed=0, recipe=TINY)

    assert math.isfinite(trained.final_loss)
    assert not trained.model.training


def test_training_lowers_the_loss():
    # An untrained model of 300 tokens starts near ln 300 = 5.7.
    longer = BaseModelRecipe(**{**vars(TINY), "n_steps": 60, "batch_size": 8})

    assert train_base_model(TEXTS, seed=0, recipe=longer).final_loss < 4.0


def test_same_seed_gives_the_same_weights():
    first = train_base_model(TEXTS, seed=1, recipe=TINY).model.state_dict()
    second = train_base_model(TEXTS, seed=1, recipe=TINY).model.state_dict()

    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights():
    first = train_base_model(TEXTS, seed=1, recipe=TINY).model.get_input_embeddings().weight
    second = train_base_model(TEXTS, seed=2, recipe=TINY).model.get_input_embeddings().weight

    assert not torch.equal(first, second)


def test_global_random_state_is_left_as_it_was():
    before = torch.get_rng_state()

    train_base_model(TEXTS, seed=0, recipe=TINY)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("text", ["Herons stand still.", "  two  spaces\n\ttab ", "naïve ☃ 雪", ""])
def test_tokenizer_returns_the_text_it_was_given(text):
    tokenizer = train_tokenizer(TEXTS, vocabulary_size=300, n_positions=32)

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_pads_on_the_right_with_a_token_of_its_own():
    tokenizer = train_tokenizer(TEXTS, vocabulary_size=300, n_positions=32)

    batch = tokenizer(["a", "a heron stands"], padding=True)

    assert batch["attention_mask"][0][:2] == [1, 0]
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_model_can_embed_every_token_where_the_text_yields_fewer_merges():
    recipe = BaseModelRecipe(**{**vars(TINY), "vocabulary_size": 2000})

    trained = train_base_model(TEXTS, seed=0, recipe=recipe)

    assert len(trained.tokenizer) <= trained.model.get_input_embeddings().num_embeddings == 2000


@pytest.mark.parametrize("records", [[], ["short"]])
def test_text_shorter_than_one_block_is_refused(records):
    with pytest.raises(ConfigurationError, match="one block needs 16"):
        train_base_model(records, seed=0, recipe=TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_size": 257}, "at least 258"),
        ({"hidden_size": 18}, "multiple of 2"),
        ({"block_length": 33}, "block_length"),
        ({"block_length": 1}, "block_length"),
        ({"n_steps": 0}, "must be positive"),
        ({"batch_size": 0}, "must be positive"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        BaseModelRecipe(**{**vars(TINY), **change})
