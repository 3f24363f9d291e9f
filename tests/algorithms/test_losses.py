"""The losses against examples worked out by hand, gradient checks, and indifference to padding."""

from __future__ import annotations

from math import log

import pytest
import torch

from her_nemo.algorithms.masking import weigh_kinds
from her_nemo.algorithms.ppo_loss import policy_loss, value_loss
from her_nemo.algorithms.ranking_loss import bradley_terry
from her_nemo.algorithms.sft_loss import masked_nll
from her_nemo.rewards.scalar import score_at_last_token

NAN, INF = float("nan"), float("inf")


def row(*values: float, **kwargs: bool) -> torch.Tensor:
    return torch.tensor([values], **kwargs)


def near(actual: torch.Tensor, expected: float) -> None:
    assert actual.item() == pytest.approx(expected, abs=1e-5)


def test_nll_by_hand() -> None:
    log_probs = torch.tensor([[-0.5, -1.0, NAN], [-INF, -2.0, -0.25]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    loss, count = masked_nll(log_probs, mask)
    near(loss, 3.75)
    near(count, 4.0)
    weighted, total = masked_nll(log_probs, mask * 0.5)
    near(weighted, 1.875)
    near(total, 2.0)
    assert masked_nll(log_probs.bfloat16(), mask)[0].dtype == torch.float32


def test_bradley_terry_by_hand() -> None:
    # sigmoid(log 3) = 3/4 and sigmoid(-log 3) = 1/4; the third pair is a tie
    loss, count, right = bradley_terry(torch.tensor([log(3), 0.0, 1.0]), torch.tensor([0.0, log(3), 1.0]))
    near(loss, -log(0.75) - log(0.25) - log(0.5))
    near(loss, 0.28768207 + 1.38629436 + 0.69314718)
    near(count, 3.0)
    near(right, 1.5)
    assert torch.isfinite(bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]))[0])


def test_policy_loss_by_hand() -> None:
    log_probs = row(log(1.5), log(0.5), log(1.1), log(1.5), NAN, requires_grad=True)
    advantages = row(2.0, -1.0, -3.0, -1.0, INF)
    mask = row(1.0, 1.0, 1.0, 1.0, 0.0)
    loss, count, stats = policy_loss(log_probs, row(0.0, 0.0, 0.0, 0.0, NAN), advantages, mask, 0.2, 0.2)
    # min(1.5*2, 1.2*2) = 2.4, min(-0.5, -0.8) = -0.8, -3.3, min(-1.5, -1.2) = -1.5
    near(loss, -(2.4 - 0.8 - 3.3 - 1.5))
    near(count, 4.0)
    near(stats["ratio_sum"], 4.6)
    near(stats["clipped_ratio_sum"], 4.3)
    near(stats["clip_fraction_sum"], 2.0)
    near(stats["approx_kl_sum"], 0.6 - (2 * log(1.5) + log(0.5) + log(1.1)))
    loss.backward()
    # d/dlogp of -ratio*A, and 0 where clipped or masked
    torch.testing.assert_close(log_probs.grad, row(0.0, 0.0, 3.3, 1.5, 0.0))


def test_clips_are_apart() -> None:
    one = row(1.0)
    for ratio, advantage, expected in ((1.5, 1.0, 1.28), (0.5, -1.0, -0.9), (1.27, 1.0, 1.27)):
        loss, _, _ = policy_loss(row(log(ratio)), row(0.0), row(advantage), one, 0.1, 0.28)
        near(loss, -expected)


def test_same_log_probs_give_ratio_one_and_kl_zero() -> None:
    log_probs = -torch.rand(3, 7) * 9
    mask = (torch.rand(3, 7) > 0.3).float()
    _, count, stats = policy_loss(log_probs, log_probs.clone(), torch.randn(3, 7), mask, 0.2, 0.2)
    assert stats["ratio_sum"] == count == stats["clipped_ratio_sum"]
    assert stats["approx_kl_sum"] == stats["clip_fraction_sum"] == 0


def test_zero_advantage_gives_zero_gradient() -> None:
    log_probs = torch.randn(2, 5, requires_grad=True)
    policy_loss(log_probs, torch.randn(2, 5), torch.zeros(2, 5), torch.ones(2, 5), 0.2, 0.2)[0].backward()
    assert log_probs.grad.abs().max() == 0


def test_entropy_bonus_and_weights() -> None:
    zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    entropy = row(0.5, 1.5, requires_grad=True)
    loss, _, stats = policy_loss(zeros, zeros, ones, ones, 0.2, 0.2, entropy=entropy, entropy_bonus=0.1)
    near(loss, -2.0 - 0.1 * 2.0)
    near(stats["entropy_sum"], 2.0)
    loss.backward()
    torch.testing.assert_close(entropy.grad, row(-0.1, -0.1))
    near(policy_loss(zeros, zeros, ones, ones, 0.2, 0.2, weights=row(0.5, 2.0))[0], -2.5)
    with pytest.raises(ValueError, match="no entropy was given"):
        policy_loss(zeros, zeros, ones, ones, 0.2, 0.2, entropy_bonus=0.1)


