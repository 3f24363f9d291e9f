"""A stage's configuration as work for GPUs: which models lie on each, what every phase needs, how long it takes.

What is planned is what the stages do: PPO keeps actor, critic, reference and reward model on the same ranks, and the
actor itself generates (rollout/megatron_engine.py), or vLLM servers do, on GPUs of their own or on the trainer's
(`servers`). Lengths are the longest allowed unless a mean length is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from her_nemo.config.lora import Lora
from her_nemo.config.schema import ModelConfig, PpoConfig, RewardConfig, SftConfig
from her_nemo.planning import calibration as cal
from her_nemo.planning import memory, servers, timing
from her_nemo.planning.memory import ModelBytes, Recompute
from her_nemo.planning.servers import Servers
from her_nemo.planning.shapes import Head, Layout, Shape
from her_nemo.planning.timing import Machine, Work

TrainingConfig = SftConfig | RewardConfig | PpoConfig
# Bytes per vocabulary entry and sequence while one token is drawn: log-probs, probabilities, sorted values and places,
# sums and their fp64 copies (rollout/megatron_engine.py: sample).
SAMPLING_BYTES = 60
# Bytes per token of a rollout's tensors (rollout/experience.py: ids, mask, kinds, seven fp32 tensors).
EXPERIENCE_BYTES = 38


@dataclass(frozen=True)
class Part:
    """One model of a stage and what is asked of it."""

    name: str
    head: Head
    trainable: bool
    distributed: bool = True
    lora: Lora | None = None


@dataclass(frozen=True)
class Phase:
    """Bytes on the fullest GPU in one phase, and the seconds it takes in one step."""

    name: str
    static: int  # weights, gradients, optimizer
    passing: int  # what the pass itself needs
    overhead: int  # CUDA, NCCL, what the allocator cannot use
    seconds: float
    bottleneck: str = ""

    @property
    def total(self) -> int:
        return self.static + self.passing + self.overhead


@dataclass(frozen=True)
class StagePlan:
    """Everything planned for one configuration."""

    parts: dict[str, ModelBytes]  # on the first stage's first rank
    phases: list[Phase]
    layout: Layout
    machine: Machine
    tokens_per_step: float
    servers: Servers | None = None  # on GPUs of their own, or on the trainer's
    notes: list[str] = field(default_factory=list)

    @property
    def gpus(self) -> int:
        """GPUs that the run takes, the servers' among them."""
        return self.layout.gpus + (self.servers.gpus if self.servers else 0)

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def usable(self) -> int:
        return int(self.machine.gpu.memory * cal.USABLE_SHARE)

    @property
    def headroom(self) -> int:
        """Bytes left in the fullest phase; negative when it does not fit."""
        return self.usable - self.peak.total

    @property
    def step_seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_step / self.step_seconds / self.gpus


