"""Who answers: the models behind a conversation, asked for the lead's turns and, where wanted, for the others'.

A prompt that does not fit loses its oldest turns, as a sample in training would; the reply says how many.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from her_nemo.chat.client import ChatClient, PromptTooLong
from her_nemo.chat.session import ChatSession
from her_nemo.roleplay.prompt import drop_oldest_turns


@dataclass
class Progress:
    """A reply as it comes. `finished`: None while it comes, then whether it ended by itself.

    `dropped`: the oldest exchanges of the history that the model was not told of, for want of room.
    """

    text: str
    finished: bool | None = None
    dropped: int = 0


@dataclass
class Players:
    """The model that plays the lead, and the one that plays the others."""

    lead: ChatClient
    partner: ChatClient
    asked: int = 0

    @property
    def own_partner(self) -> bool:
        """Whether one model plays everybody."""
        return self.partner is self.lead

    async def play(self, session: ChatSession, speaker: str, before: int | None = None) -> AsyncIterator[Progress]:
        """`speaker`'s turn number `before` (None: the next), piece by piece.

        Raises:
            UserError: the model does not answer, or does not fit even the last exchange.
        """
        client = self.lead if session.is_lead(speaker) else self.partner
        messages = session.prompt_for(speaker, before)
        number, self.asked = self.asked, self.asked + 1
        last = sum(message["role"] == "user" for message in messages) - 1
        # In steps: about a long conversation the server is not asked turn by turn.
        for dropped in sorted({*range(0, last, max(1, last // 8)), last}):
            shorter = drop_oldest_turns(messages, dropped)
            assert shorter is not None  # the last user message stays
            try:
                async with aclosing(client.stream(shorter, number)) as pieces:
                    async for piece in pieces:
                        finished = None if piece.finish_reason is None else piece.finish_reason != "length"
                        yield Progress(piece.text, finished, dropped)
                return
            except PromptTooLong:
                if dropped == last:
                    raise
