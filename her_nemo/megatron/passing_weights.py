"""Weights that are in memory only while they are used, so that one matrix, not one layer, bounds what a proof holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

BLOCK_NUMBERS = 2**23
Read = Callable[[str, int, int], torch.Tensor]


@torch.no_grad()
def read_when_used(module: torch.nn.Module, read: Read, device: torch.device | str = "cpu") -> None:
    """From now on each part of `module` reads its own parameters when its forward begins, and drops them at its end.

    Between uses a parameter has its shape and no memory. Parameters become fp32 and frozen.

    Args:
        module: anything whose parts compute with no parameters but their own.
        read: (parameter's name in `module`, first row, end row) -> these rows, any dtype.
        device: where the parameters are while they are used.
    """
    for place, part in module.named_modules():
        shapes = {name: parameter.shape for name, parameter in part.named_parameters(recurse=False)}
        if not shapes:
            continue
        _drop(part, shapes)
        prefix = f"{place}." if place else ""

        def take(part: torch.nn.Module, _: Any, shapes: Any = shapes, prefix: str = prefix) -> None:
            for name, shape in shapes.items():
                held = torch.empty(shape, dtype=torch.float32, device=device)
                for start, stop in row_blocks(shape):
                    held[start:stop] = _checked(read(prefix + name, start, stop), held[start:stop], prefix + name)
                setattr(part, name, torch.nn.Parameter(held, requires_grad=False))

        def leave(part: torch.nn.Module, *_: Any, shapes: Any = shapes) -> None:
            _drop(part, shapes)

        part.register_forward_pre_hook(take)
        part.register_forward_hook(leave)


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """[start, stop) of rows, about BLOCK_NUMBERS numbers each, that make up a tensor of this shape."""
    width = torch.Size(shape[1:]).numel()
    step = max(1, BLOCK_NUMBERS // width)
    for start in range(0, shape[0], step):
        yield start, min(shape[0], start + step)


def _drop(part: torch.nn.Module, shapes: dict[str, torch.Size]) -> None:
    for name, shape in shapes.items():
        setattr(part, name, torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))


def _checked(rows: torch.Tensor, place: torch.Tensor, name: str) -> torch.Tensor:
    # Assigning would spread a row of another width over all of them.
    if rows.shape != place.shape:
        raise RuntimeError(f"{name}: {tuple(rows.shape)} read for {tuple(place.shape)}")
    return rows
