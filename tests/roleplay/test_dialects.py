"""The dialects by example: CoSER's brackets, stars, plain text; in, out, and malformed."""

from __future__ import annotations

import time

import pytest

from her_nemo.roleplay.dialects import Dialect, parse_message, render_message, to_her, write_message
from her_nemo.roleplay.turn import Defect, Kind, parse_turn
from her_nemo.roleplay.views import Reader, view

THOUGHT, ACTION, SPEECH = Kind.ROLE_THINKING, Kind.ROLE_ACTION, Kind.SPEECH


def outline(text: str, dialect: Dialect, name: str | None = None) -> list[tuple[Kind, str]]:
    turn = parse_message(text, dialect, expect_name=name)
    return [(s.kind, s.text.strip()) for s in turn.segments if not s.blank]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[She lies.] (bows) Hello.", [(THOUGHT, "She lies."), (ACTION, "bows"), (SPEECH, "Hello.")]),
        ("(bows)(smiles) Hi", [(ACTION, "bows"), (ACTION, "smiles"), (SPEECH, "Hi")]),
        ("[He (my brother) lies.] Hi", [(THOUGHT, "He (my brother) lies."), (SPEECH, "Hi")]),
        ("(bows (deeply) twice) Hi", [(ACTION, "bows (deeply) twice"), (SPEECH, "Hi")]),
        # an editor's brackets are said aloud
        ("I seen [sic] him.", [(SPEECH, "I seen [sic] him.")]),
        ("[T]he king [...] walk[ed] in[3] [!]", [(SPEECH, "[T]he king [...] walk[ed] in[3] [!]")]),
        ("[He said [sic] so.] Hi", [(THOUGHT, "He said [sic] so."), (SPEECH, "Hi")]),
        # ... but not these: they may be thoughts
        ("[sick] Hi", [(THOUGHT, "sick"), (SPEECH, "Hi")]),
        ("[I] Hi", [(THOUGHT, "I"), (SPEECH, "Hi")]),
        ("[12] Hi", [(THOUGHT, "12"), (SPEECH, "Hi")]),
        ("*bows* Hi", [(SPEECH, "*bows* Hi")]),
    ],
)
def test_coser(text: str, expected: list[tuple[Kind, str]]) -> None:
    assert outline(text, Dialect.COSER) == expected
    turn = parse_message(text, Dialect.COSER)
    assert turn.well_formed, turn.findings
    assert render_message(turn, Dialect.COSER) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*bows* Hi *smiles*", [(ACTION, "bows"), (SPEECH, "Hi"), (ACTION, "smiles")]),
        ("你好*点头*再见", [(SPEECH, "你好"), (ACTION, "点头"), (SPEECH, "再见")]),
        ("**No!** 2*3 is 2 * 3", [(SPEECH, "**No!** 2*3 is 2 * 3")]),
        ("* one\n* two", [(SPEECH, "* one\n* two")]),
        ("*shouts **no** twice* Hi", [(ACTION, "shouts **no** twice"), (SPEECH, "Hi")]),
        ("[sic] (aside) Hi", [(SPEECH, "[sic] (aside) Hi")]),
    ],
)
def test_starred(text: str, expected: list[tuple[Kind, str]]) -> None:
    assert outline(text, Dialect.STARRED) == expected
    turn = parse_message(text, Dialect.STARRED)
    assert turn.well_formed, turn.findings
    assert render_message(turn, Dialect.STARRED) == text


def test_plain_is_all_speech() -> None:
    text = "[sic] (aside) *bows* 2 < 3"
    assert outline(text, Dialect.PLAIN) == [(SPEECH, text)]
    assert parse_message(text, Dialect.PLAIN).well_formed


def test_her_is_parse_turn() -> None:
    text = "<system_thinking>p</system_thinking>Lear: <role_thinking>t</role_thinking> hi"
    turn = parse_message(text, Dialect.HER, expect_plan=True, expect_name="Lear")
    assert turn == parse_turn(text, expect_name="Lear")
    assert turn.well_formed


