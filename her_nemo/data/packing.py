"""Several samples in one row, so that no compute goes into padding.

A row is one sequence of shape [1, S] with `cu_seqlens`, the places where samples begin and end: attention, positions
and loss stay inside a sample (Krell et al., "Efficient sequence packing without cross-contamination", 2021,
arXiv 2107.02027). Only the samples of one global batch share rows: an optimizer step sees the samples it would see
without packing, and its loss is the same number.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from her_nemo.data.loaders import Batch
from her_nemo.data.tokenise import Sample


def pack(lengths: Sequence[int], capacity: int, multiple: int = 1) -> list[list[int]]:
    """Indices of `lengths` dealt to rows of at most `capacity`: few rows, of lengths as equal as may be.

    Best-fit decreasing finds how many rows are needed; longest-first to the shortest row then evens them out, since
    all rows of a step are padded to the longest. The number of rows is a multiple of `multiple`; rows may be empty.
    The result depends on the arguments alone.

    Raises:
        ValueError: if one length is more than `capacity`.
    """
    if not lengths:
        raise ValueError("nothing to pack")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if lengths[order[0]] > capacity:
        raise ValueError(f"a sample of {lengths[order[0]]} tokens does not fit in a row of {capacity}")
    tight = _best_fit(lengths, order, capacity)
    count = -(-len(tight) // multiple) * multiple
    even = _even(lengths, order, count)
    tight += [[] for _ in range(count - len(tight))]
    longest = [max(sum(lengths[i] for i in row) for row in rows) for rows in (even, tight)]
    return even if longest[0] <= longest[1] else tight


def _best_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens still free, row), sorted
    for i in order:
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(i)
        insort(room, (free - lengths[i], row))
    return rows


def _even(lengths: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    used = [(0, row) for row in range(count)]
    for i in order:
        total, row = used[0]
        rows[row].append(i)
        heapq.heapreplace(used, (total + lengths[i], row))
    return rows


def collate_packed(samples: Sequence[Sample], pad_id: int, length: int) -> Batch:
    """Samples end to end as one micro batch of one row, padded on the right to `length`.

    Returns:
        tokens_BS int64 [1, S]; cu_seqlens int32 [n + 1], from 0 to S: the places between samples, the padding being
        one sample more; loss_mask_BT float32 and kinds_BT int8 [1, S - 1], aligned to the predicted token. The first
        token of a sample is never trained: what stands before it is another sample.

    Raises:
        ValueError: if the samples are longer than `length` together.
    """
    tokens = np.full((1, length), pad_id, dtype=np.int64)
    trained = np.zeros((1, length), dtype=np.float32)
    kinds = np.zeros((1, length), dtype=np.int8)
    borders = [0]
    for sample in samples:
        begin, end = borders[-1], borders[-1] + len(sample)
        if end > length:
            raise ValueError(f"sample {sample.trace_id} ends at {end} in a row of {length}")
        tokens[0, begin:end] = sample.token_ids
        trained[0, begin + max(sample.prompt_length, 1) : end] = 1.0
        kinds[0, begin:end] = sample.kinds
        borders.append(end)
    if borders[-1] < length:
        borders.append(length)
    return {
        "tokens_BS": torch.from_numpy(tokens),
        "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
        "loss_mask_BT": torch.from_numpy(trained[:, 1:].copy()),
        "kinds_BT": torch.from_numpy(kinds[:, 1:].copy()),
    }


def packed_micro_batches(
    samples: Sequence[Sample],
    batch_indices: Sequence[int] | NDArray[np.int64],
    *,
    dp_rank: int,
    dp_size: int,
    capacity: int,
    pad_id: int,
) -> list[Batch]:
    """This rank's micro batches of one step, one row each, all of one length on every rank.

    Every rank gets the same number of rows of the global batch.
    """
    chosen = [samples[int(index)] for index in batch_indices]
    lengths = [len(sample) for sample in chosen]
    rows = pack(lengths, capacity, multiple=dp_size)
    length = max(sum(lengths[i] for i in row) for row in rows)
    return [collate_packed([chosen[i] for i in sorted(row)], pad_id, length) for row in rows[dp_rank::dp_size]]
