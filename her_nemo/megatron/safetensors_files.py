"""Hugging Face's safetensors files, read and written in rows: memory is bounded by a block, whatever the model.

Plain positioned reads, and writes past the page cache. No memory map: mapped pages would count as our memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from her_nemo.config.errors import UserError
from her_nemo.megatron.direct_file import DirectFile

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IGNORED = re.compile(r".*rotary_emb\.inv_freq$")
_MAX_HEADER = 100_000_000
_ALIGNMENT = 8


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_into(descriptor: int, target: torch.Tensor, offset: int, what: str) -> None:
    """Fill a contiguous CPU tensor from a file at a byte offset. UserError if the file is too short."""
    view, done = bytes_of(target), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise UserError(f"{what}: the file ends {len(view) - done} bytes too early")
        done += count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"names {', '.join(twice)} twice")
    return dict(pairs)


class TensorFile:
    """One safetensors file: names, dtypes, shapes, and rows of each tensor. Thread-safe; keeps one descriptor open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self.tensors: dict[str, tuple[torch.dtype | str, tuple[int, ...], int]] = {}
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            os.close(self._descriptor)
            raise UserError(f"{path}: not a whole safetensors file: {error}") from None

    def _read_header(self) -> None:
        size = os.fstat(self._descriptor).st_size
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"its header claims {length} bytes of a file of {size}")
        header = json.loads(os.pread(self._descriptor, length, 8), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        start, expected = 8 + length, 0
        for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = facts["data_offsets"]
            shape = tuple(int(side) for side in facts["shape"])
            dtype = DTYPES.get(facts["dtype"], facts["dtype"])
            if begin != expected or end < begin:
                raise ValueError(f"{name} starts at byte {begin}, the tensor before it ends at {expected}")
            if isinstance(dtype, torch.dtype) and end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: {end - begin} bytes are not {shape} of {facts['dtype']}")
            expected = end
            self.tensors[name] = (dtype, shape, start + begin)
        if start + expected != size:
            raise ValueError(f"its header describes {start + expected} bytes, the file has {size}")

    def rows(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in the file's dtype (elements, if it has one dimension); into `out`."""
        dtype, shape, offset = self.tensors[name]
        found = torch.empty((stop - start, *shape[1:]), dtype=dtype) if out is None else out
        if found.dtype != dtype:
            raise ValueError(f"{name} is {dtype}, the memory given is {found.dtype}")
        width = math.prod(shape[1:]) * found.element_size()
        read_into(self._descriptor, found, offset + start * width, f"{self.path}: {name}")
        return found

    def close(self) -> None:
        os.close(self._descriptor)


class HfTensors:
    """The tensors of a Hugging Face directory, one file or several, read lazily in rows.

    `problems` holds what is wrong with the files themselves: nothing of it stops the opening, so that it can be
    named together with everything else.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.problems: list[str] = []
        index = directory / INDEX_FILE
        listed: dict[str, str] = {}
        if index.is_file():
            listed = self._read_index(index)
            files = sorted({directory / name for name in listed.values()})
        else:
            files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory} holds no .safetensors file (pickled weights are not read)")
        self._where: dict[str, TensorFile] = {}
        self._files: list[TensorFile] = []
        self._unread: set[str] = set()
        for path in files:
            self._open(path)
        self._compare(listed)

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            listed = json.loads(index.read_text(), object_pairs_hook=_unique)["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{index}: cannot be read: {error}") from None
        outside = sorted({name for name in listed.values() if "/" in name or name.startswith(".")})
        if outside:
            raise UserError(f"{index}: names files outside the directory: {', '.join(outside)}")
        return listed

    def _open(self, path: Path) -> None:
        if not path.is_file():
            self._unread.add(path.name)
            self.problems.append(f"missing file: {path.name}, which {INDEX_FILE} names")
            return
        try:
            file = TensorFile(path)
        except UserError as error:
            self._unread.add(path.name)
            self.problems.append(str(error))
            return
        self._files.append(file)
        for name in file.tensors:
            if name in self._where:
                self.problems.append(f"duplicate: {name} in {self._where[name].path.name} and in {path.name}")
            self._where.setdefault(name, file)

    def _compare(self, listed: dict[str, str]) -> None:
        """The index and the files must say the same."""
        for name, file in listed.items():
            held = self._where.get(name)
            elsewhere = held is None or held.path.name != file
            if elsewhere and file not in self._unread:
                self.problems.append(f"{INDEX_FILE} puts {name} into {file}, which does not hold it")
        if listed:
            extra = sorted(name for name in self._where if name not in listed)
            for name in extra:
                self.problems.append(f"{self._where[name].path.name} holds {name}, which {INDEX_FILE} leaves out")

    def names(self) -> set[str]:
        """All tensor names but old checkpoints' rotary tables, which are computed and not weights."""
        return {name for name in self._where if not _IGNORED.match(name)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].tensors[name][1]

    def dtype(self, name: str) -> torch.dtype | str:
        """The dtype, or safetensors' name of it where torch has none that we read."""
        return self._where[name].tensors[name][0]

    def rows(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._where[name].rows(name, start, stop, out)

    def whole(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def close(self) -> None:
        for file in self._files:
            file.close()


def problems_of(
    held: HfTensors, wanted: dict[str, tuple[int, ...]], *, optional: Iterable[str] = (), ignored: Iterable[str] = ()
) -> list[str]:
    """Everything missing, unexpected, duplicate, mis-shaped, or of a dtype that holds no weights."""
    have = held.names()
    found = list(held.problems)
    found += [f"missing: {name}" for name in wanted if name not in have | set(optional)]
    found += [f"unexpected: {name}" for name in sorted(have - set(wanted) - set(ignored))]
    for name in sorted(have & set(wanted)):
        if held.shape(name) != wanted[name]:
            found.append(f"{name} has shape {held.shape(name)}, the model wants {wanted[name]}")
        if held.dtype(name) not in WEIGHT_DTYPES:
            kind = str(held.dtype(name)).removeprefix("torch.")
            found.append(f"{name} is {kind}; float32, bfloat16 and float16 are read")
    return found


class TensorFileWriter:
    """Writes one safetensors file whose tensors are known by name and shape beforehand.

    Rows may come in any order; fastest in that of the file.
    """

    def __init__(
        self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype | Mapping[str, torch.dtype]
    ) -> None:
        self.path = path
        self._shapes = shapes
        self._dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            self._offsets[name] = end
            kind = self._dtypes[name]
            size = math.prod(shape) * kind.itemsize
            header[name] = {"dtype": NAMES[kind], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        self.size = self._start + end
        self._file = DirectFile(path)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Rows from `start` of a tensor, contiguous and in the dtype it is written in."""
        dtype = self._dtypes[name]
        width = math.prod(self._shapes[name][1:]) * dtype.itemsize
        if rows.dtype != dtype or not rows.is_contiguous():
            raise ValueError(f"{name}: {rows.dtype} rows for a tensor of {dtype}")
        self._file.write_at(self._start + self._offsets[name] + start * width, bytes_of(rows))

    def finish(self) -> None:
        """Everything on the disk, and the file closed."""
        self._file.finish()


def _itemsize(itemsize: int | Mapping[str, int], name: str) -> int:
    return itemsize if isinstance(itemsize, int) else itemsize[name]


def shards(
    shapes: dict[str, tuple[int, ...]], itemsize: int | Mapping[str, int], limit: int
) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """Consecutive tensors grouped into files of at most `limit` bytes, unless one tensor is larger: (name, tensors)."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = _itemsize(itemsize, name) * math.prod(shape)
        if groups[-1] and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups)]


def index_of(
    files: list[tuple[str, dict[str, tuple[int, ...]]]], itemsize: int | Mapping[str, int]
) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    held = [pair for _, tensors in files for pair in tensors.items()]
    total = sum(_itemsize(itemsize, name) * math.prod(shape) for name, shape in held)
    weight_map = {name: file for file, tensors in files for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
