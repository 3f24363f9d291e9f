"""A conversation under way: the policy plays one character, somebody else (a simulator) the one it talks with.

Each side reads the other through `views`: the simulator gets `OTHER_CHARACTER` of the policy's turns, the policy
`OTHER_CHARACTER` of the simulator's and `SELF_LATER` of its own. So an own turn's plan is in nobody's history, not
even the policy's, and what it thought is in its own alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from her_nemo.roleplay.dialects import Dialect, to_her
from her_nemo.roleplay.layouts import Layout, RolePrompt, read_prompt
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.prompt import (
    CONVERSATION_START,
    Message,
    Utterance,
    add_utterance,
    build_messages,
    render_utterance,
)
from her_nemo.roleplay.turn import parse_turn
from her_nemo.roleplay.views import Reader

__all__ = ["SILENCE", "Conversation", "Start", "partner_prompt", "read_start", "without_control_tokens"]

SILENCE = "..."  # what is heard of a turn of which nobody else can see or hear anything
_CONTROL = re.compile(r"<\|(?=\w+\|>)")
_REQUIREMENTS = {
    Dialect.HER: (
        "Stay in character. Write your name, a colon, and your next turn alone: visible actions between <role_action> "
        "and </role_action>; everything else is spoken aloud."
    ),
    Dialect.COSER: (
        "Stay in character. Write your name, a colon, and your next turn alone: visible actions in parentheses, (like "
        "this); everything else is spoken aloud."
    ),
}


@dataclass(frozen=True)
class Start:
    """Where a conversation begins.

    Attributes:
        trace_id: of the prompt.
        me, partner: the policy's character, and the one that the simulator plays.
        messages: the policy's prompt for its first turn.
        layout: of the policy's system prompt; with it the dialect of all turns.
        partner_system: the simulator's system prompt.
        history: what has been said, as far as the policy's prompt tells.
        lines: what a scripted simulator says, turn by turn.
    """

    trace_id: str
    me: str
    partner: str
    messages: tuple[Message, ...]
    layout: Layout
    partner_system: str
    history: tuple[Utterance, ...]
    lines: tuple[str, ...] = ()


def read_start(
    trace_id: str,
    messages: Sequence[Message],
    *,
    partner: str | None = None,
    system: str | None = None,
    lines: Sequence[str] = (),
) -> Start:
    """A start from the prompt of the policy's first turn.

    Args:
        messages: system prompt first, a user message last.
        partner: who the simulator plays. None takes who spoke last of those that the system prompt describes (of
            all, if none of them spoke), else the first that it describes.
        system: the simulator's system prompt; None makes it of what the policy's prompt tells (`partner_prompt`).
        lines: of a scripted simulator.

    Raises:
        ValueError: the system prompt has no known layout, or there is nobody to talk with.
    """
    if messages[0]["role"] != "system":
        raise ValueError("the prompt has no system message that says who the policy is")
    mine, layout = read_prompt(messages[0]["content"])
    described = [name for name, _ in mine.others]
    history = tuple(_history(messages, mine.name, described, layout.dialect))
    if partner is None:
        spoke = [said.speaker for said in history if not same_name(said.speaker, mine.name)]
        known = [name for name in spoke if any(same_name(name, other) for other in described)]
        partner = next(iter([*known[::-1], *spoke[::-1], *described]), None)
        if partner is None:
            raise ValueError(f"nobody else is in the prompt of {mine.name}")
    if same_name(partner, mine.name):
        raise ValueError(f"{partner} would talk with himself")
    if system is None:
        system = partner_prompt(mine, partner, layout).text(layout)
    return Start(trace_id, mine.name, partner, tuple(messages), layout, system, history, tuple(lines))


def partner_prompt(mine: RolePrompt, partner: str, layout: Layout) -> RolePrompt:
    """What the simulator is told: book, background, scenario, and how the policy's prompt describes the partner and
    third parties. The policy's own profile, experience and inner thoughts are not in it."""
    described = [text for name, text in mine.others if same_name(name, partner)]
    return RolePrompt(
        name=partner,
        book=mine.book,
        profile=described[0] if described else f"{partner} talks with {mine.name}.",
        background=mine.background,
        scenario=mine.scenario,
        others=tuple((name, text) for name, text in mine.others if not same_name(name, partner)),
        requirements=_REQUIREMENTS[layout.dialect],
    )


