"""Reading a scalar reward model: its score is the value at the last token of the reply."""

from __future__ import annotations

import torch
from torch import Tensor


def score_at_last_token(values_BS: Tensor, lengths_B: Tensor) -> Tensor:
    """The score of each sequence: [B], with gradient.

    Args:
        values_BS: [B, S] the scalar head at every token.
        lengths_B: [B] tokens of each sequence, padding not counted; the last one is the reply's <|im_end|>.

    Raises:
        ValueError: if a length is not in [1, S].
    """
    if bool(((lengths_B < 1) | (lengths_B > values_BS.shape[1])).any()):
        raise ValueError(f"lengths {lengths_B.tolist()} are not all in [1, {values_BS.shape[1]}]")
    last = (lengths_B.to(torch.int64) - 1).unsqueeze(1)
    return values_BS.float().gather(1, last).squeeze(1)
