"""Which samples make which batch, and the tensors of a micro batch.

The order of samples depends on the seed and the epoch alone: not on the number of ranks, nor on
micro-batching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from her_nemo.config.errors import UserError
from her_nemo.data.tokenise import Sample

Batch = dict[str, Tensor]


class GlobalBatchSampler:
    """Index arrays of the global batches of one epoch after another, resumable between any two batches.

    Iterating yields what is left of the current epoch and then moves to the next one. The state is advanced
    before a batch is handed out: a state saved after its step resumes with the batch that follows.
    """

    def __init__(
        self, n: int, global_batch_size: int, seed: int, shuffle: bool = True, drop_last: bool = True
    ) -> None:
        """
        Raises:
            UserError: if not even one batch can be made.
        """
        if global_batch_size < 1:
            raise UserError(f"model.global_batch_size is {global_batch_size}: it must be at least 1")
        if n < 1 or (drop_last and n < global_batch_size):
            raise UserError(f"{n} samples do not fill one global batch of {global_batch_size}")
        self.n, self.global_batch_size, self.seed = n, global_batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch = 0
        self.position = 0  # batches of this epoch handed out

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        full, rest = divmod(self.n, self.global_batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The order of all samples in an epoch."""
        if not self.shuffle:
            return np.arange(self.n)
        return np.random.default_rng([self.seed, epoch]).permutation(self.n)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = self.order(self.epoch)
        total = len(self)
        epoch = self.epoch
        for index in range(self.position, total):
            last = index + 1 == total
            self.epoch, self.position = (epoch + 1, 0) if last else (epoch, index + 1)
            yield order[index * self.global_batch_size : (index + 1) * self.global_batch_size]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, in plain Python numbers."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "n": self.n,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved.

        Raises:
            UserError: if the data, batch size or seed differ, so that the same position means other samples.
        """
        mine = self.state_dict()
        fixed = [key for key in mine if key not in ("epoch", "position")]
        differs = [f"{key} {state.get(key)} -> {mine[key]}" for key in fixed if state.get(key) != mine[key]]
        if differs:
            raise UserError(
                f"cannot resume in the middle of the data: {', '.join(differs)} since the checkpoint. "
                "Resume with the same data, model.global_batch_size and model.seed, or start a new run."
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


def padded_length(samples: Sequence[Sample], multiple: int) -> int:
    """The longest sample, rounded up to a multiple."""
    longest = max(len(sample) for sample in samples)
    return -(-longest // multiple) * multiple


def collate(
    samples: Sequence[Sample], pad_id: int, pad_to_multiple: int = 1, length: int | None = None
) -> Batch:
    """Samples as one micro batch, padded on the right.

    Args:
        length: padded length; None takes the longest sample, rounded up to `pad_to_multiple`.

    Returns:
        tokens_BS int64; lengths_B int64 (without padding); loss_mask_BT float32 and kinds_BT int8 with
        T = S - 1, aligned to the predicted token: index t belongs to token t + 1.

    Raises:
        ValueError: if a sample is longer than `length`.
    """
    size = padded_length(samples, pad_to_multiple) if length is None else length
    tokens = np.full((len(samples), size), pad_id, dtype=np.int64)
    trained = np.zeros((len(samples), size), dtype=np.float32)
    kinds = np.zeros((len(samples), size), dtype=np.int8)
    for i, sample in enumerate(samples):
        if len(sample) > size:
            raise ValueError(f"sample {sample.trace_id} has {len(sample)} tokens, more than {size}")
        tokens[i, : len(sample)] = sample.token_ids
        trained[i, sample.prompt_length : len(sample)] = 1.0
        kinds[i, : len(sample)] = sample.kinds
    return {
        "tokens_BS": torch.from_numpy(tokens),
        "lengths_B": torch.tensor([len(sample) for sample in samples], dtype=torch.int64),
        "loss_mask_BT": torch.from_numpy(trained[:, 1:].copy()),
        "kinds_BT": torch.from_numpy(kinds[:, 1:].copy()),
    }


def collate_pairs(
    pairs: Sequence[tuple[Sample, Sample]], pad_id: int, pad_to_multiple: int = 1, length: int | None = None
) -> Batch:
    """Pairs as one micro batch of 2P rows: row 2i is the chosen reply of pair i, row 2i + 1 the rejected."""
    return collate([sample for pair in pairs for sample in pair], pad_id, pad_to_multiple, length)


def micro_batches(
    batch_indices: Sequence[int] | NDArray[np.int64], dp_rank: int, dp_size: int, micro_batch_size: int
) -> list[list[int]]:
    """This data rank's share of a global batch in micro batches: every `dp_size`-th sample from `dp_rank`."""
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"data rank {dp_rank} of {dp_size}")
    mine = [int(index) for index in batch_indices[dp_rank::dp_size]]
    return [mine[i : i + micro_batch_size] for i in range(0, len(mine), micro_batch_size)]


def step_micro_batches(
    samples: Sequence[Sample] | Sequence[tuple[Sample, Sample]],
    batch_indices: Sequence[int] | NDArray[np.int64],
    *,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    pad_id: int,
    pad_to_multiple: int = 1,
) -> list[Batch]:
    """This rank's micro batches of one step as tensors, all padded to the longest of the global batch.

    The common length is the same on every rank, as pipeline stages need. Samples may be pairs; a pair counts
    once in `micro_batch_size` and makes two rows.
    """
    chosen = [samples[int(index)] for index in batch_indices]
    flat = [sample for item in chosen for sample in (item if isinstance(item, tuple) else (item,))]
    length = padded_length(flat, pad_to_multiple)
    out: list[Batch] = []
    for indices in micro_batches(batch_indices, dp_rank, dp_size, micro_batch_size):
        items = [samples[index] for index in indices]
        rows = [sample for item in items for sample in (item if isinstance(item, tuple) else (item,))]
        out.append(collate(rows, pad_id, length=length))
    return out
