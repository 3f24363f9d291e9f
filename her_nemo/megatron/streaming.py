"""Checkpoints turned from one form into the other a block of rows at a time: memory does not grow with the model.

One thread reads and casts, this one writes while another hashes, and a third waits for the disk. Work is cut into
files; a finished file is on the disk and noted in a journal before the next run counts on it, so that an interrupted
run goes on at the first file that is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from her_nemo.config.errors import UserError
from her_nemo.megatron.direct_file import Slabs
from her_nemo.megatron.qwen3 import Head, Qwen3Shape
from her_nemo.megatron.qwen3_map import Whole, hf_shapes, spans, wholes
from her_nemo.megatron.row_map import Rows, hf_intervals
from her_nemo.megatron.safetensors_files import HfTensors, bytes_of
from her_nemo.megatron.torch_dist import TorchDist

BLOCK_BYTES = 32 * 2**20
FILE_BYTES = 2 * 2**30
READ_AHEAD = 3
# Blocks alive at once: those that wait, one being read, one being written.
HANDED = READ_AHEAD + 2
_WORTH_A_THREAD = 2**16
IDENTITY = "identity.json"
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")

T = TypeVar("T")


class MegatronTensors:
    """A torch_dist checkpoint's weights under their Hugging Face names, read lazily in rows."""

    def __init__(self, directory: Path, shape: Qwen3Shape, head: Head) -> None:
        self.directory = directory
        self._held = TorchDist(directory)
        self._shapes = hf_shapes(shape, head)
        self._wholes = {name: whole for whole in wholes(shape, head) for name in whole.entry.names}
        self._tables = {whole: spans(whole.entry, shape, whole.shape[0]) for whole in self._wholes.values()}
        problems = self._problems(wholes(shape, head), shape)
        if problems:
            raise UserError(f"{directory} does not hold this model's tensors:\n  " + "\n  ".join(problems))

    def _problems(self, wanted: list[Whole], shape: Qwen3Shape) -> list[str]:
        keys, have = {whole.key for whole in wanted}, self._held.keys()
        stray = sorted(key for key in have - keys if key.startswith(_MODEL_KEYS))
        found = [f"unexpected: {key}" for key in stray]
        for key, layered, size, padded in sorted(
            {(whole.key, whole.layer is not None, whole.shape, whole.entry.kind == "vocab") for whole in wanted}
        ):
            if key not in have:
                found.append(f"missing: {key}")
                continue
            full, held = ((shape.num_layers, *size) if layered else size), self._held.shape(key)
            fits = held[0] >= full[0] and held[1:] == full[1:] if padded else held == full
            if not fits:
                found.append(f"{key} has shape {held}, the model wants {full}")
        return found

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._held.dtype(self._wholes[name].key)

    def rows(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in the checkpoint's dtype; into `out` (contiguous)."""
        whole = self._wholes[name]
        found = torch.empty((stop - start, *self._shapes[name][1:]), dtype=self.dtype(name)) if out is None else out
        at = 0
        for first, last in hf_intervals(self._tables[whole], name, start, stop):
            self._held.rows(whole.key, whole.layer, first, last, found[at : at + last - first])
            at += last - first
        return found

    def whole(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def close(self) -> None:
        self._held.close()


Tensors = HfTensors | MegatronTensors


# ---------------------------------------------------------------- the pieces of the machinery


def ahead(items: Iterable[T], depth: int = READ_AHEAD) -> Iterator[T]:
    """The items, made in a thread of their own, at most `depth` of them waiting. Its errors are raised here."""
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                waiting.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
            del value
    finally:
        stop.set()
        thread.join()


def row_blocks(rows: int, row_bytes: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of blocks of at most `block_bytes`, at least one row each."""
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """`tensor` in `dtype`; into `out`, if it has to change. UserError where a finite number is not finite any more."""
    if tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype) if out is None else out.copy_(tensor)
    if dtype == torch.float16 and bool((~found.isfinite() & tensor.isfinite()).any()):
        raise UserError(f"{name}: holds numbers beyond float16's 65504: use bfloat16 or float32")
    return found


class BlockMemory:
    """Memory that blocks are read into and cast in. A block is overwritten when `HANDED` later ones were made."""

    def __init__(self) -> None:
        self._handed, self._before = Slabs(HANDED), Slabs(1)

    def place(self, shape: Sequence[int], dtype: torch.dtype, wanted: torch.dtype) -> torch.Tensor:
        """Where to read a block of `dtype` that is `wanted` in another, or in the same."""
        return (self._handed if dtype == wanted else self._before).take(shape, dtype)

    def cast(self, block: torch.Tensor, wanted: torch.dtype, name: str) -> torch.Tensor:
        """The block in the dtype that is wanted, contiguous."""
        if block.dtype == wanted:
            return block.contiguous()
        return cast(block, wanted, name, self._handed.take(block.shape, wanted))

    def read(self, held: Rows, name: str, start: int, stop: int, wanted: torch.dtype) -> torch.Tensor:
        """Rows [start, stop) of a tensor. A source that computes its rows brings its own memory."""
        if not isinstance(held, HfTensors | MegatronTensors):
            return self.cast(held.rows(name, start, stop), wanted, name)
        place = self.place((stop - start, *held.shape(name)[1:]), held.dtype(name), wanted)
        return self.cast(held.rows(name, start, stop, place), wanted, name)


class Journal:
    """Which files of a directory are finished, by name. One journal per process, read by all.

    A directory begun for another `identity` (another source, shape, dtype) is emptied first.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], rank: int, barrier: Callable[[], None]) -> None:
        self.directory = directory
        self._own = directory / f"done.{rank}.jsonl"
        text = json.dumps(identity, sort_keys=True, default=str)
        file = directory / IDENTITY
        if rank == 0 and not (file.is_file() and file.read_text() == text):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            file.write_text(text)
        barrier()
        self.resumed = self.entries()

    def entries(self) -> dict[str, dict[str, Any]]:
        """File name -> what was noted of it, over all processes. A line that was cut short does not count."""
        found: dict[str, dict[str, Any]] = {}
        lines: list[dict[str, Any]] = []
        for journal in sorted(self.directory.glob("done.*.jsonl")):
            for line in journal.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
        # A later note of a file, by whichever process, replaces an earlier one.
        for entry in sorted(lines, key=lambda line: line["time"]):
            file = self.directory / entry["file"]
            if file.is_file() and file.stat().st_size == entry["bytes"]:
                found[entry["file"]] = entry
        return found

    def note(self, entry: dict[str, Any]) -> None:
        """Append an entry, on the disk before this returns."""
        with self._own.open("a") as stream:
            # A run that was killed while writing leaves half a line: begin a new one.
            stream.write("\n" + json.dumps(entry | {"time": time.time_ns()}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def remove(self) -> None:
        """Forget everything: the directory is finished, or not to be gone on with."""
        for file in [*self.directory.glob("done.*.jsonl"), self.directory / IDENTITY]:
            file.unlink(missing_ok=True)


class Background:
    """Runs jobs in one thread, in order; an error of one is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._jobs: list[Future[None]] = []

    def run(self, job: Callable[[], None]) -> None:
        for done in [future for future in self._jobs if future.done()]:
            done.result()
            self._jobs.remove(done)
        self._jobs.append(self._pool.submit(job))

    def finish(self) -> None:
        """Wait for everything."""
        self._pool.shutdown(wait=True)
        for job in self._jobs:
            job.result()


class Digest:
    """SHA-256 of what passes, computed beside the writing of it."""

    def __init__(self, pool: ThreadPoolExecutor, head: bytes = b"") -> None:
        self._hash = hashlib.sha256(head)
        self._pool = pool
        self._pending: Future[None] | None = None

    def update(self, content: memoryview) -> None:
        """`content` must stay unchanged until `wait`."""
        self.wait()
        if len(content) < _WORTH_A_THREAD:
            self._hash.update(content)
            return
        self._pending = self._pool.submit(self._hash.update, content)

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def hexdigest(self) -> str:
        self.wait()
        return self._hash.hexdigest()


def tensor_digests(held: Tensors, dtypes: Mapping[str, torch.dtype], block_bytes: int = BLOCK_BYTES) -> dict[str, str]:
    """SHA-256 over dtype, shape and bytes of tensors cast to dtypes, a block at a time; read in a thread of its own."""
    memory = BlockMemory()

    def blocks() -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype in dtypes.items():
            shape = held.shape(name)
            for start, stop in row_blocks(shape[0], row_bytes_of(shape, torch.float32), block_bytes):
                yield name, memory.read(held, name, start, stop, dtype)

    found = {name: hashlib.sha256(digest_head(dtype, held.shape(name))) for name, dtype in dtypes.items()}
    for name, rows in ahead(blocks()):
        found[name].update(bytes_of(rows))
    return {name: digest.hexdigest() for name, digest in found.items()}


def digest_head(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    return f"{dtype}{tuple(shape)}".encode()


def row_bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    width = dtype.itemsize
    for side in shape[1:]:
        width *= side
    return width
