"""What can be checked about a thought or a plan by its words alone. English, and what is language-free.

These are nets with a known mesh: they catch plain statements, not every paraphrase. What they catch is certain
enough to be worth a retry.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

_FIRST_PERSON = re.compile(r"\b(?:i|i'm|i'll|i've|i'd|me|my|mine|myself|we|us|our|ours|ourselves)\b")
_WORD = re.compile(r"\w+(?:'\w+)*")
_QUOTED = re.compile(r"\"[^\"]*\"|(?<!\w)'[^']*'(?!\w)")
_SENTENCE = re.compile(r"[^.!?;\u2026]+[.!?;\u2026]*")
_STATES = (
    r"(?:thinks?|knows?|feels?|believes?|wants?|wishes|wonders?|hopes?|fears?|intends?|plans?|hates?|loves?|"
    r"suspects?|remembers?|regrets?|desires?|despises?|longs|realizes?|realises?)"
)
_HEDGE = re.compile(
    r"\b(?:perhaps|maybe|might|may|must|could|would|should|seems?|seemed|appears?|looks?|sounds?|suspect|guess|"
    r"suppose|imagine|think|believe|fear|hope|wonder|doubt|sense|surely|probably|likely|if|whether|unless|as if|"
    r"as though|says?|said|told|swears?|claims?|can|does|do|did|will|let|never|not|who|what|how|why)\b"
)

_AFTERTHOUGHT = re.compile(
    r",\s*(?:perhaps|maybe|surely|probably|no doubt|it seems|i (?:think|fear|hope|suppose|suspect|guess|believe))\b"
)


def fold(text: str) -> str:
    """Lower case, straight quotes, NFKC: for comparing only."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})


def words(text: str) -> list[str]:
    """Folded words, without marks."""
    return _WORD.findall(fold(text))


def latin(text: str) -> bool:
    """Is this mostly in the Latin alphabet? The English checks say nothing about other writing."""
    letters = [char for char in text if char.isalpha()]
    return sum("LATIN" in unicodedata.name(char, "") for char in letters) > len(letters) / 2


def first_person(text: str) -> bool:
    """Does the text speak of I or we, outside quotation marks?"""
    return bool(_FIRST_PERSON.search(_QUOTED.sub(" ", fold(text))))


def mind_reading(text: str, others: Iterable[str]) -> Iterator[str]:
    """Sentences that state as a fact what another thinks or feels: a name or he/she/they, then a verb of mind.

    A sentence with a hedge (perhaps, seems, I suspect, a question) is a guess and passes.
    """
    names = "|".join(re.escape(fold(name)) for name in others if name.strip())
    subject = rf"(?:{names}|he|she|they)" if names else r"(?:he|she|they)"
    stated = re.compile(rf"\b{subject}\s+(?:\w+ly\s+|still\s+|already\s+|only\s+|now\s+)?{_STATES}\b")
    for sentence in _SENTENCE.findall(_QUOTED.sub(" ", fold(text))):
        found = stated.search(sentence)
        if found is None or "?" in sentence:
            continue
        # A hedge counts before the statement, or as an afterthought ("he knows, I fear").
        if not (_HEDGE.search(sentence[: found.start()]) or _AFTERTHOUGHT.search(sentence[found.end() :])):
            yield " ".join(sentence.split())


def speaks_of_self_by_name(text: str, name: str) -> bool:
    """`Edmund thinks ...` in Edmund's own thought."""
    return bool(re.search(rf"\b{re.escape(fold(name))}\s+{_STATES}\b", fold(text)))


def shared_run(text: str, other: str, length: int, known: str = "") -> str:
    """The first run of `length` words of `text` that also stands in `other` and not in `known`; '' without one."""

    def runs(of: str) -> list[tuple[str, ...]]:
        found = words(of)
        return [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]

    wanted = set(runs(other)) - set(runs(known))
    return next((" ".join(run) for run in runs(text) if run in wanted), "")
