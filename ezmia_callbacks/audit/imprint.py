"""What a model's weights were at one moment: a checksum of each, by which they are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from ezmia_callbacks.audit.zero import held_part
from ezmia_callbacks.distributed import gather, n_processes
from ezmia_callbacks.scoring.checksums import checksums

__all__: list[str] = []

# Of a layer with adapters; public names of PEFT's.
_ADAPTER_STATE = ("merged_adapters", "active_adapters", "disable_adapters")

# What `torch.compile` puts before every name.
_COMPILED = "_orig_mod."


@dataclass(frozen=True, eq=False)
class Imprint:
    """The weights of a model at one moment: its parameters and its persistent buffers.

    Of a model in pieces, each process has the imprint of its own piece.

    Attributes:
        checksums: One number for each tensor, by its name.
        adapters: Which adapters are active, merged or switched off.
    """

    checksums: Mapping[str, int]
    adapters: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Imprint:
        """The imprint of a model as it is now; reads every weight twice, and waits for the device."""
        return cls(checksums(dict(named_tensors(model))), _adapters(model))

    @cached_property
    def digest(self) -> str:
        """One text for all of it: equal for equal weights."""
        content = (self.adapters, sorted(self.checksums.items()))
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def is_same_as(self, other: Imprint) -> bool:
        """Whether the weights are the same to the bit, on every process; each of them must call this."""
        return all(gather(self.digest == other.digest))

    def differing(self, other: Imprint) -> list[str]:
        """Names of the tensors that are others there, or are only here or only there."""
        names = self.checksums.keys() | other.checksums.keys()
        return sorted(name for name in names if self.checksums.get(name) != other.checksums.get(name))


def is_same_on_all_ranks(model: nn.Module, present: Imprint) -> bool:
    """Whether all processes hold the same parameters: seen from their values, not guessed from types.

    Buffers may differ: data-parallel training takes the main process's. Each process must call this.

    Args:
        model: The model.
        present: Its weights now.
    """
    return n_processes() == 1 or len(set(gather(_of_parameters(model, present).digest))) == 1


def alike_on_all_ranks(present: Imprint, names: Iterable[str]) -> set[str]:
    """Which of the named tensors every process holds with the same bits; each of them must call this.

    Args:
        present: The weights now.
        names: Names of tensors that this process asks for; those that another one does not are not alike.
    """
    sums = gather({name: present.checksums[name] for name in names})
    return {name for name, value in sums[0].items() if all(own.get(name) == value for own in sums)}


def digest_on_all_ranks(model: nn.Module, present: Imprint) -> str:
    """One text for the weights of all processes together; each of them must call this.

    It is that of the main process where all hold the same parameters.

    Args:
        model: The model.
        present: Its weights now.
    """
    if n_processes() == 1:
        return present.digest
    found = gather((_of_parameters(model, present).digest, present.digest))
    is_same = len({parameters for parameters, _ in found}) == 1
    return found[0][1] if is_same else digest_of_parts([whole for _, whole in found])


def digest_of_parts(digests: Iterable[str]) -> str:
    """One text for the parts of a model that several processes hold.

    Args:
        digests: Digest of each one's imprint, by rank.
    """
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _of_parameters(model: nn.Module, present: Imprint) -> Imprint:
    names = {name for name, _ in named_tensors(model)} - {name for name, _ in named_buffers(model)}
    return Imprint({name: present.checksums[name] for name in names})


def _adapters(model: nn.Module) -> str:
    """What PEFT's layers say of their adapters, as one text; empty without any."""
    states = {
        repr([getattr(module, name, None) for name in _ADAPTER_STATE])
        for module in model.modules()
        if hasattr(module, _ADAPTER_STATE[0])
    }
    return " ".join(sorted(states))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters and persistent buffers, each once, by the name that it has uncompiled."""
    for name, parameter in model.named_parameters():
        yield name.replace(_COMPILED, ""), held_part(parameter)
    yield from named_buffers(model)


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's persistent buffers."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}".lstrip(".").replace(_COMPILED, ""), buffer
