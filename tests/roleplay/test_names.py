"""Names compared: what is one name, and what is not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from her_nemo.roleplay.names import normalise_name, same_name
from her_nemo.roleplay.prompt import Utterance, build_messages
from her_nemo.roleplay.turn import Defect, parse_turn


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("D\u2019Artagnan", "D'Artagnan"),
        ("D`Artagnan", "d\u00b4artagnan"),
        ("KING  LEAR ", "King\u00a0Lear"),
        ("Jean\u2010Luc", "Jean-Luc"),
        ("\u201cFool\u201d", '"fool"'),
        ("Zoe\u0308", "Zo\u00eb"),
        ("\uff2c\uff45\uff41\uff52", "Lear"),
        ("Le\u200bar", "Lear"),
        ("Stra\u00dfe", "STRASSE"),
    ],
)
def test_one_name(one: str, other: str) -> None:
    assert same_name(one, other)
    assert normalise_name(one) == normalise_name(other)


@pytest.mark.parametrize(
    ("one", "other"), [("Lear", "King Lear"), ("Ann", "Anne"), ("Zoe", "Zo\u00eb"), ("", "a")]
)
def test_two_names(one: str, other: str) -> None:
    assert not same_name(one, other)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing(name: str) -> None:
    assert normalise_name(normalise_name(name)) == normalise_name(name)
    assert same_name(name, f" {name} ")


def test_a_name_is_compared_but_kept_as_written() -> None:
    turn = parse_turn("D\u2019ARTAGNAN: En garde!", expect_plan=False, expect_name="D'Artagnan")
    assert turn.well_formed
    assert turn.name == "D\u2019ARTAGNAN"
    assert parse_turn("Athos: Hi", expect_plan=False, expect_name="D'Artagnan").defects == (
        Defect.WRONG_NAME,
    )
    history = [Utterance("D\u2019Artagnan", "Mine."), Utterance("Athos", "His.")]
    roles = [message["role"] for message in build_messages("S", "d'artagnan", history)]
    assert roles == ["system", "user", "assistant", "user"]
