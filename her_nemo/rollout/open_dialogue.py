"""From `model.ppo.dialogue.*` to `Dialogues`: where every prompt's conversation begins, and with whom.

All starts are read and checked before the first step, so that none of them stops a run later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.config.schema import PpoConfig
from her_nemo.data.sources import read_rows
from her_nemo.data.tokenise import Prompt, Tokeniser
from her_nemo.roleplay.dialogue import Start, read_start
from her_nemo.roleplay.prompt import CONVERSATION_START
from her_nemo.rollout.dialogue import Dialogues
from her_nemo.rollout.simulator import ScriptSimulator, ServedSimulator, Simulator

SHOWN = 20  # problems written out in an error
_NAMES = 32  # tokens kept free for the name before a turn and the control tokens around it


@dataclass(frozen=True)
class Scene:
    """What `dialogue.scenes` tells of one prompt; null or empty where it leaves that to the prompt."""

    partner: str | None = None
    system: str | None = None
    lines: tuple[str, ...] = ()


def open_dialogues(
    cfg: PpoConfig, tokeniser: Tokeniser, train: Sequence[Prompt], held_out: Sequence[Prompt]
) -> Dialogues | None:
    """The conversations of a run; None where every prompt has a single reply.

    Args:
        train, held_out: the encoded prompts of the run.

    Raises:
        UserError: prompts that no conversation can begin from, all in one error; a scenes file that cannot be read.
    """
    dialogue, model = cfg.model.ppo.dialogue, cfg.model
    if not dialogue.on:
        return None
    section = dialogue.simulator
    room = model.encoder_seq_length - model.ppo.length_params.max_length
    scenes = read_scenes(dialogue.scenes)
    files = [(model.data.train_ds.file_path, train), (model.data.validation_ds.file_path, held_out)]
    starts: dict[str, Start] = {}
    problems: list[str] = []
    for path, prompts in files:
        if path is None or not len(prompts):
            continue
        wanted = {prompt.trace_id for prompt in prompts}
        rows, _ = read_rows(path, "prompts", model.data.skip_malformed)
        for row in rows:
            if row["trace_id"] not in wanted:
                continue
            try:
                start = _start(row, scenes, starts)
                _check(start, tokeniser, dialogue.turns - 1, section.kind == "script", room - section.max_tokens)
            except ValueError as problem:
                problems.append(f"{path}: {row['trace_id']}: {problem}")
            else:
                starts[start.trace_id] = start
    if problems:
        more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(
            f"{len(problems)} prompts that no conversation can begin from:\n  " + "\n  ".join(problems[:SHOWN]) + more
        )
    simulator: Simulator = ScriptSimulator() if section.kind == "script" else ServedSimulator(section)
    return Dialogues(
        starts, simulator, tokeniser, turns=dialogue.turns, room=room, simulator_tokens=section.max_tokens,
        attempts=1 if section.kind == "script" else section.attempts,
    )  # fmt: skip


def _start(row: Mapping[str, Any], scenes: Mapping[str, Scene], starts: Mapping[str, Start]) -> Start:
    if row["trace_id"] in starts:
        raise ValueError("a second prompt with this trace_id; conversations are found by it")
    scene = scenes.get(row["trace_id"], Scene())
    return read_start(
        row["trace_id"], row["messages"], partner=scene.partner, system=scene.system, lines=scene.lines
    )


def _check(start: Start, tokeniser: Tokeniser, answers: int, scripted: bool, room: int) -> None:
    """Raises ValueError where a later turn could not be had. `room`: tokens of a prompt without the last message."""
    if scripted and len(start.lines) < answers:
        raise ValueError(f"{len(start.lines)} lines in model.ppo.dialogue.scenes, and {answers} are needed")
    head = {"role": "system", "content": start.messages[0]["content"] + CONVERSATION_START}
    # No text has more tokens than bytes, which spares most prompts from being encoded.
    if len(head["content"].encode()) + _NAMES > room:
        needed = tokeniser.joined_prompt_length([head]) + _NAMES
        if needed > room:
            raise ValueError(
                f"the system prompt takes {needed} tokens, and {room} are left beside a reply and a turn of the "
                "simulator: raise model.encoder_seq_length"
            )


def read_scenes(paths: Iterable[str]) -> dict[str, Scene]:
    """The scenes of JSON-lines files, by trace id.

    Raises:
        UserError: names file and line.
    """
    scenes: dict[str, Scene] = {}
    for path in paths:
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            try:
                trace_id, scene = _scene(json.loads(line))
                if trace_id in scenes:
                    raise ValueError(f"a second scene for {trace_id!r}")
            except ValueError as problem:
                raise UserError(f"{path}:{number}: not a scene: {problem}") from problem
            scenes[trace_id] = scene
    return scenes


def _lines(path: str) -> Iterator[str]:
    try:
        with Path(path).open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read scenes {path}: {error}") from error


def _scene(row: Any) -> tuple[str, Scene]:
    if not isinstance(row, dict) or not isinstance(row.get("trace_id"), str):
        raise ValueError("it has no trace_id")
    unknown = set(row) - {"trace_id", "partner", "system", "lines"}
    if unknown:
        raise ValueError(f"unknown keys {', '.join(sorted(unknown))}; known are trace_id, partner, system, lines")
    for key in ("partner", "system"):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{key} is not text")
    lines = row.get("lines") or []
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("lines is not a list of texts")
    return row["trace_id"], Scene(row.get("partner"), row.get("system"), tuple(lines))
