"""Our own conversations: what ingest wrote, or what synthesis made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from her_nemo.data.readers import fields
from her_nemo.data.readers.items import Read, ReadOptions
from her_nemo.data.readers.rows import RawRow, Rejected
from her_nemo.data.records import Conversation
from her_nemo.roleplay.turn import Defect, parse_turn

_NOT_HERE = frozenset((Defect.MISSING_PLAN, Defect.MISSING_NAME, Defect.WRONG_NAME))


def is_own(value: Any) -> bool:
    """A row of conversations.parquet."""
    return isinstance(value, dict) and {"conversation_id", "turns", "characters"} <= set(value)


def count_own(value: Any) -> int:
    """Turns."""
    return fields.length(value.get("turns")) if isinstance(value, dict) else 0


def read_own(row: RawRow, options: ReadOptions) -> Read:
    """The conversation, with the defects of its turns found anew: synthesis has changed the texts."""
    try:
        empty = dict.fromkeys(("plot_index", "conversation_index"))
        conversation = Conversation.from_row({**empty, **_text_fields(), **row.value})
        turns = tuple(
            replace(
                turn,
                defects=tuple(
                    dict.fromkeys(
                        [*turn.defects]
                        + [
                            defect.value
                            for defect in parse_turn(turn.text, expect_plan=False, expect_name=turn.speaker).defects
                            if defect not in _NOT_HERE
                        ]
                    )
                ),
            )
            for turn in conversation.turns
        )
        yield row.place, replace(conversation, turns=turns, book=options.book or conversation.book, split=None)
    except (KeyError, TypeError, AttributeError) as error:
        message = f"not a conversation: {type(error).__name__}: {error}"
        yield Rejected(row.place, "not_a_conversation", message, count_own(row.value), row.value)


def _text_fields() -> dict[str, str]:
    return dict.fromkeys(("source", "book", "scenario", "topic", "background"), "")
