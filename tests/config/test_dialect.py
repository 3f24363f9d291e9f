"""NeMo-Aligner's files: every key of theirs is ours, translated, dropped with a reason, or refused with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from her_nemo.config import compose, dialect
from her_nemo.config.errors import ConfigErrors
from her_nemo.config.lora import Lora
from her_nemo.config.schema import STAGES, PpoConfig, SftConfig

# Keys of NeMo-Aligner 0.7's gpt_sft, training_rm, gpt_ppo_critic and gpt_ppo_actor files.
COMMON = """
trainer.num_nodes trainer.devices trainer.accelerator trainer.precision trainer.gradient_clip_val trainer.logger
model.seed model.tensor_model_parallel_size model.pipeline_model_parallel_size model.context_parallel_size
model.encoder_seq_length model.sequence_parallel model.activations_checkpoint_granularity
model.activations_checkpoint_method model.activations_checkpoint_num_layers model.global_batch_size
model.micro_batch_size model.megatron_amp_O2 model.use_flash_attention model.hidden_dropout model.attention_dropout
model.ffn_dropout model.resume_from_checkpoint model.optim.name model.optim.lr model.optim.weight_decay
model.optim.betas model.optim.sched.name model.optim.sched.warmup_steps model.optim.sched.constant_steps
model.optim.sched.min_lr exp_manager.explicit_log_dir exp_manager.exp_dir exp_manager.name
exp_manager.create_wandb_logger exp_manager.wandb_logger_kwargs.project exp_manager.resume_if_exists
exp_manager.resume_ignore_no_checkpoint exp_manager.create_checkpoint_callback exp_manager.max_time_per_run
exp_manager.checkpoint_callback_params.monitor exp_manager.checkpoint_callback_params.save_top_k
exp_manager.checkpoint_callback_params.mode exp_manager.checkpoint_callback_params.filename
model.peft.peft_scheme model.peft.restore_from_path model.peft.lora_tuning.target_modules
model.peft.lora_tuning.adapter_dim model.peft.lora_tuning.adapter_dropout
"""
SFT = """
trainer.max_time trainer.max_epochs trainer.max_steps trainer.sft.max_epochs trainer.sft.max_steps
trainer.sft.val_check_interval trainer.sft.save_interval trainer.sft.limit_train_batches trainer.sft.limit_val_batches
trainer.sft.gradient_clip_val model.restore_from_path model.answer_only_loss model.data.chat
model.data.chat_prompt_tokens model.data.sample model.data.num_workers model.data.train_ds.file_path
model.data.train_ds.global_batch_size model.data.train_ds.micro_batch_size model.data.train_ds.shuffle
model.data.train_ds.max_seq_length model.data.train_ds.min_seq_length model.data.train_ds.drop_last
model.data.train_ds.label_key model.data.train_ds.add_eos model.data.train_ds.add_sep model.data.train_ds.add_bos
model.data.train_ds.truncation_field model.data.train_ds.prompt_template model.data.train_ds.hf_dataset
model.data.train_ds.truncation_method model.data.validation_ds.file_path model.data.validation_ds.shuffle
"""
REWARD = """
trainer.rm.max_epochs trainer.rm.train_random_sampler trainer.rm.val_random_sampler
pretrained_checkpoint.restore_from_path model.reward_model_type model.regression.num_attributes model.output_sequence
model.use_avg_pool model.force_head_dtype model.forward_micro_batch_size model.data.data_impl
model.data.splits_string model.data.seq_length model.data.data_prefix.train
"""
PPO = """
trainer.ppo.port trainer.ppo.combine_rm_and_critic_server trainer.ppo.max_steps trainer.ppo.gradient_clip_val
trainer.ppo.max_queue_delay_microseconds trainer.ppo.strip_sequence_length_to_multiple
trainer.ppo.inference_micro_batch_size model.loss_clip_val model.offload_adam_states
model.reward_standardization.enable model.reward_standardization.mean model.reward_standardization.std
trainer.ppo.critic_warmup_steps trainer.ppo.max_epochs trainer.ppo.val_check_interval trainer.ppo.save_interval
trainer.ppo.initial_policy_kl_penalty trainer.ppo.use_absolute_kl trainer.ppo.discount_factor trainer.ppo.gae_lambda
trainer.ppo.normalize_advantages trainer.ppo.rollout_batch_seq_length trainer.ppo.trt_llm.enable
trainer.ppo.batch_iterator.use_flask trainer.ppo.model_gbs trainer.ppo.model_mbs remote_critic_rm.critic.ip
model.ppo.rollout_micro_batch_size model.ppo.num_rollout_samples model.ppo.forward_micro_batch_size
model.ppo.val_rollout_micro_batch_size model.ppo.num_val_samples model.ppo.offload_adam_states
model.ppo.entropy_bonus model.ppo.ratio_eps model.ppo.sampling_params.use_greedy
model.ppo.sampling_params.temperature model.ppo.sampling_params.top_k model.ppo.sampling_params.top_p
model.ppo.sampling_params.repetition_penalty model.ppo.sampling_params.add_BOS model.ppo.sampling_params.all_probs
model.ppo.sampling_params.compute_logprob model.ppo.sampling_params.end_strings model.ppo.length_params.max_length
model.ppo.length_params.min_length
"""
FILE = """
name: theirs
defaults: [_self_]
trainer:
  num_nodes: 1
  devices: 2
  precision: bf16
  logger: false
  sft: {max_epochs: 1, max_steps: 7, limit_train_batches: 1.0, save_interval: "${trainer.sft.val_check_interval}"}
