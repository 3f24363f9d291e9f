"""Who may see what of a turn. One table; training data, rollouts, evaluation and chat all read it.

A view never joins two words, never shows a character of a segment that its reader may not see, and keeps
every character (blanks at the seams aside) of the segments that the reader may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from her_nemo.roleplay.dialects import STYLES, Dialect
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.styles import Style, write_visible
from her_nemo.roleplay.turn import Turn, parse_turn


class Reader(StrEnum):
    """Who reads the turn."""

    SELF_NOW = "self_now"  # the model while it writes the turn: the text as it is
    SELF_LATER = "self_later"  # the same character's history: his thoughts, without the old plans
    OTHER_CHARACTER = "other_character"  # another character's history: what can be seen and heard
    JUDGE_GRM = "judge_grm"  # the generative reward model: role thoughts count, the plan does not
    JUDGE_COSER = "judge_coser"  # CoSER's judge (upstream): thoughts stripped
    JUDGE_COSER_HER = "judge_coser_her"  # the same judge in HER's fork: role thoughts kept as [..]
    USER = "user"  # a person chatting


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
        Reader.JUDGE_COSER: _view(role_action=Style.PARENTHESISED, speech=Style.PLAIN),
        Reader.JUDGE_COSER_HER: _view(
            role_thinking=Style.BRACKETED, role_action=Style.PARENTHESISED, speech=Style.PLAIN
        ),
        Reader.USER: _view(role_action=Style.STARRED, speech=Style.PLAIN),
    }
)


def view(turn: Turn | str, reader: Reader, *, dialect: Dialect | None = None) -> str:
    """The turn as `reader` sees it.

    Args:
        turn: a turn of any dialect, or a message in HER's tags, which is parsed; malformed text is read *fail
            private*.
        reader: who reads.
        dialect: how to write what he sees; None is as the table says. A thought that the dialect has no sign
            for is left out. What is written in another dialect than HER's must be parsed in that dialect.
    """
    table = VIEWS[reader]
    if isinstance(turn, str):
        turn = parse_turn(turn, expect_plan=False)
    if table.verbatim:
        return turn.text
    styles = table.styles
    if dialect is not None:
        known = STYLES[dialect]
        styles = {kind: known[kind] for kind in styles if kind in known}
    return write_visible(turn, styles)
