"""What PPO learns from: one rollout, turned into tensors, step by step.

Every replica holds the rows of its own prompts. Index t of a tensor with suffix T = S - 1 speaks of the
prediction of token t + 1, so the reply of a prompt of length p in a row of length n covers t = p-1 .. n-2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from her_nemo.algorithms import advantages, importance, kl
from her_nemo.algorithms.masking import weigh_kinds
from her_nemo.config.rl import ImportanceSampling
from her_nemo.megatron import forward, parallel, platform
from her_nemo.megatron.qwen3 import Model
from her_nemo.rewards.reward import Replies, Reward
from her_nemo.rollout.engine import Rollout
from her_nemo.training import packed
from her_nemo.training.running import RunningMoments

MicroBatch = dict[str, torch.Tensor]


@dataclass
class Experience:
    """Tensors of one rollout on this replica, padded right to one length S. Replies to one prompt follow each other.

    What an algorithm does not use (values without a critic, say) is never set.
    """

    tokens_BS: torch.Tensor  # int64
    lengths_B: torch.Tensor  # int64, prompt and reply
    prompt_lengths_B: torch.Tensor  # int64
    mask_BT: torch.Tensor  # bool, True at predictions of reply tokens
    kinds_BT: torch.Tensor  # int8, segment kind of the predicted token
    rollout_log_probs_BT: torch.Tensor  # fp32, what the engine said; 0 outside the reply
    finished_B: torch.Tensor  # bool, False where the reply was cut at its longest
    versions_B: torch.Tensor  # int64, version of the weights that generated the reply
    scored_B: (
        torch.Tensor
    )  # bool, False where the reward has no verdict: no part in baselines, losses and updates
    old_log_probs_BT: torch.Tensor = field(init=False)
    entropy_BT: torch.Tensor = field(init=False)  # fp32, of the policy that generated, in nats
    ref_log_probs_BT: torch.Tensor = field(init=False)
    values_BT: torch.Tensor = field(init=False)
    importance_BT: torch.Tensor = field(init=False)  # fp32, weights that correct for the engine's log-probs
    scores_B: torch.Tensor = field(init=False)  # fp32, as the reward gave them
    shaped_B: torch.Tensor | None = field(
        init=False, default=None
    )  # fp32, the scores normalised, where they are
    rewards_BT: torch.Tensor = field(init=False)
    advantages_BT: torch.Tensor = field(init=False)
    returns_BT: torch.Tensor = field(init=False)
    prompt_group_B: torch.Tensor | None = (
        None  # int64, equal for replies to one prompt, where it is computed once for them
    )

    @classmethod
    def from_rollout(
        cls,
        rollout: Rollout,
        kinds: Sequence[Sequence[int]],
        *,
        pad_id: int,
        length: int | None = None,
        shared_by: int | None = None,
    ) -> Experience:
        """Lay out prompts and replies, padded to `length` (None: to the longest row of this replica).

        `kinds[i]` names the segment kind of each token of reply i. `shared_by`: that many replies in a row answer one
        prompt, and forwards compute it once for them (megatron/shared_prompts.py); None: a row a reply.
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
            torch.tensor([len(prompt) for prompt in rollout.prompt_ids], device=device),
            mask_BT.to(device),
            kinds_BT.to(device),
            log_probs_BT.to(device),
            torch.tensor(rollout.finished, device=device),
            torch.full((batch,), rollout.weight_version, device=device),
            torch.ones(batch, dtype=torch.bool, device=device),
            prompt_group_B=None if shared_by is None else torch.arange(batch, device=device) // shared_by,
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

    @property
    def learned_BT(self) -> torch.Tensor:
        """The mask without the replies that have no score: what advantages and losses cover."""
        return self.mask_BT & self.scored_B.unsqueeze(1)


def score(experience: Experience, replies: Replies, reward: Reward) -> dict[str, torch.Tensor]:
    """Score each reply. Returns sums over this replica of what else the reward says, by name."""
    said = reward(replies)
    experience.scored_B = said.scored_B
    experience.scores_B = torch.where(said.scored_B, said.scores_B, torch.zeros_like(said.scores_B))
    sums = {name: part.double().sum() for name, part in said.parts.items()}
    counts = {name: torch.tensor(value, dtype=torch.float64) for name, value in said.counts.items()}
    unscored = (~said.scored_B).sum().double()
    return {
        name: value.to(platform.device()) for name, value in (sums | counts | {"unscored": unscored}).items()
    }


def evaluate_policy(
    experience: Experience,
    actor: Model,
    reference: Model,
    critic: Model | None,
    size: int,
    temperature: float,
    *,
    capacity: int | None = None,
) -> None:
    """Log-probs and entropy of the policy that generated, log-probs of the frozen reference, the critic's values.

    `size` rows a pass; or, with `capacity`, as many as have that many tokens together, packed (collective then).
    """
    said = _passes(experience, size, capacity)
    policy = said(actor, with_entropy=True, temperature=temperature)
    experience.old_log_probs_BT, experience.entropy_BT = policy["log_probs_BT"], policy["entropy_BT"]
    experience.ref_log_probs_BT = said(reference, temperature=temperature)["log_probs_BT"]
    if critic is not None:
        experience.values_BT = said(critic)["values_BS"][:, :-1]


