"""What `config explain` says of a key beyond its one sentence: when to change it, what it costs, what goes with it."""

from __future__ import annotations

MORE: dict[str, str] = {
    # ---- trainer
    "trainer.num_nodes": (
        "On one machine her-nemo starts the processes itself; on several, Slurm (slurm/*.sh, which set this "
        "key from the allocation) or torchrun does. Processes in all are num_nodes x devices, a multiple of "
        "TP x PP; what is left over is data parallelism."
    ),
    "trainer.devices": (
        "Tensor parallelism should stay within a machine, so a TP larger than this is slow. "
        "cluster=h100_4x8 and the like set it together with trainer.num_nodes."
    ),
    "trainer.accelerator": "cpu hides the GPUs from the run, gpu refuses to run without one.",
    "trainer.precision": (
        "bf16 keeps weights and gradients in two bytes, bf16-mixed gradients in four; both step fp32 main "
        "weights in the optimizer. 32 is for CPU and for comparisons. The groups precision=fp32 and "
        "precision=bf16 set it."
    ),
    "trainer.gpu": "cluster=... sets it. Nothing but the memory and time of the plan depends on it.",
    "trainer.sft.max_steps": (
        "Whichever of max_steps and max_epochs comes first ends the run; the learning-rate schedule ends "
        "there too."
    ),
    "trainer.sft.save_interval": (
        "A checkpoint holds weights and optimizer states, about 12 bytes a parameter in fp32 and 14 in "
        "bf16. A run that is told to stop (SIGTERM, exp_manager.max_time_per_run) saves besides. With "
        "checkpoint_callback_params.monitor it has to be a multiple of val_check_interval."
    ),
    "trainer.sft.limit_val_batches": (
        "A whole number counts batches, a number with a point is a share: 1 is one batch, 1.0 all of them."
    ),
    "trainer.ppo.max_steps": (
        "Each step generates model.ppo.num_rollout_samples replies and updates on them num_rollout_samples "
        "/ global_batch_size x max_epochs times."
    ),
    "trainer.ppo.critic_warmup_steps": (
        "The policy does not move in these, so that advantages are not made from an untrained critic. They "
        "come on top of max_steps."
    ),
    "trainer.ppo.initial_policy_kl_penalty": (
        "It is taken from the reward token by token. More keeps the policy nearer to the SFT model; at 0 "
        "the reward model's mistakes are soon exploited. train_rollouts/init_policy_kl shows the distance."
    ),
    "trainer.ppo.gae_lambda": (
        "1 takes the whole return (no bias from the critic, more noise), 0 the critic's next value alone. "
        "Schulman et al. 2016 (arXiv 1506.02438)."
    ),
    "trainer.ppo.discount_factor": (
        "1 is usual for replies of bounded length: the reward at the end counts fully at every token."
    ),
    "trainer.ppo.normalize_advantages": (
        "The mean is taken off and the spread made 1, over all replicas, so that the step does not depend "
        "on the scale of rewards."
    ),
    "trainer.ppo.rollout_batch_seq_length": (
        "A fixed length keeps shapes the same from step to step (FP8, CUDA graphs, fewer surprises of the "
        "allocator), at the price of padding; it has to be model.encoder_seq_length or more."
    ),
    # ---- model
    "model.tensor_model_parallel_size": (
        "It divides heads, groups and the feed-forward. Every layer exchanges hidden states over these "
        "ranks twice, so it belongs inside a machine (NVLink). Take the smallest that fits; her-nemo plan "
        "STAGE ... --search finds it."
    ),
    "model.pipeline_model_parallel_size": (
        "It divides the layers. Stages wait for one another at the beginning and end of a step: (PP - 1) / "
        "micro-batches of the time is lost, so it wants many micro-batches. It may span machines."
    ),
    "model.sequence_parallel": (
        "It saves activations at no cost, and needs a tensor_model_parallel_size above 1."
    ),
    "model.make_vocab_size_divisible_by": "Padded rows are never a target; an export leaves them out.",
    "model.micro_batch_size": (
        "Activations grow with it, and so does the speed up to a point. It changes neither the loss nor the "
        "gradients: losses are sums divided by the global count. For the reward model it counts pairs."
    ),
    "model.global_batch_size": (
        "A multiple of micro_batch_size x the data-parallel size. It changes what is learned, as the "
        "learning rate does; for PPO it is the size of a minibatch, and divides "
        "model.ppo.num_rollout_samples."
    ),
    "model.encoder_seq_length": (
        "At most the model's max_position_embeddings. Memory is planned for this length, whatever the data "
        "hold. In PPO it is prompt and reply together."
    ),
    "model.activations_checkpoint_granularity": (
        "full costs a third more computing and keeps one hidden state a group of layers; it wants "
        "activations_checkpoint_method and _num_layers. selective costs little and saves little here, since "
        "attention is never kept as a matrix."
    ),
    "model.activations_checkpoint_method": (
        "uniform recomputes all layers in groups of num_layers; block recomputes the first num_layers of "
        "each stage and keeps the rest."
    ),
    "model.seed": (
        "The same seed, data and global batch size give the same order and the same curve on any number of "
        "replicas."
    ),
    "model.tokenizer.path": (
        "Its largest token has to lie inside the model's embedding; `her-nemo plan` compares them."
    ),
    "model.data.train_ds.file_path": (
        "Rows are conversations in messages form; pairs have chosen and rejected besides. `her-nemo data "
        "ingest` makes such files from others."
    ),
    "model.data.validation_ds.file_path": (
        "It is gone through in order, every val_check_interval steps and at the end. In PPO replies are "
        "generated to its first num_val_samples prompts."
    ),
    "model.data.skip_malformed": (
        "Without it a run stops before its first step and shows the first twenty problems with file and line."
    ),
    "model.data.shuffle": "Turn it off to compare two runs row by row.",
    "model.data.cache_dir": (
        "A file is encoded once for every text of the file, tokenizer, length and version of the encoding; "
        "entries of other settings are never read."
    ),
    "model.data.packing": (
        "It saves the padding of short samples and changes neither loss nor gradients. With it "
        "micro_batch_size is a number of tokens: micro_batch_size x encoder_seq_length a row."
    ),
    "model.data.layer_weights.system_thinking": (
        "The loss is the mean weighted by these four, so that only their ratios count. 0 leaves a kind out "
        "of the loss; what is logged for each kind stays unweighted."
    ),
    "model.optim.name": (
        "Sharding leaves each of N replicas an Nth of the optimizer's 8 bytes a parameter (12 in bf16), at "
        "no cost in speed; with fused_adam every replica keeps all of them."
    ),
    "model.optim.lr": (
        "The usual range is 1e-6 to 1e-5 for a pretrained model of billions of parameters; small models "
        "take more. optim.sched warms it up and takes it down; without a schedule it is constant."
    ),
    "critic.optim.lr": (
        "The usual range is 1e-6 to 1e-5 for a pretrained model of billions of parameters; small models "
        "take more. optim.sched warms it up and takes it down; without a schedule it is constant. A critic "
        "usually takes more than its actor."
    ),
    "model.optim.weight_decay": "It is applied to matrices, not to norms.",
    "model.optim.sched.name": (
        "CosineAnnealing goes from lr after the warm-up to min_lr at the run's last step."
    ),
    "model.optim.sched.warmup_steps": (
        "Adam's moments are empty at first; a few per cent of the run is usual."
    ),
    "model.ppo.num_rollout_samples": (
        "A multiple of model.global_batch_size and of the data-parallel size. More samples make a steadier "
        "step and a slower one."
    ),
    "model.ppo.rollout_micro_batch_size": (
        "Keys and values of this many sequences lie in memory while they are generated. Replies do not "
        "depend on it."
    ),
    "model.ppo.forward_micro_batch_size": (
        "No gradients are kept, so it can be larger than model.micro_batch_size; the logits of one such "
        "batch are the peak."
    ),
    "model.ppo.ratio_eps": (
        "A token whose probability has moved further than this from the rollout's adds nothing more to the "
        "gradient. Schulman et al. 2017 (arXiv 1707.06347)."
    ),
    "model.ppo.entropy_bonus": (
        "It keeps the policy from settling early; 0.01 is much. It costs the memory of one more copy of the "
        "logits."
    ),
    "model.ppo.sampling_params.temperature": (
        "Log-probs of training are taken at the same temperature, so that the ratio of the first minibatch "
        "is 1."
    ),
    "model.ppo.sampling_params.top_p": (
        "Anything but 1 makes the rollout's probabilities differ from the trainer's: replies are drawn from "
        "a cut distribution, log-probs are of the whole."
    ),
    "model.ppo.length_params.max_length": (
        "A reply that has not ended by then is cut off and counts as unfinished. It has to leave room for a "
        "prompt in model.encoder_seq_length."
    ),
    "critic.loss_clip_val": (
        "The larger of the clipped and the plain squared error counts, so that one rollout cannot pull the "
        "value far."
    ),
    "critic.restore_from_path": "It has to have the actor's vocabulary and a shape that TP and PP divide.",
    "reward.restore_from_path": (
        "It has to have the actor's vocabulary and a shape that TP and PP divide. It scores the last token "
        "of a reply."
    ),
    "reward.generative.against": (
        "sft is HER's: it says how far the policy is ahead of its start. group needs no other replies and costs "
        "G (G - 1) verdicts a prompt, sft and reference 2 G; a group's points add up to 0, so the reward's mean says "
        "nothing and validation is refused."
    ),
    "reward.generative.replies": (
        "Rows as SFT reads them, one for each prompt of training and validation. On a cluster let a server write the "
        "start's replies beforehand: generated here, they cost one rollout on the trainer's ranks for each new prompt."
    ),
    "reward.generative.max_unparsed": (
        "A reply without a verdict has no part in the update, so a judge that often writes none wastes rollouts, and "
        "hides which replies it cannot read."
    ),
    "reward.generative.judge.restore_from_path": (
        "It has a tokenizer of its own beside it; its shape has to be one that TP and PP divide. It takes memory for "
        "weights beside the policy's models, and for keys and values while it writes."
    ),
    "reward.generative.judge.structured_output": (
        "The schema lets the server write the JSON object alone, without the reasoning before it: leave it off for a "
        "judge that was trained to reason first."
    ),
    "reward.generative.judge.temperature": (
        "Above 0 a verdict is drawn once and kept: the same question does not get another answer within a run."
    ),
    "pretrained_checkpoint.restore_from_path": (
        "A run directory means its newest checkpoint. In PPO it is also the frozen reference. An "
        "interrupted run goes on from its own checkpoint and not from here."
    ),
    # ---- run directory
    "exp_manager.explicit_log_dir": (
        "A run directory belongs to one model: the fingerprint of a checkpoint in it is compared before it "
        "is gone on from."
    ),
    "exp_manager.resume_if_exists": (
        "False refuses to start where checkpoints lie, so that nothing is overwritten."
    ),
    "exp_manager.resume_ignore_no_checkpoint": "False is for jobs that must never start afresh by mistake.",
    "exp_manager.max_time_per_run": (
        "For schedulers that send no signal. The step under way is finished, and saving takes time: leave "
        "room for both."
    ),
    "exp_manager.checkpoint_callback_params.save_top_k": (
        "A checkpoint holds weights and optimizer states, about 12 bytes a parameter in fp32 and 14 in "
        "bf16. Room for one more than are kept is needed while the newest is written (two more with "
        "monitor)."
    ),
    "exp_manager.checkpoint_callback_params.monitor": (
        "It needs a validation file, and save_interval a multiple of val_check_interval: only a value "
        "measured at the checkpoint's own step counts. NeMo-Aligner's val_loss and val_rewards are "
        "translated."
    ),
    # ---- other stages
    "dtype": "bfloat16 is what vLLM and transformers expect; float32 keeps every bit of an fp32 checkpoint.",
    "proof": (
        "full needs room for both models at once; layers compares block by block, and every tensor is "
        "hashed either way."
    ),
    "tensor_parallel_size": "It divides the attention heads. One server uses that many GPUs of its machine.",
    "num_prompts": "The head of the file, so that two models are compared on the same prompts.",
    "limits.budget": "Answers are kept when it is spent: raise it and run the same command to go on.",
    "structured_output": "Take json_object or none for endpoints that do not know schemas.",
}
