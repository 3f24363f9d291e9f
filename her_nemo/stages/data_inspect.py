"""One row in colour: who sees what of it, how it is cut into segments, and what is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from her_nemo.config.data import InspectConfig
from her_nemo.config.errors import UserError
from her_nemo.data.readers import recognise, unknown_format
from her_nemo.data.readers.items import ReadOptions, View
from her_nemo.data.readers.own import is_own
from her_nemo.data.readers.rows import RawRow, Rejected, raw_rows
from her_nemo.data.records import Conversation
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.turn import Turn, parse_turn
from her_nemo.roleplay.views import VIEWS, Reader, view

COLOURS: Mapping[Kind, str] = {
    Kind.SYSTEM_THINKING: "magenta",
    Kind.ROLE_THINKING: "cyan",
    Kind.ROLE_ACTION: "yellow",
    Kind.SPEECH: "green",
}
MASKED = "bright_black"
COLUMN = 34  # characters a view needs to be readable
FACTS = (
    "trace_id",
    "conversation_id",
    "source",
    "book",
    "character",
    "split",
    "turn_index",
    "history_turns",
    "has_plan",
)


def run(cfg: InspectConfig) -> int:
    console = Console(width=cfg.width, soft_wrap=False)
    row = nth_row(Path(cfg.path), cfg.row)
    console.rule(f"{cfg.path}  row {cfg.row}")
    if "messages" in row and isinstance(row["messages"], list):
        show_messages(console, row, cfg)
    else:
        show_item(console, row, cfg)
    return 0


# ---------------------------------------------------------------- finding the row


def nth_row(path: Path, number: int) -> dict[str, Any]:
    """Row `number` (from 0) as an object. A raw file of conversations counts its conversations.

    Raises:
        UserError: if there are not so many, or the row is no JSON object.
    """
    rows = _items(path)
    found = next(islice(rows, number, None), None)
    if found is None:
        count = sum(1 for _ in _items(path))
        raise UserError(f"{path}: no row {number}, it has {count} (0 to {count - 1})" if count else f"{path}: no rows")
    if isinstance(found, Rejected):
        line = found.place.line_number()
        raise UserError(f"{path}:{line or '?'}: {found.kind}: {found.message}")
    return found


def _items(path: Path) -> Iterator[dict[str, Any] | Rejected]:
    for row in raw_rows(str(path)):
        if isinstance(row, Rejected):
            yield row
        elif not isinstance(row.value, dict):
            yield Rejected(row.place, "not_an_object", f"a {type(row.value).__name__}, not an object", 0, None)
        elif "messages" in row.value or is_own(row.value):
            yield row.value
        elif {"file", "kind", "message", "row"} <= set(row.value):
            yield {"quarantined": row.value}
        else:
            yield from _read(row)


def _read(row: RawRow) -> Iterator[dict[str, Any] | Rejected]:
    format_ = recognise(row.value, "auto")
    if format_ is None or format_.rows_per_item == 2:
        raise unknown_format(row, "auto")
    for found in format_.read(row, ReadOptions()):
        if isinstance(found, Rejected):
            yield found
            continue
        _, item = found
        if isinstance(item, View):
            yield {"messages": list(item.messages), "trace_id": item.original_trace_id, "character": item.character}
        else:
            yield item.to_row()


# ---------------------------------------------------------------- rows of messages


def show_messages(console: Console, row: Mapping[str, Any], cfg: InspectConfig) -> None:
    """A sample, a prompt or a pair."""
    console.print(facts(row))
    messages = list(row["messages"])
    replies: list[tuple[str, str]] = []
    if "chosen" in row:
        replies = [("chosen", row["chosen"]), ("rejected", row["rejected"])]
    elif messages and messages[-1]["role"] == "assistant":
        replies = [("trained reply", messages.pop()["content"])]
    elif row.get("reference"):
        replies = [("reference (not in the prompt)", row["reference"])]
    for message in messages:
        console.print(message_panel(message))
    console.print(legend())
    for title, text in replies:
        show_turn(console, title, text, row.get("character") or None, cfg)
    if not replies:
        console.print(Text("No reply in this row: it is a prompt, nothing is trained on.", style=MASKED))


def facts(row: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for key in FACTS:
        if row.get(key) not in (None, ""):
            table.add_row(Text(key.replace("_", " "), style="bold"), Text(str(row[key])))
    if row.get("defects"):
        table.add_row(Text("defects", style="bold"), Text(", ".join(row["defects"]), style="red"))
    return table


def message_panel(message: Mapping[str, str]) -> Panel:
    """A message of the prompt: masked, so grey; the character's own earlier thoughts keep their colour."""
    content = message["content"]
    if message["role"] == "assistant":
        body = coloured(parse_turn(content, expect_plan=False))
    else:
        body = Text(content, style=MASKED)
    return Panel(body, title=f"{message['role']} (masked)", title_align="left", border_style=MASKED)


def legend() -> Text:
    text = Text("Colours: ", style="bold")
    for kind, colour in COLOURS.items():
        text.append(f" {kind.value} ", style=f"reverse {colour}")
        text.append(" ")
    return text.append("masked (not trained on)", style=MASKED)


def coloured(turn: Turn) -> Text:
    """The text as it is, tags included, each segment in the colour of its kind."""
    text = Text(turn.text, style=COLOURS[Kind.SPEECH])
    for segment in turn.segments:
        text.stylize(COLOURS[segment.kind], segment.start, segment.end)
    if turn.name_span:
        text.stylize("bold", *turn.name_span)
    return text


