"""PPO: generate -> score -> values and log-probs -> advantages -> critic -> actor -> sync -> log -> save.

Four models share the ranks: the actor and the critic learn; the reference (the policy as it came) and the reward
model stay frozen. Schulman et al. 2017 (arXiv 1707.06347), with the per-token KL penalty of Ziegler et al. 2019
(arXiv 1909.08593).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from her_nemo.algorithms.ppo_loss import policy_loss, value_loss
from her_nemo.config.schema import PpoConfig
from her_nemo.data.loaders import GlobalBatchSampler
from her_nemo.data.tokenise import KIND_NAMES, Prompt, Tokeniser, encode_prompt
from her_nemo.megatron import parallel
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.megatron.weights import hf_tensors
from her_nemo.rollout import experience as ex
from her_nemo.rollout.engine import RolloutEngine, Sampling
from her_nemo.rollout.experience import Experience
from her_nemo.rollout.invariants import check_rollout_gap, check_unmoved_kl, check_unmoved_ratio
from her_nemo.rollout.megatron_engine import MegatronEngine
from her_nemo.training import source as sources
from her_nemo.training.learner import Learner, LossFunction, MicroBatch, global_sums
from her_nemo.training.loop import forever, load_rows
from her_nemo.training.run import Run, open_run


def run(cfg: PpoConfig) -> int:
    ppo, model, precision = cfg.trainer.ppo, cfg.model, cfg.trainer.precision
    with open_run(cfg) as here:
        tokeniser = Tokeniser(here.tokenizer)
        room = model.encoder_seq_length - model.ppo.length_params.max_length
        prompts = load_rows(encode_prompt, tokeniser, model.data.train_ds.file_path, "prompts", model, room)
        reward_source = sources.locate(cfg.reward.restore_from_path)
        critic_source = (
            sources.locate(cfg.critic.restore_from_path) if cfg.critic.restore_from_path else reward_source
        )
        last = ppo.critic_warmup_steps + ppo.max_steps
        limits = {"clip_grad": ppo.gradient_clip_val, "max_steps": last * updates_per_step(cfg)}
        actor = Learner.build("model", cfg, model.optim, source=here.source, head="lm", **limits)
        critic = Learner.build("critic", cfg, cfg.critic.optim, source=critic_source, head="scalar", **limits)
        reference = sources.build(here.source, model, precision, head="lm", trainable=False)
        reward_model = sources.build(reward_source, model, precision, head="scalar", trainable=False)
        engine = MegatronEngine(
            actor.model, pad_id=tokeniser.pad_id, micro_batch_size=model.ppo.rollout_micro_batch_size
        )
        order = GlobalBatchSampler(
            len(prompts), model.ppo.num_rollout_samples, model.seed, model.data.shuffle
        )
        done = here.resume([actor, critic], order)
        batches = forever(order)
        for step in here.steps(done + 1, last, "ppo"):
            experience = generate(cfg, engine, [prompts[i] for i in next(batches)], tokeniser, step)
            ex.score(experience, reward_model, model.ppo.forward_micro_batch_size)
            ex.evaluate_policy(
                experience,
                actor.model,
                reference,
                critic.model,
                model.ppo.forward_micro_batch_size,
                model.ppo.sampling_params.temperature,
            )
            gap = check_rollout_gap(experience, tokeniser, step, precision)
            ex.estimate_advantages(
                experience,
                kl_penalty=ppo.initial_policy_kl_penalty,
                discount=ppo.discount_factor,
                gae_lambda=ppo.gae_lambda,
                normalize=ppo.normalize_advantages,
            )
            rollout = global_sums([ex.statistics(experience)])
            record(here, step, rollout_tags(rollout, gap))
            record(here, step, critic_tags(update(critic, experience, value_objective(cfg), cfg, step)))
            if step > ppo.critic_warmup_steps:
                passes = update(
                    actor, experience, policy_objective(cfg), cfg, step, on_first=unmoved(here, step, cfg)
                )
                record(here, step, actor_tags(passes))
                engine.update_weights(hf_tensors(actor.model), version=step)
            else:
                check_unmoved_kl(rollout["init_policy_kl"] / rollout["tokens"], precision)
            summarise(here, rollout, gap)
            if step % ppo.save_interval == 0 or step == last:
                here.save(step)
    return 0


def generate(
    cfg: PpoConfig, engine: RolloutEngine, prompts: list[Prompt], tokeniser: Tokeniser, step: int
) -> Experience:
    """This replica's share of the rollout: every data_size-th prompt from its data rank on."""
    ppo = cfg.model.ppo
    mine = [prompt.token_ids.tolist() for prompt in prompts[parallel.data_rank() :: parallel.data_size()]]
    sampling = Sampling(
        temperature=ppo.sampling_params.temperature,
        top_k=ppo.sampling_params.top_k,
        top_p=ppo.sampling_params.top_p,
        max_tokens=ppo.length_params.max_length,
        min_tokens=ppo.length_params.min_length,
        stop_ids=(tokeniser.eos_id,),
    )
    seed = (cfg.model.seed * 100_003 + step) * parallel.data_size() + parallel.data_rank()
    rollout = engine.generate(mine, sampling, seed)
    kinds = [tokeniser.kinds_of(ids) for ids in rollout.response_ids]
    return Experience.from_rollout(
        rollout, kinds, pad_id=tokeniser.pad_id, length=cfg.trainer.ppo.rollout_batch_seq_length
    )


