"""The weights of the last audit within the budget, kept so that they can be put back, whole, and checked."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ezmia_callbacks.audit.imprint import (
    Imprint,
    alike_on_all_ranks,
    digest_of_parts,
    is_same_on_all_ranks,
    named_tensors,
)
from ezmia_callbacks.audit.kept import Kept
from ezmia_callbacks.audit.masters import masters
from ezmia_callbacks.audit.weight_files import (
    Background,
    Form,
    forms_in,
    has_memory_for,
    write_tensors,
)
from ezmia_callbacks.audit.zero import drop_gathered, held_part
from ezmia_callbacks.distributed import (
    broadcast_from_main,
    broadcast_tensors_from_main,
    gather,
    is_main_process,
    on_all_ranks,
    on_all_ranks_in_turns,
    rank,
)
from ezmia_callbacks.errors import AuditError
from ezmia_callbacks.files import copy_private, private_folder, write_atomically
from ezmia_callbacks.scoring.checksums import checksums, own_part

__all__: list[str] = []

# What is smaller than this stays in memory, too: adapters are.
_SMALL = 64 * 2**20  # bytes
# A buffer of whole numbers that is larger holds quantized weights.
_LARGE_BUFFER = 2**20  # values


class KeptWeights:
    """Everything of a model that has changed since the run began, at one point of the training.

    That is every parameter that is trained or ever was, every persistent buffer, and whatever else is seen to
    have moved. Held in files if a folder is given, so that it survives the process and costs no memory; else
    in CPU memory. Files are written in the background, one at a time, while training goes on.

    Where the trainer writes a checkpoint of the very weights, `expect_checkpoint` and `pin` give its files a
    second name (a hard link) instead of writing all once more; they stay when the trainer deletes its own.

    What all of several processes hold alike the main one keeps for all: the whole model, or what tensor
    parallelism does not divide. Of a model in pieces each keeps its own part. All methods but
    `unwatch`, `wait` and `discard` must be called by all.

    Args:
        folder: Folder to hold the weights of all processes; None for memory.

    Attributes:
        run_id: Name of the run that keeps them, set once it has one: those of another are not taken for its
            own.
    """

    def __init__(self, folder: Path | None) -> None:
        self.run_id = ""
        self._folder = folder
        self._index = None if folder is None else folder / f"index-{rank()}.json"
        self._committed: Kept | None = None
        self._pending: Kept | None = None
        self._expected: Kept | None = None
        self._can_pin = folder is not None
        self._background = Background()
        self._first: Imprint | None = None
        self._changing: set[str] = set()
        self._frozen: list[tuple[str, weakref.ref[nn.Parameter]]] = []
        self._removal: Callable[[], None] | None = None
        self._is_loaded = folder is None

    def begin(self, model: nn.Module, present: Imprint) -> None:
        """Notice from here on which weights are changed, also those that are frozen now.

        Args:
            model: The model.
            present: Its weights now.
        """
        self._first = present
        self._notice_changing(model)
        self.unwatch()
        found = weakref.ref(self)

        def notice(optimizer: object, args: object, kwargs: object) -> None:
            owner = found()
            if owner is not None:
                owner._keep_unfrozen()

        self._removal = register_optimizer_step_pre_hook(notice).remove
        # Also where nobody says that the run is over.
        weakref.finalize(self, self._removal)

    def unwatch(self) -> None:
        """Notice nothing any more."""
        if self._removal is not None:
            self._removal()
        self._removal = None

    def look(self, model: nn.Module, present: Imprint) -> str:
        """See at an audit what has changed; why what is kept cannot be put back whole any more, or empty.

        Args:
            model: The model.
            present: Its weights now.
        """
        if self._first is not None:
            self._changing.update(self._first.differing(present))
        self._notice_changing(model)
        kept = self._newest()
        reasons = gather("" if kept is None else kept.lacks(model, present))
        return next(filter(None, reasons), "")

    @property
    def exists(self) -> bool:
        """Whether there are weights to restore; those that are being written count."""
        return self._newest() is not None

    @property
    def step(self) -> int | None:
        """Optimizer steps that the kept weights had seen; None if there are none.

        Raises:
            AuditError: if the file is damaged.
        """
        kept = self._newest()
        return None if kept is None else kept.step

    def save(
        self, model: nn.Module, *, step: int, present: Imprint | None = None, sample: Sequence[float] = ()
    ) -> None:
        """Keep the model's present weights; what was kept before is lost only once this succeeded.

        They are copied at once and written in the background: `settle` waits for that.

        Args:
            model: The model.
            step: Optimizer steps done.
            present: Its weights now; None to look at them here.
            sample: Log-probabilities of some tokens under it, for whoever checks what was put back.

        Raises:
            OSError: if what was kept last could not be written.
        """
        self.settle()
        self._expected = None
        present = Imprint.of(model) if present is None else present
        tensors = self._to_keep(model)
        is_everybodys = is_same_on_all_ranks(model, present)
        is_in_background = True
        if is_everybodys and not is_main_process():
            self._forget()
        else:
            shared = set() if is_everybodys else alike_on_all_ranks(present, tensors.keys())
            if not is_main_process():
                tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
            kept = Kept(
                step=step,
                is_everybodys=is_everybodys,
                imprint=present,
                forms={name: Form.of(tensor) for name, tensor in tensors.items()},
                shared=tuple(sorted(shared)),
                sample=tuple(sample),
                run_id=self.run_id,
            )
            is_in_background = self._keep(kept, tensors)
        if not all(gather(is_in_background)):
            # Not `settle`: the other processes may have the memory, or nothing to write.
            on_all_ranks_in_turns(self.wait)

    def _keep(self, kept: Kept, tensors: Mapping[str, Tensor]) -> bool:
        """Begin to write tensors; False if training has to wait for it, without room for a copy of them."""
        if self._folder is None:
            self._committed = replace(kept, tensors=_copies(tensors))
            return True
        n_bytes = _n_bytes(tensors)
        is_in_background = has_memory_for(n_bytes)
        copies = _copies(tensors) if is_in_background else tensors
        (name,) = self._new_names(kept.step, 1)
        are_in_memory = is_in_background and n_bytes <= _SMALL
        self._pending = replace(kept, files=(name,), tensors=copies if are_in_memory else None)
        folder, pending = self._folder, self._pending

        def write() -> None:
            write_tensors(private_folder(folder) / name, copies)
            if pending.is_everybodys:
                self._commit(pending)

        self._background.start(write)
        return is_in_background

    def settle(self) -> None:
        """Wait for what is being written; from here on it is what is kept.

        Raises:
            OSError: if it could not be written: then what was kept before still is.
            AuditError: if another process could not write its part.
        """
        pending = self._pending
        try:
            on_all_ranks_in_turns(self._background.wait)
        except Exception:
            self._pending = None
            if pending is not None and self._folder is not None:
                for name in pending.files:
                    (self._folder / name).unlink(missing_ok=True)
            raise
        self._pending = None
        # Only once all have written theirs, so that no mixture of old and new parts is left.
        if pending is not None:
            if not pending.is_everybodys:
                self._commit(pending)
            self._committed, self._is_loaded = pending, True

    def expect_checkpoint(
        self, model: nn.Module, *, step: int, present: Imprint, sample: Sequence[float] = ()
    ) -> None:
        """Keep the model's present weights by the checkpoint that the trainer is about to write of them.

        `pin` must follow, or `save_expected` before the next step. Where no checkpoint could stand for them
        they are saved at once, as `save` does it.

        Args:
            model: The model.
            step: Optimizer steps done.
            present: Its weights now.
            sample: Log-probabilities of some tokens under it.

        Raises:
            OSError: if what was kept last could not be written.
        """
        # Whether it could be done before is known to the main process alone.
        if not broadcast_from_main(self._can_pin) or not is_same_on_all_ranks(model, present):
            self.save(model, step=step, present=present, sample=sample)
            return
        self.settle()
        self._expected = Kept(step, True, present, {}, tuple(sample), run_id=self.run_id)

    def save_expected(self, model: nn.Module) -> None:
        """Save what a checkpoint was expected to hold, if none has come; before the model changes.

        Raises:
            OSError: if it cannot be written.
            AuditError: if the model has changed already.
        """
        expected, self._expected = self._expected, None
        if expected is None:
            return
        present = Imprint.of(model)
        if not expected.imprint.is_same_as(present):
            raise AuditError("the weights were changed before the trainer wrote its checkpoint")
        self.save(model, step=expected.step, present=present, sample=expected.sample)

    def pin(self, model: nn.Module, checkpoint: Path) -> None:
        """Keep the expected weights by the files of a checkpoint, if it has them all; else save them.

        Args:
            model: The model, unchanged since `expect_checkpoint`.
            checkpoint: Folder of the checkpoint, of which it was seen that its weights are the expected ones.

        Raises:
            OSError: if they can neither be linked nor written.
            AuditError: if the model has changed already.
        """
        expected, folder = self._expected, self._folder
        if expected is None or folder is None:
            return
        files = sorted(checkpoint.glob("*.safetensors"))
        forms = {name: form for path in files for name, form in forms_in(path).items()}
        needed = {name: Form.of(tensor) for name, tensor in self._to_keep(model).items()}
        names = self._new_names(expected.step, len(files))
        is_linked = (
            is_main_process()
            and needed.items() <= forms.items()
            and _link(files, [folder / name for name in names])
        )
        if not broadcast_from_main(is_linked):
            self._can_pin = False
            self.save_expected(model)
            return
        self._expected = None
        if not is_main_process():
            self._forget()
            return
        kept = replace(expected, files=tuple(names), forms=needed)
        self._commit(kept)
        self._committed, self._is_loaded = kept, True

    def wait(self) -> None:
        """Wait until what this process writes is on the disk; for no other process."""
        self._background.join()

    def differs(self, model: nn.Module) -> bool:
        """Whether a model's weights are others than those that this process keeps; False without any."""
        kept = self._newest()
        return kept is not None and bool(kept.imprint.differing(Imprint.of(model)))

    def relabel(self, *, step: int) -> None:
        """Count the kept weights, if any, as those of another step; for a run that starts over with them.

        Args:
            step: Optimizer steps that the kept weights shall be said to have seen.

        Raises:
            OSError: if the file cannot be written.
            AuditError: if the file is damaged.
        """
        kept = self._newest()
        if kept is None:
            return
        kept = replace(kept, step=step)
        if self._folder is not None:
            # The trainer may write its checkpoint of that step again, into the same file.
            if any((self._folder / name).stat().st_nlink > 1 for name in kept.files):
                names = self._new_names(step, len(kept.files))
                for name, new in zip(kept.files, names, strict=True):
                    copy_private(self._folder / name, self._folder / new)
                kept = replace(kept, files=tuple(names))
            self._commit(kept)
        self._committed = kept

    def discard_after(self, step: int) -> None:
        """Forget weights of a later step: they belong to a future that a resumed run will not have.

        Args:
            step: Optimizer steps that the run resumes from.

        Raises:
            AuditError: if the file is damaged.
        """
        kept = broadcast_from_main(on_all_ranks(lambda: self.step))
        if (kept or 0) > step:
            self.discard()

    def digest(self) -> str | None:
        """What `digest_on_all_ranks` said of the weights that are kept; None if there are none.

        Raises:
            AuditError: if the file is damaged, or another run's.
        """
        kept = on_all_ranks(self._newest)
        found = gather(None if kept is None else (kept.is_everybodys, kept.imprint.digest))
        if found[0] is None:
            return None
        is_everybodys, of_main = found[0]
        return of_main if is_everybodys else digest_of_parts([each[1] for each in found if each is not None])

    def restore(self, model: nn.Module, *, optimizer: Any = None) -> Kept:
        """Write the kept weights back into the model, in place, and see that they are there; returns them.

        Args:
            model: The model.
            optimizer: Its optimizer, whose own copies of the weights follow; None if it has none, or no step
                will follow.

        Raises:
            AuditError: if nothing was kept, the file is damaged, the model's weights are others now, or it
                does not hold the weights of that step afterwards.
        """
        self.settle()
        loaded = on_all_ranks(self._newest)
        known = broadcast_from_main(
            None if loaded is None else replace(loaded, tensors=None, late={}, files=())
        )
        if known is None:
            raise AuditError("There are no weights to restore: no audit within the budget kept any.")
        is_needed = is_main_process() or not known.is_everybodys
        of_optimizer = masters(optimizer, model)
        on_all_ranks_in_turns(lambda: self._put_back(loaded, model, step=known.step) if is_needed else None)
        names = known.shared
        if known.is_everybodys:
            written = set() if loaded is None else loaded.forms.keys() | loaded.late.keys()
            names = broadcast_from_main(tuple(sorted(written)))
        present = dict(named_tensors(model))
        broadcast_tensors_from_main(own_part(present[name]) for name in names)
        expected = known if known.is_everybodys or loaded is None else loaded
        on_all_ranks(lambda: expected.check(model))
        drop_gathered(model)
        for master in of_optimizer:
            master.follow()
        return known

    def forget_expected(self) -> None:
        """No checkpoint is to come any more: the run that it belonged to was broken off."""
        self._expected = None

    def discard(self) -> None:
        """Forget the kept weights and remove their files; waits for no other process."""
        self._forget()
        # Another process's part may still be there.
        if self._folder is not None:
            with suppress(OSError):
                self._folder.rmdir()

    def _forget(self) -> None:
        """Forget this process's part; the folder stays, for another may be about to write into it."""
        # Whatever could not be written: nothing is to be kept any more.
        with suppress(Exception):
            self._background.wait()
        self._committed = self._pending = self._expected = None
        self._is_loaded = True
        if self._folder is None or self._index is None:
            return
        # A training is never lost for what cannot be removed.
        with suppress(OSError):
            self._index.unlink(missing_ok=True)
            for path in self._folder.glob(f"{rank()}-*.safetensors"):
                path.unlink(missing_ok=True)

    def _newest(self) -> Kept | None:
        """What is kept, or about to be."""
        if not self._is_loaded:
            self._committed, self._is_loaded = self._load(), True
        return self._pending or self._committed

    def _load(self) -> Kept | None:
        """What an interrupted run has left."""
        if self._index is None or not self._index.exists():
            return None
        try:
            kept = Kept.from_json(self._index.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AuditError(
                f"The kept weights at {self._index} are damaged: {error}. Remove {self._folder} to go on "
                "without them: until an audit is within the budget, a stop has nothing to restore then."
            ) from error
        if kept.run_id != self.run_id:
            raise AuditError(
                f"The weights kept in {self._folder} are those of the run {kept.run_id or 'without a name'}, "
                f"not of {self.run_id or 'one without a name'}: resume in the folder of the run, or remove "
                "these."
            )
        return kept

    def _commit(self, kept: Kept) -> None:
        """Have the folder say that these are the kept weights; files of others go."""
        if self._folder is None or self._index is None:
            return
        write_atomically(self._index, kept.to_json())
        for path in self._folder.glob(f"{rank()}-*.safetensors"):
            if path.name not in kept.files:
                path.unlink(missing_ok=True)

    def _new_names(self, step: int, n_names: int) -> list[str]:
        """Names of files that are not there yet: what a killed process left is never half overwritten."""
        names = (f"{rank()}-{step}-{n}.safetensors" for n in itertools.count())
        free = (name for name in names if self._folder is None or not (self._folder / name).exists())
        return list(itertools.islice(free, n_names))

    def _to_keep(self, model: nn.Module) -> dict[str, Tensor]:
        self._notice_changing(model)
        return {name: tensor for name, tensor in named_tensors(model) if name in self._changing}

    def _notice_changing(self, model: nn.Module) -> None:
        """Note what is trained now, and what is not."""
        frozen = []
        parameters = {id(held_part(parameter)): parameter for parameter in model.parameters()}
        for name, tensor in named_tensors(model):
            parameter = parameters.get(id(tensor))
            is_quantized = not tensor.is_floating_point() and tensor.numel() > _LARGE_BUFFER
            is_trained = parameter is not None and parameter.requires_grad
            if is_trained or (parameter is None and not is_quantized):
                self._changing.add(name)
            elif parameter is not None and name not in self._changing:
                frozen.append((name, weakref.ref(parameter)))
        self._frozen = frozen

    def _keep_unfrozen(self) -> None:
        """Right before a step: what was frozen and is trained now still has the value that it had."""
        unfrozen = [
            (name, held_part(parameter))
            for name, found in self._frozen
            if (parameter := found()) is not None and parameter.requires_grad
        ]
        if not unfrozen:
            return
        names = {name for name, _ in unfrozen}
        self._changing |= names
        self._frozen = [each for each in self._frozen if each[0] not in names]
        sums = checksums(dict(unfrozen))
        copies: dict[str, Tensor] = {}
        for kept in filter(None, (self._committed, self._pending)):
            for name, tensor in unfrozen:
                if name not in kept.forms and kept.imprint.checksums.get(name) == sums[name]:
                    kept.late[name] = copies.setdefault(name, own_part(tensor).to("cpu", copy=True))

    def _put_back(self, kept: Kept | None, model: nn.Module, *, step: int) -> None:
        if kept is None or kept.step != step:
            raise AuditError(f"This process's part of the weights of step {step} was not kept.")
        kept.put_back(model, self._folder)


def _link(files: Sequence[Path], names: Sequence[Path]) -> bool:
    """Give files a second name each; False where the file system cannot."""
    try:
        for file, name in zip(files, names, strict=True):
            private_folder(name.parent)
            os.link(file, name)
    except OSError:
        for name in names:
            name.unlink(missing_ok=True)
        return False
    return bool(files)


def _n_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(own_part(tensor).numel() * own_part(tensor).element_size() for tensor in tensors.values())


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: own_part(tensor).to("cpu", copy=True) for name, tensor in tensors.items()}
