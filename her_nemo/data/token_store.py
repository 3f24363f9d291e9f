"""The files of a token cache entry: parts while it is being made, flat memory-mapped arrays when it is whole.

`tokens.npy` and `kinds.npy` hold all samples end to end; row i of `index.npy` says where sample i begins, and one
row more says where the last one ends. `meta.json` is written last: without it there is no entry.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, overload

import numpy as np
from numpy.typing import NDArray

from her_nemo.config.errors import UserError
from her_nemo.data.sources import MalformedReport, RowKind
from her_nemo.data.tokenise import Encoded, EncodeReport, Prompt, Sample

META = "meta.json"
ARRAYS = ("tokens", "kinds", "index", "traces")
# Columns of index.npy.
TOKEN_START, TRACE_START, PROMPT_LENGTH, TURNS_DROPPED = range(4)


class TokenStore(Sequence[Encoded], Generic[Encoded]):
    """The samples of one entry, in the order of their file, read from disk as they are asked for.

    An item is what `encode_sample` (kind sft), `encode_pair` (pairs: a tuple) or `encode_prompt` (prompts) gave.
    """

    def __init__(self, directory: Path, path: str) -> None:
        """Opens the entry that was made from the data file `path` or from another file of the same bytes.

        Raises:
            UserError: if the entry is not there, or its files are not those that were written.
        """
        self.directory = directory
        try:
            meta = json.loads((directory / META).read_text(encoding="utf-8"))
            sizes = {name: (directory / f"{name}.npy").stat().st_size for name in ARRAYS}
        except OSError as error:
            raise UserError(
                f"cannot read token cache {directory}: {error.strerror or error}. model.data.cache_dir must be on a "
                "file system that every process sees."
            ) from error
        if sizes != meta["sizes"]:
            raise UserError(f"token cache {directory} is damaged (sizes of its files): delete it and run again")
        self.kind: RowKind = meta["kind"]
        self.report = EncodeReport(**{**meta["report"], "dropped": Counter(meta["report"]["dropped"])})
        self.malformed = malformed_from(meta["malformed"], Path(path))
        # Plain arrays over the mapped file: slicing a np.memmap itself is slow.
        self._tokens, self._kinds, self._index, self._traces = (
            np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r")) for name in ARRAYS
        )
        self._per_item = 2 if self.kind == "pairs" else 1

    def __len__(self) -> int:
        return (len(self._index) - 1) // self._per_item

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample; of a pair, chosen and rejected one after the other."""
        return np.diff(self._index[:, TOKEN_START])

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        first = int(index) % len(self) * self._per_item
        items = [self._one(row) for row in range(first, first + self._per_item)]
        return items[0] if self._per_item == 1 else tuple(items)  # type: ignore[return-value]

    def _one(self, row: int) -> Sample | Prompt:
        (start, trace, prompt_length, dropped), (stop, trace_stop, *_) = self._index[row : row + 2].tolist()
        trace_id = self._traces[trace:trace_stop].tobytes().decode("utf-8")
        tokens = self._tokens[start:stop]
        if self.kind == "prompts":
            return Prompt(trace_id, tokens, dropped)
        return Sample(trace_id, tokens, prompt_length, self._kinds[start:stop], dropped)


def write_part(
    file: Path, items: Sequence[Any], report: EncodeReport, malformed: MalformedReport
) -> None:
    """The encoded rows of one span and what was lost, as one file that is whole or not there."""
    flat: list[Sample | Prompt] = []
    for item in items:
        flat += item if isinstance(item, tuple) else (item,)
    traces = [item.trace_id.encode("utf-8") for item in flat]
    kinds = [item.kinds if isinstance(item, Sample) else np.zeros(len(item), dtype=np.int8) for item in flat]
    prompts = [item.prompt_length if isinstance(item, Sample) else len(item) for item in flat]
    counts = [
        [len(item), len(trace), prompt, item.turns_dropped]
        for item, trace, prompt in zip(flat, traces, prompts, strict=True)
    ]
    lost = {"report": vars(report), "malformed": _malformed_dict(malformed)}
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as out:
        np.savez(
            out,
            tokens=np.concatenate([np.zeros(0, dtype=np.int32), *(item.token_ids for item in flat)]),
            kinds=np.concatenate([np.zeros(0, dtype=np.int8), *kinds]),
            counts=np.array(counts, dtype=np.int64).reshape(-1, 4),
            traces=np.frombuffer(b"".join(traces), dtype=np.uint8),
            lost=np.frombuffer(json.dumps(lost).encode(), dtype=np.uint8),
        )
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


def merge_parts(
    directory: Path, parts: Sequence[Path], path: Path, kind: RowKind, about: dict[str, Any]
) -> None:
    """Write the arrays and then `meta.json` of an entry, from its parts in the order of the file.

    Raises:
        UserError: if no row was kept and no line was bad: there is nothing to train on.
    """
    report, malformed = EncodeReport(), MalformedReport(path)
    counts: list[NDArray[np.int64]] = [np.zeros((0, 4), dtype=np.int64)]
    sizes = {"tokens": 0, "kinds": 0, "traces": 0}
    for file in parts:
        with np.load(file) as part:
            lost = json.loads(part["lost"].tobytes())
            report.add(EncodeReport(**{**lost["report"], "dropped": Counter(lost["report"]["dropped"])}))
            malformed.add(malformed_from(lost["malformed"], path))
            counts.append(part["counts"])
    table = np.concatenate(counts)
    index = np.zeros((len(table) + 1, 4), dtype=np.int64)
    np.cumsum(table[:, :2], axis=0, out=index[1:, :2])
    index[:-1, 2:] = table[:, 2:]
    sizes = {"tokens": index[-1, TOKEN_START], "kinds": index[-1, TOKEN_START], "traces": index[-1, TRACE_START]}
    _write_array(directory / "index.npy", [index], index.shape, index.dtype)
    for name, dtype in (("tokens", np.int32), ("kinds", np.int8), ("traces", np.uint8)):
        _write_array(directory / f"{name}.npy", _each(parts, name), (int(sizes[name]),), np.dtype(dtype))
    meta = {
        "kind": kind,
        "samples": len(table),
        "tokens": int(sizes["tokens"]),
        "sizes": {name: (directory / f"{name}.npy").stat().st_size for name in ARRAYS},
        "report": vars(report),
        "malformed": _malformed_dict(malformed),
        "made_from": about,
    }
    temporary = directory / f"{META}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(directory / META)


def _each(parts: Sequence[Path], name: str) -> Any:
    for file in parts:
        with np.load(file) as part:
            yield part[name]


def _write_array(file: Path, pieces: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """`np.save` of pieces that are not all in memory at once."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as out:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for piece in pieces:
            out.write(np.ascontiguousarray(piece).tobytes())
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


def _malformed_dict(report: MalformedReport) -> dict[str, Any]:
    prefix = str(report.path)
    return {
        "lines": report.lines,
        "kinds": dict(report.kinds),
        # Without the path: the same bytes may lie elsewhere next time.
        "problems": [problem.removeprefix(prefix) for problem in report.problems],
    }


def malformed_from(stored: dict[str, Any], path: Path) -> MalformedReport:
    """A stored report, speaking of the file `path`."""
    problems = [f"{path}{problem}" for problem in stored["problems"]]
    return MalformedReport(path, stored["lines"], Counter(stored["kinds"]), problems)
