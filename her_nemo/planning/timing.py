"""How long a step takes: a model from floating-point operations, bandwidths and the pipeline bubble.

Training follows Narayanan et al. 2021 (arXiv 2104.04473): a stage's time per micro-batch, times micro-batches plus
bubble. Tensor-parallel traffic is that of Korthikanti et al. 2022 (arXiv 2205.05198). Decoding is bound by reading
weights and keys/values (Pope et al. 2022, arXiv 2211.05102). All times are seconds, all sizes bytes or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from her_nemo.planning import calibration as cal
from her_nemo.planning.calibration import Gpu
from her_nemo.planning.memory import PARAMETER_BYTES, Recompute, model_bytes
from her_nemo.planning.shapes import Head, Layout, Shape, total_parameters

NO_RECOMPUTE = Recompute()
BACKWARD = 2.0  # of the forward's operations: gradients of inputs and of weights


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, so many to a machine."""

    gpu: Gpu
    per_node: int = 8

    def link(self, ranks: int) -> float:
        """Bytes/s per GPU of a collective over neighbouring ranks: NVLink within a machine, else the network."""
        speed = self.gpu.nvlink if ranks <= self.per_node else self.gpu.network
        return speed * cal.COLLECTIVE_EFFICIENCY


@dataclass(frozen=True)
class Work:
    """One model in one arithmetic on one layout."""

    shape: Shape
    layout: Layout
    machine: Machine
    precision: str = "bf16"
    fp8: bool = False
    fp8_share: float = 1.0  # of the layers; the others stay in bf16
    head: Head = "lm"
    recompute: Recompute = NO_RECOMPUTE
    tensor_overlap: bool = False  # Transformer Engine's overlap of tensor-parallel traffic
    distributed: bool = True
    parameter_overlap: bool = False  # the all-gather of updated weights behind the next forward

    @property
    def element(self) -> int:
        return PARAMETER_BYTES[self.precision]


@dataclass(frozen=True)
class TrainTime:
    """Seconds of one optimizer step, and what they are made of (the parts add up to `total`)."""

    matrices: float
    attention: float
    elementwise: float
    tensor_traffic: float
    bubble: float
    data_traffic: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def bottleneck(self) -> str:
        """Name of the largest part."""
        return max(vars(self), key=lambda name: getattr(self, name))


def matrix_flops(shape: Shape, head: Head = "lm") -> tuple[float, float]:
    """Forward operations per token of (one layer's matrices, the head)."""
    return 2.0 * shape.layer_matrix_elements, 2.0 * shape.hidden_size * (
        shape.vocab_size if head == "lm" else 1
    )


def attention_flops(shape: Shape, length: float) -> float:
    """Forward operations per token and layer of causal attention over `length` tokens: half of 4 x length x width."""
    return 2.0 * length * shape.query_width


def model_flops(
    shape: Shape, tokens: float, length: float, *, head: Head = "lm", causal: bool = True
) -> float:
    """Operations of forward and backward over `tokens`, recomputation not counted.

    `causal=False` counts the whole square of attention, as Megatron-LM's published TFLOP/s do.
    """
    layer, top = matrix_flops(shape, head)
    attention = attention_flops(shape, length) * (1.0 if causal else 2.0)
    return (1 + BACKWARD) * tokens * (shape.num_layers * (layer + attention) + top)


def _pass_seconds(
    work: Work, tokens: float, length: float, *, backward: bool
) -> tuple[float, float, float, float]:
    """One micro-batch through the slowest stage (matrices, attention, elementwise, tensor traffic)."""
    shape, layout, gpu = work.shape, work.layout, work.machine.gpu
    layers = shape.num_layers / layout.pipeline
    mine = tokens / layout.context
    layer, top = matrix_flops(shape, work.head)
    redone = 1.0 if backward and work.recompute.granularity == "full" else 0.0
    if redone and work.recompute.method == "block":
        redone = min(1.0, (work.recompute.num_layers or 1) / layers)
    redone_attention = 1.0 if backward and work.recompute.granularity == "selective" else redone
    factor = 1.0 + (BACKWARD if backward else 0.0)
    speed = gpu.bf16 * cal.MATRIX_EFFICIENCY
    if work.precision == "32":
        speed = gpu.bf16 / 2 * cal.MATRIX_EFFICIENCY  # TF32: half of bf16's peak
    fast = speed
    if work.fp8:
        fp8_speed = gpu.fp8 * cal.MATRIX_EFFICIENCY_FP8
        fast = 1.0 / (work.fp8_share / fp8_speed + (1.0 - work.fp8_share) / speed)
    matrices = mine / layout.tensor * (layers * layer * (factor + redone) / fast + top * factor / speed)
    attention = mine / layout.tensor * layers * attention_flops(shape, length) * (factor + redone_attention)
    attention /= gpu.bf16 * cal.ATTENTION_EFFICIENCY
    width = shape.hidden_size / (layout.tensor if layout.sequence_parallel else 1)
    width += 2 * shape.ffn_hidden_size / layout.tensor / cal.ELEMENTWISE_PASSES
    elementwise = mine * layers * cal.ELEMENTWISE_PASSES * width * work.element * (factor + redone)
    elementwise /= gpu.memory_bandwidth * cal.MEMORY_EFFICIENCY
    traffic = 0.0
    if layout.tensor > 1:
        # Two all-reduces a layer and direction (or reduce-scatter and all-gather: the same bytes).
        sent = 2.0 * (layout.tensor - 1) / layout.tensor * mine * shape.hidden_size * work.element
        directions = (2 if backward else 1) + redone
        hidden = cal.TENSOR_OVERLAP_HIDDEN if work.tensor_overlap else 0.0
        traffic = 2.0 * layers * directions * sent / work.machine.link(layout.tensor) * (1.0 - hidden)
    return matrices, attention, elementwise, traffic


