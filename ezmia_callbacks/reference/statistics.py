"""The reference's token statistics, computed once and before the first step, whatever the source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from ezmia_callbacks.distributed import is_main_process, on_all_ranks
from ezmia_callbacks.reference.sources import (
    ReferenceSource,
    adapters_disabled,
    can_disable_adapters,
    explain_difference,
    has_adapters,
    second_model,
)
from ezmia_callbacks.reference.vocabulary import (
    check_token_ids,
    explain_added_vocabulary,
    explain_other_vocabulary,
)
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.scoring.rows import TokenRow
from ezmia_callbacks.scoring.scorer import Scorer
from ezmia_callbacks.scoring.statistics import TokenStatistics

__all__: list[str] = []

logger = get_logger(__name__)

# Enough rows to see whether two models differ at all.
_N_PROBE_ROWS = 8
# Nats a token; rounding in bfloat16 stays well below, a model that was trained lies well above.
_SAME_MODEL_TOLERANCE = 0.02


def reference_statistics(
    source: ReferenceSource,
    model: nn.Module,
    *,
    start: TokenStatistics,
    scorer: Scorer,
    rows: Sequence[TokenRow],
) -> TokenStatistics:
    """Statistics of the reference; warns if the model has moved away from its base already.

    Args:
        source: Where the reference comes from.
        model: The model before the first step.
        start: Its statistics on the rows.
        scorer: What they were computed with.
        rows: The encoded canaries.

    Raises:
        ConfigurationError: if there is no such reference, or its vocabulary lacks tokens of the rows.
        AuditMemoryError: if there is no memory for a second model.
    """
    if isinstance(source, str):
        _warn(explain_added_vocabulary(model, rows))
    if source == "auto":
        if has_adapters(model) and can_disable_adapters(model):
            with adapters_disabled(model):
                base = scorer.statistics(model, rows[:_N_PROBE_ROWS])
            _warn(_difference(model, start, base))
        return start
    if source == "adapter":
        with adapters_disabled(model):
            reference = scorer.statistics(model, rows)
        _warn(_difference(model, start, reference))
        return reference
    other = source if isinstance(source, nn.Module) else on_all_ranks(lambda: second_model(model, source))
    check_token_ids(other, rows)
    _warn(explain_other_vocabulary(other, model))
    return scorer.statistics(other, rows, is_in_training=False)


def _difference(model: nn.Module, start: TokenStatistics, base: TokenStatistics) -> str | None:
    """Why the start is not the base, in a sentence; None if it is."""
    difference = float(np.abs(start.log_probs[: base.n_tokens] - base.log_probs).max())
    if difference <= _SAME_MODEL_TOLERANCE:
        return None
    return (
        f"Before any training the model differs from its base by up to {difference:.3g} nats a token: "
        f"{explain_difference(model)}"
    )


def _warn(sentence: str | None) -> None:
    if sentence is not None and is_main_process():
        logger.warning("%s", sentence)
