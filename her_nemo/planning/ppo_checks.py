"""What can be known to be wrong with a PPO run before it begins: group sizes, rewards, losses that do nothing."""

from __future__ import annotations

from collections.abc import Iterator

from her_nemo.config.errors import Problem
from her_nemo.config.schema import PpoConfig

ROLLOUTS, GROUP = "model.ppo.num_rollout_samples", "model.ppo.num_samples_per_prompt"
ESTIMATOR = "trainer.ppo.advantage_estimator"


def check(config: PpoConfig, replicas: int) -> Iterator[Problem]:
    """Problems of the algorithm and the reward. `replicas`: the data-parallel size."""
    yield from _groups(config, replicas)
    yield from _rows(config)
    yield from _algorithm(config)
    yield from _reward(config)


def _groups(config: PpoConfig, replicas: int) -> Iterator[Problem]:
    """Each replica has whole groups, of a rollout and of a minibatch: results then do not depend on the layout."""
    group, samples, batch = (
        config.model.ppo.num_samples_per_prompt,
        config.model.ppo.num_rollout_samples,
        config.model.global_batch_size,
    )
    turns, whole = config.model.ppo.dialogue.turns, group * replicas
    if turns > 1 and samples % (turns * whole):
        product = f"model.ppo.dialogue.turns {turns} x {GROUP} {group} x data-parallel size {replicas}"
        hint = f"use {ROLLOUTS}={-(-samples // (turns * whole)) * turns * whole}"
        yield Problem(ROLLOUTS, f"{samples} is not a multiple of {product} = {turns * whole}", hint=hint)
    if group > 1:
        for key, count in ((ROLLOUTS, samples if turns == 1 else 0), ("model.global_batch_size", batch)):
            if count % whole:
                text = f"{count} is not a multiple of {GROUP} {group} x data-parallel size {replicas} = {whole}"
                yield Problem(key, text, hint=f"use {key}={-(-count // whole) * whole}")
    elif not config.trainer.ppo.has_critic:
        text = f"1 leaves {config.trainer.ppo.advantage_estimator} nothing to compare a reply with"
        yield Problem(GROUP, text, hint=f"use {GROUP}=8, or {ESTIMATOR}=gae")


def _rows(config: PpoConfig) -> Iterator[Problem]:
    """How replies are laid out for a forward pass: one way or the other."""
    ppo, shared = config.model.ppo, "model.ppo.share_prompts"
    if ppo.share_prompts and ppo.packing:
        text = "packed rows hold whole sequences, each with a prompt of its own"
        yield Problem(shared, text, hint="set it or model.ppo.packing to false")
    if ppo.share_prompts and ppo.dialogue.on:
        text = "turns of a conversation answer prompts of their own, of which no other reply shares one"
        yield Problem(shared, text, hint="set it to false, or model.ppo.dialogue.turns=1")


def _algorithm(config: PpoConfig) -> Iterator[Problem]:
    loop, ppo = config.trainer.ppo, config.model.ppo
    if loop.critic_warmup_steps and not loop.has_critic:
        text = f"{loop.critic_warmup_steps}, but {ESTIMATOR}={loop.advantage_estimator} has no critic"
        yield Problem("trainer.ppo.critic_warmup_steps", text, hint="set it to 0")
    if loop.kl.placement == "loss" and loop.kl.estimator == "k1":
        text = "k1 in the loss has a gradient whose expectation is 0: no penalty at all"
        hint = "use trainer.ppo.kl.estimator=k3 (or k2), or trainer.ppo.kl.placement=reward"
        yield Problem("trainer.ppo.kl.estimator", text, hint=hint)
    if loop.kl.target is not None and not loop.initial_policy_kl_penalty:
        hint = "give the coefficient to begin with, 0.02 say"
        text = "0 stays 0 however it is multiplied: trainer.ppo.kl.target has no effect"
        yield Problem("trainer.ppo.initial_policy_kl_penalty", text, hint=hint)
    if loop.kl.target is not None and ppo.num_rollout_samples >= 5 * loop.kl.horizon:
        text = f"{loop.kl.horizon:g} replies is a fifth of a rollout or less: one step could turn the penalty's sign"
        yield Problem("trainer.ppo.kl.horizon", text, hint=f"use {10 * ppo.num_rollout_samples} or more")


def _reward(config: PpoConfig) -> Iterator[Problem]:
    reward, rules, variety = config.reward, config.reward.rules, config.reward.diversity
    if reward.has_model and reward.restore_from_path is None:
        text = f"has to be given: reward.kind={reward.kind} scores with a reward model"
        yield Problem("reward.restore_from_path", text, hint="give a reward run's directory, or set reward.kind=rules")
    if not reward.has_model and reward.restore_from_path is not None:
        text = f"reward.kind={reward.kind} does not use a reward model"
        yield Problem("reward.restore_from_path", text, hint="leave it out, or set reward.kind=mix")
    weighs = reward.kind == "rules" or (reward.kind == "mix" and reward.mix.rules > 0)
    if weighs and not (rules.format or rules.leak or rules.length or rules.repetition):
        yield Problem("reward.rules", "every rule has weight 0", hint="give one of them a weight")
    if reward.kind == "mix" and not (reward.mix.scalar or reward.mix.rules or reward.mix.generative):
        yield Problem("reward.mix", "every part has weight 0", hint="give one of them a weight")
    if reward.kind == "verdict" and not reward.verdict.correct:
        text = "0: a judge would learn the form of a verdict and nothing else"
        yield Problem("reward.verdict.correct", text, hint="give it a weight, 1 say")
    if rules.min_words > rules.max_words:
        yield Problem("reward.rules.min_words", f"{rules.min_words} is more than max_words = {rules.max_words}")
    if variety.rewarded and config.model.ppo.num_samples_per_prompt < 2:
        text = "a reply to a prompt of its own has no others to differ from"
        yield Problem("reward.diversity", text, hint=f"set {GROUP} to 2 or more, or both weights to 0")
    limits = variety.max_top1_share is not None or variety.min_pattern_entropy is not None
    if variety.window == 1 or (limits and not variety.window):
        hint = "set it to a few hundred replies; 0 turns the watch off, and its limits have to be null then"
        yield Problem("reward.diversity.window", f"{variety.window} replies show no variety", hint=hint)
    if variety.action == "stop" and not limits:
        text = "stop, but there is no limit to stop at"
        hint = "set reward.diversity.max_top1_share=0.9 or min_pattern_entropy"
        yield Problem("reward.diversity.action", text, hint=hint)
