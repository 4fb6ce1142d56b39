"""The reference's statistics: from which model they come, and what is said of it."""

import numpy as np
import peft
import pytest
import torch
from adapted_llama import LORA, make_llama, perturb
from tiny import make_texts
from token_rows import as_rows

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.reference.statistics import reference_statistics
from ezmia_callbacks.scoring.scorer import Scorer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning")

ROWS = as_rows(make_texts(12))


def measured(source, model):
    """Statistics of the reference and of the start."""
    scorer = Scorer()
    scorer.prepare(model, ROWS)
    start = scorer.statistics(model, ROWS)
    return reference_statistics(source, model, start=start, scorer=scorer, rows=ROWS), start


def adapted_llama():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(make_llama(), peft.LoraConfig(**LORA))


def of(model):
    return Scorer().statistics(model, ROWS, is_in_training=False).log_probs


def test_the_start_is_its_own_reference_and_is_not_scored_again():
    reference, start = measured("auto", make_llama())

    assert reference is start


def test_the_base_under_the_adapters_is_the_reference(caplog):
    model = adapted_llama()
    perturb(model)

    reference, start = measured("adapter", model)

    np.testing.assert_allclose(reference.log_probs, of(make_llama()), atol=1e-5)
    assert np.abs(reference.log_probs - start.log_probs).max() > 0.02
    assert "Before any training the model differs from its base by up to" in caplog.text


def test_the_start_is_the_reference_also_where_adapters_have_left_their_base(caplog):
    model = adapted_llama()
    perturb(model)

    reference, start = measured("auto", model)

    assert reference is start
    assert caplog.text.count("Before any training the model differs from its base by up to") == 1


def test_adapters_that_start_at_their_base_are_not_worth_a_word(caplog):
    measured("auto", adapted_llama())

    assert "differs from its base" not in caplog.text


@pytest.mark.parametrize("is_lazy", [True, False])
def test_a_module_of_the_users_is_scored_as_it_is(is_lazy):
    other = make_llama(attention_bias=True)

    reference, _ = measured((lambda: other) if is_lazy else other, make_llama())

    np.testing.assert_array_equal(reference.log_probs, of(other))


def test_a_copy_has_the_statistics_of_the_start():
    reference, start = measured("copy", make_llama())

    np.testing.assert_allclose(reference.log_probs, start.log_probs, atol=1e-6)


def test_no_adapters_to_disable_is_refused():
    with pytest.raises(ConfigurationError, match="reference='adapter' needs a model with PEFT adapters"):
        measured("adapter", make_llama())
