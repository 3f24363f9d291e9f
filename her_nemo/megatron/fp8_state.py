"""What delayed FP8 scaling remembers of past steps, saved and restored as plain tensors.

Transformer Engine's own way is a pickle inside the checkpoint, which nothing here unpickles. Each of its modules keeps,
for its forward and its backward, the scales in use and the largest values of the last steps; they are of this rank.
"""

from __future__ import annotations

from typing import Any

import torch

_SIDES, _KINDS = ("scaling_fwd", "scaling_bwd"), ("scale", "amax_history")
_FORWARD_TENSORS = 3  # a matrix product has three forward: input, weight, output


def collect(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`module name/side/kind` -> tensor, of every module that has run with delayed scaling; empty without it."""
    found: dict[str, torch.Tensor] = {}
    for name, child in module.named_modules():
        for side in _SIDES:
            kept = (getattr(child, "fp8_meta", None) or {}).get(side)
            # The other recipes keep scales of the tensors at hand, which are no state.
            if getattr(kept, "amax_history", None) is not None:
                for kind in _KINDS:
                    found[f"{name}/{side}/{kind}"] = getattr(kept, kind).detach().cpu().clone()
    return found


@torch.no_grad()
def restore(module: torch.nn.Module, saved: dict[str, torch.Tensor], recipe: Any) -> int:
    """Put back what `collect` gave, before the first forward; how many modules took it.

    `recipe` is Transformer Engine's. A module whose history has another length (another fp8_amax_history_len) keeps a
    fresh one.
    """
    taken = 0
    for name, child in module.named_modules():
        mine = {key: saved[key] for side in _SIDES for kind in _KINDS if (key := f"{name}/{side}/{kind}") in saved}
        if not mine:
            continue
        child.fp8_meta["num_gemms"] = mine[f"{name}/scaling_fwd/scale"].numel() // _FORWARD_TENSORS
        child.fp8_meta["recipe"] = recipe
        child.init_fp8_meta_tensors(recipe)
        targets = {key: getattr(child.fp8_meta[key.split("/")[1]], key.split("/")[2]) for key in mine}
        if all(targets[key].shape == mine[key].shape for key in mine):
            for key, value in mine.items():
                targets[key].copy_(value)
            taken += 1
    return taken
