"""The data card: what a dataset holds, in figures, as JSON and as a page of markdown."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from her_nemo.data.patterns import entropy_bits
from her_nemo.data.records import Conversation
from her_nemo.data.splits import Purpose
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.turn import parse_turn

SHOWN_BOOKS = 30  # in the markdown; the JSON has all of them
SHOWN_PATTERNS = 8


class Figures:
    """Collects the figures of a card while the rows go by."""

    def __init__(self) -> None:
        self.conversations = 0
        self.samples = 0
        self.pairs = 0
        self.prompts = 0
        self.with_plan = 0
        self.defects: Counter[str] = Counter()
        self.patterns: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.books: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.splits: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.lengths: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
        self._seen_in_split: set[tuple[str, str]] = set()

    def add_conversation(self, conversation: Conversation) -> None:
        self.conversations += 1
        self.books[conversation.book]["conversations"] += 1
        self.books[conversation.book]["turns"] += len(conversation.turns)
        self.lengths["turns_per_conversation"].append(len(conversation.turns))
        for turn in conversation.turns:
            self.defects.update(turn.defects)
        self._in_split(conversation.split or "", conversation.conversation_id, len(conversation.turns))

    def add_sample(self, row: Mapping[str, Any], *, viewed: bool) -> None:
        """A sample as a row. `viewed`: it came from a view, not from a conversation that was counted."""
        self.samples += 1
        self.with_plan += row["has_plan"]
        self.characters[row["character"]] += 1
        self.books[row["book"]]["samples"] += 1
        self.splits[row["split"] or ""]["samples"] += 1
        if viewed:
            self.defects.update(row["defects"])
            self._in_split(row["split"] or "", row["conversation_id"], 0)
        *prompt, reply = row["messages"]
        turn = parse_turn(reply["content"], expect_plan=False, expect_name=row["character"] or None)
        self.patterns[" ".join(kind.value for kind in turn.pattern)] += 1
        self.lengths["reply"].append(len(reply["content"]))
        self.lengths["prompt"].append(sum(len(message["content"]) for message in prompt))
        for kind in Kind:
            if text := turn.text_of(kind):
                self.lengths[kind.value].append(len(text))

    def add_pair(self, pair: Mapping[str, Any]) -> None:
        self.pairs += 1
        self._in_split(pair["split"] or "", pair["conversation_id"], 0)
        self.splits[pair["split"] or ""]["pairs"] += 1
        for key in ("chosen", "rejected"):
            self.lengths[key].append(len(pair[key]))
        self.lengths["prompt"].append(sum(len(message["content"]) for message in pair["messages"]))

    def _in_split(self, split: str, conversation: str, turns: int) -> None:
        self.splits[split]["turns"] += turns
        if (split, conversation) not in self._seen_in_split:
            self._seen_in_split.add((split, conversation))
            self.splits[split]["conversations"] += 1

    def as_dict(self) -> dict[str, Any]:
        """Lengths are in characters, but for turns_per_conversation; entropy in bits."""
        total = self.patterns.total()
        return {
            "counts": {
                "conversations": self.conversations,
                "samples": self.samples,
                "samples_with_plan": self.with_plan,
                "prompts": self.prompts,
                "pairs": self.pairs,
                "books": len([book for book in self.books if book]),
                "characters": len([name for name in self.characters if name]),
            },
            "splits": {purpose.value: dict(self.splits.get(purpose.value, {})) for purpose in Purpose},
            "defects": dict(self.defects.most_common()),
            "patterns": {
                "entropy_bits": round(entropy_bits(self.patterns), 4) if total else 0.0,
                "top1_share": round(max(self.patterns.values()) / total, 4) if total else 0.0,
                "different": len(self.patterns),
                "most_common": dict(self.patterns.most_common(SHOWN_PATTERNS)),
            },
            "lengths": {name: summary(values) for name, values in sorted(self.lengths.items())},
            "books": {book: dict(counts) for book, counts in sorted(self.books.items())},
            "characters": dict(self.characters.most_common(50)),
        }


def summary(values: Sequence[int]) -> dict[str, float]:
    """Count, mean, median, 95th percentile (nearest rank) and maximum."""
    ordered = sorted(values)
    count = len(ordered)
    return {
        "count": count,
        "mean": round(sum(ordered) / count, 1),
        "median": ordered[(count - 1) // 2],
        "p95": ordered[max(0, -(-count * 95 // 100) - 1)],
        "max": ordered[-1],
    }


# ---------------------------------------------------------------- markdown


def markdown(card: Mapping[str, Any]) -> str:
    """The card as a page."""
    counts, ledger = card["counts"], card["ledger"]
    parts = [
        f"# Data card: {card['name']}\n",
        f"Format `{card['format']}`, from {', '.join(f'`{path}`' for path in card['paths'])}.\n",
        "## What came in, and what became of it\n",
        _ledger(ledger),
        "## Counts\n",
        _table(["what", "number"], [[name.replace("_", " "), number] for name, number in counts.items() if number]),
        "## Splits\n",
        _splits(card["splits"]),
    ]
    parts += ["## Defects\n", _counted("defect", "turns", card["defects"], "No turn has any.")]
    if card["patterns"]["different"]:
        parts += ["## Patterns\n", _patterns(card["patterns"], counts["samples"])]
    parts += ["## Lengths\n", "Characters, but for turns per conversation.\n", _lengths(card["lengths"])]
    parts += ["## Books\n", _books(card["books"])]
    if card["notes"]:
        parts += ["## Notes\n", "\n".join(f"- {note}" for note in card["notes"]) + "\n"]
    return "\n".join(parts)


def _ledger(ledger: Mapping[str, Any]) -> str:
    rows = [
        ["conversations, views or pairs", ledger["items_in"], ledger["items_out"], ledger["items_quarantined"]],
        ["turns", ledger["turns_in"], ledger["turns_out"], ledger["turns_quarantined"]],
    ]
    text = _table(["", "in", "used", "quarantined"], rows)
    used = [["samples", ledger["samples"]], ["replies in pairs", ledger["replies_in_pairs"]]]
    used += [[f"context only: {reason.replace('_', ' ')}", n] for reason, n in ledger["context"].items()]
    text += "\n" + _table(["turns used", "number"], [row for row in used if row[1]])
    if ledger["quarantined_turns_by_kind"]:
        kinds = ledger["quarantined_turns_by_kind"]
        rows = [[kind, ledger["quarantined_items_by_kind"].get(kind, 0), turns] for kind, turns in kinds.items()]
        text += "\n" + _table(["quarantined", "whole items", "turns"], rows)
    return text + f"\nUnexplained losses: {ledger['unexplained']} turns.\n"


def _splits(splits: Mapping[str, Mapping[str, int]]) -> str:
    columns = [c for c in ("conversations", "turns", "samples", "pairs") if any(s.get(c) for s in splits.values())]
    totals = {column: sum(split.get(column, 0) for split in splits.values()) for column in columns}
    rows = []
    for name, split in splits.items():
        cells = [f"{split.get(c, 0)} ({split.get(c, 0) / (totals[c] or 1):.0%})" for c in columns]
        rows.append([name, *cells])
    return _table(["purpose", *columns], rows)


def _patterns(patterns: Mapping[str, Any], samples: int) -> str:
    head = (
        f"{patterns['different']} different; entropy {patterns['entropy_bits']:.2f} bits; "
        f"the most frequent has {patterns['top1_share']:.0%}.\n"
    )
    rows = [[name, f"{count} ({count / samples:.0%})"] for name, count in patterns["most_common"].items()]
    return head + "\n" + _table(["pattern", "samples"], rows)


def _lengths(lengths: Mapping[str, Mapping[str, float]]) -> str:
    columns = ["count", "mean", "median", "p95", "max"]
    return _table(["", *columns], [[n.replace("_", " "), *(s[c] for c in columns)] for n, s in lengths.items()])


def _books(books: Mapping[str, Mapping[str, int]]) -> str:
    ordered = sorted(books.items(), key=lambda item: -item[1].get("samples", 0))
    columns = [c for c in ("conversations", "turns", "samples") if any(book.get(c) for book in books.values())]
    rows = [[name or "(none named)", *(book.get(c, 0) for c in columns)] for name, book in ordered[:SHOWN_BOOKS]]
    more = f"\n... and {len(books) - SHOWN_BOOKS} more, see card.json\n" if len(books) > SHOWN_BOOKS else ""
    return _table(["book", *columns], rows) + more


def _counted(what: str, of: str, counts: Mapping[str, int], none: str) -> str:
    return _table([what, of], [[name, count] for name, count in counts.items()]) if counts else none + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"

    rule = "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|\n"
    return line(head) + rule + "".join(line(row) for row in rows)