def _history(
    messages: Sequence[Message], me: str, described: Sequence[str], dialect: Dialect
) -> Iterator[Utterance]:
    """The turns of a prompt. A user message is cut where a paragraph begins with a name that is known; a paragraph
    without one belongs to who spoke before."""
    names = list(described)
    for message in messages[1:]:
        if message["role"] == "assistant":
            yield Utterance(me, to_her(message["content"], dialect, me))
            continue
        content = message["content"].removeprefix(CONVERSATION_START.strip()).strip()
        speaker, parts = None, []
        for paragraph in content.split("\n\n") if content else []:
            name = parse_turn(paragraph, expect_plan=False).name
            if name is not None and (speaker is None or any(same_name(name, known) for known in names)):
                if speaker is not None:
                    yield Utterance(speaker, to_her("\n\n".join(parts), dialect, speaker))
                speaker, parts = name, [paragraph]
                names.append(name)
            else:
                speaker = speaker or next(iter(names), "Somebody")
                parts.append(paragraph)
        if speaker is not None:
            yield Utterance(speaker, to_her("\n\n".join(parts), dialect, speaker))


@dataclass
class Conversation:
    """One conversation from a start.

    Attributes:
        messages: the prompt of the policy's next turn.
        heard: all turns as the simulator's side may know them, before its view is taken.
        told: the turns since the start as they were written, for the record.
        unheard, silences: turns of the policy, and of the simulator, of which the other side perceived nothing.
    """

    start: Start
    messages: list[Message] = field(init=False)
    heard: list[Utterance] = field(init=False)
    told: list[Utterance] = field(init=False, default_factory=list)
    unheard: int = field(init=False, default=0)
    silences: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.messages = list(self.start.messages)
        self.heard = list(self.start.history)

    def say(self, text: str) -> None:
        """Take the policy's turn as it was generated, well-formed or not."""
        me = self.start.me
        self.told.append(Utterance(me, text))
        said = self._utterance(me, text)
        add_utterance(self.messages, me, said, self.start.layout)
        if not render_utterance(said, Reader.OTHER_CHARACTER):
            self.unheard += 1
            said = Utterance(me, SILENCE)
        self.heard.append(said)

    def hear(self, text: str) -> None:
        """Take the simulator's turn. One of which the policy would perceive nothing is heard as a silence."""
        partner = self.start.partner
        self.told.append(Utterance(partner, text))
        said = self._utterance(partner, text)
        if not self.perceptible(text):
            self.silences += 1
            said = Utterance(partner, SILENCE)
        add_utterance(self.messages, self.start.me, said, self.start.layout)
        self.heard.append(said)

    def perceptible(self, text: str) -> bool:
        """Whether the policy would see or hear anything of a simulator's turn."""
        said = self._utterance(self.start.partner, text)
        return bool(render_utterance(said, Reader.OTHER_CHARACTER))

    def partner_messages(self) -> list[Message]:
        """The simulator's prompt for its next turn."""
        start = self.start
        return build_messages(start.partner_system, start.partner, self.heard, start.layout)

    def _utterance(self, speaker: str, text: str) -> Utterance:
        text = without_control_tokens(text)
        dialect = self.start.layout.dialect
        return Utterance(speaker, text if dialect is Dialect.HER else to_her(text, dialect, speaker))


def without_control_tokens(text: str) -> str:
    """Text that cannot begin or end a message when it is tokenised (`<|im_end|>` spelled out becomes `< |im_end|>`),
    and that is valid Unicode."""
    return _CONTROL.sub("< |", text).encode("utf-8", errors="replace").decode("utf-8")
