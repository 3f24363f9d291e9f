"""What can be measured of the text of replies: leaks, repetition, how alike they are. Pure, without torch.

The vitals of an evaluation, the rule rewards and the diversity control of PPO all measure here. Words are
runs of letters and digits, in lower case; writing without blanks (Chinese, Japanese) counts by the character.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter
from collections.abc import Sequence

from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.turn import Turn
from her_nemo.roleplay.views import Reader, view

# Runs of thought this short ("I see", "Not now") may well be said aloud too, and tell nothing.
VERBATIM_WORDS = 6
_BLEU_ORDER = 4
# Kana and the CJK ideographs with their extensions.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_UNSPACED_SIGN = re.compile(rf"[{_UNSPACED}]")
# A Chinese word has 1.7 characters in running text: six words are about ten characters.
_CHARACTER_WEIGHT, _WORD_WEIGHT = 6, 10
_SIMPLE_STRIP = re.compile(r"<(system_thinking|role_thinking)>.*?</\1>", re.DOTALL)
_TAG_LIKE = re.compile(r"</?[A-Za-z_]+>")


def words(text: str) -> list[str]:
    """The words of a text, in lower case; each Chinese or Japanese character is one."""
    return _WORD.findall(text.lower())


def pattern_of(turn: Turn) -> str:
    """The order of a turn's segment kinds, "system_thinking role_action speech"; a malformed turn's is kept apart."""
    kinds = " ".join(kind.value for kind in turn.pattern)
    return kinds if turn.well_formed else f"malformed: {kinds}"


def leaks(turn: Turn, secrets: Sequence[str] = ()) -> bool:
    """Whether something hidden shows, or would in a front end that only strips well-formed thinking tags.

    True when any of these holds:
    1. text that the parser reads as thought is left standing once every exact `<system_thinking>...
       </system_thinking>` and `<role_thinking>...</role_thinking>` is cut out, as simple front ends do: a
       thought that is unclosed, has a mangled tag, or has lost its opening tag;
    2. a whole thought of `VERBATIM_WORDS` words or more (ten Chinese characters) stands word for word in the
       user's view;
    3. one of `secrets` stands in the user's view as a whole word (or run of words).
    A thought written without any tag cannot be told from speech and is not found.
    """
    left_standing = bytearray(b"\1") * len(turn.text)
    for found in _SIMPLE_STRIP.finditer(turn.text):
        left_standing[found.start() : found.end()] = bytes(found.end() - found.start())
    for segment in turn.segments:
        if segment.kind.private:
            span = range(segment.start, segment.end)
            shown = "".join(turn.text[place] for place in span if left_standing[place])
            if words(_TAG_LIKE.sub(" ", shown)):
                return True
    visible = words(view(turn, Reader.USER))
    thoughts = [words(segment.text) for segment in turn.segments if segment.kind.private]
    hidden = [text for text in thoughts if _long_enough(text)] + [words(word) for word in secrets]
    return any(contains_words(visible, text) for text in hidden)


def _long_enough(text: Sequence[str]) -> bool:
    weights = (_CHARACTER_WEIGHT if _UNSPACED_SIGN.match(word) else _WORD_WEIGHT for word in text)
    return sum(weights) >= VERBATIM_WORDS * _WORD_WEIGHT


def speaks_for(turn: Turn, others: Sequence[str]) -> bool:
    """Whether a turn says or does something in the name of one of `others`.

    True when, in what can be seen and heard, a line or a sentence of speech begins with such a name and a colon
    (`Tomas: Yes.`), or an action begins with the name as its subject (`*Tomas nods*`, not `*Tomas's cup falls*`).
    A turn whose own name prefix is another's does so too. What is said about others inside its own sentences is
    not found.
    """
    names = [re.escape(name.strip()) for name in others if name.strip()]
    if not names:
        return False
    if turn.name is not None and any(same_name(turn.name, name) for name in others):
        return True
    either = "|".join(sorted(names, key=len, reverse=True))
    prefix = re.compile(rf"(?:^|[\n.!?\u3002\uff01\uff1f\u201d\"])\s*(?:{either})\s*[:\uff1a]", re.IGNORECASE)
    subject = re.compile(rf"\s*(?:{either})(?:\s+\w|(?!\u7684)[{_UNSPACED}])", re.IGNORECASE)
    for segment in turn.segments:
        if segment.kind is Kind.SPEECH and prefix.search(segment.text):
            return True
        if segment.kind is Kind.ROLE_ACTION and (subject.match(segment.text) or prefix.search(segment.text)):
            return True
    return False


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """Mean BLEU-4 of each text against all the others (Zhu et al. 2018, arXiv 1802.01886), in [0, 1].

    1 means that all texts are alike. Exact, not sampled, and not smoothed: a text that shares no 4-gram with
    any other counts 0. Texts of fewer than four words use the orders they have; empty ones count 0.
    """
    return sum(bleu_to_others(texts)) / len(texts) if texts else 0.0


def bleu_to_others(texts: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-4 of each text against all the others, as in `self_bleu`: 1 for a copy; 0 for one text alone."""
    if len(texts) < 2:
        return [0.0] * len(texts)
    tables = [_best_two(texts, order) for order in range(1, _BLEU_ORDER + 1)]
    lengths = sorted(len(text) for text in texts)
    return [_bleu(index, text, tables, lengths) for index, text in enumerate(texts)]


