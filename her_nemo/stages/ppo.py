"""PPO: generate -> score -> values and log-probs -> advantages -> critic -> actor -> sync -> log -> save.

Four models share the ranks: the actor and the critic learn; the reference (the policy as it came) and the
reward model stay frozen. Schulman et al. 2017 (arXiv 1707.06347) with the KL penalty of Ziegler et al. 2019.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from her_nemo.algorithms import ppo_loss
from her_nemo.config.schema import PpoConfig
from her_nemo.data.loaders import GlobalBatchSampler
from her_nemo.data.sources import read_jsonl
from her_nemo.data.tokenise import Tokeniser, encode_prompts
from her_nemo.megatron import parallel
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.megatron.weights import hf_tensors
from her_nemo.rollout.engine import Rollout, RolloutEngine, Sampling
from her_nemo.rollout.megatron_engine import MegatronEngine
from her_nemo.training import experience as ex
from her_nemo.training.invariants import check_start_of_training, check_rollout_gap
from her_nemo.training.learner import Learner, LossFunction, frozen
from her_nemo.training.run import Run, open_run


def run(cfg: PpoConfig) -> int:
    ppo = cfg.trainer.ppo
    with open_run(cfg, cfg.pretrained_checkpoint.restore_from_path) as here:
        tokeniser = Tokeniser(here.tokenizer)
        rows, _ = read_jsonl(cfg.model.data.train_ds.file_path, "prompts", cfg.model.data.skip_malformed)
        prompts = encode_prompts(tokeniser, rows, cfg.model.encoder_seq_length - cfg.model.ppo.length_params.max_length)
        actor = Learner.build("model", cfg, cfg.model.optim, source=here.source, head="lm", max_steps=ppo.max_steps)
        critic_path = cfg.critic.restore_from_path or cfg.reward.restore_from_path
        critic = Learner.build("critic", cfg, cfg.critic.optim, source=critic_path, head="scalar", max_steps=ppo.max_steps)
        reference = frozen(cfg, here.source, head="lm")
        reward_model = frozen(cfg, cfg.reward.restore_from_path, head="scalar")
        engine = MegatronEngine(
            actor.model, pad_id=tokeniser.pad_id, micro_batch_size=cfg.model.ppo.rollout_micro_batch_size
        )
        sampler = GlobalBatchSampler(len(prompts), cfg.model.ppo.num_rollout_samples, cfg.model.seed, shuffle=True)
        done = here.resume([actor, critic], sampler)
        batches = iter(sampler)
        for step in here.steps(done + 1, ppo.max_steps, "ppo"):
            experience = make_experience(cfg, step, [prompts[i] for i in next(batches)], engine, tokeniser, here)
            ex.score(experience, reward_model, cfg.model.ppo.forward_micro_batch_size)
            ex.evaluate_policy(
                experience, actor.model, reference, critic.model,
                cfg.model.ppo.forward_micro_batch_size, cfg.model.ppo.sampling_params.temperature,
            )
            gap = check_rollout_gap(experience, tokeniser, step, cfg.trainer.precision)
            ex.estimate_advantages(
                experience, kl_penalty=ppo.initial_policy_kl_penalty, discount=ppo.discount_factor,
                gae_lambda=ppo.gae_lambda, normalize=ppo.normalize_advantages,
            )
            critic_sums = update(critic, experience, value_objective(cfg), cfg, step)
            actor_sums: dict[str, float] = {}
            if step > ppo.critic_warmup_steps:
                actor_sums = update(actor, experience, policy_objective(cfg), cfg, step)
                engine.update_weights(hf_tensors(actor.model), version=step)
            ...
    return 0
