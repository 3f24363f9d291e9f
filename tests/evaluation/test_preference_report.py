"""The report on reward models, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from her_nemo.evaluation.preference_report import (
    Order,
    Outcome,
    PairOutcome,
    length_group,
    outcome_of_scores,
    preference_report,
    table,
)

RIGHT, WRONG, TIE, FAILED = Outcome.RIGHT, Outcome.WRONG, Outcome.TIE, Outcome.FAILED


def pair(name: str, outcome: Outcome, order: Order = Order.NONE, **more) -> PairOutcome:
    return PairOutcome(name, outcome, **{"chosen_length": 10, "rejected_length": 10, "order": order} | more)


def test_a_scalar_model_by_hand() -> None:
    report = preference_report(
        [
            pair("a", RIGHT, chosen_length=100, rejected_length=50, margin=2.0, dimensions=("voice",)),
            pair("b", RIGHT, chosen_length=50, rejected_length=100, margin=1.0, dimensions=("voice", "plot")),
            pair("c", WRONG, chosen_length=50, rejected_length=100, margin=-0.5, dimensions=("plot",)),
            pair("d", TIE, chosen_length=90, rejected_length=100, margin=0.0),
        ]
    )
    assert report.overall.interval.mean == 2.5 / 4
    assert (report.overall.right, report.overall.wrong, report.overall.ties) == (2, 1, 1)
    assert report.overall.tie_share == 0.25
    # Four pairs: every resample is enumerated. 256 draws, of which 1 has four wrong ones.
    assert report.overall.interval.low == pytest.approx(0.25)
    assert report.overall.interval.high == 1.0
    means = {name: accuracy.interval.mean for name, accuracy in report.by_length.items()}
    assert means == {"chosen_longer": 1.0, "chosen_shorter": 0.5, "similar": 0.5}
    assert {n: a.interval.mean for n, a in report.by_dimension.items()} == {"plot": 0.5, "voice": 1.0}
    assert report.mean_margin == pytest.approx(2.5 / 4)
    assert (report.by_order, report.order_effect, report.consistent) == ({}, None, None)
    assert report.valid


def test_a_judge_by_hand() -> None:
    first, second = Order.CHOSEN_FIRST, Order.CHOSEN_SECOND
    report = preference_report(
        [
            pair("a", RIGHT, first), pair("a", RIGHT, second),
            pair("b", RIGHT, first), pair("b", WRONG, second),
            pair("c", TIE, first), pair("c", TIE, second),
            pair("d", RIGHT, first), pair("d", FAILED, second, failure="no_json"),
        ],
        max_failure_share=0.1,
    )  # fmt: skip
    # Means of the pairs: 1, 1/2, 1/2, 1.
    assert report.overall.interval.mean == 0.75
    assert report.overall.interval.scenes == 4
    assert (report.overall.scored, report.overall.failed) == (7, 1)
    assert report.by_order["chosen_first"].interval.mean == 3.5 / 4
    assert report.by_order["chosen_second"].interval.mean == 1.5 / 3
    assert report.consistent == 2 / 3
    assert report.order_effect.mean == pytest.approx(-1 / 3)  # over a, b, c: 0, -1, 0
    assert report.failures == {"no_json": 1}
    assert report.failure_share == 1 / 8
    assert not report.valid
    assert json.loads(json.dumps(report.as_dict()))["overall"]["ties"] == 2
    text = table(report)
    assert "INVALID: 12.5%" in text
    assert "order: chosen second     0.500" in text


def test_nothing_scored_is_not_valid() -> None:
    report = preference_report([pair("a", FAILED)])
    assert report.overall.interval is None
    assert not report.valid
    assert "all pairs" in table(report)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        preference_report([])
    with pytest.raises(ValueError, match="'a' is there twice"):
        preference_report([pair("a", RIGHT), pair("a", WRONG)])


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "outcome"),
    [
        (1.0, 0.5, 0.0, RIGHT),
        (0.5, 1.0, 0.0, WRONG),
        (1.0, 1.0, 0.0, TIE),
        (1.0, 0.5, 0.5, TIE),
        (math.nan, 0.5, 0.0, FAILED),
        (math.inf, 0.5, 0.0, FAILED),
    ],
)
def test_outcomes_of_scores(chosen: float, rejected: float, margin: float, outcome: Outcome) -> None:
    assert outcome_of_scores(chosen, rejected, margin) is outcome


def test_length_groups() -> None:
    assert [length_group(*lengths) for lengths in ((80, 100), (79, 100), (100, 79), (0, 0))] == [
        "similar",
        "chosen_shorter",
        "chosen_longer",
        "similar",
    ]
