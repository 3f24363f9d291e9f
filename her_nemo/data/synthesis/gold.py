"""Putting thoughts into a turn while its speech and actions stay the author's, character for character.

A model gives a turn back as parts. The parts that can be seen or heard are only used to find *where* the
thoughts go: the text itself is cut from the original, so that not even a quotation mark can change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from her_nemo.data.synthesis.asker import Fault
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.text import join_seam
from her_nemo.roleplay.turn import Segment, Turn, parse_turn, render_segment
from her_nemo.roleplay.views import Reader, view

_INSIDE_WORD = re.compile(r"[\w'\u2019]{2}")
# Marks that models write in their own way; one character each, so that places stay comparable.
_FOLD = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2212": "-"}
)


def editable(turn: Turn) -> bool:
    """Whether thoughts can be put into this turn without guessing: tags in order, something to be seen or heard."""
    return not [defect for defect in turn.defects if defect not in ("missing_name", "missing_plan")]


def insert_thoughts(turn: Turn, parts: Sequence[tuple[Kind, str]]) -> tuple[str, list[Fault]]:
    """The turn's text with its role thoughts replaced by those among `parts`, or what is wrong with the parts.

    Args:
        turn: the original, `editable`.
        parts: (kind, text) of the whole new turn in order; role_thinking, role_action and speech.
    """
    gold = [segment for segment in turn.segments if not segment.kind.private]
    given = [(kind, text) for kind, text in parts if kind is not Kind.ROLE_THINKING]
    fault = _difference([(segment.kind, segment.text) for segment in gold if not segment.blank], given)
    if fault is not None:
        return "", [fault]
    out = turn.name_prefix
    index, place = 0, 0  # the original's segment we are in, and how far
    for kind, text in _joined(parts):
        if kind is Kind.ROLE_THINKING:
            if place and (cut := _bad_cut(gold[index], place)):
                return "", [cut]
            out = _append(out, render_segment(kind, text.strip()))
            continue
        wanted = len(_squeeze(text))
        while wanted:
            end = _advance(gold[index].text, place, wanted)
            taken = gold[index].text[place:end]
            wanted -= len(_squeeze(taken))
            out = _append(out, taken if gold[index].blank else render_segment(gold[index].kind, taken))
            index, place = (index + 1, 0) if end == len(gold[index].text) else (index, end)
    out = out.rstrip() if turn.text == turn.text.rstrip() else out
    return out, _unchanged(turn, out)


def _bad_cut(segment: Segment, place: int) -> Fault | None:
    """What is wrong with a thought that stands inside a segment. An action cut in two would be seen as two."""
    around = segment.text[max(0, place - 12) : place + 12]
    if segment.kind is Kind.ROLE_ACTION:
        return Fault(
            "splits_action", f"a thought stands inside an action, at {around!r}; put it before or after"
        )
    if _INSIDE_WORD.match(segment.text, place - 1):
        return Fault("splits_word", f"a thought stands inside a word, at {around!r}")
    return None


def _joined(parts: Sequence[tuple[Kind, str]]) -> list[tuple[Kind, str]]:
    """Neighbouring parts of one visible kind as one part: nothing stands between them."""
    joined: list[tuple[Kind, str]] = []
    for kind, text in parts:
        if joined and joined[-1][0] is kind and kind is not Kind.ROLE_THINKING:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


def _append(out: str, piece: str) -> str:
    return join_seam(out, piece) if out else piece.lstrip()


def _squeeze(text: str) -> str:
    """Without blanks, marks folded: one character for each that is not a blank."""
    return "".join(text.split()).translate(_FOLD)


def _advance(text: str, place: int, count: int) -> int:
    """Where the next `count` characters that are not blank end in text[place:], with the blanks after them."""
    while place < len(text) and count:
        count -= not text[place].isspace()
        place += 1
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _merge(parts: Sequence[tuple[Kind, str]]) -> list[tuple[Kind, str]]:
    merged: list[tuple[Kind, str]] = []
    for kind, text in parts:
        if merged and merged[-1][0] is kind:
            merged[-1] = (kind, merged[-1][1] + _squeeze(text))
        else:
            merged.append((kind, _squeeze(text)))
    return merged


def _difference(gold: Sequence[tuple[Kind, str]], given: Sequence[tuple[Kind, str]]) -> Fault | None:
    """The first place where speech and actions are not the author's."""
    ours, theirs = _merge(gold), _merge(given)
    for (kind, text), (other_kind, other) in zip(ours, theirs, strict=False):
        if kind is not other_kind:
            message = f"the original has {kind} where the answer has {other_kind} ({other[:40]!r})"
            return Fault("changed_gold", f"speech and actions must keep their order: {message}")
        if text != other:
            at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(text))
            at = min(at, len(text), len(other))
            shown = f"...{text[max(0, at - 10) : at + 30]!r} became ...{other[max(0, at - 10) : at + 30]!r}"
            return Fault("changed_gold", f"the {kind} was changed (blanks left out): {shown}")
    if len(ours) != len(theirs):
        missing = [text for _, text in ours[len(theirs) :]]
        what = f"missing: {missing[0][:60]!r}" if missing else f"added: {theirs[len(ours)][1][:60]!r}"
        return Fault("changed_gold", f"speech and actions must stay as they are; {what}")
    return None


def _unchanged(turn: Turn, text: str) -> list[Fault]:
    """Proof after the fact: what others see, speech and actions, is what it was."""
    new = parse_turn(text, expect_plan=False, expect_name=turn.name)
    faults = []
    for what, before, after in (
        ("view", view(turn, Reader.OTHER_CHARACTER), view(new, Reader.OTHER_CHARACTER)),
        ("speech", turn.text_of(Kind.SPEECH), new.text_of(Kind.SPEECH)),
        ("role_action", turn.text_of(Kind.ROLE_ACTION), new.text_of(Kind.ROLE_ACTION)),
    ):
        if "".join(before.split()) != "".join(after.split()):
            faults.append(
                Fault("changed_gold", f"the {what} would change: {before[:80]!r} to {after[:80]!r}")
            )
    if not editable(new):
        faults.append(Fault("malformed", f"the turn would not be well formed: {', '.join(new.defects)}"))
    return faults
