"""From files of any known format to conversations, samples and pairs as Parquet, with a data card.

Two passes: the first reads, checks and recognises what belongs together; the second, when every conversation has its
purpose, writes. All of it goes to `<out>.partial`, which gets its name when the ledger balances.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from her_nemo.config.data import IngestConfig
from her_nemo.config.errors import UserError
from her_nemo.data import card as cards
from her_nemo.data.quarantine import Ledger, Quarantine
from her_nemo.data.readers import recognise, unknown_format
from her_nemo.data.readers.fields import check_texts
from her_nemo.data.readers.items import Format, Item, ReadOptions, View
from her_nemo.data.readers.rows import Malformed, Place, RawRow, Rejected, raw_rows
from her_nemo.data.records import (
    CONVERSATION_SCHEMA,
    PAIR_SCHEMA,
    PROMPT_SCHEMA,
    SAMPLE_SCHEMA,
    Conversation,
    Pair,
    Sample,
    parquet_file,
    read_parquet,
)
from her_nemo.data.samples import (
    Context,
    Outcome,
    SampleOptions,
    samples_of_conversation,
    samples_of_view,
)
from her_nemo.data.splits import Identity, Purpose, assign, identity_of, overlaps
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.layouts import Layout

PEEK = 20  # rows looked at to tell a file's format


@dataclass
class _Run:
    """What the two passes share."""

    cfg: IngestConfig
    folder: Path
    quarantine: Quarantine
    ledger: Ledger = field(default_factory=Ledger)
    identities: list[Identity] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)  # of conversations, by id
    keys: dict[str, str] = field(default_factory=dict)  # conversation id -> key of its split
    ids: dict[str, int] = field(default_factory=dict)  # item id -> hash of its content
    formats: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)  # views whose user messages held others' thoughts
    renamed: int = 0

    @property
    def samples(self) -> SampleOptions:
        return SampleOptions(
            self.cfg.speakers, self.cfg.plans, frozenset(self.cfg.allow_defects), Layout(self.cfg.layout)
        )


def ingest(cfg: IngestConfig) -> dict[str, Any]:
    """Read `cfg.path`, write `cfg.out`, and return the data card.

    Raises:
        UserError: if nothing is there, the format is not known, nothing is usable, or `out` holds something else.
    """
    out = Path(cfg.out)
    _check_target(out)
    folder = out.with_name(out.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        card = _ingest_into(folder, cfg)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    os.replace(folder, out)
    return card


def _ingest_into(folder: Path, cfg: IngestConfig) -> dict[str, Any]:
    with Quarantine(folder / "quarantine.jsonl") as quarantine:
        run = _Run(cfg, folder, quarantine)
        _first_pass(run)
        purposes = _purposes(run)
        figures = _second_pass(run, purposes)
        run.ledger.check(quarantine)
    if not figures.samples + figures.pairs + figures.conversations:
        shown = "".join(f"\n  {line}" for line in quarantine.shown)
        raise UserError(
            f"{', '.join(_paths(cfg))}: nothing usable, {quarantine.items.total()} bad rows and "
            f"{quarantine.turns.total()} bad turns{shown}"
        )
    for name in ("conversations", "samples", "pairs"):
        (folder / f"first_{name}.parquet").unlink()
    card = _card(run, figures)
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "card.md").write_text(cards.markdown(card), encoding="utf-8")
    return card


def _check_target(out: Path) -> None:
    """`out` may be new, empty, or written by an earlier ingest, which is replaced."""
    if out.is_dir() and any(out.iterdir()) and not (out / "card.json").is_file():
        raise UserError(f"{out}: not empty and not written by `her-nemo data ingest`; give another out=DIR")


def _paths(cfg: IngestConfig) -> list[str]:
    return [cfg.path] if isinstance(cfg.path, str) else list(cfg.path)


# ---------------------------------------------------------------- first pass


def _first_pass(run: _Run) -> None:
    """Every item of every file into first_*.parquet, without purposes."""
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(parquet_file(run.folder / f"first_{name}.parquet", schema))
            for name, schema in (
                ("conversations", CONVERSATION_SCHEMA),
                ("samples", SAMPLE_SCHEMA),
                ("pairs", PAIR_SCHEMA),
            )
        }
        for place, item in _items(run):
            if isinstance(item, Rejected):
                run.ledger.items_in += 1
                run.quarantine.add(item)
                continue
            run.ledger.items_in += 1
            known = _settle_id(run, place, item) if (bad := _bad_text(place, item)) is None else bad
            if isinstance(known, Rejected):
                run.quarantine.add(known)
                continue
            run.ledger.items_out += 1
            run.identities.append(identity := identity_of(known))
            if isinstance(known, Conversation):
                run.keys[known.conversation_id] = identity.key
                run.places[known.conversation_id] = place
                files["conversations"].add(known.to_row())
            elif isinstance(known, Pair):
                run.keys[known.conversation_id] = identity.key
                run.ledger.in_pairs += 2
                files["pairs"].add(known.to_row())
            else:
                run.keys[known.conversation_id] = identity.key
                for outcome in samples_of_view(known, run.samples, run.hidden):
                    if _book_keeping(run, outcome, place.down("messages")):
                        files["samples"].add(outcome.to_row())


def _items(run: _Run) -> Iterator[tuple[Place, Item | Rejected]]:
    """Every item with its place; the turns of every raw row are counted on the way."""
    cfg = run.cfg
    options = ReadOptions(
        None if cfg.dialect == "auto" else Dialect(cfg.dialect), cfg.book, cfg.character
    )
    for path in _paths(cfg):
        rows = raw_rows(path, cfg.dataset_config, cfg.dataset_split)
        for format_, row in _with_format(rows, cfg.source):
            if format_ is not None and format_.name not in run.formats:
                run.formats.append(format_.name)
            if isinstance(row, Rejected):
                yield row.place, row
                continue
            assert format_ is not None
            run.ledger.turns_in += format_.count_turns(row.value)
            for item in format_.read(row, options):
                yield (item.place, item) if isinstance(item, Rejected) else item


def _with_format(
    rows: Iterable[RawRow | Rejected], source: str
) -> Iterator[tuple[Format | None, RawRow | Rejected]]:
    """Each row with the format of its file. No format: no row of the file could be read."""
    stream = tqdm(rows, disable=None, unit=" rows", desc="reading")
    for _, file in groupby(stream, key=lambda row: row.place.file):
        yield from _rows_of_one_file(file, source)


def _rows_of_one_file(
    rows: Iterator[RawRow | Rejected], source: str
) -> Iterator[tuple[Format | None, RawRow | Rejected]]:
    head, format_ = _peek(rows, source)
    rest = chain(head, rows)
    for row in rest:
        if format_ is not None and format_.rows_per_item == 2:
            yield format_, _joined(row, next(rest, None))
        else:
            yield format_, row


def _peek(
    rows: Iterator[RawRow | Rejected], source: str
) -> tuple[list[RawRow | Rejected], Format | None]:
    """Rows from the head of a file until one is recognised, and the format it is of. The first may be bad."""
    head: list[RawRow | Rejected] = []
    strange: list[RawRow] = []
    for row in rows:
        head.append(row)
        if isinstance(row, RawRow):
            if format_ := recognise(row.value, source):
                return head, format_
            strange.append(row)
            if len(strange) == PEEK:
                break
    if strange:
        raise unknown_format(strange[0], source)
    return head, None


def _joined(one: RawRow | Rejected, other: RawRow | Rejected | None) -> RawRow | Rejected:
    """Two lines as one raw row. A bad line takes its partner along."""
    if isinstance(one, RawRow) and isinstance(other, RawRow):
        return RawRow(one.place, [one.value, other.value])
    bad = one if isinstance(one, Rejected) else other
    values = [getattr(row, "value", None) for row in (one, other)]
    if bad is None:
        return Rejected(one.place, "missing_partner", "the last chosen line has no rejected line", 0, values)
    assert isinstance(bad, Rejected)
    return replace(bad, message=f"{bad.message} (its partner is lost with it)", value=values)


def _bad_text(place: Place, item: Item) -> Rejected | None:
    """Whatever a reader took from wherever, no text of an item may break the files or forge a message's border."""
    try:
        check_texts(asdict(item))
    except Malformed as problem:
        return Rejected.of(place, problem, _turns_of(item), _id_of(item))
    return None