@pytest.mark.parametrize(
    ("text", "dialect", "defect", "private", "shown"),
    [
        ("Hi [hate him. (bows)", Dialect.COSER, Defect.UNCLOSED, "hate him. (bows)", "Hi"),
        ("hate him] Hi", Dialect.COSER, Defect.STRAY_CLOSE, "hate him", "Hi"),
        ("(bows) hate him] Hi", Dialect.COSER, Defect.STRAY_CLOSE, "bows hate him", "Hi"),
        ("[a [b] c] Hi", Dialect.COSER, Defect.TAG_INSIDE, "a b c", "Hi"),
        ("[a [b] c Hi", Dialect.COSER, Defect.UNCLOSED, "a b c Hi", ""),
        ("(bows [liar] low) Hi", Dialect.COSER, Defect.TAG_INSIDE, "liar", "bows low Hi"),
        ("(hate him] Hi", Dialect.COSER, Defect.MISNESTED, "hate him", "Hi"),
        ("[hate him) Hi", Dialect.COSER, Defect.UNCLOSED, "hate him) Hi", ""),
        ("1) one [x] 2) two", Dialect.COSER, Defect.STRAY_CLOSE, "x", "1) one 2) two"),
        ("(bows Hi", Dialect.COSER, Defect.UNCLOSED, "", "bows Hi"),
        ("【恨】（笑）好", Dialect.COSER, Defect.WIDE_MARK, "恨", "笑 好"),
        ("[] Hi", Dialect.COSER, Defect.EMPTY_TAG, "", "Hi"),
        ("[x]", Dialect.COSER, Defect.EMPTY_REPLY, "x", ""),
        ("<role_thinking>x</role_thinking> Hi", Dialect.COSER, Defect.FOREIGN_TAG, "x", "Hi"),
        ("[a <role_action>b] c</role_action> Hi", Dialect.COSER, Defect.MISNESTED, "a b", "c Hi"),
        ("*bows Hi", Dialect.STARRED, Defect.UNCLOSED, "", "bows Hi"),
        ("Hi* you", Dialect.STARRED, Defect.STRAY_CLOSE, "", "Hi* you"),
        ("＊bows＊ Hi", Dialect.STARRED, Defect.WIDE_MARK, "", "bows Hi"),
        ("*x <think>y</think>* Hi", Dialect.STARRED, Defect.FOREIGN_TAG, "y", "x Hi"),
        ("a <role_thinking>x", Dialect.PLAIN, Defect.FOREIGN_TAG, "x", "a"),
    ],
)
def test_malformed_text_fails_private(
    text: str, dialect: Dialect, defect: Defect, private: str, shown: str
) -> None:
    turn = parse_message(text, dialect)
    assert defect in turn.defects
    assert " ".join(s.text for s in turn.segments if s.kind.private).split() == private.split()
    assert " ".join(s.text for s in turn.segments if not s.kind.private).split() == shown.split()


def test_names() -> None:
    named = parse_message("Lear: [x] Hi", Dialect.COSER, expect_name="Lear")
    assert named.name == "Lear"
    assert named.well_formed
    assert parse_message("[x] Hi", Dialect.COSER).well_formed
    assert parse_message("[x] Hi", Dialect.COSER, expect_name="Lear").defects == (Defect.MISSING_NAME,)
    assert parse_message("Kent: Hi", Dialect.COSER, expect_name="Lear").defects == (Defect.WRONG_NAME,)
    marked = parse_message("Marcus (the elder): [x] Hi", Dialect.COSER, expect_name="Marcus (the elder)")
    assert (marked.name, marked.defects) == ("Marcus (the elder)", ())
    # the expected name is not part of the thought that lost its bracket
    lost = parse_message("Lear: hate him] Hi", Dialect.COSER, expect_name="Lear")
    assert (lost.name, view(lost, Reader.OTHER_CHARACTER)) == ("Lear", "Lear: Hi")


