"""Conversations and samples: what every reader hands over, and how both lie on disk.

A `Conversation` keeps all that was said, thought and planned, seen from nowhere: it is what synthesis works on. A
`Sample` is one reply as one character came to it: HER's single-turn row, what training reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from her_nemo.config.errors import UserError
from her_nemo.roleplay.prompt import Message

BATCH = 512  # rows held in memory while writing


@dataclass(frozen=True)
class ConversationTurn:
    """One message: `text` in HER's tags, without `Name: ` and without a plan, which stands in `plan`."""

    speaker: str
    text: str
    plan: str | None = None
    defects: tuple[str, ...] = ()  # what was wrong with the message as it was read


@dataclass(frozen=True)
class Character:
    """Someone in the conversation. `key`: one of its key characters, who are the ones trained on."""

    name: str
    profile: str = ""
    motivation: str = ""
    key: bool = True


@dataclass(frozen=True)
class Conversation:
    """One conversation of a book. `plot_index` and `conversation_index` are CoSER's i_p and i_c."""

    conversation_id: str
    source: str
    book: str
    plot_index: int | None
    conversation_index: int | None
    scenario: str
    topic: str
    background: str
    characters: tuple[Character, ...]
    turns: tuple[ConversationTurn, ...]
    split: str | None = None
    chapter: str = ""
    source_text: str = ""  # the passage of the book
    held_out: bool = False  # the source itself says that it is for testing

    @property
    def speakers(self) -> tuple[str, ...]:
        """Who speaks, in order of appearance."""
        return tuple(dict.fromkeys(turn.speaker for turn in self.turns))

    def to_row(self) -> dict[str, Any]:
        """Plain data for JSON or Parquet."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Conversation:
        """A row of conversations.parquet, or of the same as JSON lines.

        Raises:
            KeyError, TypeError: if it is not such a row.
        """
        known = {key: row[key] for key in cls.__dataclass_fields__ if key in row}
        known["characters"] = tuple(Character(**character) for character in row["characters"])
        known["turns"] = tuple(
            ConversationTurn(**{**turn, "defects": tuple(turn.get("defects") or ())}) for turn in row["turns"]
        )
        return cls(**known)


@dataclass(frozen=True)
class Sample:
    """One reply to train on: `messages` ends with it, plan included; its history is what the character saw."""

    trace_id: str
    original_trace_id: str  # the conversation and the character
    turn_index: int  # which of the character's turns, from 0
    history_turns: int  # assistant messages before it
    messages: tuple[Message, ...]
    character: str
    book: str
    conversation_id: str
    source: str
    has_plan: bool
    defects: tuple[str, ...] = ()
    split: str | None = None

    def to_row(self) -> dict[str, Any]:
        """Plain data for JSON or Parquet."""
        return asdict(self)


@dataclass(frozen=True)
class Pair:
    """A preference pair: two replies to one prompt, `messages`, which ends with a user message."""

    trace_id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    conversation_id: str
    split: str | None = None

    def to_row(self) -> dict[str, Any]:
        """Plain data for JSON or Parquet."""
        return asdict(self)


# ---------------------------------------------------------------- schemas

_TEXT, _INDEX = pa.string(), pa.int32()
_MESSAGES = pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))
_DEFECTS = pa.list_(_TEXT)

CONVERSATION_SCHEMA = pa.schema(
    [
        ("conversation_id", _TEXT),
        ("source", _TEXT),
        ("book", _TEXT),
        ("plot_index", _INDEX),
        ("conversation_index", _INDEX),
        ("scenario", _TEXT),
        ("topic", _TEXT),
        ("background", _TEXT),
        (
            "characters",
            pa.list_(pa.struct([("name", _TEXT), ("profile", _TEXT), ("motivation", _TEXT), ("key", pa.bool_())])),
        ),
        (
            "turns",
            pa.list_(pa.struct([("speaker", _TEXT), ("text", _TEXT), ("plan", _TEXT), ("defects", _DEFECTS)])),
        ),
        ("split", _TEXT),
        ("chapter", _TEXT),
        ("source_text", _TEXT),
        ("held_out", pa.bool_()),
    ]
)
SAMPLE_SCHEMA = pa.schema(
    [
        ("trace_id", _TEXT),
        ("original_trace_id", _TEXT),
        ("turn_index", _INDEX),
        ("history_turns", _INDEX),
        ("messages", _MESSAGES),
        ("character", _TEXT),
        ("book", _TEXT),
        ("conversation_id", _TEXT),
        ("source", _TEXT),
        ("has_plan", pa.bool_()),
        ("defects", _DEFECTS),
        ("split", _TEXT),
    ]
)
PROMPT_SCHEMA = pa.schema([*SAMPLE_SCHEMA, ("reference", _TEXT)])
PAIR_SCHEMA = pa.schema(
    [
        ("trace_id", _TEXT),
        ("messages", _MESSAGES),
        ("chosen", _TEXT),
        ("rejected", _TEXT),
        ("source", _TEXT),
        ("conversation_id", _TEXT),
        ("split", _TEXT),
    ]
)


class ParquetFile:
    """Rows written to one Parquet file in batches; closed by `parquet_files`."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self.rows = path, schema, 0
        self._waiting: list[dict[str, Any]] = []
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def add(self, row: Mapping[str, Any]) -> None:
        self._waiting.append(dict(row))
        self.rows += 1
        if len(self._waiting) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=self.schema))
        self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()


@contextmanager
def parquet_file(path: Path, schema: pa.Schema) -> Iterator[ParquetFile]:
    """A Parquet file to add rows to."""
    file = ParquetFile(path, schema)
    try:
        yield file
    finally:
        file.close()


def read_parquet(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a batch at a time.

    Raises:
        UserError: if there is no such file, or it is not Parquet.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read Parquet file {path}: {str(error).splitlines()[0]}") from error


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> int:
    """Write conversations.parquet (or JSON lines, by the suffix); returns how many."""
    path, count = Path(path), 0
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            for conversation in conversations:
                file.write(json.dumps(conversation.to_row(), ensure_ascii=False) + "\n")
                count += 1
        return count
    with parquet_file(path, CONVERSATION_SCHEMA) as file:
        for conversation in conversations:
            file.add(conversation.to_row())
        return file.rows


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """The conversations of a Parquet or JSON-lines file, or of a directory that ingest wrote.

    Raises:
        UserError: if it cannot be read, or a row is not a conversation; names file and row.
    """
    path = Path(path)
    if path.is_dir():
        path /= "conversations.parquet"
    rows = _json_lines(path) if path.suffix in (".jsonl", ".json") else read_parquet(path)
    for number, row in enumerate(rows, start=1):
        try:
            yield Conversation.from_row(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}:{number}: not a conversation ({type(error).__name__}: {error}); her-nemo data ingest "
                "writes conversations.parquet, and docs/data.md has its columns"
            ) from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}:{number}: not JSON: {error}") from error
