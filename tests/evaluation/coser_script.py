"""A scripted cast for CoSER's benchmark: one server that plays every role and a judge with fixed flaws."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripted_endpoint import Reply

# Severities of the judge, by dimension.
FLAWS: Mapping[str, Sequence[Any]] = {
    "Storyline Consistency": [5, 4, 3, 2],
    "Anthropomorphism": [],
    "Character Fidelity": [1, 2],
    "Storyline Quality": [5] * 6,
}
HER_REPLY = (
    "<system_thinking>A plan.</system_thinking>{name}: <role_thinking>Secret {name}.</role_thinking>Line {n}."
)
COSER_REPLY = "{name}: [Secret {name}.] (nods) Line {n}."


def role_of(request: Mapping[str, Any]) -> str:
    """Who is asked, from the system prompt."""
    system = request["messages"][0]["content"]
    for start, role in (
        ("You review scenes", "judge"),
        ("You are the Environment", "environment"),
        ("You direct a role-play", "next_speaker"),
    ):
        if system.startswith(start):
            return role
    return "actor"


def text_of(request: Mapping[str, Any]) -> str:
    return "\n".join(message["content"] for message in request["messages"])


def dimension_of(request: Mapping[str, Any]) -> str:
    found = re.search(r"in one respect only: (.+)\.", request["messages"][0]["content"])
    assert found is not None
    return found.group(1)


def judgement(dimension: str, severities: Sequence[Any]) -> str:
    flaws = [{"instance": f"place {i}", "type": "some type", "severity": s} for i, s in enumerate(severities)]
    return json.dumps({dimension: {"flaws": flaws}})


def cast(
    *,
    order: Sequence[str] = (),
    reply: str = HER_REPLY,
    flaws: Mapping[str, Sequence[Any]] = FLAWS,
    end_after: int = 7,
    judge: Callable[[Mapping[str, Any]], Reply] | None = None,
    delay: float = 0.0,
) -> Callable[[dict[str, Any], int], Reply]:
    """A script.

    Args:
        order: the speakers that the next-speaker model names in turn, over and over; those of its list if none.
        reply: what an actor says, with {name} and {n}, the number of messages before it.
        end_after: the next-speaker model ends the scene after so many messages.
        judge: answers in the judge's place.
    """

    def turns(request: Mapping[str, Any]) -> int:
        """Predictions so far: one a message."""
        return sum(message["role"] == "assistant" for message in request["messages"])

    def script(request: dict[str, Any], number: int) -> Reply:
        role = role_of(request)
        if role == "judge":
            if judge is not None:
                return judge(request)
            dimension = dimension_of(request)
            return Reply(judgement(dimension, flaws[dimension]), delay=delay)
        if role == "next_speaker":
            said = turns(request) + 1
            listed = re.search(r"Choose one of: (.+?)\. The Environment", request["messages"][0]["content"])
            assert listed is not None
            names = order or listed.group(1).split(", ")
            name = "<END CHAT>" if said >= end_after else names[said % len(names)]
            return Reply(f"They would go on.\nNext Speaker: {name}", delay=delay)
        if role == "environment":
            return Reply("Thunder rolls.", delay=delay)
        found = re.match(r"You are (.+?) from ", request["messages"][0]["content"])
        assert found is not None
        heard = text_of(request)
        count = len(set(re.findall(r"Line \d+", heard))) + heard.count("Thunder rolls")
        return Reply(reply.format(name=found.group(1), n=count), delay=delay)

    return script


def scene(**changed: Any) -> dict[str, Any]:
    """A scene of CoSER's test set, small enough to count by hand."""
    return {
        "book": "The Tale",
        "i_p": 3,
        "i_c": 1,
        "scenario": "A hall at night.",
        "topic": "A quarrel",
        "tag": "id",
        "key_characters": [
            {"name": "Ann", "motivation": "Ann wants the letter."},
            {"name": "Bob", "motivation": "Bob hides the letter."},
        ],
        "major_characters": ["Ann", "Bob"],
        "speaking_characters_w_env": ["Ann", "Bob", "Environment"],
        "character_profiles": {"Ann": "Ann is proud.", "Bob": "Bob is sly."},
        "plot": {
            "i_p": 3,
            "summary": "They quarrel over a letter.",
            "key_characters": [{"name": "Ann", "description": "A lady.", "experience": "x"}],
        },
        "dialogues": [
            {"character": "Bob", "message": "[She knows.] (bows) Good evening."},
            {"character": "Ann", "message": "Where is my letter?"},
            {"character": "Environment", "message": "A door slams [far off]."},
            {"character": "Bob", "message": "[I burnt it.] I have no letter."},
        ],
    } | changed


def write_scenes(path: Path, *scenes: dict[str, Any]) -> Path:
    path.write_text(json.dumps(list(scenes)), encoding="utf-8")
    return path
