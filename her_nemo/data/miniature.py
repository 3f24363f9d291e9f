"""The miniature world: its closed word pools, its rule, and the sampling of scenes.

A scene is one character who has just been spoken to. The right reply follows from a two-step rule,

    temperament x relation to the speaker -> mood,      mood x intent of the message -> stance,

and the stance decides which actions and which wordings fit. No sentence of the prompt names the mood or the
stance, so a model must look up two facts, combine them, and combine the result with what was just said. All
of this is a miniature made to be learnt in minutes; it says nothing about how people speak.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

FIRST_NAMES = (
    "Ada", "Bram", "Cora", "Dane", "Edda", "Finn", "Gwen", "Hugo", "Ivy", "Jory",
    "Kit", "Lena", "Milo", "Nora", "Otto", "Pia", "Rolf", "Sara", "Tove", "Ulf",
)  # fmt: skip
LAST_NAMES = (
    "Ash", "Brook", "Croft", "Dale", "Fenn", "Frost", "Gray", "Hale", "Holt", "Lark",
    "Marsh", "Moss", "North", "Penn", "Pike", "Reed", "Stone", "Thorn", "Vale", "Wick",
)  # fmt: skip
OBJECTS = (
    "cart", "lamp", "boat", "horse", "coat", "bell", "drum", "cup",
    "rope", "map", "goat", "sword", "net", "pipe", "saddle", "barrel",
)  # fmt: skip
SECRET_OBJECTS = ("ring", "crown", "letter", "coin", "seal", "gem", "flute", "mask")
SECRET_PLACES = ("bridge", "well", "oak", "barn", "chapel", "cellar", "tower", "hedge")
PLACES = ("market", "harbour", "mill", "inn", "forge", "square", "ferry", "garden")
BOOKS = ("The Salt Road", "The Gray Tide", "The Last Ferry", "The Long Winter")
GOALS = ("gold", "land", "peace", "fame", "rest", "power")
WEATHERS = ("cold", "warm", "wet", "dark", "bright", "windy")

TEMPERAMENTS = ("warm", "proud", "timid", "blunt", "sly", "calm")
RELATIONS = ("friend", "cousin", "master", "rival", "stranger")
MOODS = ("open", "guarded", "bitter", "meek")
INTENTS = ("request", "accuse", "gift", "pry", "threaten", "praise")
STANCES = ("agree", "explain", "thank", "refuse", "deny", "evade", "warn", "yield")

# One row a temperament, one column a relation in the order of RELATIONS.
_MOOD_ROWS = {
    "warm": ("open", "open", "meek", "guarded", "open"),
    "proud": ("open", "guarded", "bitter", "bitter", "bitter"),
    "timid": ("meek", "meek", "meek", "guarded", "guarded"),
    "blunt": ("open", "open", "bitter", "bitter", "bitter"),
    "sly": ("guarded", "meek", "meek", "bitter", "guarded"),
    "calm": ("open", "meek", "guarded", "guarded", "open"),
}
# One row an intent, one column a mood in the order of MOODS.
_STANCE_ROWS = {
    "request": ("agree", "evade", "refuse", "yield"),
    "accuse": ("explain", "deny", "warn", "yield"),
    "gift": ("thank", "evade", "refuse", "thank"),
    "pry": ("explain", "evade", "deny", "agree"),
    "threaten": ("explain", "warn", "refuse", "yield"),
    "praise": ("thank", "evade", "deny", "agree"),
}
MOOD_OF = {
    (temperament, relation): row[column]
    for temperament, row in _MOOD_ROWS.items()
    for column, relation in enumerate(RELATIONS)
}
STANCE_OF = {
    (mood, intent): row[column] for intent, row in _STANCE_ROWS.items() for column, mood in enumerate(MOODS)
}


class StyleKind(StrEnum):
    """Where a character's habitual phrase stands in a speech."""

    OPENS = "opens"
    ENDS = "ends"


STYLES: tuple[tuple[StyleKind, str], ...] = (
    *((StyleKind.OPENS, phrase) for phrase in ("Aye", "Hark", "Truly", "Listen", "Alas")),
    *((StyleKind.ENDS, phrase) for phrase in ("mind you", "mark that", "upon oath", "so be it", "dear one")),
)


@dataclass(frozen=True)
class Exchange:
    """One earlier message and the stance with which it was answered."""

    speaker: str
    relation: str
    intent: str
    object: str
    message_wording: int
    stance: str


