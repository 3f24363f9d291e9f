"""Bytes on one GPU: what models keep all the time (exact), and what a pass needs while it runs.

Static parts (weights, gradients, optimizer) are exact, see shapes.py. Activations are counted tensor by tensor:
`Kernels.LOCAL` is what megatron-core's plain modules keep on CPU, checked in tests/parallel/test_memory.py;
`Kernels.FUSED` is what Transformer Engine's fused modules keep on a GPU, from reading its modules, never measured.
Tokens are per GPU and micro-batch: sequence x micro-batch / context-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from her_nemo.config.lora import Lora
from her_nemo.planning.shapes import (
    Head,
    Layout,
    Shape,
    adapter_parameters,
    bucket_limit,
    buffer,
    padded_vocabulary,
    stage_parameters,
)

FP32, FP8 = 4, 1
PARAMETER_BYTES = {"32": 4, "bf16": 2, "bf16-mixed": 2}
GRADIENT_BYTES = {"32": 4, "bf16": 2, "bf16-mixed": 4}


class Kernels(StrEnum):
    """Which modules the layers are made of; they keep different tensors for the backward."""

    LOCAL = "local"
    FUSED = "fused"


@dataclass(frozen=True)
class Recompute:
    """Activation recomputation, as `model.activations_checkpoint_*`."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None


@dataclass(frozen=True)
class ModelBytes:
    """What one model keeps on one rank, in bytes."""

    weights: int
    gradients: int
    main_weights: int  # fp32 copy that the optimizer steps; 0 when weights are fp32
    moments: int  # Adam's two, made at the first step

    @property
    def optimizer(self) -> int:
        return self.main_weights + self.moments

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@cache
def model_bytes(
    shape: Shape,
    layout: Layout,
    stage: int,
    *,
    head: Head = "lm",
    precision: str = "bf16",
    trainable: bool = True,
    distributed: bool = True,
    data_rank: int = 0,
    divisible_by: int = 128,
    overlap: bool = True,
    lora: Lora | None = None,
    fp8: bool = False,
    fp8_params: bool = False,
) -> ModelBytes:
    """Bytes of one model on the rank of `stage` and `data_rank`. Exact for megatron-core 0.16.1.

    `distributed`: optimizer states sharded over the replicas (optim.name=distributed_fused_adam).
    `lora`: adapters, which alone have gradients and optimizer states then.
    `overlap`: gradient reduction overlapped, as it is on CUDA with more than one replica.
    `fp8`, `fp8_params`: what Transformer Engine keeps besides, or instead; from reading its modules, never measured.
    """
    parameters = stage_parameters(shape, layout, stage, head=head, divisible_by=divisible_by)
    count = sum(parameter.elements for parameter in parameters)
    size = PARAMETER_BYTES[precision]
    frozen = 0
    matrices = shape.layer_matrix_elements // layout.tensor * (shape.num_layers // layout.pipeline)
    # FP8 copies of the layers' matrices, kept from the first micro-batch on; for the backward also transposed. Weights
    # kept in FP8 are those copies, and their own two bytes go.
    copies = matrices * (2 if trainable else 1) * FP8 if fp8 else 0
    if fp8 and fp8_params:
        copies -= matrices * size
    if lora is not None:
        frozen = count * size
        parameters = adapter_parameters(shape, layout, lora)
        count = sum(parameter.elements for parameter in parameters)
    if not trainable:
        return ModelBytes(frozen + count * size + copies, 0, 0, 0)
    limit = bucket_limit(layout, stage, overlap=overlap and layout.shards > 1)
    held = buffer(parameters, layout.shards, distributed=distributed, bucket_elements=limit)
    # The distributed optimizer moves the weights into a buffer laid out like the gradients'.
    weights = frozen + (held.elements if distributed else count) * size + copies
    stepped = held.shard_elements(data_rank, layout.shards) if distributed else count
    main = 0 if precision == "32" else stepped * FP32
    return ModelBytes(weights, held.elements * GRADIENT_BYTES[precision], main, stepped * 2 * FP32)


# ---------------------------------------------------------------- activations


