"""What the terminal shows: turns in colour, thoughts and plans folded until they are asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from her_nemo.chat.scenes import Scene
from her_nemo.chat.session import Author, ChatSession, PlayedTurn, Shown, pieces_of, problem_of
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.text import join_seam

STYLES: Mapping[Kind, str] = {
    Kind.SYSTEM_THINKING: "magenta",
    Kind.ROLE_THINKING: "italic cyan",
    Kind.ROLE_ACTION: "italic yellow",
    Kind.SPEECH: "",
}
FOLDS: Mapping[Kind, str] = {Kind.SYSTEM_THINKING: "plan", Kind.ROLE_THINKING: "thought"}
BY: Mapping[Author, str] = {
    Author.SCENE: "the scene's own",
    Author.MODEL: "model",
    Author.PARTNER: "model",
    Author.PERSON: "you",
    Author.EDIT: "edited by you",
}
SOFT = "bright_black"
# A reply may hold anything: escape sequences and other control signs must not reach the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def safe(text: str) -> str:
    """`text` with control signs made visible as a replacement sign."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def counted(number: int, thing: str) -> str:
    """`1 turn`, `2 turns`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def pieces_text(pieces: Sequence[Shown], unfolded: frozenset[Kind]) -> Text:
    """The pieces of a turn. A folded one leaves only a mark that it is there."""
    out = Text()
    for piece in pieces:
        if piece.folded and piece.kind not in unfolded:
            shown, style = f"[{FOLDS[piece.kind]}]", SOFT
        elif piece.kind is Kind.ROLE_ACTION:
            shown, style = f"*{safe(piece.text)}*", STYLES[piece.kind]
        elif piece.kind is Kind.SYSTEM_THINKING:
            shown, style = f"plan: {safe(piece.text)}\n", STYLES[piece.kind]
        elif piece.kind is Kind.ROLE_THINKING:
            shown, style = f"({safe(piece.text)})", STYLES[piece.kind]
        else:
            shown, style = safe(piece.text), STYLES[piece.kind]
        seam = join_seam(out.plain, shown)[len(out.plain) : -len(shown) or None] if out.plain else ""
        out.append(seam).append(shown, style=style)
    return out


def speaker_line(session: ChatSession, speaker: str, note: str) -> Text:
    """Who speaks, and by whom he is played."""
    style = "bold green" if session.is_lead(speaker) else "bold blue"
    return Text.assemble((safe(speaker), style), (f"  {note}", SOFT))


def turn_view(session: ChatSession, number: int, unfolded: frozenset[Kind]) -> RenderableType:
    """One turn with its number, its author and what is wrong with it."""
    turn = session.turns[number]
    body = pieces_text(pieces_of(turn.speaker, turn.text), unfolded)
    lines: list[RenderableType] = [
        speaker_line(session, turn.speaker, f"{number + 1} · {note_of(turn)}"),
        body,
    ]
    if (problem := problem_of(session, turn)) is not None:
        lines.append(Text(f"! {problem}: not exported until it is mended or written anew", style="red"))
    return Group(*lines, Text())


def note_of(turn: PlayedTurn) -> str:
    """Who wrote it, and which of how many it is."""
    several = f" · {turn.chosen + 1} of {len(turn.candidates)}" if len(turn.candidates) > 1 else ""
    return BY[turn.candidate.author] + several


def streaming_view(
    session: ChatSession, speaker: str, pieces: Sequence[Shown], unfolded: frozenset[Kind], room: int
) -> Group:
    """A turn that is still being written: its last `room` signs."""
    body = pieces_text(pieces, unfolded)
    if len(body) > room:
        body = Text("… ", style=SOFT).append_text(body[-room:])
    body.append(" ▌", style=SOFT)
    return Group(speaker_line(session, speaker, "…"), body)


def scene_table(scenes: Sequence[Scene], first: int = 0) -> Table:
    """Scenes to choose from."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", style="bold")
    table.add_column(overflow="fold")
    for number, scene in enumerate(scenes, start=first):
        table.add_row(str(number), Text(safe(scene.title)))
    return table


def scene_view(session: ChatSession) -> RenderableType:
    """The scene and who is in it, as a person may know it."""
    scene = session.scene
    people = Text.assemble(
        ("The model plays ", ""), (safe(session.lead), "bold green"), (". With ", ""),
        (", ".join(map(safe, session.others)), "bold blue"), (".", ""),
    )  # fmt: skip
    return Panel(Group(Text(safe(scene.setting or scene.title)), Text(), people), title=safe(scene.book) or None)


def choice_view(session: ChatSession, texts: Mapping[str, str], unfolded: frozenset[Kind]) -> RenderableType:
    """Texts of one turn side by side, each under its letter."""
    table = Table(expand=True, show_lines=False)
    cells = []
    for letter, text in texts.items():
        table.add_column(letter, ratio=1, overflow="fold")
        cells.append(pieces_text(pieces_of(session.lead, text), unfolded))
    table.add_row(*cells)
    return table
