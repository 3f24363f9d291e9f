"""Our advantages, KL, rewards and losses are NeMo-Aligner's, on its own code and in every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytestmark = pytest.mark.nemo

BATCH, LENGTH, VOCABULARY = 5, 24, 37
PROMPTS, ENDS = [3, 8, 1, 5, 10], [20, 24, 9, 6, 17]  # of the last token's end: a prompt of 5 with one token of reply


class OnCpu(TorchFunctionMode):
    """NeMo-Aligner's models write `.cuda()`; the trainers do not."""

    def __torch_function__(self, func: Any, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if func is torch.Tensor.cuda else func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    from her_nemo.aligner import compat
    from her_nemo.megatron import parallel

    parallel.initialize()
    compat.install()
    yield
    parallel.destroy()


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mask_BT() -> torch.Tensor:
    mask = torch.zeros(BATCH, LENGTH - 1, dtype=torch.bool)
    for row, (begin, end) in enumerate(zip(PROMPTS, ENDS, strict=True)):
        mask[row, begin - 1 : end - 1] = True
    return mask


def close(ours: torch.Tensor, theirs: torch.Tensor, mask_BT: torch.Tensor | None = None, atol: float = 1e-6) -> None:
    if mask_BT is not None:
        ours, theirs = ours[mask_BT], theirs[mask_BT]
    assert ours.numel() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.97, 0.9), (0.9, 0.0), (1.0, 1.0)])
def test_advantages_and_returns(mask_BT: torch.Tensor, discount: float, gae_lambda: float) -> None:
    from nemo_aligner.utils.ppo_utils import calculate_advantages_and_returns

    from her_nemo.algorithms.advantages import gae

    values, rewards = draw(BATCH, LENGTH - 1, seed=1), draw(BATCH, LENGTH - 1, seed=2)
    ours = gae(rewards, values, mask_BT, discount, gae_lambda)
    theirs = calculate_advantages_and_returns(values, rewards, discount, gae_lambda, mask_BT.float())
    for mine, their in zip(ours, theirs, strict=True):
        close(mine, their, mask_BT)


def test_mask_kl_rewards_and_whitening(mask_BT: torch.Tensor) -> None:
    from nemo_aligner.utils import distributed, ppo_utils

    from her_nemo.algorithms import advantages, kl

    values, scores = draw(BATCH, LENGTH - 1, seed=3), draw(BATCH, seed=4)
    policy, reference = draw(BATCH, LENGTH - 1, seed=5), draw(BATCH, LENGTH - 1, seed=6)
    prompts, ends = torch.tensor(PROMPTS), torch.tensor(ENDS)
    assert torch.equal(ppo_utils.create_mask(values, prompts, ends).bool(), mask_BT)
    penalty = ppo_utils.calculate_kl_penalty(policy, reference, use_absolute_kl=False)
    close(kl.k1(policy, reference), penalty)
    rewards = ppo_utils.calculate_ppo_rewards(values, scores, ends, penalty, 0.3)
    close(kl.rewards_with_kl(scores, kl.k1(policy, reference), mask_BT, 0.3), rewards, mask_BT)
    mean, variance = distributed.masked_global_mean_var(values, mask_BT.float())
    ours = advantages.mean_and_variance(*advantages.masked_moments(values, mask_BT))
    close(ours[0], mean)
    close(ours[1], variance)
    theirs = distributed.normalize_tensor(values, mask_BT.float())
    close(advantages.whiten(values, mask_BT, *ours), theirs, mask_BT, atol=2e-6)


