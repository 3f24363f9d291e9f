"""Seeds of Role-Play Bench, and an endpoint's script that plays all its parts."""

from __future__ import annotations

import json
from pathlib import Path

from scripted_endpoint import Reply

from her_nemo.evaluation.roleplay_bench_views import Seed

SEED = {
    "id": "1",
    "ai_name": "Mara Voss",
    "ai_setting": "Keeper of a lighthouse. Her brother drowned; she has told no one.",
    "user_name": "Tomas",
    "user_setting": "A cartographer stranded by a storm.",
    "ai_prologue": "*sets a second cup on the table* Mainland boots. Of course.",
    "initial_user_input": "May I stay until morning?",
}
ZH = {
    "id": "1",
    "ai_name": "沈砚",
    "ai_setting": "旧书店的店主,三十岁,嘴硬心软。",
    "user_name": "小满",
    "user_setting": "常来躲雨的大学生。",
    "ai_prologue": "*他把伞架往里挪了挪。*又没带伞?",
    "initial_user_input": "老板,今天能不能借我那本《雨夜》?",
}
PLAN, THOUGHT = "zebraplan", "quaggathought"
REPLY = (
    f"<system_thinking>Mara should {PLAN}.</system_thinking>Mara Voss: <role_thinking>I {THOUGHT}."
    "</role_thinking><role_action>pours tea</role_action> Sit down."
)


def write_seeds(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def seed_of(row: dict, language: str = "en") -> Seed:
    return Seed(**row, language=language)


def answer(*flaws: dict) -> str:
    return json.dumps({"flaws": list(flaws)})


def named(kind: str, turns: list, severity: object = 3, quote: str = "Sit down.") -> dict:
    return {"kind": kind, "turns": turns, "severity": severity, "quote": quote, "explanation": "no"}


CONTRADICTION = named("contradiction", [3, 5], 3)
SCRIPT = {
    ("worlds", 3): [CONTRADICTION, named("spatial_error", [5], 4), named("wrong_fact", [5], 5, "not said")],
    ("stories", 7): [named("stagnation", [7, 9], 2)],
    ("preferences", 3): [named("speaks_for_user", [3], 5)],
}


def role_of(request: dict) -> str:
    """Who is asked, told by the prompt alone."""
    if "response_format" in request:
        return request["response_format"]["json_schema"]["name"].removeprefix("flaws_")
    system = request["messages"][0]["content"]
    return "user" if system.startswith(("You are a person who plays", "你是一位正在和")) else "actor"


def chunk_of(request: dict) -> int:
    """The first turn that the judge is asked about."""
    items = request["response_format"]["json_schema"]["schema"]["properties"]["flaws"]["items"]
    return items["properties"]["turns"]["items"]["enum"][0]


def scripted(request: dict, number: int) -> Reply:
    role = role_of(request)
    if role == "actor":
        name = "沈砚" if "沈砚" in request["messages"][0]["content"] else "Mara Voss"
        return Reply(REPLY.replace("Mara Voss:", f"{name}:"))
    if role == "user":
        return Reply(f"*drinks* So tell me number {len(request['messages'])}.")
    return Reply(answer(*SCRIPT.get((role, chunk_of(request)), [])))
