"""One scene of CoSER's benchmark, played: an agent for each character, the Environment, and who speaks next.

Every agent has a conversation of its own. What others see of a turn goes through roleplay/views.py, so a thought
reaches nobody but its thinker, however it is written.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from her_nemo.data.readers.coser import ENVIRONMENT
from her_nemo.data.synthesis.prompt_files import PromptFile
from her_nemo.evaluation.coser_protocol import END_CHAT, FIRST_END_ROUND, Protocol
from her_nemo.evaluation.coser_scenes import CoserScene, Given
from her_nemo.evaluation.endpoint import RoleModel
from her_nemo.evaluation.results import Failure, Line
from her_nemo.evaluation.retrieval import Library
from her_nemo.roleplay.dialects import Dialect, to_her
from her_nemo.roleplay.layouts import Layout, RolePrompt
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.prompt import (
    CONTROL_TOKENS,
    CONVERSATION_START,
    Message,
    Utterance,
    build_messages,
    render_utterance,
)
from her_nemo.roleplay.views import Reader

BRIEF = "Be as brief as people are when they talk: 60 words at most."
UNFILLED_PASSAGES = "{retrieved_knowledge}"
ASKED_BY = 3  # messages of the prompt that passages are looked up by
NONE = ""  # no next speaker could be read from an answer, or it said "random"
_LONGEST_PREDICTION = 1500  # characters; HER's fork reads nothing from longer answers
_FIELD = re.compile(r"next\s+speaker[\s*#:\-]*(?:is\b[\s*:]*)?([^\n*]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Play:
    """What does not change between the scenes of a run."""

    protocol: Protocol
    layout: Layout
    models: Mapping[str, RoleModel]  # actor, environment, next_speaker
    environment_prompt: PromptFile
    next_speaker_prompt: PromptFile
    max_rounds: int
    continue_from: int
    seed: int
    library: Library | None = None  # with retrieval


@dataclass
class Simulation:
    """A dialogue as far as it came.

    Attributes:
        lines: all messages; the first `given` are the data's.
        actor_messages: messages of characters that count in the score.
        ended: `end_chat`, `rounds` (max_rounds were played) or `failed`.
        failure: why it is not complete.
        predictions: whom the next-speaker model named after each message; NONE where it named nobody who could come.
        truncated: replies cut off at max_tokens.
    """

    lines: list[Line] = field(default_factory=list)
    given: int = 0
    actor_messages: int = 0
    ended: str = "rounds"
    failure: Failure | None = None
    predictions: list[str] = field(default_factory=list)
    truncated: int = 0


@dataclass
class _Heard:
    """What has been said, for the prompts: turns in HER's tags, and what the next-speaker model answered to each."""

    turns: list[Utterance] = field(default_factory=list)
    answers: list[tuple[str, bool]] = field(default_factory=list)  # (what it remembers, was it valid)


async def simulate(scene: CoserScene, play: Play, run: int) -> Simulation:
    """Play a scene.

    Args:
        run: number of the repetition; part of every cache key and of the random choices.

    Raises:
        UserError: when going on makes no sense. A failed call ends the scene, not the run.
    """
    done, heard = Simulation(), _Heard()
    prefix = min(play.continue_from, len(scene.dialogue))
    by_data = play.protocol.first_from_data or (prefix and play.protocol.prefix_speakers)
    speaker = scene.dialogue[0].speaker if by_data else scene.speakers[0]
    for turn in range(play.max_rounds):
        if turn < prefix:
            if play.protocol.prefix_speakers:
                speaker = scene.dialogue[turn].speaker
            _take_given(done, heard, scene, speaker, scene.dialogue[turn], play.protocol)
        elif (failure := await _speak(done, heard, scene, play, speaker, run)) is not None:
            return _failed(done, failure)
        if turn + 1 == play.max_rounds:
            break
        if turn < prefix and turn + 1 < len(scene.dialogue):
            answer = scene.dialogue[turn + 1].speaker
        elif turn < prefix and not play.protocol.prefix_speakers:
            answer = END_CHAT
        else:
            asked = await _ask_next(heard, scene, play, run)
            if isinstance(asked, Failure):
                return _failed(done, asked)
            answer = asked
        following = _next(done, heard, scene, play, speaker, answer, turn, run, given=turn < prefix)
        if following == END_CHAT:
            done.ended = "end_chat"
            return done
        speaker = following
    return done


