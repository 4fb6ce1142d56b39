"""Which canaries the model is fed: every batch of the training is looked at on its way into the model.

A forward pre-hook on the object that the loop calls finds the canaries' windows in each row, on the device
where the batch is, and adds up what it finds there; nothing is read back before an audit asks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ezmia_callbacks.audit.windows import WINDOW, WindowTable, mixed, powers, window_table
from ezmia_callbacks.results.exposures import NEVER, Exposures, add_exposures, of_pairs
from ezmia_callbacks.safe_text import describe_error, get_logger, log_error
from ezmia_callbacks.scoring.rows import TokenRow

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Int64

__all__: list[str] = []

logger = get_logger(__name__)

NO_TOKEN_IDS = "the model is called without token ids that could be read"

# Weights, and values of each, by which it is told whether any was trained.
_N_SAMPLED, _N_VALUES = 8, 64

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class _LookedFor(NamedTuple):
    """Rows that are looked for together, and whose they are.

    Attributes:
        table: What is looked for: windows that one of the rows has and no other.
        row_of: int64, (n_canaries,): the row of each canary; several share one if theirs are the same.
    """

    table: WindowTable
    row_of: Int64[np.ndarray, " n_canaries"]


def _looked_for(rows: Sequence[TokenRow]) -> list[_LookedFor]:
    """The canaries, and apart from them the rejected sides of preference pairs.

    Apart, because the two sides of a pair have most of their windows in common. Pairs whose rejected sides
    are the same share one, while canaries that are equal are never found: nothing else tells them apart.
    """
    found = [_LookedFor(window_table(rows), np.arange(len(rows)))]
    rejected = [row.rejected for row in rows if row.rejected is not None]
    if rejected:
        first_of: dict[bytes, int] = {}
        for i, side in enumerate(rejected):
            first_of.setdefault(side.input_ids.tobytes(), i)
        numbers = {first: n for n, first in enumerate(first_of.values())}
        row_of = np.array([numbers[first_of[side.input_ids.tobytes()]] for side in rejected])
        found.append(_LookedFor(window_table([rejected[i] for i in first_of.values()]), row_of))
    return found


class SeenCanaries:
    """Counts, for each canary, how often training fed it: of a preference pair both sides.

    Args:
        rows: The canaries, as training feeds them.
        before: What an earlier part of the run has fed.

    Attributes:
        n_steps: Optimizer steps that were noticed: the weights had moved, or the shell said so.
        further_inputs: Names of the tensors besides token ids, mask and labels that the model is called with.
    """

    def __init__(self, rows: Sequence[TokenRow], before: Exposures | None = None) -> None:
        self._rows = rows
        self._before = Exposures.none(len(rows)) if before is None else before
        self._looked_for = _looked_for(rows)
        # One for each of them, once a batch has said on which device.
        self._counts: tuple[_Counts, ...] = ()
        self._removal: Any = None
        self._parameters: list[nn.Parameter] = []
        self._version = 0
        self._is_pending = False
        self._n_batches = 0
        self._longest_row = 0
        self._problem = ""
        self._first_step = 0
        self._is_stepped = self._has_noticed = False
        self._was_left_padded = self._was_shifted = False
        self._sample: list[Tensor] = []
        self.n_steps = 0
        self.further_inputs: frozenset[str] = frozenset()

    def watch(self, module: nn.Module, *, step: int | None = None) -> None:
        """Look at the batches of this module from here on, and of no other.

        Args:
            module: The object that the training loop calls; an embedding of the token ids will do, too.
            step: Optimizer steps done.
        """
        self.unwatch()
        self._parameters = list(module.parameters())
        self._version, self._sample = self._versions(), self._sampled()
        if step is not None:
            self.n_steps = step
        self._removal = _together(_hook(module, _Hook(self)), _hook_optimizers(self))
        # Also where nobody says that the run is over.
        weakref.finalize(self, self._removal)

    def unwatch(self) -> None:
        """Look at nothing any more; what was counted stays."""
        if self._removal is not None:
            self._removal()
        self._removal, self._parameters, self._sample = None, [], []

    def count_from_here(self) -> None:
        """Steps that are told from here on come after those before: a second run counts from 1 again."""
        self._first_step = self.n_steps

    def replace_rows(self, rows: Sequence[TokenRow], before: Exposures | None) -> None:
        """Look for the same canaries in another form from here on.

        Args:
            rows: The canaries, in the same order.
            before: What was fed of them up to now.
        """
        self._keep_form()
        self._rows, self._looked_for, self._counts = rows, _looked_for(rows), ()
        self._before = Exposures.none(len(rows)) if before is None else before
        self._n_batches = self._longest_row = 0

    def step_done(self, step: int | None = None) -> None:
        """The batches so far belong to optimizer steps that are done.

        Args:
            step: Their number, where the training loop counts them.
        """
        self._version = self._versions()
        self._commit(step)

    def notice_step(self) -> None:
        """Count what is due if the weights have moved since the last batch."""
        if self._moved():
            self._commit(None)

    def settle(self) -> None:
        """Count what is due before an audit: batches whose optimizer step was done since."""
        # Whoever writes weights past autograd's counters, by hand or in an engine, leaves their values.
        sample = self._sampled()
        is_same = len(sample) == len(self._sample) and all(map(torch.equal, sample, self._sample))
        is_unnoticed = not self._has_noticed and not (sample and is_same)
        if self._moved() or is_unnoticed:
            self._commit(None)
        self._sample, self._has_noticed = sample, False

    def exposures(self) -> Exposures:
        """What this process was fed in steps that are done; waits for the device."""
        now = Exposures.none(len(self._rows))
        if self._counts:
            now = of_pairs(
                [
                    _exposures(counts.table, counts).select(looked_for.row_of)
                    for counts, looked_for in zip(self._counts, self._looked_for, strict=True)
                ]
            )
        return add_exposures(
            [
                self._before,
                replace(
                    now,
                    n_batches=self._n_batches,
                    longest_row=self._longest_row,
                    problem=self._problem,
                ),
            ]
        )

    @property
    def is_left_padded(self) -> bool:
        """Whether a row of any batch began with padding; waits for the device."""
        self._was_left_padded |= any(bool(counts.is_left_padded) for counts in self._counts)
        return self._was_left_padded

    @property
    def is_shifted(self) -> bool:
        """Whether a canary was fed with `position_ids` that do not count from 0; waits for the device."""
        self._was_shifted |= any(bool(counts.is_shifted) for counts in self._counts)
        return self._was_shifted

    def look(self, inputs: Mapping[str, Any]) -> None:
        """Count the canaries in one batch.

        Args:
            inputs: What the model is called with, by name.
        """
        if self._moved():
            self._commit(None)
        ids = _matrix(inputs.get("input_ids"))
        if ids is None:
            self._problem = self._problem or NO_TOKEN_IDS
            return
        if not self._counts or self._counts[0].device != ids.device:
            self._move_to(ids.device)
        self._n_batches += 1
        self._longest_row = max(self._longest_row, ids.shape[1])
        self.further_inputs |= _further(inputs)
        self._is_pending = True
        mask, positions = _like(inputs.get("attention_mask"), ids), _like(inputs.get("position_ids"), ids)
        for counts in self._counts:
            counts.add(ids.long(), mask, positions)

    def _keep_form(self) -> None:
        """Remember the form of the batches, which the counts that go now have seen."""
        self._was_left_padded, self._was_shifted = self.is_left_padded, self.is_shifted

    def _move_to(self, device: torch.device) -> None:
        self._keep_form()
        if self._counts:  # the loop has moved the model
            self._before = self.exposures()
            self._n_batches, self._longest_row = 0, 0
        self._counts = tuple(_Counts.empty(each.table, device) for each in self._looked_for)

    def _versions(self) -> int:
        try:
            return sum(parameter._version for parameter in self._parameters)
        except RuntimeError:  # tensors of the inference mode have no counter
            return 0

    def _moved(self) -> bool:
        """Whether the weights were written to since this was asked last."""
        version = self._versions()
        is_moved = self._is_stepped or version != self._version
        self._version, self._is_stepped = version, False
        return is_moved

    def _sampled(self) -> list[Tensor]:
        """Some values of some weights that are trained; none where they are held in pieces or elsewhere."""
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        if any(
            hasattr(p, "device_mesh") or hasattr(p, "ds_id") or p.is_meta or not p.numel() for p in trained
        ):
            return []
        chosen = trained[:: max(1, len(trained) // _N_SAMPLED)]
        return [parameter.detach().flatten()[:_N_VALUES].clone() for parameter in chosen]

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has made a step; fused ones leave autograd's counters as they are."""
        own = set(map(id, self._parameters))
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"][:1]):
            self._is_stepped = True

    def _commit(self, step: int | None) -> None:
        if step is not None:
            self.n_steps = self._first_step + step
        elif self._is_pending:
            self.n_steps += 1
        if self._is_pending:
            for counts in self._counts:
                counts.commit(self.n_steps)
        self._has_noticed |= self._is_pending
        self._is_pending = False

    def _fail(self, error: Exception) -> None:
        """Looking must never end a training: what was not looked at is unknown."""
        self._problem = f"looking at a batch failed ({describe_error(error)})"
        log_error(logger, "Batches cannot be looked at any more (%s).", error=error)
        self.unwatch()


