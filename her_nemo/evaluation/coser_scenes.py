"""CoSER's test scenes as the benchmark plays them (Wang et al. 2025, arXiv 2502.09082).

`data/readers/coser.py` reads the same file for training; what is kept here besides is who counts as a main character,
the order of speakers and what the plot says of each character, on which the protocols of the benchmark rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.data.readers.coser import ENVIRONMENT
from her_nemo.roleplay.dialects import Dialect

_HER_TAGS = re.compile(r"</?role_(?:thinking|action)>")


@dataclass(frozen=True)
class Given:
    """One message of the data."""

    speaker: str
    message: str


@dataclass(frozen=True)
class CoserScene:
    """One given circumstance.

    Attributes:
        scene_id: BOOK-PLOT-CONVERSATION, as upstream names its cases.
        speakers: who may speak, in the file's order; ENVIRONMENT is always among them.
        main: the characters that the judge looks at.
        profiles: name -> the plot's description and the book's profile; characters without either are left out.
        motivations: name -> what drives the character in this scene.
        dialogue: what was said in the book, written in `dialect`.
    """

    scene_id: str
    book: str
    summary: str
    scenario: str
    topic: str
    speakers: tuple[str, ...]
    main: tuple[str, ...]
    profiles: Mapping[str, str]
    motivations: Mapping[str, str]
    dialogue: tuple[Given, ...]
    dialect: Dialect
    tag: str = ""
    plot: int | None = None  # its place in the book

    @property
    def title(self) -> str:
        return f"{self.book}: {self.topic}" if self.topic else self.book


def read_scenes(path: str | Path, count: int = -1, dialect: str = "auto") -> list[CoserScene]:
    """The scenes of a file, the first `count` of them (-1: all).

    Raises:
        UserError: if it cannot be read or a scene lacks what the benchmark needs; names the scene and the field.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"scenes={path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"scenes={path}: not JSON ({error}); CoSER's test_set.json is a list of scenes") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"scenes={path}: not a list of scenes; CoSER's test_set.json is one")
    rows = rows if count < 0 else rows[:count]
    scenes = []
    for number, row in enumerate(rows):
        try:
            scenes.append(_scene(row, dialect))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"scenes={path}: scene {number} cannot be played: {said}") from error
    names = [scene.scene_id for scene in scenes]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise UserError(f"scenes={path}: {', '.join(double[:5])}: more than one scene of this name")
    return scenes


def _scene(row: Mapping[str, Any], dialect: str) -> CoserScene:
    plot = row["plot"]
    dialogue = tuple(Given(_text(turn["character"]), _text(turn["message"])) for turn in row["dialogues"])
    if not dialogue:
        raise ValueError("'dialogues' is empty")
    speakers = tuple(_text(name) for name in row["speaking_characters_w_env"])
    if ENVIRONMENT not in speakers:
        speakers = (*speakers, ENVIRONMENT)
    strange = sorted({turn.speaker for turn in dialogue} - set(speakers))
    if strange:
        raise ValueError(f"{', '.join(strange)} speaks but is not in 'speaking_characters_w_env'")
    if len(speakers) < 2:
        raise ValueError("nobody but the Environment is in 'speaking_characters_w_env'")
    return CoserScene(
        scene_id=f"{row['book']}-{row.get('i_p', plot.get('i_p'))}-{row.get('i_c')}",
        book=_text(row["book"]),
        summary=_text(plot["summary"]),
        scenario=_text(row["scenario"]),
        topic=_text(row.get("topic", "")),
        speakers=speakers,
        main=tuple(_text(name) for name in row["major_characters"]),
        profiles=_profiles(speakers, row["character_profiles"], plot.get("key_characters", [])),
        motivations={
            c["name"]: _text(c.get("motivation") or c.get("thought") or "") for c in row["key_characters"]
        },
        dialogue=dialogue,
        dialect=_dialect(dialogue, dialect),
        tag=_text(row.get("tag", "")),
        plot=row.get("i_p", plot.get("i_p")),
    )


def _profiles(
    speakers: Iterable[str], profiles: Mapping[str, str], described: Iterable[Mapping[str, str]]
) -> dict[str, str]:
    """The plot's description before the book's profile, for all who speak."""
    descriptions = {entry["name"]: entry.get("description", "") for entry in described}
    found = {}
    for name in speakers:
        if name == ENVIRONMENT:
            continue
        parts = [_text(text or "").strip() for text in (descriptions.get(name), profiles.get(name))]
        text = "\n\n".join(part for part in parts if part)
        if text:
            found[name] = text
    return found


def _dialect(dialogue: Iterable[Given], given: str) -> Dialect:
    if given != "auto":
        return Dialect(given)
    tagged = any(_HER_TAGS.search(turn.message) for turn in dialogue)
    return Dialect.HER if tagged else Dialect.COSER


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
