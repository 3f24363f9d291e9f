"""What a judge in training earns, to the digit."""

from __future__ import annotations

import json

import pytest
import torch

from her_nemo.rewards.reward import Replies
from her_nemo.rewards.verdict import VerdictReward
from her_nemo.roleplay.verdict import Winner


def verdict(better: str, winner: str | None = None) -> str:
    body = {
        "principles": [
            {"name": "Style", "dimension": "Overall Quality", "level": "sentence", "content": "c", "reason": "r"}
        ],
        "comparisons": [{"principle": "Style", "winner": winner or better}],
        "analysis": "a",
        "better_response": better,
    }
    return "I think.\n" + json.dumps(body)


def replies(trace_ids: list[str], texts: list[str]) -> Replies:
    count = len(texts)
    return Replies(
        prompts=[""] * count, texts=texts, prompt_ids=[[1]] * count, reply_ids=[[2]] * count, finished=[True] * count,
        tokens_BS=torch.ones(count, 2, dtype=torch.long), lengths_B=torch.full((count,), 2), trace_ids=trace_ids,
    )  # fmt: skip


def test_right_wrong_tied_and_unreadable() -> None:
    reward = VerdictReward({"a": Winner.CAND_1, "b": Winner.CAND_2}, correct=1.0, valid=0.25)
    texts = [
        verdict("cand_1"), verdict("cand_1"), verdict("tie"), verdict("cand_2"),
        verdict("cand_2")[:-1], "cand_1", verdict("cand_1", winner="cand_2"),
    ]  # fmt: skip
    said = reward(replies(["a", "b", "a", "b", "b", "a", "a"], texts))
    assert said.scores_B.tolist() == [1.25, 0.25, 0.25, 1.25, 0.0, 0.0, 0.0]
    # Its own fault: unlike a judge's that is only asked, an unreadable verdict is learned from.
    assert said.scored_B.all()
    assert said.counts == {"unparsed": 3.0}
    assert said.parts["correct"].tolist() == [1, 0, 0, 1, 0, 0, 0]
    assert said.parts["tie"].tolist() == [0, 0, 1, 0, 0, 0, 0]


def test_a_prompt_without_a_label_is_an_error() -> None:
    with pytest.raises(KeyError):
        VerdictReward({}, correct=1.0, valid=0.0)(replies(["a"], ["x"]))
    with pytest.raises(ValueError, match="longer"):
        VerdictReward({}, correct=1.0, valid=0.0)(replies([], ["x"]))
