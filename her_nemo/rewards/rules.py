"""Rewards that are rules: format, leak, length, repetition. Each is from 0 (bad) to 1 (as it should be).

They know what the policy was told and what it wrote, nothing of the oracle. Replies are read *fail private*:
what cannot be parsed is scored as it is read, and counted as unparsed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from her_nemo.rewards.reward import Replies, Scores, messages_of
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.layouts import read_prompt
from her_nemo.roleplay.measures import VERBATIM_WORDS, leaks, repetition, words
from her_nemo.roleplay.turn import Turn, parse_turn
from her_nemo.roleplay.views import Reader, view

RULES = ("format", "leak", "length", "repetition")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Told:
    """What the rules take from a prompt.

    Attributes:
        name: who should speak; None where the system prompt has no known layout.
        hidden: thoughts of the character that stand in the prompt (his inner thoughts, sentence by sentence, and
            those of his earlier turns), of `VERBATIM_WORDS` words or more: shorter ones may well be said aloud.
    """

    name: str | None
    hidden: tuple[str, ...]


@lru_cache(maxsize=4096)
def told(prompt: str) -> Told:
    """Reads a prompt as it is served, with its control tokens."""
    messages = messages_of(prompt)
    name, thoughts = None, []
    if messages and messages[0]["role"] == "system":
        try:
            seen, _ = read_prompt(messages[0]["content"])
        except ValueError:
            pass  # another layout than ours: no name to expect, and no section that is known to be secret
        else:
            name = seen.name
            thoughts += _SENTENCE_END.split(seen.inner_thoughts)
    for message in messages:
        if message["role"] == "assistant":
            turn = parse_turn(message["content"], expect_plan=False)
            thoughts += [segment.text for segment in turn.segments if segment.kind.private]
    return Told(name, tuple(text for text in thoughts if len(words(text)) >= VERBATIM_WORDS))


def format_rule(turn: Turn) -> float:
    """1 for a turn without any defect, else 0."""
    return float(turn.well_formed)


def leak_rule(turn: Turn, hidden: Sequence[str] = ()) -> float:
    """0 where a thought shows (measures.leaks), one of this turn or one of `hidden` word for word; else 1."""
    return 0.0 if leaks(turn, hidden) else 1.0


def length_rule(turn: Turn, shortest: int, longest: int) -> float:
    """1 for `shortest` to `longest` words that others see or hear; less in proportion below, and 0 from twice the
    longest on."""
    count = len(words(view(turn, Reader.USER)))
    if count < shortest:
        return count / shortest
    return max(0.0, 1.0 - max(0, count - longest) / longest)


def repetition_rule(turn: Turn) -> float:
    """1 less the share of 4-grams of the whole turn that stood in it before."""
    return 1.0 - repetition(words(" ".join(turn.text_of(kind) for kind in Kind)))


class RuleReward:
    """The weighted sum of the rules; a rule of weight 0 is measured and logged all the same."""

    def __init__(self, weights: Mapping[str, float], *, shortest: int, longest: int) -> None:
        """`weights`: of each of RULES. `shortest`, `longest`: words of a visible reply.

        Raises:
            ValueError: weights for other rules than RULES.
        """
        if set(weights) != set(RULES):
            raise ValueError(f"weights for {sorted(weights)}; the rules are {sorted(RULES)}")
        self._weights, self._shortest, self._longest = dict(weights), shortest, longest

    def __call__(self, replies: Replies) -> Scores:
        rows, unparsed = [], 0
        for prompt, text in zip(replies.prompts, replies.texts, strict=True):
            known = told(prompt)
            turn = parse_turn(text, expect_name=known.name)
            unparsed += not turn.well_formed
            rows.append(
                (
                    format_rule(turn),
                    leak_rule(turn, known.hidden),
                    length_rule(turn, self._shortest, self._longest),
                    repetition_rule(turn),
                )
            )
        table = torch.tensor(rows, dtype=torch.float32, device=replies.tokens_BS.device)
        parts = dict(zip(RULES, table.unbind(dim=1), strict=True))
        scores_B = sum(
            (self._weights[name] * part for name, part in parts.items()), torch.zeros_like(table[:, 0])
        )
        return Scores(
            scores_B, torch.ones_like(scores_B, dtype=torch.bool), {"unparsed": float(unparsed)}, parts
        )
