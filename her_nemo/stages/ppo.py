"""PPO: generate -> score -> values and log-probs -> advantages -> critic -> actor -> sync -> log -> save.

Up to four models share the ranks: the actor learns, and so does the critic where there is one; the reference (the
policy as it came) and the reward model stay frozen. Schulman et al. 2017 (arXiv 1707.06347), with the per-token KL
penalty of Ziegler et al. 2019 (arXiv 1909.08593). The group-relative methods (GRPO, RLOO, ...) are the same loop with
another `trainer.ppo.advantage_estimator`, several replies to a prompt and no critic: docs/rl.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from her_nemo.config.errors import UserError
from her_nemo.config.schema import PpoConfig
from her_nemo.data.loaders import GlobalBatchSampler
from her_nemo.data.tokenise import Prompt, Tokeniser
from her_nemo.megatron import adapters, parallel
from her_nemo.megatron.qwen3 import Model
from her_nemo.megatron.weights import hf_tensors
from her_nemo.rewards.reward import Replies, Reward, begin_scoring
from her_nemo.rollout import experience as ex
from her_nemo.rollout.dialogue import Dialogues
from her_nemo.rollout.engine import RolloutEngine, Sampling
from her_nemo.rollout.experience import Experience
from her_nemo.rollout.invariants import check_masks, check_rollout_gap, check_unmoved_kl, check_versions
from her_nemo.rollout.open_dialogue import open_dialogues
from her_nemo.rollout.open_engine import open_engine
from her_nemo.stages import ppo_tags as tags
from her_nemo.stages.ppo_judge import generative_reward
from her_nemo.stages.ppo_objectives import policy_objective, unmoved, value_objective
from her_nemo.stages.ppo_rewards import build_reward, with_credit, with_diversity
from her_nemo.stages.ppo_state import PpoState, stop_collapsed, watch_variety
from her_nemo.training import packed
from her_nemo.training import source as sources
from her_nemo.training.learner import Learner, LossFunction, global_sums
from her_nemo.training.loop import Upcoming, kind_weights, load_rows
from her_nemo.training.run import Run, open_run

SAMPLES_KEPT = 4  # replies a step that go to <run>/samples


def run(cfg: PpoConfig) -> int:
    ppo, model = cfg.trainer.ppo, cfg.model
    with open_run(cfg) as here, ExitStack() as closing:
        tokeniser = Tokeniser(here.tokenizer)
        prompts, held_out = load_prompts(cfg, tokeniser, here.directory)
        talks = open_dialogues(cfg, tokeniser, prompts, held_out)
        warmup, last = ppo.critic_warmup_steps, ppo.critic_warmup_steps + ppo.max_steps
        actor, critic, reference, judge = build_models(cfg, here, last)
        judged = generative_reward(cfg, reference, tokeniser, sampling_of(cfg, tokeniser), (prompts, held_out))
        reward = build_reward(cfg, judge, judged)
        engine = closing.enter_context(
            open_engine(cfg, actor.model, pad_id=tokeniser.pad_id, run_dir=here.directory)
        )
        group = model.ppo.num_samples_per_prompt
        sampler = GlobalBatchSampler(len(prompts), model.ppo.num_prompts, model.seed, model.data.shuffle)
        order, state = Upcoming(sampler), PpoState(cfg)
        done = here.resume([learner for learner in (actor, critic) if learner is not None], order, state)
        engine.update_weights(hf_tensors(actor.model), version=done)
        if cfg.trainer.backend == "nemo_aligner":
            assert critic is not None  # planning/backend_checks.py
            assert judge is not None
            under_nemo_aligner(cfg, here, (actor, critic, reference, judge), engine, prompts, held_out,
                               tokeniser, sampler, done)  # fmt: skip
            return 0
        version, shaped = done, with_credit(cfg, with_diversity(cfg, reward))
        for step in here.steps(done + 1, last, "ppo"):
            with here.timers("generate"):
                asked = [prompts[i] for i in order.take()]
                experience, replies = generate(cfg, engine, asked, tokeniser, step, group, talks)
            if model.ppo.one_step_off and step < last:
                asked, *how = request(cfg, [prompts[i] for i in order.peek()], tokeniser, step + 1, group)
                engine.start(token_ids(asked), *how)
            here.metrics.log(step, engine.tags())
            if talks is not None:
                report_dialogues(here, step, talks)
            engine.rest()
            with here.timers("score"):
                begin_scoring(shaped, replies)  # a judge behind servers is at work from now on
            with here.timers("log_probs"):
                ex.evaluate_policy(
                    experience, actor.model, reference, critic and critic.model,
                    model.ppo.forward_micro_batch_size, model.ppo.sampling_params.temperature,
                    capacity=model.packed_tokens(model.ppo.forward_micro_batch_size),
                )  # fmt: skip
            with here.timers("score"):
                told = ex.score(experience, replies, shaped)
            gap = check_rollout_gap(experience, tokeniser, step, cfg.trainer.precision, engine.staleness)
            check_versions(experience, version, step, allowed=engine.staleness)
            told |= ex.correct_for_engine(experience, model.ppo.importance)
            advantages(cfg, experience, state)
            check_masks(experience, step)
            rollout, texts = report_rollout(here, step, experience, replies, gap, told)
            stop = watch_variety(cfg, here, step, state, texts)
            if step <= warmup + 1:
                check_unmoved_kl(rollout["init_policy_kl"] / rollout["tokens"], cfg.trainer.precision)
            if critic is not None:
                with here.timers("critic"):
                    passes = update(critic, experience, value_objective(cfg), cfg, step)
                here.metrics.log(step, tags.critic_tags(passes))
            if step > warmup:
                check = None if engine.staleness else unmoved(here, step, cfg)
                if engine.staleness and model.ppo.importance.correction == "none":
                    # The ratio is to the policy that drew the replies, which is no longer the actor.
                    experience.old_log_probs_BT = experience.rollout_log_probs_BT
                with here.timers("actor"):
                    objective = policy_objective(cfg, state.kl.coefficient)
                    passes = update(actor, experience, objective, cfg, step, check)
                here.metrics.log(step, tags.actor_tags(passes))
                engine.update_weights(hf_tensors(actor.model), version=step)
                version = step
                lead_kl(here, step, state, rollout)
            if held_out and (step % ppo.val_check_interval == 0 or step == last):
                with here.timers("validate"):
                    validate(cfg, here, step, engine, held_out, with_credit(cfg, reward), tokeniser, talks)
            if stop:
                stop_collapsed(here, step, state)
            if step % ppo.save_interval == 0 or step == last:
                here.save(step)
    return 0


def under_nemo_aligner(
    cfg: PpoConfig,
    here: Run,
    models: tuple[Learner, Learner, Model, Model],
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    tokeniser: Tokeniser,
    order: GlobalBatchSampler,
    done: int,
) -> None:
    """The same run with NeMo-Aligner's PPOTrainer in the place of the loop above."""
    from her_nemo.aligner import ppo as aligner

    stage = aligner.Stage(
        *models,
        prompts=prompts,
        held_out=held_out,
        tokeniser=tokeniser,
        generate=lambda chosen, step: generate(
            cfg, engine, list(chosen), tokeniser, step, cfg.model.ppo.num_samples_per_prompt
        )[0],
        policy_objective=policy_objective(cfg, 0.0),  # the penalty is in the reward
        value_objective=value_objective(cfg),
        on_unmoved=lambda sums, step: unmoved(here, step, cfg)(sums),
        actor_tags=tags.actor_tags,
        critic_tags=tags.critic_tags,
        summarise=tags.summarise,
    )
    aligner.fit(here, cfg, stage, order, done=done)


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


