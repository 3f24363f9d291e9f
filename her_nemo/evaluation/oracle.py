"""The miniature world's oracle: scores any reply on separate yes/no principles from the facts of its scene.

Used for evaluation only. No training stage reads the facts or calls this module; a test keeps it that way.
The world's wordings are closed, so every check is a look-up of words, and none asks a model.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from her_nemo.config.errors import UserError
from her_nemo.data.miniature import OBJECTS, STANCES, Scene, StyleKind
from her_nemo.data.miniature_text import ACTIONS, SPEECHES
from her_nemo.roleplay.turn import Kind, Turn, parse_turn

PRINCIPLES = ("well_formed", "plan", "first_person", "action", "speech", "style", "secret", "no_loop")

_FIRST_PERSON = frozenset({"i", "me", "my"})
# The first word of an action names its family; no two stances share one.
_ACTION_FAMILY = {action.split()[0]: stance for stance, actions in ACTIONS.items() for action in actions}
_VISIBLE = (Kind.ROLE_ACTION, Kind.SPEECH)


@dataclass(frozen=True)
class OracleVerdict:
    """Which principles a reply keeps, and their share, in [0, 1]."""

    principles: dict[str, bool]
    score: float


def load_scenes(path: str | Path) -> dict[str, Scene]:
    """Facts of the test scenes (`<world>/oracle/test_scenes.jsonl`) by trace id.

    Raises UserError naming file and line when the file is missing or a line is not a scene.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file. It is written with the miniature world; give the world's folder."
        )
    scenes: dict[str, Scene] = {}
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                scene = Scene.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: not a scene of the miniature world ({error!r})") from error
            scenes[scene.trace_id] = scene
    return scenes


def score_reply(scene: Scene, reply: str) -> OracleVerdict:
    """Scores `reply` (as generated, without the end-of-turn token). Never raises on malformed text.

    A principle that needs a missing part is broken: text without a plan or without anything visible keeps no
    secret and avoids no loop, because it is no reply.
    """
    turn = parse_turn(reply, expect_plan=True, expect_name=scene.name)
    speeches = [
        segment.text.strip() for segment in turn.segments if segment.kind is Kind.SPEECH and not segment.blank
    ]
    is_reply = bool(turn.plan) and any(
        segment.kind in _VISIBLE and not segment.blank for segment in turn.segments
    )
    checks = {
        "well_formed": turn.well_formed,
        "plan": _plan_is_right(scene, turn),
        "first_person": _thought_is_first_person(scene, turn),
        "action": _actions_fit(scene, turn),
        "speech": _speech_answers(scene, " ".join(speeches)),
        "style": _style_kept(scene, speeches),
        "secret": is_reply and _secret_kept(scene, turn),
        "no_loop": is_reply and not has_loop(turn),
    }
    return OracleVerdict(checks, sum(checks.values()) / len(checks))


def words(text: str) -> list[str]:
    """The words of `text` in lower case."""
    return re.findall(r"[a-z]+", text.lower())


def _contains(text: list[str], part: list[str]) -> bool:
    return any(text[start : start + len(part)] == part for start in range(len(text) - len(part) + 1))


def _plan_is_right(scene: Scene, turn: Turn) -> bool:
    """Third person, about the right character, and with the right stance as its only conclusion."""
    plan = words(turn.plan)
    named = _contains(plan, words(scene.name))
    concluded = [after for word, after in itertools.pairwise(plan) if word == "should" and after in STANCES]
    return named and not _FIRST_PERSON & set(plan) and set(concluded) == {scene.stance}


def _thought_is_first_person(scene: Scene, turn: Turn) -> bool:
    thoughts = [words(segment.text) for segment in turn.segments if segment.kind is Kind.ROLE_THINKING]
    own_name = words(scene.name)
    return bool(thoughts) and all(
        _FIRST_PERSON & set(text) and not _contains(text, own_name) for text in thoughts
    )


def _actions_fit(scene: Scene, turn: Turn) -> bool:
    """Each action is of the right stance's family, and none of its words is of another's."""
    actions = [words(segment.text) for segment in turn.segments if segment.kind is Kind.ROLE_ACTION]
    families = [{_ACTION_FAMILY[word] for word in action if word in _ACTION_FAMILY} for action in actions]
    return bool(families) and all(family == {scene.stance} for family in families)


def _speech_answers(scene: Scene, speech: str) -> bool:
    """A wording of the right stance with the object spoken of; no other object and no other stance."""
    said = words(speech)
    if any(word in OBJECTS and word != scene.object for word in said):
        return False
    taken = {
        stance
        for stance, wordings in SPEECHES.items()
        if any(_contains(said, words(wording.format(o=scene.object))) for wording in wordings)
    }
    return taken == {scene.stance}


def _style_kept(scene: Scene, speeches: list[str]) -> bool:
    """The habitual phrase opens the first speech or ends the last one."""
    if not speeches:
        return False
    phrase = words(scene.style_phrase)
    if scene.style_kind == StyleKind.OPENS:
        return words(speeches[0])[: len(phrase)] == phrase
    return words(speeches[-1])[-len(phrase) :] == phrase


def _secret_kept(scene: Scene, turn: Turn) -> bool:
    """Neither the hidden thing nor its place in any part that others see or hear."""
    visible = words(turn.text_of(*_VISIBLE))
    return scene.secret_object not in visible and scene.secret_place not in visible


def has_loop(turn: Turn) -> bool:
    """Whether any run of three words or more follows itself, or any shorter run follows itself twice.

    Looked for in each kind of segment by itself, with the segments of a kind joined.
    """
    for kind in Kind:
        text = words(" ".join(segment.text for segment in turn.segments if segment.kind is kind))
        for length in range(1, len(text) // 2 + 1):
            times = 2 if length >= 3 else 3
            for start in range(len(text) - times * length + 1):
                run = text[start : start + length]
                if all(text[start + k * length : start + (k + 1) * length] == run for k in range(1, times)):
                    return True
    return False
