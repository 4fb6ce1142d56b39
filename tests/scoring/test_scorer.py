import numpy as np
import pytest
import torch
from tiny import make_model, make_texts
from token_rows import as_rows, mixed_rows

from ezmia_callbacks.errors import ConfigurationError, UnsupportedModelError
from ezmia_callbacks.functional import ez_score
from ezmia_callbacks.scoring.forward import call_for_logits, token_statistics
from ezmia_callbacks.scoring.scorer import Scorer


def test_statistics_are_those_of_the_plain_pass():
    model, rows = make_model(), mixed_rows()
    scorer = Scorer(batch_size=4)
    scorer.prepare(model, rows)

    found = scorer.statistics(model, rows)

    expected = token_statistics(model, rows, batch_size=4)
    np.testing.assert_array_equal(found.log_probs, expected.log_probs)
    np.testing.assert_array_equal(found.offsets, expected.offsets)


def test_a_batch_that_was_too_large_is_not_tried_again():
    model, rows = make_model(), as_rows(make_texts(8))
    sizes = []

    def logits(model, input_ids, attention_mask):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return call_for_logits(model, input_ids, attention_mask)

    scorer = Scorer(batch_size=8, logits_fn=logits)
    scorer.prepare(model, rows)
    sizes.clear()

    scorer.statistics(model, rows)
    scorer.statistics(model, rows)

    assert scorer.batch_size == 2
    assert sizes == [8, 4, *8 * [2]]


def test_preparing_says_how_logits_are_computed():
    scorer = Scorer()

    projection = scorer.prepare(make_model(), mixed_rows())

    assert projection is scorer.projection
    assert projection.describe() == "of scored positions only"


def test_the_released_score_of_a_models_statistics_is_that_of_its_padded_logits():
    """As the released code goes about it: right padding, a mask shifted by one, its first entry zeroed."""
    target, reference = make_model(seed=1), make_model(seed=2)
    texts = [" ".join(text.split()[: 3 + i]) for i, text in enumerate(make_texts(9))]
    rows = as_rows(texts)
    scorer = Scorer(batch_size=4)
    scorer.prepare(target, rows)
    ours, theirs = (scorer.statistics(model, rows, is_in_training=False) for model in (target, reference))

    found = ez_score(
        ours.log_probs,
        theirs.log_probs,
        ours.is_correct,
        theirs.is_correct,
        offsets=ours.offsets,
        mode="paper_code",
    )

    ids = [torch.tensor(row.input_ids) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)[:, 1:]
    mask[:, 0] = 0
    with torch.no_grad():
        logits, others = (model.eval()(input_ids=padded).logits[:, :-1] for model in (target, reference))
    tokens = padded[:, 1:]
    shift = logits.log_softmax(-1) - others.log_softmax(-1)
    shift = shift.gather(-1, tokens[..., None])[..., 0]
    is_error = (logits.topk(1).indices[..., 0] != tokens) & mask.bool()
    up, down = ((shift.clamp(min=0) * is_error).sum(1), (-shift.clamp(max=0) * is_error).sum(1))
    expected = torch.where((is_error.sum(1) < 2) | (down == 0), 0.0, up / (down + 1e-12))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)
    assert (expected > 0).sum() >= 5


def test_a_second_model_is_not_scored_as_the_first_one_is():
    """Its head may be another, or none that can be called in pieces."""
    rows = mixed_rows()
    scorer = Scorer()
    scorer.prepare(make_model(), rows)
    other = make_model(seed=5)
    bare = torch.nn.Module()
    bare.inner = other
    bare.forward = lambda input_ids, attention_mask: other(input_ids=input_ids).logits

    found = scorer.statistics(bare, rows, is_in_training=False)

    np.testing.assert_allclose(found.log_probs, token_statistics(other, rows).log_probs, atol=1e-5)


def test_a_model_that_cannot_be_audited_is_refused():
    with pytest.raises(UnsupportedModelError, match="returned no logits"):
        Scorer().prepare(make_model().transformer, mixed_rows())


def test_rows_beyond_the_model_are_refused():
    with pytest.raises(ConfigurationError, match="A canary has 40 tokens, the model takes 32"):
        Scorer().prepare(make_model(), as_rows(make_texts(2, n_words=40)))
