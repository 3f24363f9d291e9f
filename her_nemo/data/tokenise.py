"""From rows to token ids, with the reply apart from its prompt and a segment kind on every reply token.

Prompt and reply are encoded separately, as in serving, where the engine is given the prompt's ids and
generates the reply's: so the tokens that are trained on and the tokens that are served are the same.

The samples of one conversation repeat its system prompt and history, and those of one scene repeat parts of both. A
control token ends what the tokenizer looks at, and so does the end of a line for Qwen's: a prompt's ids are those of
its messages, and of their lines, end to end. Each is encoded once and remembered.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer

from her_nemo.config.errors import UserError
from her_nemo.data.tokenizer import QWEN_SPLIT
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.prompt import CHAT_TEMPLATE, Message, drop_oldest_turns
from her_nemo.roleplay.turn import parse_turn

KIND_NONE, SYSTEM_THINKING, ROLE_THINKING, ROLE_ACTION, SPEECH = range(5)
KIND_CODES: Mapping[Kind, int] = {
    Kind.SYSTEM_THINKING: SYSTEM_THINKING,
    Kind.ROLE_THINKING: ROLE_THINKING,
    Kind.ROLE_ACTION: ROLE_ACTION,
    Kind.SPEECH: SPEECH,
}
KIND_NAMES: Mapping[int, str] = {code: kind.value for kind, code in KIND_CODES.items()}

MESSAGE_START, MESSAGE_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
REMEMBERED = 4_000_000  # tokens of messages and lines kept for the next rows; then all are forgotten
# Where Qwen's pre-tokenizer always begins anew: no match of its pattern goes on after a line break but to further white
# space, none looks back, and NFC joins nothing to a line break. Fewer places than there are, so as to be certain.
LINE_STARTS = re.compile(r"(?<=\n)(?=[0-9A-Za-z=*<])")
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


class Tokeniser:
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
        self.eos_id: int = vocabulary[MESSAGE_END]
        self.pad_id: int = vocabulary[TEXT_END]
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.backend = self.hf.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        start = vocabulary[MESSAGE_START]
        self._start = np.array([start], dtype=np.int32)
        self._end = np.array([self.eos_id, *self._plain("\n")], dtype=np.int32)
        self._opening = np.array([start, *self._plain("assistant\n")], dtype=np.int32)
        self._by_line = _ends_at_lines(self.backend)
        self._messages: dict[tuple[str, str], NDArray[np.int32]] = {}
        self._lines: dict[str, NDArray[np.int32]] = {}
        self._replies: dict[str, tuple[NDArray[np.int32], NDArray[np.int8]]] = {}
        self._remembered = 0
        if self.joined_prompt_ids(PROBE).tolist() != self.prompt_ids(PROBE):
            raise UserError(
                f"{self.directory}: this tokenizer encodes a message differently for what stands before it; Qwen3's, "
                "byte-level with <|im_start|> and <|im_end|> as special tokens, does not"
            )

    def _plain(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def prefetch(self, messages: Iterable[Message], replies: Iterable[str] = ()) -> None:
        """Encode messages and replies that will be asked for, each once and all together (parallel inside
        `tokenizers` unless TOKENIZERS_PARALLELISM is false)."""
        if self._remembered > REMEMBERED:
            self._messages.clear()
            self._lines.clear()
            self._remembered = 0
        self._replies.clear()
        new = {(m["role"], m["content"]): None for m in messages if (m["role"], m["content"]) not in self._messages}
        lines = {line: None for key in new for line in self._split(key) if line not in self._lines}
        found = self.backend.encode_batch_fast(list(lines), add_special_tokens=False)
        for line, encoding in zip(lines, found, strict=True):
            self._lines[line] = np.array(encoding.ids, dtype=np.int32)
        texts = list(dict.fromkeys(replies))
        for text, encoding in zip(texts, self.backend.encode_batch(texts, add_special_tokens=False), strict=True):
            self._replies[text] = self._with_kinds(text, encoding)

    def _split(self, key: tuple[str, str]) -> list[str]:
        text = "\n".join(key)
        return LINE_STARTS.split(text) if self._by_line else [text]

    def _line_ids(self, line: str) -> NDArray[np.int32]:
        known = self._lines.get(line)
        if known is None:
            known = self._lines[line] = np.array(self._plain(line), dtype=np.int32)
        return known

    def message_ids(self, message: Message) -> NDArray[np.int32]:
        """One message as the chat template writes it, from <|im_start|> to the line break after <|im_end|>."""
        key = (message["role"], message["content"])
        known = self._messages.get(key)
        if known is None:
            known = np.concatenate([self._start, *map(self._line_ids, self._split(key)), self._end])
            self._messages[key] = known
            self._remembered += 2 * len(known)  # the lines are kept too
        return known

    def joined_prompt_ids(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """`prompt_ids`, put together from remembered messages: the same ids (tested), some ten times as fast."""
        return np.concatenate([*map(self.message_ids, messages), self._opening])

    def joined_prompt_length(self, messages: Sequence[Message]) -> int:
        """Tokens of `joined_prompt_ids`."""
        return sum(len(self.message_ids(message)) for message in messages) + len(self._opening)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt as it is served: chat template and generation prompt. The reference for the joined one."""
        encoded = self.hf.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return [int(token) for token in encoded]

    def reply_ids(self, text: str) -> list[int]:
        """A reply with the <|im_end|> that ends it."""
        return [*self.hf.encode(text, add_special_tokens=False), self.eos_id]

    def reply_with_kinds(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        """`reply_ids` and the segment kind of each token.

        A token that reaches over a border (`>King`) has the kind of its last character. Tags belong to their
        segment; the name prefix and <|im_end|> are speech.
        """
        known = self._replies.get(text)
        return known or self._with_kinds(text, self.backend.encode(text, add_special_tokens=False))

    def _with_kinds(self, text: str, encoding: Encoding) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        ids = np.array([*encoding.ids, self.eos_id], dtype=np.int32)
        kinds = np.full(len(ids), SPEECH, dtype=np.int8)
        if len(ids) > 1:
            start, end = np.array(encoding.offsets, dtype=np.int64).T
            kinds[:-1] = char_kinds(text)[np.maximum(end - 1, start)]
        return ids, kinds

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


def _ends_at_lines(backend: Tokenizer) -> bool:
    """Whether LINE_STARTS holds for a tokenizer: the pattern, normaliser and added tokens are of Qwen's kind."""
    split = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
    normaliser = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {"type": "NFC"}
    first, *rest = split.get("pretokenizers") or [{}]
    bytes_only = [(part.get("type"), part.get("add_prefix_space"), part.get("use_regex")) for part in rest]
    return (
        first.get("pattern") == {"Regex": QWEN_SPLIT}
        and (first.get("behavior"), first.get("invert")) == ("Isolated", False)
        and bytes_only == [("ByteLevel", False, False)]
        and normaliser == {"type": "NFC"}
        and not any("\n" in t.content or t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values())
    )


def char_kinds(text: str) -> NDArray[np.int8]:
    """The kind of each character of a reply, by `parse_turn`."""
    kinds = np.full(max(len(text), 1), SPEECH, dtype=np.int8)
    for segment in parse_turn(text).segments:
        kinds[segment.start : segment.end] = KIND_CODES[segment.kind]
    return kinds


def encode_sample(tokeniser: Tokeniser, row: Mapping[str, Any], max_length: int) -> Sample | Dropped:
    """A row of sources.read_jsonl(kind="sft"): prompt and trained reply in at most `max_length` tokens.

    An over-long conversation loses its oldest turns, never a part of the reply.
    """
    reply, kinds = tokeniser.reply_with_kinds(row["messages"][-1]["content"])
    prompt = _fit(tokeniser, row["trace_id"], row["messages"][:-1], len(reply), max_length)
    return prompt if isinstance(prompt, Dropped) else _join(prompt, reply, kinds)


def encode_pair(
    tokeniser: Tokeniser, row: Mapping[str, Any], max_length: int
) -> tuple[Sample, Sample] | Dropped:
    """A row of kind "pairs": (chosen, rejected), both with the same prompt."""
    replies = [tokeniser.reply_with_kinds(row[key]) for key in ("chosen", "rejected")]
    longest = max(len(ids) for ids, _ in replies)
    prompt = _fit(tokeniser, row["trace_id"], row["messages"], longest, max_length)
    if isinstance(prompt, Dropped):
        return prompt
    chosen, rejected = (_join(prompt, ids, kinds) for ids, kinds in replies)
    return chosen, rejected


def encode_prompt(tokeniser: Tokeniser, row: Mapping[str, Any], max_length: int) -> Prompt | Dropped:
    """A row of kind "prompts" in at most `max_length` tokens (the reply's room is the caller's to keep)."""
    return _fit(tokeniser, row["trace_id"], row["messages"], 0, max_length)


def _fit(
    tokeniser: Tokeniser, trace_id: str, messages: Sequence[Message], reply_length: int, max_length: int
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
Encoder = Callable[[Tokeniser, Mapping[str, Any], int], Encoded | Dropped]


def encode_rows(
    encoder: Encoder[Encoded], tokeniser: Tokeniser, rows: Sequence[Mapping[str, Any]], max_length: int
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
    encoder: Encoder[Encoded], tokeniser: Tokeniser, rows: Iterable[Mapping[str, Any]], max_length: int
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


def text_samples(tokeniser: Tokeniser, rows: Iterable[Mapping[str, Any]], length: int) -> list[Sample]:
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
