"""The arithmetic of CoSER's benchmark against tables by hand, and how answers are read."""

from __future__ import annotations

import pytest

from her_nemo.evaluation.coser_protocol import (
    DIMENSIONS,
    END_CHAT,
    PROTOCOLS,
    flaws_of,
    judge_schema,
    score_of,
)
from her_nemo.evaluation.coser_simulation import NONE, read_next_speaker
from her_nemo.evaluation.endpoint import BadAnswer
from her_nemo.evaluation.overlap import bleu, rouge_l


@pytest.mark.parametrize(
    ("severities", "messages", "score"),
    [
        ([], 0, 100.0),
        ([], 12, 100.0),  # 100 + 18: no more than 100
        ([1], 0, 95.0),
        ([5, 4, 3], 10, 55.0),  # 100 - 5 x (12 - 3)
        ([5] * 4, 0, 0.0),
        ([5] * 6, 10, 0.0),  # 100 - 5 x 27: no less than 0
        ([1, 2], 7, 95.5),  # 100 - 5 x (3 - 2.1)
        ([2, 2, 2, 2], 20, 90.0),
        ([10], 1, 51.5),
    ],
)
def test_score_by_hand(severities, messages, score) -> None:
    assert score_of(severities, messages) == pytest.approx(score, abs=1e-9)


def answer(*severities, dimension="Anthropomorphism"):
    return {dimension: {"flaws": [{"instance": "i", "type": "t", "severity": s} for s in severities]}}


@pytest.mark.parametrize(
    ("protocol", "counted"),
    [("upstream", [3, 1, 0, 0, 7]), ("her", [3, 0, 0, 2.5, 7])],
)
def test_odd_severities_count_as_in_each_repository(protocol, counted) -> None:
    body = answer(3, None, "4", 2.5, 7)
    assert [flaw.severity for flaw in flaws_of(body, "Anthropomorphism", PROTOCOLS[protocol])] == counted


@pytest.mark.parametrize("severity", [None, "4", 2.5, 0, 6, True, [1]])
def test_fixed_takes_no_odd_severity(severity) -> None:
    with pytest.raises(BadAnswer, match="whole number from 1 to 5"):
        flaws_of(answer(severity), "Anthropomorphism", PROTOCOLS["fixed"])
    found = flaws_of(answer(1, 5.0), "Anthropomorphism", PROTOCOLS["fixed"])
    assert [flaw.severity for flaw in found] == [1, 5]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"Anthropomorphism": []},
        {"Anthropomorphism": {"flaws": None}},
        {"Anthropomorphism": {"flaws": ["x"]}},
        {"Storyline Quality": {"flaws": []}},
    ],
)
def test_an_answer_without_flaws_of_the_dimension_is_none(protocol, body) -> None:
    with pytest.raises(BadAnswer):
        flaws_of(body, "Anthropomorphism", PROTOCOLS[protocol])


def test_the_schema_asks_for_what_is_read() -> None:
    for dimension in DIMENSIONS:
        flaws = judge_schema(dimension)["properties"][dimension]["properties"]["flaws"]
        assert flaws["items"]["required"] == ["instance", "type", "severity"]
        assert flaws["items"]["properties"]["severity"]["enum"] == [1, 2, 3, 4, 5]


SPEAKERS = ("King Lear", "Fool", "Environment")


@pytest.mark.parametrize(
    ("text", "last_field", "anywhere", "exact"),
    [
        ("Fool", "Fool", "Fool", "Fool"),
        ("1. Because.\n2. **Next Speaker**: King Lear.", "King Lear", "King Lear", "King Lear"),
        ("Next Speaker: Fool\nNo. Next Speaker: Environment", "Environment", "Environment", "Environment"),
        ("Next Speaker: <END CHAT>", END_CHAT, END_CHAT, END_CHAT),
        ("<END CHAT>", END_CHAT, END_CHAT, END_CHAT),
        ("Fool: what?", "Fool", "Fool", "Fool"),
        ("random", "random", NONE, NONE),
        ("next speaker: king lear", "king lear", "King Lear", "King Lear"),
        ("The Fool would answer.", "The Fool would answer.", "Fool", "Fool"),
        ("Next Speaker: the Fool, to King Lear", "the Fool, to King Lear", "King Lear", NONE),
        ("Nobody knows.\nIt is the turn of the Fool", "Nobody knows.\nIt is the turn of the Fool", "Fool", "Fool"),
        ("", "", NONE, NONE),
        ("Fool " + "x" * 1500, "Fool " + "x" * 1500, NONE, "Fool"),
    ],
)  # fmt: skip
def test_the_next_speaker_is_read_as_each_protocol_reads(text, last_field, anywhere, exact) -> None:
    found = [read_next_speaker(text, SPEAKERS, reading) for reading in ("last_field", "anywhere", "exact")]
    assert found == [last_field, anywhere, exact]


def test_bleu_by_hand() -> None:
    # 6 words against 6: precisions 5/6, 3/5, 1/4 and no 4-gram.
    assert bleu("the cat sat on the mat", "the cat sat in the mat") == 0.0
    # 5 words, all 5/5, 4/4, 3/3, 2/2 in a reference of 6: brevity exp(1 - 6/5).
    assert bleu("a b c d e", "a b c d e f") == pytest.approx(0.8187307530779818)
    # 6 words against 5: 5/6, 4/5, 3/4, 2/3 multiply to 1/3.
    assert bleu("a b c d e f", "A B C D, E!") == pytest.approx((1 / 3) ** 0.25)
    assert bleu("same words here now", "same words here now") == 1.0
    assert bleu("", "a b c d") == 0.0


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "the cat the mat": 4 of 6 and 4 of 5.
    assert rouge_l("the cat sat on the mat", "the cat in the mat") == pytest.approx(2 * 4 / 11)
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("a b", "c d") == 0.0
    assert rouge_l("", "") == 0.0
