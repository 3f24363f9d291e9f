"""megatron-core's torch_dist checkpoints, read and written in rows without building a model.

The format is torch.distributed.checkpoint's: data files of `torch.save` archives one after another, and `.metadata`,
a pickled index of which rows of which tensor lie where. What is written here loads through megatron-core at any
layout; what megatron-core wrote is read here a few rows at a time. Nothing is unpickled freely.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from her_nemo.config.errors import UserError
from her_nemo.megatron.direct_file import DirectFile, Slabs
from her_nemo.megatron.safetensors_files import read_into

_UNREADABLE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
)
INDEX, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"


class Digest(Protocol):
    """A hash that may be computed in another thread until `wait` returns."""

    def update(self, content: memoryview) -> None: ...

    def wait(self) -> None: ...


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor and where its archive lies."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Chunk:
        return cls(**body | {"offsets": tuple(body["offsets"]), "sizes": tuple(body["sizes"])})


# ---------------------------------------------------------------- reading


class TorchDist:
    """The tensors of a torch_dist checkpoint by key: dtypes, shapes, rows. Not thread-safe."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = read_index(directory / INDEX)
        self._chunks: dict[str, list[Chunk]] = {}
        self._tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for key, tensor in index.state_dict_metadata.items():
            if isinstance(tensor, TensorStorageMetadata):
                self._tensors[key] = (tensor.properties.dtype, tuple(tensor.size))
                self._chunks[key] = [self._chunk(index, key, chunk) for chunk in tensor.chunks]
        self._descriptors: dict[str, int] = {}
        self._data: dict[Chunk, int] = {}
        self._scratch = Slabs(1)

    def _chunk(self, index: Metadata, key: str, chunk: ChunkStorageMetadata) -> Chunk:
        place = index.storage_data.get(MetadataIndex(key, chunk.offsets))
        if place is None or place.transform_descriptors:
            raise UserError(f"{self.directory / INDEX}: {key}{tuple(chunk.offsets)} lies nowhere that can be read")
        if Path(place.relative_path).name != place.relative_path:
            raise UserError(f"{self.directory / INDEX}: names a file outside the checkpoint: {place.relative_path}")
        return Chunk(key, tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length)

    def keys(self) -> set[str]:
        """Names of all tensors, the optimizer's included."""
        return set(self._tensors)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key][0]

    def shape(self, key: str) -> tuple[int, ...]:
        """The whole shape, with the axis of layers if the key has one."""
        return self._tensors[key][1]

    def rows(
        self, key: str, layer: int | None, start: int, stop: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows [start, stop) of a tensor (of one layer of it), in the checkpoint's dtype; into `out` (contiguous).

        UserError if the chunks do not cover them.
        """
        dtype, size = self._tensors[key]
        lead = () if layer is None else (layer,)
        inner = size[len(lead) :]
        found = torch.empty((stop - start, *inner[1:]), dtype=dtype) if out is None else out
        covered = 0
        for chunk in self._chunks[key]:
            if lead and not chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]:
                continue
            covered += self._copy(chunk, layer, start, stop, found)
        if covered != found.numel():
            raise UserError(f"{self.directory}: {key}: {covered} of {found.numel()} numbers are there")
        return found

    def _copy(self, chunk: Chunk, layer: int | None, start: int, stop: int, found: torch.Tensor) -> int:
        """Copy what a chunk has of rows [start, stop) to its place in `found`; how many numbers."""
        skip = 0 if layer is None else 1
        offsets, sizes = chunk.offsets[skip:], chunk.sizes[skip:]
        first, last = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
        if first >= last:
            return 0
        row = sizes[0] * (0 if layer is None else layer - chunk.offsets[0]) + first - offsets[0]
        width = 1
        for side in sizes[1:]:
            width *= side
        place = self._data_offset(chunk) + row * width * found.element_size()
        target = found[first - start : last - start]
        for axis, (offset, side) in enumerate(zip(offsets[1:], sizes[1:], strict=True), start=1):
            target = target.narrow(axis, offset, side)
        what = f"{self.directory / chunk.file}: {chunk.key}"
        if target.is_contiguous():
            read_into(self._descriptor(chunk.file), target, place, what)
        else:
            part = self._scratch.take(target.shape, target.dtype)
            read_into(self._descriptor(chunk.file), part, place, what)
            target.copy_(part)
        return target.numel()

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(self.directory / file, os.O_RDONLY)
            except FileNotFoundError:
                raise UserError(f"{self.directory / file} does not exist: the checkpoint is incomplete") from None
        return self._descriptors[file]

    def _data_offset(self, chunk: Chunk) -> int:
        """Where in its file the bytes of a chunk begin, checked to be the plain tensor the index says."""
        if chunk not in self._data:
            dtype = self._tensors[chunk.key][0]
            window = _Window(self._descriptor(chunk.file), chunk.start, chunk.length)
            try:
                self._data[chunk] = chunk.start + _locate(window, dtype, chunk.sizes)
            except _UNREADABLE as error:
                raise UserError(f"{self.directory / chunk.file}: {chunk.key} cannot be read: {error}") from None
        return self._data[chunk]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles the description of one plain tensor in a `torch.save` archive, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return lambda *parts: parts
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage") and hasattr(torch, name):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _locate(window: _Window, dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
    """Offset of the tensor's bytes in an archive. ValueError if it is not a plain tensor of that dtype and shape."""
    with zipfile.ZipFile(io.BufferedReader(window)) as archive:
        members = {name.split("/", 1)[1]: info for name, info in archive.NameToInfo.items() if "/" in name}
        parts = _TensorUnpickler(io.BytesIO(archive.read(members["data.pkl"]))).load()
        # A parameter wraps its tensor, whose first part is the storage, itself a tuple.
        if isinstance(parts[0][0], tuple):
            parts = parts[0]
        (_, storage, name, _, _), skipped, shape, strides = parts[:4]
        info = members[f"data/{name}"]
    plain, step = [], 1
    for side in reversed(sizes):
        plain.append(step)
        step *= side
    relevant = [(a, b) for a, b, side in zip(strides, reversed(plain), sizes, strict=True) if side > 1]
    if storage.dtype != dtype or tuple(shape) != sizes or any(a != b for a, b in relevant):
        raise ValueError(f"it holds {storage.dtype} {tuple(shape)} with strides {tuple(strides)}")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its archive is compressed")
    window.seek(info.header_offset + 26)
    lengths = window.read(4)
    name_length, extra_length = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return info.header_offset + 30 + name_length + extra_length + skipped * dtype.itemsize


# ---------------------------------------------------------------- writing


class DataFileWriter:
    """One data file: `torch.save` archives one after another. `digest` sees every byte, beside the writing."""

    def __init__(self, path: Path, digest: Digest) -> None:
        self.path = path
        self._digest = digest
        self._file = DirectFile(path)
        self.chunks: list[Chunk] = []

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.size

    def write(self, content: bytes | memoryview) -> int:
        """A file's `write`, for torch.save."""
        view = memoryview(content).cast("B")
        self._digest.update(view)
        self._file.write(view)
        self._digest.wait()
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered; torch.save asks."""

    def add(self, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Append the rectangle of `key` that begins at `offsets`."""
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            raise ValueError(f"{key}: a view of a larger storage, all of which would be written")
        start = self.size
        torch.save(tensor, self)
        self.chunks.append(
            Chunk(key, offsets, tuple(tensor.shape), self.path.name, start, self.size - start)
        )

    def finish(self) -> None:
        """Everything on the disk, and the file closed."""
        self._file.finish()


def write_index(
    directory: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, chunks: Iterable[Chunk]
) -> None:
    """`.metadata` and the two small files that make data files a checkpoint that megatron-core loads."""
    by_key: dict[str, list[Chunk]] = {key: [] for key in shapes}
    for chunk in chunks:
        by_key[chunk.key].append(chunk)
    tensors, storage = {}, {}
    for key, own in by_key.items():
        own.sort(key=lambda chunk: chunk.offsets)
        tensors[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(shapes[key]),
            chunks=[ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in own],
        )
        for chunk in own:
            place = MetadataIndex(key, torch.Size(chunk.offsets))
            storage[place] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    index = Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())
    torch.save({}, directory / COMMON)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    (directory / BACKEND).write_text(json.dumps(backend))
    with (directory / INDEX).open("wb") as stream:
        pickle.dump(index, stream)
        stream.flush()
        os.fsync(stream.fileno())


