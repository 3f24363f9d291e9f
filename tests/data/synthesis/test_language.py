"""The checks on words alone: what they catch, and what they leave in peace."""

from __future__ import annotations

import pytest

from her_nemo.data.synthesis import language

OTHERS = ["Edmund", "King Lear"]


@pytest.mark.parametrize(
    "text",
    [
        "I must be careful. Edmund thinks I am a fool.",
        "He knows the truth and I can only wait for it.",
        "King Lear still loves her best, and that galls me.",
        "They secretly fear me; I enjoy it.",
        "She hopes to be queen. I see it.",
        "\u201cPeace,\u201d I say to myself. He believes every word.",
    ],
)
def test_mind_reading(text) -> None:
    assert list(language.mind_reading(text, OTHERS))


@pytest.mark.parametrize(
    "text",
    [
        "He knows the truth, I fear.",
        "Perhaps Edmund thinks I am a fool.",
        "I fear he knows the truth.",
        "Does he know? I cannot tell what Edmund wants.",
        "He seems to believe me, thank heaven.",
        "I think she hates me.",
        "He looks as though he regrets it already, and I could almost pity him.",
        "I know my own mind, and I want no crown.",
        "Edmund said that he loves me, and I said nothing.",
        "He walks to the window; I follow him with my eyes.",
        "If he loves me he will stay.",
    ],
)
def test_a_guess_is_no_mind_reading(text) -> None:
    assert list(language.mind_reading(text, OTHERS)) == []


def test_first_person() -> None:
    assert language.first_person("What a fool I\u2019ve been.")
    assert language.first_person("Ours is the harder part.")
    assert not language.first_person("Inward rot; mere illness of the mind.")
    assert not language.first_person("He will say \u201cI am innocent\u201d and weep.")
    assert not language.latin("\u6211\u4e0d\u80fd\u8bf4\u3002")
    assert language.latin("d\u00e9j\u00e0 vu")


def test_self_by_name() -> None:
    assert language.speaks_of_self_by_name("Edmund thinks this is the hour.", "Edmund")
    assert not language.speaks_of_self_by_name("Edmund, think! I must.", "Edmund")


def test_shared_runs() -> None:
    said = "The well is dry again, Ben."
    assert language.shared_run("So: the WELL is dry, again!", said, 5) == "the well is dry again"
    assert language.shared_run("the well is dry", said, 5) == ""
    assert language.shared_run("x the well is dry again", said, 5, known="the well is dry again") == ""
    assert language.shared_run("a b c d x b c d e", "a b c d e", 4, known="a b c d") == "b c d e"
