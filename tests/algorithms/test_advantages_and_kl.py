"""GAE, whitening, KL estimators and importance weights against examples worked out by hand."""

from __future__ import annotations

from math import exp, inf, log, nan

import pytest
import torch

from her_nemo.algorithms import importance
from her_nemo.algorithms.advantages import gae, masked_moments, masked_whiten, mean_and_variance, whiten
from her_nemo.algorithms.kl import ESTIMATORS, k1, k2, k3, rewards_with_kl


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.4, 0.8]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 0.9, 0.8)
    # delta: 0.9*0.4-0.5 = -0.14, 0.9*0.8-0.4 = 0.32, 1-0.8 = 0.2; discount*lambda = 0.72
    # A2 = 0.2, A1 = 0.32 + 0.72*0.2 = 0.464, A0 = -0.14 + 0.72*0.464 = 0.19408
    torch.testing.assert_close(advantages, torch.tensor([[0.19408, 0.464, 0.2]]))
    torch.testing.assert_close(returns, torch.tensor([[0.69408, 0.864, 1.0]]))


def test_gae_limits() -> None:
    torch.manual_seed(0)
    rewards, values, ones = torch.randn(4, 9), torch.randn(4, 9), torch.ones(4, 9)
    # lambda 1: the return is the discounted sum of rewards, whatever the critic says
    _, returns = gae(rewards, values, ones, 0.7, 1.0)
    expected = torch.stack(
        [sum(0.7 ** (k - t) * rewards[:, k] for k in range(t, 9)) for t in range(9)], dim=1
    )
    torch.testing.assert_close(returns, expected)
    # lambda 0: one-step temporal difference
    advantages, _ = gae(rewards, values, ones, 0.7, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros(4, 1)], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.7 * following - values)


def test_gae_ignores_prompt_and_padding() -> None:
    reply = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.8]]), torch.ones(1, 3), 0.9, 0.8)
    mask = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 0.0]])
    rewards = torch.tensor([[7.0, nan, 0.0, 0.0, 1.0, inf]])
    values = torch.tensor([[nan, 5.0, 0.5, 0.4, 0.8, 9.0]])
    for got, want in zip(gae(rewards, values, mask, 0.9, 0.8), reply, strict=True):
        torch.testing.assert_close(got[:, 2:5], want)
        assert got[:, [0, 1, 5]].abs().max() == 0


def test_gae_steps_over_holes() -> None:
    mask = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]])
    rewards = torch.tensor([[0.0, nan, 9.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 9.0, nan, 0.4, 0.8]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    torch.testing.assert_close(advantages, torch.tensor([[0.19408, 0.0, 0.0, 0.464, 0.2]]))
    torch.testing.assert_close(returns, torch.tensor([[0.69408, 0.0, 0.0, 0.864, 1.0]]))


def test_whitening_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, nan], [3.0, inf, 6.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    total, squares, count = masked_moments(x, mask)
    assert (total.item(), squares.item(), count.item()) == (12.0, 50.0, 4.0)
    mean, variance = mean_and_variance(total, squares, count)
    assert (mean.item(), variance.item()) == (3.0, 3.5)
    scale = 3.5**0.5
    expected = torch.tensor([[-2 / scale, -1 / scale, 0.0], [0.0, 0.0, 3 / scale]])
    torch.testing.assert_close(masked_whiten(x, mask), expected)


def test_whitening_does_not_depend_on_the_split() -> None:
    torch.manual_seed(1)
    x, mask = 1e4 + torch.randn(8, 6), (torch.rand(8, 6) > 0.4).float()
    whole = masked_whiten(x, mask)
    parts = [masked_moments(a, m) for a, m in zip(x.split(3), mask.split(3), strict=True)]
    mean, variance = mean_and_variance(*(sum(column) for column in zip(*parts, strict=True)))
    torch.testing.assert_close(whiten(x, mask, mean, variance), whole)
    kept = whole[mask != 0]
    assert kept.mean().abs() < 1e-3
    assert (kept.std(correction=0) - 1).abs() < 1e-3
    assert masked_whiten(torch.ones(2, 2), torch.ones(2, 2)).abs().max() == 0
    assert masked_whiten(torch.ones(2, 2), torch.zeros(2, 2)).abs().max() == 0


def test_kl_estimators_by_hand() -> None:
    p, q = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    assert k1(p, q).item() == pytest.approx(0.5)
    assert k2(p, q).item() == pytest.approx(0.125)
    assert k3(p, q).item() == pytest.approx(exp(-0.5) - 1 + 0.5)


def test_kl_estimators_in_expectation() -> None:
    torch.manual_seed(2)
    p, q = torch.randn(50, dtype=torch.float64).softmax(0), torch.randn(50, dtype=torch.float64).softmax(0)
    exact = (p * (p / q).log()).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((p * ESTIMATORS[name](p.log(), q.log())).sum(), exact)
    assert (k2(p.log(), q.log()) >= 0).all()
    assert (k3(p.log(), q.log()) >= 0).all()
    for estimator in ESTIMATORS.values():
        assert (estimator(p.log(), p.log()) == 0).all()


def test_rewards_with_kl_by_hand() -> None:
    kl = torch.tensor([[nan, 0.1, 0.2, inf], [9.0, 0.3, 0.4, 0.5]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    rewards = rewards_with_kl(torch.tensor([2.0, -1.0]), kl, mask, 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.05, 1.9, 0.0], [0.0, -0.15, -0.2, -1.25]]))
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        rewards_with_kl(torch.ones(2), kl, mask * torch.tensor([[1.0], [0.0]]), 0.5)


def test_importance_weights_by_hand() -> None:
    trainer = torch.tensor([[log(1.5), log(0.5), log(4.0), nan]])
    rollout, mask = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    close = torch.testing.assert_close
    close(importance.truncated_weights(trainer, rollout, mask, 2.0), torch.tensor([[1.5, 0.5, 2.0, 0.0]]))
    close(importance.truncated_sequence_weights(trainer, rollout, mask, 9.0), 3.0 * mask)
    close(importance.truncated_sequence_weights(trainer, rollout, mask, 2.0), 2.0 * mask)
    close(importance.masking_weights(trainer, rollout, mask, 0.6, 2.0), torch.tensor([[1.5, 0.0, 0.0, 0.0]]))
    total, largest, count = importance.log_prob_gap(trainer, rollout, mask)
    assert total.item() == pytest.approx(log(1.5) + log(2.0) + log(4.0))
    assert largest.item() == pytest.approx(log(4.0))
    assert count.item() == 3
    same = importance.truncated_weights(rollout, rollout, mask, 2.0)
    close(same, mask)
