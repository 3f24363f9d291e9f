"""The live model of this rank filled from Hugging Face tensors, and gathered back into them, tensor by tensor.

Loading reads only the rows that this rank holds. Gathering takes one tensor at a time over the tensor- and
pipeline-parallel ranks. Nothing is computed on the way, so load followed by export returns every tensor bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from her_nemo.config.errors import UserError
from her_nemo.megatron import adapters, parallel, platform, safetensors_files
from her_nemo.megatron.precision import fill
from her_nemo.megatron.qwen3 import Head, Model, Qwen3Shape
from her_nemo.megatron.qwen3_map import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    SCORE,
    Entry,
    Span,
    hf_shapes,
    layer_entry,
    spans,
    wholes,
)
from her_nemo.megatron.row_map import hf_whole, megatron_rows
from her_nemo.megatron.safetensors_files import HfTensors, TensorFileWriter

_COMPARED_ROWS = 4096


def entries(model: Model) -> dict[str, Entry]:
    """This rank's parameters (names without the data-parallel wrapper) -> what they are made of. Adapters are none."""
    offset = get_transformer_layer_offset(model.config)
    found: dict[str, Entry] = {}
    for name, _ in model.bare().named_parameters():
        if adapters.is_adapter(name):
            continue
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        entry = layer_entry(layer[2], int(layer[1]) + offset) if layer else None
        if entry is not None:
            found[name] = entry
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


def check_hf(held: HfTensors, shape: Qwen3Shape, head: Head, *, head_optional: bool = False) -> None:
    """UserError naming everything missing, unexpected, duplicate, mis-shaped or of a wrong dtype, at once.

    `head_optional`: a scalar-headed model may be made from a language model, which has no score.
    """
    # A file with tied embeddings may store the head again; a scalar model replaces the vocabulary head.
    ignored = {LM_HEAD} if head == "scalar" or shape.tied else set()
    problems = safetensors_files.problems_of(
        held, hf_shapes(shape, head), optional={SCORE} if head_optional else (), ignored=ignored
    )
    names = held.names()
    if head == "lm" and shape.tied and {EMBEDDING, LM_HEAD} <= names and not _same(held, EMBEDDING, LM_HEAD):
        problems.append(
            f"{LM_HEAD} is not {EMBEDDING}, though config.json says tie_word_embeddings: one of the two is stale; "
            "set tie_word_embeddings to false if both are meant"
        )
    if problems:
        raise UserError(f"{held.directory} does not hold this model's tensors:\n  " + "\n  ".join(problems))


def _same(held: HfTensors, one: str, other: str) -> bool:
    if held.shape(one) != held.shape(other) or held.dtype(one) != held.dtype(other):
        return False
    if held.dtype(one) not in safetensors_files.WEIGHT_DTYPES:
        return True  # named as a problem of its own
    count = held.shape(one)[0]
    return all(
        torch.equal(held.rows(one, first, last), held.rows(other, first, last))
        for first in range(0, count, _COMPARED_ROWS)
        for last in [min(count, first + _COMPARED_ROWS)]
    )


@torch.no_grad()
def load_hf(model: Model, hf_dir: str | Path) -> None:
    """Fill the model from a Hugging Face directory, each rank reading its own slices.

    A scalar-headed model may be filled from a language model: its head is then drawn anew (same on all ranks).
    Values are cast to the model's dtype. UserError names everything missing, unexpected or mis-shaped at once.
    """
    held = HfTensors(Path(hf_dir))
    check_hf(held, model.shape, model.head, head_optional=True)
    load_tensors(model, held)
    held.close()


class NamedTensors(Protocol):
    """Weights under their Hugging Face names, read in rows."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    def close(self) -> None: ...


@torch.no_grad()
def load_tensors(model: Model, held: NamedTensors) -> None:
    """Fill the model's base from checked tensors, as `load_hf`; adapters stay as they are."""
    parameters = dict(model.bare().named_parameters())
    for name, entry in entries(model).items():
        if entry.names == (SCORE,) and SCORE not in held.names():
            model.bare().output_layer.reset()
            continue
        parameter = parameters[name]
        local = _local(model, held, entry)
        if local.shape != parameter.shape:
            raise RuntimeError(
                f"{name}: built {tuple(local.shape)}, the parameter is {tuple(parameter.shape)}"
            )
        fill(parameter, local)


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


