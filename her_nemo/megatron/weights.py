"""The map between Hugging Face's Qwen3 tensors and megatron-core's, tensor by tensor, in both directions.

Loading reads only the rows or columns that this rank holds. Exporting gathers one tensor at a time. Nothing is
computed on the way, so load followed by export returns every tensor bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import safe_open
from safetensors.torch import save_file

from her_nemo.config.errors import UserError
from her_nemo.megatron import parallel, platform
from her_nemo.megatron.qwen3 import Head, Model, Qwen3Shape

EMBEDDING, LM_HEAD, SCORE, FINAL_NORM = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "score.weight",
    "model.norm.weight",
)
_IGNORED = re.compile(r".*rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Entry:
    """One megatron-core parameter and the Hugging Face tensors that it is made of."""

    kind: str
    """How it is split: "whole", "rows", "columns", "vocab" (rows, padded), "qkv" or "gate_up"."""
    names: tuple[str, ...]


# Both spellings of each norm: of its own (local layers) and fused into the next linear map (Transformer Engine).
_LAYER_ENTRIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "input_layernorm.weight": ("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": ("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (
        "qkv",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attention.q_layernorm.weight": ("whole", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("whole", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": ("columns", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": ("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("columns", ("mlp.down_proj.weight",)),
}


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


def entries(model: Model) -> dict[str, Entry]:
    """This rank's parameters (names without the data-parallel wrapper) -> what they are made of."""
    offset = get_transformer_layer_offset(model.config)
    found: dict[str, Entry] = {}
    for name, _ in model.bare().named_parameters():
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if layer and layer[2] in _LAYER_ENTRIES:
            kind, parts = _LAYER_ENTRIES[layer[2]]
            prefix = f"model.layers.{int(layer[1]) + offset}."
            found[name] = Entry(kind, tuple(prefix + part for part in parts))
        elif name == "embedding.word_embeddings.weight":
            found[name] = Entry("vocab", (EMBEDDING,))
        elif name == "decoder.final_layernorm.weight":
            found[name] = Entry("whole", (FINAL_NORM,))
        elif name == "output_layer.weight" and model.head == "scalar":
            found[name] = Entry("whole", (SCORE,))
        elif name == "output_layer.weight":
            # Tied embeddings under pipeline parallelism: the last stage holds a copy of the embedding.
            found[name] = Entry("vocab", (EMBEDDING if model.shape.tied else LM_HEAD,))
        else:
            raise RuntimeError(f"megatron-core parameter {name} has no counterpart in Hugging Face's Qwen3")
    return found