# ---------------------------------------------------------------- no free unpickling

_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = frozenset(
    (module, name)
    for module, names in {
        _CHECKPOINT + "metadata": (
            "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
            "TensorProperties StorageMeta _MEM_FORMAT_ENCODING"
        ),
        _CHECKPOINT + "planner": "SavePlan WriteItem WriteItemType TensorWriteData",
        _CHECKPOINT + "filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
        "torch": "Size",
        "collections": "OrderedDict",
        # Where the checkpoint was written; remembered, not opened.
        "pathlib": "PosixPath PurePosixPath",
    }.items()
    for name in names.split()
)


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles nothing but the plain records of torch's checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise UserError(f"the checkpoint's .metadata names {module}.{name}, which no checkpoint needs: not loaded")
        return super().find_class(module, name)


def read_index(file: Path) -> Metadata:
    """The `.metadata` index of a checkpoint. UserError if it is anything but an index."""
    if not file.is_file():
        raise UserError(f"{file} does not exist: the checkpoint is incomplete")
    with file.open("rb") as stream:
        try:
            found = _IndexUnpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise UserError(f"{file} cannot be read as a checkpoint index: {error}") from None
    if not isinstance(found, Metadata):
        raise UserError(f"{file} cannot be read as a checkpoint index: it holds a {type(found).__name__}")
    return found
