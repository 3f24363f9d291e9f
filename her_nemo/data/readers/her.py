"""HER's own formats: the full dataset, and the multi-turn and single-turn rows made from it (arXiv 2601.21459)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from her_nemo.data.readers import fields
from her_nemo.data.readers.coser import Cast, rejected, trace_id, turn_of
from her_nemo.data.readers.items import Read, ReadOptions, View
from her_nemo.data.readers.messages import (
    character_of,
    checked_messages,
    rejected_view,
    reply_indices,
)
from her_nemo.data.readers.rows import Malformed, RawRow, Rejected
from her_nemo.data.records import Character, Conversation
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.names import normalise_name
from her_nemo.roleplay.prompt import RolePrompt

# Where the same thing stands in several states of work, the latest first.
_PLAN_KEYS = ("sys_thinking_revised", "sys_thinking")
_TEXT_KEYS = ("enhanced_standard_format", "enhanced_speech", "standard_format")


# ---------------------------------------------------------------- the full dataset


def is_full(value: Any) -> bool:
    """A row of the full dataset: conversations with dialogues, and character_datasets."""
    return isinstance(value, dict) and isinstance(value.get("conversation"), list) and "character_datasets" in value


def count_full(value: Any) -> int:
    """Dialogue entries of all conversations."""
    conversations = value.get("conversation") if isinstance(value, dict) else None
    if not isinstance(conversations, list):
        return 0
    return sum(fields.length(c.get("dialogues")) for c in conversations if isinstance(c, dict))


def read_full(row: RawRow, options: ReadOptions) -> Read:
    """The conversations of one row (HER has one a row).

    `training_samples` is not read: it holds the same turns again as each character saw them, and is built anew.
    """
    try:
        full = fields.mapping(row.value, "the row")
        conversations = fields.field(full, "conversation", list)
        datasets = full.get("character_datasets")
        datasets = datasets if isinstance(datasets, dict) else {}
        book = options.book or fields.optional_text(full, "book_name", "book") or _book_of(datasets)
    except Malformed as problem:
        yield Rejected.of(row.place, problem, count_full(row.value), row.value)
        return
    for number, conversation in enumerate(conversations):
        where = row.place.down("conversation", number)
        try:
            yield where, _full_conversation(
                full,
                fields.mapping(conversation, "a conversation"),
                datasets,
                book,
                number if len(conversations) > 1 else None,
                options,
            )
        except Malformed as problem:
            yield rejected(where, problem, conversation)


def _book_of(datasets: Mapping[str, Any]) -> str:
    for entry in datasets.values():
        if isinstance(entry, dict) and (book := fields.optional_text(entry, "book_name", "book")):
            return book
    return ""


def _full_conversation(
    row: Mapping[str, Any],
    conversation: Mapping[str, Any],
    datasets: Mapping[str, Any],
    book: str,
    number: int | None,
    options: ReadOptions,
) -> Conversation:
    dialogues = fields.field(conversation, "dialogues", list)
    if not dialogues:
        raise Malformed("empty_conversation", "'dialogues' is empty")
    plot_index = fields.optional_index(row, "plot_index", "i_p")
    conv_index = fields.optional_index(row, "conv_index")
    if conv_index is None or number is not None:
        conv_index = fields.optional_index(conversation, "i_c") if number is None else number
    name = fields.optional_text(row, "trace_id") or trace_id(
        book, fields.optional_text(row, "chapter"), plot_index, row.get("i_chunk"), conv_index
    )
    cast = Cast(_characters(conversation, datasets))
    dialect = options.dialect
    turns = []
    for index, value in enumerate(dialogues):
        what = f"dialogues[{index}]"
        entry = fields.mapping(value, what)
        speaker = cast.canonical(fields.text(entry, "character", what))
        text = fields.optional_text(entry, *_TEXT_KEYS)
        if text and dialect in (None, Dialect.HER):
            turn = turn_of(speaker, text, Dialect.HER, fields.optional_text(entry, *_PLAN_KEYS))
        else:
            # Never put into HER's tags: what was read is CoSER's.
            message = fields.text(entry, "message", what)
            turn = turn_of(
                speaker, message, dialect or Dialect.COSER, fields.optional_text(entry, *_PLAN_KEYS)
            )
        turns.append(turn)
    any_entry = next((entry for entry in datasets.values() if isinstance(entry, dict)), {})
    return Conversation(
        conversation_id=name if number is None else f"{name}_{number}",
        source="her_full",
        book=book,
        plot_index=plot_index,
        conversation_index=conv_index,
        scenario=fields.optional_text(conversation, "scenario_enriched", "scenario"),
        topic=fields.optional_text(conversation, "topic"),
        background=fields.optional_text(any_entry, "background_enriched", "background")
        or fields.optional_text(row, "summary"),
        characters=cast.with_speakers(tuple(turns), _profiles(datasets)),
        turns=tuple(turns),
        chapter=fields.optional_text(row, "chapter"),
        source_text=fields.optional_text(row, "text"),
    )


def _profiles(datasets: Mapping[str, Any]) -> dict[str, str]:
    """Profiles by name: a character's own, else what another's entry says about him."""
    profiles: dict[str, str] = {}
    for entry in datasets.values():
        others = entry.get("other_character_profiles") if isinstance(entry, dict) else None
        if isinstance(others, dict):
            profiles |= {name: text for name, text in others.items() if isinstance(text, str)}
    for name, entry in datasets.items():
        if isinstance(entry, dict) and (
            profile := fields.optional_text(entry, "character_profile_enriched", "character_profile", "profile")
        ):
            profiles[name] = profile
    return profiles


def _characters(conversation: Mapping[str, Any], datasets: Mapping[str, Any]) -> list[Character]:
    """The characters with a dataset of their own (HER trains these), motivation from there or from the conversation."""
    listed = conversation.get("key_characters")
    listed = listed if isinstance(listed, list) else []
    motivations = {
        normalise_name(entry["name"]): fields.optional_text(entry, "motivation", "thought")
        for entry in listed
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    profiles = _profiles(datasets)
    characters = []
    for name, entry in datasets.items():
        own = fields.optional_text(entry, "motivation_enriched", "motivation") if isinstance(entry, dict) else ""
        characters.append(
            Character(name, profiles.get(name, ""), own or motivations.get(normalise_name(name), ""))
        )
    return characters


# ---------------------------------------------------------------- rows of messages

_NUMBERS = re.compile(r"_(\d+)(?:_\d+)?_(\d+)\Z")


def is_single(value: Any) -> bool:
    """A row of sft_single_turn: it says which turn of what it is."""
    return isinstance(value, dict) and "messages" in value and "original_trace_id" in value


def is_multi(value: Any) -> bool:
    """A row of sft_multi_turn: a trace id, and a system prompt in HER's sections."""
    if not (isinstance(value, dict) and "trace_id" in value and "original_trace_id" not in value):
        return False
    messages = value.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    content = first.get("content") if isinstance(first, dict) and first.get("role") == "system" else None
    return isinstance(content, str) and content.startswith("You are ") and "'s Profile===" in content


