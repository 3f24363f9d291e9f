"""Every dialect and every reader on thousands of mangled texts: no crash, no leak, nothing visible lost.

Thoughts are written in Greek letters, all else in Latin ones, so that a leak is a Greek letter in a view.
"""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from her_nemo.roleplay.dialects import (
    STYLES,
    Dialect,
    parse_message,
    render_message,
    to_her,
    write_message,
)
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.styles import Style, decorate, pieces
from her_nemo.roleplay.turn import Turn, parse_turn
from her_nemo.roleplay.views import VIEWS, Reader, view

GREEK = re.compile(r"[\u03b1-\u03c9]")
OTHERS = (Reader.OTHER_CHARACTER, Reader.USER, Reader.JUDGE_COSER)  # who sees no thought at all
HEARD = Kind.ROLE_ACTION, Kind.SPEECH

MARKS = [
    "[",
    "]",
    "(",
    ")",
    "*",
    "**",
    "【",
    "】",
    "（",
    "）",
    "＊",
    "[sic]",
    "[...]",
    "[t]",
    "[3]",
    "[]",
    "()",
]
TAGS = [
    f"<{slash}{name}>" for name in ("system_thinking", "role_thinking", "role_action") for slash in ("", "/")
]
ODD = [
    "<think>",
    "</think>",
    "<Role_Thinking>",
    "role_thinking",
    "<b>",
    "<",
    "Lear: ",
    "Kent: ",
    "\n",
    " ",
    ": ",
]

latin = st.text(alphabet="abc ,.:'\n", max_size=10)
greek = st.text(alphabet="αβγδ ,.\n", min_size=1, max_size=10).filter(GREEK.search)
mangled = st.lists(
    st.one_of(st.sampled_from(MARKS), st.sampled_from(TAGS + ODD), latin, greek, st.text(max_size=4)),
    max_size=14,
).map("".join)
dialects = st.sampled_from(list(Dialect))
word = st.text(alphabet="abcdé ,.'!", min_size=1, max_size=10).filter(str.strip)
thought = greek.filter(str.strip)


@st.composite
def parts(draw: st.DrawFn) -> list[tuple[Kind, str]]:
    """What a turn says, without a sign that any dialect would misread."""
    kinds = draw(st.lists(st.sampled_from([Kind.ROLE_THINKING, *HEARD]), min_size=1, max_size=6))
    return [(kind, draw(thought if kind.private else word).strip()) for kind in kinds]


def squeezed(text: str) -> str:
    return "".join(text.split())


def said(turn: Turn, private: bool) -> str:
    return squeezed("".join(text for kind, text in pieces(turn) if kind.private is private))


@settings(max_examples=1500, deadline=None)
@given(mangled, dialects, st.booleans(), st.sampled_from([None, "Lear"]))
def test_any_text_parses_is_covered_and_comes_back(
    text: str, dialect: Dialect, plan: bool, name: str | None
) -> None:
    turn = parse_message(text, dialect, expect_plan=plan, expect_name=name)
    spans = sorted([(s.start, s.end) for s in turn.segments] + ([turn.name_span] if turn.name_span else []))
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert "".join(text[a:b] for a, b in spans) == text
    assert all(0 <= f.start <= f.end <= len(text) for f in turn.findings)
    if turn.well_formed:
        assert render_message(turn, dialect) == text


@settings(max_examples=1500, deadline=None)
@given(mangled, dialects, st.sampled_from(list(Reader)), st.sampled_from([None, *Dialect]))
def test_a_view_is_its_visible_segments_and_nothing_else(
    text: str, dialect: Dialect, reader: Reader, written: Dialect | None
) -> None:
    turn = parse_message(text, dialect)
    shown = view(turn, reader, dialect=written)
    if VIEWS[reader].verbatim:
        assert shown == text
        return
    styles = VIEWS[reader].styles if written is None else STYLES[written]
    expected = "".join(
        decorate(kind, part, styles[kind])
        for kind, part in pieces(turn)
        if VIEWS[reader].sees(kind) and kind in styles and (part.strip() or styles[kind] is Style.PLAIN)
    )
    assert squeezed(shown) == squeezed(expected)