class _HfReader:
    """The tensors of a Hugging Face directory, read lazily and in slices."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(
                {directory / name for name in json.loads(index.read_text())["weight_map"].values()}
            )
        else:
            files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory} holds no .safetensors file (pickled weights are not read)")
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{index} names files that do not exist: {', '.join(missing)}")
        self._where: dict[str, object] = {}
        for file in files:
            handle = safe_open(file, framework="pt", device="cpu")
            self._where.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._where[name].get_slice(name)[start:stop]

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._where[name].get_slice(name)[:, start:stop]

    def whole(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)


def _check_names(reader: _HfReader, directory: Path, model: Model) -> bool:
    """UserError naming every missing, unexpected or mis-shaped tensor. Returns True if the file has the head."""
    wanted = hf_shapes(model.shape, model.head)
    have = {name for name in reader.names() if not _IGNORED.match(name)}
    optional = {SCORE} if model.head == "scalar" else set()
    # A file with tied embeddings may store the head again; a scalar model replaces the vocabulary head.
    ignored = {LM_HEAD} if model.head == "scalar" or model.shape.tied else set()
    problems = [f"missing: {name}" for name in wanted if name not in have | optional]
    problems += [f"unexpected: {name}" for name in sorted(have - set(wanted) - ignored)]
    for name in sorted(have & set(wanted)):
        if reader.shape(name) != wanted[name]:
            problems.append(f"{name} has shape {reader.shape(name)}, the model wants {wanted[name]}")
    if problems:
        raise UserError(f"{directory} does not hold this model's tensors:\n  " + "\n  ".join(problems))
    return SCORE in have


@torch.no_grad()
def load_hf(model: Model, hf_dir: str | Path) -> None:
    """Fill the model from a Hugging Face directory, each rank reading its own slices.

    A scalar-headed model may be filled from a language model: its head is then drawn anew (same on all ranks).
    Values are cast to the model's dtype. UserError names everything missing, unexpected or mis-shaped at once.
    """
    directory = Path(hf_dir)
    reader = _HfReader(directory)
    has_score = _check_names(reader, directory, model)
    parameters = dict(model.bare().named_parameters())
    for name, entry in entries(model).items():
        if entry.names == (SCORE,) and not has_score:
            model.bare().output_layer.reset()
            continue
        parameter = parameters[name]
        local = _READ[entry.kind](model, reader, entry.names)
        if local.shape != parameter.shape:
            raise RuntimeError(
                f"{name}: built {tuple(local.shape)}, the parameter is {tuple(parameter.shape)}"
            )
        parameter.copy_(local.to(parameter.dtype))


@torch.no_grad()
def zero_vocabulary_padding(model: Model) -> None:
    """Zero the rows of padded vocabulary entries: they take no part, but must stay finite in matrix products."""
    parameters = dict(model.bare().named_parameters())
    for name, entry in entries(model).items():
        if entry.kind == "vocab":
            rows = parameters[name].shape[0]
            valid = model.shape.vocab_size - parallel.tensor_rank() * rows
            parameters[name][max(0, valid) :].zero_()


def _my_share(size: int) -> tuple[int, int]:
    part = size // parallel.tensor_size()
    return parallel.tensor_rank() * part, (parallel.tensor_rank() + 1) * part


def _read_whole(model: Model, reader: _HfReader, names: tuple[str, ...]) -> torch.Tensor:
    return reader.whole(names[0])


def _read_columns(model: Model, reader: _HfReader, names: tuple[str, ...]) -> torch.Tensor:
    return reader.columns(names[0], *_my_share(reader.shape(names[0])[1]))


def _read_vocab(model: Model, reader: _HfReader, names: tuple[str, ...]) -> torch.Tensor:
    start, stop = _my_share(model.padded_vocab_size)
    vocab, hidden = reader.shape(names[0])
    rows = reader.rows(names[0], min(start, vocab), min(stop, vocab))
    padding = rows.new_zeros(stop - start - rows.shape[0], hidden)
    return torch.cat([rows, padding])


def _read_qkv(model: Model, reader: _HfReader, names: tuple[str, ...]) -> torch.Tensor:
    # Each query group's rows lie together: its queries, then its key, then its value.
    groups = model.shape.num_query_groups // parallel.tensor_size()
    parts = []
    for name in names:
        rows = reader.rows(name, *_my_share(reader.shape(name)[0]))
        parts.append(rows.view(groups, -1, rows.shape[1]))
    return torch.cat(parts, dim=1).flatten(0, 1)


def _read_gate_up(model: Model, reader: _HfReader, names: tuple[str, ...]) -> torch.Tensor:
    return torch.cat([reader.rows(name, *_my_share(reader.shape(name)[0])) for name in names])


_READ: dict[str, Callable[[Model, _HfReader, tuple[str, ...]], torch.Tensor]] = {
    "whole": _read_whole,
    "columns": _read_columns,
    "vocab": _read_vocab,
    "qkv": _read_qkv,
    "gate_up": _read_gate_up,
}


@torch.no_grad()
def hf_tensors(model: Model, *, everywhere: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under their Hugging Face names, one at a time, on the CPU, in the model's dtype.

    Collective: every rank must run the iterator to its end. Global rank 0 receives every (name, tensor); other
    ranks receive them only with `everywhere=True`. A tied model has no `lm_head.weight`.
    """
    mine = {names: (name, entry) for name, entry in entries(model).items() for names in [entry.names]}
    if not parallel.is_first_stage() and model.shape.tied and model.head == "lm":
        mine.pop((EMBEDDING,), None)
    parameters = dict(model.bare().named_parameters())
    wanted = everywhere or parallel.is_main()
    shapes = hf_shapes(model.shape, model.head)
    # One replica gathers; the others have the same weights.
    if not everywhere and parallel.data_rank() != 0:
        return
    for stage, names in _plan(model):
        pieces: list[torch.Tensor] | None = None
        if stage == parallel.pipeline_rank():
            name, entry = mine[names]
            pieces = _split(model, entry, _gather_tensor_parallel(parameters[name].detach(), entry.kind))
        if not everywhere and parallel.tensor_rank() != 0:
            continue
        for index, hf_name in enumerate(names):
            tensor = _send_to_all_stages(pieces[index] if pieces else None, shapes[hf_name], stage, model)
            if wanted:
                yield hf_name, tensor.cpu()