def show_turn(console: Console, title: str, text: str, name: str | None, cfg: InspectConfig) -> None:
    """One reply: in colour, its segments with their mask, and what each reader sees."""
    turn = parse_turn(text, expect_plan=False, expect_name=name)
    console.print(Panel(coloured(turn), title=title, title_align="left", border_style="bold"))
    if turn.findings:
        found = ", ".join(f"{finding.defect.value} at {finding.start}" for finding in turn.findings)
        console.print(Text(f"defects: {found}", style="red"))
    console.print(segments(turn))
    if cfg.tokenizer is not None:
        console.print(tokens(text, cfg.tokenizer))
    for group in side_by_side(turn, console.width):
        console.print(group)


def segments(turn: Turn) -> Table:
    """The segments in order; `mask` is the kind that the loss of each of their tokens is counted under."""
    table = Table(title="segments", title_justify="left")
    for column in ("#", "mask", "span", "characters", "text"):
        table.add_column(column, overflow="fold", no_wrap=column != "text")
    rows = [(segment.start, segment.end, segment.kind, segment.text) for segment in turn.segments]
    if turn.name_span:
        rows.append((*turn.name_span, Kind.SPEECH, turn.name_prefix))
    for number, (start, end, kind, text) in enumerate(sorted(rows)):
        cells = (str(number), kind.value, f"{start}-{end}", str(len(text)), text)
        table.add_row(*(Text(cell, style=COLOURS[kind]) for cell in cells))
    return table


def tokens(text: str, directory: str) -> Group:
    """Every token of the reply in the colour of its mask, and how many of each kind there are."""
    # Imported here: transformers takes seconds, and is only needed when a tokenizer was given.
    from her_nemo.data.tokenise import KIND_NAMES, Tokeniser

    tokeniser = Tokeniser(directory)
    ids, kinds = tokeniser.reply_with_kinds(text)
    strip, counts = Text("tokens: ", style="bold"), dict.fromkeys(Kind, 0)
    for position, (token, code) in enumerate(zip(ids, kinds, strict=True)):
        kind = Kind(KIND_NAMES[int(code)])
        counts[kind] += 1
        style = f"{'reverse ' if position % 2 else ''}{COLOURS[kind]}"
        strip.append(tokeniser.decode([token], skip_special_tokens=False), style=style)
    shown = ", ".join(f"{count} {kind.value}" for kind, count in counts.items() if count)
    return Group(strip, Text(f"{len(ids)} trained tokens: {shown}", style="bold"))


def side_by_side(turn: Turn, width: int) -> Iterator[RenderableType]:
    """What each reader sees, as many columns as fit."""
    readers = list(Reader)
    columns = max(1, width // COLUMN)
    for start in range(0, len(readers), columns):
        chosen = readers[start : start + columns]
        table = Table(title="views" if start == 0 else None, title_justify="left")
        for reader in chosen:
            hidden = [kind.value for kind in Kind if not VIEWS[reader].sees(kind)]
            table.add_column(f"{reader.value}\n{'hides ' + ', '.join(hidden) if hidden else 'sees all'}", ratio=1)
        table.add_row(*(_seen(turn, reader) for reader in chosen))
        yield table


def _seen(turn: Turn, reader: Reader) -> Text:
    text = view(turn, reader)
    return Text(text) if text.strip() else Text("(nothing)", style=MASKED)


# ---------------------------------------------------------------- conversations and quarantined rows


def show_item(console: Console, row: Mapping[str, Any], cfg: InspectConfig) -> None:
    """A conversation, or a line of quarantine.jsonl."""
    if "quarantined" in row:
        entry = row["quarantined"]
        where = f" {entry['where']}" if entry.get("where") else ""
        console.print(Text(f"{entry['file']}:{entry['line'] or '?'}{where}", style="bold"))
        console.print(Text(f"{entry['kind']}: {entry['message']}", style="red"))
        shown = json.dumps(entry["row"], ensure_ascii=False, indent=1)
        console.print(Text(shown if len(shown) < 4000 else shown[:4000] + " ..."))
        return
    conversation = Conversation.from_row(row)
    console.print(facts(row))
    for title, text in (("background", conversation.background), ("scenario", conversation.scenario)):
        if text:
            console.print(Panel(Text(text, style=MASKED), title=title, title_align="left", border_style=MASKED))
    console.print(legend())
    if cfg.turn is None:
        console.print(conversation_table(conversation))
        return
    if cfg.turn >= len(conversation.turns):
        raise UserError(f"turn={cfg.turn}: the conversation has {len(conversation.turns)} turns, from 0")
    turn = conversation.turns[cfg.turn]
    plan = f"<{Kind.SYSTEM_THINKING}>{turn.plan}</{Kind.SYSTEM_THINKING}>" if turn.plan else ""
    show_turn(console, f"turn {cfg.turn}", f"{plan}{turn.speaker}: {turn.text}", turn.speaker, cfg)


def conversation_table(conversation: Conversation) -> Table:
    """All turns, plans in front, with what is wrong with them."""
    table = Table(title=f"{len(conversation.turns)} turns", title_justify="left", show_lines=True)
    table.add_column("#")
    table.add_column("speaker")
    table.add_column("turn", ratio=1, overflow="fold")
    table.add_column("defects")
    keys = {character.name for character in conversation.characters if character.key}
    for number, turn in enumerate(conversation.turns):
        body = Text()
        if turn.plan:
            body.append(turn.plan + "\n", style=COLOURS[Kind.SYSTEM_THINKING])
        body.append_text(coloured(parse_turn(turn.text, expect_plan=False, expect_name=turn.speaker)))
        style = "bold" if turn.speaker in keys else MASKED
        table.add_row(str(number), Text(turn.speaker, style=style), body, Text(", ".join(turn.defects), style="red"))
    return table