def _settle_id(run: _Run, place: Place, item: Item) -> Item | Rejected:
    """The item under an id of its own. The same id with the same content is a duplicate, else it gets a number."""
    name = _id_of(item)
    content = hash(repr(item))
    if run.ids.get(name) == content:
        message = f"{name!r} with the same content was here before"
        return Rejected(place, "duplicate", message, _turns_of(item), name)
    if name in run.ids:
        run.renamed += 1
        count = 2
        while f"{name}#{count}" in run.ids:
            count += 1
        item = _renamed(item, f"{name}#{count}")
    run.ids[_id_of(item)] = content
    return item


def _id_of(item: Item) -> str:
    if isinstance(item, Conversation):
        return item.conversation_id
    if isinstance(item, Pair):
        return item.trace_id
    return item.trace_id or item.original_trace_id


def _turns_of(item: Item) -> int:
    if isinstance(item, Conversation):
        return len(item.turns)
    if isinstance(item, Pair):
        return 2
    return sum(message["role"] == "assistant" for message in item.messages)


def _renamed(item: Item, name: str) -> Item:
    if isinstance(item, Conversation):
        return replace(item, conversation_id=name)
    if isinstance(item, View) and item.trace_id is None:
        return replace(item, original_trace_id=name)
    return replace(item, trace_id=name)


