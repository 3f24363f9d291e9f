"""Verdicts: written and read back, told in the other order, and refused with the right word."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from her_nemo.roleplay.principles import Dimension, Level
from her_nemo.roleplay.verdict import (
    VERDICT_SCHEMA,
    ChosenPrinciple,
    Comparison,
    Verdict,
    VerdictError,
    Winner,
    parse_verdict,
    swap,
    swap_names,
    write_verdict,
)

BODY: dict[str, Any] = {
    "principles": [
        {
            "name": "Secret kept",
            "dimension": "Safety & Boundaries",
            "level": "sentence",
            "content": "What is hidden stays unsaid.",
            "reason": "cand_2 tells where the ring is.",
        },
        {
            "name": "Voice",
            "dimension": "Character Development",
            "level": "session",
            "content": "Diction of its own.",
            "reason": "Both speak like her.",
        },
    ],
    "comparisons": [
        {"principle": "Secret kept", "reason": "only cand_1 keeps it", "winner": "cand_1"},
        {"principle": "Voice", "winner": "tie"},
    ],
    "analysis": "cand_1 is as good and keeps the secret.",
    "better_response": "cand_1",
}


def changed(**parts: Any) -> str:
    return json.dumps(BODY | parts)


def test_reads_every_part_after_reasoning_and_in_a_fence() -> None:
    for text in (
        json.dumps(BODY),
        f"The plan {{o}} is {{}} odd.\n```json\n{json.dumps(BODY, indent=1)}\n```\n",
        f'I first thought {{"better_response": "cand_2"}}, but no.\n\n{json.dumps(BODY)} That is all.',
    ):
        verdict = parse_verdict(text)
        assert verdict.better is Winner.CAND_1
        assert verdict.principles[0] == ChosenPrinciple(
            "Secret kept",
            Dimension.SAFETY,
            Level.SENTENCE,
            "What is hidden stays unsaid.",
            "cand_2 tells where the ring is.",
        )
        assert verdict.comparisons == (
            Comparison("Secret kept", Winner.CAND_1, "only cand_1 keeps it"),
            Comparison("Voice", Winner.TIE),
        )
        assert verdict.analysis == BODY["analysis"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no_json", "cand_1 is better."),
        ("no_json", "{ {{ better_response: cand_1"),
        ("no_better_response", 'so {"winner": "cand_1"} it is'),
        ("broken_json", json.dumps(BODY)[:-1]),
        ("unknown_winner", changed(better_response="cand_3")),
        ("unknown_winner", changed(better_response=1)),
        ("unknown_winner", changed(better_response=["cand_1"])),
        ("unknown_winner", changed(comparisons=[{"principle": "Voice", "winner": "Cand_1"}])),
        ("bad_part", changed(principles=[])),
        ("bad_part", changed(principles={"name": "Voice"})),
        ("bad_part", changed(comparisons=["Voice"])),
        ("bad_part", changed(analysis=" ")),
        ("bad_part", changed(principles=[BODY["principles"][0] | {"dimension": "Taste"}])),
        ("bad_part", changed(principles=[BODY["principles"][0] | {"dimension": {}}])),
        ("bad_part", changed(principles=[BODY["principles"][0] | {"level": "book"}])),
        ("bad_part", changed(principles=[BODY["principles"][0] | {"reason": None}])),
        ("bad_part", changed(comparisons=[{"principle": "Voice", "winner": "tie", "reason": 3}])),
        (
            "unknown_principle",
            changed(comparisons=[*BODY["comparisons"], {"principle": "Wit", "winner": "tie"}]),
        ),
        ("principle_twice", changed(principles=[*BODY["principles"], BODY["principles"][1]])),
        ("principle_twice", changed(comparisons=[*BODY["comparisons"], BODY["comparisons"][1]])),
        ("not_compared", changed(comparisons=BODY["comparisons"][:1])),
        ("contradiction", changed(better_response="cand_2")),
        ("contradiction", changed(better_response="tie")),
    ],
)
def test_says_what_is_wrong(kind: str, text: str) -> None:
    with pytest.raises(VerdictError) as caught:
        parse_verdict(text)
    assert caught.value.kind == kind
    assert str(caught.value)


def test_a_tie_may_be_even_or_balanced() -> None:
    for winners in (("tie", "tie"), ("cand_1", "cand_2")):
        comparisons = [
            {"principle": entry["name"], "winner": winner}
            for entry, winner in zip(BODY["principles"], winners, strict=True)
        ]
        assert parse_verdict(changed(comparisons=comparisons, better_response="tie")).better is Winner.TIE


def test_hostile_texts_end_in_an_error_soon() -> None:
    for text in ("{" * 20_000, '{"a":' * 3_000, "[" * 5_000 + "{", '{"better_response":"cand_1"' * 500):
        with pytest.raises(VerdictError):
            parse_verdict(text)


def test_the_schema_is_that_of_what_is_written() -> None:
    assert VERDICT_SCHEMA["required"] == ["principles", "comparisons", "analysis", "better_response"]
    written = json.loads(write_verdict(parse_verdict(json.dumps(BODY))))
    assert list(written) == list(VERDICT_SCHEMA["properties"])
    for key in ("principles", "comparisons"):
        item = VERDICT_SCHEMA["properties"][key]["items"]
        assert list(written[key][0]) == list(item["properties"])
        assert set(item["required"]) >= {"principles": {"reason"}, "comparisons": {"winner"}}[key]
    json.dumps(VERDICT_SCHEMA)


texts = st.text(alphabet='ab {}"\\\n:,_12cnd\u03b1', min_size=1, max_size=30).filter(
    lambda text: text.strip()
)


@st.composite
def verdicts(draw: st.DrawFn) -> Verdict:
    names = draw(st.lists(texts, min_size=1, max_size=4, unique=True))
    principles = tuple(
        ChosenPrinciple(
            name, draw(st.sampled_from(Dimension)), draw(st.sampled_from(Level)), draw(texts), draw(texts)
        )
        for name in names
    )
    winners = draw(st.lists(st.sampled_from(Winner), min_size=len(names), max_size=len(names)))
    won = [winner for winner in winners if winner is not Winner.TIE]
    even = [Winner.TIE] if len(set(won)) != 1 else []
    comparisons = tuple(
        Comparison(name, winner, draw(st.one_of(st.just(""), texts)))
        for name, winner in zip(names, winners, strict=True)
    )
    return Verdict(principles, comparisons, draw(texts), draw(st.sampled_from([*won, *even])))


@settings(max_examples=200, deadline=None)
@given(verdicts(), st.text(alphabet='ab{}"\n cand_1', max_size=40))
def test_written_and_read_back(verdict: Verdict, reasoning: str) -> None:
    assert parse_verdict(write_verdict(verdict)) == verdict
    # Reasoning with brackets of its own may swallow nothing of the verdict.
    assert parse_verdict(write_verdict(verdict, reasoning.replace('"', ""))) == verdict


@settings(max_examples=200, deadline=None)
@given(verdicts())
def test_swapped_twice_is_the_same_and_once_is_valid(verdict: Verdict) -> None:
    other = swap(verdict)
    assert swap(other) == verdict
    assert parse_verdict(write_verdict(other)) == other
    assert other.better is verdict.better.swapped
    wins = [comparison.winner for comparison in verdict.comparisons]
    assert [comparison.winner.swapped for comparison in other.comparisons] == wins


def test_names_are_exchanged_in_texts() -> None:
    assert swap_names("cand_1 beats Cand_2; cand_12 and a cand_1.") == (
        "cand_2 beats Cand_1; cand_12 and a cand_2."
    )
