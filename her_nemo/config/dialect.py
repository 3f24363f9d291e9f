"""NeMo-Aligner 0.7's keys that are not ours: each is translated, or dropped for a reason that is said, or refused.

Keys with the same name and meaning need no row. A key dropped without a word would be the worst answer: a file that
parses fine and then does something else. So a row may name the values it can be dropped at (`accepts`); any other
value is a problem, since it asks for something that is not done here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from her_nemo.config.errors import Problem


@dataclass(frozen=True)
class Fate:
    """What becomes of a key: moved to `to`, or dropped because of `reason` (at one of `accepts`, if any are named)."""

    to: str = ""
    reason: str = ""
    accepts: tuple[Any, ...] = ()

    def describe(self, key: str) -> str:
        """One sentence for the user."""
        if self.to:
            return f"Translated to {self.to}."
        limit = f" Only {' or '.join(map(_word, self.accepts))} can be given." if self.accepts else ""
        return f"Without effect: {self.reason}.{limit}"


def _word(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


LIGHTNING = "Lightning's; the loop is her_nemo's own (trainer.sft, trainer.rm, trainer.ppo)"
ONE_JOB = "actor, critic, reference and reward model share one job; there are no servers (critic.*, reward.*)"
NO_TRT = "TensorRT-LLM is not used: the actor itself generates"
KERNELS = "which kernels run is decided by what is installed (Transformer Engine or plain torch)"
ROWS = "rows are conversations in docs/data.md's form, written out with one template"
NEWEST = "save_top_k checkpoints are kept and the newest, each a directory of its own"
NO_LORA = "this stage trains all weights"
ONLY_LORA = "of the parameter-efficient schemes LoRA is built"
LOOPS = ("sft", "rm", "ppo")

TRANSLATED = {
    "model.restore_from_path": "pretrained_checkpoint.restore_from_path",
    "model.data.train_ds.global_batch_size": "model.global_batch_size",
    "model.data.train_ds.micro_batch_size": "model.micro_batch_size",
    "model.data.train_ds.max_seq_length": "model.encoder_seq_length",
    "model.data.train_ds.shuffle": "model.data.shuffle",
    "model.data.seq_length": "model.encoder_seq_length",
    "model.data.data_prefix.train": "model.data.train_ds.file_path",
    "model.data.data_prefix.validation": "model.data.validation_ds.file_path",
    "model.loss_clip_val": "critic.loss_clip_val",
    "trainer.rm.train_random_sampler": "model.data.shuffle",
    "trainer.ppo.model_gbs": "model.global_batch_size",
    "trainer.ppo.model_mbs": "model.micro_batch_size",
    "trainer.ppo.inference_micro_batch_size": "model.ppo.forward_micro_batch_size",
    "exp_manager.exp_dir": "exp_manager.explicit_log_dir",
}

KEYS: dict[str, Fate] = {key: Fate(to=to) for key, to in TRANSLATED.items()}


def _drop(reason: str, names: str, *, under: str = "", accepts: tuple[Any, ...] = ()) -> None:
    """Rows for keys (`names`, parted by spaces, in section `under`) that have no effect."""
    KEYS.update({under + name: Fate(reason=reason, accepts=accepts) for name in names.split()})


OFF = (False, None)
_drop(
    LIGHTNING,
    "logger enable_checkpointing use_distributed_sampler replace_sampler_ddp benchmark max_epochs max_steps "
    "log_every_n_steps val_check_interval limit_val_batches limit_test_batches max_time accumulate_grad_batches "
    "enable_model_summary enable_progress_bar num_sanity_val_steps",
    under="trainer.",
)
_drop("clipping is set per loop: trainer.sft|rm|ppo.gradient_clip_val", "trainer.gradient_clip_val")
for _loop in LOOPS:
    _drop(
        "every training batch is used; shorten a run with max_steps",
        f"trainer.{_loop}.limit_train_batches",
        accepts=(1.0, 1, None),
    )
    _drop("validation goes through its file in order", f"trainer.{_loop}.val_random_sampler")
_drop(
    "each run resumes from its own directory (exp_manager.resume_if_exists)",
    "model.resume_from_checkpoint",
    accepts=(None,),
)
_drop("context parallelism is not built", "model.context_parallel_size", accepts=(1, None))
_drop(
    "interleaved pipeline stages are not built",
    "model.virtual_pipeline_model_parallel_size",
    accepts=(1, None),
)
_drop("a dense model has no experts to spread", "model.expert_model_parallel_size", accepts=(1, None))
_drop("the loss is always on the trained reply alone", "model.answer_only_loss", accepts=(True,))
_drop("the optimizer always steps fp32 main weights", "model.megatron_amp_O2")
_drop("the model is always megatron-core's", "model.mcore_gpt", accepts=(True,))
_drop(
    KERNELS,
    "use_flash_attention apply_rope_fusion bias_activation_fusion masked_softmax_fusion "
    "bias_dropout_add_fusion gradient_accumulation_fusion ub_tp_comm_overlap grad_allreduce_chunk_size_mb "
    "apex_transformer_log_level gradient_as_bucket_view sync_batch_comm save_nemo_on_validation_end",
    under="model.",
)
_drop(
    "Qwen3 has no dropout",
    "hidden_dropout attention_dropout ffn_dropout",
    under="model.",
    accepts=(0.0, 0, None),
)
_drop("Transformer Engine finds a new scale at every step", "model.fp8_interval")
_drop("largest values are always shared by the ranks", "model.reduce_amax", accepts=(True, None))
_drop(
    "attention stays in bf16",
    "fp8_dot_product_attention fp8_multi_head_attention use_emha",
    under="model.",
    accepts=OFF,
)
_drop("gradients of weights are computed in FP8 too", "model.fp8_wgrad", accepts=(True, None))
# Of stages without adapters (the reward model, the critic); SFT and PPO have these keys themselves.
_drop(NO_LORA, "model.peft.peft_scheme", accepts=(None, "none"))
_LORA = "model.peft.lora_tuning."
_drop(NO_LORA, "model.peft.restore_from_path")
_drop(NO_LORA, "target_modules adapter_dim adapter_dropout alpha", under=_LORA)
_drop("A is drawn by Xavier's normal rule", "column_init_method", under=_LORA, accepts=("xavier",))
_drop("B starts at zero, so that the model starts as its base", "row_init_method", under=_LORA, accepts=("zero",))
_drop("every layer gets adapters", "layer_selection", under=_LORA, accepts=(None, []))
_drop("every layer has adapters of its own", "weight_tying", under=_LORA, accepts=OFF)
_drop("every layer has adapters of its own", "position_embedding_strategy", under=_LORA, accepts=(None,))
_drop(
    ROWS,
    "chat chat_prompt_tokens sample data_impl splits_string index_mapping_dir skip_warmup reset_position_ids "
    "reset_attention_mask eod_mask_loss data_prefix.test validation_drop_last",
    under="model.data.",
)
_drop(
    "tokens are made once, not by workers during training",
    "dataloader_type pin_memory",
    under="model.data.",
)
for _split in ("train_ds", "validation_ds", "test_ds"):
    _drop(
        ROWS,
        "label_key add_eos add_sep add_bos truncation_field truncation_method prompt_template hf_dataset "
        "index_mapping_dir memmap_workers num_samples concat_sampling_probabilities min_seq_length names num_workers "
        "pin_memory output_original_text",
        under=f"model.data.{_split}.",
    )
    _drop("a last batch that is not full is left out", f"model.data.{_split}.drop_last")
_BATCHES = "global_batch_size micro_batch_size max_seq_length shuffle"
_drop("there is no test split", f"file_path {_BATCHES}", under="model.data.test_ds.")
_drop(
    "validation uses the training batch sizes and length, in order",
    _BATCHES,
    under="model.data.validation_ds.",
)
_drop(
    "the optimizer is megatron-core's; its buckets are its own",
    "bucket_cap_mb overlap_grad_sync overlap_param_sync contiguous_grad_buffer contiguous_param_buffer "
    "grad_sync_dtype dtype sched.max_steps",
    under="model.optim.",
)
_drop(
    "the reward model is Bradley-Terry with a scalar at the last token",
    "model.reward_model_type",
    accepts=("binary_ranking",),
)
_drop("the score is read at the last token", "output_sequence use_avg_pool", under="model.", accepts=(False,))
_drop("the scalar head always computes in fp32", "model.force_head_dtype")
_drop("scoring uses the training micro-batch", "model.forward_micro_batch_size")
_drop(
    "Adam's states stay on the GPU",
    "ppo.offload_adam_states offload_adam_states",
    under="model.",
    accepts=OFF,
)
_drop("rewards are not shifted or scaled", "model.reward_standardization.enable", accepts=OFF)
_drop("rewards are not shifted or scaled", "mean std", under="model.reward_standardization.")
_drop("the KL penalty is the plain log-ratio", "trainer.ppo.use_absolute_kl", accepts=(False,))
_drop("validation generates with rollout_micro_batch_size", "model.ppo.val_rollout_micro_batch_size")
_drop(
    ONE_JOB,
    "port combine_rm_and_critic_server max_queue_delay_microseconds strip_sequence_length_to_multiple",
    under="trainer.ppo.",
)
_drop(
    "sampling is set by temperature, top_k and top_p",
    "add_BOS all_probs compute_logprob end_strings",
    under="model.ppo.sampling_params.",
)
_drop("greedy rollouts explore nothing", "model.ppo.sampling_params.use_greedy", accepts=(False,))
_drop("not built", "model.ppo.sampling_params.repetition_penalty", accepts=(1.0, 1))
_drop("exp_manager.explicit_log_dir names the run", "exp_manager.name")
_drop(
    "TensorBoard files and metrics.jsonl are written",
    "create_wandb_logger create_tensorboard_logger log_step_timing step_timing_kwargs",
    under="exp_manager.",
)
_drop(NEWEST, "exp_manager.create_checkpoint_callback")
_drop(
    NEWEST,
    "filename save_last save_nemo_on_train_end always_save_nemo save_best_model model_parallel_size "
    "every_n_train_steps",
    under="exp_manager.checkpoint_callback_params.",
)

# Whole sections that go, with the reason.
SECTIONS = {
    "model.data.chat_prompt_tokens": ROWS,
    "inference": "her-nemo evaluate has its own keys",
    "trainer.ppo.trt_llm": NO_TRT,
    "trainer.ppo.batch_iterator": "every replica takes an equal share of each rollout",
    "remote_critic_rm": ONE_JOB,
    "model.peft.p_tuning": ONLY_LORA,
    "model.peft.adapter_tuning": ONLY_LORA,
    "model.peft.ia3_tuning": ONLY_LORA,
    "model.peft.selective_tuning": ONLY_LORA,
    "model.regression": "the reward model is Bradley-Terry",
    "model.inference": "her-nemo evaluate has its own keys",
    "model.nsys_profile": "profiling is not built",
    "exp_manager.wandb_logger_kwargs": "TensorBoard files and metrics.jsonl are written",
}
# Values of keys we share whose names differ.
VALUES: dict[str, dict[Any, Any]] = {
    "model.optim.name": {
        "mcore_distributed_optim": "distributed_fused_adam",
        "megatron_fused_adam": "fused_adam",
    },
    "trainer.precision": {"bf16-true": "bf16"},
    "exp_manager.checkpoint_callback_params.monitor": {
        "val_loss": "val/loss",
        "validation_loss": "val/loss",
        "val_rewards": "val_rollouts/rewards",
        "val_global_rewards": "val_rollouts/rewards",
    },
}


def fate(key: str) -> Fate | None:
    """What becomes of a NeMo-Aligner key; None if the dialect does not know it."""
    if key in KEYS:
        return KEYS[key]
    for section, reason in SECTIONS.items():
        if key == section or key.startswith(section + "."):
            return Fate(reason=reason)
    return None


def translate(
    plain: dict[str, Any], known: Iterable[str], typed: Collection[str] = ()
) -> tuple[list[str], list[Problem]]:
    """Rewrite a resolved configuration in place. Returns (what was done, one line each; what cannot be done).

    `typed`: the keys of the command line, which a file's key never overrules, whatever its name.
    """
    ours = set(known)
    notes: list[str] = []
    problems: list[Problem] = []
    for key, value in list(_leaves(plain)):
        found = fate(key)
        if key in ours or found is None:
            continue
        if found.to and found.to not in ours:
            found = Fate(reason=f"this stage has no {found.to}")
        elif key == "exp_manager.exp_dir" and _get(plain, found.to) not in (None, "???"):
            found = Fate(reason="exp_manager.explicit_log_dir is given")
        elif found.to in typed and key not in typed:
            found = Fate(reason=f"{found.to} is given on the command line")
        _remove(plain, key)
        if found.accepts and value not in found.accepts:
            problems.append(
                Problem(key, f"given {_word(value)}, but {found.reason}", "", found.describe(key))
            )
        elif found.to and value is not None:
            _set(plain, found.to, _as_one(value))
            notes.append(f"{key} -> {found.to}")
        elif not found.to and value is not None:
            notes.append(f"{key} has no effect: {found.reason}")
    for key, names in VALUES.items():
        if key in ours and (value := _get(plain, key)) in names:
            _set(plain, key, names[value])
            notes.append(f"{key}: {value} -> {names[value]}")
    return notes, problems


def _as_one(value: Any) -> Any:
    """NeMo gives files as lists; ours is one file."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, key + ".")
        else:
            yield key, value


def _remove(plain: dict[str, Any], key: str) -> None:
    """Take a key out, and the sections it leaves empty."""
    parent, _, leaf = key.rpartition(".")
    section = _get(plain, parent) if parent else plain
    del section[leaf]
    if parent and not section:
        _remove(plain, parent)


def _get(plain: dict[str, Any], key: str) -> Any:
    here: Any = plain
    for part in key.split("."):
        here = here.get(part) if isinstance(here, dict) else None
    return here


def _set(plain: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for part in parents:
        plain = plain.setdefault(part, {})
    plain[leaf] = value
