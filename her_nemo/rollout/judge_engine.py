"""A judge, and a frozen model to compare with, behind the rollout engine's protocol: both only generate.

Called on all ranks of a replica, as the engine is. What is drawn depends on the question and the seed alone, not on
the step, the replica or what shares its batch: so an answer can be kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from her_nemo.data.tokenise import Tokeniser
from her_nemo.rewards.judge import Answer
from her_nemo.rewards.reward import Replies
from her_nemo.roleplay.prompt import Message
from her_nemo.rollout.engine import RolloutEngine, Sampling


class EngineJudge:
    """A `Judge` that a rollout engine generates with.

    Args:
        engine: over the judge's weights.
        tokeniser: the judge's own.
        sampling: of a verdict; its stop tokens are the tokeniser's.
        identity: of the weights.
        max_length: longest question and verdict, tokens.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokeniser: Tokeniser,
        sampling: Sampling,
        identity: Mapping[str, Any],
        *,
        max_length: int,
        seed: int = 0,
    ) -> None:
        self._engine, self._tokeniser, self._sampling = engine, tokeniser, sampling
        self._max_length, self._seed = max_length, seed
        drawn = [sampling.temperature, sampling.top_p, sampling.max_tokens]
        # A greedy answer is the same under every seed.
        self.identity = {"judge": dict(identity), "sampling": drawn} | ({"seed": seed} if sampling.temperature else {})

    def begin(self, conversations: Sequence[list[Message]]) -> None:
        """Nothing: the ranks that would judge have other work till they are asked."""

    def ask(self, conversations: Sequence[list[Message]]) -> list[Answer]:
        """See `Judge.ask`. A question that leaves no room for a verdict is not answered."""
        room = self._max_length - self._sampling.max_tokens
        self._tokeniser.prefetch([message for messages in conversations for message in messages])
        asked = [self._tokeniser.joined_prompt_ids(messages) for messages in conversations]
        short = [place for place, ids in enumerate(asked) if len(ids) <= room]
        answers = [Answer(None, f"the question has {len(ids)} tokens, and {room} are left for it") for ids in asked]
        if not short:
            return answers
        prompts = [asked[place] for place in short]
        rollout = self._engine.generate(
            [ids.tolist() for ids in prompts], self._sampling, self._seed, indices=[number_of(ids) for ids in prompts]
        )
        for place, ids, finished in zip(short, rollout.response_ids, rollout.finished, strict=True):
            answers[place] = Answer(self._tokeniser.decode(ids), "" if finished else "cut off at its longest")
        return answers


class EngineReplies:
    """`Opponents` that a rollout engine generates: one reply to a prompt, drawn once and kept.

    Args:
        engine: over the frozen model, usually PPO's reference.
        tokeniser, sampling: the policy's, so that both write under the same terms.
    """

    def __init__(self, engine: RolloutEngine, tokeniser: Tokeniser, sampling: Sampling, seed: int) -> None:
        self._engine, self._tokeniser, self._sampling, self._seed = engine, tokeniser, sampling, seed
        self._kept: dict[tuple[int, ...], str] = {}

    def __call__(self, replies: Replies) -> Sequence[str]:
        """See `Opponents`."""
        prompts = [tuple(ids) for ids in replies.prompt_ids]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if new:
            rollout = self._engine.generate(
                [list(prompt) for prompt in new], self._sampling, self._seed, indices=[number_of(p) for p in new]
            )
            self._kept |= zip(new, map(self._tokeniser.decode, rollout.response_ids), strict=True)
        return [self._kept[prompt] for prompt in prompts]


def number_of(ids: Sequence[int] | np.ndarray) -> int:
    """A number that stands for a prompt, wherever in a job it comes up: seeds are made of it."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=6).digest()
    return int.from_bytes(digest, "big")
