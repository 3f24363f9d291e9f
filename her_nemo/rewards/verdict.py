"""The reward of a judge in training: the policy writes verdicts, and the label of each pair says which are right."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from her_nemo.rewards.reward import Replies, Scores
from her_nemo.roleplay.verdict import VerdictError, Winner, parse_verdict


class VerdictReward:
    """`valid` for a verdict that can be read, and `correct` more if it agrees with the label.

    An unreadable verdict is the policy's own fault: it scores 0 and stays in the update.
    """

    def __init__(self, labels: Mapping[str, Winner], *, correct: float, valid: float) -> None:
        """`labels`: the better reply of each prompt, by its trace_id (data/judge_rows.py: read_labels)."""
        self._labels, self._correct, self._valid = labels, correct, valid

    def __call__(self, replies: Replies) -> Scores:
        """
        Raises:
            KeyError: a prompt without a label.
        """
        rows: list[tuple[float, float, float]] = []
        for trace_id, text in zip(replies.trace_ids, replies.texts, strict=True):
            label = self._labels[trace_id]
            try:
                better = parse_verdict(text).better
            except VerdictError:
                rows.append((0.0, 0.0, 0.0))
            else:
                rows.append((1.0, float(better is label), float(better is Winner.TIE)))
        table = torch.tensor(rows, dtype=torch.float32, device=replies.tokens_BS.device)
        valid, correct, tie = table.unbind(dim=1)
        scores_B = self._valid * valid + self._correct * correct
        parts = {"correct": correct, "tie": tie}
        counts = {"unparsed": float((1 - valid).sum())}
        return Scores(scores_B, torch.ones_like(scores_B, dtype=torch.bool), counts, parts)
