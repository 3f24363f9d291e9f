"""megatron-core rows out of Hugging Face tensors and the reverse, through the table of spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from her_nemo.megatron.qwen3_map import Span


class Rows(Protocol):
    """Anything that gives rows of named tensors, in `out` if it is given one of their shape and dtype."""

    def dtype(self, name: str) -> torch.dtype: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...


def megatron_rows(
    held: Rows, table: Sequence[Span], start: int, stop: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows [start, stop) of a megatron-core tensor from its Hugging Face tensors.

    `out`: where to read them, of their one dtype; for sources that read into given memory.
    """
    parts = []
    for span, first, last in _overlaps(table, start, stop):
        place = () if out is None else (out[first - start : last - start],)
        parts.append(held.rows(span.name, span.start + first - span.row, span.start + last - span.row, *place))
    if out is not None:
        return out
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def hf_intervals(table: Sequence[Span], name: str, start: int, stop: int) -> list[tuple[int, int]]:
    """The megatron-core rows that are rows [start, stop) of a Hugging Face tensor, in the latter's order."""
    found: list[tuple[int, int]] = []
    for span in sorted((span for span in table if span.name == name), key=lambda span: span.start):
        first, last = max(start, span.start), min(stop, span.start + span.count)
        if first < last:
            found.append((span.row + first - span.start, span.row + last - span.start))
    return found


def hf_whole(table: Sequence[Span], name: str, whole: torch.Tensor) -> torch.Tensor:
    """A Hugging Face tensor cut out of the whole megatron-core tensor. A view where one span makes it."""
    count = sum(span.count for span in table if span.name == name)
    parts = [whole[first:last] for first, last in hf_intervals(table, name, 0, count)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _overlaps(table: Sequence[Span], start: int, stop: int) -> Iterator[tuple[Span, int, int]]:
    for span in table:
        first, last = max(start, span.row), min(stop, span.row + span.count)
        if first < last:
            yield span, first, last
