"""How a segment is written, and how a message is put together from those segments that may be shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    previous: Style | None = None
    for kind, text, is_name in named_pieces(turn, with_name=with_name):
        style = styles.get(kind)
        if style is None or (style is not Style.PLAIN and not text.strip()):
            hidden = True
            continue
        # `* bows *` is a list item in Markdown, not emphasis: stars stand against their text.
        piece = decorate(kind, text.strip() if style is Style.STARRED else text, style)
        if hidden:
            out = join_seam(out, piece) if out else piece.lstrip()
        elif _apart(previous, style):
            out = join_seam(out, piece, collapse=False)
        else:
            out += piece
        # What follows a name directly did so in the text too: its colon keeps them apart.
        hidden, previous = False, None if is_name else style
    return out.rstrip() if hidden else out


def _apart(before: Style | None, after: Style) -> bool:
    """Whether neighbours need a blank: signs, to be read as such (`the[m]` is an editor's), and two texts that
    a tag stood between."""
    return after in MARKS or before in MARKS or (before is Style.PLAIN and after is Style.PLAIN)


def pieces(turn: Turn) -> list[tuple[Kind, str]]:
    """The segments as (kind, text), with the name prefix at its place, counted as speech."""
    return [(kind, text) for kind, text, _ in named_pieces(turn, with_name=True)]


def named_pieces(turn: Turn, *, with_name: bool) -> Iterator[tuple[Kind, str, bool]]:
    """(kind, text, whether it is the name prefix), in order."""
    pending = turn.name_span if with_name else None
    for segment in turn.segments:
        if pending is not None and segment.start >= pending[0]:
            yield Kind.SPEECH, turn.name_prefix, True
            pending = None
        yield segment.kind, segment.text, False
    if pending is not None:
        yield Kind.SPEECH, turn.name_prefix, True
