"""Conversations as chat messages: OpenAI's `messages`, ShareGPT's `conversations`, and what such readers share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from her_nemo.data.readers import fields
from her_nemo.data.readers.items import Read, ReadOptions, View
from her_nemo.data.readers.rows import Malformed, Place, RawRow, Rejected
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.names import normalise_name
from her_nemo.roleplay.prompt import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
# `Roderigo: ...` at the start of a message, or after a plan.
_PREFIX = re.compile(r"\s*(?:<system_thinking>.*?</system_thinking>\s*)?([^\s:<>\n*\[(][^:<>\n]{0,59}):\s", re.DOTALL)
_GENERIC = frozenset(("assistant", "user", "human", "gpt", "model", "system"))


# ---------------------------------------------------------------- OpenAI's messages


def is_messages(value: Any) -> bool:
    """An object with a list of {role, content}."""
    messages = value.get("messages") if isinstance(value, dict) else None
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and "role" in messages[0]


def count_messages(value: Any) -> int:
    """Assistant messages, whatever key holds them."""
    if not isinstance(value, dict):
        return 0
    listed = value.get("messages", value.get("conversations"))
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    roles = [entry.get("role", entry.get("from")) for entry in entries]
    return sum(isinstance(role, str) and ROLES.get(role.lower()) == "assistant" for role in roles)


def read_messages(row: RawRow, options: ReadOptions) -> Read:
    """One view. Every reply becomes a sample (where some have plans: those that have one)."""
    try:
        value = fields.mapping(row.value, "the row")
        messages = checked_messages(value, "messages")
        name = options.character or fields.optional_text(value, "character", "name") or None
        yield row.place, _view_of(value, messages, row.place, options, "messages", name, Dialect.HER)
    except Malformed as problem:
        yield rejected_view(row, problem)


# ---------------------------------------------------------------- ShareGPT, as CoSER writes it


def is_sharegpt(value: Any) -> bool:
    """An object with a list of {from, value} among whose speakers are ShareGPT's."""
    turns = value.get("conversations") if isinstance(value, dict) else None
    if not (isinstance(turns, list) and turns and isinstance(turns[0], dict) and "mask" not in value):
        return False
    return isinstance(turns[0].get("from"), str) and turns[0]["from"].lower() in ROLES


def read_sharegpt(row: RawRow, options: ReadOptions) -> Read:
    """One view of one scene by one character, or by the Environment, in CoSER's dialect."""
    try:
        value = fields.mapping(row.value, "the row")
        messages = checked_messages(value, "conversations", role="from", content="value")
        name = options.character
        seen = _view_of(value, messages, row.place, options, "coser_sharegpt", name, Dialect.COSER)
        yield row.place, seen
    except Malformed as problem:
        yield rejected_view(row, problem)


# ---------------------------------------------------------------- shared


def _view_of(
    value: Mapping[str, Any],
    messages: tuple[Message, ...],
    place: Place,
    options: ReadOptions,
    source: str,
    name: str | None,
    native: Dialect,
) -> View:
    dialect = options.dialect or native
    name = name or character_of(messages, dialect)
    reply_indices(messages)
    original = fields.optional_text(value, "trace_id", "id", "conversation_id") or place.row_name
    book = options.book or fields.optional_text(value, "book", "book_name") or _book_in(messages, name)
    return View(
        original_trace_id=original,
        conversation_id=original,
        source=source,
        book=book,
        character=name,
        messages=messages,
        dialect=dialect,
        replace_requirements=dialect is Dialect.COSER,
    )


def checked_messages(
    row: Mapping[str, Any], key: str, role: str = "role", content: str = "content"
) -> tuple[Message, ...]:
    """The messages of a row under their OpenAI roles.

    Raises:
        Malformed: no list, an unknown role, a system message that is not the first, or text that is none.
    """
    messages: list[Message] = []
    for index, value in enumerate(fields.field(row, key, list)):
        what = f"{key}[{index}]"
        entry = fields.mapping(value, what)
        given = fields.field(entry, role, str, what)
        known = ROLES.get(given.lower())
        if known is None:
            raise Malformed("unknown_role", f"{what}.{role} is {given!r}, not one of {', '.join(ROLES)}")
        if known == "system" and index:
            raise Malformed("role_order", f"{what} is a system message that is not the first")
        messages.append({"role": known, "content": fields.text(entry, content, what)})
    if not messages:
        raise Malformed("role_order", f"{key!r} is empty")
    return tuple(messages)


def assistant_indices(messages: Sequence[Message]) -> list[int]:
    """Where the assistant's messages stand."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def reply_indices(messages: Sequence[Message]) -> list[int]:
    """`assistant_indices` of a view that samples are to be made of. Malformed if there are none."""
    found = assistant_indices(messages)
    if not found:
        raise Malformed("no_reply", "no assistant message")
    return found


def character_of(messages: Sequence[Message], dialect: Dialect) -> str | None:
    """Who the assistant is: the name in front of most of its messages; None when they have none."""
    names: Counter[str] = Counter()
    for message in messages:
        found = _PREFIX.match(message["content"]) if message["role"] == "assistant" else None
        if found and normalise_name(found[1]) not in _GENERIC:
            names[found[1].strip()] += 1
    if not names:
        return None
    name, count = names.most_common(1)[0]
    # A single `Listen: ...` among many messages is no name.
    return name if 2 * count > len(assistant_indices(messages)) else None


def _book_in(messages: Sequence[Message], name: str | None) -> str:
    """`... X from BOOK.` in the first line of a system prompt."""
    if not name or messages[0]["role"] != "system":
        return ""
    head = messages[0]["content"].split("\n", 1)[0]
    found = re.search(re.escape(name) + r" from (.{1,100}?)\.?\s*\Z", head)
    return found[1].strip() if found else ""


def rejected_view(row: RawRow, problem: Malformed) -> Rejected:
    """A row of messages that cannot be used, with all its assistant messages."""
    return Rejected.of(row.place, problem, count_messages(row.value), row.value)
