"""A checksum of named tensors that sender and receiver compute alike, wherever the bytes lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 22


@torch.no_grad()
def tensor_checksum(tensor: Tensor) -> int:
    """Sum of words and sum of words times their places, modulo 2^64 (after Fletcher 1982): a changed, moved or
    missing word shows. Computed on the tensor's own device."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = data.view(torch.int32) if data.numel() % 4 == 0 else data
    plain = placed = 0
    for begin in range(0, words.numel(), _CHUNK):
        part = words[begin : begin + _CHUNK].to(torch.int64)
        places = torch.arange(begin + 1, begin + 1 + part.numel(), device=part.device)
        plain += int(part.sum())
        placed += int((part * places).sum())  # wraps around, alike on both sides
    return (plain * 0x9E3779B1 + placed) % 2**64


class Checksum:
    """The checksum of a set of named tensors, in whatever order they come."""

    def __init__(self) -> None:
        self._sum = 0
        self.tensors = 0

    def add(self, name: str, tensor: Tensor) -> None:
        said = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{tensor_checksum(tensor)}"
        self._sum ^= int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big")
        self.tensors += 1

    def update(self, named: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in named:
            self.add(name, tensor)

    @property
    def text(self) -> str:
        """Sixteen hex digits and the number of tensors."""
        return f"{self._sum:016x}/{self.tensors}"
