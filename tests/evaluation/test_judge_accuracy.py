"""Figures of a judge, worked out by hand."""

from __future__ import annotations

import math

import pytest

from her_nemo.evaluation.judge_accuracy import Judged, judge_figures, pair_scores, table
from her_nemo.roleplay.verdict import Winner

ONE, TWO, TIE = Winner.CAND_1, Winner.CAND_2, Winner.TIE
JUDGED = [
    # pair, label, said, words of cand_1 and cand_2
    Judged("a", ONE, ONE, (9, 5)),  # right in both orders; the better one is longer
    Judged("a", TWO, TWO, (5, 9)),
    Judged("b", ONE, ONE, (4, 6)),  # cand_1 whatever stands there; the better one is shorter
    Judged("b", TWO, ONE, (6, 4)),
    Judged("c", ONE, TIE, (3, 3)),  # a tie twice: the same in both orders, and wrong
    Judged("c", TWO, TIE, (3, 3)),
    Judged("d", ONE, None, (7, 2)),  # one order cannot be read
    Judged("d", TWO, TWO, (2, 7)),
]


def test_every_figure() -> None:
    figures = judge_figures(JUDGED)
    assert {key: figures[key] for key in ("prompts", "pairs", "unparsed", "ties")} == {
        "prompts": 8, "pairs": 4, "unparsed": 1, "ties": 2,
    }  # fmt: skip
    assert figures["said_cand_1"] == pytest.approx(3 / 7)
    assert figures["accuracy"]["value"] == pytest.approx(4 / 7)
    assert figures["accuracy_all"]["value"] == pytest.approx(4 / 8)
    assert figures["accuracy_all"]["count"] == 8
    # Pairs score 1, 1/2, 0 and 1/2: mean 1/2, deviation sqrt(1/6), error of the mean sqrt(1/24).
    margin = 1.96 * math.sqrt(1 / 24)
    assert figures["accuracy_all"]["low"] == pytest.approx(0.5 - margin)
    assert figures["accuracy_all"]["high"] == pytest.approx(0.5 + margin)
    assert figures["position_consistency"]["value"] == pytest.approx(2 / 3)  # a and c of a, b, c
    assert figures["position_consistency"]["count"] == 3
    by_order = {name: (share["value"], share["count"]) for name, share in figures["by_order"].items()}
    assert by_order == {"cand_1": (pytest.approx(2 / 3), 3), "cand_2": (pytest.approx(2 / 4), 4)}
    by_length = {name: (share["value"], share["count"]) for name, share in figures["by_length"].items()}
    assert by_length == {"longer": (1.0, 3), "same": (0.0, 2), "shorter": (0.5, 2)}
    assert pair_scores(JUDGED) == {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.5}


def test_nothing_readable_is_no_accuracy_rather_than_zero() -> None:
    figures = judge_figures([Judged("a", ONE, None, (1, 2)), Judged("a", TWO, None, (2, 1))])
    assert figures["accuracy"] == {"value": None, "low": None, "high": None, "count": 0}
    assert figures["position_consistency"]["value"] is None
    assert figures["accuracy_all"]["value"] == 0.0
    assert "2 unparsed" in table(figures)


def test_the_table_says_them() -> None:
    said = table(judge_figures(JUDGED))
    assert "all                 0.571" in said
    assert "better is longer    1.000" in said
    assert "both orders agree   0.667" in said
    assert "8 verdicts on 4 pairs: 1 unparsed, 2 ties, cand_1 named in 0.429" in said


def test_labels_that_are_ties() -> None:
    judged = [Judged("a", TIE, TIE, (1, 2)), Judged("b", TIE, ONE, (1, 2))]
    figures = judge_figures(judged)
    assert figures["accuracy"]["value"] == 0.5
    assert figures["by_order"]["tie"]["count"] == 2
    assert figures["by_length"]["same"]["count"] == 2
    assert figures["position_consistency"]["count"] == 0
