"""The generative reward model as a reward: a judge compares each reply with another one to the same prompt.

HER compares the policy's reply with the frozen SFT model's (arXiv 2601.21459); a reply of the data or the rest of the
group may stand in its place. A win in both orders is +1, a loss in both -1, all else 0. The judge sees what
`candidate` and `context_of` leave of a text, so no plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from her_nemo.config.errors import UserError
from her_nemo.megatron import parallel
from her_nemo.rewards.judge import Asked, Compared, Pair, Verdicts
from her_nemo.rewards.reward import Replies, Scores, messages_of
from her_nemo.roleplay.judging import candidate, context_of

# A reply, and the other of its group that it is compared with; None for an opponent's.
Sides = tuple[int, int | None]


class Opponents(Protocol):
    """Where the replies to compare with come from."""

    def __call__(self, replies: Replies) -> Sequence[str]:
        """Another's reply to the prompt of each reply. Called on all ranks of a replica; the same on each.

        Raises:
            UserError: there is none for a prompt.
        """
        ...


@dataclass(frozen=True)
class _Begun:
    """A call that has begun; `problem` is what kept the judge from being asked."""

    replies: Replies
    sides: list[Sides]
    verdicts: Asked | None
    problem: str = ""


class GenerativeReward:
    """The mean of a reply's comparisons, from -1 to 1; no score where none of them has a verdict.

    Args:
        verdicts: the judge.
        opponents: whom to compare with; None compares the replies of a group with each other.
        max_unparsed: share of the verdicts of one call, over all replicas, that may be missing.
    """

    def __init__(self, verdicts: Verdicts, opponents: Opponents | None, *, max_unparsed: float) -> None:
        self._verdicts, self._opponents, self._max_unparsed = verdicts, opponents, max_unparsed
        self._begun: _Begun | None = None

    def begin(self, replies: Replies) -> None:
        """See `Begins`: the other replies are made now, and a judge that can is at work from now on."""
        sides: list[Sides] = []
        try:
            sides, pairs = self._pairs(replies)
            self._begun = _Begun(replies, sides, self._verdicts.begin(pairs))
        except UserError as error:
            self._begun = _Begun(replies, sides, None, str(error))

    def __call__(self, replies: Replies) -> Scores:
        """Collective over all ranks.

        Raises:
            UserError: on every rank, when too many verdicts are missing, or a replica cannot ask its judge.
            ValueError: a group of one has nobody to be compared with.
        """
        if self._begun is None or self._begun.replies is not replies:
            self.begin(replies)
        begun, self._begun = self._begun, None
        assert begun is not None
        compared: list[Compared] = []
        problem = begun.problem  # told to the other replicas, who would wait for this one's share below
        if begun.verdicts is not None:
            try:
                compared = self._verdicts.finish(begun.verdicts)
            except UserError as error:
                problem = str(error)
        self._check(compared, problem)
        return _scores(replies, begun.sides, compared, (self._verdicts.asked, self._verdicts.kept))

    def _pairs(self, replies: Replies) -> tuple[list[Sides], list[Pair]]:
        """Who is compared with whom, by number and by what the judge is shown."""
        shown = [candidate(text) for text in replies.texts]
        contexts = {prompt: context_of(messages_of(prompt)) for prompt in dict.fromkeys(replies.prompts)}
        if self._opponents is not None:
            others = [candidate(text) for text in self._opponents(replies)]
            rows = zip(replies.prompts, shown, others, strict=True)
            pairs = [Pair(contexts[prompt], reply, other) for prompt, reply, other in rows]
            return [(index, None) for index in range(len(replies))], pairs
        size = replies.group_size
        if size < 2:
            raise ValueError("a reply to a prompt of its own has nobody to be compared with")
        sides: list[Sides] = [
            (first, second)
            for begin in range(0, len(replies), size)
            for first in range(begin, begin + size)
            for second in range(first + 1, begin + size)
        ]
        return sides, [Pair(contexts[replies.prompts[a]], shown[a], shown[b]) for a, b in sides if b is not None]

    def _check(self, compared: Sequence[Compared], problem: str) -> None:
        """Stop on all ranks together if a replica has a problem or too few verdicts can be read."""
        missing = [why for pair in compared for why in pair.problems]
        shares = parallel.data_gather_objects((problem, len(missing), 2 * len(compared), missing[:1]))
        for said, *_ in shares:
            if said:
                raise UserError(said)
        unread, total = (sum(share[place] for share in shares) for place in (1, 2))
        if unread > self._max_unparsed * total:
            example = next(first[0] for *_, first in shares if first)
            raise UserError(
                f"{unread} of the {total} verdicts on one rollout are missing or cannot be read, more than "
                f"reward.generative.max_unparsed={self._max_unparsed:g} of them. The first: {example}. Give a judge "
                "that writes HER's verdicts (docs/judge.md), more room (reward.generative.judge.max_tokens), or raise "
                "the limit. The run can be resumed from its last checkpoint."
            )


def _scores(
    replies: Replies,
    sides: Sequence[Sides],
    compared: Sequence[Compared],
    questions: tuple[int, int],
) -> Scores:
    """Points of pairs as scores of replies. Counts are a share of each reply's own verdicts (`unparsed`) and pairs
    (`disagreed`), so that their mean over replies is the share of all; `cached` is the share of questions known."""
    points, judged, pairs, unparsed, disagreed, won, lost = torch.zeros(7, len(replies), dtype=torch.float64)
    for (reply, other), said in zip(sides, compared, strict=True):
        for index, sign in ((reply, 1), (other, -1)):
            if index is None:
                continue
            pairs[index] += 1
            unparsed[index] += len(said.problems) / 2
            disagreed[index] += said.disagreed
            if said.points is not None:
                judged[index] += 1
                points[index] += sign * said.points
                won[index] += sign * said.points > 0
                lost[index] += sign * said.points < 0
    device, some = replies.tokens_BS.device, judged.clamp(min=1)
    asked, kept = questions
    counts = {
        "unparsed": float((unparsed / pairs).sum()),
        "disagreed": float((disagreed / pairs).sum()),
        "cached": len(replies) * kept / max(1, asked + kept),
    }
    scores_B, won_B, lost_B = ((value / some).float().to(device) for value in (points, won, lost))
    return Scores(scores_B, (judged > 0).to(device), counts, {"won": won_B, "lost": lost_B})
