"""The packed row of replies that share prompts: what stands in it, and what a group must hold to."""

from __future__ import annotations

import pytest
import torch

from her_nemo.megatron.shared_prompts import GROUP, layout, neighbours


def batch(**changes: object) -> dict[str, torch.Tensor]:
    """Prompt 1 2 3 with replies 4 5 and 6; prompt 7 with reply 8 9. Padded with 0."""
    rows = {
        "tokens_BS": torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 3, 6, 0, 0], [7, 8, 9, 0, 0, 0]]),
        "prompt_lengths_B": torch.tensor([3, 3, 1]),
        "lengths_B": torch.tensor([5, 4, 3]),
        GROUP: torch.tensor([0, 0, 1]),
    }
    return rows | changes


def test_each_prompt_stands_in_the_row_once() -> None:
    found = layout(batch(), "lm")
    assert found.tokens_1N.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert found.positions_N.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert (found.used, found.max_seqlen_q) == (9, 5)
    # 3 -> 4, 4 -> 5; 3 -> 6; 7 -> 8, 8 -> 9: from where in the row, and to which place of the [3, 6] rows.
    assert found.source_L.tolist() == [2, 3, 2, 6, 7]
    assert found.target_L.tolist() == [2, 3, 8, 12, 13]


def test_a_value_is_there_for_the_last_token_too() -> None:
    found = layout(batch(), "scalar")
    assert found.source_L.tolist() == [2, 3, 4, 2, 5, 6, 7, 8]
    assert found.target_L.tolist() == [2, 3, 4, 8, 9, 12, 13, 14]


def test_numbers_go_back_to_their_rows() -> None:
    found = layout(batch(), "lm").spread(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), 3, 6)
    assert found.tolist() == [[0, 0, 1, 2, 0, 0], [0, 0, 3, 0, 0, 0], [4, 5, 0, 0, 0, 0]]


def test_lengthening_pads_behind_the_end() -> None:
    found = layout(batch(), "lm").padded(12)
    assert found.tokens_1N.shape == (1, 12)
    assert found.positions_N.tolist()[9:] == [0, 0, 0]
    assert found.used == 9


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_BS": torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 4, 6, 0, 0], [7, 8, 9, 0, 0, 0]])},
        {"prompt_lengths_B": torch.tensor([3, 2, 1])},
        {GROUP: torch.tensor([0, 0, 0])},
    ],
    ids=["other tokens", "other length", "another prompt"],
)
def test_rows_of_a_group_that_differ_in_their_prompt_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="are said to share a prompt and do not"):
        layout(batch(**changes), "lm")


def test_runs_of_equal_numbers() -> None:
    assert neighbours([7, 7, 3, 7]) == [[0, 1], [2], [3]]
