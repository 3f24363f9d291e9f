"""What one rank holds of a dense Qwen3 in megatron-core: tensors, gradient buffers and optimizer shards, in elements.

Exact, not estimated: tests/parallel/test_memory.py compares every number with what megatron-core 0.16.1 allocates.
The rules are those of `megatron.core.models.gpt.GPTModel` (which tensors there are) and of
`megatron.core.distributed.param_and_grad_buffer._ParamAndGradBuffer` (how they lie in buffers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from her_nemo.config.architecture import Sizes
from her_nemo.config.lora import Lora

Head = Literal["lm", "scalar"]

# megatron-core's own numbers: where a parameter and a bucket may start in a buffer of the distributed optimizer.
PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
# Buckets of the first stage when the gradient reduction overlaps the backward (DistributedDataParallel).
BUCKET_ELEMENTS = 40_000_000
BUCKET_ELEMENTS_PER_REPLICA = 1_000_000


@dataclass(frozen=True)
class Shape(Sizes):
    """The sizes of a dense model that its memory and time depend on. `gated`: SwiGLU (three matrices) or two."""

    tied: bool = False
    gated: bool = True
    qk_norm: bool = True

    @classmethod
    def from_architecture(cls, values: Mapping[str, Any]) -> Shape:
        """From the keys of `model.*` (config.schema.ARCHITECTURE_KEYS)."""
        return cls(
            **{size.name: int(values[size.name]) for size in fields(Sizes)},
            tied=bool(values.get("share_embeddings_and_output_weights", False)),
        )

    @property
    def query_width(self) -> int:
        """Query heads x head size."""
        return self.num_attention_heads * self.kv_channels

    @property
    def group_width(self) -> int:
        """Key (or value) heads x head size."""
        return self.num_query_groups * self.kv_channels

    @property
    def layer_matrix_elements(self) -> int:
        """Elements of the matrices of one layer, over all ranks."""
        attention = self.hidden_size * (2 * self.query_width + 2 * self.group_width)
        return attention + (3 if self.gated else 2) * self.hidden_size * self.ffn_hidden_size


@dataclass(frozen=True)
class Layout:
    """How a model is cut. `virtual` (interleaved stages) and `context` exist for published runs; ours have 1."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    virtual: int = 1
    context: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def shards(self) -> int:
        """Ranks an optimizer state is spread over: replicas x context-parallel ranks."""
        return self.data * self.context


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor of a rank."""

    name: str
    elements: int
    shared_embedding: bool = False  # the copy of a tied embedding that first and last stage keep in step


def padded_vocabulary(vocab_size: int, tensor: int, divisible_by: int) -> int:
    """Rows of the embedding: the vocabulary padded to a multiple of divisible_by x TP."""
    multiple = divisible_by * tensor
    return -(-vocab_size // multiple) * multiple


def stage_parameters(
    shape: Shape, layout: Layout, stage: int, *, head: Head = "lm", divisible_by: int = 128
) -> list[Parameter]:
    """The parameters of a rank of pipeline stage `stage`, in the order the module lists them."""
    tp, pp, h = layout.tensor, layout.pipeline, shape.hidden_size
    first, last = stage == 0, stage == pp - 1
    tied = shape.tied and head == "lm"
    embedding = padded_vocabulary(shape.vocab_size, tp, divisible_by) // tp * h
    made: list[Parameter] = []
    if first:
        made.append(Parameter("embedding.word_embeddings", embedding, shared_embedding=tied and pp > 1))
    qk_norms = ["q_layernorm", "k_layernorm"] if shape.qk_norm else []
    layer = [
        ("input_layernorm", h),
        ("linear_proj", h * shape.query_width // tp),
        ("linear_qkv", (shape.query_width + 2 * shape.group_width) // tp * h),
        *[(name, shape.kv_channels) for name in qk_norms],
        ("pre_mlp_layernorm", h),
        ("linear_fc1", (2 if shape.gated else 1) * shape.ffn_hidden_size // tp * h),
        ("linear_fc2", h * shape.ffn_hidden_size // tp),
    ]
    for index in range(shape.num_layers // pp):
        made += [Parameter(f"layers.{index}.{name}", elements) for name, elements in layer]
    if last:
        made.append(Parameter("final_layernorm", h))
        if head == "scalar":
            made.append(Parameter("output_layer", h))
        elif not tied:
            made.append(Parameter("output_layer", embedding))
        elif pp > 1:
            made.append(Parameter("output_layer", embedding, shared_embedding=True))
    return made


def adapter_parameters(shape: Shape, layout: Layout, lora: Lora) -> list[Parameter]:
    """The LoRA parameters of a rank, in the order the module lists them. Every pipeline stage has equally many.

    Beside a column-parallel map B is cut, beside a row-parallel one A (megatron/adapters.py).
    """
    tp, h, rank = layout.tensor, shape.hidden_size, lora.rank
    up = (2 if shape.gated else 1) * shape.ffn_hidden_size
    sizes = {
        "linear_qkv": (h, (shape.query_width + 2 * shape.group_width) // tp),
        "linear_proj": (shape.query_width // tp, h),
        "linear_fc1": (h, up // tp),
        "linear_fc2": (shape.ffn_hidden_size // tp, h),
    }
    return [
        Parameter(f"layers.{index}.{target}_lora.{matrix}", rank * side)
        for index in range(shape.num_layers // layout.pipeline)
        for target in lora.targets
        for matrix, side in zip(("lora_a", "lora_b"), sizes[target], strict=True)
    ]


def total_adapter_parameters(shape: Shape, lora: Lora) -> int:
    """LoRA parameters of the whole model."""
    return sum(part.elements for part in adapter_parameters(shape, Layout(), lora))


def total_parameters(shape: Shape, head: Head = "lm") -> int:
    """Parameters of the whole model, without padding and without second copies."""
    return sum(part.elements for part in stage_parameters(shape, Layout(), 0, head=head, divisible_by=1))


@dataclass(frozen=True)
class Buffer:
    """Contiguous storage for all parameters or gradients of a rank: its size, and what lies in each bucket."""

    elements: int
    buckets: tuple[tuple[int, int], ...]  # (start, end) of each, padding included
    places: tuple[tuple[int, int], ...]  # (start, end) of each parameter

    def shard_elements(self, rank: int, shards: int) -> int:
        """Parameter elements (padding left out) in the slices that shard `rank` of `shards` owns."""
        owned = 0
        for start, end in self.buckets:
            width = (end - start) // shards
            low, high = start + rank * width, start + (rank + 1) * width
            owned += sum(max(0, min(high, stop) - max(low, begin)) for begin, stop in self.places)
        return owned


def buffer(
    parameters: list[Parameter], shards: int, *, distributed: bool, bucket_elements: int | None = None
) -> Buffer:
    """Lay parameters out as megatron-core does: last first, and aligned only for the distributed optimizer.

    `bucket_elements` closes a bucket once it holds that many; None puts all in one.
    """

    def aligned(place: int, multiple: int) -> int:
        return -(-place // multiple) * multiple if distributed else place

    end_multiple = math.lcm(shards, BUCKET_ALIGNMENT)
    places: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = place = 0
    for parameter in reversed(parameters):
        start = aligned(place, PARAMETER_ALIGNMENT)
        # A tied embedding has a bucket of its own, so that first and last stage shard it alike.
        alone = parameter.shared_embedding and distributed
        if alone and place > bucket_start:
            buckets.append((bucket_start, aligned(start, end_multiple)))
            bucket_start = start = buckets[-1][1]
        place = start + parameter.elements
        places.append((start, place))
        if alone or (bucket_elements is not None and place - bucket_start >= bucket_elements):
            buckets.append((bucket_start, aligned(place, end_multiple)))
            bucket_start = place = buckets[-1][1]
    if place > bucket_start:
        buckets.append((bucket_start, aligned(place, end_multiple)))
    return Buffer(buckets[-1][1] if buckets else 0, tuple(buckets), tuple(places))


def bucket_limit(layout: Layout, stage: int, *, overlap: bool) -> int | None:
    """megatron-core's bucket size: finite only where the reduction overlaps and on the first stage."""
    if not overlap or stage > 0:
        return None
    return max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_REPLICA * layout.shards)
