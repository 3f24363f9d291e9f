"""Multi-turn rollouts: conversations of the policy with a simulator, turn by turn over the whole batch.

A turn's prompt is the policy's view of the conversation so far (roleplay/dialogue.py), in which its earlier turns have
lost their plans. So the tokens of one turn do not go on from those of the turn before, and each own turn is a sample of
its own: prompt and reply. Turns of the simulator are part of prompts only, and never trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.data.tokenise import Dropped, Prompt, Tokeniser, encode_prompt
from her_nemo.megatron import parallel
from her_nemo.roleplay.dialogue import Conversation, Start
from her_nemo.rollout.engine import Rollout, RolloutEngine, Sampling
from her_nemo.rollout.simulator import Ask, Simulator

KEPT = 4  # conversations a rollout that are kept as text
_SEED_BITS = 0x7FFF_FFFF


class Dialogues:
    """Generates conversations.

    Args:
        starts: by trace id, of every prompt that will be asked for.
        simulator: plays the other character; asked on the first rank of each replica.
        tokeniser: the policy's.
        turns: own turns of each conversation, K.
        room: longest prompt, tokens; the oldest turns are left out of a longer one.
        simulator_tokens: longest turn of the simulator, in the policy's tokens.
        attempts: times that the simulator is asked for a turn that the policy can see or hear something of.
    """

    def __init__(
        self,
        starts: Mapping[str, Start],
        simulator: Simulator,
        tokeniser: Tokeniser,
        *,
        turns: int,
        room: int,
        simulator_tokens: int,
        attempts: int = 1,
    ) -> None:
        self._starts = starts
        self._simulator = simulator
        self._tokeniser = tokeniser
        self.turns = turns
        self._room = room
        self._simulator_tokens = simulator_tokens
        self._attempts = attempts
        self._tags: dict[str, float] = {}
        self.transcripts: list[dict[str, Any]] = []

    def tags(self) -> dict[str, float]:
        """What the last rollout on this replica has to report, for the log."""
        return dict(self._tags)

    def generate(
        self,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        places: Sequence[int],
        group_size: int,
    ) -> Rollout:
        """One conversation for each prompt (collective over a replica).

        Args:
            prompts: of the first turns, those of one start G times in a row.
            places: number of each conversation in the whole rollout: start x G + sample.
            group_size: G.

        Returns:
            The own turns of all conversations, K for each: rows by start, then turn, then conversation, so that G
            rows in a row are the same turn of conversations from one start. What is drawn for a turn depends on
            (weights, prompt, sampling, seed) and on the row's place in the whole rollout.

        Raises:
            UserError: the simulator cannot answer.
        """
        talks = [Conversation(self._starts[prompt.trace_id]) for prompt in prompts]
        asked = [[int(token) for token in prompt.token_ids] for prompt in prompts]
        parts: list[Rollout] = []
        shortened, waited = 0, 0.0
        for turn in range(self.turns):
            rows = [
                (place // group_size * self.turns + turn) * group_size + place % group_size for place in places
            ]
            part = engine.generate(asked, sampling, seed, indices=rows)
            parts.append(part)
            for talk, ids in zip(talks, part.response_ids, strict=True):
                talk.say(self._tokeniser.decode(ids))
            if turn + 1 == self.turns:
                break
            begun = time.perf_counter()
            seeds = [(seed * 1_000_003 + row) & _SEED_BITS for row in rows]
            # All ranks of the replica hold the same conversations; one asks, all hear the answers.
            answers = parallel.on_replica_leader(partial(self._answers, talks, turn, seeds))
            waited += time.perf_counter() - begun
            for talk, text in zip(talks, answers, strict=True):
                talk.hear(text)
            following = [self._prompt(talk) for talk in talks]
            shortened += sum(bool(prompt.turns_dropped) for prompt in following)
            asked = [[int(token) for token in prompt.token_ids] for prompt in following]
        own, others = len(talks) * self.turns, max(1, len(talks) * (self.turns - 1))
        self._tags = {
            "dialogue/unheard": sum(talk.unheard for talk in talks) / own,
            "dialogue/silences": sum(talk.silences for talk in talks) / others,
            "dialogue/shortened": shortened / others,
            "timers/simulate": waited,
        }
        self.transcripts = [_transcript(talk) for talk in talks[::group_size][:KEPT]]
        return _in_order(parts, group_size)

    def _answers(
        self, talks: Sequence[Conversation], turn: int, seeds: Sequence[int], alive: Callable[[], None]
    ) -> list[str]:
        """The simulator's turns; one of which nothing can be perceived is asked for again."""
        answers = [""] * len(talks)
        open_ = list(range(len(talks)))
        for attempt in range(self._attempts):
            asks = [
                Ask(talks[i].start, turn, talks[i].partner_messages(), (seeds[i] + attempt) & _SEED_BITS)
                for i in open_
            ]
            for i, text in zip(open_, self._simulator.answer(asks, alive), strict=True):
                answers[i] = self._cut(text)
            open_ = [i for i in open_ if not talks[i].perceptible(answers[i])]
            if not open_:
                break
        return answers

    def _cut(self, text: str) -> str:
        # A token is a byte at least: short texts need not be encoded.
        if len(text.encode("utf-8", errors="replace")) <= self._simulator_tokens:
            return text
        ids = self._tokeniser.text_ids(text.encode("utf-8", errors="replace").decode())[:-1]
        return text if len(ids) <= self._simulator_tokens else self._tokeniser.decode(ids[: self._simulator_tokens])

    def _prompt(self, talk: Conversation) -> Prompt:
        row = {"trace_id": talk.start.trace_id, "messages": talk.messages}
        found = encode_prompt(self._tokeniser, row, self._room)
        if isinstance(found, Dropped):
            raise UserError(
                f"{talk.start.trace_id}: system prompt and last message alone take {found.needed} tokens, and "
                f"{self._room} are left beside a reply: raise model.encoder_seq_length"
            )
        return found


def _in_order(parts: Sequence[Rollout], group_size: int) -> Rollout:
    """The turns of a rollout, part k with turn k of every conversation, as rows by start, turn and conversation."""
    versions = {part.weight_version for part in parts}
    if len(versions) > 1:
        raise RuntimeError(f"turns of one rollout come from weights {sorted(versions)}")
    starts = range(0, len(parts[0].prompt_ids), group_size)
    rows = [(part, row) for start in starts for part in parts for row in range(start, start + group_size)]
    return Rollout(
        prompt_ids=[part.prompt_ids[row] for part, row in rows],
        response_ids=[part.response_ids[row] for part, row in rows],
        log_probs=[part.log_probs[row] for part, row in rows],
        weight_version=parts[0].weight_version,
        finished=[part.finished[row] for part, row in rows],
    )


def _transcript(talk: Conversation) -> dict[str, Any]:
    said = [{"speaker": turn.speaker, "text": turn.text} for turn in talk.told]
    return {"trace_id": talk.start.trace_id, "turns": said}