@dataclass(frozen=True)
class Planner:
    """The sizes that every phase of one configuration shares."""

    config: Any
    shape: Shape
    layout: Layout
    machine: Machine
    length: float  # mean tokens of a sequence, for times
    kernels: memory.Kernels = memory.Kernels.FUSED

    @classmethod
    def of(cls, config: TrainingConfig, shape: Shape, length: float | None = None) -> Planner:
        model, trainer = config.model, config.trainer
        replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
        layout = Layout(
            model.tensor_model_parallel_size,
            model.pipeline_model_parallel_size,
            max(1, trainer.world_size // replica),
            model.sequence_parallel and model.tensor_model_parallel_size > 1,
        )
        machine = Machine(cal.GPUS[trainer.gpu or "h100_80gb"], per_node=trainer.devices)
        return cls(config, shape, layout, machine, length or model.encoder_seq_length)

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def precision(self) -> str:
        return self.config.trainer.precision

    @property
    def recompute(self) -> Recompute:
        model = self.model
        return Recompute(
            model.activations_checkpoint_granularity,
            model.activations_checkpoint_method,
            model.activations_checkpoint_num_layers,
        )

    def work(self, head: Head = "lm") -> Work:
        """For the time model. Our configuration of megatron-core overlaps neither TP traffic nor the all-gather."""
        kept = min(sum(self.model.layers_in_bf16), self.shape.num_layers)
        return Work(
            self.shape, self.layout, self.machine, self.precision, head=head, recompute=self.recompute,
            fp8=self.model.fp8, fp8_share=1.0 - kept / self.shape.num_layers,
        )  # fmt: skip

    def held(self, part: Part, stage: int) -> ModelBytes:
        return memory.model_bytes(
            self.shape, self.layout, stage, head=part.head, precision=self.precision, trainable=part.trainable,
            distributed=part.distributed, divisible_by=self.model.make_vocab_size_divisible_by, lora=part.lora,
            fp8=self.model.fp8, fp8_params=self.model.fp8_params,
        )  # fmt: skip

    @property
    def overhead(self) -> int:
        groups = 1 + (self.layout.tensor > 1) + (self.layout.pipeline > 1) + (self.layout.data > 1)
        return cal.CONTEXT_BYTES + groups * cal.NCCL_BYTES_PER_GROUP

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages that can be the fullest: the first (embedding, most micro-batches in flight) and the last (head)."""
        return tuple(sorted({0, self.layout.pipeline - 1}))

    # ------------------------------------------------------------ passes

    def training_bytes(
        self, stage: int, *, head: Head, sequences: int, micro_batches: int, entropy: bool, lora: Lora | None = None
    ) -> int:
        """The pass of one optimizer step: activations in flight, layers redone, logits, hidden states exchanged."""
        length, precision = self.model.encoder_seq_length, self.precision
        common = {"precision": precision, "head": head, "kernels": self.kernels}
        divisible = self.model.make_vocab_size_divisible_by
        kept, working = memory.stage_activations(
            self.shape, self.layout, stage, sequence=length, batch=sequences, recompute=self.recompute,
            divisible_by=divisible, lora=lora, fp8=self.model.fp8, **common,
        )  # fmt: skip
        needed = kept * memory.in_flight(self.layout, stage, micro_batches) + working
        tokens = length * sequences
        if stage == self.layout.pipeline - 1 and head == "lm":
            needed += memory.logits_transient(
                self.shape,
                self.layout,
                tokens=tokens,
                precision=precision,
                divisible_by=divisible,
                entropy=entropy,
            )
        # Gradients of one layer's activations while it is taken back: its widest tensors.
        needed += self.forward_bytes(tokens)
        return needed + 2 * memory.boundary_bytes(self.shape, self.layout, tokens=tokens, precision=precision)

    def forward_bytes(self, tokens: int) -> int:
        """One layer without gradients: hidden state in and out, and the feed-forward's three tensors."""
        width = 3 * self.shape.hidden_size + 3 * self.shape.ffn_hidden_size // self.layout.tensor
        return tokens * width * memory.PARAMETER_BYTES[self.precision]

    def scoring_bytes(self, stage: int, sequences: int) -> int:
        """Log-probs of `sequences` without gradients: a layer, then logits in the model's precision and fp32 twice."""
        tokens = sequences * self.model.encoder_seq_length
        needed = self.forward_bytes(tokens)
        if stage == self.layout.pipeline - 1:
            common = {"tokens": tokens, "precision": self.precision}
            divisible = self.model.make_vocab_size_divisible_by
            needed += memory.head_activations(
                self.shape, self.layout, head="lm", kernels=self.kernels, divisible_by=divisible, **common
            ) + memory.logits_transient(
                self.shape, self.layout, divisible_by=divisible, entropy=False, **common
            )
        return needed

    def rollout_bytes(self, config: PpoConfig) -> int:
        """Keys and values, the mask of the prompt, its widest layer, and drawing from the whole vocabulary."""
        rows, length = config.model.ppo.rollout_micro_batch_size, config.model.encoder_seq_length
        prompt = length - config.model.ppo.length_params.max_length
        cache = memory.kv_cache_bytes(
            self.shape, self.layout, sequences=rows, length=length, precision=self.precision
        )
        unsplit = replace(self, layout=replace(self.layout, sequence_parallel=False))
        mask = 2 * rows * prompt * prompt  # bool, and its inverse
        return (
            cache
            + mask
            + unsplit.forward_bytes(rows * prompt)
            + rows * self.shape.vocab_size * SAMPLING_BYTES
        )

    def stepping_bytes(self, held: ModelBytes) -> int:
        """Beside the states: with bf16 gradients, the fp32 copy of the shard the optimizer steps."""
        return held.main_weights if self.precision == "bf16" else 0

    def phase(self, name: str, static: int, passing: int, seconds: float, bottleneck: str = "") -> Phase:
        overhead = self.overhead + int(passing * cal.FRAGMENTATION)
        return Phase(name, static, passing, overhead, seconds, bottleneck)

    def fullest(
        self, name: str, parts: list[Part], passing: dict[int, int], seconds: float, why: str = ""
    ) -> Phase:
        """The phase on the stage where it needs most."""
        phases = [
            self.phase(
                name, sum(self.held(part, stage).total for part in parts), passing[stage], seconds, why
            )
            for stage in self.stages
        ]
        return max(phases, key=lambda phase: phase.total)


def plan(config: TrainingConfig, shape: Shape, length: float | None = None) -> StagePlan:
    """Memory and time of `config` on its cluster. `length`: mean tokens of a sequence (default: the longest)."""
    planner = Planner.of(config, shape, length)
    if isinstance(config, PpoConfig):
        return _ppo(planner, config)
    return _supervised(planner, config)


def _finish(
    planner: Planner, parts: list[Part], phases: list[Phase], tokens: float, served: Servers | None = None
) -> StagePlan:
    held = {part.name: planner.held(part, 0) for part in parts}
    return StagePlan(held, phases, planner.layout, planner.machine, tokens, served)


def _learning(
    planner: Planner, name: str, parts: list[Part], part: Part, *, sequences: int, rows: int, updates: int = 1,
    entropy: bool = False, resident: int = 0,
) -> list[Phase]:  # fmt: skip
    """The passes and the optimizer step of one model: `updates` steps on `sequences` each, `rows` a micro-batch."""
    micro_batches = max(1, sequences // planner.layout.data // rows)
    step = timing.train_step(
        planner.work(part.head), sequences=sequences, length=planner.length, micro_batch=rows
    )
    passing = {
        stage: resident
        + planner.training_bytes(
            stage, head=part.head, sequences=rows, micro_batches=micro_batches, entropy=entropy, lora=part.lora
        )
        for stage in planner.stages
    }
    stepping = {
        stage: resident + planner.stepping_bytes(planner.held(part, stage)) for stage in planner.stages
    }
    outside = step.optimizer + step.data_traffic
    return [
        planner.fullest(name, parts, passing, updates * (step.total - outside), step.bottleneck()),
        planner.fullest(f"{name}: step", parts, stepping, updates * outside, "memory and network"),
    ]


def _supervised(planner: Planner, config: SftConfig | RewardConfig) -> StagePlan:
    model = config.model
    distributed = model.optim.name == "distributed_fused_adam"
    rows = 2 if isinstance(config, RewardConfig) else 1  # a pair is two sequences
    lora = config.model.peft.lora() if isinstance(config, SftConfig) else None
    part = Part("model", "scalar" if isinstance(config, RewardConfig) else "lm", True, distributed, lora)
    sequences = model.global_batch_size * rows
    still = dict.fromkeys(planner.stages, 0)
    phases = [
        planner.fullest("load", [part], still, 0.0),
        *_learning(planner, "train", [part], part, sequences=sequences, rows=model.micro_batch_size * rows),
        planner.fullest("save", [part], still, 0.0),
    ]
    return _finish(planner, [part], phases, sequences * planner.length)


def _ppo(planner: Planner, config: PpoConfig) -> StagePlan:
    model, ppo = config.model, config.model.ppo
    lora = model.peft.lora()
    actor = Part("actor", "lm", True, model.optim.name == "distributed_fused_adam", lora)
    critic = Part("critic", "scalar", True, config.critic.optim.name == "distributed_fused_adam")
    has_critic, has_reward_model = config.trainer.ppo.has_critic, config.reward.has_model
    parts = [actor, *([critic] if has_critic else [])]
    if lora is None or model.peft.restore_from_path is not None:
        parts.append(Part("reference", "lm", False, lora=lora))  # else it is the actor without its adapters
    parts += [Part("reward model", "scalar", False)] if has_reward_model else []
    judged = config.reward.is_judged and config.reward.generative.judge.restore_from_path is not None
    parts += [Part("judge", "lm", False)] if judged else []  # counted as large as the policy
    samples, mine = ppo.num_rollout_samples, max(1, ppo.num_rollout_samples // planner.layout.data)
    resident = mine * model.encoder_seq_length * EXPERIENCE_BYTES
    scoring = {"sequences": samples, "length": planner.length, "micro_batch": ppo.forward_micro_batch_size}
    passes = 2 * timing.forward_seconds(planner.work(), **scoring)
    passes += (has_critic + has_reward_model) * timing.forward_seconds(planner.work("scalar"), **scoring)
    updates = {
        "sequences": model.global_batch_size,
        "rows": model.micro_batch_size,
        "updates": samples // model.global_batch_size * config.trainer.ppo.max_epochs,
        "resident": resident,
    }
    still = dict.fromkeys(planner.stages, 0)
    scored = {s: resident + planner.scoring_bytes(s, ppo.forward_micro_batch_size) for s in planner.stages}
    served = servers.of(config, planner.shape, planner.machine, planner.length)
    phases = [
        planner.fullest("load", parts, still, 0.0),
        planner.fullest("scoring", parts, scored, passes, "matrices"),
        *(_learning(planner, "critic update", parts, critic, **updates) if has_critic else []),
        *_learning(planner, "actor update", parts, actor, entropy=ppo.entropy_bonus > 0, **updates),
        planner.fullest("save", parts, still, 0.0),
    ]
    trained = sum(phase.seconds for phase in phases)
    phases.insert(1, _rollout(planner, config, parts, served, trained if ppo.one_step_off else 0.0))
    if served is None:
        phases.append(planner.fullest("sync", parts, still, 0.0, "nothing to move: the actor itself generates"))
    else:
        awake = dict.fromkeys(planner.stages, served.taken)
        phases.append(planner.fullest("sync", parts, awake, served.sync_seconds, "weights to the servers"))
    return _finish(planner, parts, phases, samples * planner.length, served)


def _rollout(
    planner: Planner, config: PpoConfig, parts: list[Part], served: Servers | None, beside: float
) -> Phase:
    """Generating: on the trainer's GPUs, or on a server's. `beside`: seconds of training that it may hide behind."""
    ppo = config.model.ppo
    if served is not None:
        seen = max(0.0, served.rollout_seconds - beside)
        why = f"{served.rollout_seconds:.1f} s on the servers" + (", beside training" if beside else "")
        if served.taken:
            return planner.fullest("rollout", parts, dict.fromkeys(planner.stages, served.taken), seen, why)
        return Phase("rollout (server)", served.weights, served.cache, cal.CONTEXT_BYTES, seen, why)
    mine = max(1, ppo.num_rollout_samples // planner.layout.data)
    longest = min(ppo.length_params.max_length, planner.length)
    seconds = timing.eager_generation_seconds(
        planner.work(), sequences=mine, prompt=max(1.0, planner.length - longest), longest=longest,
        concurrent=ppo.rollout_micro_batch_size,
    )  # fmt: skip
    needed = dict.fromkeys(planner.stages, planner.rollout_bytes(config))
    return planner.fullest("rollout", parts, needed, seconds, "launches: one token at a time, kernel by kernel")
