"""The ways in which role-play is written, in and out.

| dialect | plan | thought | action | speech |
|---|---|---|---|---|
| HER | `<system_thinking>` | `<role_thinking>` | `<role_action>` | bare |
| COSER | - | `[..]` | `(..)` | bare |
| STARRED | - | - | `*..*` | bare |
| PLAIN | - | - | - | bare |

HER's tags are found in every dialect, so that a model that falls back into them shows no thought.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType

from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.marks import find_coser_marks, find_stars
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.styles import Style, decorate, pieces, write_visible
from her_nemo.roleplay.tags import Tag, find_tags
from her_nemo.roleplay.turn import (
    Defect,
    Finding,
    Segment,
    Turn,
    assemble_turn,
    expected_name_end,
    parse_turn,
    render_turn,
)


class Dialect(StrEnum):
    """A way to write thoughts and actions."""

    HER = "her"
    COSER = "coser"
    STARRED = "starred"
    PLAIN = "plain"


# What each dialect can write. Thoughts that it has no sign for are left out: nothing else hides them.
STYLES: Mapping[Dialect, Mapping[Kind, Style]] = MappingProxyType(
    {
        Dialect.HER: {
            Kind.SYSTEM_THINKING: Style.TAGGED,
            Kind.ROLE_THINKING: Style.TAGGED,
            Kind.ROLE_ACTION: Style.TAGGED,
            Kind.SPEECH: Style.PLAIN,
        },
        Dialect.COSER: {
            Kind.ROLE_THINKING: Style.BRACKETED,
            Kind.ROLE_ACTION: Style.PARENTHESISED,
            Kind.SPEECH: Style.PLAIN,
        },
        Dialect.STARRED: {Kind.ROLE_ACTION: Style.STARRED, Kind.SPEECH: Style.PLAIN},
        Dialect.PLAIN: {Kind.ROLE_ACTION: Style.PLAIN, Kind.SPEECH: Style.PLAIN},
    }
)


def parse_message(
    text: str, dialect: Dialect, *, expect_plan: bool = False, expect_name: str | None = None
) -> Turn:
    """Cut one message of a dialect into segments. Never raises on any text.

    Args:
        text: the message; the spans of the turn point into it.
        dialect: how it is written.
        expect_plan: whether a plan in HER's tags stands first (in every dialect: no other has a sign for it).
        expect_name: the character who must be speaking. None accepts any `Name: `; outside HER's dialect, where
            the name mostly stands in a field of its own, None also accepts none.
    """
    dialect = Dialect(dialect)
    if dialect is Dialect.HER:
        return parse_turn(text, expect_plan=expect_plan, expect_name=expect_name)
    tags, unknown = find_tags(text)
    # A name may have a parenthesis of its own: `Marcus (the elder): `.
    named = expected_name_end(text, tags, expect_name)
    taken = [(0, named), *((tag.start, tag.end) for tag in tags if tag.start >= named)]
    findings = [Finding(Defect.UNKNOWN_TAG, *span) for span in unknown]
    findings += [
        Finding(Defect.FOREIGN_TAG, tag.start, tag.end)
        for tag in tags
        if not (expect_plan and tag.kind is Kind.SYSTEM_THINKING)
    ]
    marks: list[Tag] = []
    if dialect is not Dialect.PLAIN:
        marks, strays = (find_coser_marks if dialect is Dialect.COSER else find_stars)(text, taken)
        findings += [Finding(Defect.STRAY_CLOSE, *span) for span in strays]
        findings += [Finding(Defect.WIDE_MARK, mark.start, mark.end) for mark in marks if mark.wide]
    return assemble_turn(
        text,
        sorted([*tags, *marks], key=lambda tag: tag.start),
        findings,
        expect_plan=expect_plan,
        expect_name=expect_name,
        needs_name=expect_name is not None,
    )


def render_message(turn: Turn, dialect: Dialect) -> str:
    """All of a turn as text of a dialect: the inverse of `parse_message`.

    Equal to `turn.text` when the turn was well formed in that dialect. A thought that the dialect has no sign
    for keeps HER's tags.
    """
    styles = STYLES[Dialect(dialect)]

    def write(segment: Segment) -> str:
        default = Style.TAGGED if segment.kind.private else Style.PLAIN
        return decorate(segment.kind, segment.text, styles.get(segment.kind, default))

    return render_turn(turn, write)


def write_message(
    turn_or_parts: Turn | Iterable[tuple[Kind, str]], dialect: Dialect, *, name: str | None = None
) -> str:
    """Write a message in a dialect; plans and thoughts that it has no sign for are left out.

    Args:
        turn_or_parts: a turn, whose blanks are kept, or (kind, text) pairs, which are stripped and joined with
            one blank, a plan before the name.
        dialect: how to write it.
        name: who speaks: `Name: ` is put in front. None keeps a turn's own name prefix.

    Raises:
        ValueError: if the text would not be read back as it was meant, as where a thought contains `]`.
    """
    dialect = Dialect(dialect)
    styles = STYLES[dialect]
    if isinstance(turn_or_parts, Turn):
        turn = turn_or_parts
        text = _named(turn, styles, name)
        meant = [*pieces(turn)]
        if name is not None and not _speaks(turn, name):
            meant.insert(0, (Kind.SPEECH, f"{name}: "))
    else:
        parts = [(kind, part.strip()) for kind, part in turn_or_parts]
        shown = [(kind, decorate(kind, part, styles[kind])) for kind, part in parts if kind in styles]
        plan = "".join(part for kind, part in shown if kind is Kind.SYSTEM_THINKING)
        body = " ".join(part for kind, part in shown if kind is not Kind.SYSTEM_THINKING)
        text = f"{plan}{name}: {body}" if name is not None else plan + body
        meant = [(Kind.SPEECH, f"{name}: "), *parts] if name is not None else parts
    back = parse_message(text, dialect, expect_name=name)
    if _outline(meant, styles) != _outline(pieces(back), None):
        raise ValueError(f"cannot be written in the {dialect.value} dialect: {text[:120]!r}")
    return text


def to_her(text: str, dialect: Dialect, name: str | None = None) -> str:
    """A message of any dialect in HER's tags, without a plan. Malformed text is repaired, *fail private*.

    Args:
        text: the message.
        dialect: how it is written.
        name: the speaker: the result begins `Name: ` in this spelling. None keeps the message's own prefix.
    """
    turn = parse_message(text, dialect, expect_name=name)
    return _named(turn, _HISTORY, name, respell=True).strip()


_HISTORY = MappingProxyType(
    {kind: style for kind, style in STYLES[Dialect.HER].items() if kind is not Kind.SYSTEM_THINKING}
)


def _speaks(turn: Turn, name: str) -> bool:
    return turn.name is not None and same_name(turn.name, name)


def _named(turn: Turn, styles: Mapping[Kind, Style], name: str | None, *, respell: bool = False) -> str:
    """What may be shown of a turn, with `name: ` in front (after the plan) unless its own prefix says so."""
    if name is None or (_speaks(turn, name) and not respell):
        return write_visible(turn, styles)
    plans = [s for s in turn.segments if s.kind is Kind.SYSTEM_THINKING and s.kind in styles and not s.blank]
    plan = "".join(decorate(s.kind, s.text, styles[s.kind]) for s in plans)
    rest = {kind: style for kind, style in styles.items() if kind is not Kind.SYSTEM_THINKING}
    return f"{plan}{name}: {write_visible(turn, rest, with_name=not _speaks(turn, name)).lstrip()}"


def _outline(
    parts: Iterable[tuple[Kind, str]], styles: Mapping[Kind, Style] | None
) -> list[tuple[Kind, str]]:
    """Neighbours of one kind merged, blanks out: what must be the same before writing and after reading.

    With `styles`, as they will be written: hidden kinds out, and what gets no mark counts as speech.
    """
    out: list[tuple[Kind, str]] = []
    plans = []
    for kind, text in parts:
        if styles is not None:
            if kind not in styles:
                continue
            kind = Kind.SPEECH if styles[kind] is Style.PLAIN else kind
        squeezed = "".join(text.split())
        if kind is Kind.SYSTEM_THINKING:
            plans.append((kind, squeezed))
        elif squeezed and out and out[-1][0] is kind:
            out[-1] = (kind, out[-1][1] + squeezed)
        elif squeezed:
            out.append((kind, squeezed))
    return [*plans, *out]
