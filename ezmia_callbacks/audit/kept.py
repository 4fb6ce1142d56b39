"""The weights of one moment: what they are, whether they can be put back whole, and how."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ezmia_callbacks.audit.imprint import Imprint, named_tensors
from ezmia_callbacks.audit.weight_files import Form, as_form, of_form, read_tensors
from ezmia_callbacks.errors import AuditError, ConfigurationError
from ezmia_callbacks.scoring.checksums import checksums, own_part
from ezmia_callbacks.typed_rows import parse_json, read_mapping, read_value

__all__: list[str] = []


# As `KeptWeights` names them: never a path, which could lead out of the folder.
_FILE = re.compile(r"[0-9]+-[0-9]+-[0-9]+\.safetensors")


@dataclass(frozen=True)
class _Row:
    """What is written beside the files."""

    run_id: str
    step: int
    is_everybodys: bool
    checksums: Mapping[str, int]
    adapters: str
    forms: Mapping[str, tuple[str, tuple[int, ...]]]
    shared: tuple[str, ...]
    sample: tuple[float, ...]
    files: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, eq=False)
class Kept:
    """Weights of one moment, in memory or in files.

    Attributes:
        step: Optimizer steps that they had seen.
        is_everybodys: Whether all processes held the same ones, so that the main one keeps them for all.
        imprint: All weights of that moment, also those that were frozen and are not kept.
        forms: Type and shape of each tensor that this process keeps, by name.
        sample: Log-probabilities of some tokens under the model of that moment, nats.
        files: Names of the files that hold them; none in memory.
        tensors: The tensors; None if they are in files alone.
        run_id: Name of the run that kept them.
        shared: Of a model in pieces, names of the tensors that all processes held alike: the main one keeps
            them for all.
        late: Tensors that were frozen at that moment, and still were the same when they began to be trained.
    """

    step: int
    is_everybodys: bool
    imprint: Imprint
    forms: Mapping[str, Form]
    sample: tuple[float, ...] = ()
    files: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] | None = None
    run_id: str = ""
    shared: tuple[str, ...] = ()
    late: dict[str, Tensor] = field(default_factory=dict)

    def lacks(self, model: nn.Module, present: Imprint) -> str:
        """Why these weights cannot be put back whole into a model; empty if they can.

        Args:
            model: The model.
            present: Its weights now.
        """
        then, now = self.imprint.checksums.keys(), present.checksums.keys()
        if then != now:
            return (
                f"the model had {len(then)} tensors then and has {len(now)} now (first that differs: "
                f"{min(then ^ now)})"
            )
        forms = {name: Form.of(tensor) for name, tensor in named_tensors(model)}
        if other := sorted(name for name, form in self.forms.items() if forms[name] != form):
            return f"{len(other)} tensors have another shape or type now (first: {other[0]})"
        kept = {*self.forms, *self.late, *self.shared}
        if moved := [name for name in self.imprint.differing(present) if name not in kept]:
            return f"{len(moved)} tensors that were frozen then are others now (first: {moved[0]})"
        return ""

    def to_json(self) -> str:
        """What is written beside the files."""
        content = {
            "run_id": self.run_id,
            "step": self.step,
            "is_everybodys": self.is_everybodys,
            "checksums": dict(self.imprint.checksums),
            "adapters": self.imprint.adapters,
            "forms": self.forms,
            "shared": self.shared,
            "sample": self.sample,
            "files": self.files,
        }
        return json.dumps({**content, "sha256": _digest(content)})

    @classmethod
    def from_json(cls, text: str) -> Kept:
        """What `to_json` wrote.

        Raises:
            ConfigurationError: if it is damaged, or names files of other folders.
        """
        content = read_mapping(parse_json(text))
        row = read_value(_Row, content)
        if row.sha256 != _digest({name: value for name, value in content.items() if name != "sha256"}):
            raise ConfigurationError("it is not what was written")
        if outside := [name for name in row.files if not _FILE.fullmatch(name)]:
            raise ConfigurationError(f"{outside[0]!r:.80} is no file of kept weights")
        return cls(
            step=row.step,
            is_everybodys=row.is_everybodys,
            imprint=Imprint(row.checksums, row.adapters),
            forms={name: Form(*form) for name, form in row.forms.items()},
            sample=row.sample,
            files=row.files,
            run_id=row.run_id,
            shared=row.shared,
        )

    def put_back(self, model: nn.Module, folder: Path | None) -> None:
        """Write these weights into a model, in place; all of them, or none.

        Args:
            model: The model.
            folder: Folder of the files.

        Raises:
            AuditError: if they cannot be put back whole, or the files are damaged: the model stays as it is.
        """
        if reason := self.lacks(model, Imprint.of(model)):
            raise AuditError(f"The weights of step {self.step} cannot be put back whole: {reason}.")
        present = dict(named_tensors(model))

        def put(name: str, tensor: Tensor) -> None:
            target = own_part(present[name])
            _without_repetitions(target).copy_(_without_repetitions(as_form(tensor, target), like=target))

        with torch.no_grad():
            if self.tensors is None and folder is not None:
                # Before anything is written: a checkpoint that was rewritten in place damages its other name.
                self._check_files(folder)
                read_tensors([folder / name for name in self.files], self.forms, put)
            for name, tensor in {**(self.tensors or {}), **self.late}.items():
                put(name, tensor)

    def check(self, model: nn.Module) -> None:
        """See that a model holds these weights, to the bit.

        Raises:
            AuditError: if it does not.
        """
        if differing := self.imprint.differing(Imprint.of(model)):
            raise AuditError(
                f"{len(differing)} tensors are not those of step {self.step} although they were put back "
                f"(first: {differing[0]}): something else writes into the model, which now holds the weights "
                "of no step at all."
            )

    def _check_files(self, folder: Path) -> None:
        differing = []

        def compare(name: str, tensor: Tensor) -> None:
            if checksums({name: of_form(tensor, self.forms[name])})[name] != self.imprint.checksums[name]:
                differing.append(name)

        read_tensors([folder / name for name in self.files], self.forms, compare)
        if differing:
            raise AuditError(
                f"The kept weights of step {self.step} are damaged: {len(differing)} tensors are not what "
                f"they were (first: {differing[0]})."
            )


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _without_repetitions(tensor: Tensor, *, like: Tensor | None = None) -> Tensor:
    """A tensor without what is the same memory again (`expand`), which cannot be written to."""
    like = tensor if like is None else like
    for dim, (size, stride) in enumerate(zip(like.shape, like.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
