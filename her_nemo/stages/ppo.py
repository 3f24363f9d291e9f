"""PPO: generate -> score -> values and log-probs -> advantages -> critic -> actor -> sync -> log -> save.

Four models share the ranks: the actor and the critic learn; the reference (the policy as it came) and the reward
model stay frozen. Schulman et al. 2017 (arXiv 1707.06347), with the per-token KL penalty of Ziegler et al. 2019
(arXiv 1909.08593).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from her_nemo.algorithms.masking import weigh_kinds
from her_nemo.algorithms.ppo_loss import policy_loss, value_loss
from her_nemo.config.errors import UserError
from her_nemo.config.schema import PpoConfig
from her_nemo.data.loaders import GlobalBatchSampler
from her_nemo.data.tokenise import KIND_NAMES, Prompt, Tokeniser
from her_nemo.megatron import parallel
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.megatron.qwen3 import Model
from her_nemo.megatron.weights import hf_tensors
from her_nemo.rollout import experience as ex
from her_nemo.rollout.engine import RolloutEngine, Sampling
from her_nemo.rollout.experience import Experience
from her_nemo.rollout.invariants import check_rollout_gap, check_unmoved_kl, check_unmoved_ratio
from her_nemo.rollout.open_engine import open_engine
from her_nemo.stages import ppo_tags as tags
from her_nemo.training import source as sources
from her_nemo.training.learner import Learner, LossFunction, MicroBatch, global_sums
from her_nemo.training.loop import Upcoming, kind_weights, load_rows
from her_nemo.training.run import Run, open_run

SAMPLES_KEPT = 4  # replies a step that go to <run>/samples


def run(cfg: PpoConfig) -> int:
    ppo, model = cfg.trainer.ppo, cfg.model
    with open_run(cfg) as here, ExitStack() as closing:
        tokeniser = Tokeniser(here.tokenizer)
        prompts, held_out = load_prompts(cfg, tokeniser, here.directory)
        last = ppo.critic_warmup_steps + ppo.max_steps
        actor, critic, reference, reward_model = build_models(cfg, here, last)
        engine = closing.enter_context(
            open_engine(cfg, actor.model, pad_id=tokeniser.pad_id, run_dir=here.directory)
        )
        order = Upcoming(
            GlobalBatchSampler(len(prompts), model.ppo.num_rollout_samples, model.seed, model.data.shuffle)
        )
        done = here.resume([actor, critic], order)
        engine.update_weights(hf_tensors(actor.model), version=done)
        for step in here.steps(done + 1, last, "ppo"):
            with here.timers("generate"):
                experience, replies = generate(cfg, engine, [prompts[i] for i in order.take()], tokeniser, step)
            if model.ppo.one_step_off and step < last:
                engine.start(*request(cfg, [prompts[i] for i in order.peek()], tokeniser, step + 1))
            here.metrics.log(step, engine.tags())
            with here.timers("score"):
                ex.score(experience, reward_model, model.ppo.forward_micro_batch_size)
            with here.timers("log_probs"):
                ex.evaluate_policy(
                    experience, actor.model, reference, critic.model,
                    model.ppo.forward_micro_batch_size, model.ppo.sampling_params.temperature,
                )  # fmt: skip
            gap = check_rollout_gap(experience, tokeniser, step, cfg.trainer.precision, engine.staleness)
            ex.estimate_advantages(
                experience,
                kl_penalty=ppo.initial_policy_kl_penalty,
                discount=ppo.discount_factor,
                gae_lambda=ppo.gae_lambda,
                normalize=ppo.normalize_advantages,
                weights_K=kind_weights(model.data.layer_weights),
            )
            rollout = report_rollout(here, step, experience, replies, gap)
            with here.timers("critic"):
                passes = update(critic, experience, value_objective(cfg), cfg, step)
            here.metrics.log(step, tags.critic_tags(passes))
            if step > ppo.critic_warmup_steps:
                check = None if engine.staleness else unmoved(here, step, cfg)
                if engine.staleness:
                    # The ratio is to the policy that drew the replies, which is no longer the actor.
                    experience.old_log_probs_BT = experience.rollout_log_probs_BT
                with here.timers("actor"):
                    passes = update(actor, experience, policy_objective(cfg), cfg, step, on_first=check)
                here.metrics.log(step, tags.actor_tags(passes))
                engine.update_weights(hf_tensors(actor.model), version=step)
            else:
                check_unmoved_kl(rollout["init_policy_kl"] / rollout["tokens"], cfg.trainer.precision)
            if held_out and (step % ppo.val_check_interval == 0 or step == last):
                with here.timers("validate"):
                    validate(cfg, here, step, engine, held_out, reward_model, tokeniser)
            if step % ppo.save_interval == 0 or step == last:
                here.save(step)
    return 0


def load_prompts(
    cfg: PpoConfig, tokeniser: Tokeniser, run_dir: Path
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """The prompts to train on and those to validate on (the head of the file; none if that is off).

    Raises:
        UserError: fewer validation prompts than replicas.
    """
    model, room = cfg.model, cfg.model.encoder_seq_length - cfg.model.ppo.length_params.max_length
    train = load_rows("prompts", tokeniser, model.data.train_ds.file_path, model, room, run_dir)
    path, wanted = model.data.validation_ds.file_path, model.ppo.num_val_samples
    if path is None or wanted == 0:
        return train, []
    held_out = load_rows("prompts", tokeniser, path, model, room, run_dir)[:wanted]
    if len(held_out) < parallel.data_size():
        raise UserError(
            f"{path}: {len(held_out)} validation prompts for {parallel.data_size()} replicas; give at least one "
            "a replica (model.ppo.num_val_samples), or set it to 0."
        )
    return train, held_out


def build_models(cfg: PpoConfig, here: Run, last: int) -> tuple[Learner, Learner, Model, Model]:
    """Actor and critic, which learn; reference and reward model, which do not."""
    model, precision = cfg.model, cfg.trainer.precision
    reward_source = sources.locate(cfg.reward.restore_from_path)
    critic_path = cfg.critic.restore_from_path
    critic_source = sources.locate(critic_path) if critic_path else reward_source
    limits = {"clip_grad": cfg.trainer.ppo.gradient_clip_val, "max_steps": last * updates_per_step(cfg)}
    return (
        Learner.build("model", cfg, model.optim, source=here.source, head="lm", **limits),
        Learner.build("critic", cfg, cfg.critic.optim, source=critic_source, head="scalar", **limits),
        sources.build(here.source, model, precision, head="lm", trainable=False),
        sources.build(reward_source, model, precision, head="scalar", trainable=False),
    )


def request(
    cfg: PpoConfig, prompts: list[Prompt], tokeniser: Tokeniser, step: int
) -> tuple[list[list[int]], Sampling, int, Sequence[int]]:
    """What the engine is asked for: this replica's share of a rollout, every data_size-th prompt from its data rank
    on; how to sample; a seed; and the numbers of those prompts.

    What is drawn for a prompt depends on model.seed, the step and the prompt's place in the whole rollout.
    """
    ppo = cfg.model.ppo
    mine = range(parallel.data_rank(), len(prompts), parallel.data_size())
    sampling = Sampling(
        temperature=ppo.sampling_params.temperature,
        top_k=ppo.sampling_params.top_k,
        top_p=ppo.sampling_params.top_p,
        max_tokens=ppo.length_params.max_length,
        min_tokens=ppo.length_params.min_length,
        stop_ids=(tokeniser.eos_id,),
    )
    return [prompts[index].token_ids.tolist() for index in mine], sampling, cfg.model.seed * 100_003 + step, mine


def generate(
    cfg: PpoConfig, engine: RolloutEngine, prompts: list[Prompt], tokeniser: Tokeniser, step: int
) -> tuple[Experience, list[str]]:
    """This replica's share of a rollout, and its replies as text."""
    asked, sampling, seed, mine = request(cfg, prompts, tokeniser, step)
    rollout = engine.generate(asked, sampling, seed, indices=mine)
    kinds = [tokeniser.kinds_of(ids) for ids in rollout.response_ids]
    experience = Experience.from_rollout(
        rollout, kinds, pad_id=tokeniser.pad_id, length=cfg.trainer.ppo.rollout_batch_seq_length
    )
    return experience, [tokeniser.decode(ids) for ids in rollout.response_ids]


