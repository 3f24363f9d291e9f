"""The loss of a reward model on preference pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from her_nemo.algorithms.masking import wide


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood of the preferences under Bradley and Terry's model.

        P(chosen > rejected) = sigmoid(s_chosen - s_rejected),    loss = - sum_b log P_b

    Bradley and Terry, "Rank analysis of incomplete block designs" (1952); as a reward-model loss in Ouyang et
    al., "Training language models to follow instructions with human feedback" (2022).

    Args:
        chosen_B, rejected_B: [B] scores of the better and of the worse reply.

    Returns:
        (loss_sum, pair_count, accuracy_sum), scalars. A tie counts one half in the accuracy.
    """
    margin = wide(chosen_B) - wide(rejected_B)
    loss = -functional.logsigmoid(margin).sum()
    right = (margin.detach() > 0).to(margin.dtype) + 0.5 * (margin.detach() == 0).to(margin.dtype)
    return loss, margin.new_tensor(float(margin.numel())), right.sum()