def _failed(done: Simulation, failure: Failure) -> Simulation:
    done.ended, done.failure = "failed", failure
    return done


def _take_given(
    done: Simulation, heard: _Heard, scene: CoserScene, speaker: str, given: Given, protocol: Protocol
) -> None:
    done.lines.append(Line(speaker, given.message, "given", scene.dialect.value))
    heard.turns.append(Utterance(speaker, to_her(given.message, scene.dialect)))
    done.given += 1
    done.actor_messages += protocol.count_given and speaker != ENVIRONMENT


async def _speak(
    done: Simulation, heard: _Heard, scene: CoserScene, play: Play, speaker: str, run: int
) -> Failure | None:
    """The speaker's next message, or why there is none."""
    environment = speaker == ENVIRONMENT
    model = play.models["environment" if environment else "actor"]
    if environment:
        messages = environment_messages(scene, play, heard.turns)
    else:
        messages = actor_messages(scene, play, speaker, heard.turns)
    answer = await model.complete(messages, draw=run)
    if isinstance(answer, Failure):
        return answer
    text = clean(answer.text)
    done.truncated += answer.finish_reason == "length"
    dialect = Dialect.HER if environment else play.layout.dialect
    done.lines.append(Line(speaker, text, "environment" if environment else "actor", dialect.value))
    done.actor_messages += not environment and bool(text)  # an empty one earns no credit
    heard.turns.append(Utterance(speaker, text if dialect is Dialect.HER else to_her(text, dialect)))
    return None


async def _ask_next(heard: _Heard, scene: CoserScene, play: Play, run: int) -> str | Failure:
    """What the next-speaker model says."""
    messages = next_speaker_messages(scene, play, heard.turns, heard.answers, run)
    answer = await play.models["next_speaker"].complete(messages, draw=run)
    return answer if isinstance(answer, Failure) else clean(answer.text)


def _next(
    done: Simulation,
    heard: _Heard,
    scene: CoserScene,
    play: Play,
    speaker: str,
    answer: str,
    turn: int,
    run: int,
    *,
    given: bool,
) -> str:
    """Who speaks next: the one named if he may, else another at random; END_CHAT from the sixth message on."""
    protocol = play.protocol
    named = answer if given else read_next_speaker(answer, scene.speakers, protocol.reading)
    if given and protocol.prefix_speakers:
        valid = True
    elif named == END_CHAT:
        valid = turn >= FIRST_END_ROUND
    else:
        valid = named in scene.speakers and named != speaker
    done.predictions.append(named if valid else NONE)
    if valid:
        heard.answers.append((answer, True))
        return named
    heard.answers.append((named or answer, False))
    others = sorted({*scene.main, ENVIRONMENT} & set(scene.speakers) - {speaker})
    others = others or sorted(set(scene.speakers) - {speaker})
    return random.Random(f"{play.seed} {scene.scene_id} {run} {turn}").choice(others)


def read_next_speaker(answer: str, speakers: Sequence[str], reading: str) -> str:
    """The speaker, END_CHAT or NONE that an answer names.

    Args:
        reading: `last_field` takes what follows the last "Next Speaker:", else what stands before the first colon,
            as it is; `anywhere` takes the first name of the list that stands in the field, in the first line, or
            anywhere; `exact` takes the field or the last line if it names one of the list, in any spelling, and no
            other.
    """
    fields = [found.group(1).strip().rstrip(".,!\"'").strip() for found in _FIELD.finditer(answer)]
    field_text = fields[-1] if fields else ""
    if reading == "last_field":
        return field_text or answer.split(":")[0].strip()
    if reading == "anywhere":
        return _named_anywhere(answer, field_text, speakers)
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    text = (field_text or (lines[-1] if lines else "")).strip("*#`\"' ").rstrip(":.")
    if "END CHAT" in text.upper():
        return END_CHAT
    exact = [name for name in speakers if same_name(name, text)]
    inside = exact or [name for name in speakers if re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)]
    return inside[0] if len(inside) == 1 else NONE


def _named_anywhere(answer: str, field_text: str, speakers: Sequence[str]) -> str:
    if len(answer) > _LONGEST_PREDICTION:
        return NONE
    first_line = answer.strip().split("\n")[0].split(":")[0].strip()
    for text in filter(None, (field_text, first_line)):
        for name in speakers:
            if name.lower() in text.lower():
                return name
        if "end chat" in text.lower():
            return END_CHAT
        if "random" in text.lower():
            return NONE
    return next((name for name in speakers if name in answer), NONE)


