"""What PPO learns from: one rollout, turned into tensors, step by step.

Every replica holds the rows of its own prompts. Index t of a tensor with suffix T = S - 1 speaks of the
prediction of token t + 1, so the reply of a prompt of length p in a row of length n covers t = p-1 .. n-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from her_nemo.algorithms import advantages, kl
from her_nemo.algorithms.masking import weigh_kinds
from her_nemo.megatron import forward, parallel, platform
from her_nemo.megatron.qwen3 import Model
from her_nemo.rewards.scalar import score_at_last_token
from her_nemo.rollout.engine import Rollout

MicroBatch = dict[str, torch.Tensor]


@dataclass
class Experience:
    """Tensors of one rollout on this replica, padded right to one length S."""

    tokens_BS: torch.Tensor  # int64
    lengths_B: torch.Tensor  # int64, prompt and reply
    mask_BT: torch.Tensor  # bool, True at predictions of reply tokens
    kinds_BT: torch.Tensor  # int8, segment kind of the predicted token
    rollout_log_probs_BT: torch.Tensor  # fp32, what the engine said; 0 outside the reply
    finished_B: torch.Tensor  # bool, False where the reply was cut at its longest
    old_log_probs_BT: torch.Tensor = field(init=False)
    entropy_BT: torch.Tensor = field(init=False)  # fp32, of the policy that generated, in nats
    ref_log_probs_BT: torch.Tensor = field(init=False)
    values_BT: torch.Tensor = field(init=False)
    scores_B: torch.Tensor = field(init=False)
    rewards_BT: torch.Tensor = field(init=False)
    advantages_BT: torch.Tensor = field(init=False)
    returns_BT: torch.Tensor = field(init=False)

    @classmethod
    def from_rollout(
        cls, rollout: Rollout, kinds: Sequence[Sequence[int]], *, pad_id: int, length: int | None = None
    ) -> Experience:
        """Lay out prompts and replies, padded to `length` (None: to the longest row of this replica).

        `kinds[i]` names the segment kind of each token of reply i.
        """
        lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)]
        size = max(lengths) if length is None else length
        batch = len(lengths)
        tokens_BS = torch.full((batch, size), pad_id, dtype=torch.long)
        mask_BT = torch.zeros(batch, size - 1, dtype=torch.bool)
        kinds_BT = torch.zeros(batch, size - 1, dtype=torch.int8)
        log_probs_BT = torch.zeros(batch, size - 1)
        for row, (prompt, reply) in enumerate(zip(rollout.prompt_ids, rollout.response_ids, strict=True)):
            tokens_BS[row, : lengths[row]] = torch.tensor(prompt + reply)
            span = slice(len(prompt) - 1, lengths[row] - 1)
            mask_BT[row, span] = True
            kinds_BT[row, span] = torch.tensor(list(kinds[row]), dtype=torch.int8)
            log_probs_BT[row, span] = torch.tensor(rollout.log_probs[row])
        device = platform.device()
        return cls(
            tokens_BS.to(device),
            torch.tensor(lengths, device=device),
            mask_BT.to(device),
            kinds_BT.to(device),
            log_probs_BT.to(device),
            torch.tensor(rollout.finished, device=device),
        )

    def __len__(self) -> int:
        return len(self.lengths_B)

    def rows(self, begin: int, end: int) -> MicroBatch:
        """The rows begin..end of every tensor that is there, as one micro-batch."""
        return {
            name: tensor[begin:end] for name, tensor in vars(self).items() if isinstance(tensor, torch.Tensor)
        }

    def micro_batches(self, size: int, begin: int = 0, end: int | None = None) -> list[MicroBatch]:
        end = len(self) if end is None else end
        return [self.rows(start, min(start + size, end)) for start in range(begin, end, size)]

    @property
    def response_lengths_B(self) -> torch.Tensor:
        return self.mask_BT.sum(dim=1)


def score(experience: Experience, reward_model: Model, size: int) -> None:
    """Reward of each reply: the reward model's scalar at its last token."""
    values_BS = torch.cat(forward.values(reward_model, experience.micro_batches(size)))
    experience.scores_B = score_at_last_token(values_BS, experience.lengths_B)


