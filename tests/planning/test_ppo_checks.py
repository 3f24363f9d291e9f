"""What preflight finds wrong with a PPO algorithm or reward, each with its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from her_nemo.config import compose
from her_nemo.config.compose import conf_dir
from her_nemo.config.schema import PpoConfig
from her_nemo.planning import ppo_checks

ROLLOUTS, GROUP = "model.ppo.num_rollout_samples", "model.ppo.num_samples_per_prompt"
REWARD, WINDOW = "reward.restore_from_path", "reward.diversity.window"
GRPO = ["trainer.ppo.advantage_estimator=grpo", f"{GROUP}=4"]
RULES = ["reward.kind=rules", f"{REWARD}=null"]
ALGORITHMS = sorted(file.stem for file in (conf_dir() / "algorithm").glob("*.yaml"))


def config(*overrides: str) -> PpoConfig:
    given = [
        "pretrained_checkpoint.restore_from_path=/m", "model.data.train_ds.file_path=/d", f"{REWARD}=/r",
        "model.global_batch_size=64",
    ]  # fmt: skip
    loaded = compose.load("ppo", [*given, *overrides])
    assert isinstance(loaded, PpoConfig)
    return loaded


def found(*overrides: str, replicas: int = 2) -> dict[str, str]:
    return {problem.key: str(problem) for problem in ppo_checks.check(config(*overrides), replicas)}


@pytest.mark.parametrize(
    "overrides",
    [[], GRPO, RULES, ["reward.kind=mix"], [*GRPO, *RULES, "reward.diversity.pattern_weight=0.1"],
     ["trainer.ppo.kl.target=6.0"], [f"{WINDOW}=64", "reward.diversity.max_top1_share=0.9"],
     *([f"algorithm={name}"] for name in ALGORITHMS)],
)  # fmt: skip
def test_nothing_is_wrong(overrides: list[str]) -> None:
    assert found(*overrides) == {}


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        ([*GRPO, f"{ROLLOUTS}=60"], ROLLOUTS, "use model.ppo.num_rollout_samples=64"),
        ([*GRPO, "model.global_batch_size=4"], "model.global_batch_size", "use model.global_batch_size=8"),
        (["trainer.ppo.advantage_estimator=rloo"], GROUP, "1 leaves rloo nothing to compare"),
        ([*GRPO, "trainer.ppo.critic_warmup_steps=2"], "trainer.ppo.critic_warmup_steps", "has no critic"),
        (["trainer.ppo.kl.placement=loss"], "trainer.ppo.kl.estimator", "expectation is 0"),
        (["trainer.ppo.kl.target=6.0", "trainer.ppo.initial_policy_kl_penalty=0.0"],
         "trainer.ppo.initial_policy_kl_penalty", "0 stays 0"),
        (["trainer.ppo.kl.target=6.0", "trainer.ppo.kl.horizon=10.0"], "trainer.ppo.kl.horizon", "use 640"),
        ([f"{REWARD}=null"], REWARD, "has to be given"),
        (["reward.kind=rules"], REWARD, "does not use a reward model"),
        ([*RULES, "reward.rules.format=0.0", "reward.rules.leak=0.0"], "reward.rules", "every rule has weight 0"),
        (["reward.kind=mix", f"{REWARD}=null", "reward.mix.scalar=0.0", "reward.mix.rules=0.0"],
         "reward.mix", "every part"),
        ([*RULES, "reward.rules.min_words=200"], "reward.rules.min_words", "more than max_words"),
        (["reward.diversity.text_weight=1.0"], "reward.diversity", "no others to differ from"),
        (["reward.diversity.max_top1_share=0.9"], WINDOW, "no variety"),
        ([f"{WINDOW}=64", "reward.diversity.action=stop"], "reward.diversity.action", "no limit to stop at"),
    ],
)  # fmt: skip
def test_what_is_wrong(overrides: list[str], key: str, words: str) -> None:
    problems = found(*overrides)
    assert words in problems[key], problems


def test_groups_are_counted_by_replica() -> None:
    assert found(*GRPO, "model.global_batch_size=4", replicas=1) == {}


def test_the_algorithms_are_what_their_papers_say() -> None:
    grpo, gspo, dr_grpo = (config(f"algorithm={name}") for name in ("grpo", "gspo", "dr_grpo"))
    assert (grpo.trainer.ppo.kl.placement, grpo.trainer.ppo.kl.estimator) == ("loss", "k3")
    assert grpo.model.ppo.loss_aggregation == gspo.model.ppo.loss_aggregation == "sequence_mean"
    assert (gspo.model.ppo.ratio_level, gspo.model.ppo.ratio_eps_high) == ("sequence", 4e-4)
    assert dr_grpo.model.ppo.loss_aggregation == "constant"
    for name in ALGORITHMS:
        chosen = config(f"algorithm={name}").trainer.ppo
        assert not chosen.has_critic
        assert not chosen.whitens
        assert config(f"algorithm={name}", "trainer.ppo.normalize_advantages=true").trainer.ppo.whitens


def test_without_any_of_it_a_run_is_what_it_was() -> None:
    plain = config()
    loop, ppo = plain.trainer.ppo, plain.model.ppo
    assert (loop.advantage_estimator, loop.whitens, loop.normalize_rewards) == ("gae", True, False)
    assert (loop.kl.placement, loop.kl.estimator, loop.kl.target) == ("reward", "k1", None)
    assert (ppo.num_samples_per_prompt, ppo.ratio_level, ppo.loss_aggregation) == (1, "token", "token_mean")
    assert (ppo.dual_clip, ppo.ratio_eps_high, ppo.importance.correction) == (None, None, "none")
    assert (plain.reward.kind, plain.reward.diversity.window) == ("scalar", 0)
    assert Path(plain.exp_manager.explicit_log_dir).name == "ppo"
