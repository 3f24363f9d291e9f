"""Role-play vitals: what can be said of replies without a judge.

They tell a healthy model from one that breaks its format, shows its thoughts, or has collapsed onto one
pattern. They do not say whether a reply is good. Words are runs of letters and digits, in lower case.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from her_nemo.data.patterns import entropy_bits
from her_nemo.roleplay.turn import Kind, Turn, parse_turn
from her_nemo.roleplay.views import Reader, view

# Runs of thought this short ("I see", "Not now") may well be said aloud too, and tell nothing.
VERBATIM_WORDS = 6
_BLEU_ORDER = 4
_WORD = re.compile(r"\w+")
_SIMPLE_STRIP = re.compile(r"<(system_thinking|role_thinking)>.*?</\1>", re.DOTALL)
_TAG_LIKE = re.compile(r"</?[A-Za-z_]+>")


@dataclass(frozen=True)
class Vitals:
    """Figures over a set of replies.

    Attributes:
        replies: how many there are.
        format_valid: share that parse without any defect.
        leak_rate: share for which `leaks` holds.
        pattern_entropy: bits of Shannon entropy of the distribution of patterns over replies; a pattern is
            the order of segment kinds, and a malformed reply's pattern is kept apart from valid ones. Lies in
            [0, log2(replies)]; 0 means that all replies are built alike.
        top1_pattern_share: share of the most frequent pattern.
        self_bleu: see `self_bleu`.
        distinct_1, distinct_2: see `distinct`.
        repetition: mean over replies of the share of 4-grams that stood in the same reply before.
        mean_words: words per reply and kind, absent kinds counted as 0.
        defects: number of replies with each defect.
        top_pattern: the most frequent pattern, written "system_thinking role_action speech".
    """

    replies: int
    format_valid: float
    leak_rate: float
    pattern_entropy: float
    top1_pattern_share: float
    self_bleu: float
    distinct_1: float
    distinct_2: float
    repetition: float
    mean_words: dict[str, float]
    defects: dict[str, int]
    top_pattern: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def vitals(
    replies: Sequence[str],
    *,
    names: Sequence[str | None] | None = None,
    secrets: Sequence[Sequence[str]] | None = None,
    expect_plan: bool = True,
) -> Vitals:
    """Vitals of `replies`, as generated and without the end-of-turn token.

    Args:
        names: the character who should speak in each reply, where known; another name is then a defect.
        secrets: words that must not show in each reply, where known.
        expect_plan: False for models that are not asked to plan.

    Raises:
        ValueError: no replies, or lists of other lengths.
    """
    count = len(replies)
    if not count:
        raise ValueError("vitals of no replies")
    turns = [
        parse_turn(text, expect_plan=expect_plan, expect_name=name)
        for text, name in zip(replies, names or [None] * count, strict=True)
    ]
    leaking = sum(leaks(turn, words) for turn, words in zip(turns, secrets or [()] * count, strict=True))
    texts = [_words(" ".join(turn.text_of(kind) for kind in Kind)) for turn in turns]
    patterns = Counter(_pattern(turn) for turn in turns)
    top_pattern, top_count = patterns.most_common(1)[0]
    return Vitals(
        replies=count,
        format_valid=sum(turn.well_formed for turn in turns) / count,
        leak_rate=leaking / count,
        pattern_entropy=entropy_bits(patterns),
        top1_pattern_share=top_count / count,
        self_bleu=self_bleu(texts),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        repetition=sum(repetition(text) for text in texts) / count,
        mean_words={
            kind.value: sum(len(_words(turn.text_of(kind))) for turn in turns) / count for kind in Kind
        },
        defects=dict(Counter(defect.value for turn in turns for defect in turn.defects).most_common()),
        top_pattern=top_pattern,
    )


def leaks(turn: Turn, secrets: Sequence[str] = ()) -> bool:
    """Whether something hidden shows, or would in a front end that only strips well-formed thinking tags.

    True when any of these holds:
    1. text that the parser reads as thought is left standing once every exact `<system_thinking>...
       </system_thinking>` and `<role_thinking>...</role_thinking>` is cut out, as simple front ends do: a
       thought that is unclosed, has a mangled tag, or has lost its opening tag;
    2. a whole thought of `VERBATIM_WORDS` words or more stands word for word in the user's view;
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
            if _words(_TAG_LIKE.sub(" ", shown)):
                return True
    visible = _words(view(turn, Reader.USER))
    thoughts = [_words(segment.text) for segment in turn.segments if segment.kind.private]
    hidden = [text for text in thoughts if len(text) >= VERBATIM_WORDS] + [_words(word) for word in secrets]
    return any(_contains(visible, text) for text in hidden)


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """Mean BLEU-4 of each text against all the others (Zhu et al. 2018, arXiv 1802.01886), in [0, 1].

    1 means that all texts are alike. Exact, not sampled, and not smoothed: a text that shares no 4-gram with
    any other counts 0. Texts of fewer than four words use the orders they have; empty ones count 0.
    """
    if len(texts) < 2:
        return 0.0
    tables = [_best_two(texts, order) for order in range(1, _BLEU_ORDER + 1)]
    lengths = sorted(len(text) for text in texts)
    return sum(_bleu(index, text, tables, lengths) for index, text in enumerate(texts)) / len(texts)


def distinct(texts: Sequence[Sequence[str]], order: int) -> float:
    """Distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams over all n-grams of all texts."""
    grams = [gram for text in texts for gram in _grams(text, order)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: Sequence[str], order: int = 4) -> float:
    """Share of a text's n-grams that repeat an earlier one of the same text; 0 when it has none."""
    grams = _grams(text, order)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _pattern(turn: Turn) -> str:
    kinds = " ".join(kind.value for kind in turn.pattern)
    return kinds if turn.well_formed else f"malformed: {kinds}"


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _contains(text: Sequence[str], part: Sequence[str]) -> bool:
    size = len(part)
    return size > 0 and any(text[at : at + size] == part for at in range(len(text) - size + 1))


def _grams(text: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(text[at : at + order]) for at in range(len(text) - order + 1)]


def _best_two(texts: Sequence[Sequence[str]], order: int) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """For each n-gram: its largest count in one text, that text's index, and its largest count elsewhere.

    This is all that clipping against "all the other texts" needs, at linear instead of quadratic cost.
    """
    best: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for index, text in enumerate(texts):
        for gram, count in Counter(_grams(text, order)).items():
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
        counts = Counter(_grams(text, order))
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