def test_log_probs_and_their_gradient() -> None:
    from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs

    from her_nemo.megatron.log_probs import vocab_parallel_log_probs

    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(7))
    weight = draw(BATCH, LENGTH - 1, seed=8)
    found = []
    for log_probs in (
        lambda logits: vocab_parallel_log_probs(logits, tokens.roll(-1, 1), vocab_size=VOCABULARY)[0][:, :-1],
        lambda logits: from_parallel_logits_to_logprobs(logits, tokens, higher_stability=True),
    ):
        logits = (3 * draw(BATCH, LENGTH, VOCABULARY, seed=9)).requires_grad_()
        said = log_probs(logits)
        (said * weight).sum().backward()
        found.append((said.detach(), logits.grad))
    close(found[0][0], found[1][0], atol=2e-6)
    close(found[0][1], found[1][1])


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.05])
def test_actor_loss_and_its_gradient(mask_BT: torch.Tensor, entropy_bonus: float) -> None:
    from nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import MegatronGPTActorModel

    from her_nemo.algorithms.ppo_loss import policy_loss
    from her_nemo.megatron.log_probs import vocab_parallel_log_probs

    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(10))
    start = draw(BATCH, LENGTH, VOCABULARY, seed=11)
    old = vocab_parallel_log_probs(start, tokens.roll(-1, 1), vocab_size=VOCABULARY)[0][:, :-1]
    moved = start + 0.2 * draw(BATCH, LENGTH, VOCABULARY, seed=12)
    advantages = draw(BATCH, LENGTH - 1, seed=13)

    logits = moved.clone().requires_grad_()
    settings = SimpleNamespace(entropy_bonus=entropy_bonus, ratio_eps=0.2)
    forward = MegatronGPTActorModel.get_actor_forward_output_and_loss_func(settings)
    batch = {
        "response_tokens": tokens,
        "position_ids": tokens,
        "attention_mask": tokens,
        "mask": mask_BT.float(),
        "advantages": advantages,
        "prev_logprobs": old,
        "is_end": torch.ones(BATCH),
    }
    with OnCpu():
        output, loss_func = forward(iter([batch]), lambda *_, **__: logits)
        theirs, reported = loss_func(output)
    theirs.backward()

    mine = moved.clone().requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(
        mine, tokens.roll(-1, 1), vocab_size=VOCABULARY, with_entropy=True
    )
    total, count, stats = policy_loss(
        log_probs[:, :-1], old, advantages, mask_BT, 0.2, 0.2,
        entropy=entropy[:, :-1], entropy_bonus=entropy_bonus,
    )  # fmt: skip
    (total / count).backward()
    assert stats["clip_fraction_sum"] > 0
    close((total / count).detach(), theirs.detach())
    close(mine.grad, logits.grad)
    close(stats["ratio_sum"] / stats["tokens"], reported["ppo_ratio"])
    close(stats["clipped_ratio_sum"] / stats["tokens"], reported["ppo_ratio_clamped"])


@pytest.mark.parametrize("clip", [0.2, 5.0])
def test_critic_loss_and_its_gradient(mask_BT: torch.Tensor, clip: float) -> None:
    from nemo_aligner.models.nlp.gpt.megatron_gpt_critic import MegatronGPTCriticModel

    from her_nemo.algorithms.ppo_loss import value_loss

    old, returns = draw(BATCH, LENGTH - 1, seed=14), draw(BATCH, LENGTH - 1, seed=15)
    start = draw(BATCH, LENGTH, seed=16)
    settings = SimpleNamespace(
        clip_val=clip, enable_standardization=False, tokenizer=SimpleNamespace(eos_id=0)
    )
    batch = {"tokens": torch.ones(BATCH, LENGTH), "returns": returns, "prev_values": old, "mask": mask_BT.float()}
    values = start.clone().requires_grad_()
    forward = MegatronGPTCriticModel.get_forward_output_and_loss_func(settings)
    with OnCpu():
        output, loss_func = forward(iter([batch]), lambda **_: values)
        theirs, _ = loss_func(output)
    theirs.backward()
    mine = start.clone().requires_grad_()
    total, count, _ = value_loss(mine[:, :-1], old, returns, mask_BT, clip)
    (total / count).backward()
    close((total / count).detach(), theirs.detach())
    close(mine.grad, values.grad)


def test_reward_loss_and_its_gradient() -> None:
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel as Theirs

    from her_nemo.algorithms.ranking_loss import bradley_terry

    start = 2 * draw(2 * BATCH, 1, seed=17)  # the chosen replies first, as NeMo-Aligner has them
    scores = start.clone().requires_grad_()
    split: Callable[..., Any] = lambda output: Theirs.split_output_tensor(None, output)  # noqa: E731
    theirs, accuracy = Theirs.loss_func(SimpleNamespace(split_output_tensor=split), scores)
    theirs.backward()
    mine = start.clone().requires_grad_()
    total, count, right = bradley_terry(mine[:BATCH, 0], mine[BATCH:, 0])
    (total / count).backward()
    close((total / count).detach(), theirs.detach())
    close(mine.grad, scores.grad)
    close(right / count, accuracy)
