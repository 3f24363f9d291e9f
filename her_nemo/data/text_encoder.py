"""Text to token ids and segment kinds, with nothing but the `tokenizers` library: what a process that encodes needs.

The samples of one conversation repeat its system prompt and history, and those of one scene repeat parts of both. A
control token ends what the tokenizer looks at, and so does the end of a line for Qwen's: a prompt's ids are those of
its messages, and of their lines, end to end. Each is encoded once and remembered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.prompt import Message
from her_nemo.roleplay.turn import parse_turn

KIND_NONE, SYSTEM_THINKING, ROLE_THINKING, ROLE_ACTION, SPEECH = range(5)
KIND_CODES: Mapping[Kind, int] = {
    Kind.SYSTEM_THINKING: SYSTEM_THINKING,
    Kind.ROLE_THINKING: ROLE_THINKING,
    Kind.ROLE_ACTION: ROLE_ACTION,
    Kind.SPEECH: SPEECH,
}
KIND_NAMES: Mapping[int, str] = {code: kind.value for kind, code in KIND_CODES.items()}

# As in Qwen's tokenizer.json: contractions, words with at most one mark before them, digits, runs of marks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REMEMBERED = 4_000_000  # tokens of messages and lines kept for the next rows; then all are forgotten
# Where Qwen's pre-tokenizer always begins anew: no match of its pattern goes on after a line break but to further white
# space, none looks back, and NFC joins nothing to a line break. Fewer places than there are, so as to be certain.
LINE_STARTS = re.compile(r"(?<=\n)(?=[0-9A-Za-z=*<])")


class TextEncoder:
    """Prompts and replies as ids, through a byte-level tokenizer with ChatML's control tokens."""

    def __init__(self, backend: Tokenizer, start_id: int, end_id: int) -> None:
        """`start_id` and `end_id` are <|im_start|> and <|im_end|>. Truncation and padding are turned off."""
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.start_id, self.eos_id = start_id, end_id
        self._start = np.array([start_id], dtype=np.int32)
        self._end = np.array([end_id, *self._plain("\n")], dtype=np.int32)
        self._opening = np.array([start_id, *self._plain("assistant\n")], dtype=np.int32)
        self._by_line = _ends_at_lines(backend)
        self._messages: dict[tuple[str, str], NDArray[np.int32]] = {}
        self._lines: dict[str, NDArray[np.int32]] = {}
        self._replies: dict[str, tuple[NDArray[np.int32], NDArray[np.int8]]] = {}
        self._remembered = 0

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
