"""Dynamic scaling of rotary positions remembers the longest row; an audit neither sees nor changes that."""

import numpy as np
import torch
from further_inputs import make_dynamic_llama
from token_rows import mixed_rows

from ezmia_callbacks.scoring.forward import evaluation_without_side_effects, token_statistics


def logits(model, n):
    with torch.no_grad():
        return model(input_ids=torch.arange(n)[None] % 64).logits


def test_what_is_remembered_comes_back():
    model = make_dynamic_llama().eval()
    logits(model, 12)
    before = logits(model, 10)

    with evaluation_without_side_effects(model):
        logits(model, 30)

    assert torch.equal(logits(model, 10), before)
    logits(model, 30)
    assert not torch.equal(logits(model, 10), before)


def test_figures_do_not_depend_on_what_the_model_has_seen_before():
    model, rows = make_dynamic_llama(), mixed_rows()
    fresh = token_statistics(model, rows, batch_size=3)

    logits(model, 30)
    later = token_statistics(model, rows, batch_size=3)

    np.testing.assert_array_equal(later.log_probs, fresh.log_probs)


def test_each_batch_starts_anew():
    model, rows = make_dynamic_llama(), [row for row in mixed_rows() if len(row.input_ids) > 10]

    together = token_statistics(model, rows, batch_size=1)

    for i, row in enumerate(rows):
        alone = token_statistics(make_dynamic_llama(), [row], batch_size=1)
        found = together.log_probs[together.offsets[i] : together.offsets[i + 1]]
        np.testing.assert_allclose(found, alone.log_probs, atol=1e-6)
