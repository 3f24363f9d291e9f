"""The ways in which role-play is written: HER's tags, CoSER's `[thought]` and `(action)`, `*action*`, plain.

HER's tags are found in every dialect, so that a text that falls back into them shows no thought.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum

from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.tags import find_tags
from her_nemo.roleplay.text import join_seam
from her_nemo.roleplay.turn import Defect, Finding, Segment, Turn, parse_turn, render_segment


class Dialect(StrEnum):
    """A way to write thoughts and actions."""

    HER = "her"
    COSER = "coser"
    STARRED = "starred"
    PLAIN = "plain"


_EDITORIAL = re.compile(r"\[(?:sic|\.{2,6}|\u2026)\]", re.IGNORECASE)


def parse_message(
    text: str, dialect: Dialect, *, expect_plan: bool = False, expect_name: str | None = None
) -> Turn:
    """Cut one message of a dialect into segments. Never raises; what might be thought is a thought."""
    if dialect is Dialect.HER or find_tags(text)[0]:
        return parse_turn(text, expect_plan=expect_plan, expect_name=expect_name)
    start = 0
    if expect_name:
        found = re.match(r"\s*" + re.escape(expect_name) + r":[^\S\n]?", text)
        start = found.end() if found else 0
    findings: list[Finding] = []
    segments = list(_segments(text, start, dialect, findings))
    if all(segment.kind.private or segment.blank for segment in segments):
        findings.append(Finding(Defect.EMPTY_REPLY, 0, len(text)))
    if expect_name and not start:
        findings.append(Finding(Defect.MISSING_NAME, 0, 0))
    name = expect_name if start else None
    return Turn(name, tuple(segments), text, tuple(findings), (0, start) if start else None)


def _segments(text: str, start: int, dialect: Dialect, findings: list[Finding]) -> Iterator[Segment]:
    """Speech between the marks of the dialect; marks inside a mark belong to the outer one."""
    closes = {Dialect.COSER: {"[": "]", "(": ")"}, Dialect.STARRED: {"*": "*"}}.get(dialect, {})
    position = begin = start
    while position < len(text):
        sign = text[position]
        if dialect is Dialect.COSER and (editorial := _EDITORIAL.match(text, position)):
            position = editorial.end()
            continue
        if sign not in closes:
            if dialect is Dialect.COSER and sign == "]":
                findings.append(Finding(Defect.STRAY_CLOSE, position, position + 1))
                yield Segment(Kind.ROLE_THINKING, text[begin:position], begin, position + 1)
                begin = position + 1
            position += 1
            continue
        if position > begin:
            yield Segment(Kind.SPEECH, text[begin:position], begin, position)
        end = _closing(text, position, sign, closes[sign])
        if end is None:
            findings.append(Finding(Defect.UNCLOSED, position, position + 1))
        kind = Kind.ROLE_THINKING if sign == "[" else Kind.ROLE_ACTION
        stop = len(text) if end is None else end + 1
        inside = text[position + 1 : stop if end is None else end]
        if kind is Kind.ROLE_ACTION and "[" in inside and dialect is Dialect.COSER:
            findings.append(Finding(Defect.TAG_INSIDE, position, stop))
            kind = Kind.ROLE_THINKING
        yield Segment(kind, inside, position, stop)
        position = begin = stop
    if begin < len(text):
        yield Segment(Kind.SPEECH, text[begin:], begin, len(text))


def _closing(text: str, at: int, opens: str, closes: str) -> int | None:
    """Where the mark that opens at `at` closes, counting nested ones."""
    if opens == closes:
        found = text.find(closes, at + 1)
        return None if found < 0 else found
    depth = 0
    for position in range(at, len(text)):
        depth += (text[position] == opens) - (text[position] == closes)
        if depth == 0:
            return position
    return None


def to_her(text: str, dialect: Dialect, name: str | None = None) -> str:
    """The message in HER's tags, `Name: ` in front, no plan."""
    turn = parse_message(text, dialect, expect_name=name)
    out = ""
    for segment in turn.segments:
        if segment.kind is Kind.SYSTEM_THINKING:
            continue
        blank = segment.blank and segment.kind is not Kind.SPEECH
        out = join_seam(out, "" if blank else render_segment(segment.kind, segment.text))
    return f"{name}: {out.strip()}" if name else out.strip()
