"""One typed configuration per stage. `compose.load` returns these; a stage reads nothing else.

Every architecture key may be left out: it is then read from the checkpoint the stage starts from.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from her_nemo.config.chat import ChatConfig
from her_nemo.config.data import IngestConfig, InspectConfig
from her_nemo.config.evaluation import CoserConfig
from her_nemo.config.judge import JudgeConfig, JudgePromptsConfig
from her_nemo.config.precision import Fp8Keys
from her_nemo.config.reward_bench import RewardBenchConfig
from her_nemo.config.rl import (
    Dialogue,
    Diversity,
    Generative,
    ImportanceSampling,
    LengthParams,
    RewardMix,
    RewardRules,
    RewardVerdict,
)
from her_nemo.config.roleplay_bench import CompareConfig, RoleplayBenchConfig
from her_nemo.config.sections import (
    Data,
    ExpManager,
    OptimConfig,
    Peft,
    PpoTrainer,
    PretrainedCheckpoint,
    RewardTrainer,
    Section,
    SftData,
    SftTrainer,
    StageConfig,
    Tokenizer,
    TopK,
    TopP,
    Trainer,
    VllmRollout,
    WeightedData,
    knob,
    required,
)
from her_nemo.config.synthesis import SynthesiseConfig

# The keys of conf/model/*.yaml, in the names megatron-core and NeMo use.
ARCHITECTURE_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "rotary_base",
    "layernorm_epsilon",
    "share_embeddings_and_output_weights",
    "max_position_embeddings",
    "init_method_std",
)


class Architecture(Section):
    """The shape of a dense Qwen3. Null everywhere means: read it from the checkpoint."""

    num_layers: PositiveInt | None = knob(None, "Transformer layers.")
    hidden_size: PositiveInt | None = knob(None, "Width of the residual stream.")
    ffn_hidden_size: PositiveInt | None = knob(None, "Width of the SwiGLU feed-forward.")
    num_attention_heads: PositiveInt | None = knob(None, "Query heads.")
    num_query_groups: PositiveInt | None = knob(None, "Key/value heads (GQA groups).")
    kv_channels: PositiveInt | None = knob(None, "Width of one head (head_dim).")
    vocab_size: PositiveInt | None = knob(None, "Rows of the embedding before padding.")
    rotary_base: PositiveFloat | None = knob(None, "RoPE theta.")
    layernorm_epsilon: PositiveFloat | None = knob(None, "Epsilon of every RMSNorm.")
    share_embeddings_and_output_weights: bool | None = knob(
        None, "Tied embeddings: output layer = embedding."
    )
    max_position_embeddings: PositiveInt | None = knob(
        None, "Longest sequence the model is meant for, tokens."
    )
    init_method_std: PositiveFloat | None = knob(None, "Standard deviation of freshly initialised weights.")

    def architecture(self) -> dict[str, int | float | bool]:
        """The architecture keys that were given explicitly."""
        values = {key: getattr(self, key) for key in ARCHITECTURE_KEYS}
        return {key: value for key, value in values.items() if value is not None}


class ParallelModel(Architecture):
    """`model.*` of every stage that builds a Megatron model: shape and layout."""

    make_vocab_size_divisible_by: PositiveInt = knob(
        128, "The embedding is padded to a multiple of this x TP."
    )
    tensor_model_parallel_size: PositiveInt = knob(1, "TP: ranks each layer is split over.")
    pipeline_model_parallel_size: PositiveInt = knob(1, "PP: ranks the layers are dealt out to.")
    sequence_parallel: bool = knob(False, "Split norms and residuals along the sequence over the TP ranks.")
    seed: NonNegativeInt = knob(1234, "Seeds initialisation, data order and sampling.")
    tokenizer: Tokenizer = Tokenizer()


class ModelConfig(Fp8Keys, ParallelModel):
    """`model.*` of the training stages: shape, layout, arithmetic, batches, data, optimizer."""

    micro_batch_size: PositiveInt = knob(1, "Sequences per forward pass on one data-parallel rank.")
    global_batch_size: PositiveInt = knob(8, "Samples (pairs, for the reward model) per optimizer step.")
    encoder_seq_length: PositiveInt = knob(4096, "Longest sequence, tokens; older turns are dropped to fit.")
    activations_checkpoint_granularity: Literal["full", "selective"] | None = knob(
        None, "Recompute activations: null keeps them, selective redoes attention, full redoes layers."
    )
    activations_checkpoint_method: Literal["uniform", "block"] | None = knob(
        None, "With full: how layers are grouped."
    )
    activations_checkpoint_num_layers: PositiveInt | None = knob(None, "With full: layers per group.")
    data: Data
    optim: OptimConfig = OptimConfig()


class SftModel(ModelConfig):
    """`model.*` of SFT."""

    data: SftData
    peft: Peft = Peft()


# ---------------------------------------------------------------- PPO


class SamplingParams(Section):
    """`model.ppo.sampling_params.*`."""

    temperature: PositiveFloat = knob(1.0, "Softmax temperature of rollouts.")
    top_k: TopK = 0
    top_p: TopP = 1.0


class PpoParams(Section):
    """`model.ppo.*`: rollouts and the clipped objective."""

    num_rollout_samples: PositiveInt = knob(64, "Responses per PPO step, over all ranks.")
    num_samples_per_prompt: PositiveInt = knob(
        1, "Responses to each prompt: the group of group-relative advantages, of 2 or more there."
    )
    rollout_micro_batch_size: PositiveInt = knob(8, "Prompts generated at a time on one data-parallel rank.")
    forward_micro_batch_size: PositiveInt = knob(8, "Sequences per pass for log-probs, values and rewards.")
    num_val_samples: NonNegativeInt = knob(
        64, "Prompts of each validation, from the head of validation_ds; 0 turns it off."
    )
    entropy_bonus: NonNegativeFloat = knob(0.0, "Weight of the policy's entropy in the objective.")
    ratio_eps: Annotated[float, Field(gt=0.0, lt=1.0)] = knob(
        0.2, "Clip range of the policy ratio: 1 +- this."
    )
    ratio_eps_high: Annotated[float, Field(gt=0.0)] | None = knob(
        None, "Upper clip range, 1 + this, where it is another than the lower one; null takes ratio_eps."
    )
    ratio_level: Literal["token", "sequence"] = knob(
        "token", "sequence: all tokens of a reply share the geometric mean of their ratios (GSPO)."
    )
    dual_clip: Annotated[float, Field(gt=1.0)] | None = knob(
        None, "Where the advantage is negative, the objective is no less than this times it; null is off."
    )
    loss_aggregation: Literal["token_mean", "sequence_mean", "constant"] = knob(
        "token_mean",
        "Mean over tokens; over replies of token means; or over replies of sums / max_length (Dr.GRPO).",
    )
    packing: bool = knob(
        False,
        "Put sequences end to end for scores, log-probs, values and updates, attention kept apart, as many to a row as "
        "fit in micro_batch_size (forward_micro_batch_size) x encoder_seq_length tokens.",
    )
    importance: ImportanceSampling = ImportanceSampling()
    sampling_params: SamplingParams = SamplingParams()
    length_params: LengthParams = LengthParams()
    share_prompts: bool = knob(
        False, "Compute a prompt once for all replies to it, in rollouts, log-probs and updates: docs/rl.md."
    )
    rollout_engine: Literal["megatron", "vllm"] = knob(
        "megatron", "Who generates: the trainer's own model, or vLLM servers that its weights are sent to."
    )
    one_step_off: bool = knob(
        False, "With vllm: generate the next rollout while this one trains, from weights one update older."
    )
    vllm: VllmRollout = VllmRollout()
    dialogue: Dialogue = Dialogue()

    @property
    def num_prompts(self) -> int:
        """Prompts of a PPO step, over all ranks."""
        return self.num_rollout_samples // (self.num_samples_per_prompt * self.dialogue.turns)


class PpoModel(ModelConfig):
    """`model.*` of PPO: the actor. The critic and the reward model share its layout and batch sizes."""

    data: WeightedData
    peft: Peft = Peft()
    ppo: PpoParams = PpoParams()

    def packed_tokens(self, micro_batch_size: int) -> int | None:
        """Tokens of a packed row, as many as a micro-batch of full rows has; None where rows are not packed."""
        return micro_batch_size * self.encoder_seq_length if self.ppo.packing else None


class Critic(Section):
    """`critic.*`: the value model of PPO."""

    restore_from_path: str | None = knob(
        None,
        "Where the critic starts; null starts it from the reward model (the policy's own start, if none).",
    )
    loss_clip_val: NonNegativeFloat = knob(
        0.2, "Clip range of the value around its old estimate; 0 turns it off."
    )
    optim: OptimConfig = OptimConfig()


class RewardSource(Section):
    """`reward.*`: what PPO is scored by."""

    kind: Literal["scalar", "rules", "generative", "mix", "verdict"] = knob(
        "scalar",
        "scalar: the reward model; rules: reward.rules.*; generative: a judge, reward.generative.*; mix: a sum of "
        "these; verdict: the policy is a judge.",
    )
    restore_from_path: str | None = knob(
        None,
        "The reward model: a run's checkpoint directory, or a Hugging Face directory; null with rules alone.",
    )
    mix: RewardMix = RewardMix()
    rules: RewardRules = RewardRules()
    generative: Generative = Generative()
    verdict: RewardVerdict = RewardVerdict()
    diversity: Diversity = Diversity()

    @property
    def has_model(self) -> bool:
        """Whether a scalar reward model is needed."""
        return self.kind == "scalar" or (self.kind == "mix" and self.mix.scalar > 0)

    @property
    def is_judged(self) -> bool:
        """Whether a judge compares replies."""
        return self.kind == "generative" or (self.kind == "mix" and self.mix.generative > 0)


# ---------------------------------------------------------------- stages


class SftConfig(StageConfig):
    """`her-nemo sft`."""

    trainer: SftTrainer = SftTrainer()
    model: SftModel
    pretrained_checkpoint: PretrainedCheckpoint
    exp_manager: ExpManager


class RewardConfig(StageConfig):
    """`her-nemo reward`: Bradley-Terry on pairs, from the SFT model with a scalar head."""

    trainer: RewardTrainer = RewardTrainer()
    model: ModelConfig
    pretrained_checkpoint: PretrainedCheckpoint
    exp_manager: ExpManager


class PpoConfig(StageConfig):
    """`her-nemo ppo`. pretrained_checkpoint is the SFT model: the actor's start and the frozen reference."""

    trainer: PpoTrainer = PpoTrainer()
    model: PpoModel
    pretrained_checkpoint: PretrainedCheckpoint
    critic: Critic = Critic()
    reward: RewardSource = RewardSource()
    exp_manager: ExpManager


