"""What was played as rows to train on: one sample for each turn of the lead, and preference pairs.

A sample row is HER's single-turn row: `her-nemo sft` reads it as it is, and so does `her-nemo data ingest`. A pair row
is what `her-nemo reward` reads.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.chat.session import Author, ChatSession, checked, problem_of
from her_nemo.config.errors import UserError
from her_nemo.data.records import Pair, Sample
from her_nemo.roleplay.turn import parse_turn

SOURCE = "chat"
SAMPLES_FILE = "samples.jsonl"
PAIRS_FILE = "pairs.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True)
class LeftOut:
    """A turn of the lead of which no sample was made, and why."""

    turn: int
    reason: str


def sample_rows(session: ChatSession) -> tuple[list[Row], list[LeftOut]]:
    """A row for each turn of the lead that was played here, in order; the scene's own turns are context only.

    Left out are turns that were cut off and turns that do not parse cleanly: a model learns what it is shown.
    """
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    for number, turn in enumerate(session.turns):
        if not session.is_lead(turn.speaker) or turn.candidate.author is Author.SCENE:
            continue
        problem = problem_of(session, turn)
        if problem:
            left_out.append(LeftOut(number, problem))
            continue
        # Counted over the whole conversation, so that a turn keeps its name when an earlier one is mended.
        mine = sum(session.is_lead(earlier.speaker) for earlier in session.turns[:number])
        prompt = session.prompt_for(session.lead, number)
        sample = Sample(
            trace_id=f"{_original(session)}_turn_{mine}",
            original_trace_id=_original(session),
            turn_index=mine,
            history_turns=sum(message["role"] == "assistant" for message in prompt),
            messages=(*prompt, {"role": "assistant", "content": turn.text}),
            character=session.lead,
            book=session.scene.book,
            conversation_id=_conversation(session),
            source=SOURCE,
            has_plan=bool(parse_turn(turn.text, expect_plan=False, expect_name=session.lead).plan),
        )
        rows.append(sample.to_row() | {"written_by": turn.candidate.author.value})
    return rows, left_out


def pair_row(session: ChatSession, number: int, chosen: int, rejected: int) -> Row:
    """Two texts of one turn of the lead, the better one first, with the prompt they answer.

    Raises:
        UserError: it is not the lead's turn, the texts are the same or cut off, or the prompt ends with his own turn.
    """
    turn = session.turn(number)
    if not session.is_lead(turn.speaker):
        raise UserError(f"turn {number + 1} is {turn.speaker}'s: pairs are made of {session.lead}'s turns")
    for index in (chosen, rejected):
        if not 0 <= index < len(turn.candidates):
            raise UserError(f"turn {number + 1} has {len(turn.candidates)} texts, none is number {index + 1}")
        if not turn.candidates[index].finished:
            raise UserError("one of the two was cut off before its end: let it be written anew, or raise max_tokens")
        checked(turn.candidates[index].text)
    better, worse = turn.candidates[chosen].text, turn.candidates[rejected].text
    if better == worse:
        raise UserError("the two texts are the same")
    prompt = session.prompt_for(session.lead, number)
    if prompt[-1]["role"] != "user":
        raise UserError(f"{session.lead} spoke last before this turn: a pair has to answer somebody else")
    mine = sum(session.is_lead(earlier.speaker) for earlier in session.turns[:number])
    pair = Pair(
        trace_id=f"{_original(session)}_turn_{mine}_pair_{chosen}_{rejected}",
        messages=tuple(prompt),
        chosen=better,
        rejected=worse,
        source=SOURCE,
        conversation_id=_conversation(session),
    )
    authors = (turn.candidates[chosen].author.value, turn.candidates[rejected].author.value)
    return pair.to_row() | {"character": session.lead, "chosen_by": authors[0], "rejected_by": authors[1]}


def _conversation(session: ChatSession) -> str:
    return f"{SOURCE}_{session.scene.scene_id}_{session.session_id}"


def _original(session: ChatSession) -> str:
    return f"{_conversation(session)}_{session.lead}"


# ---------------------------------------------------------------- files


class RowFiles:
    """samples.jsonl and pairs.jsonl of a directory. A conversation that is written again replaces what it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = folder / SAMPLES_FILE
        self.pairs = folder / PAIRS_FILE

    def write_samples(self, session: ChatSession) -> tuple[int, list[LeftOut]]:
        """Every sample of a conversation, in place of those it had. Returns how many, and what was left out.

        Raises:
            UserError: the file cannot be written, or there is nothing to write.
        """
        rows, left_out = sample_rows(session)
        if not rows:
            said = "".join(f"; turn {item.turn + 1}: {item.reason}" for item in left_out)
            raise UserError(f"no turn of {session.lead}'s to train on{said}")
        name = _original(session)
        self._write(self.samples, rows, lambda row: row.get("original_trace_id") == name)
        return len(rows), left_out

    def write_pair(self, row: Row) -> int:
        """One more pair, in place of the same one judged before, either way. Returns how many there are.

        Raises:
            UserError: the file cannot be written.
        """
        texts, prompt = {row["chosen"], row["rejected"]}, list(row["messages"])

        def same(old: Row) -> bool:
            return old.get("messages") == prompt and {old.get("chosen"), old.get("rejected")} == texts

        return self._write(self.pairs, [row], same)

    def _write(self, path: Path, rows: Sequence[Row], replaced: Callable[[Row], bool]) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                kept = [row for row in self._rows(path) if not replaced(row)]
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in (*kept, *rows)]
                scratch = path.with_name(f".{path.name}.partial")
                scratch.write_text("".join(lines), encoding="utf-8")
                os.replace(scratch, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        return len(lines)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time: two chats may share a directory."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @staticmethod
    def _rows(path: Path) -> list[Row]:
        """The rows that are there. A line that is no JSON object would be lost: it stops the writing."""
        if not path.exists():
            return []
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error.msg}; mend it, or give another out=DIR") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object; mend it, or give another out=DIR")
            rows.append(row)
        return rows
