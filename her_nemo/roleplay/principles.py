"""Principles of good role-play: what judges and the generative reward model are told to look for.

The shipped library is `principles.yaml` beside this file; `her-nemo data synthesise stage=principles` distils
others from preference pairs into the same form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any


class Dimension(StrEnum):
    """What a principle is about: the twelve dimensions of HER."""

    CHARACTER = "Character Development"
    RELATIONSHIP = "Relationship Development"
    EMOTION = "Emotional Expression"
    ACTION = "Action Description"
    ATMOSPHERE = "Atmosphere & Environment"
    DIALOGUE = "Dialogue & Interaction"
    NARRATIVE = "Narrative & Plot"
    CONFLICT = "Conflict & Tension"
    DETAILS = "Details & Description"
    OVERALL = "Overall Quality"
    SAFETY = "Safety & Boundaries"
    WORLDVIEW = "Worldview Consistency"


class Level(StrEnum):
    """How much one has to read to judge by a principle."""

    SENTENCE = "sentence"
    SESSION = "session"


class Polarity(StrEnum):
    """Whether a good reply does it, or a bad one."""

    POSITIVE = "positive"
    NEGATIVE = "negative"


@dataclass(frozen=True)
class Principle:
    """One thing to judge by. `support` is how many cases it was distilled from, 0 when it was written by hand."""

    dimension: Dimension
    name: str
    definition: str
    level: Level
    polarity: Polarity
    support: int = 0

    @property
    def key(self) -> str:
        """A short name that is the same in every run: `dialogue-interaction/subtext`."""
        return f"{_slug(self.dimension)}/{_slug(self.name)}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-")


def parse_library(text: str) -> tuple[Principle, ...]:
    """The principles of a library file (YAML: dimension -> list of name, definition, level, polarity).

    Raises:
        ValueError: naming the dimension or principle that is wrong, or that comes twice.
    """
    import yaml

    try:
        body: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    if not isinstance(body, dict):
        raise ValueError("not a library of principles: the file has no dimensions")
    found: dict[str, Principle] = {}
    for dimension, entries in body.items():
        if dimension not in list(Dimension):
            raise ValueError(f"no dimension {dimension!r}; there are {', '.join(Dimension)}")
        for entry in entries or ():
            try:
                principle = Principle(
                    Dimension(dimension),
                    entry["name"],
                    entry["definition"],
                    Level(entry["level"]),
                    Polarity(entry["polarity"]),
                    entry.get("support", 0),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{dimension}, {entry!r}: {type(error).__name__}: {error}") from error
            if principle.key in found:
                raise ValueError(f"{principle.key} comes twice")
            found[principle.key] = principle
    return tuple(found.values())


def write_library(principles: Iterable[Principle]) -> str:
    """A library file, read back by `parse_library`: by dimension, in the order given."""
    import yaml

    body: dict[str, list[dict[str, Any]]] = {}
    given = list(principles)
    for dimension in Dimension:
        entries = [
            {
                "name": principle.name,
                "definition": principle.definition,
                "level": principle.level.value,
                "polarity": principle.polarity.value,
                **({"support": principle.support} if principle.support else {}),
            }
            for principle in given
            if principle.dimension is dimension
        ]
        if entries:
            body[dimension.value] = entries
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=1000)


@cache
def shipped_library() -> tuple[Principle, ...]:
    """The library that comes with her_nemo."""
    return parse_library(resources.files(__package__).joinpath("principles.yaml").read_text(encoding="utf-8"))
