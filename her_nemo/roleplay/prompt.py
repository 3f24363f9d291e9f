"""Prompts: the conversation as one character knows it, and the chat template.

A system prompt (`layouts`), a first user message that begins with `===Conversation Start===`, the turns of
all others merged into one user message with a blank line between them, and the character's own turns as
assistant messages without their plans. Training, rollouts, evaluation and chat all build them here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TypedDict

from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.layouts import DEFAULT_REQUIREMENTS, Heading, Layout, RolePrompt
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.turn import parse_turn
from her_nemo.roleplay.views import VIEWS, Reader, view

__all__ = [
    "CHAT_TEMPLATE",
    "CONTROL_TOKENS",
    "CONVERSATION_START",
    "DEFAULT_REQUIREMENTS",
    "Heading",
    "Layout",
    "Message",
    "RolePrompt",
    "Utterance",
    "add_utterance",
    "build_messages",
    "drop_oldest_turns",
    "render_utterance",
    "speech_of",
]

CONVERSATION_START = "===Conversation Start===\n\n"
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHAT_TEMPLATE = (
    resources.files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8").strip()
)


class Message(TypedDict):
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True)
class Utterance:
    """One turn of a conversation: who, and the raw text in HER's tags (with or without `Name: ` before it)."""

    speaker: str
    text: str


def render_utterance(utterance: Utterance, reader: Reader, dialect: Dialect = Dialect.HER) -> str:
    """`Name: ...` as the reader sees it, written in `dialect`; '' when the reader sees nothing of it."""
    turn = parse_turn(utterance.text, expect_plan=False, expect_name=utterance.speaker)
    sees = VIEWS[reader].sees
    if all(segment.blank or not sees(segment.kind) for segment in turn.segments):
        return ""
    text = view(turn, reader, dialect=dialect).strip()
    named = turn.name is not None and same_name(turn.name, utterance.speaker)
    return text if named else f"{utterance.speaker}: {text}"


def build_messages(
    system: str | RolePrompt,
    me: str,
    history: Iterable[Utterance],
    layout: Layout = Layout.HER,
    heading: Heading = Heading.EQUALS,
    mine: Reader = Reader.SELF_LATER,
) -> list[Message]:
    """The prompt for `me`'s next turn: system, then user and assistant messages.

    Others' turns that follow each other become one user message. Two turns of `me` in a row stay two
    assistant messages. A conversation that `me` opens gets a first user message with the head alone. The
    history is written in the layout's dialect; names are compared by `same_name`. `mine` is how `me` sees his own
    turns: SELF_NOW keeps them as they were written, plans included.
    """
    content = system.text(layout, heading) if isinstance(system, RolePrompt) else system
    messages: list[Message] = [{"role": "system", "content": content}]
    for utterance in history:
        add_utterance(messages, me, utterance, layout, mine)
    if len(messages) == 1:
        messages.append({"role": "user", "content": CONVERSATION_START})
    return messages


def add_utterance(
    messages: list[Message],
    me: str,
    utterance: Utterance,
    layout: Layout = Layout.HER,
    mine: Reader = Reader.SELF_LATER,
) -> bool:
    """Append one turn to a prompt of `me`, as `build_messages` would have. Returns whether `me` sees anything of it;
    if not, the prompt stays as it is.

    `messages` begins with a system or a user message. What others say after another user message becomes part of it.
    """
    own = same_name(utterance.speaker, me)
    if own and mine is Reader.SELF_NOW:
        text = utterance.text
    else:
        text = render_utterance(utterance, mine if own else Reader.OTHER_CHARACTER, layout.dialect)
    if not text:
        return False
    opened = messages[-1]["role"] != "system"
    if own:
        if not opened:
            messages.append({"role": "user", "content": CONVERSATION_START})
        messages.append({"role": "assistant", "content": text})
    elif not opened:
        messages.append({"role": "user", "content": CONVERSATION_START + text})
    elif messages[-1]["role"] == "user":
        before = messages[-1]["content"]
        only_head = before.strip() == CONVERSATION_START.strip()
        messages[-1] = {"role": "user", "content": (CONVERSATION_START if only_head else before + "\n\n") + text}
    else:
        messages.append({"role": "user", "content": text})
    return True


def drop_oldest_turns(messages: Sequence[Message], count: int) -> list[Message] | None:
    """The prompt without its `count` oldest user messages and the assistant messages that answered them.

    The system prompt stays, the last user message stays, the history begins with a user message, and that
    message begins with the conversation head. None when there is no such prompt.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    users = [i for i in range(len(system), len(messages)) if messages[i]["role"] == "user"]
    if count < 0 or count >= len(users):
        return None
    rest = list(messages[users[count] :])
    if not rest[0]["content"].startswith(CONVERSATION_START.strip()):
        rest[0] = {"role": "user", "content": CONVERSATION_START + rest[0]["content"]}
    return [*system, *rest]


def speech_of(text: str) -> str:
    """Only what is said aloud in a message: no name, no thought, no action."""
    return parse_turn(text, expect_plan=False).text_of(Kind.SPEECH)
