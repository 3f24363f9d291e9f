"""Checks that run inside every PPO run: a policy that has not moved has ratio 1 and KL 0, and the engine and
the trainer agree on what was sampled. A break of any of them means wrong gradients, so the run stops."""

from __future__ import annotations

import torch

from her_nemo.data.tokenise import Tokeniser
from her_nemo.megatron import parallel, platform
from her_nemo.rollout.experience import Experience, largest_gap

# Largest |log-prob(trainer) - log-prob(engine)|. bf16 keeps 8 bits of mantissa, so two orders of the same
# sums differ in the second decimal.
ROLLOUT_GAP_LIMIT = {"32": 1e-3, "bf16": 0.5, "bf16-mixed": 0.5}
RATIO_LIMIT = {"32": 1e-5, "bf16": 5e-2, "bf16-mixed": 5e-2}
KL_LIMIT = {"32": 1e-5, "bf16": 1e-1, "bf16-mixed": 1e-1}


class InvariantError(RuntimeError):
    """Something that holds in every correct run did not hold in this one."""


def check_rollout_gap(
    experience: Experience, tokeniser: Tokeniser, step: int, precision: str, staleness: int = 0
) -> float:
    """Largest gap between engine and trainer over all ranks (collective); beyond the limit, name the token.

    Of a rollout from earlier weights (`staleness` updates ago) the gap is how far the policy has moved since, and
    has no limit here: that the engine had the trainer's weights was proved when they were synchronised.
    """
    gap, row, place = largest_gap(experience)
    worst = float(parallel.data_all_reduce(_scalar(gap), torch.distributed.ReduceOp.MAX))
    if worst > ROLLOUT_GAP_LIMIT[precision] and not staleness:
        where = "on another rank"
        if gap == worst:
            token = int(experience.tokens_BS[row, place + 1])
            where = f"token {tokeniser.decode([token])!r} ({token}) at place {place + 1} of row {row}"
        raise InvariantError(
            f"step {step}: rollout and trainer log-probs differ by {worst:.3g}, more than "
            f"{ROLLOUT_GAP_LIMIT[precision]:g} allows at precision {precision}: {where}. The engine samples from "
            "other weights than the trainer holds; the actor was not updated."
        )
    return worst


def check_unmoved_ratio(ratio: float, step: int, precision: str) -> float:
    """The mean policy ratio of the first minibatch after a rollout, where the policy has not moved yet."""
    if abs(ratio - 1.0) > RATIO_LIMIT[precision]:
        raise InvariantError(
            f"step {step}: the policy has not moved since the rollout, yet its ratio is {ratio:.8f}."
        )
    return ratio


def check_unmoved_kl(kl: float, precision: str) -> None:
    """The mean KL to the reference before the first update of the actor."""
    if abs(kl) > KL_LIMIT[precision]:
        raise InvariantError(
            f"the actor has not been updated yet, but its KL to the reference is {kl:.3g}: they hold other weights."
        )


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=platform.device())
