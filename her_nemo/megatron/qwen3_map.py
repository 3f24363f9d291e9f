"""The map between Hugging Face's Qwen3 tensors and megatron-core's, as one table of row intervals.

Whole tensors only, before any parallel split: `weights` uses it for live shards, `streaming` for files. A megatron-core
tensor is made of whole rows of its Hugging Face tensors, so the map is nothing but "these rows are those rows".
"""

from __future__ import annotations

from dataclasses import dataclass

from her_nemo.megatron.qwen3 import Head, Qwen3Shape

EMBEDDING, LM_HEAD, SCORE, FINAL_NORM = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "score.weight",
    "model.norm.weight",
)


@dataclass(frozen=True)
class Entry:
    """One megatron-core parameter and the Hugging Face tensors that it is made of."""

    kind: str
    """How it is split over ranks: "whole", "rows", "columns", "vocab" (rows, padded), "qkv" or "gate_up"."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """Rows [start, start + count) of a Hugging Face tensor are rows [row, row + count) of the megatron-core one.

    Of a tensor of one dimension, a row is one element.
    """

    name: str
    start: int
    row: int
    count: int


@dataclass(frozen=True)
class Whole:
    """One parameter of the whole model as a distributed checkpoint holds it."""

    key: str
    """The name in the checkpoint, where all layers share one name and stack along a first axis."""
    layer: int | None
    entry: Entry
    shape: tuple[int, ...]
    """Without the axis of layers, and without padding of the vocabulary."""


# Both spellings of each norm: of its own (local layers) and fused into the next linear map (Transformer Engine).
LAYER_ENTRIES: dict[str, Entry] = {
    "input_layernorm.weight": Entry("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": Entry("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": Entry(
        "qkv", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    "self_attention.q_layernorm.weight": Entry("whole", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Entry("whole", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": Entry("columns", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": Entry("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": Entry("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": Entry("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Entry("columns", ("mlp.down_proj.weight",)),
}
# megatron-core stores the norms of local layers under Transformer Engine's names.
STORED_AS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def layer_entry(name: str, layer: int) -> Entry | None:
    """The entry of parameter `name` of layer `layer` (counted over the whole model); None if there is none."""
    found = LAYER_ENTRIES.get(name)
    if found is None:
        return None
    return Entry(found.kind, tuple(f"model.layers.{layer}.{part}" for part in found.names))


def hf_shapes(shape: Qwen3Shape, head: Head) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the Hugging Face form of this model, in the order of the layers."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    query, kv = shape.num_attention_heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        for name, size in (
            ("input_layernorm.weight", (hidden,)),
            ("self_attn.q_proj.weight", (query, hidden)),
            ("self_attn.k_proj.weight", (kv, hidden)),
            ("self_attn.v_proj.weight", (kv, hidden)),
            ("self_attn.q_norm.weight", (shape.kv_channels,)),
            ("self_attn.k_norm.weight", (shape.kv_channels,)),
            ("self_attn.o_proj.weight", (hidden, query)),
            ("post_attention_layernorm.weight", (hidden,)),
            ("mlp.gate_proj.weight", (ffn, hidden)),
            ("mlp.up_proj.weight", (ffn, hidden)),
            ("mlp.down_proj.weight", (hidden, ffn)),
        ):
            shapes[f"model.layers.{layer}.{name}"] = size
    shapes[FINAL_NORM] = (hidden,)
    if head == "scalar":
        shapes[SCORE] = (1, hidden)
    elif not shape.tied:
        shapes[LM_HEAD] = (shape.vocab_size, hidden)
    return shapes


def wholes(shape: Qwen3Shape, head: Head) -> list[Whole]:
    """Every parameter of the whole model, in the order of the layers."""
    sizes = hf_shapes(shape, head)

    def whole(key: str, layer: int | None, entry: Entry) -> Whole:
        parts = [sizes[name] for name in entry.names]
        return Whole(key, layer, entry, (sum(part[0] for part in parts), *parts[0][1:]))

    found = [whole("embedding.word_embeddings.weight", None, Entry("vocab", (EMBEDDING,)))]
    for layer in range(shape.num_layers):
        for name in LAYER_ENTRIES:
            entry = layer_entry(name, layer)
            if entry is not None and name not in STORED_AS:
                found.append(whole(f"decoder.layers.{name}", layer, entry))
    found.append(whole("decoder.final_layernorm.weight", None, Entry("whole", (FINAL_NORM,))))
    if head == "scalar":
        found.append(whole("output_layer.weight", None, Entry("whole", (SCORE,))))
    elif not shape.tied:
        found.append(whole("output_layer.weight", None, Entry("vocab", (LM_HEAD,))))
    return found


def spans(entry: Entry, shape: Qwen3Shape, rows: int) -> list[Span]:
    """The `rows` rows of the whole megatron-core tensor, in order, and the Hugging Face rows that they are."""
    names = entry.names
    if entry.kind == "qkv":
        # Each query group's rows lie together: its queries, then its key, then its value.
        queries = shape.num_attention_heads // shape.num_query_groups * shape.kv_channels
        counts = (queries, shape.kv_channels, shape.kv_channels)
        found, row = [], 0
        for group in range(shape.num_query_groups):
            for name, count in zip(names, counts, strict=True):
                found.append(Span(name, group * count, row, count))
                row += count
        return found
    if entry.kind == "gate_up":
        half = shape.ffn_hidden_size
        return [Span(names[0], 0, 0, half), Span(names[1], 0, half, half)]
    return [Span(names[0], 0, 0, rows)]