def distinct(texts: Sequence[Sequence[str]], order: int) -> float:
    """Distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams over all n-grams of all texts."""
    found = [gram for text in texts for gram in grams(text, order)]
    return len(set(found)) / len(found) if found else 0.0


def repetition(text: Sequence[str], order: int = 4) -> float:
    """Share of a text's n-grams that repeat an earlier one of the same text; 0 when it has none."""
    found = grams(text, order)
    return 1 - len(set(found)) / len(found) if found else 0.0


def contains_words(text: Sequence[str], part: Sequence[str]) -> bool:
    """Whether the words of `part`, at least one, stand in `text` one after the other."""
    size = len(part)
    return size > 0 and any(text[at : at + size] == part for at in range(len(text) - size + 1))


def grams(text: Sequence[str], order: int) -> list[tuple[str, ...]]:
    """The n-grams of a text, in order, repeats included."""
    return [tuple(text[at : at + order]) for at in range(len(text) - order + 1)]


def _best_two(texts: Sequence[Sequence[str]], order: int) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """For each n-gram: its largest count in one text, that text's index, and its largest count elsewhere.

    This is all that clipping against "all the other texts" needs, at linear instead of quadratic cost.
    """
    best: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for index, text in enumerate(texts):
        for gram, count in Counter(grams(text, order)).items():
            most, owner, second = best.get(gram, (0, -1, 0))
            best[gram] = (count, index, most) if count > most else (most, owner, max(second, count))
    return best


def _bleu(
    index: int,
    text: Sequence[str],
    tables: Sequence[dict[tuple[str, ...], tuple[int, int, int]]],
    lengths: Sequence[int],
) -> float:
    orders = min(len(tables), len(text))
    if not orders:
        return 0.0
    log_precision = 0.0
    for order in range(1, orders + 1):
        counts = Counter(grams(text, order))
        matched = 0
        for gram, count in counts.items():
            most, owner, second = tables[order - 1][gram]
            matched += min(count, second if owner == index else most)
        if not matched:
            return 0.0
        log_precision += math.log(matched / counts.total()) / orders
    closest = _closest_other(len(text), lengths)
    brevity = 0.0 if len(text) >= closest else 1 - closest / len(text)
    return math.exp(log_precision + brevity)


def _closest_other(length: int, lengths: Sequence[int]) -> int:
    """The length nearest to `length` among the sorted `lengths`, one entry of `length` itself left out; the
    shorter of two equally near."""
    at = bisect.bisect_left(lengths, length)
    others = [lengths[place] for place in (at - 1, at + 1) if 0 <= place < len(lengths)]
    return min(others, key=lambda other: (abs(other - length), other))
