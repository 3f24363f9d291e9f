"""A conversation as data: what every reader produces and every later room starts from. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError


@dataclass(frozen=True)
class Character:
    """Someone who takes part, with what the author says of him."""

    name: str
    profile: str = ""
    motivation: str = ""
    key: bool = True


@dataclass(frozen=True)
class ConversationTurn:
    """One message: raw text in HER's tags (with or without `Name: `) and its plan, kept apart."""

    speaker: str
    text: str
    plan: str | None = None
    defects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """One conversation of a book. `source_text` is the passage it was taken from, '' when there is none."""

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
    source_text: str = ""
    held_out: bool = False

    def to_row(self) -> dict[str, Any]:
        """A row of JSON Lines."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Conversation:
        """The conversation of a row. Raises TypeError or KeyError where it is not of this shape."""
        characters = tuple(Character(**character) for character in row["characters"])
        turns = tuple(
            ConversationTurn(**{**turn, "defects": tuple(turn.get("defects") or ())}) for turn in row["turns"]
        )
        return cls(**{**row, "characters": characters, "turns": turns})


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """The conversations of a JSON Lines or Parquet file, in order.

    Raises:
        UserError: if the file cannot be read or a row is not a conversation; names file and row.
    """
    path = Path(path)
    for number, row in _rows(path):
        try:
            yield Conversation.from_row(row)
        except (TypeError, KeyError) as error:
            raise UserError(
                f"{path}:{number}: not a conversation: {error}. Run her-nemo data ingest first."
            ) from error


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON Lines: {error}") from error


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> int:
    """Writes JSON Lines; returns how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for conversation in conversations:
            file.write(json.dumps(conversation.to_row(), ensure_ascii=False) + "\n")
            count += 1
    return count
