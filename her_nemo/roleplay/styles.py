"""How a segment is written, and how a message is put together from those segments that may be shown."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.text import join_seam
from her_nemo.roleplay.turn import Turn, render_segment


class Style(StrEnum):
    """How a visible segment is written."""

    TAGGED = "tagged"  # <role_action>bows</role_action>
    BRACKETED = "bracketed"  # [I hate him]
    PARENTHESISED = "parenthesised"  # (bows)
    STARRED = "starred"  # *bows*
    PLAIN = "plain"


MARKS: Mapping[Style, tuple[str, str]] = {
    Style.BRACKETED: ("[", "]"),
    Style.PARENTHESISED: ("(", ")"),
    Style.STARRED: ("*", "*"),
}


def decorate(kind: Kind, text: str, style: Style) -> str:
    """The text of a segment with the marks of its style, blanks kept."""
    if style is Style.TAGGED:
        return render_segment(kind, text)
    before, after = MARKS.get(style, ("", ""))
    return f"{before}{text}{after}"


def write_visible(turn: Turn, styles: Mapping[Kind, Style], *, with_name: bool = True) -> str:
    """The turn's name (unless not `with_name`) and those of its segments whose kind is in `styles`.

    Never joins two words, and keeps every character (blanks at the seams aside) of what it shows. A tagged,
    bracketed, parenthesised or starred segment that is blank shows nothing.
    """
    out = ""
    hidden = False  # was something taken out since the last visible piece?
    previous: tuple[Kind, Style] | None = None
    for kind, text in pieces(turn, with_name=with_name):
        style = styles.get(kind)
        if style is None or (style is not Style.PLAIN and not text.strip()):
            hidden = True
            continue
        # `* bows *` is a list item in Markdown, not emphasis: stars stand against their text.
        piece = decorate(kind, text.strip() if style is Style.STARRED else text, style)
        if hidden:
            out = join_seam(out, piece) if out else piece.lstrip()
        elif previous is not None and _apart(previous, (kind, style)):
            out = join_seam(out, piece, collapse=False)
        else:
            out += piece
        hidden, previous = False, (kind, style)
    return out.rstrip() if hidden else out


def _apart(before: tuple[Kind, Style], after: tuple[Kind, Style]) -> bool:
    """Whether the border between two neighbours would be lost, or misread, without a blank."""
    styles = (before[1], after[1])
    return Style.STARRED in styles or styles == (Style.PLAIN, Style.PLAIN)


def pieces(turn: Turn, *, with_name: bool = True) -> list[tuple[Kind, str]]:
    """The segments as (kind, text), with the name prefix at its place, counted as speech."""
    out: list[tuple[Kind, str]] = []
    pending = turn.name_span if with_name else None
    for segment in turn.segments:
        if pending is not None and segment.start >= pending[0]:
            out.append((Kind.SPEECH, turn.name_prefix))
            pending = None
        out.append((segment.kind, segment.text))
    if pending is not None:
        out.append((Kind.SPEECH, turn.name_prefix))
    return out