@settings(max_examples=1500, deadline=None)
@given(mangled, dialects)
def test_her_tags_say_the_same(text: str, dialect: Dialect) -> None:
    """Through `to_her` what was private stays private and what was visible stays visible, character by character."""
    turn = parse_message(text, dialect, expect_name="Lear")
    her = parse_turn(to_her(text, dialect, "Lear"), expect_plan=False, expect_name="Lear")
    assert her.name == "Lear"
    own = said(turn, private=False)
    if turn.name is not None and same_name(turn.name, "Lear"):
        own = own.replace(squeezed(turn.name_prefix), "", 1)
    assert said(her, private=False) == "Lear:" + own
    assert squeezed(her.text_of(Kind.ROLE_THINKING)) == squeezed(turn.text_of(Kind.ROLE_THINKING))
    assert not her.plan


@settings(max_examples=800, deadline=None)
@given(parts(), dialects)
def test_written_turns_are_read_back(said_parts: list[tuple[Kind, str]], dialect: Dialect) -> None:
    text = write_message(said_parts, dialect, name="Lear")
    turn = parse_message(text, dialect, expect_name="Lear")
    assert {defect.value for defect in turn.defects} <= {"empty_reply"}
    assert render_message(turn, dialect) == text
    visible = "".join(part for kind, part in said_parts if kind in HEARD)
    assert said(turn, private=False) == "Lear:" + squeezed(visible)
    for reader in OTHERS:
        assert not GREEK.search(view(turn, reader))
    if dialect in (Dialect.HER, Dialect.COSER):
        other = Dialect.COSER if dialect is Dialect.HER else Dialect.HER
        assert write_message(parse_message(write_message(turn, other), other), dialect) == text


DAMAGES = [
    "",
    "{0}{0}",
    "{1}",
    "{1}{0}",
    "{0}{1}",
    " {0}",
    "{0} ",
    "<role_thinking>",
    "</role_thinking>",
    "**",
    "【",
    "】",
]


@settings(max_examples=1500, deadline=None)
@given(parts(), st.data())
def test_one_broken_mark_of_cosers_leaks_nothing(
    said_parts: list[tuple[Kind, str]], data: st.DataObject
) -> None:
    """Whatever happens to one mark of a good turn, no thought is shown to anybody else."""
    text = write_message(said_parts, Dialect.COSER, name="Lear")
    places = [i for i, sign in enumerate(text) if sign in "[]()"]
    assume(places)
    at = data.draw(st.sampled_from(places))
    damage = data.draw(st.sampled_from(DAMAGES)).format(text[at], data.draw(st.sampled_from("[]()*")))
    broken = text[:at] + damage + text[at + 1 :]
    for name in (None, "Lear"):
        turn = parse_message(broken, Dialect.COSER, expect_name=name)
        for reader in OTHERS:
            assert not GREEK.search(view(turn, reader)), (broken, view(turn, reader))
        assert not GREEK.search(view(to_her(broken, Dialect.COSER, name), Reader.OTHER_CHARACTER))


@settings(max_examples=500, deadline=None)
@given(mangled, st.sampled_from([Dialect.STARRED, Dialect.PLAIN]))
def test_a_broken_star_loses_nothing(text: str, dialect: Dialect) -> None:
    """Where a dialect has no thoughts and no tag of HER's stands in the text, everybody sees every word."""
    assume("think" not in text.casefold() and "<" not in text and "role" not in text.casefold())
    turn = parse_message(text, dialect)
    words = re.findall(r"\w+", text)
    for reader in OTHERS:
        assert re.findall(r"\w+", view(turn, reader, dialect=Dialect.STARRED)) == words


@pytest.mark.parametrize("dialect", list(Dialect))
def test_every_dialect_writes_what_is_heard(dialect: Dialect) -> None:
    assert set(HEARD) <= set(STYLES[dialect])
