"""Settings: what a character does that his profile does not explain is looked up in the book, and only added."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from pydantic import Field

from her_nemo.config.synthesis import Settings
from her_nemo.data.synthesis import language
from her_nemo.data.synthesis.asker import Answer, Asked, Asker, Fault
from her_nemo.data.synthesis.part import CharacterPart
from her_nemo.data.synthesis.prompt_files import PromptFile
from her_nemo.data.synthesis.runner import Unit
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.tags import find_tags
from her_nemo.roleplay.turn import parse_turn

EVIDENCE_WORDS = 5  # shorter runs stand in any book by chance
MIN_CHARACTERS, MAX_CHARACTERS = 20, 400  # of one addition
QUOTED_RUN = 8
PASSAGE_CHARACTERS = 1200


class Gap(Answer):
    """Something a turn rests on that the actor was not told."""

    turn: int
    behaviour: str = Field(min_length=1)
    question: str = Field(min_length=1)


class GapsAnswer(Answer):
    """What the prompt settings_gaps asks for."""

    gaps: list[Gap]


class Addition(Answer):
    """What the book says to a gap."""

    gap: int
    found: bool
    text: str
    evidence: str


class LookupAnswer(Answer):
    """What the prompt settings_lookup asks for."""

    additions: list[Addition]


def unit(
    part: CharacterPart, asker: Asker, gaps_prompt: PromptFile, lookup_prompt: PromptFile, rules: Settings
) -> Unit[str]:
    """The work on one character of one conversation: the profile with what was added."""

    async def work() -> tuple[str, Sequence[Asked]]:
        profile, source = part.character.profile, part.conversation.source_text
        if not source.strip():
            return profile, ()
        messages = gaps_prompt.messages(**part.given(), lines=part.lines(), max_additions=rules.max_additions)
        found = await asker.ask(
            gaps_prompt, messages, GapsAnswer, lambda answer: check_gaps(part, answer, rules)
        )
        gaps = found.answer.gaps
        if not gaps:
            return profile, found.trace
        messages = lookup_prompt.messages(
            name=part.character.name,
            book=part.conversation.book,
            profile=profile,
            gaps=gaps,
            passages=passages(
                source, [f"{gap.behaviour} {gap.question}" for gap in gaps], rules.source_characters
            ),
            min_words=EVIDENCE_WORDS,
            min_characters=MIN_CHARACTERS,
            max_characters=MAX_CHARACTERS,
        )
        given = await asker.ask(
            lookup_prompt, messages, LookupAnswer, lambda answer: check_additions(part, gaps, answer)
        )
        return extended(profile, given.answer), [*found.trace, *given.trace]

    return Unit(part.name, work)


def check_gaps(part: CharacterPart, answer: GapsAnswer, rules: Settings) -> list[Fault]:
    """Turns of this character, and not too many."""
    faults = []
    if len(answer.gaps) > rules.max_additions:
        message = f"{len(answer.gaps)} gaps, at most {rules.max_additions}: keep the weightiest"
        faults.append(Fault("too_many", message))
    numbers = {index + 1 for index in part.my_turns}
    for gap in answer.gaps:
        if gap.turn not in numbers:
            faults.append(Fault("wrong_turn", f"turn {gap.turn} is not one of {part.character.name}'s"))
    return faults


def check_additions(part: CharacterPart, gaps: Sequence[Gap], answer: LookupAnswer) -> list[Fault]:
    """Each question answered once; what was found is in the book, is about the character, and is new."""
    faults = []
    numbers = [addition.gap for addition in answer.additions]
    if sorted(numbers) != list(range(1, len(gaps) + 1)):
        message = f"answer the questions 1 to {len(gaps)}, each once (answered: {numbers})"
        faults.append(Fault("wrong_gap", message))
    for addition in answer.additions:
        for fault in _addition_faults(part, addition):
            faults.append(Fault(fault.kind, f"question {addition.gap}: {fault.message}"))
    return faults


def _addition_faults(part: CharacterPart, addition: Addition) -> list[Fault]:
    text, evidence = addition.text.strip(), addition.evidence.strip()
    if not addition.found:
        said = text or evidence
        return [Fault("not_found", '"found" is false, so "text" and "evidence" stay empty')] if said else []
    faults = []
    quoted = language.words(evidence)
    if len(quoted) < EVIDENCE_WORDS or not _stands_in(quoted, language.words(part.conversation.source_text)):
        message = f"the evidence is not in the passages word for word: {evidence[:80]!r}"
        faults.append(Fault("no_evidence", message))
    if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        limits = f"{MIN_CHARACTERS} to {MAX_CHARACTERS}"
        faults.append(Fault("addition_length", f"the text has {len(text)} characters, not {limits}"))
    tags, unknown = find_tags(text)
    if tags or unknown:
        faults.append(Fault("tag_in_text", "the text contains a tag"))
    if language.latin(text) and language.first_person(text):
        faults.append(Fault("first_person", "the text must be about the character, in the third person"))
    if _stands_in(language.words(text), language.words(part.character.profile)):
        faults.append(Fault("repeats_profile", "the profile says this already"))
    for index in part.my_turns:
        turn = part.conversation.turns[index]
        said = parse_turn(turn.text, expect_plan=False, expect_name=turn.speaker)
        run = language.shared_run(text, said.text_of(Kind.SPEECH, Kind.ROLE_THINKING), QUOTED_RUN)
        if run:
            faults.append(Fault("quotes_reply", f"the text quotes the conversation: {run!r}"))
    return faults


def _stands_in(run: Sequence[str], words: Sequence[str]) -> bool:
    """Is `run` a run of `words`?"""
    return bool(run) and f" {' '.join(run)} " in f" {' '.join(words)} "


def extended(profile: str, answer: LookupAnswer) -> str:
    """The profile as it was, and after it what was found."""
    found = [addition.text.strip() for addition in answer.additions if addition.found]
    if not found:
        return profile
    return (f"{profile}\n\n" if profile.strip() else profile) + "\n".join(found)


def passages(source: str, questions: Sequence[str], most: int) -> list[str]:
    """The source text, or of a long one the passages that share most with the questions, in the book's order.

    Passages are scored by the rare words they share (inverse document frequency); `most` is in characters.
    """
    pieces = _pieces(source)
    if sum(map(len, pieces)) <= most:
        return pieces
    bags = [Counter(language.words(piece)) for piece in pieces]
    spread = Counter(word for bag in bags for word in bag)
    wanted = {word for question in questions for word in language.words(question)}
    scores = [sum(math.log(len(pieces) / spread[word]) for word in wanted if word in bag) for bag in bags]
    chosen: list[int] = []
    left = most
    for index in sorted(range(len(pieces)), key=lambda i: (-scores[i], i)):
        if len(pieces[index]) <= left:
            chosen.append(index)
            left -= len(pieces[index])
    return [pieces[index] for index in sorted(chosen)]


def _pieces(source: str) -> list[str]:
    """Paragraphs put together to at most PASSAGE_CHARACTERS; a longer one is cut between sentences or words."""
    pieces = [""]
    for paragraph in re.split(r"\n\s*\n", source):
        for sentence in re.findall(
            rf"\S.{{0,{PASSAGE_CHARACTERS - 2}}}(?:\s|\Z)|\S+", paragraph.strip(), re.DOTALL
        ):
            if len(pieces[-1]) + len(sentence) > PASSAGE_CHARACTERS:
                pieces.append("")
            pieces[-1] += sentence
        pieces[-1] = pieces[-1].rstrip() + "\n"
    return [piece.strip() for piece in pieces if piece.strip()]