def test_value_loss_by_hand() -> None:
    values = row(1.0, 1.0, 0.6, NAN, requires_grad=True)
    loss, count, stats = value_loss(
        values, row(0.5, 0.5, 0.5, INF), row(0.0, 2.0, 1.0, NAN), row(1.0, 1.0, 1.0, 0.0), 0.2
    )
    # errors: 1 against clipped 0.49; 1 against clipped 1.69; 0.16 unclipped
    near(loss, 0.5 * (1.0 + 1.69 + 0.16))
    near(count, 3.0)
    near(stats["clip_fraction_sum"], 1.0)
    near(stats["squared_error_sum"], 2.16)
    near(stats["value_sum"], 2.6)
    near(stats["return_sum"], 3.0)
    loss.backward()
    torch.testing.assert_close(values.grad, row(1.0, 0.0, -0.4, 0.0))
    near(value_loss(row(3.0), row(0.0), row(1.0), row(1.0), None)[0], 2.0)


def test_gradients_in_float64() -> None:
    torch.manual_seed(3)
    shape = (3, 5)
    mask = (torch.rand(shape) > 0.3).double()

    def drawn(*size: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(*(size or shape), dtype=torch.float64, requires_grad=grad)

    old, advantages, returns, values = drawn(), drawn(), drawn(), drawn()
    # near the old log-probs, so that both sides of the clip occur and none sits on its kink
    new = (old + 0.3 * drawn()).requires_grad_()
    entropy = drawn(grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda x: masked_nll(x, mask)[0], drawn(grad=True))
    assert check(lambda a, b: bradley_terry(a, b)[0], (drawn(4, grad=True), drawn(4, grad=True)))
    assert check(
        lambda x, h: policy_loss(x, old, advantages, mask, 0.2, 0.28, entropy=h, entropy_bonus=0.3)[0],
        (new, entropy),
    )
    assert check(lambda x: value_loss(x, values, returns, mask, 0.2)[0], drawn(grad=True))


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_what_lies_under_the_mask_changes_nothing(garbage: float) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    clean = [torch.randn(2, 3) for _ in range(4)]
    dirty = [torch.where(mask != 0, x, torch.full_like(x, garbage)) for x in clean]

    def run(x: torch.Tensor, old: torch.Tensor, a: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
        x, h = x.clone().requires_grad_(), h.clone().requires_grad_()
        loss, count, stats = policy_loss(x, old, a, mask, 0.2, 0.2, entropy=h, entropy_bonus=0.1, weights=a)
        value, _, value_stats = value_loss(x, old, a, mask, 0.2)
        nll, _ = masked_nll(x, mask)
        (loss + value + nll).backward()
        return [loss, count, value, nll, x.grad, h.grad, *stats.values(), *value_stats.values()]

    for a, b in zip(run(*clean), run(*dirty), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("padding", [0, 1, 9])
def test_the_score_sits_on_the_last_token_whatever_the_padding(padding: int) -> None:
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    padded = torch.cat([values, torch.full((2, padding), NAN)], dim=1)
    assert score_at_last_token(padded, torch.tensor([3, 2])).tolist() == [2.0, 4.0]
    with pytest.raises(ValueError, match="not all in"):
        score_at_last_token(values, torch.tensor([0, 3]))


def test_weights_by_kind_make_a_weighted_mean() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    kinds = torch.tensor([[1, 2, 1, 0]], dtype=torch.int8)
    weights = weigh_kinds(mask, kinds, torch.tensor([1.0, 0.5, 3.0]))
    assert weights.tolist() == [[0.5, 3.0, 0.0, 1.0]]
    assert weigh_kinds(mask.bool(), kinds, torch.tensor([1.0, 0.5, 3.0])).tolist() == weights.tolist()
    loss, count = masked_nll(torch.tensor([[-2.0, -1.0, NAN, -4.0]]), weights)
    near(loss, 0.5 * 2 + 3 * 1 + 4)
    near(count, 4.5)


def test_policy_loss_with_token_weights() -> None:
    """Weight 0 is no token at all, weight 2 is two tokens; the statistics stay plain."""
    torch.manual_seed(1)
    old, advantages, entropy = torch.randn(2, 5), torch.randn(2, 5), torch.rand(2, 5)
    log_probs = old + 0.3 * torch.randn(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    weights = torch.tensor([[2.0, 0, 1, 5, 5], [1, 0, 2, 1, 5]])

    def run(x: torch.Tensor, kept: torch.Tensor, **more: torch.Tensor) -> tuple:
        return policy_loss(x, old, advantages, kept, 0.2, 0.2, entropy=entropy, entropy_bonus=0.1, **more)

    x = log_probs.clone().requires_grad_()
    loss, count, stats = run(x, mask, token_weights=weights)
    loss.backward()
    y = log_probs.clone().requires_grad_()
    parts = [run(y, mask * (weights >= least)) for least in (1, 2)]
    sum(part[0] for part in parts).backward()
    near(loss, sum(part[0].item() for part in parts))
    near(count, float(sum(part[1] for part in parts)))
    assert torch.allclose(x.grad, y.grad)
    near(stats["tokens"], 7.0)
    near(stats["ratio_sum"], float(run(log_probs, mask)[2]["ratio_sum"]))