class ConvertConfig(StageConfig):
    """`her-nemo convert`: Hugging Face -> Megatron checkpoint."""

    trainer: Trainer = Trainer()
    model: ParallelModel = ParallelModel()
    source: str = required("The Hugging Face directory to read.")
    out: str = required("The Megatron checkpoint directory to write.")
    shard_bytes: PositiveInt = knob(
        2_000_000_000, "Size of a data file, bytes, about: what an interrupted run does again at most."
    )


class ExportConfig(StageConfig):
    """`her-nemo export`: Megatron checkpoint -> Hugging Face directory, proved before it is named done."""

    trainer: Trainer = Trainer()
    model: ParallelModel = ParallelModel()
    checkpoint: str = required(
        "The Megatron checkpoint directory to read (a run directory takes its latest)."
    )
    out: str = required("The Hugging Face directory to write.")
    tokenizer: str | None = knob(
        None, "Tokenizer directory to copy in; null takes the one beside the checkpoint."
    )
    part: str = knob("model", "Which model of the checkpoint: PPO's also hold a critic.")
    lora: Literal["merged", "adapter"] = knob(
        "merged", "Of a LoRA checkpoint: merged into the weights, or a PEFT adapter directory."
    )
    base: str | None = knob(
        None, "Of a LoRA checkpoint: where its base model lies now; null takes where it lay in training."
    )
    dtype: Literal["float32", "bfloat16", "float16", "fp8"] = knob(
        "bfloat16", "Number format of the written weights; fp8: the layers' matrices in e4m3 with a scale a 128-block."
    )
    shard_bytes: PositiveInt = knob(5_000_000_000, "Largest safetensors file, bytes.")
    proof: Literal["auto", "full", "layers"] = knob(
        "auto", "full: logits of both whole models; layers: layer by layer; auto: full where memory allows."
    )
    proof_layers: PositiveInt = knob(8, "Layers that proof=layers runs, the first and the last among them.")
    logits_tolerance: PositiveFloat = knob(
        1e-4,
        "Largest allowed difference of outputs, Hugging Face to Megatron, relative to the largest output.",
    )


