"""Hugging Face files -> torch_dist files and back, streamed, over any number of processes, and gone on with if cut off.

Both directions cut the model into files that do not depend on the number of processes; process r of n writes every
n-th file. Reading, casting, hashing and writing overlap.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from her_nemo.megatron import parallel, safetensors_files, state, torch_dist
from her_nemo.megatron.direct_file import Slabs
from her_nemo.megatron.qwen3 import Head, Qwen3Shape
from her_nemo.megatron.qwen3_map import Span, Whole, hf_shapes, spans, wholes
from her_nemo.megatron.row_map import Rows as RowSource
from her_nemo.megatron.row_map import megatron_rows
from her_nemo.megatron.safetensors_files import HfTensors, TensorFileWriter, bytes_of
from her_nemo.megatron.streaming import (
    BLOCK_BYTES,
    FILE_BYTES,
    HANDED,
    Background,
    BlockMemory,
    Digest,
    Journal,
    ahead,
    digest_head,
    row_blocks,
    row_bytes_of,
)
from her_nemo.megatron.torch_dist import Chunk, DataFileWriter

Watch = Callable[[int], object]


@dataclass(frozen=True)
class Share:
    """Which part of the files is this process's."""

    rank: int = 0
    world: int = 1

    def mine(self, files: list[Any]) -> list[Any]:
        return files[self.rank :: self.world]


# ---------------------------------------------------------------- to megatron-core


@dataclass(frozen=True)
class Block:
    """Rows [start, stop), columns [left, right) of a megatron-core tensor: one archive of a data file."""

    whole: Whole
    start: int
    stop: int
    columns: tuple[int, int] | None


def blocks(shape: Qwen3Shape, head: Head, dtype: torch.dtype, tensor: int, block_bytes: int) -> Iterator[Block]:
    """The whole model in blocks. What `tensor` ranks split by columns is cut there, so that each reads its own."""
    for whole in wholes(shape, head):
        for start, stop in row_blocks(whole.shape[0], row_bytes_of(whole.shape, dtype), block_bytes):
            if whole.entry.kind == "columns" and tensor > 1:
                width = whole.shape[1] // tensor
                for part in range(tensor):
                    yield Block(whole, start, stop, (part * width, (part + 1) * width))
            else:
                yield Block(whole, start, stop, None)


def data_files(found: Iterator[Block], itemsize: int, file_bytes: int) -> list[tuple[str, list[Block]]]:
    """Consecutive blocks grouped into files of about `file_bytes`."""
    groups: list[list[Block]] = [[]]
    filled = 0
    for block in found:
        groups[-1].append(block)
        filled += (block.stop - block.start) * row_bytes_of(_columns(block), torch.uint8) * itemsize
        if filled >= file_bytes:
            groups.append([])
            filled = 0
    return [(f"__{index}_0.distcp", group) for index, group in enumerate(groups) if group]


def _columns(block: Block) -> tuple[int, ...]:
    if block.columns is None:
        return block.whole.shape
    return (block.whole.shape[0], block.columns[1] - block.columns[0])


def stored_shapes(shape: Qwen3Shape, head: Head) -> dict[str, tuple[int, ...]]:
    """Key -> shape in a distributed checkpoint, with the axis of layers."""
    return {
        whole.key: whole.shape if whole.layer is None else (shape.num_layers, *whole.shape)
        for whole in wholes(shape, head)
    }