exp_manager:
  explicit_log_dir: /results
  create_wandb_logger: false
  wandb_logger_kwargs: {project: p, name: n}
  resume_if_exists: true
  max_time_per_run: "00:03:30:00"
  checkpoint_callback_params: {monitor: val_loss, save_top_k: 5, mode: min}
model:
  restore_from_path: /base
  megatron_amp_O2: true
  answer_only_loss: true
  peft: {peft_scheme: none, lora_tuning: {adapter_dim: 16, target_modules: [mlp], weight_tying: false}}
  optim: {name: mcore_distributed_optim, lr: 5.0e-6}
  data:
    chat: true
    train_ds: {file_path: /train.jsonl, global_batch_size: 128, micro_batch_size: 2, max_seq_length: 2048,
               shuffle: false, add_eos: true}
inference: {greedy: false}
"""


@pytest.mark.parametrize(
    ("stage", "keys"), [("sft", COMMON + SFT), ("reward", COMMON + REWARD), ("ppo", COMMON + PPO)]
)
def test_every_key_of_theirs_has_an_answer(stage: str, keys: str) -> None:
    ours = {key for key, _ in compose.known_keys(STAGES[stage])}
    silent = [key for key in keys.split() if key not in ours and dialect.fate(key) is None]
    assert not silent
    for key in keys.split():
        found = dialect.fate(key)
        if key not in ours and found is not None:
            assert found.describe(key).endswith(".")
            assert bool(found.to) != bool(found.reason), key


def test_what_a_key_is_translated_to_exists() -> None:
    ours = {key for schema in STAGES.values() for key, _ in compose.known_keys(schema)}
    assert set(dialect.TRANSLATED.values()) <= ours
    # The reward model has no adapters: there the key is refused.
    both = set(dialect.KEYS) & (ours - {"trainer.sft.limit_train_batches"})
    assert all(key.startswith("model.peft.") for key in both), both


def test_a_file_of_theirs_runs_and_everything_is_said(tmp_path: Path) -> None:
    (tmp_path / "gpt_sft.yaml").write_text(FILE)
    notes: list[str] = []
    config = compose.load("sft", ["model.optim.lr=1e-5"], tmp_path, "gpt_sft", notes)
    assert isinstance(config, SftConfig)
    assert config.pretrained_checkpoint.restore_from_path == "/base"
    assert (config.model.global_batch_size, config.model.micro_batch_size) == (128, 2)
    assert (config.model.encoder_seq_length, config.model.data.shuffle) == (2048, False)
    assert config.model.optim.name == "distributed_fused_adam"
    assert config.model.optim.lr == 1e-5
    assert config.exp_manager.max_seconds == 3.5 * 3600
    assert config.exp_manager.checkpoint_callback_params.save_top_k == 5
    assert config.trainer.sft.save_interval == 100
    assert config.model.peft.lora() is None
    said = "\n".join(notes)
    assert "model.restore_from_path -> pretrained_checkpoint.restore_from_path" in said
    for key in ("trainer.logger", "model.megatron_amp_O2", "model.data.chat", "model.peft.lora_tuning.weight_tying",
                "inference.greedy"):  # fmt: skip
        assert f"{key} has no effect: " in said
    assert "exp_manager.checkpoint_callback_params.monitor: val_loss -> val/loss" in said
    keeping = config.exp_manager.checkpoint_callback_params
    assert (keeping.monitor, keeping.mode) == ("val/loss", "min")


def test_the_command_line_wins_over_a_translated_key_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "gpt_sft.yaml").write_text(FILE)
    notes: list[str] = []
    given = ["model.global_batch_size=8", "model.data.train_ds.micro_batch_size=4"]
    config = compose.load("sft", given, tmp_path, "gpt_sft", notes)
    assert (config.model.global_batch_size, config.model.micro_batch_size) == (8, 4)
    reason = "model.global_batch_size is given on the command line"
    assert f"model.data.train_ds.global_batch_size has no effect: {reason}" in notes
    assert "model.data.train_ds.micro_batch_size -> model.micro_batch_size" in notes


def test_what_is_asked_for_and_not_done_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(FILE.replace("weight_tying: false", "weight_tying: true"))
    with pytest.raises(ConfigErrors) as caught:
        compose.load("sft", ["model.hidden_dropout=0.1", "model.context_parallel_size=2"], tmp_path, "mine")
    found = {problem.key: str(problem) for problem in caught.value.problems}
    tying = "model.peft.lora_tuning.weight_tying"
    assert set(found) == {tying, "model.hidden_dropout", "model.context_parallel_size"}
    assert "mine.yaml" in found[tying]
    assert "command line" in found["model.hidden_dropout"]
    assert "Only 1 or null" in found["model.context_parallel_size"]


def test_lora_is_read_as_nemo_aligner_writes_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(FILE.replace("peft_scheme: none", "peft_scheme: lora"))
    config = compose.load("sft", [], tmp_path, "mine")
    assert isinstance(config, SftConfig)
    assert config.model.peft.lora() == Lora(("linear_fc1", "linear_fc2"), rank=16, alpha=16.0)
    tuning = "model.peft.lora_tuning"
    wrong = ("target_modules=[attention_dense,qkv]", "adapter_dim=0", "adapter_dropout=1.0")
    given = [f"{tuning}.{override}" for override in wrong]
    with pytest.raises(ConfigErrors) as caught:
        compose.load("sft", given, tmp_path, "mine")
    found = {problem.key: str(problem) for problem in caught.value.problems}
    assert set(found) == {f"{tuning}.target_modules", f"{tuning}.adapter_dim", f"{tuning}.adapter_dropout"}
    assert "'attention_qkv'" in found[f"{tuning}.target_modules"]
    with pytest.raises(ConfigErrors, match=r"did you mean model\.peft\.lora_tuning\.adapter_dim"):
        compose.load("sft", [f"{tuning}.adapter_dm=8"], tmp_path, "mine")
    with pytest.raises(ConfigErrors, match="this stage trains all weights"):
        compose.load("reward", ["model.restore_from_path=/b", "model.data.train_ds.file_path=/t",
                                "model.peft.peft_scheme=lora"])  # fmt: skip


def test_actor_and_critic_keys() -> None:
    notes: list[str] = []
    given = [
        "pretrained_checkpoint.restore_from_path=/b",
        "reward.restore_from_path=/r",
        "model.data.train_ds.file_path=/t",
    ]
    config = compose.load(
        "ppo", [*given, "trainer.ppo.model_gbs=32", "model.loss_clip_val=0.3", "trainer.ppo.trt_llm.enable=true",
                "remote_critic_rm.pad_to_length=8", "exp_manager.exp_dir=/ignored"], notes=notes,
    )  # fmt: skip
    assert isinstance(config, PpoConfig)
    assert config.model.global_batch_size == 32
    assert config.critic.loss_clip_val == 0.3
    assert config.exp_manager.explicit_log_dir == "runs/ppo"
    assert len(notes) == 5


def test_a_bad_time_limit_is_refused() -> None:
    with pytest.raises(ConfigErrors, match="max_time_per_run"):
        compose.load("sft", ["model.restore_from_path=/b", "model.data.train_ds.file_path=/t",
                             "exp_manager.max_time_per_run=3h"])  # fmt: skip
