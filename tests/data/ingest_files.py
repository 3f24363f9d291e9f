"""Small files in every format that ingest reads, and running it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from her_nemo.config import compose
from her_nemo.config.data import IngestConfig
from her_nemo.data.ingest import ingest
from her_nemo.data.records import read_parquet

THOUGHTS = ("the letter is forged", "he must not see it", "my son deceives me")


def write(path: Path, value: Any) -> Path:
    """JSON, or JSON lines when the name ends so (text and bytes are written as they are)."""
    if path.suffix != ".jsonl":
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        return path
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=True).encode() for row in value]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def dialogue(*lines: tuple[str, str]) -> list[dict[str, str]]:
    return [{"character": who, "message": what} for who, what in lines]


LINES = (
    ("Environment", "A cold hall in Gloucester\u2019s castle, with the wind at the shutters."),
    ("Edmund", f"[{THOUGHTS[0]}] (hides a paper) So please your lordship, none."),
    ("Gloucester", f"[{THOUGHTS[2]}] Why so earnestly seek you to put up that letter, my boy?"),
    ("Edmund", f"I know no news, [sic] my lord. [{THOUGHTS[1]}]"),
    ("Servant", "My lord, supper waits."),
)


def book(*conversations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A CoSER book with a plot for each conversation."""
    return {
        "plots": [
            {
                "text": f"passage {index}",
                "summary": f"summary {index}",
                "chapter": f"Scene {index}",
                "key_characters": [{"name": "Edmund", "description": "The bastard son."}],
                "conversation": [conversation],
                "i_chunk": 0,
                "state": "finished",
            }
            for index, conversation in enumerate(conversations or (conversation(),))
        ],
        "character_datasets": {
            "Edmund": {"profile": "Edmund schemes."},
            "Gloucester": {"profile": "Gloucester believes."},
            "Servant": {"profile": "A servant of the house."},
        },
        **changes,
    }


def conversation(**changes: Any) -> dict[str, Any]:
    return {
        "scenario": "Night.",
        "topic": "A letter",
        "key_characters": [
            {"name": "Edmund", "motivation": "Edmund wants the land."},
            {"name": "Gloucester", "thought": "Gloucester wants peace."},
        ],
        "dialogues": dialogue(*LINES),
        **changes,
    }


def other_conversation(number: int) -> dict[str, Any]:
    """A conversation that shares no passage with another number's."""
    return conversation(
        dialogues=dialogue(
            ("Edmund", f"[wait] This is number {number} of the long speeches I mean to make tonight, number {number}."),
            ("Gloucester", f"And this is my own answer to all that you said in speech number {number}, dear boy."),
        )
    )


ENHANCED = "<role_action>bows</role_action><role_thinking>wait for it</role_thinking> Hail."


def full_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of HER's full dataset."""
    dialogues = [
        {
            "character": "Edmund",
            "message": "[wait] (bows) Good evening.",
            "standard_format": "<role_thinking>wait</role_thinking> <role_action>bows</role_action> Good evening.",
            "enhanced_standard_format": ENHANCED,
            "enhanced_speech": "<role_thinking>older</role_thinking> Good evening.",
            "sys_thinking": "Edmund should first be polite.",
            "sys_thinking_revised": "Edmund is polite at first.",
        },
        {
            "character": "Gloucester",
            "message": "[odd] Well met.",
            "enhanced_standard_format": "<role_thinking>odd</role_thinking> Well met.",
            "sys_thinking": "Gloucester answers kindly.",
        },
        {"character": "Environment", "message": "Thunder.", "sys_thinking": "not a plan of anyone"},
    ]
    return {
        "trace_id": f"King Lear_Act one_{number}_0_0",
        "book_name": "King Lear",
        "plot_index": number,
        "conv_index": 0,
        "chapter": "Act one",
        "summary": "A summary.",
        "text": "The passage.",
        "conversation": [{"scenario": "Night.", "topic": "t", "key_characters": [], "dialogues": dialogues, "i_c": 0}],
        "character_datasets": {
            "Edmund": {
                "book_name": "King Lear",
                "character_profile": "short",
                "character_profile_enriched": "Edmund, in full.",
                "background": "Before the storm.",
                "motivation": "land",
                "other_character_profiles": {"Gloucester": "An earl."},
            },
            "Gloucester": {"character_profile": "Gloucester, in full.", "motivation": "peace"},
        },
        "training_samples": {"Edmund": [{"role": "system", "content": "x"}]},
        **changes,
    }


SYSTEM = "You are Edmund from King Lear.\n\n===Edmund's Profile===\nEdmund schemes.\n\n===Requirements===\nPlan first."
PLAN = "<system_thinking>Edmund lies.</system_thinking>"
REPLY = "Edmund: <role_thinking>lie</role_thinking> None, my lord."


def messages(*contents: str, system: str | None = SYSTEM) -> list[dict[str, str]]:
    """User and assistant by turns, the user first, after the system prompt."""
    turns = [
        {"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


def single_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of HER's sft_single_turn."""
    original = "King Lear_Act one_0_0_0_Edmund"
    return {
        "trace_id": f"{original}_turn_{number}",
        "original_trace_id": original,
        "turn_index": number,
        "history_turns": 1,
        "messages": messages(
            "===Conversation Start===\n\nGloucester: What news?", REPLY, "Gloucester: Well?", PLAN + REPLY
        ),
        **changes,
    }


def run(path: Path | list[Path], out: Path, **keys: Any) -> dict[str, Any]:
    """Ingest with these keys; returns the card."""
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    overrides = tuple(f"{key}={value}" for key, value in keys.items())
    return ingest(_config(overrides).model_copy(update={"path": paths, "out": str(out)}))


@cache
def _config(overrides: tuple[str, ...]) -> IngestConfig:
    cfg = compose.load("data_ingest", ["path=x", "out=x", *overrides])
    assert isinstance(cfg, IngestConfig)
    return cfg


def rows(out: Path, name: str = "samples") -> list[dict[str, Any]]:
    """The rows of one of the Parquet files."""
    return list(read_parquet(out / f"{name}.parquet"))


def quarantined(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
