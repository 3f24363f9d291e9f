"""Options of the policy loss against examples worked out by hand, and their gradients in float64."""

from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch

from her_nemo.algorithms import importance, kl
from her_nemo.algorithms.ppo_loss import aggregate, policy_loss

NAN = float("nan")


def row(*values: float, **kwargs: bool) -> torch.Tensor:
    return torch.tensor([values], **kwargs)


def near(actual: torch.Tensor, expected: float) -> None:
    assert actual.item() == pytest.approx(expected, abs=1e-5)


def test_dual_clip_by_hand() -> None:
    log_probs = row(log(5.0), log(5.0), log(2.0), NAN, requires_grad=True)
    advantages, mask = row(-1.0, 1.0, -1.0, NAN), row(1.0, 1.0, 1.0, 0.0)
    loss, _, stats = policy_loss(log_probs, torch.zeros(1, 4), advantages, mask, 0.2, 0.2, dual_clip=3.0)
    # -5 is raised to -3; a positive advantage keeps its upper clip 1.2; -2 is above the bound
    near(loss, 3.0 - 1.2 + 2.0)
    near(stats["dual_clip_sum"], 1.0)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, row(0.0, 0.0, 2.0, 0.0))
    with pytest.raises(ValueError, match="more than 1"):
        policy_loss(log_probs, log_probs, advantages, mask, 0.2, 0.2, dual_clip=1.0)


def test_sequence_ratio_by_hand() -> None:
    """GSPO: the geometric mean of the ratios of a reply, here sqrt(2 * 0.5) = 1 and sqrt(2 * 2) = 2."""
    log_probs = torch.tensor([[log(2.0), log(0.5), NAN], [log(2.0), log(2.0), 0.0]], requires_grad=True)
    old, mask = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    advantages = torch.tensor([[3.0, 3.0, 0.0], [-1.0, -1.0, 0.0]])
    weights, count = aggregate(mask, None, "sequence_mean", 1.0)
    loss, _, stats = policy_loss(
        log_probs, old, advantages, mask, 0.2, 0.2, token_weights=weights, sequence_ratio=True
    )
    near(loss, -(1.0 * 3.0) - (2.0 * -1.0))
    assert count.item() == 2
    near(stats["ratio_sum"], 1 + 1 + 2 + 2)
    loss.backward()
    # d(-s A) = -s A / |o| on each token
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-1.5, -1.5, 0.0], [1.0, 1.0, 0.0]]))


def test_sequence_ratio_weighs_tokens_as_the_loss_does() -> None:
    log_probs = row(log(2.0), log(8.0))
    weights = row(3.0, 1.0)
    _, _, stats = policy_loss(
        log_probs, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), 0.2, 0.2,
        token_weights=weights, sequence_ratio=True,
    )  # fmt: skip
    near(stats["ratio_sum"], 2 * exp((3 * log(2.0) + log(8.0)) / 4))


def test_aggregations_by_hand() -> None:
    """Losses -1, -2, -3 in one reply and -4 in another."""
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    advantages, zeros = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN]]), torch.zeros(2, 3)
    expected = {"token_mean": -10 / 4, "sequence_mean": -(2 + 4) / 2, "constant": -(6 / 5 + 4 / 5) / 2}
    for how, mean in expected.items():
        weights, count = aggregate(mask, None, how, 5.0)
        loss, tokens, _ = policy_loss(zeros, zeros, advantages, mask, 0.2, 0.2, token_weights=weights)
        near(loss / (tokens if count is None else count), mean)


def test_aggregation_with_weights_by_kind_and_empty_replies() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    given = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    weights, count = aggregate(mask, given, "sequence_mean", 1.0)
    assert weights.tolist() == [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]
    assert count.item() == 1
    weights, count = aggregate(mask, given, "constant", 10.0)
    assert weights.tolist() == [[pytest.approx(0.3), pytest.approx(0.1), 0.0], [0.0, 0.0, 0.0]]
    assert count.item() == 1
    assert aggregate(mask, given, "token_mean", 1.0) == (given, None)