def layer_activations(
    shape: Shape, layout: Layout, *, sequence: int, batch: int, precision: str, kernels: Kernels,
    lora: Lora | None = None, fp8: bool = False,
) -> int:  # fmt: skip
    """Bytes one transformer layer keeps for the backward of one micro-batch of batch x sequence tokens.

    With `lora` an upper bound: inputs of maps without an adapter are counted, though frozen weights do not need them.
    """
    e, tp = PARAMETER_BYTES[precision], layout.tensor
    tokens = sequence * batch
    # Sequence parallelism cuts norms and residuals, tensor parallelism heads and feed-forward.
    outer = tokens // tp if layout.sequence_parallel else tokens
    # Where there are fewer groups than ranks, each rank has a whole group's key and value.
    groups = max(1, shape.num_query_groups // tp)
    h, q, g, f = (
        shape.hidden_size,
        shape.query_width // tp,
        shape.group_width // shape.num_query_groups * groups,
        shape.ffn_hidden_size // tp,
    )
    heads = shape.num_attention_heads // tp
    up = 2 * f if shape.gated else f
    softmax = tokens * heads * FP32  # log-sum-exp of flash attention
    # What lies between A and B of each adapter.
    low = 0 if lora is None else len(lora.targets) * tokens * lora.rank * e
    if kernels is Kernels.FUSED:
        # Norm: its input and output. Attention: inputs of the q/k norms, rotated q and k, v, output. Then the
        # feed-forward's input of SwiGLU (up) and of its last matrix.
        norms = outer * (4 * h * e + 2 * FP32)
        attention = tokens * (3 * q + 3 * g) * e + tokens * (heads + groups) * FP32 + softmax
        kept = norms + attention + tokens * (up + f) * e + low
        if fp8:
            # Inputs of the four matrices are kept in FP8; the attention's output stays beside its copy, for itself.
            kept += outer * 2 * h * (FP8 - e) + tokens * q * FP8 + tokens * f * (FP8 - e)
        return kept
    # Plain RMSNorm keeps its fp32 input, the fp32 normalised input and 1/rms; its output is the matrix's input.
    norms = outer * (2 * (2 * h * FP32 + h * e) + 2 * FP32)
    qk = tokens * (2 * (q + g) * FP32 + (heads + groups) * FP32)
    if precision == "32":
        # In fp32 the input of the q/k norms is no copy: both are views of the projection, kept once as a whole,
        # but megatron-core copies the queries out of it.
        qk -= tokens * g * FP32
    projection = tokens * (q + 2 * g) * e  # kept whole, since the values are a view of it
    rotary = 4 * sequence * shape.kv_channels * e  # cos and sin, for queries and for keys
    attention = tokens * (q + g) * e + tokens * q * e + softmax  # rotated q and k, output
    return norms + qk + projection + rotary + attention + tokens * (up + 3 * f) * e + low


def boundary_bytes(shape: Shape, layout: Layout, *, tokens: int, precision: str) -> int:
    """Bytes of one hidden state between layers: what full recomputation keeps, and what stages exchange."""
    outer = tokens // layout.tensor if layout.sequence_parallel else tokens
    return outer * shape.hidden_size * PARAMETER_BYTES[precision]


def head_activations(
    shape: Shape,
    layout: Layout,
    *,
    tokens: int,
    precision: str,
    head: Head,
    kernels: Kernels,
    divisible_by: int,
) -> int:
    """Bytes the last stage keeps after its layers: final norm, and the probabilities (fp32) of the vocabulary."""
    e, outer = PARAMETER_BYTES[precision], tokens // (layout.tensor if layout.sequence_parallel else 1)
    norm = outer * (shape.hidden_size * e + FP32)
    norm += outer * shape.hidden_size * (2 * FP32 if kernels is Kernels.LOCAL else e)
    if head == "scalar":
        # The scalar head multiplies in fp32, on the gathered sequence; in fp32 that input is the norm's output.
        copied = precision != "32" or (layout.sequence_parallel and layout.tensor > 1)
        return norm + (tokens * shape.hidden_size * FP32 if copied else 0)
    width = padded_vocabulary(shape.vocab_size, layout.tensor, divisible_by) // layout.tensor
    # Probabilities, the target's place (int64), whether it is here (bool).
    return norm + tokens * (min(width, shape.vocab_size) * FP32 + 9)


def logits_transient(
    shape: Shape, layout: Layout, *, tokens: int, precision: str, divisible_by: int, entropy: bool
) -> int:
    """Bytes that come on top of `head_activations` for an instant: logits and the copies of log_probs.py.

    Forward: the logits in the model's precision, one more fp32 copy while the peak is subtracted (in bf16), and one
    for the entropy's product. Backward: the gradient in the model's precision beside the fp32 one.
    """
    width = padded_vocabulary(shape.vocab_size, layout.tensor, divisible_by) // layout.tensor
    e = PARAMETER_BYTES[precision]
    forward = e + (0 if precision == "32" else FP32) + (FP32 if entropy else 0)
    return tokens * width * max(forward, e)


def stage_activations(
    shape: Shape,
    layout: Layout,
    stage: int,
    *,
    sequence: int,
    batch: int,
    precision: str,
    head: Head = "lm",
    kernels: Kernels = Kernels.FUSED,
    recompute: Recompute | None = None,
    divisible_by: int = 128,
    lora: Lora | None = None,
    fp8: bool = False,
) -> tuple[int, int]:
    """(bytes kept per micro-batch in flight, bytes of the layers being redone) on a rank of `stage`."""
    recompute = recompute or Recompute()
    layers = shape.num_layers // layout.pipeline
    tokens = sequence * batch
    one = layer_activations(
        shape, layout, sequence=sequence, batch=batch, precision=precision, kernels=kernels, lora=lora, fp8=fp8
    )
    boundary = boundary_bytes(shape, layout, tokens=tokens, precision=precision)
    working = 0
    if recompute.granularity == "full":
        group = recompute.num_layers or 1
        if recompute.method == "block":
            redone = min(group, layers)
            kept, working = redone * boundary + (layers - redone) * one, one
        else:
            kept, working = -(-layers // group) * boundary, min(group, layers) * one
    elif recompute.granularity == "selective":
        # Attention is redone from q, k, v, which are kept anyway; flash attention's log-sum-exp is what is saved.
        kept = layers * (one - tokens * shape.num_attention_heads // layout.tensor * FP32)
    else:
        kept = layers * one
    if stage == 0:
        kept += tokens * 8  # token ids, int64
    if stage == layout.pipeline - 1:
        kept += head_activations(
            shape,
            layout,
            tokens=tokens,
            precision=precision,
            head=head,
            kernels=kernels,
            divisible_by=divisible_by,
        )
    return kept, working


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at once under 1F1B (Narayanan et al. 2021, arXiv 2104.04473)."""
    return min(layout.pipeline - stage, micro_batches)


def kv_cache_bytes(shape: Shape, layout: Layout, *, sequences: int, length: int, precision: str) -> int:
    """Bytes of keys and values of `sequences` sequences of `length` tokens on one rank."""
    layers = shape.num_layers // layout.pipeline
    width = shape.group_width // min(layout.tensor, shape.num_query_groups)
    return 2 * layers * sequences * length * width * PARAMETER_BYTES[precision]
