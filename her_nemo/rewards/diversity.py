"""Diversity control: a reward for replies that differ from the others of their group, and a watch over the run.

Without either, a policy that is trained on one reward falls onto one way of building its turns; HER reports one pattern
in 96.1 % of replies by step 50 (arXiv 2601.21459).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from her_nemo.data.patterns import entropy_bits
from her_nemo.rewards.reward import Replies, Scores
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.measures import bleu_to_others, pattern_of, self_bleu, words
from her_nemo.roleplay.turn import Turn, parse_turn


def pattern_novelty(turns: Sequence[Turn]) -> list[float]:
    """Share of the other turns that are well formed and built in another order. 0 for a malformed turn, and malformed
    ones make nobody novel: there would be a reward for breaking the format."""
    found = Counter(pattern_of(turn) for turn in turns if turn.well_formed)
    others = max(1, len(turns) - 1)
    return [(found.total() - found[pattern_of(turn)]) / others if turn.well_formed else 0.0 for turn in turns]


def text_novelty(turns: Sequence[Turn]) -> list[float]:
    """1 less each turn's BLEU-4 against the others of its group (measures.bleu_to_others); 0 for a malformed turn."""
    alike = bleu_to_others([_words(turn) for turn in turns])
    return [1.0 - same if turn.well_formed else 0.0 for turn, same in zip(turns, alike, strict=True)]


class DiversityReward:
    """What a reply earns by differing from the other replies to the same prompt; needs groups of 2 or more."""

    def __init__(self, pattern_weight: float, text_weight: float) -> None:
        self._pattern_weight, self._text_weight = pattern_weight, text_weight

    def __call__(self, replies: Replies) -> Scores:
        """
        Raises:
            ValueError: a group of one.
        """
        size = replies.group_size
        if size < 2:
            raise ValueError("a reply to a prompt of its own has no group to differ from")
        turns = [parse_turn(text) for text in replies.texts]
        rows: list[tuple[float, float]] = []
        for begin in range(0, len(turns), size):
            group = turns[begin : begin + size]
            rows += zip(pattern_novelty(group), text_novelty(group), strict=True)
        table = torch.tensor(rows, dtype=torch.float32, device=replies.tokens_BS.device)
        pattern, text = table.unbind(dim=1)
        scores_B = self._pattern_weight * pattern + self._text_weight * text
        everyone = torch.ones_like(scores_B, dtype=torch.bool)
        return Scores(scores_B, everyone, {}, {"pattern_novelty": pattern, "text_novelty": text})


@dataclass(frozen=True)
class CollapseRule:
    """When a policy counts as collapsed: beyond either bound for `patience` rollouts in a row; None is no bound."""

    max_top1_share: float | None = None
    min_pattern_entropy: float | None = None
    patience: int = 1


class DiversityMonitor:
    """The last `window` replies of a run, how varied they are, and for how long that has been too little."""

    def __init__(self, window: int, limits: CollapseRule) -> None:
        """
        Raises:
            ValueError: a window of less than two replies.
        """
        if window < 2:
            raise ValueError(f"a window of {window} replies shows no variety")
        self._limits = limits
        self._texts: deque[str] = deque(maxlen=window)
        self._patterns: deque[str] = deque(maxlen=window)
        self.strikes = 0  # rollouts in a row beyond a limit

    def add(self, texts: Sequence[str]) -> None:
        """Take in the replies of one rollout, oldest first."""
        self._texts.extend(texts)
        self._patterns.extend(pattern_of(parse_turn(text)) for text in texts)
        self.strikes = self.strikes + 1 if self._beyond() else 0

    @property
    def full(self) -> bool:
        return len(self._texts) == self._texts.maxlen

    @property
    def pattern_entropy(self) -> float:
        """Bits."""
        return entropy_bits(Counter(self._patterns))

    @property
    def top1_share(self) -> float:
        """Share of the most frequent pattern."""
        return Counter(self._patterns).most_common(1)[0][1] / len(self._patterns)

    def self_bleu(self) -> float:
        """Of the window; takes time in proportion to its words."""
        return self_bleu([_words(parse_turn(text)) for text in self._texts])

    @property
    def collapsed(self) -> bool:
        return self.strikes >= self._limits.patience

    def describe(self) -> str:
        """The figures and the bounds in words."""
        limits = self._limits
        bounds = [
            f"at most {limits.max_top1_share:g} of one pattern" if limits.max_top1_share is not None else "",
            f"at least {limits.min_pattern_entropy:g} bits" if limits.min_pattern_entropy is not None else "",
        ]
        return (
            f"one pattern in {self.top1_share:.3f} of the last {len(self._texts)} replies, {self.pattern_entropy:.2f} "
            f"bits of entropy, for {self.strikes} rollouts in a row; allowed: {' and '.join(filter(None, bounds))}"
        )

    def _beyond(self) -> bool:
        """Whether a bound is broken; a window that is not full yet says too little."""
        top, bits = self._limits.max_top1_share, self._limits.min_pattern_entropy
        if not self.full:
            return False
        return (top is not None and self.top1_share > top) or (
            bits is not None and self.pattern_entropy < bits
        )

    def state_dict(self) -> dict[str, Any]:
        return {"texts": list(self._texts), "strikes": self.strikes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A window that was made smaller since keeps the newest replies."""
        self._texts.clear()
        self._patterns.clear()
        self.add(state["texts"])
        self.strikes = state["strikes"]


def _words(turn: Turn) -> list[str]:
    return words(" ".join(turn.text_of(kind) for kind in Kind))
