"""NeMo-Aligner's formats: SFT (prompt and completion, or chat with a mask), and chosen and rejected texts by turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from her_nemo.data.readers import fields
from her_nemo.data.readers.items import Read, ReadOptions, View
from her_nemo.data.readers.messages import character_of
from her_nemo.data.readers.rows import Malformed, RawRow, Rejected
from her_nemo.data.records import Pair
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.prompt import Message

# ---------------------------------------------------------------- SFT


def is_sft(value: Any) -> bool:
    """{"input", "output"}, or a chat with "mask"."""
    if not isinstance(value, dict):
        return False
    return ("mask" in value and "conversations" in value) or ("input" in value and "output" in value)


def count_sft(value: Any) -> int:
    """Messages that are not by the masked speaker; one completion."""
    if not isinstance(value, dict):
        return 0
    if "conversations" not in value:
        return int("output" in value)
    turns = value["conversations"]
    masked = _masked(value.get("mask"))
    entries = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return sum(_speaker(turn) not in (*masked, "system") for turn in entries)


def _speaker(turn: Mapping[str, Any]) -> str:
    given = turn.get("from")
    return given.strip().lower() if isinstance(given, str) else ""


def _masked(mask: Any) -> tuple[str, ...]:
    """`mask` names the speaker (or several) whose messages are not trained on."""
    given = mask if isinstance(mask, list) else [mask]
    return tuple(name.strip().lower() for name in given if isinstance(name, str))


def read_sft(row: RawRow, options: ReadOptions) -> Read:
    """One view; every message that is not masked becomes a sample."""
    try:
        value = fields.mapping(row.value, "the row")
        messages = _chat(value) if "conversations" in value else _completion(value)
        name = fields.optional_text(value, "trace_id", "id") or row.place.row_name
        dialect = options.dialect or Dialect.HER
        yield row.place, View(
            original_trace_id=name,
            conversation_id=name,
            source="aligner_sft",
            book=options.book or "",
            character=options.character or character_of(messages, dialect),
            messages=messages,
            dialect=dialect,
        )
    except Malformed as problem:
        yield Rejected.of(row.place, problem, count_sft(row.value), row.value)


def _completion(value: Mapping[str, Any]) -> tuple[Message, ...]:
    return (
        {"role": "user", "content": fields.text(value, "input")},
        {"role": "assistant", "content": fields.text(value, "output")},
    )


def _chat(value: Mapping[str, Any]) -> tuple[Message, ...]:
    masked = _masked(value.get("mask"))
    if not masked:
        raise Malformed("missing_key", "'mask' must name the speaker whose messages are not trained on")
    system = fields.optional_text(value, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for index, entry in enumerate(fields.field(value, "conversations", list)):
        what = f"conversations[{index}]"
        turn = fields.mapping(entry, what)
        speaker = fields.text(turn, "from", what).strip().lower()
        if speaker == "system":
            raise Malformed("role_order", f"{what} is by the system, which has a key of its own")
        content = fields.text(turn, "value", what)
        messages.append({"role": "user" if speaker in masked else "assistant", "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise Malformed("no_reply", "every message is masked")
    return tuple(messages)


# ---------------------------------------------------------------- preference texts


def is_rm(value: Any) -> bool:
    """A line {"text"}: a whole chat as text, chosen and rejected by turns."""
    return isinstance(value, dict) and isinstance(value.get("text"), str) and set(value) <= {"text", "label", "id"}


def count_rm(value: Any) -> int:
    """Two lines are two replies (`value` holds both)."""
    return sum(isinstance(line, dict) and isinstance(line.get("text"), str) for line in value)


def read_rm(row: RawRow, options: ReadOptions) -> Read:
    """One pair from two lines: the first is chosen, the second rejected."""
    try:
        chosen, rejected = (_parsed(line, index) for index, line in enumerate(row.value))
        if chosen[:-1] != rejected[:-1]:
            raise Malformed(
                "different_prompts", "the two lines differ before the last reply: chosen and rejected are out of step"
            )
        if chosen[-1] == rejected[-1]:
            raise Malformed("identical_pair", "chosen and rejected are the same text")
        line = row.place.line or (int(row.place.pointer[-1]) + 1 if row.place.pointer else 1)
        name = f"{Path(row.place.file).stem}_{(line - 1) // 2}"
        yield row.place, Pair(
            trace_id=name,
            messages=tuple(chosen[:-1]),
            chosen=chosen[-1]["content"],
            rejected=rejected[-1]["content"],
            source="aligner_rm",
            conversation_id=name,
        )
    except Malformed as problem:
        yield Rejected.of(row.place, problem, count_rm(row.value), row.value)


# Three ways to write a chat as one text: ChatML, NeMo's <extra_id_..>, and Anthropic's Human and Assistant.
_TEMPLATES = (
    re.compile(r"<\|im_start\|>(?P<role>system|user|assistant)\n(?P<text>.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL),
    re.compile(
        r"(?:<extra_id_0>(?P<system>System)\n|<extra_id_1>(?P<role>User|Assistant)\n)"
        r"(?P<text>.*?)(?=<extra_id_[0-9]>|\Z)",
        re.DOTALL,
    ),
    re.compile(r"(?:\A|\n\n)(?P<role>Human|Assistant): ?(?P<text>.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.DOTALL),
)
_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "system": "system"}
_END = "<|endoftext|>"


def _parsed(line: Any, index: int) -> list[Message]:
    """A chat written as one text, back as messages that end with the reply."""
    text = fields.field(fields.mapping(line, f"line {index}"), "text", str)
    for template in _TEMPLATES:
        found = list(template.finditer(text))
        if not found or text[: found[0].start()].strip():
            continue
        messages: list[Message] = []
        for match in found:
            groups = match.groupdict()
            role = _ROLES[(groups.get("system") or groups["role"]).lower()]
            content = fields.checked(match["text"].strip().removesuffix(_END).strip(), "text")
            if content or role != "system":
                messages.append({"role": role, "content": content})
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            raise Malformed("no_reply", "the text does not end with a reply of the assistant")
        if len(messages) < 2 or messages[-2]["role"] != "user":
            raise Malformed("role_order", "no message of the user before the last reply")
        return messages
    message = "the text is no chat in ChatML, in <extra_id_..> or in 'Human:' and 'Assistant:'"
    raise Malformed("unknown_template", message)
