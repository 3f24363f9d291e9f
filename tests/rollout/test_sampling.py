"""Drawing a token: the right distribution, cut the right way, and the same token under rounding."""

from __future__ import annotations

import pytest
import torch

from her_nemo.rollout.engine import Sampling
from her_nemo.rollout.megatron_engine import sample

PROBS = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3])
LOGITS = PROBS.log()


def drawn(sampling: Sampling, count: int = 20_000, banned: tuple[int, ...] = ()) -> torch.Tensor:
    """Shares of each token over evenly spread uniform numbers: exact to 1 / count."""
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = sample(LOGITS.expand(count, -1), uniforms, sampling, banned)
    return torch.bincount(tokens, minlength=len(PROBS)) / count


@pytest.mark.parametrize(
    ("sampling", "banned", "wanted"),
    [
        (Sampling(), (), [0.05, 0.4, 0.0, 0.25, 0.3]),
        (Sampling(top_k=2), (), [0.0, 4 / 7, 0.0, 0.0, 3 / 7]),
        (Sampling(top_p=0.6), (), [0.0, 4 / 7, 0.0, 0.0, 3 / 7]),
        (Sampling(top_p=0.71), (), [0.0, 0.4 / 0.95, 0.0, 0.25 / 0.95, 0.3 / 0.95]),
        (Sampling(), (1,), [0.05 / 0.6, 0.0, 0.0, 0.25 / 0.6, 0.3 / 0.6]),
        (Sampling(temperature=0.5), (), [0.0025, 0.16, 0.0, 0.0625, 0.09]),
    ],
)
def test_shares_are_those_of_the_distribution(
    sampling: Sampling, banned: tuple[int, ...], wanted: list[float]
) -> None:
    expected = torch.tensor(wanted) / sum(wanted)
    assert (drawn(sampling, banned=banned) - expected).abs().max() < 1e-3


def test_log_probs_are_those_of_the_whole_distribution_at_its_temperature() -> None:
    tokens, log_probs = sample(LOGITS[None], torch.tensor([0.5]), Sampling(temperature=0.5, top_k=2))
    assert log_probs == pytest.approx(torch.log_softmax(LOGITS / 0.5, -1)[tokens].item())


def test_greedy_takes_the_most_probable() -> None:
    token, log_prob = sample(LOGITS[None], torch.tensor([0.99]), Sampling(temperature=0.0))
    assert (token.item(), log_prob.item()) == (1, pytest.approx(LOGITS[1].item()))
    token, _ = sample(LOGITS[None], torch.tensor([0.99]), Sampling(temperature=0.0), (1,))
    assert token.item() == 4


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_interval_draw_tokens_that_can_be_drawn(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    token, _ = sample(logits, torch.tensor([uniform], dtype=torch.float64), Sampling())
    assert token.item() == (1 if uniform == 0.0 else 2)


def test_rounding_does_not_change_the_token() -> None:
    """Near-equal probabilities, as a fresh model has them, with the noise that another layout adds."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.01 * torch.randn(512, 1000, generator=generator)
    noisy = logits + 1e-6 * torch.randn(512, 1000, generator=generator)
    uniforms = torch.rand(512, generator=generator, dtype=torch.float64)
    one, _ = sample(logits, uniforms, Sampling())
    other, _ = sample(noisy, uniforms, Sampling())
    assert (one != other).float().mean() < 0.01
