"""What each process of a PPO learning test does: the loop of stages/ppo.py on a reward whose optimum is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from qwen3_checks import build, start
from qwen3_reference import VOCAB

from her_nemo.algorithms.ppo_loss import policy_loss, value_loss
from her_nemo.config.sections import OptimConfig
from her_nemo.megatron import parallel
from her_nemo.rollout import experience as ex
from her_nemo.rollout.engine import Sampling
from her_nemo.rollout.experience import Experience
from her_nemo.rollout.megatron_engine import MegatronEngine
from her_nemo.training.learner import Learner

WANTED, REPLY, SAMPLES = 7, 6, 48


def wanted_share(experience: Experience) -> torch.Tensor:
    """Share of the reply that is the wanted token: 1 at best, about 1/VOCAB for a policy that knows nothing."""
    drawn = (experience.tokens_BS[:, 1:] == WANTED) & experience.mask_BT
    return drawn.sum(1) / experience.mask_BT.sum(1)


def learn(args: dict) -> dict:
    """PPO for args["steps"] on reward args["reward"]: "wanted" (a known optimum) or "noise" (nothing to learn)."""
    start(args["layout"])
    directory, layout = Path(args["directory"]), args["layout"]
    optim = OptimConfig(name="fused_adam", lr=args["lr"], weight_decay=0.0)
    models = [build(directory, "tied", layout), build(directory, "tied", layout, head="scalar")]
    limits = {"clip_grad": 1.0, "max_steps": args["steps"]}
    actor = Learner("model", models[0], optim, **limits)
    critic = Learner("critic", models[1], optim, **limits)
    reference = build(directory, "tied", layout, trainable=False)
    engine = MegatronEngine(actor.model, pad_id=0, micro_batch_size=SAMPLES)
    noise = torch.Generator().manual_seed(parallel.data_rank())
    share, ratios, kls = [], [], []
    for step in range(args["steps"]):
        prompts = [[1 + index % (VOCAB - 1), 3, 5] for index in range(SAMPLES)]
        rollout = engine.generate(prompts, Sampling(max_tokens=REPLY), seed=step)
        experience = Experience.from_rollout(rollout, [[4] * REPLY] * SAMPLES, pad_id=0)
        share.append(float(wanted_share(experience).mean()))
        scores: dict[str, Callable[[], torch.Tensor]] = {
            "wanted": lambda seen=experience: wanted_share(seen),
            "noise": lambda: torch.randn(SAMPLES, generator=noise),
        }
        experience.scores_B = scores[args["reward"]]()
        ex.evaluate_policy(experience, actor.model, reference, critic.model, 16, 1.0)
        ex.estimate_advantages(experience, kl_penalty=0.0, discount=1.0, gae_lambda=0.95, normalize=True)
        sums = ex.statistics(experience)
        kls.append(float(sums["init_policy_kl"] / sums["tokens"]))
        batch = experience.micro_batches(16)
        critic.update(
            batch,
            lambda out, rows: value_loss(
                out.values_BS[:, :-1], rows["values_BT"], rows["returns_BT"], rows["mask_BT"], None
            ),
            step=step,
        )
        done = actor.update(
            batch,
            lambda out, rows: policy_loss(
                out.log_probs_BT, rows["old_log_probs_BT"], rows["advantages_BT"], rows["mask_BT"], 0.2, 0.2
            ),
            step=step,
        )
        ratios.append(done["ratio_sum"] / done["count"])
    return {"share": share, "ratios": ratios, "kl": kls}


def learn_relative(args: dict) -> dict:
    """The same task by group-relative advantages, args["group"] replies to a prompt, dealt out over the replicas."""
    start(args["layout"])
    directory, layout, group = Path(args["directory"]), args["layout"], args["group"]
    optim = OptimConfig(name="fused_adam", lr=args["lr"], weight_decay=0.0)
    actor = Learner(
        "model", build(directory, "tied", layout), optim, clip_grad=1.0, max_steps=args["steps"]
    )
    reference = build(directory, "tied", layout, trainable=False)
    engine = MegatronEngine(actor.model, pad_id=0, micro_batch_size=SAMPLES)
    mine = range(parallel.data_rank(), SAMPLES // group, parallel.data_size())
    places = [(index, index * group + sample) for index in mine for sample in range(group)]
    share, ratios, first = [], [], []
    for step in range(args["steps"]):
        prompts = [[1 + index % (VOCAB - 1), 3, 5] for index, _ in places]
        rollout = engine.generate(
            prompts, Sampling(max_tokens=REPLY), seed=step, indices=[place for _, place in places]
        )
        experience = Experience.from_rollout(rollout, [[4] * REPLY] * len(places), pad_id=0)
        experience.scores_B = wanted_share(experience)
        share.append(everyones(experience.scores_B, group))
        ex.evaluate_policy(experience, actor.model, reference, None, 8, 1.0)
        ex.estimate_advantages(
            experience, kl_penalty=0.0, discount=1.0, gae_lambda=1.0, normalize=False,
            estimator=args["estimator"], group_size=group,
        )  # fmt: skip
        first = first or everyones(experience.advantages_BT[:, -1], group)
        done = actor.update(
            experience.micro_batches(8),
            lambda out, rows: policy_loss(
                out.log_probs_BT, rows["old_log_probs_BT"], rows["advantages_BT"], rows["mask_BT"], 0.2, 0.2
            ),
            step=step,
        )
        ratios.append(done["ratio_sum"] / done["count"])
    return {"share": [sum(row) / len(row) for row in share], "ratios": ratios, "advantages": first}


def everyones(values_B: torch.Tensor, group: int) -> list[float]:
    """The values of all replicas, in the order of prompts."""
    parts = parallel.data_gather_objects(values_B.view(-1, group).tolist())
    return [value for row in zip(*parts, strict=True) for one in row for value in one]
