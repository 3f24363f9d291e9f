"""Raw rows of files and datasets, each with its place, so that a bad one can be named by file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.planning.data_checks import DATA_SUFFIXES, is_dataset_name

Pointer = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where something stands: a file, its line (JSON lines) and the way down into the JSON value."""

    file: str
    line: int | None = None
    pointer: Pointer = ()

    def down(self, *steps: str | int) -> Place:
        """A place inside this one."""
        return Place(self.file, self.line, (*self.pointer, *steps))

    @property
    def where(self) -> str:
        """The way down as it is written in code: plots[3].conversation[0]."""
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.pointer)
        return text.removeprefix(".")

    @property
    def row_name(self) -> str:
        """A name for a row that brings none: the file's and the row's number, from 0."""
        number = self.pointer[-1] if self.pointer else (self.line or 1) - 1
        return f"{Path(self.file).stem}_{number}"

    def line_number(self) -> int | None:
        """The line; in a JSON document, of the value's first character (the file is read again for it)."""
        if self.line is not None or not self.file.endswith(".json"):
            return self.line
        text = _text_of(self.file)
        return text.count("\n", 0, _offset(text, self.pointer)) + 1


@dataclass(frozen=True)
class RawRow:
    """One JSON value as it was read."""

    place: Place
    value: Any


