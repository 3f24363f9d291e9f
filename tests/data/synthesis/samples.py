"""Conversations to synthesise from, and a stand-in for a good language model that reads the prompt as one would."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from her_nemo.data.records import Character, Conversation, ConversationTurn, write_conversations
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.turn import parse_turn

_LINE = re.compile(r"^\[(\d+)\]( \(not to be edited\))? (.+?): (.*)$", re.MULTILINE)


def her(text: str) -> str:
    """CoSER's marks as HER's tags; enough for these plays."""
    text = re.sub(r"\[(.*?)\]", r"<role_thinking>\1</role_thinking>", text)
    return re.sub(r"\((.*?)\)", r"<role_action>\1</role_action>", text)


def from_coser(file: Path, plots: tuple[int, ...]) -> list[Conversation]:
    """Some plots of a CoSER book."""
    book = json.loads(file.read_text(encoding="utf-8"))
    profiles = {name: entry["profile"] for name, entry in book["character_datasets"].items()}
    return [
        Conversation(
            conversation_id=f"{file.stem}_{p}_{c}",
            source="coser",
            book=file.stem,
            plot_index=p,
            conversation_index=c,
            scenario=conversation["scenario"],
            topic=conversation["topic"],
            background=book["plots"][p]["summary"],
            characters=tuple(
                Character(who["name"], profiles.get(who["name"], ""), who.get("motivation", ""))
                for who in conversation["key_characters"]
            ),
            turns=tuple(
                ConversationTurn(turn["character"], her(turn["message"]))
                for turn in conversation["dialogues"]
            ),
            source_text=book["plots"][p]["text"],
        )
        for p in plots
        for c, conversation in enumerate(book["plots"][p]["conversation"])
    ]


def small(plot: int = 0, turns: int = 6) -> Conversation:
    """A short conversation of two neighbours."""
    said = [
        ("Ada", "The well is dry again, Ben. Someone has moved the stone."),
        (
            "Ben",
            "<role_thinking>I moved it.</role_thinking> <role_action>looks away</role_action> Not I, Ada.",
        ),
        (
            "Ada",
            "<role_action>kneels by the well</role_action> There are fresh marks of a \u201clever\u201d here.",
        ),
        ("Ben", "Then it was the miller\u2019s boy, who else would dare to do it?"),
        ("Ada", "We shall ask him tonight, you and I together."),
        ("Ben", "<role_action>nods slowly</role_action> Tonight, then."),
    ]
    return Conversation(
        conversation_id=f"well_{plot}",
        source="test",
        book="The Well",
        plot_index=plot,
        conversation_index=0,
        scenario="A village well at dusk.",
        topic="Who moved the stone?",
        background=f"The well of village {plot} has been tampered with.",
        characters=(
            Character("Ada", "Ada keeps the village's well and trusts her eyes.", "She wants the truth."),
            Character("Ben", "Ben is her neighbour, a carpenter.", "He wants to hide what he did."),
        ),
        turns=(
            ConversationTurn("Environment", "Dusk falls over the square."),
            *(ConversationTurn(*turn) for turn in said[:turns]),
        ),
        source_text=(
            "Ada had kept the well since her mother died. She read marks in stone as others read letters, for her "
            "father had been a mason. Ben had borrowed a lever from the smith that very morning. Nobody saw him."
        ),
    )


def write(path: Path, conversations: list[Conversation]) -> Path:
    write_conversations(path, conversations)
    return path


def thoughtful(request: dict[str, Any]) -> dict[str, Any]:
    """A good answer to the role_thinking prompt of a request: thoughts in ever other places, all else copied."""
    turns = []
    for count, found in enumerate(m for m in _LINE.finditer(request["messages"][1]["content"]) if not m[2]):
        number, speaker, text = int(found[1]), found[3], found[4]
        turns.append({"turn": number, "parts": edited(count, number, speaker, text)})
    return {"turns": turns}


def edited(count: int, number: int, speaker: str, text: str) -> list[dict[str, str]]:
    turn = parse_turn(text, expect_plan=False)
    shown = [(s.kind, s.text.strip()) for s in turn.segments if not s.kind.private and not s.blank]
    fewest = sum(s.kind is Kind.ROLE_THINKING for s in turn.segments)
    halves: list[tuple[Kind, str]] = []
    for kind, body in shown:  # the first long speech is cut in two
        words = body.split(" ")
        if kind is Kind.SPEECH and len(words) > 1 and len(halves) == len(shown[: len(halves)]):
            halves += [(kind, " ".join(words[: len(words) // 2])), (kind, " ".join(words[len(words) // 2 :]))]
        else:
            halves.append((kind, body))
    middle = next((i for i in range(1, len(halves)) if halves[i][0] is halves[i - 1][0]), len(halves))
    thought = (
        Kind.ROLE_THINKING,
        f"I keep my own counsel at step {number}, and I weigh each word before I speak it.",
    )
    places = [(0,), (len(halves),), (middle,), (0, len(halves)), (0, middle)][count % 5]
    places = places if len(places) >= fewest else tuple(range(fewest))
    parts: list[tuple[Kind, str]] = []
    for index in range(len(halves) + 1):
        if index in places:
            parts.append(thought)
        parts += halves[index : index + 1]
    return [{"kind": kind.value, "text": body} for kind, body in parts]


def plan(name: str, number: int) -> str:
    """A plan of about 900 characters that quotes nothing."""
    sentences = [
        f"Before move {number} {name} takes stock of the room and of who is listening.",
        f"{name} has more to lose than it seems and would rather be thought slow than be caught out.",
        "Two ways lie open: to press on at once, or to give ground and let the other party show its hand.",
        f"Pressing on would suit a bolder temper; {name} has always gained more by patience.",
    ]
    text = " ".join(sentences)
    while len(text) < 820:
        text += f" What counts most for {name} at stage {number} is measure number {len(text)}."
    return text


def good(request: dict[str, Any]) -> dict[str, Any]:
    """A good answer to any prompt of ours, told apart by the schema that is asked for."""
    user, system = request["messages"][1]["content"], request["messages"][0]["content"]
    kind = request["response_format"]["json_schema"]["name"]
    if kind == "RoleThinkingAnswer":
        return thoughtful(request)
    if kind == "ForwardAnswer":
        name = re.search(r"You are (.+?) from ", system)[1]
        return {"reasoning": plan(name, 1), "reply": f"{name}: Very well."}
    if kind == "RewriteAnswer":
        name = re.match(r"(.+) from ", user)[1]
        numbers = [int(n) for n in re.findall(r"^\[(\d+)\] Raw plan", user, re.MULTILINE)]
        actions = [{"action": "keep", "plan": ""}, {"action": "write"}]
        entries = [{"turn": n, "plan": plan(name, n), **actions[i % 2]} for i, n in enumerate(numbers)]
        return {"plans": entries}
    if kind == "GapsAnswer":
        number = int(re.search(r"^\[(\d+)\]", user, re.MULTILINE)[1])
        return {
            "gaps": [{"turn": number, "behaviour": "Reads the stone.", "question": "stone, mason, marks?"}]
        }
    if kind == "LookupAnswer":
        name = re.match(r"(.+) from ", user)[1]
        evidence = " ".join(user.split("Passages")[1].split()[:8])
        text = f"{name} grew up around craftsmen and can tell how a thing was done by looking at it."
        return {"additions": [{"gap": 1, "found": True, "text": text, "evidence": evidence}]}
    raise AssertionError(f"no answer for {kind}")