@dataclass(frozen=True)
class Scene:
    """All facts of one scene. `relations` tells what every other character present is to this one."""

    trace_id: str
    name: str
    book: str
    temperament: str
    style_kind: str
    style_phrase: str
    goal: str
    secret_object: str
    secret_place: str
    place: str
    weather: str
    relations: dict[str, str]
    speaker: str
    intent: str
    object: str
    message_wording: int
    history: tuple[Exchange, ...]

    @property
    def relation(self) -> str:
        """What the character who spoke last is to this one."""
        return self.relations[self.speaker]

    @property
    def mood(self) -> str:
        """First step of the rule."""
        return MOOD_OF[self.temperament, self.relation]

    @property
    def stance(self) -> str:
        """Second step of the rule: what a right reply does."""
        return STANCE_OF[self.mood, self.intent]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, with the derived mood and stance for readers."""
        return {**asdict(self), "mood": self.mood, "stance": self.stance}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Scene:
        """Inverse of `to_json`. Raises KeyError when a fact is missing."""
        values = {field.name: row[field.name] for field in fields(cls)}
        values["history"] = tuple(Exchange(**exchange) for exchange in row["history"])
        return cls(**values)


Triple = tuple[str, str, str]


@dataclass(frozen=True)
class Split:
    """Which names and which (temperament, relation, intent) triples a split may use."""

    names: tuple[str, ...]
    triples: tuple[Triple, ...]


def make_splits(seed: int, test_name_share: float = 0.15) -> tuple[Split, Split]:
    """Training and test splits of world `seed`, disjoint in full names and in triples.

    Every first and last name, and every pair of (temperament, relation), (temperament, intent) and (relation,
    intent), stays in training, so that a test scene asks for a new combination and never for an unknown word.
    """
    rng = random.Random(f"splits-{seed}")
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(names)
    # Moving along the diagonals of the first x last square spreads the test names evenly over both pools.
    offset = rng.randrange(len(LAST_NAMES))
    diagonals = {
        (offset + step) % len(LAST_NAMES) for step in range(round(test_name_share * len(LAST_NAMES)))
    }
    test_names = {
        f"{first} {LAST_NAMES[(row + diagonal) % len(LAST_NAMES)]}"
        for row, first in enumerate(FIRST_NAMES)
        for diagonal in diagonals
    }
    orders = [rng.sample(range(len(pool)), len(pool)) for pool in (TEMPERAMENTS, RELATIONS, INTENTS)]
    # A Latin square: one intent for each (temperament, relation) is held out, and at most one relation for
    # each (temperament, intent), so that each pair keeps most of its triples.
    test_triples, train_triples = [], []
    for row, temperament in enumerate(TEMPERAMENTS):
        for column, relation in enumerate(RELATIONS):
            for index, intent in enumerate(INTENTS):
                held_out = (orders[0][row] + orders[1][column] + orders[2][index]) % len(INTENTS) == 0
                (test_triples if held_out else train_triples).append((temperament, relation, intent))
    train = Split(tuple(name for name in names if name not in test_names), tuple(train_triples))
    return train, Split(tuple(name for name in names if name in test_names), tuple(test_triples))


HISTORY_SHARES = (0.6, 0.3, 0.1)  # shares of scenes with zero, one and two earlier exchanges
BYSTANDER_SHARE = 0.3  # share of scenes in which a second other character is present
MESSAGE_WORDINGS = 4  # wordings of each intent, see miniature_text.MESSAGES


def sample_scene(rng: random.Random, split: Split, trace_id: str) -> Scene:
    """One scene whose facts all come from `split`."""
    temperament, relation, intent = rng.choice(split.triples)
    people = 3 if rng.random() < BYSTANDER_SHARE else 2
    name, *others = _distinct_names(rng, split.names, people)
    speaker = others[0]
    relations = {speaker: relation}
    for other in others[1:]:
        relations[other] = rng.choice([candidate for candidate in RELATIONS if candidate != relation])
    if rng.random() < 0.5:
        relations = dict(reversed(relations.items()))
    allowed = set(split.triples)
    objects = rng.sample(OBJECTS, 3)
    history = []
    for turn in range(rng.choices((0, 1, 2), HISTORY_SHARES)[0]):
        earlier = rng.choice(others)
        earlier_intent = rng.choice([i for i in INTENTS if (temperament, relations[earlier], i) in allowed])
        stance = STANCE_OF[MOOD_OF[temperament, relations[earlier]], earlier_intent]
        history.append(
            Exchange(
                earlier,
                relations[earlier],
                earlier_intent,
                objects[turn],
                rng.randrange(MESSAGE_WORDINGS),
                stance,
            )
        )
    style_kind, style_phrase = rng.choice(STYLES)
    return Scene(
        trace_id=trace_id,
        name=name,
        book=rng.choice(BOOKS),
        temperament=temperament,
        style_kind=str(style_kind),
        style_phrase=style_phrase,
        goal=rng.choice(GOALS),
        secret_object=rng.choice(SECRET_OBJECTS),
        secret_place=rng.choice(SECRET_PLACES),
        place=rng.choice(PLACES),
        weather=rng.choice(WEATHERS),
        relations=relations,
        speaker=speaker,
        intent=intent,
        object=objects[2],
        message_wording=rng.randrange(MESSAGE_WORDINGS),
        history=tuple(history),
    )


def sample_scenes(seed: int, purpose: str, split: Split, count: int) -> Iterator[Scene]:
    """`count` scenes from their own random stream, so that one file's size changes no other file."""
    rng = random.Random(f"{purpose}-{seed}")
    for index in range(count):
        yield sample_scene(rng, split, f"mini-{purpose}-{index:06d}")


def _distinct_names(rng: random.Random, names: tuple[str, ...], count: int) -> list[str]:
    """Names that share neither first nor last name, so that every word points at one character only."""
    chosen: list[str] = []
    while len(chosen) < count:
        candidate = rng.choice(names)
        if not {word for name in chosen for word in name.split()} & set(candidate.split()):
            chosen.append(candidate)
    return chosen
