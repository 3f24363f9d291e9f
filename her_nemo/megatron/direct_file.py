"""Large files written past the page cache, and memory that is used again: what copying weights costs otherwise.

Bytes that nobody reads again soon gain nothing from the page cache, and pay for it with a page allocation each; and
fresh memory for every block pays as much once more. See docs/cards/convert.md for the figures.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

# What direct writes want memory, offset and length to be a multiple of; no disk wants more.
ALIGNMENT = 4096
STAGED_BYTES = 8 * 2**20
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new file, written from its beginning to its end with O_DIRECT where the file system has it.

    A write anywhere else than at the end turns the rest of the file to ordinary writes: slower, equally right.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o644)
            self.direct = bool(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o644)
            self.direct = False
        self._staged = memoryview(mmap.mmap(-1, STAGED_BYTES))
        self._filled = 0
        self._written = 0
        self.size = 0
        """Bytes of the file, so far."""

    @property
    def position(self) -> int:
        """Where the next write in order goes."""
        return self._written + self._filled

    def write(self, content: memoryview | bytes) -> None:
        """Append."""
        view, done = memoryview(content).cast("B"), 0
        while done < len(view):
            count = min(len(view) - done, STAGED_BYTES - self._filled)
            self._staged[self._filled : self._filled + count] = view[done : done + count]
            self._filled += count
            done += count
            if self._filled == STAGED_BYTES:
                self._flush(STAGED_BYTES)
        self.size = max(self.size, self.position)

    def write_at(self, offset: int, content: memoryview | bytes) -> None:
        """Write anywhere."""
        if offset == self.position:
            self.write(content)
            return
        self._buffered()
        self._flush(self._filled)
        self._write_all(memoryview(content).cast("B"), offset)
        self.size = max(self.size, offset + len(content))

    def finish(self) -> None:
        """Everything on the disk, and the file closed."""
        padding = -self._filled % ALIGNMENT if self.direct else 0
        self._staged[self._filled : self._filled + padding] = bytes(padding)
        self._flush(self._filled + padding)
        os.ftruncate(self._descriptor, self.size)
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._staged.release()

    def _flush(self, count: int) -> None:
        self._write_all(self._staged[:count], self._written)
        self._written += count
        self._filled = 0

    def _write_all(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._descriptor, view[done:], offset + done)
            except OSError as error:
                # Some file systems take O_DIRECT when opening and refuse it when writing.
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._buffered()

    def _buffered(self) -> None:
        if self.direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self.direct = False


class Slabs:
    """Memory for blocks that are made one after another, in a ring: the `count`-th last one is overwritten."""

    def __init__(self, count: int) -> None:
        self._slabs = [bytearray() for _ in range(count)]
        self._next = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of any content, whose storage is no larger than it: torch.save writes storages whole."""
        size = math.prod(shape) * dtype.itemsize
        index, self._next = self._next, (self._next + 1) % len(self._slabs)
        if len(self._slabs[index]) < size:
            self._slabs[index] = bytearray(size)
        return torch.frombuffer(self._slabs[index], dtype=dtype, count=math.prod(shape)).view(*shape)