def _book_keeping(run: _Run, outcome: Outcome, place: Place) -> bool:
    """Enter one outcome into the ledger; whether it is a sample."""
    if isinstance(outcome, Sample):
        run.ledger.samples += 1
        return True
    if isinstance(outcome, Context):
        run.ledger.context[outcome.reason] += 1
        return False
    value = {"trace_id": outcome.trace_id, "reply": outcome.reply}
    where = place.down(outcome.turn)
    run.quarantine.add(Rejected(where, outcome.kind, outcome.message, 1, value), whole=False)
    return False


# ---------------------------------------------------------------- purposes and second pass


def _purposes(run: _Run) -> dict[str, str]:
    """Conversation id -> purpose."""
    cfg = run.cfg
    test = list(_test_identities(cfg))
    identities = run.identities
    if not cfg.hold_out:
        identities = [replace(identity, held_out=False) for identity in identities]
    shares = {Purpose(name): share for name, share in cfg.shares.model_dump().items()}
    by_key = assign(identities, shares, cfg.seed, cfg.unit, test)
    if crossing := overlaps(identities, by_key):
        raise RuntimeError(f"conversations in two splits: {crossing[:5]}; this is a bug in her_nemo")
    if cfg.test_set is not None:
        matched = sum(by_key.get(identity.key) == Purpose.TEST for identity in test)
        run.notes.append(f"test_set: {len(test)} conversations, {matched} of them found here by name")
    return {name: by_key[key] for name, key in run.keys.items()}


def _test_identities(cfg: IngestConfig) -> Iterator[Identity]:
    """The conversations of `test_set`, in any format ingest reads."""
    if cfg.test_set is None:
        return
    found = False
    for format_, row in _with_format(raw_rows(cfg.test_set), "auto"):
        if isinstance(row, Rejected) or format_ is None:
            raise UserError(f"test_set={cfg.test_set}: {row.place.file}:{row.place.line_number()} cannot be read")
        for item in format_.read(row, ReadOptions()):
            if isinstance(item, Rejected):
                # A test conversation that cannot be read could not be kept out of training.
                raise UserError(f"test_set={cfg.test_set}: {item.place.where}: {item.kind}: {item.message}")
            found = True
            yield identity_of(item[1])
    if not found:
        raise UserError(f"test_set={cfg.test_set}: no conversation in it")