def build_models(cfg: PpoConfig, here: Run, last: int) -> tuple[Learner, Learner | None, Model, Model | None]:
    """Actor and critic, which learn (no critic for group-relative advantages); reference and reward model, frozen."""
    model, precision = cfg.model, cfg.trainer.precision
    reward_path, critic_path = cfg.reward.restore_from_path, cfg.critic.restore_from_path
    reward_source = sources.locate(reward_path) if reward_path is not None and cfg.reward.has_model else None
    limits = {"clip_grad": cfg.trainer.ppo.gradient_clip_val, "max_steps": last * updates_per_step(cfg)}
    actor = Learner.build("model", cfg, model.optim, source=here.source, head="lm", peft=model.peft, **limits)
    critic = None
    if cfg.trainer.ppo.has_critic:
        start = sources.locate(critic_path) if critic_path else reward_source or here.source
        critic = Learner.build("critic", cfg, cfg.critic.optim, source=start, head="scalar", **limits)
    judge = None
    if reward_source is not None:
        judge = sources.build(reward_source, model, precision, head="scalar", trainable=False)
    return actor, critic, build_reference(cfg, here, actor), judge


def build_reference(cfg: PpoConfig, here: Run, actor: Learner) -> Model:
    """The policy as it came: a model of its own, or, where the actor's adapters began at nothing, its frozen base."""
    lora, path = cfg.model.peft.lora(), cfg.model.peft.restore_from_path
    if lora is not None and path is None:
        return adapters.without(actor.model)
    return sources.build(
        here.source, cfg.model, cfg.trainer.precision, head="lm", trainable=False, lora=lora,
        adapters=sources.locate(path) if lora and path else None,
    )  # fmt: skip