class Malformed(Exception):
    """Raised by readers inside one item: its kind (what is counted) and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Rejected:
    """Something that cannot be used: what and why. `turns`: how many turns are lost with it."""

    place: Place
    kind: str
    message: str
    turns: int
    value: Any

    @classmethod
    def of(cls, place: Place, problem: Malformed, turns: int, value: Any) -> Rejected:
        """What a reader stumbled over."""
        return cls(place, problem.kind, str(problem), turns, value)


def raw_rows(path: str, config: str | None = None, split: str | None = None) -> Iterator[RawRow | Rejected]:
    """The rows of a file, of a directory's files, or of a dataset that `datasets` knows by name.

    Args:
        path: .json (a list is cut into its items), .jsonl, .parquet or .arrow; a directory of such files or one that
            `Dataset.save_to_disk` wrote; or a name for `datasets.load_dataset`.
        config, split: of a named dataset; no split takes all of them, one after the other.

    Raises:
        UserError: if nothing is there, or it cannot be read at all.
    """
    place = Path(path)
    if place.is_file():
        yield from _file_rows(place)
    elif place.is_dir():
        yield from _directory_rows(place)
    elif is_dataset_name(path):
        yield from _dataset_rows(_named_dataset(path, config, split), path)
    else:
        raise UserError(f"{path}: no such file or directory")


def data_files(folder: Path) -> list[Path]:
    """The data files of a directory, in order of their names."""
    return sorted(file for file in folder.iterdir() if file.suffix in DATA_SUFFIXES and file.is_file())


def _directory_rows(folder: Path) -> Iterator[RawRow | Rejected]:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _dataset_rows(_saved_dataset(folder), str(folder))
        return
    files = data_files(folder)
    if not files:
        raise UserError(f"{folder}: no data files here ({', '.join(DATA_SUFFIXES)})")
    for file in files:
        yield from _file_rows(file)


def _file_rows(file: Path) -> Iterator[RawRow | Rejected]:
    if file.suffix in (".parquet", ".arrow"):
        yield from _table_rows(file)
    elif _is_one_document(file):
        yield from _document_rows(file)
    else:
        yield from _line_rows(file)


def _is_one_document(file: Path) -> bool:
    """Whether the file is one JSON value. Some people call JSON lines .json: the second line tells."""
    if file.suffix == ".jsonl":
        return False
    try:
        with file.open(encoding="utf-8-sig") as lines:
            head = [line for line in islice(lines, 50) if line.strip()][:2]
    except UnicodeDecodeError:
        return True
    except OSError as error:
        raise _unreadable(file, error) from error
    return not (len(head) == 2 and all(_whole_object(line) for line in head))


def _whole_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {file}: {error.strerror or error}")


def _line_rows(file: Path) -> Iterator[RawRow | Rejected]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, Place(str(file), number))
    except OSError as error:
        raise _unreadable(file, error) from error


def _parse(data: bytes, place: Place) -> RawRow | Rejected:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        shown = data.decode("utf-8", errors="replace")
        return Rejected(place, "bad_encoding", f"not UTF-8 at byte {error.start}", 0, shown)
    try:
        return RawRow(place, json.loads(text))
    except json.JSONDecodeError as error:
        return Rejected(place, "invalid_json", f"not JSON: {error.msg} at column {error.colno}", 0, text)
    except RecursionError:
        return Rejected(place, "invalid_json", "not JSON: nested too deeply", 0, text)


def _document_rows(file: Path) -> Iterator[RawRow | Rejected]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error
    place = Place(str(file))
    parsed = _parse(data, place)
    if isinstance(parsed, Rejected):
        # Nothing of the document can be used, and to keep all of it in the side file would only bury the rest.
        yield Rejected(Place(str(file), _broken_line(data)), parsed.kind, parsed.message, 0, None)
    elif isinstance(parsed.value, list):
        yield from (RawRow(place.down(index), item) for index, item in enumerate(parsed.value))
    else:
        yield parsed


def _broken_line(data: bytes) -> int:
    try:
        json.loads(data)
    except json.JSONDecodeError as error:
        return error.lineno
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start) + 1
    except RecursionError:
        pass  # no line to name: the whole document is nested too deeply
    return 1


# ---------------------------------------------------------------- Arrow tables and named datasets


def _table_rows(file: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as table:
                yield from _batch_rows(table.iter_batches(batch_size=512), str(file))
        else:
            with pa.memory_map(str(file)) as mapped:
                yield from _batch_rows(pa.ipc.open_stream(mapped), str(file))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _batch_rows(batches: Iterator[Any], name: str) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield RawRow(Place(name, number), _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct every key: a key that the row did not have comes back as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _dataset_rows(dataset: Any, name: str) -> Iterator[RawRow]:
    parts = dataset.items() if hasattr(dataset, "items") else [(None, dataset)]
    for split, part in parts:
        label = f"{name}[{split}]" if split else name
        for number, value in enumerate(part, start=1):
            yield RawRow(Place(label, number), _without_nulls(value))


def _saved_dataset(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the dataset in {folder}: {_first_line(error)}") from error


def _named_dataset(name: str, config: str | None, split: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        offline = datasets.config.HF_HUB_OFFLINE
        hint = (
            "HF_HUB_OFFLINE is set, so only datasets in the local cache can be read: unset it, or give a file"
            if offline
            else "check the name, dataset_config and dataset_split, or give a file"
        )
        raise UserError(
            f"cannot load the dataset {name!r}"
            + (f" (config {config!r})" if config else "")
            + f": {_first_line(error)}. There is no file or directory of that name either. {hint}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


# ---------------------------------------------------------------- lines of a JSON document

_BLANKS = re.compile(r"[ \t\r\n]*")


@lru_cache(maxsize=1)
def _text_of(file: str) -> str:
    return Path(file).read_text(encoding="utf-8-sig")


def _offset(text: str, pointer: Pointer) -> int:
    """Where the value that `pointer` leads to begins; of the last value on the way that there is."""
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        found = _BLANKS.match(text, at)
        return found.end() if found else at

    at = skip(0)
    for step in pointer:
        start, index = skip(at + 1), 0
        while text[start] not in "]}":
            key: str | int = index
            if text[at] == "{":
                key, start = decoder.raw_decode(text, start)
                start = skip(skip(start) + 1)  # past the colon
            if key == step:
                break
            _, end = decoder.raw_decode(text, start)
            start = skip(end)
            start = skip(start + 1) if text[start] == "," else start
            index += 1
        if text[start] in "]}":
            return at
        at = start
    return at