def to_torch_dist(
    held: HfTensors,
    directory: Path,
    shape: Qwen3Shape,
    head: Head,
    precision: str,
    dtype: torch.dtype,
    *,
    tensor: int = 1,
    block_bytes: int = BLOCK_BYTES,
    file_bytes: int = FILE_BYTES,
    share: Share | None = None,
    watch: Watch = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Write the tensors of a checked Hugging Face directory as a distributed checkpoint of weights. Collective.

    Goes on where an earlier call was cut off. `watch(bytes)` hears of progress. Returns the size and SHA-256 of
    every data file, on global rank 0.
    """
    share = share or Share()
    files = data_files(blocks(shape, head, dtype, tensor, block_bytes), dtype.itemsize, file_bytes)
    identity = {
        "what": "torch_dist",
        "source": source_identity(held.directory),
        "shape": vars(shape),
        "head": head,
        "precision": precision,
        "tensor": tensor,
        "block_bytes": block_bytes,
        "file_bytes": file_bytes,
    }
    journal = Journal(directory, identity, share.rank, parallel.barrier)
    done = {name for name, _ in share.mine(files) if _intact(directory, journal.resumed.get(name))}
    parallel.barrier()
    todo = [(name, group) for name, group in share.mine(files) if name not in done]
    watch(sum(journal.resumed[name]["bytes"] for name in done))
    with ThreadPoolExecutor(1) as pool:
        disk = Background()
        writer: DataFileWriter | None = None
        digest = Digest(pool)
        for name, block, rows, last in ahead(_megatron_blocks(held, todo, shape, dtype)):
            if writer is None:
                digest = Digest(pool)
                writer = DataFileWriter(directory / name, digest)
            writer.add(block.whole.key, *_placed(block, rows))
            watch(rows.numel() * rows.element_size())
            if last:
                disk.run(_finish_data_file(writer, digest.hexdigest(), journal))
                writer = None
        disk.finish()
    parallel.barrier()
    entries = journal.entries()
    if share.rank == 0:
        _write_about(directory, shape, head, precision, dtype, [entries[name] for name, _ in files])
        journal.remove()
    parallel.barrier()
    return {name: {"bytes": entries[name]["bytes"], "sha256": entries[name]["sha256"]} for name, _ in files}


def _megatron_blocks(
    held: HfTensors, files: list[tuple[str, list[Block]]], shape: Qwen3Shape, dtype: torch.dtype
) -> Iterator[tuple[str, Block, torch.Tensor, bool]]:
    """(file, block, its rows, whether it is the file's last): the reading half of `to_torch_dist`."""
    tables: dict[Whole, list[Span]] = {}
    memory, parts = BlockMemory(), Slabs(HANDED)
    last: tuple[Whole, int, int] | None = None
    rows = torch.empty(0)
    for name, group in files:
        for index, block in enumerate(group):
            whole = block.whole
            table = tables.setdefault(whole, spans(whole.entry, shape, whole.shape[0]))
            # Rows that are cut by columns are read once for all of their parts.
            if last != (whole, block.start, block.stop):
                rows = _whole_rows(held, table, block, dtype, memory)
                last = (whole, block.start, block.stop)
            part = rows
            if block.columns is not None:
                left, right = block.columns
                part = parts.take((rows.shape[0], right - left), dtype).copy_(rows[:, left:right])
            yield name, block, part, index == len(group) - 1


def _whole_rows(
    held: HfTensors, table: list[Span], block: Block, dtype: torch.dtype, memory: BlockMemory
) -> torch.Tensor:
    """The rows of a block over all columns, cast."""
    dtypes = {held.dtype(name) for name in block.whole.entry.names}
    size = (block.stop - block.start, *block.whole.shape[1:])
    out = memory.place(size, dtypes.pop(), dtype) if len(dtypes) == 1 else None
    return memory.cast(megatron_rows(held, table, block.start, block.stop, out), dtype, block.whole.entry.names[0])


def _placed(block: Block, rows: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor]:
    """Offsets and form of a block in the stored tensor, whose first axis may be the layers."""
    offsets: tuple[int, ...] = (block.start, *([0] * (rows.dim() - 1)))
    if block.columns is not None:
        offsets = (block.start, block.columns[0])
    if block.whole.layer is None:
        return offsets, rows
    return (block.whole.layer, *offsets), rows.unsqueeze(0)


def _finish_data_file(writer: DataFileWriter, digest: str, journal: Journal) -> Callable[[], None]:
    def finish() -> None:
        writer.finish()
        chunks = [chunk.to_json() for chunk in writer.chunks]
        journal.note({"file": writer.path.name, "bytes": writer.size, "sha256": digest, "chunks": chunks})

    return finish


def _intact(directory: Path, entry: dict[str, Any] | None) -> bool:
    """True if a file noted as finished still has the bytes it was finished with."""
    if entry is None:
        return False
    with (directory / entry["file"]).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == entry["sha256"]


def _write_about(
    directory: Path, shape: Qwen3Shape, head: Head, precision: str, dtype: torch.dtype, entries: list[dict[str, Any]]
) -> None:
    chunks = [Chunk.from_json(chunk) for entry in entries for chunk in entry["chunks"]]
    torch_dist.write_index(directory, stored_shapes(shape, head), dtype, chunks)
    layout = {"tensor": 1, "pipeline": 1, "data": 1}
    about = state.describe(shape, head, precision, layout=layout)
    (directory / state.ABOUT).write_text(json.dumps(about, indent=2) + "\n")


# ---------------------------------------------------------------- to Hugging Face


Stored = dict[str, tuple[tuple[int, ...], torch.dtype]]


def plainly_stored(shape: Qwen3Shape, head: Head, dtype: torch.dtype) -> Stored:
    """Name -> (shape, dtype) of the model's tensors, all in one dtype."""
    return {name: (size, dtype) for name, size in hf_shapes(shape, head).items()}


def tensor_files(stored: Stored, shard_bytes: int) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """The tensors grouped into files of at most `shard_bytes`, unless one is larger."""
    shapes = {name: size for name, (size, _) in stored.items()}
    return safetensors_files.shards(shapes, {name: kind.itemsize for name, (_, kind) in stored.items()}, shard_bytes)


def to_safetensors(
    held: RowSource,
    directory: Path,
    shape: Qwen3Shape,
    head: Head,
    dtype: torch.dtype,
    *,
    shard_bytes: int,
    identity: dict[str, Any],
    block_bytes: int = BLOCK_BYTES,
    share: Share | None = None,
    watch: Watch = lambda _: None,
    stored: Stored | None = None,
) -> dict[str, str]:
    """Write weights as safetensors files in `dtype`; no config.json, no index: they are not a model yet. Collective.

    `stored`: names, shapes and dtypes, where they are not the model's own in `dtype`.

    Goes on where an earlier call with the same `identity` was cut off. Returns, on every rank, the SHA-256 of every
    tensor as it came from `held`; whether that is what lies on the disk is for the proof to find out.
    """
    share = share or Share()
    stored = stored or plainly_stored(shape, head, dtype)
    dtypes = {name: kind for name, (_, kind) in stored.items()}
    files = tensor_files(stored, shard_bytes)
    identity = identity | {
        "what": "safetensors", "shape": vars(shape), "head": head, "dtype": str(dtype), "shard_bytes": shard_bytes,
        "dtypes": sorted({str(kind) for kind in dtypes.values()}),
    }  # fmt: skip
    journal = Journal(directory, identity, share.rank, parallel.barrier)
    todo = [(name, tensors) for name, tensors in share.mine(files) if name not in journal.resumed]
    watch(sum(journal.resumed[name]["bytes"] for name, _ in share.mine(files) if name in journal.resumed))
    with ThreadPoolExecutor(1) as pool:
        disk = Background()
        writer: TensorFileWriter | None = None
        digests: dict[str, Digest] = {}
        for file, tensors, name, start, rows, last in ahead(_hf_blocks(held, todo, dtypes, block_bytes)):
            if writer is None:
                writer = TensorFileWriter(directory / file, tensors, dtypes)
                digests = {}
            digest = digests.setdefault(name, Digest(pool, digest_head(dtypes[name], tensors[name])))
            digest.update(bytes_of(rows))
            writer.write(name, start, rows)
            digest.wait()
            watch(rows.numel() * rows.element_size())
            if last:
                disk.run(_finish_tensor_file(writer, {key: one.hexdigest() for key, one in digests.items()}, journal))
                writer = None
        disk.finish()
    parallel.barrier()
    entries = journal.entries()
    return {tensor: digest for name, _ in files for tensor, digest in entries[name]["tensors"].items()}


def _hf_blocks(
    held: RowSource,
    files: list[tuple[str, dict[str, tuple[int, ...]]]],
    dtypes: dict[str, torch.dtype],
    block_bytes: int,
) -> Iterator[tuple[str, dict[str, tuple[int, ...]], str, int, torch.Tensor, bool]]:
    """(file, its tensors, tensor, first row, rows, whether the last of the file): the reading half."""
    memory = BlockMemory()
    for file, tensors in files:
        last_name = list(tensors)[-1]
        for name, size in tensors.items():
            for start, stop in row_blocks(size[0], row_bytes_of(size, dtypes[name]), block_bytes):
                rows = memory.read(held, name, start, stop, dtypes[name])
                yield file, tensors, name, start, rows, name == last_name and stop == size[0]


def _finish_tensor_file(writer: TensorFileWriter, digests: dict[str, str], journal: Journal) -> Callable[[], None]:
    def finish() -> None:
        writer.finish()
        journal.note({"file": writer.path.name, "bytes": writer.size, "tensors": digests})

    return finish


# ---------------------------------------------------------------- what is read


def source_identity(directory: Path) -> dict[str, Any]:
    """What tells a source from another, or from itself changed since: names, sizes and times of its files."""
    files = sorted(file for file in directory.iterdir() if file.is_file())
    return {
        "directory": str(directory.resolve()),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
