"""What a character may remember of his book: passages found by the last messages of the dialogue.

CoSER's repository searches with embeddings from an endpoint of its own; here it is BM25 over words, so that nothing but
the book is needed. What is searched is the same: the plots in which the character appears.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.roleplay.dialects import Dialect, parse_message
from her_nemo.roleplay.measures import words
from her_nemo.roleplay.views import Reader, view

# By CoSER's names: (kind of passage, how many are shown).
TARGETS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "raw_text": (("text", 1),),
    "expr1": (("experience", 1),),
    "expr3": (("experience", 3),),
    "conv1": (("conversation", 1),),
    "expr3_conv1": (("experience", 3), ("conversation", 1)),
    "expr10_conv1": (("experience", 10), ("conversation", 1)),
}
HEADINGS = {
    "text": "From the book",
    "experience": "What you have lived through",
    "conversation": "An earlier conversation",
}
CHUNK, OVERLAP = 1000, 200  # characters
K1, B = 1.5, 0.75  # Robertson and Zaragoza 2009


class Passages:
    """Texts that can be searched: Okapi BM25 over words."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self._counts = [Counter(words(text)) for text in self.texts]
        self._lengths = [counts.total() for counts in self._counts]
        self._mean = sum(self._lengths) / len(self._lengths) if self._lengths else 0.0
        self._holding = Counter(word for counts in self._counts for word in counts)

    def search(self, query: str, count: int) -> list[str]:
        """The `count` best passages, in the order in which they were given. Equal ones: the earlier first."""
        scores = [self._score(set(words(query)), place) for place in range(len(self.texts))]
        best = sorted(range(len(self.texts)), key=lambda place: (-scores[place], place))[:count]
        return [self.texts[place] for place in sorted(best)]

    def _score(self, query: set[str], place: int) -> float:
        counts, total = self._counts[place], 0.0
        norm = K1 * (1 - B + B * self._lengths[place] / self._mean) if self._mean else K1
        for word in sorted(query & counts.keys()):
            rarity = (len(self.texts) - self._holding[word] + 0.5) / (self._holding[word] + 0.5)
            total += math.log(1 + rarity) * counts[word] * (K1 + 1) / (counts[word] + norm)
        return total


@dataclass(frozen=True)
class Memory:
    """What one character can look up in one scene."""

    passages: Mapping[str, Passages]
    target: str

    def recall(self, query: str) -> str:
        """The passages of each kind that fit the query best, under their headings."""
        parts = []
        for kind, count in TARGETS[self.target]:
            found = self.passages[kind].search(query, count)
            if found:
                parts.append("\n\n".join([f"# {HEADINGS[kind]}", *found]))
        return "\n\n".join(parts)


class Library:
    """The books of a directory, as CoSER's `BOOK.json` files; each is read once."""

    def __init__(self, directory: str | Path, target: str, *, held_out: bool) -> None:
        """
        Args:
            target: a key of TARGETS.
            held_out: whether plots that are for testing, the scene's own among them, may be found (as upstream does).
        """
        self.directory, self.target, self.held_out = Path(directory), target, held_out
        self._books: dict[str, Mapping[str, Any]] = {}
        self._memories: dict[tuple[str, int | None, str], Memory | None] = {}

    def memory(self, book: str, plot: int | None, name: str) -> Memory | None:
        """What `name` can look up in a scene of plot `plot`; None where the book has no such character.

        Raises:
            UserError: the book is not there, or not of CoSER's form.
        """
        key = (book, plot, name)
        if key not in self._memories:
            self._memories[key] = self._memory(book, plot, name)
        return self._memories[key]

    def _memory(self, book: str, plot: int | None, name: str) -> Memory | None:
        try:
            body = self._book(book)
            datasets = body["character_datasets"].get(name)
            if datasets is None:
                return None
            involved = {
                entry["i_p"] for key in ("plots", "conversations", "utterances") for entry in datasets[key]
            }
            if not self.held_out:
                ends = [end for end in (body.get("split_plot_index"), plot) if end is not None]
                involved = {index for index in involved if index < min(ends, default=len(body["plots"]))}
            plots = [body["plots"][index] for index in sorted(involved)]
            kinds = dict(TARGETS[self.target])
            texts = {
                "text": lambda: [part for entry in plots for part in chunks(entry["text"])],
                "experience": lambda: [part for entry in plots for part in chunks(_experience(entry, name))],
                "conversation": lambda: [
                    part
                    for entry in plots
                    for c in entry["conversation"]
                    for part in chunks(_conversation(entry, c))
                ],
            }
            return Memory({kind: Passages(texts[kind]()) for kind in kinds}, self.target)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"books={self.directory}: {book}.json is not a book of CoSER's form ({type(error).__name__}: {error})"
            ) from error

    def _book(self, book: str) -> Mapping[str, Any]:
        if book not in self._books:
            # The public files have names such as king_lear.json too.
            places = [self.directory / f"{name}.json" for name in (book, book.lower().replace(" ", "_"))]
            place = next((place for place in places if place.is_file()), None)
            if place is None:
                raise UserError(f"books={self.directory}: no {places[0].name}, which the scenes are from")
            try:
                self._books[book] = json.loads(place.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{place}: not JSON ({error})") from error
        return self._books[book]


def chunks(text: str, size: int = CHUNK, overlap: int = OVERLAP) -> list[str]:
    """Pieces of at most `size` characters that end between words; each begins `overlap` before the end of the last."""
    text = text.strip()
    found, start = [], 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            blank = max(text.rfind(" ", start + overlap + 1, end), text.rfind("\n", start + overlap + 1, end))
            end = blank if blank > 0 else end
        found.append(text[start:end].strip())
        if end == len(text):
            break
        begin = text.find(" ", end - overlap, end)
        start = begin + 1 if begin >= 0 else end - overlap
    return found


def _experience(plot: Mapping[str, Any], name: str) -> str:
    role = next((c.get("experience", "") for c in plot["key_characters"] if c.get("name") == name), "")
    return f"{plot['summary']}\n{name}: {role}" if role else plot["summary"]


def _conversation(plot: Mapping[str, Any], conversation: Mapping[str, Any]) -> str:
    """A conversation as anyone there heard it: without thoughts."""
    lines = [
        f"{turn['character']}: {view(parse_message(turn['message'], Dialect.COSER), Reader.JUDGE_COSER).strip()}"
        for turn in conversation["dialogues"]
    ]
    return "\n".join([plot["summary"], conversation["scenario"], "", *lines])