# ---------------------------------------------------------------- prompts


def actor_messages(scene: CoserScene, play: Play, name: str, turns: Sequence[Utterance]) -> list[Message]:
    """The prompt for a character's next message."""
    profile = scene.profiles.get(name) or f"{name}, a character of {scene.book}."
    prompt = RolePrompt(
        name=name,
        book=scene.book,
        profile=profile,
        background=scene.summary,  # HER's layout shows it, CoSER's does not
        scenario=scene.scenario,
        others=tuple((other, text) for other, text in scene.profiles.items() if other != name),
        inner_thoughts=scene.motivations.get(name, ""),
    )
    system = prompt.text(play.layout)
    if play.protocol.brief:
        system += f"\n\n{BRIEF}"
    messages = build_messages(system, name, turns, play.layout, mine=play.protocol.own_history)
    if play.library is not None:
        passages = _passages(scene, play, name, [message["content"] for message in messages[1:]])
        if passages:
            messages[0]["content"] = _before_requirements(system, f"===What You Remember===\n{passages}")
    return messages


def _passages(scene: CoserScene, play: Play, name: str, contents: Sequence[str]) -> str:
    """What the character remembers, by the last messages of his prompt."""
    assert play.library is not None
    memory = play.library.memory(scene.book, scene.plot, name)
    if memory is None:
        return UNFILLED_PASSAGES if play.protocol.held_out_found else ""
    return memory.recall("\n\n".join(contents[-ASKED_BY:]))


def _before_requirements(system: str, section: str) -> str:
    before, heading, after = system.rpartition("===Requirements===")
    return f"{before}{section}\n\n{heading}{after}" if heading else f"{system}\n\n{section}"


def environment_messages(scene: CoserScene, play: Play, turns: Sequence[Utterance]) -> list[Message]:
    """The prompt for the Environment's next message."""
    system, closing = play.environment_prompt.messages(
        main=", ".join(name for name in scene.main if name != ENVIRONMENT), scenario=scene.scenario
    )
    return _closed(build_messages(system["content"], ENVIRONMENT, turns, play.layout), closing["content"])


def next_speaker_messages(
    scene: CoserScene,
    play: Play,
    turns: Sequence[Utterance],
    answers: Sequence[tuple[str, bool]],
    run: int = 0,
) -> list[Message]:
    """The prompt for the next-speaker model: each turn as others see it, and what it answered to it."""
    system, closing = play.next_speaker_prompt.messages(
        speakers=", ".join(listed_speakers(scene, play, run)), scenario=scene.scenario
    )
    messages: list[Message] = [system]
    waiting = [CONVERSATION_START.strip()]
    for number, turn in enumerate(turns):
        waiting.append(render_utterance(turn, Reader.OTHER_CHARACTER, play.layout.dialect))
        if number < len(answers):
            said, valid = answers[number]
            messages.append({"role": "user", "content": "\n\n".join(filter(None, waiting))})
            messages.append({"role": "assistant", "content": said})
            waiting = [] if valid or not play.protocol.repeat_instructions else [system["content"]]
    messages.append({"role": "user", "content": "\n\n".join(filter(None, waiting))})
    return _closed(messages, closing["content"])


def listed_speakers(scene: CoserScene, play: Play, run: int) -> tuple[str, ...]:
    """The speakers in the order in which the next-speaker model reads them (Protocol.rotate_speakers)."""
    names = tuple(scene.speakers)
    if not play.protocol.rotate_speakers:
        return names
    digest = hashlib.sha256(f"{play.seed} {scene.scene_id}".encode()).digest()
    first = (int.from_bytes(digest[:8], "big") + run) % len(names)
    return names[first:] + names[:first]


def _closed(messages: Sequence[Message], instruction: str) -> list[Message]:
    """With an instruction at the end of the last user message."""
    *before, last = messages
    if last["role"] != "user":
        return [*messages, {"role": "user", "content": instruction}]
    text = "\n\n".join(filter(None, (last["content"].strip(), instruction)))
    return [*before, {"role": "user", "content": text}]


def clean(text: str) -> str:
    """Without the signs that end a message at the server."""
    while any(token in text for token in CONTROL_TOKENS):  # taking one out may make another
        for token in CONTROL_TOKENS:
            text = text.replace(token, "")
    return text.strip()
