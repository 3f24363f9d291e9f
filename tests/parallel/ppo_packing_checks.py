"""What each process of the test of packed PPO does: one experience, in rows and packed, through models and losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from packing_checks import gradients
from qwen3_checks import build, far, start
from qwen3_reference import VOCAB

from her_nemo.algorithms.ppo_loss import aggregate, policy_loss, value_loss
from her_nemo.megatron import forward, parallel
from her_nemo.rewards.reward import Replies
from her_nemo.rewards.reward_model import ScalarReward
from her_nemo.rollout import experience as ex
from her_nemo.rollout.engine import Rollout
from her_nemo.rollout.experience import Experience
from her_nemo.training import packed
from her_nemo.training.learner import global_sums

ROWS, CAPACITY = 20, 64


def experience() -> Experience:
    """This replica's rows of twenty prompts and replies of 3 to 31 tokens together."""
    draw = np.random.default_rng(7)
    prompts, replies = [], []
    for _ in range(ROWS):
        length = int(draw.integers(3, 32))
        cut = int(draw.integers(1, length))
        ids = draw.integers(0, VOCAB, length).tolist()
        prompts.append(ids[:cut])
        replies.append(ids[cut:])
    mine = slice(parallel.data_rank(), None, parallel.data_size())
    prompts, replies = prompts[mine], replies[mine]
    said = Rollout(prompts, replies, [[-1.0] * len(ids) for ids in replies], 0, [True] * len(replies))
    found = Experience.from_rollout(said, [[4] * len(ids) for ids in replies], pad_id=0, length=32)
    found.scores_B = torch.tensor([float(len(ids)) for ids in replies])
    return found


def policy(how: str, sequence_ratio: bool):
    def objective(outputs, rows):
        weights, count = aggregate(rows["mask_BT"], None, how, 16.0)
        loss, tokens, sums = policy_loss(
            outputs.log_probs_BT, rows["old_log_probs_BT"] - 0.1 * rows["advantages_BT"], rows["advantages_BT"],
            rows["mask_BT"], 0.2, 0.2, token_weights=weights, sequence_ratio=sequence_ratio,
            entropy=outputs.entropy_BT, entropy_bonus=0.01,
        )  # fmt: skip
        return loss, tokens if count is None else count, sums

    return objective


def critic(outputs, rows):
    return value_loss(outputs.values_BS[:, :-1], rows["values_BT"], rows["returns_BT"], rows["mask_BT"], 0.2)


def scores(model, found: Experience, capacity: int | None) -> torch.Tensor:
    """Of a reward model, which has no use for the text."""
    none = [""] * len(found)
    replies = Replies(none, none, [[]] * len(found), [[]] * len(found), [True] * len(found), found.tokens_BS,
                      found.lengths_B)  # fmt: skip
    return ScalarReward(model, 2, capacity=capacity)(replies).scores_B


def compare(args: dict) -> dict:
    """{layout: what differs between rows and packed rows, and how many passes each took}."""
    directory, results = Path(args["directory"]), {}
    for layout in args["layouts"]:
        start(layout)
        models = {head: build(directory, "tied", layout, head=head) for head in ("lm", "scalar")}
        plain, dense = experience(), experience()
        ex.evaluate_policy(plain, models["lm"], models["lm"], models["scalar"], 2, 0.7)
        ex.evaluate_policy(dense, models["lm"], models["lm"], models["scalar"], 2, 0.7, capacity=CAPACITY)
        names = ("old_log_probs_BT", "ref_log_probs_BT", "entropy_BT", "values_BT")
        found = {name: far(getattr(plain, name)[plain.mask_BT], getattr(dense, name)[plain.mask_BT]) for name in names}
        found["scores"] = far(scores(models["scalar"], plain, None), scores(models["scalar"], plain, CAPACITY))
        ex.estimate_advantages(plain, kl_penalty=0.0, discount=1.0, gae_lambda=0.9, normalize=True)
        rows = plain.micro_batches(2)
        bins, _ = packed.pack_rows(plain.rows(0, len(plain)), CAPACITY)
        objectives = {f"{how} {level}": ("lm", policy(how, level)) for how in ("token_mean", "sequence_mean")
                      for level in (False, True)}  # fmt: skip
        for name, (head, objective) in (objectives | {"critic": ("scalar", critic)}).items():
            with_entropy = head == "lm"
            sums = global_sums(forward.forward_backward(models[head], rows, objective, with_entropy=with_entropy))
            wanted = gradients(models[head])
            reports = forward.forward_backward(
                models[head], bins, packed.on_rows(objective), with_entropy=with_entropy
            )
            got = global_sums(reports)
            found[name] = {
                "gradients": far(gradients(models[head]), wanted),
                "largest": float(wanted.abs().max()),
                "sums": max(abs(got[key] - sums[key]) for key in sums),
            }
        results[layout["name"]] = {**found, "rows": len(rows), "bins": len(bins)}
    return results
