"""From conversations and views to samples: one reply each, its history as the character saw it.

The plan stands in the trained reply only. A reply that does not parse cleanly is not trained on (a model learns what
it is shown); the turn itself stays in the others' histories, read *fail private*.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from her_nemo.data.readers.coser import ENVIRONMENT
from her_nemo.data.readers.items import View
from her_nemo.data.records import Conversation, ConversationTurn, Sample
from her_nemo.roleplay.dialects import Dialect, parse_message, to_her
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.names import normalise_name
from her_nemo.roleplay.prompt import (
    CONVERSATION_START,
    DEFAULT_REQUIREMENTS,
    Layout,
    Message,
    RolePrompt,
    Utterance,
    build_messages,
)
from her_nemo.roleplay.turn import Defect, parse_turn
from her_nemo.roleplay.views import Reader, view

Speakers = Literal["key", "profiled"]
Plans = Literal["auto", "require", "any"]

REQUIREMENTS_WITHOUT_PLAN = (
    "Write your name, a colon, and the turn itself: inner thoughts in the first person between <role_thinking> and "
    "</role_thinking>, which nobody else can see; visible actions between <role_action> and </role_action>; everything "
    "else is spoken aloud. Mix them in any order."
)
# What a reply to train on may lack; everything else would be taught.
HARMLESS = frozenset((Defect.MISSING_PLAN,))


@dataclass(frozen=True)
class SampleOptions:
    """Which turns become samples, and how their system prompt is laid out."""

    speakers: Speakers = "key"
    plans: Plans = "auto"
    allow_defects: frozenset[str] = frozenset()
    layout: Layout = Layout.HER


@dataclass(frozen=True)
class Context:
    """A turn that is history for others and no sample of its own, and why."""

    reason: str


@dataclass(frozen=True)
class Unusable:
    """A turn whose reply must not be trained on."""

    kind: str
    message: str
    trace_id: str
    reply: str
    turn: int  # its index among the conversation's turns, or the view's messages


Outcome = Sample | Context | Unusable


# ---------------------------------------------------------------- conversations


def samples_of_conversation(conversation: Conversation, options: SampleOptions) -> Iterator[Outcome]:
    """Exactly one outcome for every turn of the conversation."""
    cast = {
        character.name
        for character in conversation.characters
        if options.speakers == "profiled" or character.key
    }
    planned = any(turn.plan for turn in conversation.turns if turn.speaker in cast)
    for me in conversation.speakers:
        mine = [i for i, turn in enumerate(conversation.turns) if turn.speaker == me]
        if me not in cast:
            reason = "environment" if _is_environment(me) else "not_a_key_character"
            if not _is_environment(me) and options.speakers == "profiled":
                reason = "no_profile"
            yield from (Context(reason) for _ in mine)
        else:
            yield from _turns_of(conversation, me, mine, planned, options)


def _is_environment(name: str) -> bool:
    return normalise_name(name) == normalise_name(ENVIRONMENT)


def _turns_of(
    conversation: Conversation, me: str, mine: Sequence[int], planned: bool, options: SampleOptions
) -> Iterator[Outcome]:
    """One outcome for each of my turns. The whole conversation is rendered once: my k-th prompt is its beginning."""
    system = role_prompt(conversation, me, planned)
    history = [Utterance(turn.speaker, turn.text) for turn in conversation.turns]
    messages = build_messages(system, me, history, options.layout)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    shown = [i for i in mine if build_messages("", me, [history[i]])[-1]["role"] == "assistant"]
    # A turn of mine without any text leaves no assistant message.
    ends = dict(zip(shown, answers, strict=True))
    original = f"{conversation.conversation_id}_{me}"
    for number, index in enumerate(mine):
        turn = conversation.turns[index]
        trace = f"{original}_turn_{number}"
        if not turn.plan and (options.plans == "require" or (planned and options.plans == "auto")):
            yield Context("no_plan")
            continue
        reply = _reply(turn, me)
        defects = _defects(reply, me, bool(turn.plan), turn.defects)
        problem = _problem(defects, options)
        if problem or index not in ends:
            yield Unusable(problem or "empty_reply", _says(defects), trace, reply, index)
            continue
        prompt = messages[: ends[index]]
        yield Sample(
            trace_id=trace,
            original_trace_id=original,
            turn_index=number,
            history_turns=sum(message["role"] == "assistant" for message in prompt),
            messages=(*prompt, {"role": "assistant", "content": reply}),
            character=me,
            book=conversation.book,
            conversation_id=conversation.conversation_id,
            source=conversation.source,
            has_plan=bool(turn.plan),
            defects=defects,
            split=conversation.split,
        )


def role_prompt(conversation: Conversation, me: str, planned: bool) -> RolePrompt:
    """The system prompt for `me`: of the others the profile only, for nobody knows another's motivation."""
    mine = next(character for character in conversation.characters if character.name == me)
    return RolePrompt(
        name=me,
        book=conversation.book,
        profile=mine.profile or f"{me}, a character of {conversation.book}.",
        background=conversation.background,
        scenario=conversation.scenario,
        others=tuple((c.name, c.profile) for c in conversation.characters if c.name != me and c.profile),
        inner_thoughts=mine.motivation,
        requirements=DEFAULT_REQUIREMENTS if planned else REQUIREMENTS_WITHOUT_PLAN,
    )


def _reply(turn: ConversationTurn, me: str) -> str:
    plan = f"<{Kind.SYSTEM_THINKING}>{turn.plan}</{Kind.SYSTEM_THINKING}>" if turn.plan else ""
    return f"{plan}{me}: {turn.text}"


