"""The arithmetic of MiniMax's Role-Play Bench: flaws of the character's turns to scores in [0, 100].

The dataset card (MiniMaxAI/role-play-bench) gives the six dimensions, how they make three categories, and the
categories' weights; judge prompts and the step from flaws to a score are unpublished. Ours: a turn loses the
severity of its worst flaw, out of five, and a dimension's score is 100 times what its turns keep on average. So
it does not depend on how long a session is or how it is cut into chunks, and needs no clamping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

MAX_SEVERITY = 5


class Category(StrEnum):
    """What the judge is asked about in one call."""

    WORLDS = "worlds"
    STORIES = "stories"
    PREFERENCES = "preferences"


class Dimension(StrEnum):
    """What is scored."""

    BASICS = "basics"
    LOGIC = "logic"
    KNOWLEDGE = "knowledge"
    DIVERSITY = "diversity"
    CONTENT_LOGIC = "content_logic"
    INTERACTION = "interaction"


WEIGHTS: Mapping[Category, float] = MappingProxyType(
    {Category.WORLDS: 0.5, Category.STORIES: 0.25, Category.PREFERENCES: 0.25}
)
DIMENSIONS: Mapping[Category, tuple[Dimension, ...]] = MappingProxyType(
    {
        Category.WORLDS: (Dimension.BASICS, Dimension.LOGIC, Dimension.KNOWLEDGE),
        Category.STORIES: (Dimension.DIVERSITY, Dimension.CONTENT_LOGIC),
        Category.PREFERENCES: (Dimension.INTERACTION,),
    }
)
# The judge names a kind; the dimension follows from it.
KINDS: Mapping[str, Dimension] = MappingProxyType(
    {
        "garbled_text": Dimension.BASICS,
        "mixed_language": Dimension.BASICS,
        "severe_repetition": Dimension.BASICS,
        "broken_format": Dimension.BASICS,
        "reference_confusion": Dimension.LOGIC,
        "contradiction": Dimension.LOGIC,
        "spatial_error": Dimension.LOGIC,
        "world_law_broken": Dimension.KNOWLEDGE,
        "wrong_fact": Dimension.KNOWLEDGE,
        "impossible_knowledge": Dimension.KNOWLEDGE,
        "stock_phrasing": Dimension.DIVERSITY,
        "plot_loop": Dimension.DIVERSITY,
        "stagnation": Dimension.DIVERSITY,
        "incoherent_plot": Dimension.CONTENT_LOGIC,
        "out_of_character": Dimension.CONTENT_LOGIC,
        "speaks_for_user": Dimension.INTERACTION,
        "ignores_user": Dimension.INTERACTION,
        "over_refusal": Dimension.INTERACTION,
    }
)


def kinds_of(category: Category) -> tuple[str, ...]:
    """The kinds of flaw that belong to a category, in the order of `KINDS`."""
    return tuple(kind for kind, dimension in KINDS.items() if dimension in DIMENSIONS[category])


@dataclass(frozen=True)
class Flaw:
    """One misalignment that the judge found.

    Attributes:
        kind: a key of `KINDS`.
        turns: numbers of the character's turns that have it, at least one.
        severity: 1 (a reader might not notice) to 5 (the illusion is gone).
        quote: the judge's words from one of those turns.
        explanation: why it is one.
        quote_found: whether the quote stands in one of those turns. A flaw counts either way: the verdict is the
            judge's; how often his quotes are not found is reported beside the scores.
    """

    kind: str
    turns: tuple[int, ...]
    severity: int
    quote: str
    explanation: str
    quote_found: bool = True

    @property
    def dimension(self) -> Dimension:
        return KINDS[self.kind]


@dataclass(frozen=True)
class JudgedChunk:
    """One category's verdict on one chunk: the character's turns in it, and their flaws."""

    category: Category
    turns: tuple[int, ...]
    flaws: tuple[Flaw, ...]


@dataclass(frozen=True)
class SessionScores:
    """Scores of one session, each in [0, 100]; None where nothing of it could be judged."""

    dimensions: Mapping[Dimension, float | None]
    categories: Mapping[Category, float | None]
    overall: float | None

    def as_dict(self) -> dict[str, float | None]:
        """All by name, overall first."""
        return {
            "overall": self.overall,
            **{category.value: self.categories[category] for category in Category},
            **{dimension.value: self.dimensions[dimension] for dimension in Dimension},
        }


def lost(flaws: Iterable[Flaw], dimension: Dimension, turns: Sequence[int]) -> float:
    """What these turns lose in a dimension: the sum over turns of the worst severity / 5."""
    worst = dict.fromkeys(turns, 0)
    for flaw in flaws:
        if flaw.dimension is dimension:
            for turn in flaw.turns:
                if turn in worst:
                    worst[turn] = max(worst[turn], flaw.severity)
    return sum(worst.values()) / MAX_SEVERITY


def score_session(chunks: Sequence[JudgedChunk]) -> SessionScores:
    """Scores from the verdicts that were got; a chunk whose verdict failed is not among them.

    A category is the mean of its dimensions; overall is 0.5 Worlds + 0.25 Stories + 0.25 Preferences, and is
    None unless all three are known: a missing category is no average one.
    """
    dimensions: dict[Dimension, float | None] = {}
    categories: dict[Category, float | None] = {}
    for category, members in DIMENSIONS.items():
        judged = [chunk for chunk in chunks if chunk.category is category]
        turns = sum(len(chunk.turns) for chunk in judged)
        for dimension in members:
            gone = math.fsum(lost(chunk.flaws, dimension, chunk.turns) for chunk in judged)
            dimensions[dimension] = 100 * (1 - gone / turns) if turns else None
        scores = [dimensions[dimension] for dimension in members]
        categories[category] = mean_or_none(scores)
    overall = None
    if all(score is not None for score in categories.values()):
        overall = math.fsum(WEIGHTS[category] * (score or 0.0) for category, score in categories.items())
    return SessionScores(dimensions, categories, overall)


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean, or None if there is none or one is missing."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def chunks_of(last: int, first: int, size: int) -> list[tuple[int, ...]]:
    """Turn numbers first..last in runs of `size`; the last run may be shorter.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"chunks of {size} turns")
    return [tuple(range(at, min(at + size, last + 1))) for at in range(first, last + 1, size)]
