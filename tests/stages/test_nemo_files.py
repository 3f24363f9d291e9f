"""NeMo-Aligner's four files, with the keys and the layout they have there, run or checked as their users would.

The files are written here from the list of keys in tests/config/test_dialect.py; values are those a user would change.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stage_files import Place, curve

ROOT = Path(__file__).resolve().parents[2]
TRAINER = """
name: theirs
defaults:
  - optional tp_overlap@model.ub_tp_comm_overlap_cfg:
trainer:
  num_nodes: 1
  devices: 1
  accelerator: cpu
  precision: 32
  logger: false
  enable_checkpointing: false
  use_distributed_sampler: false
  max_time: null
  max_epochs: 1
  max_steps: -1
exp_manager:
  explicit_log_dir: null
  exp_dir: null
  name: megatron_theirs
  create_wandb_logger: false
  wandb_logger_kwargs: {project: null, name: null}
  resume_if_exists: true
  resume_ignore_no_checkpoint: true
  create_checkpoint_callback: true
  checkpoint_callback_params:
    monitor: MONITOR
    save_top_k: 1
    mode: MODE
    always_save_nemo: false
    save_nemo_on_train_end: true
    filename: "theirs--{val_loss:.3f}-{step}"
    model_parallel_size: ${multiply:${model.tensor_model_parallel_size},${model.pipeline_model_parallel_size}}
"""
MODEL = """
  seed: 1234
  tensor_model_parallel_size: 1
  pipeline_model_parallel_size: 1
  context_parallel_size: 1
  resume_from_checkpoint: null
  encoder_seq_length: 256
  global_batch_size: 8
  micro_batch_size: 4
  sequence_parallel: false
  activations_checkpoint_granularity: null
  activations_checkpoint_method: null
  activations_checkpoint_num_layers: null
  megatron_amp_O2: false
  use_flash_attention: true
  hidden_dropout: 0.0
  attention_dropout: 0.0
  ffn_dropout: 0.0
  peft:
    peft_scheme: none
    restore_from_path: null
  optim:
    name: distributed_fused_adam
    lr: 1.0e-3
    weight_decay: 0.01
    betas: [0.9, 0.98]
    sched: {name: CosineAnnealing, warmup_steps: 2, constant_steps: 0, min_lr: 9.0e-4}
"""
SFT = """
  sft:
    max_epochs: 1
    max_steps: 6
    val_check_interval: 2
    save_interval: ${trainer.sft.val_check_interval}
    limit_train_batches: 1.0
    limit_val_batches: 1.0
    gradient_clip_val: 1.0
model:
  restore_from_path: ???
  answer_only_loss: true
MODEL
  data:
    chat: true
    chat_prompt_tokens: {system_turn_start: "\\0", turn_start: "\\x11", label_start: "\\x12", end_of_turn: "\\n"}
    sample: false
    num_workers: 0
    train_ds:
      file_path: ???
      global_batch_size: 8
      micro_batch_size: 4
      shuffle: true
      memmap_workers: null
      max_seq_length: ${model.encoder_seq_length}
      min_seq_length: 1
      drop_last: true
      label_key: output
      add_eos: true
      add_sep: false
      add_bos: false
      truncation_field: input
      index_mapping_dir: null
      prompt_template: "{input} {output}"
      hf_dataset: false
      truncation_method: right
    validation_ds:
      file_path: ???
      global_batch_size: ${model.data.train_ds.global_batch_size}
      micro_batch_size: ${model.data.train_ds.micro_batch_size}
      shuffle: false
      max_seq_length: ${model.data.train_ds.max_seq_length}
      drop_last: true
inference: {greedy: false, top_k: 0, tokens_to_generate: 30}
"""
REWARD = """
  rm:
    max_epochs: 1
    max_steps: 2
    val_check_interval: 2
    save_interval: 2
    train_random_sampler: true
    val_random_sampler: false
    limit_train_batches: 1.0
    limit_val_batches: 1
    gradient_clip_val: 1.0
pretrained_checkpoint: {restore_from_path: "???"}
model:
  reward_model_type: binary_ranking
  regression: {num_attributes: 9, merge_attributes: false}
  output_sequence: false
  use_avg_pool: false
  force_head_dtype: float32
  forward_micro_batch_size: ${.micro_batch_size}
MODEL
  data:
    data_impl: jsonl
    splits_string: null
    seq_length: ${model.encoder_seq_length}
    index_mapping_dir: null
    skip_warmup: true
    num_workers: 0
    dataloader_type: single
    reset_position_ids: false
    reset_attention_mask: false
    eod_mask_loss: false
    data_prefix: {train: [TRAIN], validation: [VALID], test: [VALID]}
"""
ACTOR = """
  ppo:
    critic_warmup_steps: 0
    max_epochs: 1
    max_steps: 3
    val_check_interval: 3
    save_interval: ${trainer.ppo.val_check_interval}
    gradient_clip_val: 1.0
    initial_policy_kl_penalty: 0.02
    use_absolute_kl: false
    discount_factor: 1.0
    gae_lambda: 0.95
    normalize_advantages: true
    rollout_batch_seq_length: null
    trt_llm: {enable: true, reshard: false, max_input_len: 128, model_type: llama, unload_engine_train: false}
    batch_iterator: {use_flask: false, port: 5557}
    model_gbs: ${model.global_batch_size}
    model_mbs: ${model.micro_batch_size}