def updates_per_step(cfg: PpoConfig) -> int:
    """Optimizer updates of one PPO step: minibatches of the rollout times passes over it."""
    return cfg.model.ppo.num_rollout_samples // cfg.model.global_batch_size * cfg.trainer.ppo.max_epochs


def update(
    learner: Learner,
    experience: Experience,
    objective: LossFunction,
    cfg: PpoConfig,
    step: int,
    on_first: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """All updates of one model on one rollout; the global sums of each. `on_first` sees those of the first."""
    share = cfg.model.global_batch_size // parallel.data_size()
    passes = []
    for _ in range(cfg.trainer.ppo.max_epochs):
        for begin in range(0, len(experience), share):
            batch = experience.micro_batches(cfg.model.micro_batch_size, begin, begin + share)
            sums = learner.update(
                batch,
                objective,
                step=step,
                with_entropy=cfg.model.ppo.entropy_bonus > 0 and learner.model.head == "lm",
                temperature=cfg.model.ppo.sampling_params.temperature,
            )
            if on_first is not None and not passes:
                on_first(sums)
            passes.append(sums)
    return passes


def policy_objective(cfg: PpoConfig) -> LossFunction:
    eps, bonus = cfg.model.ppo.ratio_eps, cfg.model.ppo.entropy_bonus

    def objective(
        outputs: TokenOutputs, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        assert outputs.log_probs_BT is not None
        return policy_loss(
            outputs.log_probs_BT,
            batch["old_log_probs_BT"],
            batch["advantages_BT"],
            batch["mask_BT"],
            eps,
            eps,
            entropy=outputs.entropy_BT,
            entropy_bonus=bonus,
        )

    return objective


def value_objective(cfg: PpoConfig) -> LossFunction:
    clip = cfg.critic.loss_clip_val or None

    def objective(
        outputs: TokenOutputs, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        assert outputs.values_BS is not None
        return value_loss(
            outputs.values_BS[:, :-1], batch["values_BT"], batch["returns_BT"], batch["mask_BT"], clip
        )

    return objective


def unmoved(here: Run, step: int, cfg: PpoConfig) -> Callable[[dict[str, float]], None]:
    """Check of the first minibatch after a rollout: the policy has not moved, so its ratio is 1."""

    def check(sums: dict[str, float]) -> None:
        ratio = check_unmoved_ratio(sums["ratio_sum"] / sums["count"], step, cfg.trainer.precision)
        here.summary.setdefault("ratio_step0", ratio)

    return check


def record(here: Run, step: int, tags: dict[str, float]) -> None:
    here.metrics.log(step, tags)


def rollout_tags(sums: dict[str, float], gap: float) -> dict[str, float]:
    samples, tokens = sums["samples"], sums["tokens"]
    tags = {
        f"train_rollouts/{name}": sums[name] / samples
        for name in ("rewards", "rewards_with_kl", "init_policy_kl", "response_lengths", "finished")
    }
    tags |= {"rollout/logprob_gap_max": gap, "rollout/logprob_gap_mean": sums["gap"] / tokens}
    for kind, name in KIND_NAMES.items():
        if sums[f"kind{kind}_tokens"]:
            tags[f"layers/{name}/kl"] = sums[f"kind{kind}_kl"] / sums[f"kind{kind}_tokens"]
            tags[f"layers/{name}/tokens"] = sums[f"kind{kind}_tokens"] / samples
    return tags


def actor_tags(passes: list[dict[str, float]]) -> dict[str, float]:
    count = sum(sums["count"] for sums in passes)
    return {
        "train_optim/loss": sum(sums["loss_sum"] for sums in passes) / count,
        "train_optim/ppo_ratio": sum(sums["ratio_sum"] for sums in passes) / count,
        "train_optim/ppo_ratio_clamped": sum(sums["clipped_ratio_sum"] for sums in passes) / count,
        "train_optim/clip_fraction": sum(sums["clip_fraction_sum"] for sums in passes) / count,
        "train_optim/grad_norm": passes[-1]["grad_norm"],
        "train_optim/lr": passes[-1]["lr"],
    }


def critic_tags(passes: list[dict[str, float]]) -> dict[str, float]:
    count = sum(sums["count"] for sums in passes)
    return {
        "critic/loss": sum(sums["loss_sum"] for sums in passes) / count,
        "critic/value": sum(sums["value_sum"] for sums in passes) / count,
        "critic/return": sum(sums["return_sum"] for sums in passes) / count,
        "critic/grad_norm": passes[-1]["grad_norm"],
    }


def summarise(here: Run, sums: dict[str, float], gap: float) -> None:
    """First and last reward (mean over a rollout), last KL (nats a reply), largest gap to the engine so far."""
    reward = sums["rewards"] / sums["samples"]
    here.summary.setdefault("reward_first", reward)
    here.summary["reward_last"] = reward
    here.summary["kl_last"] = sums["init_policy_kl"] / sums["samples"]
    here.summary["logprob_gap_max"] = max(gap, here.summary.get("logprob_gap_max", 0.0))
