"""The trained reward models as rewards: what PPO asks of a scalar-headed Megatron model."""

from __future__ import annotations

import torch

from her_nemo.megatron import forward
from her_nemo.megatron.qwen3 import Model
from her_nemo.megatron.shared_prompts import GROUP
from her_nemo.rewards.reward import Replies, Scores
from her_nemo.rewards.scalar import score_at_last_token
from her_nemo.training import packed


class ScalarReward:
    """A Bradley-Terry reward model as a `Reward`. It judges token ids, so every reply has a score."""

    def __init__(
        self, model: Model, micro_batch_size: int, share_prompts: bool = False, capacity: int | None = None
    ) -> None:
        """`share_prompts`: read a prompt once for all replies to it (megatron/shared_prompts.py). `capacity`: in place
        of `micro_batch_size` rows a pass, as many as have that many tokens together (training/packed.py)."""
        self._model = model
        self._size = micro_batch_size
        self._share_prompts = share_prompts
        self._capacity = capacity

    def __call__(self, replies: Replies) -> Scores:
        scores_B = score_at_last_token(self._values(replies), replies.lengths_B)
        return Scores(scores_B, torch.ones_like(scores_B, dtype=torch.bool))

    def _values(self, replies: Replies) -> torch.Tensor:
        """fp32 [B, S]."""
        given = {"tokens_BS": replies.tokens_BS}
        if self._capacity is not None:
            given["lengths_B"] = replies.lengths_B
            return packed.outputs(self._model, *packed.pack_rows(given, self._capacity))["values_BS"]
        if self._share_prompts:
            device = replies.tokens_BS.device
            given |= {
                "lengths_B": replies.lengths_B,
                "prompt_lengths_B": torch.tensor([len(ids) for ids in replies.prompt_ids], device=device),
                GROUP: torch.arange(len(replies), device=device) // replies.group_size,
            }
        parts = zip(*(tensor.split(self._size) for tensor in given.values()), strict=True)
        rows = [dict(zip(given, part, strict=True)) for part in parts]
        return torch.cat(forward.values(self._model, rows))