def request(
    cfg: PpoConfig, prompts: list[Prompt], tokeniser: Tokeniser, step: int, samples: int
) -> tuple[list[Prompt], Sampling, int, list[int]]:
    """What the engine is asked for: this replica's share of a rollout, `samples` replies to every data_size-th prompt
    from its data rank on (a prompt for each); how to sample; a seed; and the numbers of those replies.

    What is drawn for a reply depends on model.seed, the step and the reply's place in the whole rollout.
    """
    mine = range(parallel.data_rank(), len(prompts), parallel.data_size())
    places = [(index, index * samples + sample) for index in mine for sample in range(samples)]
    asked = [prompts[index] for index, _ in places]
    seed = cfg.model.seed * 100_003 + step
    return asked, sampling_of(cfg, tokeniser), seed, [place for _, place in places]


def sampling_of(cfg: PpoConfig, tokeniser: Tokeniser) -> Sampling:
    """How the tokens of a reply are drawn."""
    ppo = cfg.model.ppo
    return Sampling(
        temperature=ppo.sampling_params.temperature,
        top_k=ppo.sampling_params.top_k,
        top_p=ppo.sampling_params.top_p,
        max_tokens=ppo.length_params.max_length,
        min_tokens=ppo.length_params.min_length,
        stop_ids=(tokeniser.eos_id,),
    )


def token_ids(prompts: Sequence[Prompt]) -> list[list[int]]:
    return [prompt.token_ids.tolist() for prompt in prompts]


def generate(
    cfg: PpoConfig,
    engine: RolloutEngine,
    prompts: list[Prompt],
    tokeniser: Tokeniser,
    step: int,
    samples: int,
    talks: Dialogues | None = None,
) -> tuple[Experience, Replies]:
    """This replica's share of a rollout: `samples` replies to each prompt, or as many conversations from it."""
    asked, sampling, seed, places = request(cfg, prompts, tokeniser, step, samples)
    if talks is None:
        rollout = engine.generate(token_ids(asked), sampling, seed, indices=places)
    else:
        rollout = talks.generate(engine, asked, sampling, seed, places, samples)
    turns = 1 if talks is None else talks.turns
    kinds = [tokeniser.kinds_of(ids) for ids in rollout.response_ids]
    experience = Experience.from_rollout(
        rollout,
        kinds,
        pad_id=tokeniser.pad_id,
        length=cfg.trainer.ppo.rollout_batch_seq_length,
        shared_by=samples if cfg.model.ppo.share_prompts else None,
    )
    replies = Replies(
        prompts=[tokeniser.decode(ids, skip_special_tokens=False) for ids in rollout.prompt_ids],
        texts=[tokeniser.decode(ids) for ids in rollout.response_ids],
        prompt_ids=rollout.prompt_ids,
        reply_ids=rollout.response_ids,
        finished=rollout.finished,
        tokens_BS=experience.tokens_BS,
        lengths_B=experience.lengths_B,
        group_size=samples,
        trace_ids=[prompt.trace_id for prompt in asked for _ in range(turns)],
        turns=turns,
    )
    return experience, replies


