"""Scenes to play: who is in them, what the model is told for each part, and the turns they begin with.

From any file that `data ingest` reads, from rows of messages (samples, prompts, pairs), or made: the miniature world.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.data.miniature import make_splits, sample_scenes
from her_nemo.data.miniature_text import prompt_messages
from her_nemo.data.readers import recognise, unknown_format
from her_nemo.data.readers.coser import ENVIRONMENT
from her_nemo.data.readers.items import ReadOptions, View
from her_nemo.data.readers.messages import character_of, checked_messages
from her_nemo.data.readers.rows import Malformed, RawRow, Rejected, raw_rows
from her_nemo.data.records import Conversation, Sample
from her_nemo.data.samples import SampleOptions, role_prompt, samples_of_view
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.prompt import CONVERSATION_START, Message, RolePrompt, Utterance

MINIATURE_SCENES = 24
SOMEONE = "User"  # who speaks in messages that name nobody
_TITLE = 110  # characters
_PREFIX = re.compile(r"\s*([^\s:<>\n*\[(][^:<>\n]{0,59}):\s")


@dataclass(frozen=True)
class Part:
    """A character whom the model can play, and what it is told."""

    name: str
    system: str | RolePrompt
    begins_at: int  # turns of the scene's own conversation that come before his first one

    @property
    def prompt(self) -> RolePrompt | None:
        """The system prompt in its sections; None where it has none of the known layouts."""
        if isinstance(self.system, RolePrompt):
            return self.system
        try:
            return RolePrompt.parse(self.system)
        except ValueError:
            return None


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        scene_id: the name of the row it was read from.
        title: a line that tells it from others.
        setting: what a person should know before he speaks; nothing of it is a character's secret.
        parts: whom the model can play.
        names: everyone who speaks or is spoken of, parts included, `Environment` where there is one.
        history: the turns of the scene's own conversation, in HER's tags, without plans where the row has none.
    """

    scene_id: str
    title: str
    book: str
    setting: str
    parts: tuple[Part, ...]
    names: tuple[str, ...]
    history: tuple[Utterance, ...] = ()

    def part(self, name: str) -> Part:
        """The part of that name.

        Raises:
            UserError: the model cannot play it.
        """
        found = next((part for part in self.parts if same_name(part.name, name)), None)
        if found is None:
            known = ", ".join(part.name for part in self.parts)
            raise UserError(f"{name!r} is no part of the scene {self.scene_id!r}: the model can play {known}")
        return found


def load_scenes(paths: Sequence[str], count: int, *, plans: bool = True) -> tuple[list[Scene], list[str]]:
    """The first `count` scenes (-1: all) of some files, and what was wrong with the rows that make none.

    Args:
        plans: whether the prompts made from conversations ask for a plan.

    Raises:
        UserError: a file cannot be read, is of no known format, or nothing in all of them makes a scene.
    """
    scenes: list[Scene] = []
    bad: list[str] = []
    for found in chain.from_iterable(_read(path, plans) for path in paths):
        if len(scenes) == count:
            break
        if isinstance(found, Scene):
            scenes.append(found)
        else:
            line = found.place.line_number()
            bad.append(f"{found.place.file}:{line or '?'}: {found.kind}: {found.message}")
    if not scenes:
        shown = "".join(f"\n  {line}" for line in bad[:5])
        raise UserError(f"{', '.join(paths)}: no scene to play in here{shown}")
    return scenes, bad


def miniature_scenes(count: int = MINIATURE_SCENES, seed: int = 0) -> list[Scene]:
    """Scenes of the miniature world, of characters that no training file of world `seed` knows."""
    _, held_out = make_splits(seed)
    scenes = []
    for facts in sample_scenes(seed, "chat", held_out, count):
        messages = prompt_messages(random.Random(f"chat-words-{facts.trace_id}"), facts)
        scenes.append(scene_of_messages(messages, facts.trace_id))
    return scenes


def _read(path: str, plans: bool) -> Iterator[Scene | Rejected]:
    for row in raw_rows(path):
        if isinstance(row, Rejected):
            yield row
        elif isinstance(row.value, dict) and isinstance(row.value.get("messages"), list):
            try:
                yield scene_of_messages(
                    checked_messages(row.value, "messages"),
                    _text(row.value, "trace_id", "id") or row.place.row_name,
                    character=_text(row.value, "character"),
                    book=_text(row.value, "book"),
                )
            except Malformed as problem:
                yield Rejected.of(row.place, problem, 0, None)
        else:
            yield from _read_other(row, plans)


def _text(row: Mapping[str, Any], *keys: str) -> str:
    return next((row[key] for key in keys if isinstance(row.get(key), str) and row[key]), "")


