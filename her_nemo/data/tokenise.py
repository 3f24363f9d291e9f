"""From rows to token ids, with the reply apart from its prompt and a segment kind on every reply token.

Prompt and reply are encoded separately, as in serving, where the engine is given the prompt's ids and
generates the reply's: so the tokens that are trained on and the tokens that are served are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from her_nemo.config.errors import UserError
from her_nemo.data.text_encoder import KIND_CODES as KIND_CODES
from her_nemo.data.text_encoder import KIND_NAMES as KIND_NAMES
from her_nemo.data.text_encoder import KIND_NONE as KIND_NONE
from her_nemo.data.text_encoder import ROLE_ACTION as ROLE_ACTION
from her_nemo.data.text_encoder import ROLE_THINKING as ROLE_THINKING
from her_nemo.data.text_encoder import SPEECH as SPEECH
from her_nemo.data.text_encoder import SYSTEM_THINKING as SYSTEM_THINKING
from her_nemo.data.text_encoder import TextEncoder, char_kinds
from her_nemo.roleplay.prompt import CHAT_TEMPLATE, Message, drop_oldest_turns

MESSAGE_START, MESSAGE_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
PROBE: tuple[Message, ...] = (
    {"role": "system", "content": " You are\nAda.  "},
    {"role": "user", "content": "'s \u00e9 e\u0301\n\nB: 12"},
    {"role": "assistant", "content": "\nAda: yes "},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Odo: <b>no"},
)


@dataclass(frozen=True)
class Sample:
    """One sequence to train on: token_ids[prompt_length:] is the reply with its <|im_end|>."""

    trace_id: str
    token_ids: NDArray[np.int32]  # (S,)
    prompt_length: int
    kinds: NDArray[np.int8]  # (S,), KIND_NONE on the prompt
    turns_dropped: int = 0  # oldest user turns left out so that it fits

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Prompt:
    """A prompt to generate from."""

    trace_id: str
    token_ids: NDArray[np.int32]
    turns_dropped: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Dropped:
    """A row that cannot be used at this length, and why."""

    trace_id: str
    reason: str  # reply_too_long | prompt_too_long
    needed: int  # tokens of the shortest form of the row
    max_length: int


class Tokeniser(TextEncoder):
    """A Hugging Face fast tokenizer with our chat template, whatever template its directory has."""

    def __init__(self, directory: str | Path) -> None:
        """Loads from a local directory only.

        Raises:
            UserError: if there is no fast tokenizer there, it lacks Qwen's ChatML tokens, or it encodes a message
                differently for what stands before it.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"tokenizer directory {self.directory} does not exist")
        # Here, since transformers takes seconds to import and the processes that encode do without it.
        from transformers import AutoTokenizer

        try:
            self.hf = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot load a tokenizer from {self.directory}: {error}") from error
        if not self.hf.is_fast:
            raise UserError(f"{self.directory}: not a fast tokenizer; offsets are needed for the layer masks")
        vocabulary = self.hf.get_vocab()
        missing = [t for t in (MESSAGE_START, MESSAGE_END, TEXT_END) if t not in vocabulary]
        if missing:
            raise UserError(f"{self.directory}: tokenizer without {', '.join(missing)}; Qwen3's has them")
        self.hf.chat_template = CHAT_TEMPLATE
        super().__init__(self.hf.backend_tokenizer, vocabulary[MESSAGE_START], vocabulary[MESSAGE_END])
        self.pad_id: int = vocabulary[TEXT_END]
        self.vocab_size: int = max(vocabulary.values()) + 1
        if self.joined_prompt_ids(PROBE).tolist() != self.prompt_ids(PROBE):
            raise UserError(
                f"{self.directory}: this tokenizer encodes a message differently for what stands before it; Qwen3's, "
                "byte-level with <|im_start|> and <|im_end|> as special tokens, does not"
            )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt as it is served: chat template and generation prompt. The reference for the joined one."""
        encoded = self.hf.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return [int(token) for token in encoded]

    def reply_ids(self, text: str) -> list[int]:
        """A reply with the <|im_end|> that ends it."""
        return [*self.hf.encode(text, add_special_tokens=False), self.eos_id]

    def kinds_of(self, ids: Sequence[int]) -> list[int]:
        """The segment kind of each token of a reply that was generated, not encoded: its ids may not be the ones
        that its text encodes to, so every token's characters are measured one by one."""
        pieces = [self.decode([token]) for token in ids]
        by_char = char_kinds("".join(pieces))
        kinds, end = [], 0
        for piece in pieces:
            end += len(piece)
            kinds.append(int(by_char[min(max(end - 1, 0), len(by_char) - 1)]))
        return kinds

    def text_ids(self, text: str) -> list[int]:
        """Plain text with the <|endoftext|> that ends a document."""
        return [*self.hf.encode(text, add_special_tokens=False), self.pad_id]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens; without special tokens unless asked."""
        return self.hf.decode(
            [int(token) for token in ids],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )


def encode_sample(tokeniser: TextEncoder, row: Mapping[str, Any], max_length: int) -> Sample | Dropped:
    """A row of sources.read_jsonl(kind="sft"): prompt and trained reply in at most `max_length` tokens.

    An over-long conversation loses its oldest turns, never a part of the reply.
    """
    reply, kinds = tokeniser.reply_with_kinds(row["messages"][-1]["content"])
    prompt = _fit(tokeniser, row["trace_id"], row["messages"][:-1], len(reply), max_length)
    return prompt if isinstance(prompt, Dropped) else _join(prompt, reply, kinds)


def encode_pair(
    tokeniser: TextEncoder, row: Mapping[str, Any], max_length: int
) -> tuple[Sample, Sample] | Dropped:
    """A row of kind "pairs": (chosen, rejected), both with the same prompt."""
    replies = [tokeniser.reply_with_kinds(row[key]) for key in ("chosen", "rejected")]
    longest = max(len(ids) for ids, _ in replies)
    prompt = _fit(tokeniser, row["trace_id"], row["messages"], longest, max_length)
    if isinstance(prompt, Dropped):
        return prompt
    chosen, rejected = (_join(prompt, ids, kinds) for ids, kinds in replies)
    return chosen, rejected


def encode_prompt(tokeniser: TextEncoder, row: Mapping[str, Any], max_length: int) -> Prompt | Dropped:
    """A row of kind "prompts" in at most `max_length` tokens (the reply's room is the caller's to keep)."""
    return _fit(tokeniser, row["trace_id"], row["messages"], 0, max_length)


def _fit(
    tokeniser: TextEncoder, trace_id: str, messages: Sequence[Message], reply_length: int, max_length: int
) -> Prompt | Dropped:
    if reply_length >= max_length:
        return Dropped(trace_id, "reply_too_long", reply_length, max_length)
    needed = 0
    dropped = 0
    while (shorter := drop_oldest_turns(messages, dropped)) is not None:
        needed = tokeniser.joined_prompt_length(shorter) + reply_length
        if needed <= max_length:
            return Prompt(trace_id, tokeniser.joined_prompt_ids(shorter), dropped)
        dropped += 1
    return Dropped(trace_id, "prompt_too_long", needed, max_length)


def _join(prompt: Prompt, reply: NDArray[np.int32], kinds: NDArray[np.int8]) -> Sample:
    none = np.full(len(prompt), KIND_NONE, dtype=np.int8)
    return Sample(
        trace_id=prompt.trace_id,
        token_ids=np.concatenate([prompt.token_ids, reply]),
        prompt_length=len(prompt),
        kinds=np.concatenate([none, kinds]),
        turns_dropped=prompt.turns_dropped,
    )


@dataclass
class EncodeReport:
    """What became of the rows of one file."""

    kept: int = 0
    shortened: int = 0  # kept, without their oldest turns
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    longest: int = 0  # tokens that the longest dropped row needs

    def require_rows(self, max_length: int) -> None:
        """Raise UserError if nothing was kept."""
        if not self.kept:
            raise UserError(
                f"no row fits in {max_length} tokens ({self}; the longest needs {self.longest}): "
                "raise model.encoder_seq_length"
            )

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        lost = sum(self.dropped.values())
        return f"{self.kept} kept ({self.shortened} shortened), {lost} dropped" + (
            f" ({reasons})" if reasons else ""
        )


    def add(self, other: EncodeReport) -> None:
        """Count other rows of the same file."""
        self.kept += other.kept
        self.shortened += other.shortened
        self.dropped.update(other.dropped)
        self.longest = max(self.longest, other.longest)


Encoded = TypeVar("Encoded")
Encoder = Callable[[TextEncoder, Mapping[str, Any], int], Encoded | Dropped]


def encode_rows(
    encoder: Encoder[Encoded], tokeniser: TextEncoder, rows: Sequence[Mapping[str, Any]], max_length: int
) -> tuple[list[Encoded], EncodeReport]:
    """Rows through `encode_sample`, `encode_pair` or `encode_prompt`, with the count of what was lost."""
    tokeniser.prefetch(*texts_to_encode(rows))
    report = EncodeReport()
    kept: list[Encoded] = []
    for row in rows:
        encoded = encoder(tokeniser, row, max_length)
        if isinstance(encoded, Dropped):
            report.dropped[encoded.reason] += 1
            report.longest = max(report.longest, encoded.needed)
            continue
        kept.append(encoded)
        first = encoded[0] if isinstance(encoded, tuple) else encoded
        report.shortened += bool(first.turns_dropped)
    report.kept = len(kept)
    return kept, report


def texts_to_encode(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Message], list[str]]:
    """(messages of the prompts, replies) of rows of any kind."""
    messages: list[Message] = []
    replies: list[str] = []
    for row in rows:
        prompt = row["messages"]
        if "chosen" in row:
            replies += [row["chosen"], row["rejected"]]
        elif prompt[-1]["role"] == "assistant":
            prompt, reply = prompt[:-1], prompt[-1]["content"]
            replies.append(reply)
        messages += prompt
    return messages, replies


def encode_all(
    encoder: Encoder[Encoded], tokeniser: TextEncoder, rows: Iterable[Mapping[str, Any]], max_length: int
) -> tuple[list[Encoded], EncodeReport]:
    """All rows in memory at once; files go through `token_cache`.

    Raises:
        UserError: if no row is left.
    """
    kept, report = encode_rows(encoder, tokeniser, list(rows), max_length)
    report.require_rows(max_length)
    return kept, report


def pack_text(ids_iter: Iterable[Sequence[int]], length: int) -> Iterator[NDArray[np.int32]]:
    """Documents end to end, cut into blocks of `length` tokens. The last, partial block is left out.

    Attention is not stopped at document borders: the <|endoftext|> between them marks the border.
    """
    if length < 2:
        raise ValueError(f"cannot pack into blocks of {length}: two tokens are needed to predict one")
    buffer: list[int] = []
    for ids in ids_iter:
        buffer.extend(ids)
        while len(buffer) >= length:
            yield np.array(buffer[:length], dtype=np.int32)
            del buffer[:length]


def text_samples(tokeniser: TextEncoder, rows: Iterable[Mapping[str, Any]], length: int) -> list[Sample]:
    """Rows of kind "text", packed: every token is trained, and none has a segment kind.

    Raises:
        UserError: if all the text together is shorter than one block.
    """
    ids = (tokeniser.text_ids(row["text"]) for row in rows)
    none = np.full(length, KIND_NONE, dtype=np.int8)
    samples = [Sample(f"block-{i}", block, 0, none) for i, block in enumerate(pack_text(ids, length))]
    if not samples:
        raise UserError(
            f"the text is shorter than one block of {length} tokens: lower the length or add text"
        )
    return samples
