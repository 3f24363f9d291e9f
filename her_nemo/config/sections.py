"""The sections that stages share: trainer, optimizer, data, exp_manager. Key names are NeMo-Aligner's.

Types are strict: text is never read as a number, and an unknown key is an error. Defaults live here and nowhere
else; a YAML file holds only what differs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from her_nemo.config.base import Section, knob, required
from her_nemo.config.lora import Lora, expand
from her_nemo.config.rl import KlPenalty


class StageConfig(Section):
    """What every stage has."""

    name: str = required("Name of the run.")


def _precision(value: Any) -> Any:
    # Lightning's users write `precision: 32`, a number.
    return str(value) if type(value) is int else value


Precision = Annotated[Literal["32", "bf16", "bf16-mixed"], BeforeValidator(_precision)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
TopK = Annotated[int, Field(ge=0, description="Sample among the k likeliest tokens; 0 turns it off.")]
TopP = Annotated[float, Field(gt=0.0, le=1.0, description="Nucleus sampling; 1 turns it off.")]


# ---------------------------------------------------------------- trainer


class Trainer(Section):
    """`trainer.*`: how many processes, on what, in which arithmetic."""

    num_nodes: PositiveInt = knob(1, "Machines taking part.")
    devices: PositiveInt = knob(1, "Processes per machine, one per GPU (or per CPU worker over gloo).")
    accelerator: Literal["auto", "cpu", "gpu"] = knob(
        "auto", "auto takes CUDA where it is, else the CPU over gloo."
    )
    precision: Precision = knob("32", "Arithmetic of the model: 32, bf16, or bf16-mixed (fp32 main weights).")

    gpu: Literal["a100_80gb", "h100_80gb", "h200_141gb"] | None = knob(
        None, "The kind of GPU, for `her-nemo plan` and for what FP8 needs; null plans for h100_80gb."
    )

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.num_nodes * self.devices


class Loop(Section):
    """`trainer.sft.*` and `trainer.rm.*`: how long, how often to validate and to save. Steps are optimizer steps."""

    max_epochs: PositiveInt = knob(
        1, "Passes over the training data; the run ends at max_steps if that is sooner."
    )
    max_steps: Annotated[int, Field(ge=-1)] = knob(-1, "Optimizer steps in all; -1 sets no limit.")
    val_check_interval: PositiveInt = knob(100, "Optimizer steps between validations.")
    save_interval: PositiveInt = knob(100, "Optimizer steps between checkpoints.")
    limit_val_batches: Annotated[int, Field(ge=0)] | Fraction | None = knob(
        None, "Validation global batches: a whole number of them, a share of all (0.1), or null for all."
    )
    gradient_clip_val: NonNegativeFloat = knob(
        1.0, "Global gradient norm is clipped to this; 0 turns clipping off."
    )

    def val_batches(self, available: int) -> int:
        """How many of `available` validation batches to run."""
        limit = self.limit_val_batches
        if limit is None:
            return available
        return min(available, limit) if isinstance(limit, int) else int(available * limit)


AdvantageEstimator = Literal["gae", "grpo", "rloo", "dr_grpo", "her"]


class PpoLoop(Section):
    """`trainer.ppo.*`: the PPO loop. One step is one rollout followed by its updates."""

    max_steps: PositiveInt = knob(
        100, "PPO steps (a rollout and its updates each), after critic_warmup_steps."
    )
    critic_warmup_steps: NonNegativeInt = knob(0, "Steps before those that update the critic alone.")
    max_epochs: PositiveInt = knob(1, "Passes over each rollout's samples.")
    val_check_interval: PositiveInt = knob(10, "PPO steps between validations.")
    save_interval: PositiveInt = knob(50, "PPO steps between checkpoints.")
    gradient_clip_val: NonNegativeFloat = knob(
        1.0, "Global gradient norm is clipped to this; 0 turns clipping off."
    )
    initial_policy_kl_penalty: NonNegativeFloat = knob(
        0.02, "Weight of the per-token KL to the frozen reference."
    )
    discount_factor: Fraction = knob(1.0, "Discount of later rewards, per token.")
    gae_lambda: Fraction = knob(0.95, "Lambda of generalised advantage estimation.")
    advantage_estimator: AdvantageEstimator = knob(
        "gae",
        "gae: with a critic; grpo, rloo, dr_grpo, her: relative to other replies to the prompt, no critic.",
    )
    her_advantage_clip: PositiveFloat = knob(
        2.0, "advantage_estimator=her: standardised advantages are clipped to +- this."
    )
    normalize_advantages: bool | None = knob(
        None, "Whiten advantages over the trained tokens of the whole rollout; null: with gae only."
    )
    normalize_rewards: bool = knob(
        False, "Shift and scale scores by the mean and deviation of all scores of the run so far."
    )
    kl: KlPenalty = KlPenalty()
    rollout_batch_seq_length: PositiveInt | None = knob(
        None, "Pad every rollout to this many tokens; null pads to the longest prompt + response."
    )

    @property
    def has_critic(self) -> bool:
        """Whether a value model is trained."""
        return self.advantage_estimator == "gae"

    @property
    def whitens(self) -> bool:
        """normalize_advantages with its null resolved."""
        return self.has_critic if self.normalize_advantages is None else self.normalize_advantages


class TrainingTrainer(Trainer):
    """`trainer.*` of the training stages."""

    backend: Literal["native", "nemo_aligner"] = knob(
        "native", "Whose loop trains: ours, or NeMo-Aligner's trainers over our models (docs/aligner.md)."
    )


class SftTrainer(TrainingTrainer):
    """`trainer.*` of SFT."""

    sft: Loop = Loop()


class RewardTrainer(TrainingTrainer):
    """`trainer.*` of the reward model."""

    rm: Loop = Loop()


class PpoTrainer(TrainingTrainer):
    """`trainer.*` of PPO."""

    ppo: PpoLoop = PpoLoop()


# ---------------------------------------------------------------- optimizer


class Sched(Section):
    """`optim.sched.*`: the learning-rate schedule, in optimizer steps."""

    name: Literal["constant", "CosineAnnealing"] = knob("constant", "Shape after the warm-up.")
    warmup_steps: NonNegativeInt = knob(0, "Steps of linear warm-up from 0.")
    constant_steps: NonNegativeInt = knob(0, "CosineAnnealing: steps held at min_lr at the end.")
    min_lr: NonNegativeFloat = knob(0.0, "CosineAnnealing: where it ends.")


class OptimConfig(Section):
    """`model.optim.*` and `critic.optim.*`: AdamW through megatron-core."""

    name: Literal["fused_adam", "distributed_fused_adam"] = knob(
        "distributed_fused_adam",
        "distributed_fused_adam shards optimizer states over the data-parallel ranks.",
    )
    lr: NonNegativeFloat = knob(1e-5, "Peak learning rate.")
    weight_decay: NonNegativeFloat = knob(0.01, "Decoupled weight decay.")
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = knob(
        [0.9, 0.98], "Adam's two betas."
    )
    sched: Sched = Sched()


# ---------------------------------------------------------------- adapters

LoraTarget = Literal["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2", "attention", "mlp", "all"]


class LoraTuning(Section):
    """`model.peft.lora_tuning.*`: low-rank adapters beside frozen weights."""

    target_modules: Annotated[list[LoraTarget], Field(min_length=1)] = knob(
        ["attention_qkv"],
        "Linear maps with an adapter: attention_qkv, attention_dense, mlp_fc1, mlp_fc2; attention, mlp and all are "
        "groups of them.",
    )
    adapter_dim: PositiveInt = knob(32, "Rank of the adapters.")
    adapter_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = knob(
        0.0, "Dropout on an adapter's input in training; PPO takes 0 only."
    )
    alpha: PositiveFloat | None = knob(
        None, "What an adapter adds is multiplied by alpha / adapter_dim; null takes adapter_dim, a factor of 1."
    )


class Peft(Section):
    """`model.peft.*`: train everything, or adapters only (docs/lora.md)."""

    peft_scheme: Literal["none", "lora"] | None = knob(
        "none", "lora trains low-rank adapters and freezes the model (PPO: the actor); none or null trains all weights."
    )
    restore_from_path: str | None = knob(
        None, "With lora: a LoRA checkpoint whose adapters to start from; null starts from adapters that add nothing."
    )
    lora_tuning: LoraTuning = LoraTuning()

    def lora(self) -> Lora | None:
        """The adapters asked for; None if all weights are trained."""
        if self.peft_scheme != "lora":
            return None
        tuning = self.lora_tuning
        alpha = float(tuning.adapter_dim) if tuning.alpha is None else tuning.alpha
        return Lora(expand(tuning.target_modules), tuning.adapter_dim, alpha, tuning.adapter_dropout)


# ---------------------------------------------------------------- data


class Dataset(Section):
    """One data file."""

    file_path: str = required("A JSON-lines or Parquet file; docs/data.md has the schema each stage reads.")


class OptionalDataset(Section):
    """A data file a stage can do without."""

    file_path: str | None = knob(None, "A JSON-lines or Parquet file; null turns validation off.")


class Data(Section):
    """`model.data.*`: SFT reads messages, the reward model reads pairs, PPO reads prompts."""

    train_ds: Dataset
    validation_ds: OptionalDataset = OptionalDataset()
    skip_malformed: bool = knob(False, "Skip and count malformed lines in place of stopping at them.")
    shuffle: bool = knob(True, "Shuffle the training data anew each epoch, by model.seed.")
    cache_dir: str | None = knob(
        None, "Where encoded files are kept, for other runs too; null: cache/ in the run directory."
    )
    num_workers: NonNegativeInt | None = knob(
        None, "Processes that encode a file; null: one a core for files over 8 MiB, else none."
    )


class LayerWeights(Section):
    """`model.data.layer_weights.*`: how much a token of each segment kind counts in the loss, next to the others."""

    system_thinking: NonNegativeFloat = knob(1.0, "Weight of the plan's tokens.")
    role_thinking: NonNegativeFloat = knob(1.0, "Weight of tokens of inner thought.")
    role_action: NonNegativeFloat = knob(1.0, "Weight of tokens of action.")
    speech: NonNegativeFloat = knob(1.0, "Weight of speech, the name prefix and <|im_end|>.")

    @model_validator(mode="after")
    def _some_kind_counts(self) -> LayerWeights:
        if not any(self.model_dump().values()):
            raise ValueError("every weight is 0: nothing would be trained")
        return self


class WeightedData(Data):
    """`model.data.*` of PPO."""

    layer_weights: LayerWeights = LayerWeights()


class SftData(WeightedData):
    """`model.data.*` of SFT."""

    packing: bool = knob(
        False,
        "Put several samples in a row, attention kept apart; a row holds micro_batch_size x encoder_seq_length tokens.",
    )


class Tokenizer(Section):
    """`model.tokenizer.*`."""

    path: str | None = knob(
        None, "A Hugging Face tokenizer directory; null takes the one beside the checkpoint."
    )


# ---------------------------------------------------------------- run directory and checkpoints


class CheckpointCallbackParams(Section):
    """`exp_manager.checkpoint_callback_params.*`."""

    save_top_k: Annotated[int, Field(ge=-1)] = knob(
        2,
        "How many checkpoints are kept: the newest, or with monitor the best and beside them the newest, which a run "
        "goes on from. -1 keeps all, 0 saves none.",
    )
    monitor: str | None = knob(
        None,
        "The validation metric by which checkpoints are the best, e.g. val/loss, val/accuracy (reward) or "
        "val_rollouts/rewards (ppo); checkpoints/best names the best one. null keeps the newest.",
    )
    mode: Literal["min", "max"] = knob("min", "With monitor: whether the smallest or the largest value is the best.")


class ExpManager(Section):
    """`exp_manager.*`: the run directory, and whether to go on from what lies there."""

    explicit_log_dir: str = required(
        "The run directory: checkpoints/, tensorboard/, metrics.jsonl, config.yaml."
    )
    resume_if_exists: bool = knob(True, "Go on from the newest checkpoint in the run directory.")
    resume_ignore_no_checkpoint: bool = knob(True, "With resume_if_exists: start afresh when there is none.")
    max_time_per_run: Annotated[str, Field(pattern=r"^(\d+:)?\d+:[0-5]\d:[0-5]\d$")] | None = knob(
        None,
        "Save and stop after this long, days:hours:minutes:seconds or hours:minutes:seconds; null never stops.",
    )
    checkpoint_callback_params: CheckpointCallbackParams = CheckpointCallbackParams()

    @property
    def max_seconds(self) -> float | None:
        """max_time_per_run in seconds."""
        if self.max_time_per_run is None:
            return None
        *days, hours, minutes, seconds = (int(part) for part in self.max_time_per_run.split(":"))
        return ((sum(days) * 24 + hours) * 60 + minutes) * 60 + seconds


class PretrainedCheckpoint(Section):
    """A checkpoint to start from."""

    restore_from_path: str = required(
        "A Hugging Face directory, or one of our Megatron checkpoint directories."
    )


# ---------------------------------------------------------------- rollouts


class VllmRollout(Section):
    """`model.ppo.vllm.*`: the vLLM servers of `model.ppo.rollout_engine=vllm` (docs/rollouts.md)."""

    servers: list[str] = knob(
        [], "Addresses of running servers, as http://HOST:8000; empty starts num_servers on the first machine."
    )
    num_servers: PositiveInt = knob(1, "Servers to start; on CUDA each takes GPUs after the trainer's.")
    tensor_parallel_size: PositiveInt = knob(1, "GPUs (on CPU: processes) of each server started.")
    max_num_seqs: PositiveInt = knob(64, "Sequences a server decodes together; twice as many are sent to it.")
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = knob(
        0.9, "Share of a GPU's memory a started server takes; unused on CPU."
    )
    colocated: bool = knob(
        False, "Servers started share the trainer's GPUs: they sleep, without memory of their own, while it trains."
    )
    prefix_caching: bool = knob(False, "Servers started keep what prompts share; reset at every sync.")
    sync: Literal["auto", "files", "nccl"] = knob(
        "auto", "How weights reach the servers: nccl between GPUs, or safetensors files; auto: nccl on CUDA."
    )
    sync_dir: str | None = knob(
        None, "sync=files: a directory that trainer and servers both see; null: rollout/weights in the run directory."
    )
    start_timeout: PositiveInt = knob(600, "Seconds within which all servers have to answer.")


# ---------------------------------------------------------------- data ingest


class Shares(Section):
    """`shares.*` of data ingest: HER's five purposes. They add up to 1; the defaults are HER's."""

    roleplay_sft: Fraction = knob(0.33, "Supervised fine-tuning of the role-play model.")
    rm_sft: Fraction = knob(0.34, "Supervised fine-tuning of the reward model.")
    rm_rl: Fraction = knob(0.25, "Reinforcement learning of the reward model.")
    roleplay_rl: Fraction = knob(0.08, "Reinforcement learning of the role-play model: prompts.")
    test: Fraction = knob(0.0, "For testing, beside what the source or test_set hold out.")
