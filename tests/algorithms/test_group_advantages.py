"""Group-relative advantages against examples worked out by hand."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from her_nemo.algorithms.advantages import centred, dr_grpo, grpo, her, on_tokens, rloo

# Two groups of four: mean 1 and deviation sqrt(2); all alike.
REWARDS = torch.tensor([3.0, 1.0, 1.0, -1.0, 0.3, 0.3, 0.3, 0.3])
ALONE = torch.tensor([5.0, 1.0, 1.0, 1.0])


def near(found: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, torch.tensor([float(value) for value in expected]), rtol=1e-5, atol=1e-6)


def test_dr_grpo_by_hand() -> None:
    near(dr_grpo(REWARDS, 4), 2, 0, 0, -2, 0, 0, 0, 0)


def test_grpo_by_hand() -> None:
    # squares 4 + 0 + 0 + 4 over four: variance 2
    near(grpo(REWARDS, 4), sqrt(2), 0, 0, -sqrt(2), 0, 0, 0, 0)
    near(grpo(10 * REWARDS + 7, 4), sqrt(2), 0, 0, -sqrt(2), 0, 0, 0, 0)


def test_rloo_by_hand() -> None:
    # the others of the first have the mean 1/3: 3 - 1/3 = 8/3; of the second 1: 0; of the last 5/3: -8/3
    near(rloo(REWARDS, 4), 8 / 3, 0, 0, -8 / 3, 0, 0, 0, 0)
    rewards = torch.randn(6)
    expected = [float(rewards[i] - torch.cat([rewards[:i], rewards[i + 1 :]]).mean()) for i in range(6)]
    near(rloo(rewards, 6), *expected)


def test_her_bounds_what_grpo_gives() -> None:
    # one win among losses, as from a judge: sqrt(G - 1) for the win, -1/sqrt(G - 1) for each loss
    verdicts = torch.tensor([1.0, *[-1.0] * 9])
    near(grpo(verdicts, 10), 3.0, *[-1 / 3] * 9)
    near(her(verdicts, 10, clip=2.0), 2.0, *[-1 / 3] * 9)
    near(her(REWARDS, 4, clip=1.0), 1, 0, 0, -1, 0, 0, 0, 0)
    near(her(REWARDS, 4, clip=9.0), *grpo(REWARDS, 4).tolist())


def test_equal_rewards_give_no_advantage_whatever_their_size() -> None:
    """0.1 has no exact binary form: a mean taken in float32 would leave a rest, and 1e-6 would blow it up."""
    for estimator in (grpo, rloo, dr_grpo):
        for size in (3, 6, 7):
            assert estimator(torch.full((size,), 0.1), size).abs().max() < 1e-6
            assert estimator(torch.full((size,), 1e4 / 3), size).abs().max() < 1e-5


def test_replies_without_a_score_count_nowhere() -> None:
    keep = torch.tensor([True, True, False, True])
    rewards = torch.tensor([3.0, 1.0, float("nan"), 2.0])
    near(dr_grpo(rewards, 4, keep), 1, -1, 0, 0)
    near(rloo(rewards, 4, keep), 1.5, -1.5, 0, 0)
    near(grpo(rewards, 4, keep), sqrt(1.5), -sqrt(1.5), 0, 0)
    for estimator in (grpo, rloo, dr_grpo):
        near(estimator(ALONE, 4, torch.tensor([True, False, False, False])), 0, 0, 0, 0)
        near(estimator(ALONE, 4, torch.zeros(4, dtype=torch.bool)), 0, 0, 0, 0)


def test_advantages_do_not_depend_on_how_groups_are_dealt_out() -> None:
    torch.manual_seed(0)
    rewards = torch.randn(24)
    groups = rewards.view(6, 4)
    for estimator in (grpo, rloo, dr_grpo):
        whole = estimator(rewards, 4).view(6, 4)
        for rank in range(2):
            assert torch.equal(estimator(groups[rank::2].reshape(-1), 4).view(3, 4), whole[rank::2])


def test_means_and_shapes() -> None:
    found, keep, count = centred(REWARDS, 4)
    assert (found.shape, keep.shape, count.tolist()) == ((2, 4), (2, 4), [[4.0], [4.0]])
    assert found.dtype == torch.float64
    assert grpo(REWARDS, 4).dtype == torch.float32
    assert grpo(REWARDS.double(), 4).dtype == torch.float64
    for size in (1, 3):
        with pytest.raises(ValueError, match="not whole groups"):
            grpo(REWARDS, size)


def test_every_token_of_a_reply_has_its_advantage() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
    assert on_tokens(torch.tensor([2.0, -1.0]), mask).tolist() == [[0, 2, 2, 0], [-1, 0, -1, -1]]