def _defects(reply: str, me: str | None, planned: bool, read: Sequence[str]) -> tuple[str, ...]:
    """What is wrong with a reply as it would be trained, and with the message it was read from."""
    found = [defect.value for defect in parse_turn(reply, expect_plan=planned, expect_name=me).defects]
    return tuple(dict.fromkeys([*read, *found]))


def _problem(defects: Sequence[str], options: SampleOptions) -> str:
    """The kind under which a reply is quarantined, or ''."""
    bad = [defect for defect in defects if defect not in HARMLESS and defect not in options.allow_defects]
    if not bad:
        return ""
    return "empty_reply" if bad == [Defect.EMPTY_REPLY] else "malformed_reply"


def _says(defects: Sequence[str]) -> str:
    return f"the reply has {', '.join(defects) or 'no text'}; allow_defects=[..] trains on such replies"


# ---------------------------------------------------------------- views

_COSER_REQUIREMENTS = re.compile(r"Your output should include \*\*thought\*\*.*?(?=\n\s*\n|\s*\Z)", re.DOTALL)


def samples_of_view(seen: View, options: SampleOptions, hidden: list[str] | None = None) -> Iterator[Outcome]:
    """Exactly one outcome for every assistant message of the view.

    `hidden` collects the trace id of a view whose user messages held others' thoughts: they are taken out.
    """
    history = [_system(seen)] if seen.messages[0]["role"] == "system" else []
    planned = any(
        parse_message(message["content"], seen.dialect, expect_name=seen.character).plan
        for message in seen.messages
        if message["role"] == "assistant"
    )
    number = 0
    for index, message in enumerate(seen.messages):
        if message["role"] == "user":
            _hear(history, message["content"], seen, hidden)
        elif message["role"] == "assistant":
            if not any(earlier["role"] == "user" for earlier in history):
                history.append({"role": "user", "content": CONVERSATION_START})
            yield _answer(history, message["content"], index, number, planned, seen, options)
            number += 1
            later = _later(message["content"], seen)
            if later:
                history.append({"role": "assistant", "content": later})


def _system(seen: View) -> Message:
    content = seen.messages[0]["content"].strip()
    if seen.replace_requirements:
        content = _COSER_REQUIREMENTS.sub(lambda _: REQUIREMENTS_WITHOUT_PLAN, content)
    return {"role": "system", "content": content}


def _hear(history: list[Message], content: str, seen: View, hidden: list[str] | None) -> None:
    """Add a user message as the character hears it; one that follows another joins it."""
    turn = parse_message(content, seen.dialect)
    if any(segment.kind.private and not segment.blank for segment in turn.segments):
        if hidden is not None:
            hidden.append(seen.original_trace_id)
        content = view(turn, Reader.OTHER_CHARACTER)
    elif seen.dialect is not Dialect.HER:
        content = view(turn, Reader.OTHER_CHARACTER)
    content = content.strip()
    first = not any(message["role"] == "user" for message in history)
    if first and not content.startswith(CONVERSATION_START.strip()):
        content = CONVERSATION_START + content
    if content == CONVERSATION_START.strip():
        content = CONVERSATION_START  # the character opens the conversation
    if history and history[-1]["role"] == "user":
        joined = "\n\n".join(part for part in (history[-1]["content"], content) if part)
        history[-1] = {"role": "user", "content": joined}
    elif content:
        history.append({"role": "user", "content": content})


def _later(content: str, seen: View) -> str:
    """The character's own turn in his later history: thoughts, no plan."""
    turn = parse_message(content, seen.dialect, expect_name=seen.character)
    text = view(turn, Reader.SELF_LATER).strip()
    if text and seen.character and turn.name != seen.character:
        return f"{seen.character}: {text}"
    return text


def _answer(
    history: Sequence[Message],
    content: str,
    index: int,
    number: int,
    planned: bool,
    seen: View,
    options: SampleOptions,
) -> Outcome:
    """What becomes of one assistant message."""
    me = seen.character
    turn = parse_message(content.strip(), seen.dialect, expect_name=me)
    if seen.trained is not None and index not in seen.trained:
        return Context("history")
    if not turn.plan and (
        options.plans == "require" or (planned and options.plans == "auto" and seen.trained is None)
    ):
        return Context("no_plan")
    trace = seen.trace_id or f"{seen.original_trace_id}_turn_{number}"
    read = [defect for defect in turn.defects if defect not in (Defect.MISSING_PLAN, Defect.MISSING_NAME)]
    if seen.dialect is not Dialect.HER:
        reply = to_her(content.strip(), seen.dialect, me)
    elif me and not read and turn.name is None:
        plan = f"<{Kind.SYSTEM_THINKING}>{turn.plan}</{Kind.SYSTEM_THINKING}>" if turn.plan else ""
        reply = plan + to_her(content.strip(), Dialect.HER, me)
    else:
        reply = content.strip()
    defects = _defects(reply, me, bool(turn.plan), [defect.value for defect in read])
    if me is None:
        defects = tuple(defect for defect in defects if defect != Defect.MISSING_NAME)
    if problem := _problem(defects, options):
        return Unusable(problem, _says(defects), trace, reply, index)
    return Sample(
        trace_id=trace,
        original_trace_id=seen.original_trace_id,
        turn_index=number if seen.turn_index is None else seen.turn_index,
        history_turns=sum(message["role"] == "assistant" for message in history),
        messages=(*history, {"role": "assistant", "content": reply}),
        character=me or "",
        book=seen.book,
        conversation_id=seen.conversation_id,
        source=seen.source,
        has_plan=bool(turn.plan),
        defects=defects,
    )
