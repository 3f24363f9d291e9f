"""A conversation as one of its characters lives through it: the unit of plans and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from her_nemo.data.records import Character, Conversation
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.prompt import Utterance, render_utterance
from her_nemo.roleplay.turn import parse_turn
from her_nemo.roleplay.views import Reader


@dataclass(frozen=True)
class Line:
    """A turn as the character sees it. `mine` turns are numbered by their place in the conversation, from 1."""

    number: int
    mine: bool
    text: str
    raw: str = ""


@dataclass(frozen=True)
class CharacterPart:
    """One character's side of a conversation."""

    conversation: Conversation
    character: Character

    @property
    def name(self) -> str:
        """Names the unit."""
        return f"{self.conversation.conversation_id} / {self.character.name}"

    @property
    def my_turns(self) -> list[int]:
        """Indices of the character's turns."""
        return [i for i, turn in enumerate(self.conversation.turns) if turn.speaker == self.character.name]

    def lines(self, raw: dict[int, str] | None = None) -> list[Line]:
        """What the character lives through: own turns whole (without plans), of others what can be seen and heard."""
        found = []
        for index, turn in enumerate(self.conversation.turns):
            mine = turn.speaker == self.character.name
            reader = Reader.SELF_LATER if mine else Reader.OTHER_CHARACTER
            text = render_utterance(Utterance(turn.speaker, turn.text), reader)
            if text or mine:
                found.append(Line(index + 1, mine, text, (raw or {}).get(index, "")))
        return found

    def history(self, before: int) -> list[Utterance]:
        """The turns before index `before`, unfiltered: `build_messages` takes what may be seen."""
        return [Utterance(turn.speaker, turn.text) for turn in self.conversation.turns[:before]]

    def hidden_thoughts(self) -> list[tuple[str, str]]:
        """(speaker, thought) of everyone else: what must not show up in this character's plans."""
        found = []
        for turn in self.conversation.turns:
            if turn.speaker != self.character.name:
                parsed = parse_turn(turn.text, expect_plan=False, expect_name=turn.speaker)
                thought = parsed.text_of(Kind.ROLE_THINKING, Kind.SYSTEM_THINKING)
                if thought:
                    found.append((turn.speaker, thought))
        return found

    def given(self) -> dict[str, str]:
        """What every prompt about this character says first."""
        conversation, character = self.conversation, self.character
        return {
            "name": character.name,
            "book": conversation.book,
            "profile": character.profile,
            "background": conversation.background,
            "scenario": conversation.scenario,
            "motivation": character.motivation,
        }


def parts(conversations: Sequence[Conversation]) -> list[CharacterPart]:
    """Every key character who speaks, conversation by conversation."""
    found = []
    for conversation in conversations:
        for character in conversation.characters:
            part = CharacterPart(conversation, character)
            if character.key and part.my_turns:
                found.append(part)
    return found