def evaluate_policy(
    experience: Experience, actor: Model, reference: Model, critic: Model, size: int, temperature: float
) -> None:
    """Log-probs and entropy of the policy that generated, log-probs of the frozen reference, the critic's values."""
    batches = experience.micro_batches(size)
    said = forward.outputs(actor, batches, with_entropy=True, temperature=temperature)
    experience.old_log_probs_BT = torch.cat([out["log_probs_BT"] for out in said])
    experience.entropy_BT = torch.cat([out["entropy_BT"] for out in said])
    experience.ref_log_probs_BT = torch.cat(forward.log_probs(reference, batches, temperature=temperature))
    experience.values_BT = torch.cat(forward.values(critic, batches))[:, :-1]


def estimate_advantages(
    experience: Experience,
    *,
    kl_penalty: float,
    discount: float,
    gae_lambda: float,
    normalize: bool,
    weights_K: torch.Tensor | None = None,
) -> None:
    """Rewards with the KL penalty, then GAE; normalisation uses the moments of the whole global batch.

    `weights_K` multiplies the penalty of a token by the weight of its segment kind.
    """
    kl_BT = kl.k1(experience.old_log_probs_BT, experience.ref_log_probs_BT)
    if weights_K is not None:
        kl_BT = kl_BT * weigh_kinds(experience.mask_BT, experience.kinds_BT, weights_K)
    experience.rewards_BT = kl.rewards_with_kl(experience.scores_B, kl_BT, experience.mask_BT, kl_penalty)
    experience.advantages_BT, experience.returns_BT = advantages.gae(
        experience.rewards_BT, experience.values_BT, experience.mask_BT, discount, gae_lambda
    )
    if normalize:
        moments = torch.stack(advantages.masked_moments(experience.advantages_BT, experience.mask_BT))
        mean, variance = advantages.mean_and_variance(*parallel.data_all_reduce(moments))
        experience.advantages_BT = advantages.whiten(
            experience.advantages_BT, experience.mask_BT, mean, variance
        )


def reply_statistics(experience: Experience) -> dict[str, torch.Tensor]:
    """Sums over this replica's rows of what needs the replies and their scores alone."""
    sums = {
        "samples": torch.tensor(float(len(experience))),
        "rewards": experience.scores_B.sum(),
        "response_lengths": experience.response_lengths_B.sum(),
        "finished": experience.finished_B.sum(),
    }
    return {name: value.double().to(platform.device()) for name, value in sums.items()}


def statistics(experience: Experience) -> dict[str, torch.Tensor]:
    """Sums over this replica's rows, to be added over replicas: rewards, KL, lengths, gaps to the engine."""
    mask = experience.mask_BT
    kl_BT = torch.where(mask, experience.old_log_probs_BT - experience.ref_log_probs_BT, 0.0)
    gap_BT = torch.where(mask, (experience.old_log_probs_BT - experience.rollout_log_probs_BT).abs(), 0.0)
    sums = reply_statistics(experience) | {
        "tokens": mask.sum(),
        "sequence_tokens": experience.lengths_B.sum(),
        "rewards_squared": experience.scores_B.double().square().sum(),
        "rewards_with_kl": torch.where(mask, experience.rewards_BT, 0.0).sum(),
        "init_policy_kl": kl_BT.sum(),
        "values": torch.where(mask, experience.values_BT, 0.0).sum(),
        "gap": gap_BT.sum(),
    }
    for kind in range(1, 5):
        here = mask & (experience.kinds_BT == kind)
        sums[f"kind{kind}_kl"] = torch.where(here, kl_BT, 0.0).sum()
        sums[f"kind{kind}_entropy"] = torch.where(here, experience.entropy_BT, 0.0).sum()
        sums[f"kind{kind}_tokens"] = here.sum()
    return {name: value.double().to(mask.device) for name, value in sums.items()}


def largest_gap(experience: Experience) -> tuple[float, int, int]:
    """(largest |trainer - engine| log-prob, its row, its place t) on this replica."""
    gap_BT = (experience.old_log_probs_BT - experience.rollout_log_probs_BT).abs()
    gap_BT = torch.where(experience.mask_BT, gap_BT, 0.0)
    flat = int(gap_BT.argmax())
    row, place = divmod(flat, gap_BT.shape[1])
    return float(gap_BT[row, place]), row, place