class _Hook:
    """The forward pre-hook: looks at what goes into a module, and changes nothing.

    Copies of the module, by `deepcopy` or pickle, are not the one in training: they get none.
    """

    def __init__(self, owner: SeenCanaries) -> None:
        # The model may live longer than the audit.
        self._owner = weakref.ref(owner)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Inside a compiled graph there is no looking; what is compiled is watched from outside.
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        owner = self._owner()
        if owner is None:
            return
        is_strict = torch.are_deterministic_algorithms_enabled()
        warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            torch.use_deterministic_algorithms(False)  # sums of integers are the same in any order
            with torch.no_grad():
                owner.look(_named(args, kwargs))
        except Exception as error:
            owner._fail(error)
        finally:
            torch.use_deterministic_algorithms(is_strict, warn_only=warns_only)

    def __deepcopy__(self, memo: object) -> Any:
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        # A function that does nothing and can be loaded where this package is not.
        return getattr, (nullcontext(), "__exit__")


def _hook_optimizers(seen: SeenCanaries) -> Callable[[], None]:
    """Have every optimizer of this process say when it has made a step; returns what undoes that."""
    found = weakref.ref(seen)

    def note(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        owner = found()
        if owner is not None:
            owner.note_step(optimizer)

    return register_optimizer_step_post_hook(note).remove


def _together(*undo: Callable[[], None]) -> Callable[[], None]:
    def all_of_them() -> None:
        for each in undo:
            each()

    return all_of_them


def _hook(module: nn.Module, hook: _Hook) -> Callable[[], None]:
    """Have the hook called with what goes into a module; returns what undoes that."""
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        return module.register_forward_pre_hook(hook, with_kwargs=True).remove

    # `model.compile()` has compiled the hooks with the rest: those that come later would not be called.
    def watched(*args: Any, **kwargs: Any) -> Any:
        hook(module, args, kwargs)
        return compiled(*args, **kwargs)

    module._compiled_call_impl = watched

    def undo() -> None:
        if module._compiled_call_impl is watched:
            module._compiled_call_impl = compiled

    return undo


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with, by name; token ids under theirs, wherever they are."""
    named = dict(kwargs)
    for argument in args:
        if isinstance(argument, Mapping):
            named = {**argument, **named}
    if _matrix(named.get("input_ids")) is None:
        others = [value for name, value in named.items() if name not in _NO_IDS]
        found = next((value for value in (*args, *others) if _matrix(value) is not None), None)
        if found is not None:
            named["input_ids"] = found
    return named


def _matrix(value: Any) -> Int[Tensor, "batch length"] | None:
    """Token ids as rows; None if it is nothing of that kind."""
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS or value.ndim not in (1, 2):
        return None
    return value if value.ndim == 2 else value[None]


def _like(value: Any, ids: Tensor) -> Tensor | None:
    matrix = _matrix(value) if not (isinstance(value, Tensor) and value.dtype == torch.bool) else value
    return matrix if matrix is not None and matrix.shape == ids.shape else None


# Whole numbers that are no token ids.
_NO_IDS = frozenset({"attention_mask", "position_ids", "token_type_ids", "labels", "cache_position"})

# What says nothing about the record, or what is done with the logits afterwards.
_OTHER_ARGUMENTS = frozenset(
    {
        *("input_ids", "attention_mask", "labels", "shift_labels", "num_items_in_batch"),
        *("completion_mask", "assistant_masks", "logits_to_keep", "cache_position", "seq_idx"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
)


def _further(inputs: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(
        name for name, value in inputs.items() if isinstance(value, Tensor) and name not in _OTHER_ARGUMENTS
    )


@dataclass(eq=False)
class _Counts:
    """The tables and sums on the device of the batches.

    Attributes:
        pending: Times that each canary was in batches whose step is not done, with one cell to spare.
        n_times: Times that it was in batches before.
        last_step: Step of the last one; -1 for none.
        is_fed: Whether each window was in a batch before, with one cell to spare.
        is_pending_fed: Whether it was in one whose step is not done.
        is_left_padded: Whether any row began with padding.
        is_shifted: Whether positions were given to a whole record that do not count from its start.
    """

    table: WindowTable
    device: torch.device
    hashes: Tensor
    owners: Tensor
    keys: Tensor
    n_windows: Tensor
    sums: Tensor
    row_hashes: Tensor
    row_owners: Tensor
    pending: Tensor
    n_times: Tensor
    last_step: Tensor
    is_fed: Tensor
    is_pending_fed: Tensor
    is_left_padded: Tensor
    is_shifted: Tensor
    starts: Tensor
    powers: Tensor
    inverse_powers: Tensor

    @classmethod
    def empty(cls, table: WindowTable, device: torch.device) -> _Counts:
        n = len(table.n_windows)

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        def with_spare(array: np.ndarray, spare: int) -> Tensor:
            return on_device(np.append(array, spare))

        none = torch.zeros(n + 1, dtype=torch.int64, device=device)
        return cls(
            table=table,
            device=device,
            hashes=on_device(table.hashes),
            owners=with_spare(table.owners, n),
            keys=with_spare(table.keys, 0),
            # The spare canary never has as many windows as this.
            n_windows=with_spare(np.where(table.n_windows == 0, 2**62, table.n_windows), 2**62),
            sums=with_spare(table.sums, 0),
            row_hashes=on_device(table.row_hashes),
            row_owners=with_spare(table.row_owners, n),
            pending=none.clone(),
            n_times=none.clone(),
            last_step=torch.full_like(none, NEVER),
            is_fed=torch.zeros(len(table.hashes) + 1, dtype=torch.bool, device=device),
            is_pending_fed=torch.zeros(len(table.hashes) + 1, dtype=torch.bool, device=device),
            is_left_padded=torch.zeros((), dtype=torch.bool, device=device),
            is_shifted=torch.zeros((), dtype=torch.bool, device=device),
            starts=with_spare(table.starts, 0),
            powers=on_device(powers(0)[0]),
            inverse_powers=on_device(powers(0)[1]),
        )

    def add(self, ids: Int64[Tensor, "batch length"], mask: Tensor | None, positions: Tensor | None) -> None:
        """Count one batch."""
        n_rows, length = ids.shape
        if length == 0:
            return
        if len(self.powers) < length:
            both = powers(2 * length)
            self.powers, self.inverse_powers = (torch.from_numpy(each).to(self.device) for each in both)
        sums = nn.functional.pad((mixed(ids) * self.powers[:length]).cumsum(1), (1, 0))
        if mask is not None:
            self.is_left_padded |= (mask[:, 0] == 0).any()
        if length >= WINDOW and len(self.hashes):
            n_starts = length - WINDOW + 1
            hashes = (sums[:, WINDOW:] - sums[:, :-WINDOW]) * self.inverse_powers[:n_starts]
            self._add_windows(hashes, n_rows, None if positions is None else positions[:, :n_starts])
        if len(self.row_hashes):
            self._add_rows(ids, sums, mask, positions)

    def commit(self, step: int) -> None:
        """What was counted belongs to a step that is done."""
        self.n_times += self.pending
        self.last_step.masked_fill_(self.pending > 0, step)
        self.pending.zero_()
        self.is_fed |= self.is_pending_fed
        self.is_pending_fed.zero_()

    def _add_windows(
        self, hashes: Int64[Tensor, "batch n_starts"], n_rows: int, positions: Tensor | None
    ) -> None:
        n_cells = len(self.pending)
        found = _found(hashes, self.hashes)
        if positions is not None:
            # Positions that count on from the start of the row are those that a row without any has.
            is_own = (positions != torch.arange(positions.shape[1], device=self.device)).any(1, keepdim=True)
            is_shifted = is_own & (found < len(self.hashes)) & (positions != self.starts[found])
        self.is_pending_fed.index_fill_(0, found.flatten(), True)
        cells = (self.owners[found] + n_cells * torch.arange(n_rows, device=self.device)[:, None]).flatten()
        counts = torch.zeros(n_rows * n_cells, dtype=torch.int64, device=self.device)
        sums = counts.clone()
        counts.scatter_add_(0, cells, torch.ones_like(cells))
        sums.scatter_add_(0, cells, self.keys[found].flatten())
        counts, sums = counts.view(n_rows, n_cells), sums.view(n_rows, n_cells)
        # A row may hold a record more than once: all its windows, equally often.
        times = counts // self.n_windows
        is_whole = (times > 0) & (counts == times * self.n_windows) & (sums == times * self.sums)
        self.pending += (times * is_whole).sum(0)
        if positions is not None:
            shifts = torch.zeros(n_rows * n_cells, dtype=torch.int64, device=self.device)
            shifts.scatter_add_(0, cells, is_shifted.flatten().long())
            self.is_shifted |= (is_whole & (shifts.view(n_rows, n_cells) > 0)).any()

    def _add_rows(
        self,
        ids: Tensor,
        sums: Int64[Tensor, "batch length_plus_1"],
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        is_first, is_last = _record_ends(ids, mask, positions)
        at = torch.arange(ids.shape[1], device=self.device)
        starts = torch.where(is_first, at, 0).cummax(1).values
        hashes = (sums[:, 1:] - sums.gather(1, starts)) * self.inverse_powers[starts]
        found = _found(hashes, self.row_hashes)
        owners = torch.where(is_last, self.row_owners[found], len(self.pending) - 1).flatten()
        self.pending.scatter_add_(0, owners, torch.ones_like(owners))


def _found(hashes: Int64[Tensor, " *shape"], table: Int64[Tensor, " n"]) -> Int64[Tensor, " *shape"]:
    """Index of each hash in a sorted table; the table's length where it is not in it."""
    at = torch.searchsorted(table, hashes)
    inside = at.clamp(max=len(table) - 1)
    return torch.where(table[inside] == hashes, inside, len(table))


def _record_ends(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None
) -> tuple[Bool[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Where in the rows a record may begin, and where one may end."""
    is_first = torch.zeros_like(ids, dtype=torch.bool)
    is_first[:, 0] = True
    if mask is not None:
        is_attended = mask != 0
        is_first[:, 1:] |= is_attended[:, 1:] & ~is_attended[:, :-1]
    else:
        # Without a mask, padding shows as a run of one token to the end.
        is_tail = (ids == ids[:, -1:]).long().flip(1).cummin(1).values.flip(1) == 1
        is_attended = ~is_tail
    if positions is not None:
        is_first |= positions == 0
    is_last = nn.functional.pad(is_first[:, 1:], (0, 1), value=True)
    is_last = is_last | nn.functional.pad(~is_attended[:, 1:], (0, 1), value=True)
    return is_first, is_last & (is_attended if mask is not None else torch.ones_like(is_attended))


def _exposures(table: WindowTable, counts: _Counts) -> Exposures:
    n_times = counts.n_times[:-1].cpu().numpy()
    share, cut_at = _coverage(table, counts.is_fed[:-1].cpu().numpy())
    has_windows = table.n_windows > 0
    return Exposures(
        n_times=n_times,
        last_step=counts.last_step[:-1].cpu().numpy(),
        share=np.where(has_windows & (n_times == 0), share, n_times > 0).astype(np.float64),
        cut_at=np.where(n_times == 0, cut_at, NEVER),
    )


def _coverage(
    table: WindowTable, is_fed: Bool[np.ndarray, " n_windows"]
) -> tuple[np.ndarray, Int64[np.ndarray, " n_canaries"]]:
    """Share of each record's tokens that was fed, and where it ends if its start alone was fed."""
    n_canaries = len(table.n_windows)
    first = np.concatenate([[0], np.cumsum(table.n_tokens)])
    tokens = (first[table.owners] + table.starts)[:, None] + np.arange(WINDOW)
    is_in_window, is_covered = (np.zeros(first[-1], dtype=np.bool_) for _ in range(2))
    is_in_window[tokens.ravel()] = True
    is_covered[tokens[is_fed].ravel()] = True
    share, cut_at = np.zeros(n_canaries), np.full(n_canaries, NEVER, dtype=np.int64)
    for i in np.unique(table.owners[is_fed]):
        own = is_in_window[first[i] : first[i + 1]]
        covered = is_covered[first[i] : first[i + 1]][own]
        share[i] = covered.mean()
        n_covered = int(covered.sum())
        if n_covered < len(covered) and covered[:n_covered].all():
            cut_at[i] = np.flatnonzero(own)[n_covered - 1] + 1
    return share, cut_at