def _passes(experience: Experience, size: int, capacity: int | None) -> Callable[..., dict[str, torch.Tensor]]:
    """What a model says of all rows, as a function of it: every model gets the same micro-batches, made once."""
    if capacity is not None:
        batches, bins = packed.pack_rows(experience.rows(0, len(experience)), capacity)
        return partial(packed.outputs, batches=batches, bins=bins)
    batches = experience.micro_batches(size)

    def said(model: Model, **how: float | bool) -> dict[str, torch.Tensor]:
        parts = forward.outputs(model, batches, **how)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return said


def correct_for_engine(experience: Experience, how: ImportanceSampling) -> dict[str, torch.Tensor]:
    """Importance weights of trainer against engine, if any are wanted; sums over this replica to report."""
    if how.correction == "none":
        return {}
    weigh = {
        ("truncate", "token"): partial(importance.truncated_weights, cap=how.high),
        ("truncate", "sequence"): partial(importance.truncated_sequence_weights, cap=how.high),
        ("mask", "token"): partial(importance.masking_weights, low=how.low, high=how.high),
        ("mask", "sequence"): partial(importance.masking_sequence_weights, low=how.low, high=how.high),
    }[how.correction, how.level]
    mask = experience.mask_BT
    weights_BT = weigh(experience.old_log_probs_BT, experience.rollout_log_probs_BT, mask)
    experience.importance_BT = weights_BT
    at_cap = mask & (weights_BT >= how.high)
    return {
        "importance": weights_BT.double().sum(),
        "importance_capped": at_cap.double().sum(),
        "importance_masked": (mask & (weights_BT == 0)).double().sum(),
    }


def normalise_scores(experience: Experience, moments: RunningMoments) -> None:
    """Shift and scale the scores by the mean and deviation of all of the run so far, these included (collective).
    What is logged as the reward stays as the reward gave it: this changes `rewards_BT` alone, through `shaped_B`."""
    found = torch.stack(advantages.masked_moments(experience.scores_B, experience.scored_B))
    moments.update(*parallel.data_all_reduce(found).tolist())
    scale = 1.0 / (moments.deviation + 1e-8) if moments.deviation else 1.0
    experience.shaped_B = (experience.scores_B - moments.mean) * scale


def estimate_advantages(
    experience: Experience,
    *,
    kl_penalty: float,
    discount: float,
    gae_lambda: float,
    normalize: bool,
    weights_K: torch.Tensor | None = None,
    estimator: str = "gae",
    group_size: int = 1,
    her_clip: float = 2.0,
    kl_estimator: str = "k1",
) -> None:
    """Rewards with the KL penalty, then advantages; normalisation uses the moments of the whole global batch.

    `weights_K` multiplies the penalty of a token by the weight of its segment kind. The group-relative estimators
    compare a reply's whole reward, penalty included, with those of the other replies to its prompt.
    """
    kl_BT = kl.ESTIMATORS[kl_estimator](experience.old_log_probs_BT, experience.ref_log_probs_BT)
    if weights_K is not None:
        kl_BT = kl_BT * weigh_kinds(experience.mask_BT, experience.kinds_BT, weights_K)
    scores_B = experience.scores_B if experience.shaped_B is None else experience.shaped_B
    experience.rewards_BT = kl.rewards_with_kl(scores_B, kl_BT, experience.mask_BT, kl_penalty)
    learned_BT = experience.learned_BT
    if estimator == "gae":
        experience.advantages_BT, experience.returns_BT = advantages.gae(
            experience.rewards_BT, experience.values_BT, learned_BT, discount, gae_lambda
        )
    else:
        relative = {
            "grpo": advantages.grpo,
            "rloo": advantages.rloo,
            "dr_grpo": advantages.dr_grpo,
            "her": partial(advantages.her, clip=her_clip),
        }[estimator]
        whole_B = experience.rewards_BT.sum(dim=1)
        advantages_B = relative(whole_B, group_size, keep_B=experience.scored_B)
        experience.advantages_BT = advantages.on_tokens(advantages_B, learned_BT)
    if normalize:
        moments = torch.stack(advantages.masked_moments(experience.advantages_BT, learned_BT))
        mean, variance = advantages.mean_and_variance(*parallel.data_all_reduce(moments))
        experience.advantages_BT = advantages.whiten(experience.advantages_BT, learned_BT, mean, variance)


def reply_statistics(experience: Experience) -> dict[str, torch.Tensor]:
    """Sums over this replica's rows of what needs the replies and their scores alone."""
    sums = {
        "samples": torch.tensor(float(len(experience))),
        "scored": experience.scored_B.sum(),
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
        "gap": gap_BT.sum(),
    }
    for kind in range(1, 5):
        here = mask & (experience.kinds_BT == kind)
        sums[f"kind{kind}_kl"] = torch.where(here, kl_BT, 0.0).sum()
        sums[f"kind{kind}_entropy"] = torch.where(here, experience.entropy_BT, 0.0).sum()
        sums[f"kind{kind}_tokens"] = here.sum()
    return {name: value.double().to(mask.device) for name, value in sums.items()}


def gaps(experience: Experience) -> torch.Tensor:
    """[B, T] |trainer - engine| log-prob of each reply token, 0 elsewhere."""
    gap_BT = (experience.old_log_probs_BT - experience.rollout_log_probs_BT).abs()
    return torch.where(experience.mask_BT, gap_BT, 0.0)
