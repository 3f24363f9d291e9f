"""The reward of a turn of a conversation: another reward's scores, shared out over the conversation's turns."""

from __future__ import annotations

from her_nemo.algorithms.credit import turn_returns
from her_nemo.rewards.reward import Replies, Reward, Scores


class TurnCredit:
    """A reward whose score of a turn is its return (algorithms/credit.py). What the inner reward said of the turn
    itself is the part `turn`."""

    def __init__(self, reward: Reward, credit: str, discount: float) -> None:
        self._reward, self._credit, self._discount = reward, credit, discount

    def __call__(self, replies: Replies) -> Scores:
        said = self._reward(replies)
        returns_B, kept_B = turn_returns(
            said.scores_B, said.scored_B, replies.turns, replies.group_size, self._credit, self._discount
        )
        own_B = said.scores_B.where(said.scored_B, said.scores_B.new_zeros(()))
        return Scores(returns_B, kept_B, said.counts, {**said.parts, "turn": own_B})
