"""Who may see what, by example."""

from __future__ import annotations

import pytest

from her_nemo.roleplay.dialects import Dialect, parse_message
from her_nemo.roleplay.text import join_seam
from her_nemo.roleplay.views import VIEWS, Kind, Reader, view

TURN = (
    "<system_thinking>plan</system_thinking>Lear: <role_thinking>thought</role_thinking> "
    "Tell me,<role_action>leans in</role_action> now."
)


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        (Reader.SELF_NOW, TURN),
        (
            Reader.SELF_LATER,
            "Lear: <role_thinking>thought</role_thinking> Tell me,<role_action>leans in</role_action> now.",
        ),
        (Reader.OTHER_CHARACTER, "Lear: Tell me,<role_action>leans in</role_action> now."),
        (
            Reader.JUDGE_GRM,
            "Lear: <role_thinking>thought</role_thinking> Tell me,<role_action>leans in</role_action> now.",
        ),
        (Reader.JUDGE_COSER, "Lear: Tell me, (leans in) now."),
        (Reader.JUDGE_COSER_HER, "Lear: [thought] Tell me, (leans in) now."),
        (Reader.USER, "Lear: Tell me, *leans in* now."),
    ],
)
def test_the_table(reader: Reader, expected: str) -> None:
    assert view(TURN, reader) == expected


def test_every_reader_has_a_view_and_only_self_now_sees_the_plan() -> None:
    assert set(VIEWS) == set(Reader)
    assert [reader for reader in Reader if VIEWS[reader].sees(Kind.SYSTEM_THINKING)] == [Reader.SELF_NOW]
    for reader in (Reader.OTHER_CHARACTER, Reader.JUDGE_COSER, Reader.USER):
        assert not VIEWS[reader].sees(Kind.ROLE_THINKING)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Lear: one<role_thinking>x</role_thinking>two", "Lear: one two"),
        ("Lear: one <role_thinking>x</role_thinking> two", "Lear: one two"),
        ("Lear: one<role_thinking>x</role_thinking>, two", "Lear: one, two"),
        ("Lear: one\n\n<role_thinking>x</role_thinking>\ntwo", "Lear: one\n\ntwo"),
        ("Lear: one</role_action>two", "Lear: one two"),
        ("Lear: one [sic] two <role_thinking>x</role_thinking>", "Lear: one [sic] two"),
        ("Lear: <role_thinking>x</role_thinking> <role_thinking>y</role_thinking> one", "Lear: one"),
    ],
)
def test_no_two_words_are_joined(text: str, expected: str) -> None:
    assert view(text, Reader.OTHER_CHARACTER) == expected
    assert view(text, Reader.USER) == expected


def test_bracketed_speech_survives_every_view() -> None:
    text = "Lear: I seen [sic] him [aside] <role_thinking>liar</role_thinking>[t]here."
    shown = "Lear: I seen [sic] him [aside] [t]here."
    for reader in (Reader.OTHER_CHARACTER, Reader.JUDGE_COSER, Reader.USER):
        assert view(text, reader) == shown
    assert view(text, Reader.JUDGE_COSER_HER) == "Lear: I seen [sic] him [aside] [liar] [t]here."


@pytest.mark.parametrize(
    ("dialect", "later", "other"),
    [
        (None, TURN.split("</system_thinking>")[1], "Lear: Tell me,<role_action>leans in</role_action> now."),
        (Dialect.COSER, "Lear: [thought] Tell me, (leans in) now.", "Lear: Tell me, (leans in) now."),
        (Dialect.STARRED, "Lear: Tell me, *leans in* now.", "Lear: Tell me, *leans in* now."),
        (Dialect.PLAIN, "Lear: Tell me, leans in now.", "Lear: Tell me, leans in now."),
    ],
)
def test_a_view_in_another_dialect(dialect: Dialect | None, later: str, other: str) -> None:
    assert view(TURN, Reader.SELF_LATER, dialect=dialect) == later
    assert view(TURN, Reader.OTHER_CHARACTER, dialect=dialect) == other
    assert view(TURN, Reader.SELF_NOW, dialect=dialect) == TURN


def test_a_turn_of_another_dialect_is_seen_alike() -> None:
    turn = parse_message("Lear: [thought] Tell me, (leans in) now.", Dialect.COSER)
    for reader in Reader:
        if not VIEWS[reader].verbatim:
            assert view(turn, reader).split() == view(TURN.replace(",<", ", <"), reader).split()


def test_malformed_history_is_repaired() -> None:
    assert view("Lear: hi <role_thinking>mine", Reader.SELF_LATER) == (
        "Lear: hi <role_thinking>mine</role_thinking>"
    )
    assert view("Lear: hi <role_thinking>mine", Reader.OTHER_CHARACTER) == "Lear: hi"
    assert view("Lear: hi <role_thinking>mine", Reader.SELF_NOW) == "Lear: hi <role_thinking>mine"


def test_join_seam() -> None:
    assert join_seam("a", "b") == "a b"
    assert join_seam("a ", " b") == "a b"
    assert join_seam("a\n", " b") == "a\nb"
    assert join_seam("a ", " b", collapse=False) == "a  b"
    assert join_seam("", "b") == "b"
    assert join_seam("(", "b") == "(b"
