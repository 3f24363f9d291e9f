"""The parser: exact on well-formed text, typed defects and *fail private* on the rest."""

from __future__ import annotations

import pytest

from her_nemo.roleplay.turn import Defect, Kind, parse_turn, render_turn, write_turn

GOOD = (
    "<system_thinking>Lear wants praise.</system_thinking>King Lear: "
    "<role_thinking>I must know.</role_thinking> Tell me,<role_action>leans in</role_action> daughters."
)
PLAN = "<system_thinking>p</system_thinking>"


def kinds_and_texts(text: str, name: str | None = "Lear") -> list[tuple[str, str]]:
    turn = parse_turn(text, expect_name=name)
    return [(segment.kind.value, segment.text) for segment in turn.segments]


def test_well_formed_turn() -> None:
    turn = parse_turn(GOOD, expect_name="King Lear")
    assert turn.well_formed
    assert turn.name == "King Lear"
    assert turn.name_prefix == "King Lear: "
    assert turn.plan == "Lear wants praise."
    assert [(s.kind, s.text) for s in turn.segments] == [
        (Kind.SYSTEM_THINKING, "Lear wants praise."),
        (Kind.ROLE_THINKING, "I must know."),
        (Kind.SPEECH, " Tell me,"),
        (Kind.ROLE_ACTION, "leans in"),
        (Kind.SPEECH, " daughters."),
    ]
    assert render_turn(turn) == GOOD
    assert turn.pattern == (
        Kind.SYSTEM_THINKING,
        Kind.ROLE_THINKING,
        Kind.SPEECH,
        Kind.ROLE_ACTION,
        Kind.SPEECH,
    )


@pytest.mark.parametrize(
    ("text", "defect"),
    [
        ("<system_thinking>p</system_thinking>Lear: <role_thinking>a", Defect.UNCLOSED),
        ("<system_thinking>p</system_thinking>Lear: a</role_action> b", Defect.STRAY_CLOSE),
        (
            PLAN + "Lear: <role_thinking>a<role_action>b</role_thinking>c</role_action> d",
            Defect.MISNESTED,
        ),
        (
            PLAN + "Lear: <role_action>a <role_action>b</role_action></role_action>",
            Defect.TAG_INSIDE,
        ),
        ("<system_thinking>p</system_thinking>Lear: <Role_Action>a</role_action>", Defect.WRONG_CASE),
        ("<system_thinking>p</system_thinking>Lear: hi <role_action", Defect.MALFORMED_TAG),
        ("<system_thinking>p</system_thinking>Lear: hi <b>you</b>", Defect.UNKNOWN_TAG),
        ("<system_thinking>p</system_thinking>Lear: hi <role_action></role_action>", Defect.EMPTY_TAG),
        ("Well. <system_thinking>p</system_thinking>Lear: hi", Defect.TEXT_BEFORE_PLAN),
        (
            "<system_thinking>p</system_thinking><system_thinking>q</system_thinking>Lear: hi",
            Defect.SEVERAL_PLANS,
        ),
        ("Lear: hi", Defect.MISSING_PLAN),
        ("<system_thinking>p</system_thinking>hi there", Defect.MISSING_NAME),
        ("<system_thinking>p</system_thinking>Kent: hi", Defect.WRONG_NAME),
        ("<system_thinking>p</system_thinking>Lear: <role_thinking>a</role_thinking>", Defect.EMPTY_REPLY),
        ("<system_thinking>p</system_thinking>Lear: ", Defect.EMPTY_REPLY),
        ("", Defect.EMPTY_REPLY),
    ],
)
def test_each_defect_is_found(text: str, defect: Defect) -> None:
    turn = parse_turn(text, expect_name="Lear")
    assert defect in turn.defects
    assert not turn.well_formed


def test_a_finding_says_where() -> None:
    text = "Lear: hi <Role_Action>bows</Role_Action>"
    found = [f for f in parse_turn(text, expect_plan=False).findings if f.defect is Defect.WRONG_CASE]
    assert [text[f.start : f.end] for f in found] == ["<Role_Action>", "</Role_Action>"]