def advantages(cfg: PpoConfig, experience: Experience, state: PpoState) -> None:
    """Rewards, with the KL penalty if it is placed there, and advantages (collective)."""
    ppo = cfg.trainer.ppo
    if ppo.normalize_rewards:
        ex.normalise_scores(experience, state.rewards)
    ex.estimate_advantages(
        experience,
        kl_penalty=state.kl.coefficient if ppo.kl.placement == "reward" else 0.0,
        discount=ppo.discount_factor,
        gae_lambda=ppo.gae_lambda,
        normalize=ppo.whitens,
        weights_K=kind_weights(cfg.model.data.layer_weights),
        estimator=ppo.advantage_estimator,
        group_size=cfg.model.ppo.num_samples_per_prompt,
        her_clip=ppo.her_advantage_clip,
        kl_estimator=ppo.kl.estimator,
    )


def report_rollout(
    here: Run, step: int, experience: Experience, replies: Replies, gap: float, told: dict[str, torch.Tensor]
) -> tuple[dict[str, float], list[str]]:
    """Log one rollout (collective); returns its sums over all replicas, and all replies in the order of prompts."""
    own = {f"{tags.TOLD}{name}": value for name, value in told.items()}  # a reward may name its parts as it likes
    sums = global_sums([ex.statistics(experience) | own])
    here.tokens += int(sums["sequence_tokens"])
    here.metrics.log(step, tags.rollout_tags(sums, gap) | tags.reward_tags(sums))
    parts = parallel.data_gather_objects(list(replies.texts))
    if here.main:
        here.metrics.log(step, tags.roleplay_tags([text for part in parts for text in part]))
        rewards, versions = experience.scores_B.tolist(), experience.versions_B.tolist()
        kept = range(min(SAMPLES_KEPT, len(replies)))
        rows = [
            {"prompt": replies.prompts[row], "reply": replies.texts[row], "reward": rewards[row],
             "weight_version": versions[row]}
            for row in kept
        ]  # fmt: skip
        tags.write_samples(here.directory, step, rows)
        here.metrics.text(step, "rollout/reply", replies.texts[0])
    tags.summarise(here.summary, sums, gap)
    size = replies.group_size * replies.turns
    groups = [[part[at : at + size] for part in parts] for at in range(0, len(parts[0]), size)]
    return sums, [text for row in groups for group in row for text in group]


def report_dialogues(here: Run, step: int, talks: Dialogues) -> None:
    """Log what the conversations of a rollout were like, and keep some, as replica 0 had them."""
    here.metrics.log(step, talks.tags())
    if here.main:
        tags.write_samples(here.directory, step, talks.transcripts, kind="dialogues_")


def lead_kl(here: Run, step: int, state: PpoState, rollout: dict[str, float]) -> None:
    """After an update of the actor: the KL coefficient of the next rollout, if it is adaptive."""
    if state.kl.target is None:
        return
    here.metrics.log(step, {"train_optim/kl_coefficient": state.kl.coefficient})
    state.kl.update(rollout["init_policy_kl"] / rollout["samples"], int(rollout["samples"]))


def validate(
    cfg: PpoConfig,
    here: Run,
    step: int,
    engine: RolloutEngine,
    prompts: list[Prompt],
    reward: Reward,
    tokeniser: Tokeniser,
    talks: Dialogues | None = None,
) -> None:
    """Reward of replies to held-out prompts (collective). Each validation draws with the same random numbers."""
    experience, replies = generate(cfg, engine, prompts, tokeniser, step=0, samples=1, talks=talks)
    ex.score(experience, replies, reward)
    sums = global_sums([ex.reply_statistics(experience)])
    here.metrics.log(step, tags.validation_tags(sums))
    here.summary["val_reward"] = tags.mean_reward(sums)


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
    size = cfg.model.micro_batch_size
    room = cfg.model.packed_tokens(size)
    objective = objective if room is None else packed.on_rows(objective)
    passes = []
    for _ in range(cfg.trainer.ppo.max_epochs):
        for begin in range(0, len(experience), share):
            if room is None:
                batch = experience.micro_batches(size, begin, begin + share)
            else:
                batch, _ = packed.pack_rows(experience.rows(begin, begin + share), room)
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
