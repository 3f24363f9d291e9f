"""Prompts: HER's sectioned system prompt, the conversation as one character knows it, and the chat template.

The layout is that of HER's data: a system prompt in `===Title===` sections, a first user message that
begins with `===Conversation Start===`, the turns of all others merged into one user message with a blank
line between them, and the character's own turns as assistant messages without their plans.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TypedDict

from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.turn import parse_turn
from her_nemo.roleplay.views import VIEWS, Reader, view

CONVERSATION_START = "===Conversation Start===\n\n"
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHAT_TEMPLATE = (
    resources.files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8").strip()
)

DEFAULT_REQUIREMENTS = (
    "First write a plan in the third person between <system_thinking> and </system_thinking>: what the "
    "character notices, wants and will do. Then write your name, a colon, and the turn itself: inner "
    "thoughts in the first person between <role_thinking> and </role_thinking>, which nobody else can see; "
    "visible actions between <role_action> and </role_action>; everything else is spoken aloud. Mix them in "
    "any order."
)


class Message(TypedDict):
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True)
class Utterance:
    """One turn of a conversation: who, and the raw text (with or without `Name: ` before it)."""

    speaker: str
    text: str


@dataclass(frozen=True)
class RolePrompt:
    """The sections of HER's system prompt. An empty optional section is left out."""

    name: str
    book: str
    profile: str
    background: str = ""
    scenario: str = ""
    others: tuple[tuple[str, str], ...] = ()
    inner_thoughts: str = ""
    requirements: str = DEFAULT_REQUIREMENTS

    def text(self) -> str:
        """The system prompt."""
        others = "\n".join(f"**{name}**: {description}" for name, description in self.others)
        sections = [
            (f"{self.name}'s Profile", self.profile),
            ("Background", self.background),
            ("Current Scenario", self.scenario),
            ("Information about other Characters", others),
            ("Your Inner Thoughts", self.inner_thoughts),
            ("Requirements", self.requirements),
        ]
        written = [f"==={title}===\n{body}" for title, body in sections if body]
        return "\n\n".join([f"You are {self.name} from {self.book}.", *written])

    @classmethod
    def parse(cls, text: str) -> RolePrompt:
        """Read a system prompt of this layout back.

        Raises:
            ValueError: if the first line or the profile section is missing.
        """
        first = re.match(r"You are (.+?) from (.+)\.\n", text)
        if first is None:
            raise ValueError(f"not HER's system prompt: it begins {text[:60]!r}, not 'You are X from BOOK.'")
        name, book = first.groups()
        marks = list(re.finditer(r"^===(.+)===\n", text, re.MULTILINE))
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        bodies = {
            mark.group(1): text[mark.end() : end].removesuffix("\n\n")
            for mark, end in zip(marks, ends, strict=True)
        }
        if f"{name}'s Profile" not in bodies:
            raise ValueError(f"not HER's system prompt: no '==={name}'s Profile===' section")
        others = re.findall(
            r"^\*\*(.+?)\*\*: (.*?)(?=\n\*\*[^*\n]+\*\*: |\Z)",
            bodies.get("Information about other Characters", ""),
            re.MULTILINE | re.DOTALL,
        )
        return cls(
            name=name,
            book=book,
            profile=bodies[f"{name}'s Profile"],
            background=bodies.get("Background", ""),
            scenario=bodies.get("Current Scenario", ""),
            others=tuple(others),
            inner_thoughts=bodies.get("Your Inner Thoughts", ""),
            requirements=bodies.get("Requirements", ""),
        )


def render_utterance(utterance: Utterance, reader: Reader) -> str:
    """`Name: ...` as the reader sees it; '' when the reader sees nothing of it."""
    turn = parse_turn(utterance.text, expect_plan=False, expect_name=utterance.speaker)
    sees = VIEWS[reader].sees
    if all(segment.blank or not sees(segment.kind) for segment in turn.segments):
        return ""
    text = view(turn, reader).strip()
    return text if turn.name == utterance.speaker else f"{utterance.speaker}: {text}"


def build_messages(system: str | RolePrompt, me: str, history: Iterable[Utterance]) -> list[Message]:
    """The prompt for `me`'s next turn: system, then user and assistant messages.

    Others' turns that follow each other become one user message. Two turns of `me` in a row stay two
    assistant messages. A conversation that `me` opens gets a first user message with the head alone.
    """
    content = system.text() if isinstance(system, RolePrompt) else system
    messages: list[Message] = [{"role": "system", "content": content}]
    heard: list[str] = []

    def flush() -> None:
        first = len(messages) == 1
        if heard or first:
            head = CONVERSATION_START if first else ""
            messages.append({"role": "user", "content": head + "\n\n".join(heard)})
            heard.clear()

    for utterance in history:
        if utterance.speaker == me:
            text = render_utterance(utterance, Reader.SELF_LATER)
            if text:
                flush()
                messages.append({"role": "assistant", "content": text})
        else:
            text = render_utterance(utterance, Reader.OTHER_CHARACTER)
            if text:
                heard.append(text)
    flush()
    return messages


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