@pytest.mark.parametrize(
    ("text", "private"),
    [
        # everything after an unclosed thought
        ("Lear: hello <role_thinking>hate him. And you", "hate him. And you"),
        ("<system_thinking>plan Lear: hello", "plan Lear: hello"),
        # a close that lost its opening tag
        ("Lear: hate him</role_thinking> hello", "hate him"),
        ("plan</system_thinking>Lear: hello", "plan"),
        # a tag inside a thought does not end it
        ("Lear: <role_thinking>a <role_action>b</role_action> c</role_thinking> hello", "a b c"),
        # two opened, one closed: the rest may still be thought
        ("Lear: <role_thinking>a <role_thinking>b</role_thinking> c", "a b c"),
        # closed by the wrong tag
        ("Lear: <role_thinking>a</system_thinking> b", None),
        ("Lear: <role_thinking>a</role_action> b", "a b"),
        # other spellings of thinking
        ("<think>plan</think>Lear: hello", "plan"),
        ("Lear: <ROLE_THINKING>a</ROLE_THINKING> hello", "a"),
        ("Lear: <role-thinking>a</role-thinking> hello", "a"),
        ("Lear: <role_thnking>a</role_thnking> hello", "a"),
        ("Lear: <inner_monologue>a</inner_monologue> hello", "a"),
        ('Lear: <role_thinking mood="dark">a</role_thinking> hello', "a"),
        ("Lear: <role_thinking a b c", "a b c"),
        ("Lear: <roel_thnkng>a</roel_thnkng> hello", "a"),
        # a close too mangled to be believed
        ("Lear: <role_thinking>a</role_thinking x> b</role_thinking> hello", "a b"),
        ("Lear: <role_thinking>a[/role_thinking] b</role_thinking> hello", "a[] b"),
    ],
)
def test_fail_private(text: str, private: str | None) -> None:
    turn = parse_turn(text, expect_plan=False, expect_name="Lear")
    hidden = "".join(s.text for s in turn.segments if s.kind.private)
    shown = "".join(s.text for s in turn.segments if not s.kind.private)
    assert not turn.well_formed
    if private is None:
        assert shown.strip() == ""
    else:
        assert hidden.split() == private.split()
    assert ("hello" in text) == ("hello" in shown) or private is None or "hello" in private


def test_action_and_speech_are_never_hidden_by_broken_action_tags() -> None:
    for text in (
        "Lear: one <role_action>two three",
        "Lear: one two</role_action> three",
        "Lear: one <role_action two three",
        "Lear: one <role_action two> three",
        "Lear: one</role_action>two three",
    ):
        turn = parse_turn(text, expect_plan=False)
        assert turn.text_of(Kind.SPEECH, Kind.ROLE_ACTION).replace(">", "").split() == ["one", "two", "three"]


def test_ordinary_signs_are_speech() -> None:
    text = "Lear: 2 < 3 > 1, I <3 you [sic] (aside) *sighs* a<b"
    turn = parse_turn(text, expect_plan=False)
    assert turn.well_formed
    assert turn.text_of(Kind.SPEECH) == "2 < 3 > 1, I <3 you [sic] (aside) *sighs* a<b"


def test_names() -> None:
    assert parse_turn("Earl of Gloucester: hi", expect_plan=False).name == "Earl of Gloucester"
    assert parse_turn("Dr. X: y: hi", expect_plan=False, expect_name="Dr. X: y").name == "Dr. X: y"
    assert parse_turn("<system_thinking>p</system_thinking>\n\nLear: hi").well_formed
    assert parse_turn("It is 10:30 now", expect_plan=False).name is None
    assert parse_turn("Lear: <system_thinking>p</system_thinking> hi", expect_name="Lear").name == "Lear"


def test_write_turn() -> None:
    parts = [
        (Kind.SYSTEM_THINKING, "p"),
        (Kind.ROLE_THINKING, "t"),
        (Kind.SPEECH, "Hi."),
        (Kind.ROLE_ACTION, "bows"),
    ]
    text = write_turn("Lear", parts)
    assert text == (
        "<system_thinking>p</system_thinking>Lear: <role_thinking>t</role_thinking> Hi. "
        "<role_action>bows</role_action>"
    )
    with pytest.raises(ValueError, match="stray_close"):
        write_turn("Lear", [(Kind.SPEECH, "a</role_action>")])
