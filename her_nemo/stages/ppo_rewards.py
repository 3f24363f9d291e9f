"""The reward of a PPO run, as its configuration says. A new kind (rewards/reward.py: Reward) is added here."""

from __future__ import annotations

from her_nemo.config.schema import PpoConfig
from her_nemo.data.judge_rows import read_labels
from her_nemo.megatron.qwen3 import Model
from her_nemo.rewards.credit import TurnCredit
from her_nemo.rewards.diversity import DiversityReward
from her_nemo.rewards.reward import Mix, Reward
from her_nemo.rewards.reward_model import ScalarReward
from her_nemo.rewards.rules import RULES, RuleReward
from her_nemo.rewards.verdict import VerdictReward


def build_reward(cfg: PpoConfig, reward_model: Model | None, generative: Reward | None = None) -> Reward:
    """What replies are scored by, in training and in validation alike. `reward_model`, `generative` (a judge's
    comparisons, stages/ppo_judge.py): where the kind needs them."""
    reward = cfg.reward
    if reward.kind == "verdict":
        files = (cfg.model.data.train_ds.file_path, cfg.model.data.validation_ds.file_path)
        labels = read_labels([path for path in files if path is not None], cfg.model.data.skip_malformed)
        return VerdictReward(labels, correct=reward.verdict.correct, valid=reward.verdict.valid)
    parts: dict[str, tuple[float, Reward]] = {}
    if reward_model is not None:
        size, shared = cfg.model.ppo.forward_micro_batch_size, cfg.model.ppo.share_prompts
        scored = ScalarReward(reward_model, size, shared, cfg.model.packed_tokens(size))
        parts["scalar"] = (reward.mix.scalar, scored)
    if generative is not None:
        parts["generative"] = (reward.mix.generative, generative)
    if reward.kind in ("rules", "mix"):
        given = reward.rules.model_dump()
        rules = RuleReward(
            {name: given[name] for name in RULES}, shortest=given["min_words"], longest=given["max_words"]
        )
        parts["rules"] = (reward.mix.rules, rules)
    if reward.kind == "mix":
        return Mix(parts)
    return parts[reward.kind][1]


def with_diversity(cfg: PpoConfig, reward: Reward) -> Reward:
    """The reward of training: with what a reply earns by differing from its group, if that is on."""
    diversity = cfg.reward.diversity
    if not diversity.rewarded:
        return reward
    novelty = DiversityReward(diversity.pattern_weight, diversity.text_weight)
    return Mix({"quality": (1.0, reward), "diversity": (1.0, novelty)})


def with_credit(cfg: PpoConfig, reward: Reward) -> Reward:
    """The reward as each turn of a conversation gets it; as it is, where there are none."""
    dialogue = cfg.model.ppo.dialogue
    return TurnCredit(reward, dialogue.credit, dialogue.discount) if dialogue.on else reward