def train_step(work: Work, *, sequences: int, length: float, micro_batch: float = 1) -> TrainTime:
    """One optimizer step on `sequences` (over all replicas) of `length` tokens."""
    layout, machine = work.layout, work.machine
    micro_batches = max(1.0, sequences / layout.data / micro_batch)
    parts = _pass_seconds(work, micro_batch * length, length, backward=True)
    one = sum(parts)
    bubble = (layout.pipeline - 1) / layout.virtual * one
    held = model_bytes(
        work.shape, layout, 0, head=work.head, precision=work.precision, distributed=work.distributed
    )
    data = 0.0
    if layout.shards > 1:
        # Ranks of one replica sit side by side, so replicas meet over the network unless all share a machine.
        link = machine.link(layout.gpus)
        share = (layout.shards - 1) / layout.shards
        reduce = (
            held.gradients * share / link * (1.0 if work.distributed else 2.0) * (1.0 - cal.OVERLAP_HIDDEN)
        )
        gather = held.weights * share / link if work.distributed else 0.0
        data = reduce + gather * (1.0 - cal.OVERLAP_HIDDEN if work.parameter_overlap else 1.0)
    # Reads weights' master copy, moments and gradients, writes them back but for the gradients.
    touched = 2 * held.optimizer + held.gradients / (layout.shards if work.distributed else 1) + held.weights
    optimizer = touched / (machine.gpu.memory_bandwidth * cal.MEMORY_EFFICIENCY)
    return TrainTime(*(micro_batches * part for part in parts), bubble, data, optimizer)


def forward_seconds(work: Work, *, sequences: int, length: float, micro_batch: float = 1) -> float:
    """One pass without gradients over `sequences` of `length` tokens (log-probs, values, rewards)."""
    micro_batches = max(1.0, sequences / work.layout.data / micro_batch)
    one = sum(_pass_seconds(work, micro_batch * length, length, backward=False))
    return one * (micro_batches + (work.layout.pipeline - 1) / work.layout.virtual)


# ---------------------------------------------------------------- generation


def decode_step_seconds(
    work: Work, *, batch: float, context: float, step_seconds: float, layer_seconds: float
) -> float:
    """One token for each of `batch` sequences with `context` tokens behind them; the stages of a pipeline in turn.

    `step_seconds` is the engine's own time per step, `layer_seconds` the least a layer takes.
    """
    shape, layout, gpu = work.shape, work.layout, work.machine.gpu
    weights = total_parameters(shape) * work.element / layout.tensor
    cached = 2.0 * shape.num_layers * batch * context * shape.group_width * work.element / layout.tensor
    reading = (weights + cached) / (gpu.memory_bandwidth * cal.DECODE_EFFICIENCY)
    computing = 2.0 * total_parameters(shape) * batch / layout.tensor / (gpu.bf16 * cal.MATRIX_EFFICIENCY)
    reduces = 2 * shape.num_layers * cal.SMALL_ALL_REDUCE_SECONDS if layout.tensor > 1 else 0.0
    return max(reading + computing, shape.num_layers * layer_seconds) + reduces + step_seconds


def engine_capacity(work: Work, length: float, *, memory_share: float) -> int:
    """Sequences of `length` tokens a vLLM-like engine decodes at once, in what its share of memory leaves."""
    gpu, shape, tensor = work.machine.gpu, work.shape, work.layout.tensor
    left = gpu.memory * memory_share - cal.CONTEXT_BYTES - total_parameters(shape) * work.element / tensor
    per_sequence = 2 * shape.num_layers * shape.group_width * work.element * length / tensor
    return max(0, min(cal.ENGINE_SEQUENCES, int(left / per_sequence)))


def engine_seconds(
    work: Work,
    *,
    sequences: float,
    prompt: float,
    reply: float,
    longest: float,
    concurrent: int = cal.ENGINE_SEQUENCES,
    step_seconds: float = cal.ENGINE_STEP_SECONDS,
) -> float:
    """A vLLM-like engine of `work.layout.tensor` GPUs on its `sequences`, mean reply `reply`, the longest `longest`.

    Sequences enter as others leave. In the tail, between the mean and the longest reply, an eighth is taken to be left.
    """
    together = min(concurrent, sequences)
    full = sequences / together * reply
    full_step = decode_step_seconds(
        work, batch=together, context=prompt + reply / 2, step_seconds=step_seconds, layer_seconds=0.0
    )
    tail_step = decode_step_seconds(
        work, batch=together / 8, context=prompt + longest, step_seconds=step_seconds, layer_seconds=0.0
    )
    prefill = sum(_pass_seconds(work, sequences * prompt, prompt, backward=False))
    return prefill + full * full_step + max(0.0, longest - reply) * tail_step


def eager_generation_seconds(
    work: Work, *, sequences: float, prompt: float, longest: float, concurrent: int
) -> float:
    """The trainer's own engine (rollout/megatron_engine.py): batches of `concurrent` one after another, each as long
    as its longest reply, every kernel launched from Python."""
    batches = -(-sequences // concurrent)
    step = decode_step_seconds(
        work, batch=min(concurrent, sequences), context=prompt + longest / 2, step_seconds=0.0,
        layer_seconds=cal.EAGER_LAYER_SECONDS,
    )  # fmt: skip
    prefill = sum(_pass_seconds(work, min(concurrent, sequences) * prompt, prompt, backward=False))
    return batches * (longest * step + prefill * work.layout.pipeline)