def _second_pass(run: _Run, purposes: dict[str, str]) -> cards.Figures:
    """Everything with its purpose, to the files that stay."""
    figures = cards.Figures()
    with ExitStack() as stack:
        writer = _Writer(run.folder, stack, figures)
        first = run.folder / "first_conversations.parquet"
        for row in tqdm(read_parquet(first), disable=None, unit=" conversations", desc="writing"):
            conversation = replace(Conversation.from_row(row), split=purposes[row["conversation_id"]])
            writer.conversation(conversation)
            place = run.places[conversation.conversation_id].down("dialogues")
            for outcome in samples_of_conversation(conversation, run.samples):
                if _book_keeping(run, outcome, place):
                    writer.sample(outcome.to_row(), viewed=False)
        for row in read_parquet(run.folder / "first_samples.parquet"):
            writer.sample(row | {"split": purposes[row["conversation_id"]]}, viewed=True)
        for row in read_parquet(run.folder / "first_pairs.parquet"):
            writer.pair(row | {"split": purposes[row["conversation_id"]]})
    if writer.prompts_left_out:
        run.notes.append(
            f"{writer.prompts_left_out} samples of roleplay_rl are no prompts: the character spoke last before them"
        )
    return figures


class _Writer:
    """The files that stay; one is opened when the first row for it comes."""

    def __init__(self, folder: Path, stack: ExitStack, figures: cards.Figures) -> None:
        self.folder, self.stack, self.figures = folder, stack, figures
        self.files: dict[str, Any] = {}
        self.prompts_left_out = 0
        (folder / "splits").mkdir()

    def _add(self, name: str, schema: Any, row: dict[str, Any]) -> None:
        if name not in self.files:
            self.files[name] = self.stack.enter_context(parquet_file(self.folder / f"{name}.parquet", schema))
        self.files[name].add(row)

    def conversation(self, conversation: Conversation) -> None:
        self._add("conversations", CONVERSATION_SCHEMA, conversation.to_row())
        self.figures.add_conversation(conversation)

    def sample(self, row: dict[str, Any], *, viewed: bool) -> None:
        self._add("samples", SAMPLE_SCHEMA, row)
        self.figures.add_sample(row, viewed=viewed)
        if row["split"] != Purpose.ROLEPLAY_RL:
            self._add(f"splits/{row['split']}", SAMPLE_SCHEMA, row)
        elif row["messages"][-2]["role"] == "user":
            *prompt, reply = row["messages"]
            self._add(
                f"splits/{row['split']}",
                PROMPT_SCHEMA,
                row | {"messages": prompt, "reference": reply["content"]},
            )
            self.figures.prompts += 1
        else:
            self.prompts_left_out += 1

    def pair(self, row: dict[str, Any]) -> None:
        self._add("pairs", PAIR_SCHEMA, row)
        self._add(f"splits/{row['split']}_pairs", PAIR_SCHEMA, row)
        self.figures.add_pair(row)


# ---------------------------------------------------------------- the card


def _card(run: _Run, figures: cards.Figures) -> dict[str, Any]:
    notes = list(run.notes)
    if run.renamed:
        notes.append(f"{run.renamed} items had an id that another one has: they got a number (#2, ...)")
    if run.hidden:
        notes.append(
            f"{len(set(run.hidden))} views had thoughts of others in their user messages: taken out, fail private"
        )
    return {
        "name": Path(run.cfg.out).name,
        "paths": _paths(run.cfg),
        "format": ", ".join(run.formats),
        "ledger": run.ledger.as_dict(run.quarantine),
        **figures.as_dict(),
        "notes": notes,
        "config": run.cfg.model_dump(),
    }


