"""Thoughts go into a turn; what others see of it stays, character for character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from her_nemo.data.synthesis.gold import editable, insert_thoughts
from her_nemo.roleplay.turn import Kind, parse_turn
from her_nemo.roleplay.views import Reader, view

T, A, S = Kind.ROLE_THINKING, Kind.ROLE_ACTION, Kind.SPEECH
WISH = "I wish I were anywhere else on this earth."


def put(text: str, *parts: tuple[Kind, str], name: str | None = None):
    return insert_thoughts(parse_turn(text, expect_plan=False, expect_name=name), parts)


def test_a_thought_between_action_and_speech() -> None:
    text, faults = put("<role_action>bows</role_action> My lord.", (A, "bows"), (T, WISH), (S, "My lord."))
    assert not faults
    assert text == (f"<role_action>bows</role_action> <role_thinking>{WISH}</role_thinking> My lord.")


def test_the_original_marks_are_kept_where_the_model_writes_others() -> None:
    gold = "\u201cDon\u2019t\u201d\u2014he said\n\nnever."
    text, faults = put(gold, (S, '"Don\'t"-he said'), (T, WISH), (S, "never."))
    assert not faults
    assert text == f"\u201cDon\u2019t\u201d\u2014he said\n\n<role_thinking>{WISH}</role_thinking> never."


def test_an_old_thought_is_replaced_and_the_name_kept() -> None:
    gold = "Ben: <role_thinking>I moved it.</role_thinking> Not I."
    text, faults = put(gold, (S, "Not I."), (T, WISH), name="Ben")
    assert not faults
    assert text == f"Ben: Not I. <role_thinking>{WISH}</role_thinking>"


def test_an_action_stays_whole() -> None:
    gold = "<role_action>takes the cup and drinks</role_action>"
    _, faults = put(gold, (A, "takes the cup"), (T, WISH), (A, "and drinks"))
    assert [fault.kind for fault in faults] == ["splits_action"]
    assert put(gold, (A, "takes the cup"), (A, "and drinks")) == (gold, [])


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([(S, "My lords.")], "changed_gold"),
        ([(S, "My Lord.")], "changed_gold"),
        ([(S, "My lord")], "changed_gold"),
        ([(S, "My lord. Yes.")], "changed_gold"),
        ([(S, "lord. My")], "changed_gold"),
        ([(A, "bows"), (S, "My lord.")], "changed_gold"),
        ([(T, WISH)], "changed_gold"),
        ([(S, "My lo"), (T, WISH), (S, "rd.")], "splits_word"),
        ([(T, "I wish </role_thinking> aloud"), (S, "My lord.")], "malformed"),
        ([(T, "I <b> wish"), (S, "My lord.")], "malformed"),
    ],
)
def test_what_is_refused(parts, kind) -> None:
    text, faults = put("My lord.", *parts)
    assert kind in [fault.kind for fault in faults], (text, faults)


def test_turns_that_are_left_alone() -> None:
    assert editable(parse_turn("My lord.", expect_plan=False))
    for text in (
        "<role_thinking>I wish",
        "<Role_Action>bows</Role_Action> Yes.",
        "<role_thinking>x</role_thinking>",
    ):
        assert not editable(parse_turn(text, expect_plan=False)), text


words = st.text(alphabet="ab\u2019\u201c,.!\u00e9\u4e2d", min_size=1, max_size=6)
bodies = st.lists(words, min_size=1, max_size=6).map(" ".join)
blanks = st.sampled_from(["", " ", "\n", "\n\n"])
segments = st.lists(st.tuples(st.sampled_from([T, A, S]), bodies, blanks), min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(segments, st.data())
def test_no_view_of_others_ever_changes(parts, data) -> None:
    gold = "".join((body if kind is S else f"<{kind}>{body}</{kind}>") + blank for kind, body, blank in parts)
    turn = parse_turn(gold, expect_plan=False)
    if not editable(turn):
        return
    # The answer: the visible segments, cut at some blanks, with thoughts strewn in.
    answer: list[tuple[Kind, str]] = []
    for segment in turn.segments:
        if segment.kind.private or segment.blank:
            continue
        pieces = segment.text.split()
        cut = data.draw(st.integers(0, len(pieces))) if segment.kind is S else 0
        for piece in (pieces[:cut], pieces[cut:]):
            if data.draw(st.booleans()):
                answer.append((T, WISH))
            if piece:
                answer.append((segment.kind, " ".join(piece)))
    text, faults = insert_thoughts(turn, answer)
    assert not faults, (gold, answer, faults)
    new = parse_turn(text, expect_plan=False)
    assert editable(new)
    for reader in (Reader.OTHER_CHARACTER, Reader.USER):
        before, after = (view(t, reader) for t in (turn, new))
        assert "".join(before.split()) == "".join(after.split())
    assert sum(segment.kind is T for segment in new.segments) == sum(kind is T for kind, _ in answer)