pretrained_checkpoint: {restore_from_path: "???"}
remote_critic_rm:
  reward_model: {name: reward_model, ip: localhost, port: 5555}
  critic: {ip: localhost, port: 5556, name: {train: critic_train, infer: critic_infer, save: critic_save}}
  pad_to_length: null
model:
  ppo:
    rollout_micro_batch_size: 4
    num_rollout_samples: 8
    forward_micro_batch_size: ${.rollout_micro_batch_size}
    val_rollout_micro_batch_size: ${.rollout_micro_batch_size}
    num_val_samples: 8
    offload_adam_states: false
    entropy_bonus: 0.0
    ratio_eps: 0.2
    sampling_params:
      use_greedy: false
      temperature: 1.0
      top_k: 0
      top_p: 1.0
      repetition_penalty: 1.0
      add_BOS: false
      all_probs: false
      compute_logprob: false
      end_strings: ["<|endoftext|>", "<extra_id_1>"]
    length_params:
      max_length: ${int_div:${model.encoder_seq_length}, 16}
      min_length: 1
MODEL
  data:
    data_impl: jsonl
    splits_string: null
    seq_length: ${subtract:${model.encoder_seq_length}, 0}
    num_workers: 0
    data_prefix: {train: [TRAIN], validation: [VALID], test: [VALID]}
"""
CRITIC = """
  ppo:
    port: 5556
    combine_rm_and_critic_server: true
    max_steps: 3
    gradient_clip_val: 1.0
    max_queue_delay_microseconds: 100000
    strip_sequence_length_to_multiple: null
    inference_micro_batch_size: 4
pretrained_checkpoint: {restore_from_path: "???"}
model:
  loss_clip_val: 0.3
  offload_adam_states: false
  output_sequence: false
  force_head_dtype: float32
  reward_standardization: {enable: false, mean: 0, std: 1}
MODEL
  data: {data_impl: jsonl, data_prefix: {train: [TRAIN], validation: [VALID]}}
"""


@pytest.fixture
def files(place: Place, tmp_path: Path) -> Path:
    """A directory with the four files."""
    folder = tmp_path / "conf"
    folder.mkdir()
    names = {"gpt_sft": SFT, "training_rm": REWARD, "gpt_ppo_actor": ACTOR, "gpt_ppo_critic": CRITIC}
    for name, text in names.items():
        rows = "pairs" if name == "training_rm" else "prompts"
        monitor, mode = ("val_rewards", "max") if "ppo" in name else ("val_loss", "min")
        valid = "val" if rows == "pairs" else "test"
        text = TRAINER.split("exp_manager:")[0] + text + "exp_manager:" + TRAINER.split("exp_manager:")[1]
        for word, value in {
            "MODEL\n": MODEL.lstrip("\n"), "TRAIN": f"{place.world}/{rows}_train.jsonl", "MONITOR": monitor,
            "VALID": f"{place.world}/{rows}_{valid}.jsonl", "MODE": mode,
        }.items():  # fmt: skip
            text = text.replace(word, value)
        yaml.safe_load(text)  # it is YAML before Hydra sees it
        (folder / f"{name}.yaml").write_text(text)
    return folder


def run(files: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "her_nemo", *words[:2 if words[0] == "plan" else 1], "--config-dir", str(files),
         *words[2 if words[0] == "plan" else 1:]],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_their_sft_file_trains_and_keeps_the_best(place: Place, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(files, [
        "sft", "--config-name", "gpt_sft", f"model.restore_from_path={place.model}",
        f"model.data.train_ds.file_path={place.world}/sft_train.jsonl",
        f"model.data.validation_ds.file_path={place.world}/sft_val.jsonl", f"exp_manager.explicit_log_dir={out}",
    ])  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "model.restore_from_path -> pretrained_checkpoint.restore_from_path",
        "exp_manager.checkpoint_callback_params.monitor: val_loss -> val/loss",
        "model.data.chat_prompt_tokens.turn_start has no effect: ",
        "exp_manager.name has no effect: ",
    ):
        assert words in done.stderr, words
    losses = curve(out, "train/loss")
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    # save_top_k 1 by val_loss: the best and, if that is another, the newest.
    measured = curve(out, "val/loss")
    assert len(measured) == 3
    best = 2 * (1 + measured.index(min(measured)))
    kept = {int(entry.name.removeprefix("step_")) for entry in (out / "checkpoints").glob("step_*")}
    assert kept == {best, 6}
    assert (out / "checkpoints" / "best").read_text().strip() == f"step_{best:08d}"


@pytest.mark.parametrize(
    ("stage", "name", "given"),
    [
        ("reward", "training_rm", []),
        ("ppo", "gpt_ppo_actor", ["reward.restore_from_path=MODEL"]),
        ("ppo", "gpt_ppo_critic", ["reward.restore_from_path=MODEL", "trainer.ppo.save_interval=10",
                                   "model.ppo.length_params.max_length=16"]),
    ],
)  # fmt: skip
def test_their_other_files_pass_preflight(
    stage: str, name: str, given: list[str], place: Place, files: Path, tmp_path: Path
) -> None:
    done = run(files, [
        "plan", stage, "--config-name", name, f"pretrained_checkpoint.restore_from_path={place.model}", "--strict",
        f"exp_manager.explicit_log_dir={tmp_path}/run", *(text.replace("MODEL", str(place.model)) for text in given),
    ])  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"preflight of {stage}: nothing wrong" in done.stdout
