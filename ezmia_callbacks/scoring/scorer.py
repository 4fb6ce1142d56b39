"""Scores records with models: always in the same batches, over all processes, within the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from ezmia_callbacks.distributed import (
    broadcast_from_main,
    can_share_records,
    gather,
    is_main_process,
    is_sharded,
    n_processes,
    on_all_ranks,
    rank,
)
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.scoring.attack import Attack, checked_scores
from ezmia_callbacks.scoring.forward import (
    batches_of,
    call_for_logits,
    check_inputs,
    check_model,
    deal_rows,
    evaluation_without_side_effects,
    token_statistics,
    traces_of,
    try_memory,
)
from ezmia_callbacks.scoring.left_as_found import Traces
from ezmia_callbacks.scoring.memory import fit_into_memory
from ezmia_callbacks.scoring.projection import LogitsFunction, Projection
from ezmia_callbacks.scoring.rows import EncodedCanaries, TokenRow, sides_of
from ezmia_callbacks.scoring.statistics import TokenStatistics, join_statistics

__all__: list[str] = []

logger = get_logger(__name__)


class Scorer:
    """Turns a model and rows into token statistics; every process must call it, with the same rows.

    Args:
        batch_size: Records in a forward pass.
        logits_fn: How to get logits (batch, length, vocabulary) out of a model.
        autocast: Makes the context under which training runs its forward pass.
        show_progress: Show a bar while a pass takes longer than two seconds.

    Attributes:
        logits_fn: How to get logits out of a model.
        batch_size: Records in a forward pass; smaller than asked for where memory ran out: a size that was
            too large once is not tried again.
        projection: How the logits of the model in training are computed; None before `prepare`.
    """

    def __init__(
        self,
        *,
        batch_size: int = 16,
        logits_fn: LogitsFunction = call_for_logits,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        show_progress: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.projection: Projection | None = None
        self._autocast = autocast
        self.logits_fn = logits_fn
        self._show_progress = show_progress
        self._traces: WeakKeyDictionary[nn.Module, Traces] = WeakKeyDictionary()

    def inputs_not_taken(self, model: nn.Module, encoded: EncodedCanaries) -> frozenset[str]:
        """Further inputs of the canaries that the model cannot be given, alike on all processes."""
        if not encoded.input_names:
            return frozenset()
        traces = self._traces_of(model, encoded.rows)
        found = on_all_ranks(
            lambda: check_inputs(
                model,
                encoded.rows,
                logits_fn=self.logits_fn,
                autocast=self._autocast,
                traces=traces,
            )
        )
        return frozenset().union(*gather(found))

    def prepare(self, model: nn.Module, rows: Sequence[TokenRow]) -> Projection:
        """Refuse a model that cannot be audited; how its logits are computed, alike on all processes.

        Raises:
            UnsupportedModelError: if it is not a causal language model with logits.
            ConfigurationError: if a row is longer, or a token id larger, than the model can take.
            AuditMemoryError: if one record alone does not fit into memory.
        """
        rows = sides_of(rows)
        traces = self._traces_of(model, rows)
        found, _ = fit_into_memory(
            lambda _: check_model(
                model, rows, logits_fn=self.logits_fn, autocast=self._autocast, traces=traces
            ),
            batch_size=1,
        )
        self.projection = next((each for each in gather(found) if each.reason is not None), found)
        if self.projection.reason is not None and is_main_process():
            logger.info(
                "An audit holds the logits %s: with a large vocabulary keep `batch_size` small.",
                self.projection.describe(),
            )
        return self.projection

    def statistics(
        self, model: nn.Module, rows: Sequence[TokenRow], *, is_in_training: bool = True
    ) -> TokenStatistics:
        """Statistics of the rows, on every process; each scores its share.

        Of preference pairs both sides are scored, in the same batches.

        Args:
            model: The model that is trained, or another one as its reference.
            rows: The rows.
            is_in_training: Whether it is the model that is trained, for which `prepare` was called.

        Raises:
            NonFiniteLogitsError: if a logit that matters is NaN or infinite.
            AuditMemoryError: if one record alone does not fit into memory.
        """
        projection = self.projection if is_in_training else None
        n_records, rows = len(rows), sides_of(rows)
        traces = self._traces_of(model, rows)
        n_shares, own = (n_processes(), rank()) if can_share_records(model) else (1, 0)

        def share(batch_size: int) -> tuple[TokenStatistics, list[list[int]]]:
            shares = deal_rows(rows, batch_size=batch_size, n_shares=n_shares)
            statistics = token_statistics(
                model,
                [rows[i] for i in shares[own]],
                batch_size=batch_size,
                n_batches=max(
                    len(batches_of([rows[i] for i in each], batch_size=batch_size)) for each in shares
                ),
                projection=projection,
                traces=traces,
                logits_fn=self.logits_fn,
                autocast=self._autocast,
                show_progress=self._show_progress and is_main_process(),
            )
            return statistics, shares

        if is_sharded(model):
            # Memory that runs out in the middle of a pass breaks what all processes do together.
            _, self.batch_size = fit_into_memory(
                lambda batch_size: try_memory(model, rows, batch_size=batch_size), batch_size=self.batch_size
            )
        (statistics, shares), self.batch_size = fit_into_memory(share, batch_size=self.batch_size)
        parts = [broadcast_from_main(statistics)] if n_shares == 1 else gather(statistics)
        return join_statistics(parts, shares).split(n_records)

    def attack_scores(
        self,
        attack: Attack,
        model: nn.Module,
        encoded: EncodedCanaries,
        *,
        target: TokenStatistics,
        reference: TokenStatistics,
        is_first: bool,
    ) -> dict[str, np.ndarray]:
        """Scores of the user's attack, by its name; every process calls it.

        Args:
            attack: The attack.
            model: The model in training; left exactly as it was found.
            encoded: The records.
            target: The model's statistics of them.
            reference: The reference's.
            is_first: Whether the model is at its start, where the attack prepares itself.

        Raises:
            AuditError: if there is not one finite number for each record.
        """
        traces = self._traces_of(model, encoded.rows)

        def begun() -> None:
            with evaluation_without_side_effects(model, traces, by_bits=True), self._autocast():
                attack.begin(model, encoded)

        def scored() -> np.ndarray:
            with evaluation_without_side_effects(model, traces, by_bits=is_first), self._autocast():
                scores = attack.score(model, encoded, target, reference)
            return checked_scores(scores, name=attack.name, n_records=len(encoded.rows))

        # Whether the model is as it was is found out on each process, and must not be one's own secret.
        if is_first:
            on_all_ranks(begun)
        return {attack.name: on_all_ranks(scored)}

    def _traces_of(self, model: nn.Module, rows: Sequence[TokenRow]) -> Traces:
        """What passes through this very model leave behind, found out once."""
        if model not in self._traces:
            found, _ = fit_into_memory(
                lambda _: traces_of(model, rows, logits_fn=self.logits_fn, autocast=self._autocast),
                batch_size=1,
            )
            everywhere = gather(found)
            self._traces[model] = Traces(
                set().union(*(each.names for each in everywhere)),
                is_restless=any(each.is_restless for each in everywhere),
            )
        return self._traces[model]
