"""What a PPO step reports: NeMo-Aligner's TensorBoard tags and ours, the replies themselves, and the summary.

Sums are over all replicas; a function here divides them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from her_nemo.data.tokenise import KIND_NAMES
from her_nemo.evaluation.vitals import vitals
from her_nemo.training.learner import mean_loss

TOLD = "told/"  # before the names of sums that are not of every run
ROLLOUT_MEANS = ("rewards", "rewards_with_kl", "init_policy_kl", "response_lengths", "finished")


def rollout_tags(sums: dict[str, float], gap: float) -> dict[str, float]:
    """Means over replies, the gap between engine and trainer, and KL and entropy by segment kind (nats a token)."""
    samples, tokens = sums["samples"], sums["tokens"]
    tags = {f"train_rollouts/{name}": sums[name] / samples for name in ROLLOUT_MEANS}
    tags["train_rollouts/rewards"] = mean_reward(sums)
    tags |= {"rollout/logprob_gap_max": gap, "rollout/logprob_gap_mean": sums["gap"] / tokens}
    for kind, name in KIND_NAMES.items():
        if sums[f"kind{kind}_tokens"]:
            tags[f"layers/{name}/kl"] = sums[f"kind{kind}_kl"] / sums[f"kind{kind}_tokens"]
            tags[f"layers/{name}/entropy"] = sums[f"kind{kind}_entropy"] / sums[f"kind{kind}_tokens"]
            tags[f"layers/{name}/tokens"] = sums[f"kind{kind}_tokens"] / samples
    return tags


def mean_reward(sums: dict[str, float]) -> float:
    """Over the replies that have a score; 0 if none has."""
    return sums["rewards"] / sums["scored"] if sums["scored"] else 0.0


def reward_tags(sums: dict[str, float]) -> dict[str, float]:
    """What the reward told besides its score, a reply, and the weights against the engine, a token."""
    tags = {}
    for key in (key for key in sums if key.startswith(TOLD)):
        name = key.removeprefix(TOLD)
        if name.startswith("importance"):
            tags[f"rollout/{name}"] = sums[key] / sums["tokens"]
        elif name != "unscored" or sums[key]:
            tags[f"reward/{name}"] = sums[key] / sums["samples"]
    return tags


def roleplay_tags(replies: Sequence[str]) -> dict[str, float]:
    """The vitals of a rollout, which show a policy that breaks its format or falls onto one pattern."""
    seen = vitals(replies)
    return {
        "roleplay/format_valid": seen.format_valid,
        "roleplay/leak_rate": seen.leak_rate,
        "roleplay/pattern_entropy": seen.pattern_entropy,
        "roleplay/top1_pattern_share": seen.top1_pattern_share,
        "roleplay/self_bleu": seen.self_bleu,
    }


def validation_tags(sums: dict[str, float]) -> dict[str, float]:
    """Means over the replies of one validation."""
    lengths = {
        f"val_rollouts/{name}": sums[name] / sums["samples"] for name in ("response_lengths", "finished")
    }
    return {"val_rollouts/rewards": mean_reward(sums), **lengths}


def actor_tags(passes: list[dict[str, float]]) -> dict[str, float]:
    """Means over the updates of one step: the loss as it is weighted, all else and each kind's loss plain."""
    total = {name: sum(sums[name] for sums in passes) for name in passes[0]}
    tokens = max(total["tokens"], 1.0)  # none where no reply has a score
    tags = {
        "train_optim/loss": mean_loss(total),
        "train_optim/ppo_ratio": total["ratio_sum"] / tokens,
        "train_optim/ppo_ratio_clamped": total["clipped_ratio_sum"] / tokens,
        "train_optim/clip_fraction": total["clip_fraction_sum"] / tokens,
        "train_optim/grad_norm": passes[-1]["grad_norm"],
        "train_optim/lr": passes[-1]["lr"],
    }
    for name, tag in (
        ("dual_clip_sum", "dual_clip_fraction"), ("loss_kl_sum", "loss_kl"), ("entropy_sum", "entropy")
    ):  # fmt: skip
        if name in total:
            tags[f"train_optim/{tag}"] = total[name] / tokens
    for name in KIND_NAMES.values():
        if total[f"{name}_tokens"]:
            tags[f"layers/{name}/loss"] = total[f"{name}_loss"] / total[f"{name}_tokens"]
    return tags


def critic_tags(passes: list[dict[str, float]]) -> dict[str, float]:
    """The same of the critic."""
    count = max(sum(sums["count"] for sums in passes), 1.0)
    return {
        "critic/loss": sum(sums["loss_sum"] for sums in passes) / count,
        "critic/value": sum(sums["value_sum"] for sums in passes) / count,
        "critic/return": sum(sums["return_sum"] for sums in passes) / count,
        "critic/grad_norm": passes[-1]["grad_norm"],
    }


def summarise(summary: dict[str, Any], sums: dict[str, float], gap: float) -> None:
    """First and last reward (mean over a rollout), last KL (nats a reply), largest gap to the engine so far."""
    reward = mean_reward(sums)
    summary.setdefault("reward_first", reward)
    summary["reward_last"] = reward
    summary["kl_last"] = sums["init_policy_kl"] / sums["samples"]
    summary["logprob_gap_max"] = max(gap, summary.get("logprob_gap_max", 0.0))


def write_samples(run_dir: Path, step: int, rows: Sequence[dict[str, Any]], kind: str = "") -> None:
    """`<run>/samples/step_00000012.jsonl`: what was asked, what came, its reward, the version of the weights.

    `kind` goes before the name.
    """
    directory = run_dir / "samples"
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / f"{kind}step_{step:08d}.jsonl").write_text(lines, encoding="utf-8")
