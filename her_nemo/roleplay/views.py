"""Who may see what of a turn. One table; training data, rollouts, evaluation and chat all read it.

A view never joins two words, never shows a character of a segment that its reader may not see, and keeps
every character (blanks at the seams aside) of the segments that the reader may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.text import join_seam
from her_nemo.roleplay.turn import Turn, parse_turn, render_segment


class Reader(StrEnum):
    """Who reads the turn."""

    SELF_NOW = "self_now"  # the model while it writes the turn: the text as it is
    SELF_LATER = "self_later"  # the same character's history: his thoughts, without the old plans
    OTHER_CHARACTER = "other_character"  # another character's history: what can be seen and heard
    JUDGE_GRM = "judge_grm"  # the generative reward model: role thoughts count, the plan does not
    USER = "user"  # a person chatting


class Style(StrEnum):
    """How a visible segment is written."""

    TAGGED = "tagged"  # <role_action>bows</role_action>
    STARRED = "starred"  # *bows*
    PLAIN = "plain"


@dataclass(frozen=True)
class View:
    """Which kinds a reader sees, and how. A kind that is not listed is hidden."""

    styles: Mapping[Kind, Style]
    verbatim: bool = False

    def sees(self, kind: Kind) -> bool:
        return self.verbatim or kind in self.styles


def _view(**styles: Style) -> View:
    return View(MappingProxyType({Kind(kind): style for kind, style in styles.items()}))


_THOUGHTS = _view(role_thinking=Style.TAGGED, role_action=Style.TAGGED, speech=Style.PLAIN)

VIEWS: Mapping[Reader, View] = MappingProxyType(
    {
        Reader.SELF_NOW: View(MappingProxyType({}), verbatim=True),
        Reader.SELF_LATER: _THOUGHTS,
        Reader.OTHER_CHARACTER: _view(role_action=Style.TAGGED, speech=Style.PLAIN),
        Reader.JUDGE_GRM: _THOUGHTS,
        Reader.USER: _view(role_action=Style.STARRED, speech=Style.PLAIN),
    }
)


def view(turn: Turn | str, reader: Reader) -> str:
    """The turn as `reader` sees it. A string is parsed first; malformed text is read *fail private*."""
    table = VIEWS[reader]
    if isinstance(turn, str):
        turn = parse_turn(turn, expect_plan=False)
    if table.verbatim:
        return turn.text
    out = ""
    hidden = False  # was something taken out since the last visible piece?
    previous: Style | None = None
    for kind, text in _pieces(turn):
        style = table.styles.get(kind)
        if style is None:
            hidden = True
            continue
        if style is not Style.PLAIN and not text.strip():
            hidden = True  # an empty tag shows nothing
            continue
        piece = {
            Style.TAGGED: render_segment(kind, text),
            Style.STARRED: f"*{text.strip()}*",
            Style.PLAIN: text,
        }[style]
        if hidden:
            out = join_seam(out, piece) if out else piece.lstrip()
        elif Style.STARRED in (style, previous) or style is previous is Style.PLAIN:
            out = join_seam(out, piece, collapse=False)
        else:
            out += piece
        hidden, previous = False, style
    return out.rstrip() if hidden else out


def _pieces(turn: Turn) -> list[tuple[Kind, str]]:
    """The segments with the name prefix at its place, counted as speech."""
    pieces: list[tuple[Kind, str]] = []
    pending = turn.name_span
    for segment in turn.segments:
        if pending is not None and segment.start >= pending[0]:
            pieces.append((Kind.SPEECH, turn.name_prefix))
            pending = None
        pieces.append((segment.kind, segment.text))
    if pending is not None:
        pieces.append((Kind.SPEECH, turn.name_prefix))
    return pieces
