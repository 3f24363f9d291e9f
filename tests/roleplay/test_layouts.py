"""The layouts of the system prompt, written and read back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.layouts import (
    COSER_REQUIREMENTS,
    HER_REQUIREMENTS,
    Heading,
    Layout,
    RolePrompt,
    read_prompt,
)
from her_nemo.roleplay.prompt import CONVERSATION_START, Utterance, build_messages

PROMPT = RolePrompt(
    name="Ada",
    book="The Mill",
    profile="A miller.\n\n**Traits:** stubborn.",
    background="A village.",
    scenario="The yard.",
    others=(("Bo", "A smith."), ("Cy", "A boy.")),
    inner_thoughts="She is tired.",
    description="Miller of the valley.",
    experience="Lost the wheel.",
)


def test_natural() -> None:
    assert PROMPT.text(Layout.HER_NATURAL) == (
        "You are Ada from The Mill.\n\nMiller of the valley.\n\n**Character Profile**\nA miller.\n\n"
        "**Traits:** stubborn.\n\n**Recent Experience**\nLost the wheel.\n\n**Background**\nA village."
        "\n\n**Current Scenario**\nThe yard."
        "\n\n**Your Inner State**\nShe is tired.\n\n**Other Characters**\n**Bo**: A smith.\n**Cy**: A boy."
        f"\n\n**Response Format**\n{HER_REQUIREMENTS}"
    )


@pytest.mark.parametrize(
    ("heading", "written"),
    [
        (Heading.EQUALS, "=== Current Scenario ==="),
        (Heading.HASHES, "## Current Scenario"),
        (Heading.STARS, "** Current Scenario **"),
    ],
)
def test_structured(heading: Heading, written: str) -> None:
    text = PROMPT.text(Layout.HER_STRUCTURED, heading)
    assert text.startswith("You are roleplaying as Ada.\n\nMiller of the valley.\n\n")
    assert f"\n\n{written}\nThe yard.\n\n" in text
    assert read_prompt(text) == (replace(PROMPT, book=""), Layout.HER_STRUCTURED)


def test_coser() -> None:
    text = PROMPT.text(Layout.COSER)
    assert text == (
        "You are Ada from The Mill.\n\n===Ada's Profile===\nMiller of the valley.\n\nA miller.\n\n"
        "**Traits:** stubborn.\n\nLost the wheel.\n\n===Current Scenario===\nThe yard.\n\n"
        "===Information about the other Characters===\n"
        "Bo: A smith.\n\nCy: A boy.\n\n===Your Inner Thoughts===\nShe is tired.\n\n===Requirements===\n"
        f"{COSER_REQUIREMENTS}"
    )
    prompt, layout = read_prompt(text)
    assert layout is Layout.COSER
    assert (prompt.name, prompt.book, prompt.others) == ("Ada", "The Mill", PROMPT.others)


def test_requirements_of_ones_own_are_kept() -> None:
    prompt = replace(PROMPT, requirements="Sing.")
    assert all(prompt.text(layout).endswith("\nSing.") for layout in Layout)


def test_a_section_of_the_profiles_own_stays_in_the_profile() -> None:
    for layout, line in ((Layout.HER, "===Youth==="), (Layout.HER_NATURAL, "**Youth**")):
        prompt = replace(PROMPT, profile=f"A miller.\n\n{line}\nHard.", description="", experience="")
        assert read_prompt(prompt.text(layout))[0] == prompt
    # one of our own titles, but out of order
    prompt = replace(PROMPT, scenario="The yard.\n\n===Background===\nHills.", description="", experience="")
    assert read_prompt(prompt.text())[0] == prompt


def test_a_name_with_from_in_it() -> None:
    prompt = RolePrompt("The Man from Snowy River", "Poems from Home", "A rider.")
    assert read_prompt(prompt.text()) == (prompt, Layout.HER)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Hello", "known layout"),
        ("You are roleplaying as Ada.\n\n===Character Profile===\nA miller.", "no Response Format section"),
        ("Be Ada.\n\n===Ada's Profile===\nA miller.", "You are Ada from BOOK"),
    ],
)
def test_what_cannot_be_read(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        read_prompt(text)


line = st.text(alphabet="abc é'.,:*", min_size=1, max_size=20).map(str.strip).filter(bool)
body = st.lists(line, min_size=1, max_size=3).map("\n\n".join)
name = st.text(alphabet="abcé '-", min_size=1, max_size=10).map(str.strip).filter(bool)


@settings(max_examples=500, deadline=None)
@given(
    name,
    name,
    body,
    st.one_of(st.just(""), body),
    st.lists(
        st.tuples(name, st.text(alphabet="abc é.,", min_size=1, max_size=20).map(str.strip)), max_size=3
    ),
    st.sampled_from([Layout.HER, Layout.HER_NATURAL]),
)
def test_prompts_are_read_back(
    who: str, book: str, profile: str, other: str, others: list[tuple[str, str]], layout: Layout
) -> None:
    prompt = RolePrompt(
        who,
        book,
        profile,
        background=other,
        scenario=other,
        others=tuple(others),
        requirements=other or "Speak.",
    )
    assert read_prompt(prompt.text(layout)) == (prompt, layout)


def test_the_history_is_in_the_layouts_dialect() -> None:
    history = [
        Utterance("Bo", "<role_thinking>fool</role_thinking> Hi. <role_action>waves</role_action>"),
        Utterance(
            "Ada", "<system_thinking>p</system_thinking>Ada: <role_thinking>liar</role_thinking> Oh [sic]?"
        ),
        Utterance("Cy", "Wait!"),
    ]
    messages = build_messages(PROMPT, "Ada", history, Layout.COSER)
    assert messages[0]["content"] == PROMPT.text(Layout.COSER)
    assert [(m["role"], m["content"]) for m in messages[1:]] == [
        ("user", CONVERSATION_START + "Bo: Hi. (waves)"),
        ("assistant", "Ada: [liar] Oh [sic]?"),
        ("user", "Cy: Wait!"),
    ]
    assert Layout.COSER.dialect is Dialect.COSER
    assert not Layout.COSER.expects_plan
    for layout in (Layout.HER_NATURAL, Layout.HER_STRUCTURED):
        assert (
            build_messages(PROMPT, "Ada", history, layout)[1:] == build_messages(PROMPT, "Ada", history)[1:]
        )