def test_a_mean_over_replies_does_not_depend_on_micro_batches() -> None:
    torch.manual_seed(4)
    mask = (torch.rand(6, 9) > 0.4).float()
    log_probs, old, advantages = (torch.randn(6, 9) for _ in range(3))

    def parts(how: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        weights, count = aggregate(mask[rows], None, how, 9.0)
        loss, _, _ = policy_loss(
            log_probs[rows], old[rows], advantages[rows], mask[rows], 0.2, 0.2, token_weights=weights
        )
        return loss, count

    for how in ("sequence_mean", "constant"):
        whole = parts(how, slice(None))
        split = [parts(how, slice(begin, begin + 2)) for begin in (0, 2, 4)]
        near(sum(loss for loss, _ in split) / sum(count for _, count in split), float(whole[0] / whole[1]))


def test_kl_in_the_loss_by_hand() -> None:
    log_probs = row(-1.0, NAN, requires_grad=True)
    reference, mask = row(-1.5, 7.0), row(1.0, 0.0)
    values = {"k1": 0.5, "k2": 0.125, "k3": exp(-0.5) - 1 + 0.5}
    # d k1 = 1, d k2 = log p - log ref, d k3 = 1 - ref/p
    gradients = {"k1": 1.0, "k2": 0.5, "k3": 1 - exp(-0.5)}
    for name, value in values.items():
        log_probs.grad = None
        estimate = kl.estimate(name, log_probs, reference, mask)
        loss, _, stats = policy_loss(
            log_probs, row(-1.0, 0.0), torch.zeros(1, 2), mask, 0.2, 0.2, kl=estimate, kl_coefficient=0.1
        )
        near(loss, 0.1 * value)
        near(stats["loss_kl_sum"], value)
        loss.backward()
        torch.testing.assert_close(log_probs.grad, row(0.1 * gradients[name], 0.0))
    with pytest.raises(ValueError, match="no KL was given"):
        policy_loss(log_probs, log_probs, mask, mask, 0.2, 0.2, kl_coefficient=0.1)


def test_gradient_of_k1_has_no_expectation_and_k2s_is_that_of_the_kl() -> None:
    """Over a distribution in softmax form: sum p d k1 = 0, sum p d k2 = d KL."""
    torch.manual_seed(5)
    logits = torch.randn(20, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(20, dtype=torch.float64).log_softmax(0)
    p = logits.log_softmax(0)
    exact = torch.autograd.grad((p.exp() * (p - reference)).sum(), logits)[0]
    for name, expected in (("k1", torch.zeros_like(exact)), ("k2", exact)):
        p = logits.log_softmax(0)
        drawn = p.detach().exp()
        found = torch.autograd.grad((drawn * kl.estimate(name, p, reference, torch.ones(20))).sum(), logits)[0]
        torch.testing.assert_close(found, expected)


def test_adaptive_coefficient_by_hand() -> None:
    def follow(coefficient: float, seen: float) -> float:
        return kl.adapted(coefficient, seen, target=6.0, horizon=1000.0, samples=100)

    assert follow(0.1, 6.0) == 0.1
    assert follow(0.1, 6.6) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert follow(0.1, 60.0) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert follow(0.1, 0.0) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


def test_masking_whole_replies_by_hand() -> None:
    trainer = torch.tensor([[log(4.0), log(0.5), NAN], [log(4.0), log(3.0), 0.0], [0.0, 0.0, 0.0]])
    rollout = torch.zeros(3, 3)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    # geometric means sqrt(2) and sqrt(12)
    found = importance.masking_sequence_weights(trainer, rollout, mask, 0.5, 2.0)
    assert found.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    narrow = importance.masking_sequence_weights(trainer, rollout, mask, 0.5, sqrt(2) - 1e-3)
    assert not narrow.any()


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant"])
def test_gradients_in_float64(how: str, sequence: bool) -> None:
    torch.manual_seed(6)
    shape = (4, 6)
    mask = (torch.rand(shape) > 0.3).double()
    old, advantages, reference = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    # near the old log-probs, with some ratios beyond the dual clip and none on a kink
    new = (old + 0.6 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    entropy = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    kinds = torch.rand(shape, dtype=torch.float64)
    weights, _ = aggregate(mask, kinds * mask, how, 6.0)

    def loss(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            x, old, advantages, mask, 0.2, 0.28, entropy=h, entropy_bonus=0.3, weights=kinds, token_weights=weights,
            dual_clip=1.5, sequence_ratio=sequence, kl=kl.estimate("k3", x, reference, mask), kl_coefficient=0.2,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (new, entropy))
    for name in kl.ESTIMATORS:
        assert torch.autograd.gradcheck(
            lambda x, name=name: kl.estimate(name, x, reference, mask).sum(), (new,)
        )


def test_options_left_alone_change_no_bit() -> None:
    torch.manual_seed(7)
    mask = (torch.rand(5, 8) > 0.3).float()
    log_probs, old, advantages = (torch.randn(5, 8) for _ in range(3))
    plain = policy_loss(log_probs, old, advantages, mask, 0.2, 0.2)
    given = policy_loss(
        log_probs, old, advantages, mask, 0.2, 0.2, token_weights=aggregate(mask, mask, "token_mean", 1.0)[0],
        dual_clip=None, sequence_ratio=False, kl=None, kl_coefficient=0.0,
    )  # fmt: skip
    assert torch.equal(plain[0], given[0])
    assert torch.equal(plain[1], given[1])
    assert all(torch.equal(plain[2][name], given[2][name]) for name in plain[2])
