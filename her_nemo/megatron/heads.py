"""The scalar head of reward model and critic: hidden -> 1, in place of the vocabulary projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from her_nemo.megatron import platform

_SEED = 7_919


class ScalarHead(torch.nn.Module):
    """Linear map [hidden] -> [1] without bias, computed in fp32, the same on every tensor-parallel rank.

    It stands where GPTModel keeps its output layer. Under sequence parallelism the sequence is gathered first;
    every rank then computes the same values, so the backward of the gather is a plain split, and the weight's
    gradient is already equal on all tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.weight = torch.nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=platform.device())
        )
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the weight from N(0, 1/hidden): values start near unit scale on normalised hidden states.

        A fixed seed and a generator of its own: equal on all ranks, at every layout, in every run.
        """
        generator = torch.Generator().manual_seed(_SEED)
        hidden = self.weight.shape[1]
        drawn = torch.randn(1, hidden, generator=generator) / hidden**0.5
        self.weight.copy_(drawn)

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: Any = None
    ) -> tuple[torch.Tensor, None]:
        """hidden [S or S/tp, B, hidden] -> (values [S, B, 1] fp32, None), as megatron-core's output layer does."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return F.linear(hidden.float(), self.weight.float()), None
