"""Replies to compare with, read from a file: of the frozen SFT model, or of the data."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from her_nemo.config.errors import UserError
from her_nemo.data.sources import read_rows
from her_nemo.rewards.reward import Replies, messages_of
from her_nemo.roleplay.prompt import Message, drop_oldest_turns

PromptKey = tuple[tuple[str, str], ...]


class RepliesOfFile:
    """`Opponents` out of a file of SFT rows: `messages` that end with the reply.

    A prompt that lost its oldest turns to fit the model finds the reply of the whole one.
    """

    def __init__(self, path: str | Path, key: str) -> None:
        """`key`: the configuration's, for errors.

        Raises:
            UserError: the file cannot be read, or has bad rows.
        """
        self._path, self._key = Path(path), key
        self._replies: dict[PromptKey, str] = {}
        rows, _ = read_rows(path, "sft")
        shortened: dict[PromptKey, str] = {}
        for row in rows:
            *prompt, reply = row["messages"]
            self._replies[key_of(prompt)] = reply["content"]
            dropped = 1
            while (shorter := drop_oldest_turns(prompt, dropped)) is not None:
                shortened[key_of(shorter)] = reply["content"]
                dropped += 1
        self._replies = shortened | self._replies  # a prompt that is whole goes before what is left of a longer one

    def require(self, prompts: Iterable[str]) -> None:
        """
        Raises:
            UserError: there is no reply to one of these prompts (texts with control tokens).
        """
        missing = [prompt for prompt in prompts if key_of(messages_of(prompt)) not in self._replies]
        if missing:
            raise UserError(
                f"{self._key}={self._path}: no reply to {len(missing)} prompts; the first ends "
                f"{missing[0][-160:]!r}. Give a row for each prompt, training and validation."
            )

    def __call__(self, replies: Replies) -> Sequence[str]:
        """See `Opponents`."""
        self.require(dict.fromkeys(replies.prompts))
        known = {prompt: self._replies[key_of(messages_of(prompt))] for prompt in dict.fromkeys(replies.prompts)}
        return [known[prompt] for prompt in replies.prompts]


def key_of(messages: Sequence[Message]) -> PromptKey:
    """What a prompt is found by: its messages, as a tokenizer's normalisation leaves them."""
    return tuple((m["role"], unicodedata.normalize("NFC", m["content"])) for m in messages)
