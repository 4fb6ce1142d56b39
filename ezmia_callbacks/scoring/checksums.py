"""Checksums of weights: whether a tensor holds the very bits that it held before, without a copy of them."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

__all__: list[str] = []

_WORD = 8  # bytes
_BLOCK = 1024  # words
# Odd numbers of 64 bits without a pattern, as signed ones: of the golden ratio, and of SplitMix64.
_SPREAD, _MIX = -7046029254386353131, -4658895280553007687


def own_part(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that this process holds, in its memory; else the tensor itself."""
    tensor = tensor.detach()
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """One number of 64 bits for each tensor, of its type, its shape, and all its bits in their places.

    It is the same in every process and on every device. Not a cryptographic hash: it sees what happens, not
    what somebody made in order to deceive it. Each tensor is read twice, on its own device, and all numbers
    are fetched at once.

    Args:
        tensors: The tensors, by name. Of distributed ones this process's part counts; those that have no
            values (on `meta`) get 0.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    found = dict.fromkeys(tensors, 0)
    with torch.no_grad():
        for name, tensor in tensors.items():
            part = own_part(tensor)
            if part.device.type != "meta":
                by_device[part.device][name] = _checksum(part)
        for of_device in by_device.values():
            found.update(zip(of_device, torch.stack(list(of_device.values())).tolist(), strict=True))
    return found


def _checksum(tensor: Tensor) -> Tensor:
    form = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    words = _words(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    whole = len(words) // _BLOCK * _BLOCK
    blocks, rest = words[:whole].view(-1, _BLOCK), words[whole:]
    # Sums along both sides of a table: a value that moved changes at least one of them.
    sums = (blocks.sum(dim=0), blocks.sum(dim=1), rest)
    total = torch.full((), form, dtype=torch.int64, device=words.device)
    for each in sums:
        total = _mixed(total + (_mixed(each) * _keys(each)).sum())
    return total


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as int64, (n,); zeros fill the last one up."""
    flat = tensor.contiguous().reshape(-1)
    if flat.data_ptr() % _WORD or flat.storage_offset() * flat.element_size() % _WORD:
        flat = flat.clone()
    content = flat.view(torch.uint8)
    n_whole = len(content) // _WORD * _WORD
    words = content[:n_whole].view(torch.int64)
    if n_whole == len(content):
        return words
    last = content.new_zeros(_WORD)
    last[: len(content) - n_whole] = content[n_whole:]
    return torch.cat([words, last.view(torch.int64)])


def _keys(values: Tensor) -> Tensor:
    """An odd number for each place."""
    places = torch.arange(len(values), dtype=torch.int64, device=values.device)
    return _mixed(places * _SPREAD + 1) | 1


def _mixed(values: Tensor) -> Tensor:
    """Numbers spread over all 64 bits, one to one."""
    values = (values ^ (values >> 31)) * _MIX
    return values ^ (values >> 29)