def _read_other(row: RawRow, plans: bool) -> Iterator[Scene | Rejected]:
    format_ = recognise(row.value, "auto")
    if format_ is None or format_.kind == "pairs":
        raise unknown_format(row, "auto")
    for found in format_.read(row, ReadOptions()):
        if isinstance(found, Rejected):
            yield found
            continue
        place, item = found
        try:
            if isinstance(item, Conversation):
                yield scene_of_conversation(item, plans=plans)
            elif isinstance(item, View):
                yield _scene_of_view(item)
        except Malformed as problem:
            yield Rejected.of(place, problem, 0, None)


# ---------------------------------------------------------------- conversations


def scene_of_conversation(conversation: Conversation, *, plans: bool = True) -> Scene:
    """A scene in which the model can play anyone who has a profile or speaks of his own, the Environment excepted.

    Raises:
        Malformed: it has no such character.
    """
    speakers = conversation.speakers
    parts = []
    for character in conversation.characters:
        spoken = [i for i, turn in enumerate(conversation.turns) if turn.speaker == character.name]
        begins_at = spoken[0] if spoken else len(conversation.turns)
        parts.append(Part(character.name, role_prompt(conversation, character.name, plans), begins_at))
    if not parts:
        raise Malformed("no_character", "the conversation names no character whom the model could play")
    topic = conversation.topic or conversation.scenario
    return Scene(
        scene_id=conversation.conversation_id,
        title=shorten(f"{conversation.book}: {topic}" if conversation.book else topic),
        book=conversation.book,
        setting=conversation.scenario,
        parts=tuple(parts),
        names=tuple(dict.fromkeys([*(part.name for part in parts), *speakers])),
        history=tuple(Utterance(turn.speaker, turn.text) for turn in conversation.turns),
    )


# ---------------------------------------------------------------- rows of messages


def scene_of_messages(
    messages: Sequence[Message], scene_id: str, *, character: str = "", book: str = ""
) -> Scene:
    """The scene of a prompt or a sample; a reply at its end is left out, so that the model can give its own.

    Prompts built from the turns of the scene are again those messages, so far as they were in HER's dialect.

    Raises:
        Malformed: nothing says whom the assistant plays, or there is no system prompt.
    """
    if not messages or messages[0]["role"] != "system":
        raise Malformed("role_order", "no system prompt: nothing says what the scene is")
    system = messages[0]["content"]
    prompt = Part("", system, 0).prompt
    name = character or (prompt.name if prompt else "") or character_of(messages, Dialect.HER) or ""
    if not name:
        raise Malformed("no_character", "neither the row nor its system prompt says whom the assistant plays")
    rest = list(messages[1:-1] if messages[-1]["role"] == "assistant" else messages[1:])
    others = [other for other, _ in prompt.others] if prompt else []
    heard = [_body(message) for message in rest if message["role"] == "user"]
    named = [found[1].strip() for text in heard if (found := _PREFIX.match(text))]
    known = list(dict.fromkeys([*others, *named, ENVIRONMENT]))
    history: list[Utterance] = []
    for message in rest:
        if message["role"] == "assistant":
            history.append(Utterance(name, message["content"]))
        else:
            history += _utterances(_body(message), known, (others or [SOMEONE])[0])
    speakers = [utterance.speaker for utterance in history]
    setting = shorten(prompt.scenario or prompt.background, width=_TITLE // 2) if prompt else ""
    everyone = tuple(dict.fromkeys([name, *(speakers if named else []), *others]))
    return Scene(
        scene_id=scene_id,
        title=shorten(f"{name} ({book or prompt.book})" if prompt else name, setting, heard[-1] if heard else ""),
        book=book or (prompt.book if prompt else ""),
        setting="\n\n".join(text for text in (prompt.background, prompt.scenario) if text) if prompt else "",
        parts=(Part(name, system, len(history)),),
        names=everyone if len(everyone) > 1 else (name, SOMEONE),
        history=tuple(history),
    )


def _body(message: Message) -> str:
    return message["content"].removeprefix(CONVERSATION_START.strip()).strip()


def _utterances(text: str, known: Sequence[str], fallback: str) -> list[Utterance]:
    """A user message as the turns it was merged from: one begins where a known name does, after a blank line."""
    names = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    turns: list[Utterance] = []
    for piece in re.split(rf"\n\n(?=(?:{names}):\s)", text):
        found = re.match(rf"(?:{names})(?=:\s)", piece)
        if piece:
            turns.append(Utterance(found[0] if found else fallback, piece))
    return turns


def _scene_of_view(seen: View) -> Scene:
    """By way of the samples it makes: messages in HER's dialect, as one would be trained on them."""
    made = [found for found in samples_of_view(seen, SampleOptions()) if isinstance(found, Sample)]
    if not made:
        raise Malformed("no_reply", "no reply of it could be trained on")
    last = made[-1]
    return scene_of_messages(last.messages, last.original_trace_id, character=last.character, book=last.book)


def shorten(*parts: str, width: int = _TITLE) -> str:
    """The parts in one line, at most `width` characters."""
    text = " · ".join(" ".join(part.split()) for part in parts if part.strip())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
