"""One conversation being played: its turns, who is told what of them, and what may be done to them. No I/O.

The model plays one character, the lead. His own history is what `SELF_LATER` sees; whoever else a model plays (the
partner) is told what `OTHER_CHARACTER` sees of every turn, his own among them: no thought ever reaches it. A person
may write any turn, the lead's too. A turn may have several candidates, one of which counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from her_nemo.chat.scenes import Scene
from her_nemo.config.errors import UserError
from her_nemo.data.readers.coser import ENVIRONMENT
from her_nemo.roleplay.dialects import Dialect, parse_message, to_her
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.prompt import (
    CONTROL_TOKENS,
    Layout,
    Message,
    RolePrompt,
    Utterance,
    build_messages,
    render_utterance,
)
from her_nemo.roleplay.styles import named_pieces
from her_nemo.roleplay.turn import Defect, Turn, parse_turn, render_segment
from her_nemo.roleplay.views import VIEWS, Reader, view

ENVIRONMENT_PROFILE = (
    "The surroundings of the scene: what happens, what can be seen and heard, and what people do who have no part of "
    "their own. It has no thoughts and no wishes."
)
PARTNER_REQUIREMENTS = (
    "Write only {name}'s next turn, a few sentences at most: his name, a colon, then what he says aloud. Visible "
    "actions stand between <role_action> and </role_action>. Write no thoughts, and never speak or act for {lead}."
)
# What a reply of the lead may lack without being wrong: not every model plans.
HARMLESS = frozenset((Defect.MISSING_PLAN,))
_USER = VIEWS[Reader.USER]
_UNFINISHED_TAG = re.compile(r"[<\uff1c][^<>\uff1c\uff1e]{0,80}\Z")


class Author(StrEnum):
    """Who wrote a candidate."""

    SCENE = "scene"  # the row that the scene was read from
    MODEL = "model"
    PARTNER = "partner"  # the model, or another one, in the part of somebody else
    PERSON = "person"
    EDIT = "edit"  # a person, on the grounds of another candidate


@dataclass(frozen=True)
class Candidate:
    """One text of a turn, as it was written. `finished`: it was not cut off."""

    text: str
    author: Author
    finished: bool = True


@dataclass(frozen=True)
class PlayedTurn:
    """One turn. `candidates[chosen]` is the one that counts."""

    speaker: str
    candidates: tuple[Candidate, ...]
    chosen: int = 0

    @property
    def candidate(self) -> Candidate:
        return self.candidates[self.chosen]

    @property
    def text(self) -> str:
        return self.candidate.text


@dataclass
class ChatSession:
    """A conversation that begins with the first turns of a scene.

    Attributes:
        lead: whom the model plays.
        session_id: tells this conversation from others in the same scene.
        layout: of system prompts that are made from sections.
        own_partner: whether the model that plays the lead plays the others too. It is then told what is required in
            its own words, since it may know no other way to answer.
        turns: what was played, the scene's own turns first.
        revision: counts changes.
    """

    scene: Scene
    lead: str
    session_id: str
    layout: Layout = Layout.HER
    own_partner: bool = True
    turns: list[PlayedTurn] = field(default_factory=list)
    revision: int = 0

    @classmethod
    def begin(
        cls,
        scene: Scene,
        lead: str,
        session_id: str,
        *,
        turns: int | None = None,
        layout: Layout = Layout.HER,
        own_partner: bool = True,
    ) -> ChatSession:
        """A new conversation.

        Args:
            turns: turns of the scene's own conversation to begin after; None: those before the lead's first one.

        Raises:
            UserError: the model cannot play `lead`, or the scene has not so many turns.
        """
        part = scene.part(lead)
        count = part.begins_at if turns is None else turns
        if count > len(scene.history):
            raise UserError(f"turns={count}: the scene {scene.scene_id!r} has {len(scene.history)}")
        session = cls(scene, part.name, session_id, layout, own_partner)
        for utterance in scene.history[:count]:
            session.turns.append(PlayedTurn(utterance.speaker, (Candidate(utterance.text, Author.SCENE),)))
        return session

    # ------------------------------------------------------------ who speaks

    @property
    def others(self) -> tuple[str, ...]:
        """Everyone but the lead."""
        seen = dict.fromkeys([*(turn.speaker for turn in self.turns), *self.scene.names])
        return tuple(name for name in seen if not same_name(name, self.lead))

    def is_lead(self, name: str) -> bool:
        return same_name(name, self.lead)

    def spelt(self, name: str) -> str:
        """`name` as the scene spells it.

        Raises:
            UserError: it is empty, or cannot stand before a colon as a name.
        """
        name = " ".join(name.split())
        for known in (self.lead, *self.others):
            if same_name(known, name):
                return known
        if not name or len(name) > 60 or re.search(r"[:<>*\[\]]", name):
            raise UserError(f"{name!r} is no name: at most 60 signs, without a colon, a star or brackets")
        return name

    def next_speaker(self) -> str:
        """Who would answer: the lead after anyone else, and after the lead who spoke last before him."""
        if self.turns and not self.is_lead(self.turns[-1].speaker):
            return self.lead
        before = [turn.speaker for turn in self.turns if not self.is_lead(turn.speaker)]
        return before[-1] if before else self.others[0]

    # ------------------------------------------------------------ what models are told

    def prompt_for(self, speaker: str, before: int | None = None) -> list[Message]:
        """What a model is told for `speaker`'s turn number `before` (None: the next one)."""
        turns = self.turns[:before]
        if self.is_lead(speaker):
            heard = [Utterance(turn.speaker, turn.text) for turn in turns]
            return build_messages(self.scene.part(self.lead).system, self.lead, heard, self.layout)
        # Everything he is told has been seen by OTHER_CHARACTER: thoughts of his own would be another model's.
        heard = []
        for turn in turns:
            seen = render_utterance(Utterance(turn.speaker, turn.text), Reader.OTHER_CHARACTER)
            if seen:
                heard.append(Utterance(turn.speaker, seen))
        return build_messages(self._partner_prompt(speaker), speaker, heard, self.layout)

    def _partner_prompt(self, name: str) -> RolePrompt:
        """What a model is told of the part of somebody else. Never what the lead thinks or wants."""
        part = next((part for part in self.scene.parts if same_name(part.name, name)), None)
        lead = self.scene.part(self.lead).prompt
        if part is not None and part.prompt is not None:
            prompt = part.prompt
        else:
            others = lead.others if lead else ()
            about = next((text for other, text in others if same_name(other, name)), "")
            nameless = ENVIRONMENT_PROFILE if same_name(name, ENVIRONMENT) else ""
            present = [(other, text) for other, text in others if not same_name(other, name)]
            prompt = RolePrompt(
                name=name,
                book=self.scene.book or "an unnamed scene",
                profile=about or nameless or f"{name} is in the scene with {self.lead}.",
                background=lead.background if lead else "",
                scenario=lead.scenario if lead else self.scene.setting,
                others=((self.lead, lead.profile if lead else ""), *present),
            )
        if self.own_partner and lead is not None:
            return replace(prompt, requirements=lead.requirements)
        return replace(prompt, requirements=PARTNER_REQUIREMENTS.format(name=name, lead=self.lead))

    # ------------------------------------------------------------ turns

    def say(self, speaker: str, text: str) -> int:
        """A turn that a person writes: in HER's tags, or with `*actions*`. Returns its number.

        Raises:
            UserError: nobody would notice it, or it cannot be written.
        """
        speaker = self.spelt(speaker)
        self.turns.append(PlayedTurn(speaker, (Candidate(as_typed(speaker, text), Author.PERSON),)))
        return self._changed()

    def add(self, speaker: str, text: str, *, finished: bool = True) -> int:
        """A turn that a model wrote. Returns its number.

        Raises:
            UserError: the model wrote nothing.
        """
        candidate = Candidate(checked(text.strip()), self._author(speaker), finished)
        self.turns.append(PlayedTurn(speaker, (candidate,)))
        return self._changed()

    def add_alternative(self, number: int, text: str, *, finished: bool = True, choose: bool = True) -> int:
        """Another text that a model wrote for a turn. Returns the number of the candidate.

        Raises:
            UserError: the model wrote nothing, or once more what is there, or there is no such turn.
        """
        turn = self.turn(number)
        candidate = Candidate(checked(text.strip()), self._author(turn.speaker), finished)
        for index, there in enumerate(turn.candidates, start=1):
            if (there.text, there.finished) == (candidate.text, finished):
                raise UserError(
                    f"the model wrote text {index} again, word for word: a higher sampling.temperature lets it vary"
                )
        return self._append(number, candidate, choose=choose)

    def edit(self, number: int, text: str) -> int:
        """Another text that a person wrote for a turn, in HER's tags. Returns the number of the candidate.

        Raises:
            UserError: it is empty or cannot be written.
        """
        turn = self.turn(number)
        text = named(turn.speaker, checked(text.strip()))
        if text == turn.text:
            return turn.chosen
        return self._append(number, Candidate(text, Author.EDIT), choose=True)

    def choose(self, number: int, candidate: int) -> None:
        """Let another candidate of a turn count."""
        turn = self.turn(number)
        if not 0 <= candidate < len(turn.candidates):
            raise UserError(f"turn {number + 1} has {len(turn.candidates)} texts, none is number {candidate + 1}")
        if candidate != turn.chosen:
            self.turns[number] = replace(turn, chosen=candidate)
            self._settle_after(number)
            self._changed()

    def rewind(self, count: int) -> None:
        """Keep the first `count` turns only.

        Raises:
            UserError: there are not so many.
        """
        if not 0 <= count <= len(self.turns):
            raise UserError(f"cannot go back to {count} turns: there are {len(self.turns)}")
        del self.turns[count:]
        self._changed()

    def turn(self, number: int) -> PlayedTurn:
        """Turn `number`, from 0."""
        if not 0 <= number < len(self.turns):
            raise UserError(f"there is no turn {number + 1}: there are {len(self.turns)}")
        return self.turns[number]

    def _author(self, speaker: str) -> Author:
        return Author.MODEL if self.is_lead(speaker) else Author.PARTNER

    def _append(self, number: int, candidate: Candidate, *, choose: bool) -> int:
        turn = self.turns[number]
        candidates = (*turn.candidates, candidate)
        last = len(candidates) - 1
        self.turns[number] = replace(turn, candidates=candidates, chosen=last if choose else turn.chosen)
        if choose:
            self._settle_after(number)
        self._changed()
        return last

    def _settle_after(self, number: int) -> None:
        """Later turns keep the text that counts: their other candidates answered what is no longer there."""
        for later in range(number + 1, len(self.turns)):
            turn = self.turns[later]
            self.turns[later] = PlayedTurn(turn.speaker, (turn.candidate,))

    def _changed(self) -> int:
        self.revision += 1
        return len(self.turns) - 1


