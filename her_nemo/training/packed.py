"""Dynamic batching by tokens: the rows of a rollout end to end, as many to a forward pass as fit.

A packed micro-batch is one row of tokens with `cu_seqlens`: attention, positions and predictions stay inside a sequence
(data/packing.py). What the model says of its tokens is put back in rows before any formula sees it, gradient included,
so losses and advantages know nothing of packing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from her_nemo.data.packing import pack
from her_nemo.megatron import forward, parallel
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.megatron.qwen3 import Model
from her_nemo.training.learner import LossFunction, MicroBatch

ROWS = "rows_"  # before the names of a packed micro-batch's own rows: [n, ...]


def pack_rows(rows: MicroBatch, capacity: int) -> tuple[list[MicroBatch], list[list[int]]]:
    """Rows [B, ...] of a rollout as packed micro-batches of at most `capacity` tokens, all of one length; and which
    rows each holds. Every replica gets the same number of micro-batches, for each has to make as many passes
    (collective over replicas); one may be empty.

    Raises:
        ValueError: a row is longer than `capacity`.
    """
    lengths = rows["lengths_B"].tolist()
    wanted = torch.tensor(float(len(pack(lengths, capacity))), device=rows["tokens_BS"].device)
    count = int(parallel.data_all_reduce(wanted, torch.distributed.ReduceOp.MAX))
    bins = [sorted(chosen) for chosen in pack(lengths, capacity, multiple=count)]
    length = max(sum(lengths[row] for row in chosen) for chosen in bins)
    batches: list[MicroBatch] = []
    for chosen in bins:
        index = torch.tensor(chosen, dtype=torch.long, device=rows["tokens_BS"].device)
        borders = [0]
        for row in chosen:
            borders.append(borders[-1] + lengths[row])
        # What is behind a sequence in its own row fills the packed one up: some token that stands for nothing.
        tokens = torch.cat([rows["tokens_BS"][row, : lengths[row]] for row in chosen] or [index])
        tokens = F.pad(tokens, (0, length - borders[-1]))
        if borders[-1] < length:
            borders.append(length)
        batch = {f"{ROWS}{name}": tensor[index] for name, tensor in rows.items()}
        batch["tokens_BS"] = tokens[None]
        batch["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32, device=tokens.device)
        batches.append(batch)
    return batches, bins


def unpack(found_1L: torch.Tensor, lengths: Sequence[int], size: int) -> torch.Tensor:
    """[1, L] -> [n, size]: the sequences of a packed row, 0 behind their ends. With gradient; an empty packed row gives
    an empty tensor that is still part of the graph, so that its pass has a backward like the others'."""
    total = sum(lengths)
    pieces = found_1L[0, :total].split(list(lengths)) if lengths else ()
    if not pieces:
        return found_1L[:, :1].expand(1, size)[:0]
    return torch.stack([F.pad(piece, (0, size - len(piece))) for piece in pieces])


def rows_of(outputs: TokenOutputs, batch: MicroBatch) -> tuple[TokenOutputs, MicroBatch]:
    """What was said of a packed micro-batch, and the micro-batch, as if it had not been packed.

    At a sequence's last token stands the "prediction" of the next sequence's first: no mask covers it.
    """
    rows = {name.removeprefix(ROWS): tensor for name, tensor in batch.items() if name.startswith(ROWS)}
    lengths, size = rows["lengths_B"].tolist(), rows["tokens_BS"].shape[1]

    def predictions(found_1T: torch.Tensor | None) -> torch.Tensor | None:
        return None if found_1T is None else unpack(F.pad(found_1T, (0, 1)), lengths, size)[:, :-1]

    values = outputs.values_BS
    said = TokenOutputs(
        predictions(outputs.log_probs_BT),
        predictions(outputs.entropy_BT),
        None if values is None else unpack(values, lengths, size),
    )
    return said, rows


def on_rows(objective: LossFunction) -> LossFunction:
    """A loss of rows as a loss of packed micro-batches."""

    def packed(outputs: TokenOutputs, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return objective(*rows_of(outputs, batch))

    return packed


def outputs(
    model: Model,
    batches: Sequence[MicroBatch],
    bins: Sequence[Sequence[int]],
    *,
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> dict[str, torch.Tensor]:
    """`forward.outputs` of rows that `pack_rows` packed: `log_probs_BT` (and `entropy_BT`) or `values_BS` in the order
    of the rows, fp32, 0 behind their ends. No gradients."""
    said = forward.outputs(model, batches, with_entropy=with_entropy, temperature=temperature)
    order = torch.tensor([row for chosen in bins for row in chosen], device=batches[0]["tokens_BS"].device).argsort()
    parts = [vars(rows_of(TokenOutputs(**found), batch)[0]) for found, batch in zip(said, batches, strict=True)]
    names = [name for name in parts[0] if parts[0][name] is not None]
    return {name: torch.cat([part[name] for part in parts])[order] for name in names}
