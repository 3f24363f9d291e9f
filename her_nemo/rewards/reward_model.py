"""The trained reward models as rewards: what PPO asks of a scalar-headed Megatron model."""

from __future__ import annotations

import torch

from her_nemo.megatron import forward
from her_nemo.megatron.qwen3 import Model
from her_nemo.rewards.reward import Replies, Scores
from her_nemo.rewards.scalar import score_at_last_token


class ScalarReward:
    """A Bradley-Terry reward model as a `Reward`. It judges token ids, so every reply has a score."""

    def __init__(self, model: Model, micro_batch_size: int) -> None:
        self._model = model
        self._size = micro_batch_size

    def __call__(self, replies: Replies) -> Scores:
        rows = [{"tokens_BS": part} for part in replies.tokens_BS.split(self._size)]
        scores_B = score_at_last_token(torch.cat(forward.values(self._model, rows)), replies.lengths_B)
        return Scores(scores_B, torch.ones_like(scores_B, dtype=torch.bool))