# ---------------------------------------------------------------- texts


def checked(text: str) -> str:
    """`text`, if it can stand in a message.

    Raises:
        UserError: it is empty, not valid text, or has one of the chat template's own tokens.
    """
    if not text.strip():
        raise UserError("the turn is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the turn has half of a sign (a lone surrogate): it cannot be written") from None
    for token in CONTROL_TOKENS:
        if token in text:
            raise UserError(f"the turn contains {token}, which ends or begins a message")
    return text


def as_typed(speaker: str, text: str) -> str:
    """What a person typed as a turn in HER's tags, with `speaker: ` before it. `*..*` is an action.

    Raises:
        UserError: there is nothing in it that anyone could see or hear.
    """
    checked(text)
    turn = parse_message(text.strip(), Dialect.STARRED, expect_plan=True, expect_name=speaker)
    if all(segment.kind.private or segment.blank for segment in turn.segments):
        raise UserError("nobody would notice this turn: say or do something besides thinking")
    return _planned(turn, to_her(text.strip(), Dialect.STARRED, speaker))


def named(speaker: str, text: str) -> str:
    """A turn in HER's tags with `speaker: ` put where it is missing; malformed text is left alone."""
    turn = parse_turn(text, expect_plan=False, expect_name=speaker)
    if turn.name is not None or set(turn.defects) - {Defect.MISSING_NAME}:
        return text
    return _planned(turn, to_her(text, Dialect.HER, speaker))


