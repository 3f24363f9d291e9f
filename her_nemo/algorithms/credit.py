"""Which score a turn of a conversation is trained on: its own, the last one's, or something of all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from her_nemo.algorithms.masking import masked

CREDITS = ("conversation", "last", "to_go", "turn")


@torch.no_grad()
def turn_returns(
    scores_B: Tensor, keep_B: Tensor, turns: int, group_size: int, credit: str, discount: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The return of each turn, and whether it has one.

        conversation    R_k = mean of s_j over the turns j that have a score
        last            R_k = s_K
        to_go           R_k = sum_{j >= k} discount^(j - k) s_j
        turn            R_k = s_k

    A turn has a return if what its formula names has: for `conversation` one score at least, for `to_go` all from k on.

    Args:
        scores_B: [B] score of each turn; rows by start, then turn, then conversation, so B = N K G.
        keep_B: [B] False for turns without a score.
        turns, group_size: K, and the conversations from one start G.
        credit: one of CREDITS.
        discount: of `to_go`, in [0, 1].

    Returns:
        (returns_B, keep_B), returns 0 where there is none.

    Raises:
        ValueError: B is no multiple of K G, or there is no such credit.
    """
    if scores_B.numel() % (turns * group_size):
        raise ValueError(f"{scores_B.numel()} scores are not whole conversations of {turns} turns x {group_size}")
    keep = (keep_B != 0).view(-1, turns, group_size)
    scores = masked(scores_B, keep_B).double().view(-1, turns, group_size)
    if credit == "conversation":
        count = keep.sum(dim=1, keepdim=True)
        returns = (scores.sum(dim=1, keepdim=True) / count.clamp(min=1)).expand(scores.shape)
        kept = (count > 0).expand(keep.shape)
    elif credit == "last":
        returns, kept = scores[:, -1:].expand(scores.shape), keep[:, -1:].expand(keep.shape)
    elif credit == "to_go":
        returns, kept = scores.clone(), keep.clone()
        for k in reversed(range(turns - 1)):
            returns[:, k] += discount * returns[:, k + 1]
            kept[:, k] &= kept[:, k + 1]
    elif credit == "turn":
        returns, kept = scores, keep
    else:
        raise ValueError(f"credit is {credit!r}, not one of {', '.join(CREDITS)}")
    kept = kept.reshape(-1)
    return masked(returns.reshape(-1).to(scores_B.dtype), kept), kept
