"""Log-probabilities and entropy from vocabulary-parallel logits, without gathering the vocabulary.

Each tensor-parallel rank holds a slice of the logits. Two small all-reduces (the maximum, then the sums) are all
that crosses ranks; the backward needs none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


class _VocabParallelLogProbs(torch.autograd.Function):
    """log softmax(logits / temperature)[target] and its entropy, over a vocabulary split across `group`.

    Keeps one fp32 tensor of the logits' size (the probabilities), which the backward turns into the gradient in
    place. d log p_t / dx_j = 1[j=t] - p_j;  dH / dx_j = -p_j (log p_j + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup | None,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rank = 0 if group is None else group.rank()
        parallel = group is not None and group.size() > 1
        width = logits.shape[-1]
        start = rank * width
        valid = max(0, min(width, vocab_size - start))
        x = logits[..., :valid].float()
        if temperature != 1.0:
            x = x / temperature
        peak = x.amax(-1) if valid else x.new_full(x.shape[:-1], float("-inf"))
        if parallel:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        # Out of place: x may still be the caller's logits.
        x = x - peak.unsqueeze(-1)

        local = target - start
        here = (local >= 0) & (local < valid)
        local = torch.where(here, local, 0)
        if valid:
            at_target = x.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0.0)
        else:
            at_target = torch.zeros_like(peak)
        exp = torch.exp(x) if with_entropy else x.exp_()
        sums = [exp.sum(-1), at_target]
        if with_entropy:
            sums.append((exp * x).sum(-1))
        packed = torch.stack(sums)
        if parallel:
            dist.all_reduce(packed, group=group)
        log_z = packed[0].log()
        log_probs = packed[1] - log_z
        entropy = log_z - packed[2] / packed[0] if with_entropy else log_probs.new_empty(0)
        exp /= packed[0].unsqueeze(-1)

        ctx.save_for_backward(exp, local, here, entropy)
        ctx.temperature, ctx.width, ctx.dtype, ctx.with_entropy = temperature, width, logits.dtype, with_entropy
        ctx.spent = False
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[Any, ...]:
        if ctx.spent:
            raise RuntimeError("the backward of vocabulary-parallel log-probs can run only once")
        ctx.spent = True
        p, local, here, entropy = ctx.saved_tensors
        g = grad_log_probs.unsqueeze(-1)
        if ctx.with_entropy:
            h = grad_entropy.unsqueeze(-1)
            surprise = torch.special.xlogy(p, p).mul_(h)
            grad = p.mul_(-(g + h * entropy.unsqueeze(-1))).sub_(surprise)
        else:
            grad = p.mul_(-g)
        if grad.shape[-1]:
            grad.scatter_add_(-1, local.unsqueeze(-1), (grad_log_probs * here).unsqueeze(-1))
        if ctx.temperature != 1.0:
            grad /= ctx.temperature
        if grad.shape[-1] != ctx.width:
            grad = F.pad(grad, (0, ctx.width - grad.shape[-1]))
        return grad.to(ctx.dtype), None, None, None, None, None


def vocab_parallel_log_probs(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of `target` and, if asked for, the entropy of the distribution, in nats and fp32.

    logits [..., V_padded / tp] are this rank's slice; target [...] int64 holds ids < vocab_size. Columns from
    `vocab_size` on are padding and take no part. The distribution is softmax(logits / temperature).
    Returns (log_probs [...], entropy [...] or None); gradients flow through both.
    """
    log_probs, entropy = _VocabParallelLogProbs.apply(
        logits, target, vocab_size, temperature, group, with_entropy
    )
    return log_probs, entropy if with_entropy else None