def test_a_plan_in_another_dialect() -> None:
    text = "<system_thinking>p</system_thinking>Lear: [x] (bows) Hi"
    turn = parse_message(text, Dialect.COSER, expect_plan=True, expect_name="Lear")
    assert turn.well_formed
    assert render_message(turn, Dialect.COSER) == text
    assert to_her(text, Dialect.COSER, "Lear") == (
        "Lear: <role_thinking>x</role_thinking> <role_action>bows</role_action> Hi"
    )


@pytest.mark.parametrize(
    ("text", "dialect", "expected"),
    [
        (
            "[x] (bows) Hi",
            Dialect.COSER,
            "Lear: <role_thinking>x</role_thinking> <role_action>bows</role_action> Hi",
        ),
        ("lear : Hi", Dialect.COSER, "Lear: Hi"),
        ("LEAR: Hi", Dialect.COSER, "Lear: Hi"),
        ("Kent: Hi", Dialect.COSER, "Lear: Kent: Hi"),
        ("*bows* Hi\n\n", Dialect.STARRED, "Lear: <role_action>bows</role_action> Hi"),
        ("Hi [sic]", Dialect.PLAIN, "Lear: Hi [sic]"),
        ("<system_thinking>p</system_thinking>Lear: Hi", Dialect.HER, "Lear: Hi"),
        ("Hi [x", Dialect.COSER, "Lear: Hi <role_thinking>x</role_thinking>"),
    ],
)
def test_to_her(text: str, dialect: Dialect, expected: str) -> None:
    assert to_her(text, dialect, "Lear") == expected
    assert to_her(expected, Dialect.HER, "Lear") == expected


PARTS = [(Kind.SYSTEM_THINKING, "p"), (THOUGHT, "t"), (ACTION, "bows"), (SPEECH, "Hi [sic].")]


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        (
            Dialect.HER,
            "<system_thinking>p</system_thinking>Lear: <role_thinking>t</role_thinking> "
            "<role_action>bows</role_action> Hi [sic].",
        ),
        (Dialect.COSER, "Lear: [t] (bows) Hi [sic]."),
        (Dialect.STARRED, "Lear: *bows* Hi [sic]."),
        (Dialect.PLAIN, "Lear: bows Hi [sic]."),
    ],
)
def test_write_parts_and_turns(dialect: Dialect, expected: str) -> None:
    assert write_message(PARTS, dialect, name="Lear") == expected
    her = write_message(PARTS, Dialect.HER, name="Lear")
    assert write_message(parse_turn(her), dialect) == expected
    nameless = parse_turn(her.replace("Lear: ", ""))
    assert write_message(nameless, dialect, name="Lear") == expected
    assert write_message(PARTS, dialect) == expected.replace("Lear: ", "")


@pytest.mark.parametrize(
    ("parts", "dialect"),
    [
        ([(THOUGHT, "a] b"), (SPEECH, "Hi")], Dialect.COSER),  # b would be seen
        ([(SPEECH, "[not a thought]")], Dialect.COSER),  # would be hidden
        ([(SPEECH, "an (aside)")], Dialect.COSER),  # would become an action
        ([(ACTION, "a) b")], Dialect.COSER),
        ([(SPEECH, "*so*")], Dialect.STARRED),
        ([(SPEECH, "<role_thinking>x</role_thinking>")], Dialect.PLAIN),
        ([(SPEECH, "a</role_action>")], Dialect.HER),
    ],
)
def test_what_a_dialect_cannot_say_is_refused(parts: list[tuple[Kind, str]], dialect: Dialect) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        write_message(parts, dialect, name="Lear")


@pytest.mark.parametrize(
    "sign", ["[", "]", "(", ")", "[a", "a]", "(a", "*", "*a ", "<role_thinking>", "[x](y)*z*"]
)
@pytest.mark.parametrize("dialect", list(Dialect))
def test_time_is_linear(sign: str, dialect: Dialect) -> None:
    begin = time.process_time()
    view(parse_message(sign * 4000, dialect), Reader.OTHER_CHARACTER)
    assert time.process_time() - begin < 2.0
