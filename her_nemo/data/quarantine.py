"""Bad rows on the side, and the ledger that shows that none was lost on the way."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from her_nemo.data.readers.rows import Rejected


class Quarantine:
    """quarantine.jsonl: one line for everything that was not used, with file, line, kind, and the thing itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.items: Counter[str] = Counter()  # by kind
        self.turns: Counter[str] = Counter()
        self.shown: list[str] = []  # the first few, as file:line: kind: what is wrong
        self._file = path.open("w", encoding="utf-8")

    def add(self, rejected: Rejected, *, whole: bool = True) -> None:
        """Put one away. `whole`: a row or conversation; False for a single turn whose conversation stays."""
        place = rejected.place
        line = place.line_number()
        entry = {
            "file": place.file,
            "line": line,
            "where": place.where,
            "kind": rejected.kind,
            "message": rejected.message,
            "turns": rejected.turns,
            "row": rejected.value,
        }
        # A lone surrogate can be the very reason why a row is here: as an escape it can be written.
        try:
            text = json.dumps(entry, ensure_ascii=False)
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = json.dumps(entry)
        self._file.write(text + "\n")
        if whole:
            self.items[rejected.kind] += 1
        self.turns[rejected.kind] += rejected.turns
        if len(self.shown) < 5:
            where = f" {place.where}" if place.where else ""
            self.shown.append(f"{place.file}:{line or '?'}{where}: {rejected.kind}: {rejected.message}")

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@dataclass
class Ledger:
    """What came in and what became of it. An item is a conversation, a view or a pair; a turn may be a reply.

    `turns_in` is counted on the raw rows by another way than reading them, so `check` is not true by construction.
    """

    items_in: int = 0
    items_out: int = 0
    turns_in: int = 0
    samples: int = 0
    in_pairs: int = 0  # replies that stand in preference pairs
    context: Counter[str] = field(default_factory=Counter)  # turns that are history only, by reason

    def check(self, quarantine: Quarantine) -> None:
        """Everything that came in is a sample, context, or in quarantine.

        Raises:
            RuntimeError: if not. It is a bug of ours, never the data's fault.
        """
        lost_items = self.items_in - self.items_out - quarantine.items.total()
        lost_turns = self.turns_in - self.turns_out - quarantine.turns.total()
        if lost_items or lost_turns:
            raise RuntimeError(
                f"the ledger does not balance: {lost_items} items and {lost_turns} turns are unaccounted for ("
                f"{self.as_dict(quarantine)}); this is a bug in her_nemo, please report it with the data"
            )

    @property
    def turns_out(self) -> int:
        """Turns that were used."""
        return self.samples + self.in_pairs + self.context.total()

    def as_dict(self, quarantine: Quarantine) -> dict[str, Any]:
        """The ledger as the data card has it."""
        return {
            "items_in": self.items_in,
            "items_out": self.items_out,
            "items_quarantined": quarantine.items.total(),
            "turns_in": self.turns_in,
            "turns_out": self.turns_out,
            "turns_quarantined": quarantine.turns.total(),
            "samples": self.samples,
            "replies_in_pairs": self.in_pairs,
            "context": dict(self.context.most_common()),
            "quarantined_items_by_kind": dict(quarantine.items.most_common()),
            "quarantined_turns_by_kind": dict(quarantine.turns.most_common()),
            "unexplained": self.turns_in - self.turns_out - quarantine.turns.total(),
        }
