"""Role thinking: thoughts added to or deepened in the turns of a chapter, nothing else touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from pydantic import Field

from her_nemo.config.synthesis import RoleThinking
from her_nemo.data.records import Conversation
from her_nemo.data.synthesis import language
from her_nemo.data.synthesis.asker import Answer, Asked, Asker, Fault
from her_nemo.data.synthesis.gold import editable, insert_thoughts
from her_nemo.data.synthesis.prompt_files import PromptFile
from her_nemo.data.synthesis.runner import Unit
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.tags import find_tags
from her_nemo.roleplay.turn import Turn, parse_turn

PRIVATE_RUN = 6  # words of another's thought that nobody arrives at by chance
SURROUNDINGS = ("environment",)


class Part(Answer):
    """A piece of a turn."""

    kind: Literal["role_thinking", "role_action", "speech"]
    text: str = Field(min_length=1)


class EditedTurn(Answer):
    """A whole turn with its new thoughts."""

    turn: int
    parts: list[Part] = Field(min_length=1)


class RoleThinkingAnswer(Answer):
    """What the prompt role_thinking asks for."""

    turns: list[EditedTurn]


@dataclass(frozen=True)
class _Line:
    """A turn in the prompt: its number over the whole chapter, where it stands, and whether it may be edited."""

    number: int
    conversation: int
    index: int
    speaker: str
    turn: Turn
    surroundings: bool

    @property
    def locked(self) -> bool:
        return self.surroundings or not editable(self.turn)

    @property
    def text(self) -> str:
        return self.turn.text[len(self.turn.name_prefix) :] if self.turn.name else self.turn.text


@dataclass(frozen=True)
class Chapter:
    """The conversations of one plot."""

    name: str
    conversations: tuple[Conversation, ...]

    def lines(self) -> list[_Line]:
        """All turns, numbered from 1."""
        found = []
        for c, conversation in enumerate(self.conversations):
            for t, turn in enumerate(conversation.turns):
                parsed = parse_turn(turn.text, expect_plan=False, expect_name=turn.speaker)
                surroundings = turn.speaker.strip().casefold() in SURROUNDINGS
                found.append(_Line(len(found) + 1, c, t, turn.speaker, parsed, surroundings))
        return found


def chapters(conversations: Sequence[Conversation]) -> list[Chapter]:
    """Conversations of the same source, book and plot, together, in order of their first appearance.

    A conversation whose plot is not known is a chapter by itself.
    """
    found: dict[tuple[str, str, str], list[Conversation]] = {}
    for conversation in conversations:
        plot = conversation.plot_index
        place = conversation.conversation_id if plot is None else f"plot {plot}"
        found.setdefault((conversation.source, conversation.book, place), []).append(conversation)
    return [Chapter(" / ".join(part for part in key if part), tuple(group)) for key, group in found.items()]


def unit(chapter: Chapter, asker: Asker, prompt: PromptFile, rules: RoleThinking) -> Unit[list[Conversation]]:
    """The work on one chapter: its conversations with new thoughts."""

    async def work() -> tuple[list[Conversation], Sequence[Asked]]:
        lines = chapter.lines()
        if all(line.locked for line in lines):
            return list(chapter.conversations), ()
        messages = prompt.messages(
            book=chapter.conversations[0].book,
            background=chapter.conversations[0].background,
            conversations=_shown(chapter, lines),
            patterns=_pattern_text(lines),
            min_patterns=min(rules.min_patterns, sum(not line.locked for line in lines)),
            **{key: value for key, value in rules.model_dump().items() if key != "min_patterns"},
        )
        given = await asker.ask(
            prompt, messages, RoleThinkingAnswer, lambda answer: apply(lines, answer, rules)[1]
        )
        texts, faults = apply(lines, given.answer, rules)
        assert not faults
        return _rewritten(chapter, lines, texts), given.trace

    return Unit(chapter.name, work)


def _shown(chapter: Chapter, lines: Sequence[_Line]) -> list[dict[str, object]]:
    return [
        {
            "scenario": conversation.scenario,
            "characters": conversation.characters,
            "turns": [line for line in lines if line.conversation == index],
        }
        for index, conversation in enumerate(chapter.conversations)
    ]


def _pattern_text(lines: Sequence[_Line]) -> str:
    return "; ".join(
        f"[{line.number}] {_written(line.turn.pattern)}" for line in lines if not line.surroundings
    )


def _written(pattern: Sequence[Kind]) -> str:
    return "(" + ", ".join(pattern) + ")"


def apply(
    lines: Sequence[_Line], answer: RoleThinkingAnswer, rules: RoleThinking
) -> tuple[dict[int, str], list[Fault]]:
    """New texts by line number, and everything that is wrong with the answer."""
    by_number = {line.number: line for line in lines}
    texts: dict[int, str] = {}
    faults: list[Fault] = []
    for edit in answer.turns:
        line = by_number.get(edit.turn)
        if line is None or line.locked or edit.turn in texts:
            why = "there is no such turn" if line is None else "it is not to be edited"
            why = "it is given twice" if edit.turn in texts else why
            faults.append(Fault("wrong_turn", f"turn {edit.turn}: {why}"))
            continue
        text, wrong = _edited(line, edit, lines, rules)
        texts[edit.turn] = text
        faults += [
            Fault(fault.kind, f"turn {edit.turn} ({line.speaker}): {fault.message}") for fault in wrong
        ]
    if not faults:
        faults += _pattern_faults(lines, texts, rules)
    return texts, faults


def _edited(
    line: _Line, edit: EditedTurn, lines: Sequence[_Line], rules: RoleThinking
) -> tuple[str, list[Fault]]:
    parts = [(Kind(part.kind), part.text) for part in edit.parts]
    before = [
        segment.text.strip() for segment in line.turn.segments if _is_thought(segment.kind, segment.text)
    ]
    after = [text.strip() for kind, text in parts if kind is Kind.ROLE_THINKING]
    faults = []
    if len(after) < len(before):
        message = f"had {len(before)} thought(s) and has {len(after)}: a thought may be deepened, not dropped"
        faults.append(Fault("thought_lost", message))
    for thought in after:
        if thought not in before:
            faults += _thought_faults(thought, line, lines, rules)
    text, changed = insert_thoughts(line.turn, parts)
    return text, [*changed, *faults]


def _is_thought(kind: Kind, text: str) -> bool:
    return kind is Kind.ROLE_THINKING and bool(text.strip())


def _thought_faults(thought: str, line: _Line, lines: Sequence[_Line], rules: RoleThinking) -> list[Fault]:
    """Length, tags, person, mind reading of one new thought."""
    shown = thought if len(thought) <= 60 else thought[:57] + "..."
    faults = []
    if not rules.min_characters <= len(thought) <= rules.max_characters:
        limits = f"{rules.min_characters} to {rules.max_characters}"
        faults.append(
            Fault("thought_length", f"the thought {shown!r} has {len(thought)} characters, not {limits}")
        )
    tags, unknown = find_tags(thought)
    if tags or unknown:
        faults.append(Fault("tag_in_text", f"the thought {shown!r} contains a tag"))
    if language.latin(thought):
        if not language.first_person(thought):
            faults.append(Fault("not_first_person", f"the thought {shown!r} is not in the first person"))
        if language.speaks_of_self_by_name(thought, line.speaker):
            faults.append(Fault("not_first_person", f"the thought {shown!r} names its own thinker"))
    others = {other.speaker for other in lines if not other.surroundings} - {line.speaker}
    for sentence in language.mind_reading(thought, others):
        message = (
            f"states as a fact what another thinks or feels: {sentence!r}. Make it a guess or leave it out"
        )
        faults.append(Fault("mind_reading", message))
    for other in lines:
        if other.speaker == line.speaker:
            continue
        run = language.shared_run(thought, other.turn.text_of(Kind.ROLE_THINKING), PRIVATE_RUN)
        if run:
            message = f"repeats what only {other.speaker} thought (turn {other.number}): {run!r}"
            faults.append(Fault("mind_reading", message))
    return faults


def _pattern_faults(lines: Sequence[_Line], texts: Mapping[int, str], rules: RoleThinking) -> list[Fault]:
    """The chapter as a whole: enough patterns, none too often in a row (within a conversation)."""
    patterns: dict[int, tuple[Kind, ...]] = {}
    for line in lines:
        if not line.surroundings:
            text = texts.get(line.number, line.turn.text)
            patterns[line.number] = parse_turn(text, expect_plan=False, expect_name=line.speaker).pattern
    faults = []
    needed = min(rules.min_patterns, sum(not line.locked for line in lines))
    different = len(set(patterns.values()))
    if different < needed:
        message = f"only {different} different patterns in the chapter, {needed} are needed"
        faults.append(Fault("few_patterns", f"{message}: vary where the thoughts stand"))
    spoken = [line for line in lines if not line.surroundings]
    for (_, pattern), run in groupby(spoken, key=lambda line: (line.conversation, patterns[line.number])):
        numbers = [line.number for line in run]
        # A run of turns that nobody may edit cannot be broken.
        free = any(not line.locked for line in spoken if line.number in numbers)
        if len(numbers) > rules.max_same_running and free:
            message = f"turns {', '.join(map(str, numbers))} all have the pattern {_written(pattern)}"
            faults.append(Fault("pattern_run", f"{message}; at most {rules.max_same_running} in a row may"))
    return faults


def _rewritten(chapter: Chapter, lines: Sequence[_Line], texts: Mapping[int, str]) -> list[Conversation]:
    turns = [list(conversation.turns) for conversation in chapter.conversations]
    for line in lines:
        if line.number in texts:
            old = turns[line.conversation][line.index]
            turns[line.conversation][line.index] = replace(old, text=texts[line.number])
    return [
        replace(conversation, turns=tuple(new))
        for conversation, new in zip(chapter.conversations, turns, strict=True)
    ]