class VerifyConfig(StageConfig):
    """`her-nemo verify A B`: two checkpoints compared tensor by tensor."""

    a: str = required("A Hugging Face directory, a Megatron checkpoint or a run directory.")
    b: str = required("The other.")
    part: str = knob("model", "Which model of a Megatron checkpoint: PPO's also hold a critic.")


class EvaluateSampling(Section):
    """`sampling.*` of evaluate."""

    temperature: NonNegativeFloat = knob(1.0, "0 is greedy.")
    top_k: TopK = 0
    top_p: TopP = 1.0
    max_tokens: PositiveInt = knob(1024, "Longest reply, tokens.")


class EvaluateConfig(StageConfig):
    """`her-nemo evaluate`: replies from vLLM on held-out prompts, scored."""

    model: str = required("The Hugging Face directory to evaluate.")
    prompts: str = required("JSON lines of held-out prompts.")
    scenes: str | None = knob(
        None, "The oracle's facts for those prompts; null leaves the oracle's score out."
    )
    out: str = required("Directory for samples.jsonl and eval.json.")
    num_prompts: Annotated[int, Field(ge=-1)] = knob(
        -1, "Prompts to take from the file's head; -1 takes all."
    )
    samples_per_prompt: PositiveInt = knob(1, "Replies per prompt.")
    seed: NonNegativeInt = knob(0, "Seed of the sampling.")
    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "vLLM's arithmetic; auto: float32 on CPU, on CUDA half."
    )
    tensor_parallel_size: PositiveInt = knob(1, "vLLM's tensor parallel size.")
    max_model_len: PositiveInt | None = knob(None, "vLLM's longest sequence; null takes the model's.")
    sampling: EvaluateSampling = EvaluateSampling()


