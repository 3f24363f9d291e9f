"""Which conversation serves which purpose: by book and conversation, never by turn.

Conversations that are the same are told by their names (book, plot, number; names normalised) and by what is said in
them: two that share a longer passage, as the views of one scene by several characters do, stay together. A
conversation's purpose is drawn by hashing its name, so it depends on nothing but that name and the seed: files read
one by one agree with each other, and more data moves nobody.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from her_nemo.data.readers.items import View
from her_nemo.data.records import Conversation, Pair
from her_nemo.roleplay.dialects import Dialect, parse_message
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.names import normalise_name
from her_nemo.roleplay.prompt import CONVERSATION_START


class Purpose(StrEnum):
    """HER's five purposes."""

    ROLEPLAY_SFT = "roleplay_sft"
    RM_SFT = "rm_sft"
    RM_RL = "rm_rl"
    ROLEPLAY_RL = "roleplay_rl"
    TEST = "test"


Unit = Literal["conversation", "book"]
# Shorter passages ("Nothing, my lord.") are said in more than one scene.
PASSAGE_CHARACTERS = 40
# A passage in more conversations than this is boilerplate and links nobody.
COMMON = 20


@dataclass(frozen=True)
class Identity:
    """By what a conversation is recognised: a name, its book, and hashes of the longer passages said in it."""

    key: str
    book: str
    passages: frozenset[int]
    held_out: bool = False


@dataclass
class _Groups:
    """Disjoint sets of conversation keys (union by smaller key, so the outcome does not depend on the order)."""

    parent: dict[str, str] = field(default_factory=dict)

    def find(self, key: str) -> str:
        root = key
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        while self.parent[key] != root:
            self.parent[key], key = root, self.parent[key]
        return root

    def join(self, one: str, other: str) -> None:
        one, other = sorted((self.find(one), self.find(other)))
        self.parent[other] = one


def assign(
    identities: Iterable[Identity],
    shares: Mapping[str, float],
    seed: int,
    unit: Unit = "conversation",
    test: Sequence[Identity] = (),
) -> dict[str, str]:
    """The purpose of every conversation key.

    Args:
        identities: all conversations; several may have one key (views of one scene).
        shares: purpose -> share; they add up to 1.
        unit: "book" keeps whole books together.
        test: conversations of a test set: what is the same as one of them is for testing.
    """
    everyone = list(identities)
    keys = {identity.key for identity in everyone}
    groups, held = _Groups(), set()
    by_passage: dict[int, list[str]] = {}
    for identity in (*everyone, *test):
        groups.find(identity.key)
        if unit == "book" and identity.book:
            groups.join(identity.key, f"book {normalise_name(identity.book)}")
        for passage in identity.passages:
            sharing = by_passage.setdefault(passage, [])
            if identity.key not in sharing:
                sharing.append(identity.key)
    for sharing in by_passage.values():
        if len(sharing) <= COMMON:
            for other in sharing[1:]:
                groups.join(sharing[0], other)
    held = {groups.find(identity.key) for identity in everyone if identity.held_out}
    held |= {groups.find(identity.key) for identity in test}
    return {
        key: Purpose.TEST if groups.find(key) in held else _draw(groups.find(key), shares, seed) for key in sorted(keys)
    }


def _draw(group: str, shares: Mapping[str, float], seed: int) -> str:
    """A purpose for a group: the hash of its name as a number in [0, 1), dealt out along the shares."""
    digest = hashlib.sha256(f"{seed}\n{group}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") / 2**64
    chosen = ""
    for purpose, share in shares.items():
        if share <= 0:
            continue
        chosen = purpose
        number -= share
        if number < 0:
            break
    return str(Purpose(chosen))


def overlaps(identities: Iterable[Identity], purposes: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of conversation keys that share a name or a (not common) passage and yet serve two purposes."""
    owners: dict[str | int, set[str]] = {}
    for identity in identities:
        for mark in (identity.key, *identity.passages):
            owners.setdefault(mark, set()).add(identity.key)
    found = []
    for keys in owners.values():
        if 1 < len(keys) <= COMMON:
            first, *rest = sorted(keys)
            found += [(first, other) for other in rest if purposes[first] != purposes[other]]
    return found


# ---------------------------------------------------------------- identities


def conversation_key(conversation: Conversation | View) -> str:
    """book#plot#number where the source has them, else the id; names normalised."""
    book = normalise_name(conversation.book)
    plot, number = conversation.plot_index, conversation.conversation_index
    if book and plot is not None and number is not None:
        return f"{book}#{plot}#{number}"
    return normalise_name(conversation.conversation_id)


def identity_of(item: Conversation | View | Pair) -> Identity:
    """By what to recognise an item."""
    if isinstance(item, Conversation):
        said = (turn.text for turn in item.turns)
        passages = passages_of(said, Dialect.HER)
        return Identity(conversation_key(item), item.book, passages, item.held_out)
    messages = [message["content"] for message in item.messages if message["role"] != "system"]
    if isinstance(item, Pair):
        key = normalise_name(item.conversation_id)
        return Identity(key, "", passages_of(messages, Dialect.HER))
    return Identity(conversation_key(item), item.book, passages_of(messages, item.dialect))


_NAME = re.compile(r"[^:\n]{1,60}:\s")


def passages_of(messages: Iterable[str], dialect: Dialect) -> frozenset[int]:
    """Hashes of the longer passages that are said or done in public: one for each paragraph.

    Only letters and digits count, so dialects, quotes and blanks make no difference; names in front are left out.
    """
    out: set[int] = set()
    for message in messages:
        visible = "".join(
            segment.text if segment.kind in (Kind.SPEECH, Kind.ROLE_ACTION) else " "
            for segment in parse_message(message, dialect).segments
        ).removeprefix(CONVERSATION_START.strip())
        for paragraph in re.split(r"\n\s*\n", visible):
            bare = _NAME.sub("", paragraph.strip(), count=1)
            letters = "".join(c for c in unicodedata.normalize("NFKC", bare).casefold() if c.isalnum())
            if len(letters) >= PASSAGE_CHARACTERS:
                out.add(int.from_bytes(hashlib.blake2b(letters.encode(), digest_size=8).digest(), "big"))
    return frozenset(out)