def _planned(turn: Turn, rest: str) -> str:
    return (render_segment(Kind.SYSTEM_THINKING, turn.plan) if turn.plan else "") + rest


# ---------------------------------------------------------------- what a person sees


@dataclass(frozen=True)
class Shown:
    """A piece of a turn. `folded`: the user's view has no place for it, so it waits until the person unfolds it."""

    kind: Kind
    text: str

    @property
    def folded(self) -> bool:
        return not _USER.sees(self.kind)


def pieces_of(speaker: str, text: str) -> list[Shown]:
    """A turn in order, without blank segments, and without its name where that is the speaker's."""
    turn = parse_turn(text, expect_plan=False, expect_name=speaker)
    foreign = turn.name is not None and not same_name(turn.name, speaker)
    return [
        Shown(kind, piece.strip())
        for kind, piece, is_name in named_pieces(turn, with_name=foreign)
        if is_name or piece.strip()
    ]


def pieces_so_far(speaker: str, text: str) -> list[Shown]:
    """The same of a turn that is still being written: a tag or a name that is not whole yet is left out."""
    text = _UNFINISHED_TAG.sub("", text)
    turn = parse_turn(text, expect_plan=False, expect_name=speaker)
    shown = pieces_of(speaker, text)
    if turn.name is None and shown and shown[-1].kind is Kind.SPEECH and f"{speaker}:".startswith(shown[-1].text):
        shown.pop()
    return shown


def user_text(speaker: str, text: str) -> str:
    """What a person sees with everything folded."""
    return view(parse_turn(text, expect_plan=False, expect_name=speaker), Reader.USER)


def defects_of(speaker: str, text: str) -> tuple[str, ...]:
    """What is wrong with a turn of the lead, as it would be trained on."""
    found: Sequence[Defect] = parse_turn(text, expect_plan=True, expect_name=speaker).defects
    return tuple(defect.value for defect in found if defect not in HARMLESS)


def problem_with(lead: str, candidate: Candidate) -> str | None:
    """Why a text of the lead's cannot be trained on; None where it can."""
    if not candidate.finished:
        return "cut off before its end"
    defects = defects_of(lead, candidate.text)
    if defects:
        return "malformed: " + ", ".join(defects)
    found = [token for token in CONTROL_TOKENS if token in candidate.text]
    return f"contains {found[0]}, which ends or begins a message" if found else None


def problem_of(session: ChatSession, turn: PlayedTurn) -> str | None:
    """The same of a turn: None for turns of others and for the scene's own, of which no sample is made."""
    if not session.is_lead(turn.speaker) or turn.candidate.author is Author.SCENE:
        return None
    return problem_with(session.lead, turn.candidate)
