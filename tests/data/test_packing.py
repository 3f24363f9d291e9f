"""Rows hold every sample once, few and even; borders and masks are where the samples are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from her_nemo.data.loaders import collate
from her_nemo.data.packing import collate_packed, pack, packed_micro_batches
from her_nemo.data.tokenise import Sample


def sample(prompt: int, reply: int, start: int = 10) -> Sample:
    ids = np.arange(start, start + prompt + reply, dtype=np.int32)
    kinds = np.array([0] * prompt + [1 + i % 4 for i in range(reply)], dtype=np.int8)
    return Sample(f"s{start}", ids, prompt, kinds)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    capacity=st.integers(50, 120),
    multiple=st.integers(1, 4),
)
def test_pack_holds_each_once_within_capacity(lengths: list[int], capacity: int, multiple: int) -> None:
    rows = pack(lengths, capacity, multiple)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert len(rows) % multiple == 0
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= capacity
    # All rows of a best fit but one are more than half full.
    if multiple == 1:
        assert len(rows) <= 2 * -(-sum(lengths) // capacity)
    assert rows == pack(lengths, capacity, multiple)


def test_pack_fills_and_evens_out() -> None:
    assert [sorted(row) for row in pack([5, 5, 5, 5], 10)] == [[0, 2], [1, 3]]
    assert len(pack([7, 6, 4, 3, 5, 5, 9, 1], 10)) == 4
    # Four rows are asked for: four equal ones, not one full and three nearly empty.
    assert sorted(len(row) for row in pack([1] * 8, 8, 4)) == [2, 2, 2, 2]
    assert pack([3], 10, 2) in ([[0], []], [[], [0]])
    with pytest.raises(ValueError, match="11 tokens does not fit in a row of 10"):
        pack([3, 11], 10)
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([], 10)


def test_collate_packed() -> None:
    batch = collate_packed([sample(2, 2), sample(1, 2, start=50), sample(0, 2, start=70)], pad_id=9, length=11)
    assert batch["tokens_BS"].tolist() == [[10, 11, 12, 13, 50, 51, 52, 70, 71, 9, 9]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 7, 9, 11]
    # Index t is the prediction of token t + 1; nothing predicts the first token of a sample, prompt or not.
    assert batch["loss_mask_BT"].tolist() == [[0, 1, 1, 0, 1, 1, 0, 1, 0, 0]]
    assert batch["kinds_BT"].tolist() == [[0, 1, 2, 0, 1, 2, 1, 2, 0, 0]]
    assert collate_packed([sample(1, 3)], 9, 4)["cu_seqlens"].tolist() == [0, 4]
    assert collate_packed([], 9, 4)["cu_seqlens"].tolist() == [0, 4]
    assert not collate_packed([], 9, 4)["loss_mask_BT"].any()
    with pytest.raises(ValueError, match="in a row of 6"):
        collate_packed([sample(1, 3), sample(1, 3)], 9, 6)


def test_every_trained_token_is_trained_once_however_many_ranks() -> None:
    samples = [sample(n % 3, 2 + n % 7, start=1 + 20 * n) for n in range(15)]
    order = [4, 9, 1, 0, 14, 7, 3]
    plain = collate([samples[i] for i in order], 0)
    wanted = sorted(plain["tokens_BS"][:, 1:][plain["loss_mask_BT"] > 0].tolist())
    for ranks in (1, 2, 3):
        found: list[int] = []
        shapes, counts = set(), set()
        for rank in range(ranks):
            rows = packed_micro_batches(samples, order, dp_rank=rank, dp_size=ranks, capacity=20, pad_id=0)
            counts.add(len(rows))
            for row in rows:
                shapes.add(row["tokens_BS"].shape)
                assert row["cu_seqlens"][-1] == row["tokens_BS"].shape[1]
                found += row["tokens_BS"][:, 1:][row["loss_mask_BT"] > 0].tolist()
        assert sorted(found) == wanted
        assert len(shapes) == len(counts) == 1