def report_rollout(
    here: Run, step: int, experience: Experience, replies: list[str], gap: float
) -> dict[str, float]:
    """Log one rollout (collective); returns its sums over all replicas."""
    sums = global_sums([ex.statistics(experience)])
    here.tokens += int(sums["sequence_tokens"])
    here.metrics.log(step, tags.rollout_tags(sums, gap))
    everywhere = [text for part in parallel.data_gather_objects(replies) for text in part]
    if here.main:
        here.metrics.log(step, tags.roleplay_tags(everywhere))
        rewards = experience.scores_B.tolist()
        rows = [{"reply": replies[row], "reward": rewards[row]} for row in range(min(SAMPLES_KEPT, len(replies)))]
        tags.write_samples(here.directory, step, rows)
        here.metrics.text(step, "rollout/reply", replies[0])
    tags.summarise(here.summary, sums, gap)
    return sums


def validate(
    cfg: PpoConfig,
    here: Run,
    step: int,
    engine: RolloutEngine,
    prompts: list[Prompt],
    reward_model: Model,
    tokeniser: Tokeniser,
) -> None:
    """Reward of replies to held-out prompts (collective). Each validation draws with the same random numbers."""
    experience, _ = generate(cfg, engine, prompts, tokeniser, step=0)
    ex.score(experience, reward_model, cfg.model.ppo.forward_micro_batch_size)
    sums = global_sums([ex.reply_statistics(experience)])
    here.metrics.log(step, tags.validation_tags(sums))
    here.summary["val_reward"] = sums["rewards"] / sums["samples"]


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
    """The clipped policy loss, weighted by segment kind, and the plain sums of each kind for the log."""
    eps, bonus = cfg.model.ppo.ratio_eps, cfg.model.ppo.entropy_bonus
    weights_K = kind_weights(cfg.model.data.layer_weights)

    def objective(
        outputs: TokenOutputs, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        assert outputs.log_probs_BT is not None
        constants = batch["old_log_probs_BT"], batch["advantages_BT"]
        mask_BT, kinds_BT = batch["mask_BT"], batch["kinds_BT"]
        loss_sum, count, sums = policy_loss(
            outputs.log_probs_BT,
            *constants,
            mask_BT,
            eps,
            eps,
            entropy=outputs.entropy_BT,
            entropy_bonus=bonus,
            token_weights=weigh_kinds(mask_BT, kinds_BT, weights_K),
        )
        for kind, name in KIND_NAMES.items():
            here = mask_BT & (kinds_BT == kind)
            sums[f"{name}_loss"], sums[f"{name}_tokens"], _ = policy_loss(
                outputs.log_probs_BT.detach(), *constants, here, eps, eps
            )
        return loss_sum, count, sums

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
        ratio = check_unmoved_ratio(sums["ratio_sum"] / sums["tokens"], step, cfg.trainer.precision)
        here.summary.setdefault("ratio_step0", ratio)

    return check