class DemoWorld(Section):
    """`world.*`: rows of each file of the miniature world."""

    pretrain: PositiveInt = knob(15500, "Documents of plain text for the base model.")
    sft_train: PositiveInt = knob(4096, "SFT training samples.")
    sft_val: PositiveInt = knob(128, "SFT validation samples.")
    pairs_train: PositiveInt = knob(2400, "Preference pairs to train on.")
    pairs_val: PositiveInt = knob(400, "Held-out preference pairs.")
    prompts_train: PositiveInt = knob(4096, "PPO prompts.")
    prompts_test: PositiveInt = knob(400, "Held-out prompts, of unseen characters and trait combinations.")


class DemoTokenizer(Section):
    """`tokenizer.*` of the demo."""

    vocab_size: PositiveInt = knob(
        1152, "Largest number of entries of the byte-level BPE, special tokens included."
    )


class BaseConfig(Section):
    """`base.*`: the short pretraining that makes a base model."""

    steps: PositiveInt = knob(1170, "Optimizer steps.")
    batch_size: PositiveInt = knob(8, "Sequences per step.")
    sequence_length: PositiveInt = knob(128, "Tokens per sequence.")
    lr: PositiveFloat = knob(4e-3, "Peak learning rate; a cosine takes it down to a tenth.")
    warmup_steps: NonNegativeInt = knob(20, "Steps of linear warm-up.")
    weight_decay: NonNegativeFloat = knob(0.01, "Decoupled weight decay.")


class DemoConfig(StageConfig):
    """`her-nemo demo`: the whole line. Each list holds override strings for the stage of that name."""

    seed: NonNegativeInt = knob(0, "Seeds the world, the models and the sampling.")
    out: str = required("The run directory of the demo.")
    model: Architecture = Architecture()
    world: DemoWorld = DemoWorld()
    tokenizer: DemoTokenizer = DemoTokenizer()
    base: BaseConfig = BaseConfig()
    convert: list[str] = knob([], "Overrides for convert.")
    sft: list[str] = knob([], "Overrides for sft.")
    reward: list[str] = knob([], "Overrides for reward.")
    ppo: list[str] = knob([], "Overrides for ppo.")
    export: list[str] = knob([], "Overrides for export.")
    evaluate: list[str] = knob([], "Overrides for evaluate.")


STAGES: dict[str, type[StageConfig]] = {
    "demo": DemoConfig,
    "convert": ConvertConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "export": ExportConfig,
    "verify": VerifyConfig,
    "evaluate": EvaluateConfig,
    "evaluate_coser": CoserConfig,
    "evaluate_roleplay_bench": RoleplayBenchConfig,
    "evaluate_reward_model": RewardBenchConfig,
    "evaluate_compare": CompareConfig,
    "judge": JudgeConfig,
    "data_ingest": IngestConfig,
    "data_inspect": InspectConfig,
    "data_synthesise": SynthesiseConfig,
    "data_judge": JudgePromptsConfig,
    "chat": ChatConfig,
}