def _local(model: Model, held: NamedTensors, entry: Entry) -> torch.Tensor:
    """This rank's part of a parameter, in the file's dtype."""
    rows = sum(held.shape(name)[0] for name in entry.names)
    table = spans(entry, model.shape, rows)
    if entry.kind == "whole":
        return megatron_rows(held, table, 0, rows)
    if entry.kind == "columns":
        whole = megatron_rows(held, table, 0, rows)
        first, last = _my_share(whole.shape[1])
        return whole[:, first:last]
    if entry.kind == "gate_up":
        first, last = _my_share(rows // 2)
        halves = [megatron_rows(held, table, side + first, side + last) for side in (0, rows // 2)]
        return torch.cat(halves)
    if entry.kind == "vocab":
        first, last = _my_share(model.padded_vocab_size)
        own = held.rows(entry.names[0], min(first, rows), min(last, rows))
        return torch.cat([own, own.new_zeros(last - first - own.shape[0], own.shape[1])])
    return megatron_rows(held, table, *_my_share(rows))


@torch.no_grad()
def hf_tensors(model: Model, *, everywhere: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under their Hugging Face names, one at a time, on the CPU, in the model's dtype.

    Adapters are merged in. Collective: every rank must run the iterator to its end. Global rank 0 receives every
    (name, tensor); other ranks receive them only with `everywhere=True`. A tied model has no `lm_head.weight`.
    """
    mine = {names: (name, entry) for name, entry in entries(model).items() for names in [entry.names]}
    if not parallel.is_first_stage() and model.shape.tied and model.head == "lm":
        mine.pop((EMBEDDING,), None)
    merged = adapters.Merged(model)
    wanted = everywhere or parallel.is_main()
    shapes = hf_shapes(model.shape, model.head)
    # One replica gathers; the others have the same weights.
    if not everywhere and parallel.data_rank() != 0:
        return
    for stage, names in _plan(model):
        pieces: list[torch.Tensor] | None = None
        if stage == parallel.pipeline_rank():
            name, entry = mine[names]
            pieces = _hf_pieces(model, entry, _gather_tensor_parallel(merged[name], entry.kind))
        if not everywhere and parallel.tensor_rank() != 0:
            continue
        for index, hf_name in enumerate(names):
            tensor = _send_to_all_stages(pieces[index] if pieces else None, shapes[hf_name], stage, model)
            if wanted:
                yield hf_name, tensor.cpu()


def hf_buckets(
    model: Model, bucket_bytes: int = 512 * 2**20, *, everywhere: bool = False
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """`hf_tensors` in groups of at most `bucket_bytes` (unless one tensor is larger), for syncing weights."""
    bucket: list[tuple[str, torch.Tensor]] = []
    filled = 0
    for name, tensor in hf_tensors(model, everywhere=everywhere):
        size = tensor.numel() * tensor.element_size()
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += size
    if bucket:
        yield bucket


def _plan(model: Model) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(pipeline stage, Hugging Face names) of every parameter of the whole model, equal on all ranks."""
    per_stage = model.shape.num_layers // parallel.pipeline_size()
    last = parallel.pipeline_size() - 1
    for whole in wholes(model.shape, model.head):
        if whole.layer is None:
            yield 0 if whole.entry.names == (EMBEDDING,) else last, whole.entry.names
        else:
            yield whole.layer // per_stage, whole.entry.names


def _gather_tensor_parallel(local: torch.Tensor, kind: str) -> list[torch.Tensor]:
    if kind == "whole" or parallel.tensor_size() == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(parallel.tensor_size())]
    dist.all_gather(parts, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return parts


def _hf_pieces(model: Model, entry: Entry, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensor-parallel parts of one parameter -> its whole Hugging Face tensors, in the order of entry.names."""
    if entry.kind == "columns":
        whole = torch.cat(parts, dim=1)
    elif entry.kind == "gate_up":
        halves = [part.chunk(2) for part in parts]
        whole = torch.cat([half[side] for side in (0, 1) for half in halves])
    else:
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    rows = model.shape.vocab_size if entry.kind == "vocab" else whole.shape[0]
    table: list[Span] = spans(entry, model.shape, rows)
    return [hf_whole(table, name, whole).contiguous() for name in entry.names]


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
    files = safetensors_files.shards(hf_shapes(model.shape, model.head), dtype.itemsize, shard_bytes)
    written = [out / name for name, _ in files]
    writers: dict[str, TensorFileWriter] = {}
    if parallel.is_main():
        out.mkdir(parents=True, exist_ok=True)
        for name, tensors in files:
            writers |= dict.fromkeys(tensors, TensorFileWriter(out / name, tensors, dtype))
    for name, tensor in hf_tensors(model):
        writers[name].write(name, 0, tensor.to(dtype).contiguous())
    for writer in set(writers.values()):
        writer.finish()
    if parallel.is_main():
        if len(files) > 1:
            written.append(out / safetensors_files.INDEX_FILE)
            written[-1].write_text(json.dumps(safetensors_files.index_of(files, dtype.itemsize), indent=2))
        written.append(out / "config.json")
        written[-1].write_text(json.dumps(model.shape.to_hf_config(head=model.head, dtype=dtype), indent=2) + "\n")
    parallel.barrier()
    return written if parallel.is_main() else []
