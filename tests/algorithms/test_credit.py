"""The returns of a conversation's turns, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from her_nemo.algorithms.advantages import grpo
from her_nemo.algorithms.credit import turn_returns

# One start, three turns, two conversations: rows are turn by turn.
SCORES = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0, 30.0])
ALL = torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("credit", "discount", "wanted"),
    [
        ("conversation", 1.0, [3, 20, 3, 20, 3, 20]),
        ("last", 1.0, [6, 30, 6, 30, 6, 30]),
        ("turn", 1.0, [1, 10, 2, 20, 6, 30]),
        ("to_go", 1.0, [9, 60, 8, 50, 6, 30]),
        ("to_go", 0.5, [1 + 1 + 1.5, 10 + 10 + 7.5, 5, 35, 6, 30]),
        ("to_go", 0.0, [1, 10, 2, 20, 6, 30]),
    ],
)
def test_returns(credit: str, discount: float, wanted: list[float]) -> None:
    returns, kept = turn_returns(SCORES, ALL, 3, 2, credit, discount)
    assert returns.tolist() == wanted
    assert kept.all()


@pytest.mark.parametrize(
    ("credit", "wanted", "kept"),
    [
        # The first conversation's second turn has no score, the second conversation's last one has none.
        ("conversation", [3.5, 15, 3.5, 15, 3.5, 15], [1, 1, 1, 1, 1, 1]),
        ("last", [6, 0, 6, 0, 6, 0], [1, 0, 1, 0, 1, 0]),
        ("turn", [1, 10, 0, 20, 6, 0], [1, 1, 0, 1, 1, 0]),
        ("to_go", [0, 0, 0, 0, 6, 0], [0, 0, 0, 0, 1, 0]),
    ],
)
def test_turns_without_a_score(credit: str, wanted: list[float], kept: list[int]) -> None:
    keep = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)
    scores = SCORES.where(keep, torch.tensor(float("nan")))  # what is not a score may be anything
    returns, found = turn_returns(scores, keep, 3, 2, credit)
    assert returns.tolist() == wanted
    assert found.int().tolist() == kept


def test_several_starts_and_the_groups_of_relative_advantages() -> None:
    """Two starts of two turns and two conversations: each group of two rows is one turn of siblings."""
    scores = torch.tensor([0.0, 1.0, 0.0, 3.0, 5.0, 1.0, 5.0, 1.0])
    returns, _ = turn_returns(scores, torch.ones(8), 2, 2, "conversation")
    assert returns.tolist() == [0, 2, 0, 2, 5, 1, 5, 1]
    assert grpo(returns, 2).tolist() == pytest.approx([-1, 1, -1, 1, 1, -1, 1, -1], abs=1e-5)


def test_one_turn_changes_nothing() -> None:
    for credit in ("conversation", "last", "turn", "to_go"):
        assert turn_returns(SCORES, ALL, 1, 2, credit, 0.5)[0].tolist() == SCORES.tolist()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="6 scores are not whole conversations of 2 turns x 2"):
        turn_returns(SCORES, ALL, 2, 2, "turn")
    with pytest.raises(ValueError, match="credit is 'all'"):
        turn_returns(SCORES, ALL, 3, 2, "all")
