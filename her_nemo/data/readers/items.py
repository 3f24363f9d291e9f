"""What readers hand over: conversations, one character's view of one, and preference pairs.

A reader yields items and `Rejected`s from one raw row; its `count_turns` says, by another way than reading, how many
turns the row holds, so that the ledger can tell when one got lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from her_nemo.data.readers.rows import Place, RawRow, Rejected
from her_nemo.data.records import Conversation, Pair
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.prompt import Message

Kind = Literal["conversations", "views", "pairs"]


@dataclass(frozen=True)
class ReadOptions:
    """What the user says about the data. None leaves it to the reader."""

    dialect: Dialect | None = None
    book: str | None = None
    character: str | None = None


@dataclass(frozen=True)
class View:
    """A conversation as one character saw it, as messages; still in the dialect of its source.

    `trained` are the indices of the assistant messages to make samples of; None leaves it to the plans.
    """

    original_trace_id: str
    conversation_id: str
    source: str
    book: str
    character: str | None
    messages: tuple[Message, ...]
    dialect: Dialect
    plot_index: int | None = None
    conversation_index: int | None = None
    trained: tuple[int, ...] | None = None
    trace_id: str | None = None  # of the one trained turn, where the source names it
    turn_index: int | None = None
    replace_requirements: bool = False  # the system prompt asks for another dialect than HER's


Item = Conversation | View | Pair
Read = Iterator[tuple[Place, Item] | Rejected]


@dataclass(frozen=True)
class Format:
    """One format: how to recognise it, count it and read it.

    Attributes:
        looks_like: whether a raw row is of this format.
        count_turns: the turns of a raw row (replies, for pairs), counted without reading it.
        read: the items of a raw row with their places. Raises nothing: what is wrong is yielded as `Rejected`.
        rows_per_item: 2 where two lines make one item.
    """

    name: str
    kind: Kind
    looks_like: Callable[[Any], bool]
    count_turns: Callable[[Any], int]
    read: Callable[[RawRow, ReadOptions], Read]
    rows_per_item: int = 1
