"""Preference pairs as work for a judge: what it is shown, in both orders, balanced so that no shortcut pays.

A judge learns shortcuts where the better reply tends to be the longer one, or the one with more tags, or the first.
Each pair stands here in both orders, and where asked a pair in which the better reply is longer (or has more tags) is
only kept with another in which it is shorter (or has fewer).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.data.sources import read_rows
from her_nemo.roleplay.judging import candidate, context_of, judge_messages
from her_nemo.roleplay.measures import words
from her_nemo.roleplay.verdict import Winner

ORDERS = (Winner.CAND_1, Winner.CAND_2)  # where the better reply stands
_SIGNS = {1: "more", 0: "same", -1: "less"}


@dataclass(frozen=True)
class JudgedPair:
    """A labelled pair as a judge may see it: no plans."""

    pair_id: str
    context: str
    better: str
    worse: str

    @property
    def distinct(self) -> bool:
        """Whether the judge sees any difference: replies may differ in their plans alone."""
        return self.better != self.worse

    @property
    def length(self) -> int:
        """Sign of the better reply's words less the worse one's."""
        return _sign(len(words(self.better)) - len(words(self.worse)))

    @property
    def tags(self) -> int:
        """The same for thoughts and actions."""
        return _sign(_tags(self.better) - _tags(self.worse))

    def in_order(self, better: Winner) -> tuple[str, str]:
        """cand_1 and cand_2, the better one where `better` says."""
        return (self.better, self.worse) if better is Winner.CAND_1 else (self.worse, self.better)


def read_pair(row: Mapping[str, Any]) -> JudgedPair:
    """A row of kind "pairs" (`trace_id`, `messages`, `chosen`, `rejected`)."""
    return JudgedPair(
        row["trace_id"], context_of(row["messages"]), candidate(row["chosen"]), candidate(row["rejected"])
    )


def prompt_rows(pair: JudgedPair, *, brief: bool = False) -> list[dict[str, Any]]:
    """The pair in both orders, as rows of kind "prompts" with the label and what an evaluation sorts by:

    `trace_id` (of this order), `messages`, `better` (cand_1 or cand_2), `pair` (the same for both orders) and `words`
    (of cand_1 and of cand_2).
    """
    rows = []
    for better in ORDERS:
        shown = pair.in_order(better)
        rows.append(
            {
                "trace_id": f"{pair.pair_id}/{better.value}",
                "messages": judge_messages(pair.context, *shown, brief=brief),
                "better": better.value,
                "pair": pair.pair_id,
                "words": [len(words(text)) for text in shown],
            }
        )
    return rows


def read_labels(paths: Iterable[str | Path], skip_malformed: bool = False) -> dict[str, Winner]:
    """Which reply is better by each row's label, by `trace_id`, over all files.

    Raises:
        UserError: a row has no label, another than cand_1, cand_2 or tie, or one that differs from its namesake's.
    """
    labels: dict[str, Winner] = {}
    for path in paths:
        rows, _ = read_rows(path, "prompts", skip_malformed)
        for row in rows:
            name, label = row["trace_id"], row.get("better")
            if label not in list(Winner):
                raise UserError(
                    f"{path}: row {name!r} has better={label!r}; a judge's prompt says which reply is better: "
                    f"{', '.join(Winner)} (her-nemo data judge writes such rows)"
                )
            if labels.setdefault(name, Winner(label)) is not Winner(label):
                raise UserError(f"{path}: row {name!r} stands twice, with different labels")
    return labels


def balanced(pairs: Sequence[JudgedPair]) -> list[JudgedPair]:
    """As many pairs as can be kept so that neither length, nor the number of tags, nor both together tell the winner.

    Pairs of opposite signs (longer with more tags, shorter with fewer) are kept in equal number, those with the
    smallest hash of their name; pairs that differ in neither are all kept. The order stays.
    """
    cells: dict[tuple[int, int], list[JudgedPair]] = {}
    for pair in pairs:
        cells.setdefault((pair.length, pair.tags), []).append(pair)
    kept: set[str] = set()
    for (length, tags), members in cells.items():
        opposite = cells.get((-length, -tags), [])
        room = len(members) if (length, tags) == (0, 0) else min(len(members), len(opposite))
        kept |= {pair.pair_id for pair in sorted(members, key=_place)[:room]}
    return [pair for pair in pairs if pair.pair_id in kept]


def first_order(pair: JudgedPair) -> Winner:
    """Where the better reply stands when only one order is asked: drawn by the pair's name, half and half."""
    return ORDERS[_place(pair) % 2]


def balance_report(
    pairs: Sequence[JudgedPair], rows: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, int]]:
    """How often the better reply is cand_1, is longer, has more tags: `order` over rows, the others over pairs."""
    order = Counter(str(row["better"]) for row in rows)
    length = Counter(_SIGNS[pair.length] for pair in pairs)
    tags = Counter(_SIGNS[pair.tags] for pair in pairs)
    return {
        "order": {winner.value: order[winner.value] for winner in ORDERS},
        "length": {name: length[name] for name in _SIGNS.values()},
        "tags": {name: tags[name] for name in _SIGNS.values()},
    }


def _tags(text: str) -> int:
    return text.count("<role_thinking>") + text.count("<role_action>")


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _place(pair: JudgedPair) -> int:
    return int.from_bytes(hashlib.sha256(pair.pair_id.encode()).digest()[:8], "big")
