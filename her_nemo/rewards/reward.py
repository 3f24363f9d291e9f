"""What every reward does: replies in, one number a reply out, with a count of those it could not judge.

PPO knows this protocol alone; behind it stand the scalar reward model (`scalar`), rules (`rules`), a judge that
compares replies (`generative`), and sums of several (`Mix`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from her_nemo.roleplay.prompt import Message

_MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


def messages_of(prompt: str) -> list[Message]:
    """The messages of a prompt as it is served, with its control tokens."""
    return [{"role": role, "content": text} for role, text in _MESSAGE.findall(prompt)]


@dataclass(frozen=True)
class Replies:
    """The replies of one rollout on this replica; entry i of everything belongs to reply i.

    Attributes:
        prompts: what was asked, as text with its control tokens (<|im_start|>...).
        texts: the replies without control tokens.
        prompt_ids, reply_ids: the same as token ids, the reply's <|im_end|> included where one was drawn.
        finished: False where the reply was cut at its longest.
        tokens_BS, lengths_B: prompt and reply in one row, padded right, and their lengths, for a model to read.
        group_size: replies to one prompt, which follow each other. In conversations: the same turn of conversations
            from one start.
        turns: turns of a conversation; rows come by start, then turn, then conversation.
        trace_ids: the names of the prompts' rows, for a reward that knows something of them.
    """

    prompts: Sequence[str]
    texts: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    reply_ids: Sequence[Sequence[int]]
    finished: Sequence[bool]
    tokens_BS: torch.Tensor
    lengths_B: torch.Tensor
    group_size: int = 1
    trace_ids: Sequence[str] = ()
    turns: int = 1

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Scores:
    """What a reward says.

    Attributes:
        scores_B: [B] fp32, on the replies' device.
        scored_B: [B] bool, False where there is no verdict: such a reply is left out of the update, its score unused.
        counts: sums over this replica's replies, logged as `reward/<name>` divided by the replies; "unparsed" among
            them where text has to be read.
        parts: [B] named parts that the score is made of, before weighting; their means are logged likewise.
    """

    scores_B: torch.Tensor
    scored_B: torch.Tensor
    counts: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Reward(Protocol):
    """Anything that can score replies. Called on all ranks of a replica with the same replies; same answer on each."""

    def __call__(self, replies: Replies) -> Scores: ...


@runtime_checkable
class Begins(Protocol):
    """A reward that can do its work beside this process's own."""

    def begin(self, replies: Replies) -> None:
        """Start scoring; the call with the same replies that follows waits for it. Called as the reward is."""
        ...


def begin_scoring(reward: Reward, replies: Replies) -> None:
    """Let a reward start, where it can."""
    if isinstance(reward, Begins):
        reward.begin(replies)


class Mix:
    """A weighted sum of rewards. A reply that one of them could not judge has no score.

    Counts of one name are added up; where several parts have it, each is told as `<part>_<name>` besides.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Reward]]) -> None:
        """`parts`: name -> (weight, reward)."""
        if not parts:
            raise ValueError("a mix of no rewards")
        self._parts = dict(parts)

    def begin(self, replies: Replies) -> None:
        """See `Begins`."""
        for _, reward in self._parts.values():
            begin_scoring(reward, replies)

    def __call__(self, replies: Replies) -> Scores:
        device = replies.tokens_BS.device
        total = torch.zeros(len(replies), device=device)
        scored = torch.ones(len(replies), dtype=torch.bool, device=device)
        counts: dict[str, float] = {}
        parts: dict[str, torch.Tensor] = {}
        everyone = {name: reward(replies) for name, (_, reward) in self._parts.items()}
        several = Counter(key for said in everyone.values() for key in said.counts)
        for name, (weight, _) in self._parts.items():
            said = everyone[name]
            # A score that is not used may be anything, NaN included.
            found = torch.where(said.scored_B, said.scores_B, torch.zeros_like(total))
            total = total + weight * found
            scored = scored & said.scored_B
            parts |= {name: found} | dict(said.parts)
            for key, value in said.counts.items():
                counts[key] = counts.get(key, 0.0) + value
                if several[key] > 1:
                    counts[f"{name}_{key}"] = value
        return Scores(total, scored, counts, parts)
