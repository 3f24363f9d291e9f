"""Checks that run inside every PPO run: a policy that has not moved has ratio 1 and KL 0, the engine and the
trainer agree on what was sampled, samples come from the weights they should, and only replies are trained. A
break of any of them means wrong gradients, so the run stops."""

from __future__ import annotations

import torch

from her_nemo.data.tokenise import Tokeniser
from her_nemo.megatron import parallel, platform
from her_nemo.rollout.experience import Experience, gaps

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
    """Largest gap between engine and trainer over all ranks (collective); beyond the limit, the first token that is,
    in the order of ranks, rows and places, is named on every rank.

    Of a rollout from earlier weights (`staleness` updates ago) the gap is how far the policy has moved since, and
    has no limit here: that the engine had the trainer's weights was proved when they were synchronised.
    """
    limit = torch.finfo(torch.float32).max if staleness else ROLLOUT_GAP_LIMIT[precision]
    # A gap that is not a number is beyond any limit, and no maximum over ranks can be taken of it.
    gap_BT = gaps(experience).nan_to_num(nan=torch.inf)
    worst = float(parallel.data_all_reduce(_scalar(float(gap_BT.max())), torch.distributed.ReduceOp.MAX))
    if worst <= limit:
        return worst
    beyond = (gap_BT > limit).nonzero()
    mine = _name_token(experience, tokeniser, *beyond[0].tolist()) if len(beyond) else None
    named = [where for where in parallel.data_gather_objects(mine) if where is not None]
    raise InvariantError(
        f"step {step}: rollout and trainer log-probs differ by {worst:.3g}, more than {limit:g} allows at precision "
        f"{precision}; first at {named[0]}. The engine samples from other weights than the trainer holds; the actor "
        "was not updated."
    )


def _name_token(experience: Experience, tokeniser: Tokeniser, row: int, place: int) -> str:
    token = int(experience.tokens_BS[row, place + 1])
    said = float(experience.rollout_log_probs_BT[row, place])
    found = float(experience.old_log_probs_BT[row, place])
    return (
        f"token {tokeniser.decode([token])!r} ({token}) at place {place + 1} of row {row} on replica "
        f"{parallel.data_rank()}: {said:.4f} in the rollout, {found:.4f} in the trainer"
    )


def check_masks(experience: Experience, step: int) -> None:
    """The mask covers each reply from its first to its last token and nothing else, and no advantage lies outside."""
    place_T = torch.arange(experience.mask_BT.shape[1], device=experience.mask_BT.device)
    first_B1, end_B1 = experience.prompt_lengths_B[:, None] - 1, experience.lengths_B[:, None] - 1
    reply_BT = (place_T >= first_B1) & (place_T < end_B1)
    wrong = (experience.mask_BT != reply_BT) | (~reply_BT & (experience.advantages_BT != 0))
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise InvariantError(
            f"step {step}: row {row} of replica {parallel.data_rank()} is a reply at places "
            f"{int(first_B1[row]) + 1} to {int(end_B1[row])}, but the loss's mask or advantage disagrees at place "
            f"{place + 1}; the actor was not updated."
        )


def check_versions(experience: Experience, current: int, step: int, allowed: int = 0) -> int:
    """How many versions behind the weights the oldest sample of this replica is: at most `allowed`.

    `current` is the version of the trainer's weights, the step of their last update.
    """
    behind_B = current - experience.versions_B
    if bool(((behind_B < 0) | (behind_B > allowed)).any()):
        raise InvariantError(
            f"step {step}: samples of weights {sorted(set(experience.versions_B.tolist()))}, but the actor holds "
            f"version {current} and at most {allowed} behind is allowed; the actor was not updated."
        )
    return int(behind_B.max())


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