def read_single(row: RawRow, options: ReadOptions) -> Read:
    """One view, of which the last assistant message is trained; those before it are rows of their own."""
    try:
        value = fields.mapping(row.value, "the row")
        original = fields.text(value, "original_trace_id")
        yield row.place, _view(
            value,
            options,
            source="her_single_turn",
            original=original,
            trace=fields.text(value, "trace_id"),
            turn_index=fields.field(value, "turn_index", int),
        )
    except Malformed as problem:
        yield rejected_view(row, problem)


def read_multi(row: RawRow, options: ReadOptions) -> Read:
    """One view; only its last reply has a plan, so by default only that becomes a sample."""
    try:
        value = fields.mapping(row.value, "the row")
        original = fields.text(value, "trace_id")
        yield row.place, _view(value, options, source="her_multi_turn", original=original)
    except Malformed as problem:
        yield rejected_view(row, problem)


def _view(
    value: Mapping[str, Any],
    options: ReadOptions,
    *,
    source: str,
    original: str,
    trace: str | None = None,
    turn_index: int | None = None,
) -> View:
    dialect = options.dialect or Dialect.HER
    messages = checked_messages(value, "messages")
    book, name = options.book or "", options.character
    if messages[0]["role"] == "system":
        try:
            prompt = RolePrompt.parse(messages[0]["content"])
            book, name = book or prompt.book, name or prompt.name
        except ValueError:
            pass  # another layout: the reply says who speaks
    name = name or character_of(messages, dialect)
    conversation = original.removesuffix(f"_{name}") if name else original
    numbers = _NUMBERS.search(conversation)
    trained = reply_indices(messages)
    if source == "her_single_turn" and messages[-1]["role"] != "assistant":
        raise Malformed("role_order", f"the last message is the {messages[-1]['role']}'s, not the assistant's")
    return View(
        original_trace_id=original,
        conversation_id=conversation,
        source=source,
        book=book,
        character=name,
        messages=messages,
        dialect=dialect,
        plot_index=int(numbers[1]) if numbers else None,
        conversation_index=int(numbers[2]) if numbers else None,
        trained=(trained[-1],) if source == "her_single_turn" else None,
        trace_id=trace,
        turn_index=turn_index,
    )

