"""Batches: the same for any number of ranks, and after any interruption."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from her_nemo.config.errors import UserError
from her_nemo.data.loaders import (
    GlobalBatchSampler,
    collate,
    collate_pairs,
    micro_batches,
    step_micro_batches,
)
from her_nemo.data.tokenise import Sample


def sample(prompt: int, reply: int, start: int = 10) -> Sample:
    ids = np.arange(start, start + prompt + reply, dtype=np.int32)
    kinds = np.array([0] * prompt + [1 + i % 4 for i in range(reply)], dtype=np.int8)
    return Sample(f"s{start}", ids, prompt, kinds)


def take(sampler: GlobalBatchSampler, count: int) -> list[list[int]]:
    out: list[list[int]] = []
    while len(out) < count:
        for batch in sampler:
            out.append(batch.tolist())
            if len(out) == count:
                break
    return out


def test_an_epoch_has_every_sample_once() -> None:
    sampler = GlobalBatchSampler(12, 4, seed=5)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == 3
    assert sorted(np.concatenate(first)) == list(range(12))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    assert sampler.epoch == 2
    assert take(GlobalBatchSampler(12, 4, seed=5), 6) == [batch.tolist() for batch in [*first, *second]]
    assert take(GlobalBatchSampler(12, 4, seed=6), 3) != [batch.tolist() for batch in first]


def test_last_batch() -> None:
    assert [len(b) for b in GlobalBatchSampler(10, 4, seed=0)] == [4, 4]
    assert [len(b) for b in GlobalBatchSampler(10, 4, seed=0, drop_last=False)] == [4, 4, 2]
    plain = GlobalBatchSampler(5, 2, seed=0, shuffle=False, drop_last=False)
    assert [b.tolist() for b in plain] == [[0, 1], [2, 3], [4]]
    with pytest.raises(UserError, match="3 samples do not fill one global batch of 4"):
        GlobalBatchSampler(3, 4, seed=0)


@pytest.mark.parametrize("stop", range(8))
def test_exact_resume(stop: int) -> None:
    expected = take(GlobalBatchSampler(11, 3, seed=1), 10)
    before = GlobalBatchSampler(11, 3, seed=1)
    head = take(before, stop)
    state = json.loads(json.dumps(before.state_dict()))
    after = GlobalBatchSampler(11, 3, seed=1)
    after.load_state_dict(state)
    assert head + take(after, 10 - stop) == expected


def test_resume_with_other_data_is_refused() -> None:
    state = GlobalBatchSampler(11, 3, seed=1).state_dict()
    with pytest.raises(UserError, match=r"n 11 -> 12, seed 1 -> 2"):
        GlobalBatchSampler(12, 3, seed=2).load_state_dict(state)


def test_collate_by_hand() -> None:
    batch = collate([sample(2, 2), sample(1, 1, start=50)], pad_id=9)
    assert batch["tokens_BS"].tolist() == [[10, 11, 12, 13], [50, 51, 9, 9]]
    assert batch["lengths_B"].tolist() == [4, 2]
    # index t is the prediction of token t + 1
    assert batch["loss_mask_BT"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch["kinds_BT"].tolist() == [[0, 1, 2], [1, 0, 0]]
    assert batch["tokens_BS"].dtype == torch.int64
    assert batch["loss_mask_BT"].dtype == torch.float32
    assert batch["kinds_BT"].dtype == torch.int8


def test_padding() -> None:
    assert collate([sample(2, 3)], 0, pad_to_multiple=4)["tokens_BS"].shape == (1, 8)
    assert collate([sample(2, 3)], 0, length=16)["loss_mask_BT"].shape == (1, 15)
    with pytest.raises(ValueError, match="s10 has 5 tokens, more than 4"):
        collate([sample(2, 3)], 0, length=4)
    # text without a prompt: all but the first token are trained
    assert collate([sample(0, 3)], 0)["loss_mask_BT"].tolist() == [[1, 1]]


def test_pairs_are_interleaved() -> None:
    batch = collate_pairs([(sample(1, 2, 10), sample(1, 1, 20)), (sample(1, 1, 30), sample(1, 3, 40))], 0)
    assert batch["tokens_BS"][:, 0].tolist() == [10, 20, 30, 40]


def test_micro_batches() -> None:
    assert micro_batches(np.arange(8), 0, 2, 2) == [[0, 2], [4, 6]]
    assert micro_batches(np.arange(8), 1, 2, 3) == [[1, 3, 5], [7]]
    assert micro_batches(np.arange(2), 2, 3, 3) == []
    with pytest.raises(ValueError, match="data rank 2 of 2"):
        micro_batches(np.arange(8), 2, 2, 2)


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_a_step_is_the_same_for_any_split(dp_size: int, micro: int) -> None:
    samples = [sample(2, 1 + i % 5, start=100 * i) for i in range(9)]
    indices = np.array([8, 1, 4, 0, 7, 2])
    rows: dict[int, tuple[list[int], list[float]]] = {}
    for rank in range(dp_size):
        for batch in step_micro_batches(
            samples,
            indices,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch_size=micro,
            pad_id=-1,
            pad_to_multiple=4,
        ):
            assert batch["tokens_BS"].shape[1] == 8
            for tokens, mask in zip(batch["tokens_BS"].tolist(), batch["loss_mask_BT"].tolist(), strict=True):
                rows[tokens[0] // 100] = (tokens, mask)
    whole = collate([samples[i] for i in indices], -1, 4)
    assert set(rows) == set(indices.tolist())
    for at, index in enumerate(indices.tolist()):
        assert rows[index] == (whole["tokens_BS"][at].tolist(), whole["loss_mask_BT"][at].tolist())


def test_a_step_of_pairs() -> None:
    pairs = [(sample(1, 2, 100 * i), sample(1, 5, 100 * i + 50)) for i in range(4)]
    batches = step_micro_batches(
        pairs, np.array([3, 0, 1]), dp_rank=0, dp_size=1, micro_batch_size=2, pad_id=0
    )
    assert [batch["tokens_BS"][:, 0].tolist() for batch in batches] == [[300, 350, 0, 50], [100, 150]]
    assert all(batch["tokens_BS"].shape[1] == 6 for batch in batches)