def _plan(model: Model) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(pipeline stage, Hugging Face names) of every parameter of the whole model, equal on all ranks."""
    per_stage = model.shape.num_layers // parallel.pipeline_size()
    last = parallel.pipeline_size() - 1
    groups = list(dict.fromkeys(parts for _, parts in _LAYER_ENTRIES.values()))
    yield 0, (EMBEDDING,)
    for layer in range(model.shape.num_layers):
        for parts in groups:
            yield layer // per_stage, tuple(f"model.layers.{layer}.{part}" for part in parts)
    yield last, (FINAL_NORM,)
    if model.head == "scalar":
        yield last, (SCORE,)
    elif not model.shape.tied:
        yield last, (LM_HEAD,)


def _gather_tensor_parallel(local: torch.Tensor, kind: str) -> list[torch.Tensor]:
    if kind == "whole" or parallel.tensor_size() == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(parallel.tensor_size())]
    dist.all_gather(parts, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return parts


def _split(model: Model, entry: Entry, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensor-parallel parts of one parameter -> its whole Hugging Face tensors, in the order of entry.names."""
    shape = model.shape
    if entry.kind == "whole":
        return [parts[0]]
    if entry.kind == "columns":
        return [torch.cat(parts, dim=1)]
    if entry.kind == "vocab":
        return [torch.cat(parts)[: shape.vocab_size].contiguous()]
    if entry.kind == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return [torch.cat([half[side] for half in halves]) for side in (0, 1)]
    joined = torch.cat(parts).view(shape.num_query_groups, -1, shape.hidden_size)
    queries = shape.num_attention_heads // shape.num_query_groups * shape.kv_channels
    split = joined.split([queries, shape.kv_channels, shape.kv_channels], dim=1)
    return [part.reshape(-1, shape.hidden_size) for part in split]


def _send_to_all_stages(
    tensor: torch.Tensor | None, size: tuple[int, ...], stage: int, model: Model
) -> torch.Tensor:
    if parallel.pipeline_size() == 1:
        return tensor
    if tensor is None:
        tensor = torch.empty(size, dtype=model.precision.params_dtype, device=platform.device())
    group = parallel_state.get_pipeline_model_parallel_group()
    tensor = tensor.contiguous()
    dist.broadcast(tensor, dist.get_global_rank(group, stage), group=group)
    return tensor


def save_hf(
    model: Model, out_dir: str | Path, *, dtype: torch.dtype | None = None, shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write config.json and safetensors files (with an index if there are several) to `out_dir`. Collective.

    Tensors are written in `dtype` (default: the model's). No file exceeds `shard_bytes` unless one tensor does.
    Returns the files written, on global rank 0; an empty list elsewhere. Tokenizer files are the caller's.
    """
    dtype = dtype or model.precision.params_dtype
    out = Path(out_dir)
    shards = _shards(hf_shapes(model.shape, model.head), dtype.itemsize, shard_bytes)
    total = sum(size for _, size in shards)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    shard_of = {tensor: index for index, (tensors, _) in enumerate(shards) for tensor in tensors}
    waiting: list[dict[str, torch.Tensor]] = [{} for _ in shards]
    written: list[Path] = []
    if parallel.is_main():
        out.mkdir(parents=True, exist_ok=True)
    for name, tensor in hf_tensors(model):
        index = shard_of[name]
        # A clone: safetensors refuses views that share memory with a live parameter.
        waiting[index][name] = tensor.to(dtype, copy=True).contiguous()
        if len(waiting[index]) == len(shards[index][0]):
            save_file(waiting[index], out / names[index], metadata={"format": "pt"})
            waiting[index] = {}
            written.append(out / names[index])
    if parallel.is_main():
        if len(shards) > 1:
            weight_map = {tensor: names[index] for tensor, index in shard_of.items()}
            index_file = out / "model.safetensors.index.json"
            index_file.write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            )
            written.append(index_file)
        config = out / "config.json"
        config.write_text(json.dumps(model.shape.to_hf_config(head=model.head, dtype=dtype), indent=2) + "\n")
        written.append(config)
    parallel.barrier()
    return written


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> list[tuple[list[str], int]]:
    """Consecutive tensors grouped into files: (names, bytes) each."""
    shards: list[tuple[list[str], int]] = [([], 0)]
    for name, shape in shapes.items():
        size = itemsize * int(torch.Size(shape).numel())
        if shards[-1][0] and shards[-1][1] + size > limit:
            shards.append(([], 0))
        shards[-1] = (shards[-1][0] + [name], shards[-1][1] + size)
    return shards
