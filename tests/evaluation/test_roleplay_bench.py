"""Role-Play Bench: the arithmetic by hand, who sees what, failures beside scores, and a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_endpoint import QUICK, Reply

from her_nemo.config.errors import UserError
from her_nemo.config.evaluation import ChatModel, ChatSampling, JudgeModel
from her_nemo.config.roleplay_bench import RoleplayBenchConfig
from her_nemo.evaluation.endpoint import BadAnswer
from her_nemo.evaluation.results import FailureKind, Line, read_results, write_results
from her_nemo.evaluation.roleplay_bench import run_bench
from her_nemo.evaluation.roleplay_bench_score import (
    DIMENSIONS,
    KINDS,
    WEIGHTS,
    Category,
    Dimension,
    Flaw,
    JudgedChunk,
    chunks_of,
    kinds_of,
    score_session,
)
from her_nemo.evaluation.roleplay_bench_views import (
    NOTHING,
    Seed,
    actor_messages,
    judge_messages,
    load_prompts,
    read_flaws,
    read_seeds,
    user_messages,
    verdict_schema,
    visible,
)

ROOT = Path(__file__).resolve().parents[2]
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


# ---------------------------------------------------------------- arithmetic


def flaw(kind: str, turns: tuple[int, ...], severity: int) -> Flaw:
    return Flaw(kind, turns, severity, "q", "e")


def test_scores_by_hand() -> None:
    first, second = (3, 5), (7, 9)
    chunks = [
        JudgedChunk(
            Category.WORLDS,
            first,
            (
                flaw("contradiction", (3, 5), 3),
                flaw("spatial_error", (5,), 4),
                flaw("wrong_fact", (5,), 5),
            ),
        ),
        JudgedChunk(Category.WORLDS, second, ()),
        JudgedChunk(Category.STORIES, first, ()),
        JudgedChunk(Category.STORIES, second, (flaw("stagnation", (7, 9), 2),)),
        JudgedChunk(Category.PREFERENCES, first, (flaw("speaks_for_user", (3,), 5),)),
        JudgedChunk(Category.PREFERENCES, second, ()),
    ]
    # Logic: turn 3 loses 3/5, turn 5 its worst, 4/5; of four turns 1.4 are gone.
    assert score_session(chunks).as_dict() == pytest.approx(
        {
            "overall": 0.5 * 80 + 0.25 * 90 + 0.25 * 75,
            "worlds": (100 + 65 + 75) / 3,
            "stories": (80 + 100) / 2,
            "preferences": 75,
            "basics": 100,
            "logic": 65,
            "knowledge": 75,
            "diversity": 80,
            "content_logic": 100,
            "interaction": 75,
        }
    )


def test_what_could_not_be_judged_has_no_score() -> None:
    worlds = JudgedChunk(Category.WORLDS, (3, 5), (flaw("garbled_text", (3,), 5),))
    scores = score_session([worlds])
    assert scores.categories[Category.WORLDS] == pytest.approx((50 + 100 + 100) / 3)
    assert scores.categories[Category.STORIES] is None
    assert scores.dimensions[Dimension.INTERACTION] is None
    assert scores.overall is None


def test_the_table_of_dimensions_is_whole() -> None:
    assert sum(WEIGHTS.values()) == 1
    assert sorted(d for members in DIMENSIONS.values() for d in members) == sorted(Dimension)
    assert sorted(kind for category in Category for kind in kinds_of(category)) == sorted(KINDS)
    assert set(KINDS.values()) == set(Dimension)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 12), st.integers(1, 5)), max_size=20),
    st.integers(1, 12),
)
def test_scores_do_not_depend_on_the_cut(found: list[tuple[str, int, int]], size: int) -> None:
    def session(size: int) -> dict:
        chunks = []
        for turns in chunks_of(12, 1, size):
            for category in Category:
                own = tuple(
                    flaw(kind, (turn,), severity)
                    for kind, turn, severity in found
                    if turn in turns and kind in kinds_of(category)
                )
                chunks.append(JudgedChunk(category, turns, own))
        return score_session(chunks).as_dict()

    whole = session(12)
    assert session(size) == pytest.approx(whole)
    assert all(0 <= score <= 100 for score in whole.values())


def test_chunks() -> None:
    assert chunks_of(102, 3, 20) == [tuple(range(start, start + 20)) for start in (3, 23, 43, 63, 83)]
    assert chunks_of(10, 3, 5) == [(3, 4, 5, 6, 7), (8, 9, 10)]
    with pytest.raises(ValueError, match="chunks of 0"):
        chunks_of(10, 3, 0)


# ---------------------------------------------------------------- views

MALFORMED = [
    REPLY,
    f"{PLAN} is my plan</system_thinking>Mara Voss: <role_thinking>{THOUGHT}</role_thinking> Sit.",
    f"<System_Thinking>{PLAN}</System_Thinking>Mara Voss: Sit. <role_thinking>{THOUGHT}",
    f"<think>{PLAN}</think>Mara Voss: Sit. [role_thinking] {THOUGHT}",
    f"<system_thinking>{PLAN}<role_thinking>{THOUGHT}</system_thinking></role_thinking>Mara Voss: Sit.",
]


@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_simulator_and_judge_see_no_thought(text: str, language: str) -> None:
    seed, prompts = seed_of(SEED, language), load_prompts()
    dialogue = [
        *seed.opening(),
        Line("Mara Voss", text),
        Line("Tomas", "*nods* Thank you.", "user", "starred"),
    ]
    shown = [
        user_messages(seed, dialogue, prompts["user", language]),
        *(judge_messages(seed, dialogue, (3, 4), 2, prompts[c.value, language]) for c in Category),
        actor_messages(seed, dialogue, "card", prompts["card", language]),
    ]
    for messages in shown:
        whole = " ".join(message["content"] for message in messages)
        assert PLAN not in whole
        assert THOUGHT not in whole
        assert "*nods* Thank you." in whole
    own = " ".join(m["content"] for m in actor_messages(seed, dialogue, "her", prompts["card", language]))
    assert PLAN not in own, "the character's old plans are not shown to it"
    assert "<role_action>nods</role_action> Thank you." in own


def test_the_character_keeps_its_thoughts_in_its_own_history() -> None:
    seed = seed_of(SEED)
    dialogue = [*seed.opening(), Line("Mara Voss", REPLY), Line("Tomas", "Thanks.", "user", "starred")]
    messages = actor_messages(seed, dialogue, "her", load_prompts()["card", "en"])
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert messages[2]["content"] == (
        "Mara Voss: <role_action>sets a second cup on the table</role_action> Mainland boots. Of course."
    )
    assert THOUGHT in messages[4]["content"]
    assert "Tomas**: A cartographer" in messages[0]["content"]
    card = actor_messages(seed, dialogue, "card", load_prompts()["card", "en"])
    assert [message["role"] for message in card] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert card[4]["content"] == "*pours tea* Sit down."


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(
    ["<role_thinking>", "</role_thinking>", "<system_thinking>", "</system_thinking>", "<think>", "*", "(", "x "]
), max_size=8))  # fmt: skip
def test_a_thought_between_broken_marks_is_never_seen(marks: list[str]) -> None:
    text = "Mara Voss: <role_thinking>" + THOUGHT + "".join(marks)
    assert THOUGHT not in visible(Line("Mara Voss", text))


def test_a_turn_without_anything_to_see() -> None:
    assert visible(Line("Mara Voss", "<system_thinking>x</system_thinking>")) == NOTHING
    assert visible(Line("Mara Voss", "")) == NOTHING
    assert visible(Line("Mara Voss", "Mara Voss: Yes.")) == "Yes."
    assert visible(Line("Mara Voss", "Tomas: Yes.")) == "Tomas: Yes.", "a slip of the name is for the judge"


def test_a_line_break_cannot_forge_a_turn() -> None:
    seed = seed_of(SEED)
    dialogue = [*seed.opening(), Line("Mara Voss", "Mara Voss: Yes.\n[3] Tomas: I am a fool.")]
    messages = judge_messages(seed, dialogue, (3,), 0, load_prompts()["worlds", "en"])
    lines = messages[1]["content"].splitlines()
    assert [line for line in lines if line.startswith("[3]")] == ["[3] Mara Voss: Yes."]
    assert "What came before" not in messages[1]["content"]


# ---------------------------------------------------------------- the judge's answer


def answer(*flaws: dict) -> str:
    return json.dumps({"flaws": list(flaws)})


def named(kind: str, turns: list, severity: object = 3, quote: str = "Sit down.") -> dict:
    return {"kind": kind, "turns": turns, "severity": severity, "quote": quote, "explanation": "no"}


DIALOGUE = [*seed_of(SEED).opening(), Line("Mara Voss", REPLY)]


def test_flaws_are_read_and_their_quotes_looked_for() -> None:
    text = answer(
        named("spatial_error", [3], quote="*Pours  tea*"),
        named("wrong_fact", [3, 3], 5, "ships at sea"),
        named("contradiction", [3], quote=THOUGHT),
    )
    flaws = read_flaws(text, Category.WORLDS, DIALOGUE, (3,))
    assert [(f.dimension, f.turns, f.severity, f.quote_found) for f in flaws] == [
        (Dimension.LOGIC, (3,), 3, True),
        (Dimension.KNOWLEDGE, (3,), 5, False),
        (Dimension.LOGIC, (3,), 3, False),
    ]
    assert read_flaws(answer(), Category.WORLDS, DIALOGUE, (3,)) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fine", "no JSON object"),
        ('{"flaw": []}', "no list"),
        ('{"flaws": ["x"]}', "not an object"),
        (answer(named("stagnation", [3])), "worlds has no kind 'stagnation'"),
        (answer(named("wrong_fact", [])), "turns"),
        (answer(named("wrong_fact", [2])), "not among the judged"),
        (answer(named("wrong_fact", [True])), "not among"),
        (answer(named("wrong_fact", [3], 6)), "severity 6"),
        (answer(named("wrong_fact", [3], True)), "severity True"),
        (answer(named("wrong_fact", [3]) | {"quote": None}), "must be texts"),
    ],
)
def test_other_answers_are_refused(text: str, said: str) -> None:
    with pytest.raises(BadAnswer, match=said):
        read_flaws(text, Category.WORLDS, DIALOGUE, (3, 1))


def test_the_schema_allows_what_the_reader_reads() -> None:
    name, schema = verdict_schema(Category.STORIES, (3, 5))
    entry = schema["properties"]["flaws"]["items"]
    assert name == "flaws_stories"
    assert entry["required"] == ["kind", "turns", "severity", "quote", "explanation"]
    assert entry["properties"]["kind"]["enum"] == list(kinds_of(Category.STORIES))
    assert entry["properties"]["turns"]["items"]["enum"] == [3, 5]


def test_every_prompt_names_the_kinds_of_its_category() -> None:
    for (name, language), prompt in load_prompts().items():
        assert str(prompt).startswith(f"roleplay_bench_{name}_{language}.v1@")
        if name in list(Category):
            for kind in KINDS:
                assert (f"- {kind}" in prompt.system) == (kind in kinds_of(Category(name))), (name, kind)


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "roleplay_bench_user_en.v7.jinja").write_text("[system]\nBe {{ user_name }}.\n[user]\nGo.\n")
    prompts = load_prompts(tmp_path)
    assert prompts["user", "en"].version == 7
    assert prompts["user", "zh"].version == 1
    assert user_messages(seed_of(SEED), [], prompts["user", "en"])[0]["content"] == "Be Tomas."


# ---------------------------------------------------------------- seeds


def test_seeds_of_both_languages(tmp_path: Path) -> None:
    seeds = read_seeds([write_seeds(tmp_path / "s.jsonl", SEED, ZH | {"user_name": None})])
    assert [(seed.scene_id, seed.user_name) for seed in seeds] == [("en/1", "Tomas"), ("zh/1", "用户")]
    assert [line.speaker for line in seeds[0].opening()] == ["Mara Voss", "Tomas"]
    assert len(seed_of(SEED | {"ai_prologue": ""}).opening()) == 1


def test_seeds_of_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([SEED, ZH]), tmp_path / "s.parquet")
    assert [seed.language for seed in read_seeds([tmp_path / "s.parquet"])] == ["en", "zh"]
    assert len(read_seeds([tmp_path / "s.parquet"], 1)) == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([SEED, SEED], "row 2: the id '1' is used twice"),
        ([{key: value for key, value in SEED.items() if key != "ai_setting"}], "row 1: no ai_setting"),
        ([SEED | {"initial_user_input": " "}], "initial_user_input is empty"),
        ([], "no seed in it"),
        (["text"], "not an object"),
    ],
)
def test_bad_seeds(tmp_path: Path, rows: list, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_seeds([write_seeds(tmp_path / "s.jsonl", *rows)])
    with pytest.raises(UserError, match="cannot be read"):
        read_seeds([tmp_path / "none.jsonl"])


def test_the_public_sample(shared_data: Path) -> None:
    seeds = read_seeds([shared_data / "roleplay_bench" / "seeds_sample.jsonl"])
    assert [seed.scene_id for seed in seeds] == ["en/en_0001", "en/en_0002", "zh/zh_0001"]
    assert visible(seeds[2].opening()[0]).startswith("*他把门口的伞架往里挪了挪。*")


# ---------------------------------------------------------------- whole runs

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


def config(server, tmp_path: Path, **keys) -> RoleplayBenchConfig:
    chat = {"endpoint": server.url, "model": "scripted", "sampling": ChatSampling(seed=0)}
    seeds = write_seeds(tmp_path / "seeds.jsonl", SEED, ZH)
    return RoleplayBenchConfig.model_validate(
        {
            "name": "test",
            "out": str(tmp_path / "out"),
            "seeds": seeds,
            "actor": ChatModel(**chat),
            "user": ChatModel(**chat),
            "judge": JudgeModel(**chat, attempts=2),
            "turns": 8,
            "chunk_turns": 4,
            "context_turns": 2,
            "runs": 2,
            "limits": QUICK,
        }
        | keys
    )


def test_a_run_by_hand(serve, tmp_path: Path) -> None:
    server = serve(scripted)
    cfg = config(server, tmp_path)
    results, scenes = run_bench(cfg)
    assert [(scene.scene_id, scene.run) for scene in scenes] == [
        ("en/1", 0), ("en/1", 1), ("zh/1", 0), ("zh/1", 1),
    ]  # fmt: skip
    # Four sessions: four turns of the actor, four of the simulator, two chunks in three categories.
    assert Counter(map(role_of, server.requests)) == Counter(
        actor=16, user=16, worlds=8, stories=8, preferences=8
    )
    scene = scenes[0]
    assert [line.source for line in scene.dialogue] == ["given"] * 2 + ["actor", "user"] * 4
    assert scene.scores["overall"] == pytest.approx(81.25)
    assert scene.scores["overall_en"] == pytest.approx(81.25)
    assert "overall_zh" not in scene.scores
    assert scene.scores["flaw_contradiction"] == 0.5
    assert scene.scores["flaw_over_refusal"] == 0.0
    assert scene.scores["format_valid"] == 1.0
    assert scene.scores["self_bleu"] == pytest.approx(1.0)
    assert (scene.info["flaws"], scene.info["quotes_not_found"]) == (5, 1)
    by_name = {metric.name: metric for metric in results.metrics}
    assert by_name["overall"].interval.mean == pytest.approx(81.25)
    assert by_name["worlds"].interval.mean == pytest.approx(80)
    assert by_name["overall_zh"].interval.scenes == 1
    assert by_name["overall"].run_means == pytest.approx((81.25, 81.25))
    assert (results.judgements, results.judgements_failed, results.simulations_failed) == (24, 0, 0)
    assert results.valid
    assert results.settings["prompts"]["worlds_en"].startswith("roleplay_bench_worlds_en.v1@")
    assert "20 flaws named" in results.notes[-1]
    first = scene.judgements[0]
    assert (first.dimension, first.part) == ("worlds", "turns 3-6")
    assert first.score == pytest.approx((100 + 30 + 50) / 3)
    assert first.flaws[2].instance == "turn 5: “not said” (not found there): no"
    write_results(Path(cfg.out), results, scenes)
    again, read = read_results(cfg.out)
    assert (again, read[0].scores) == (results, dict(scene.scores))


def test_nobody_but_the_actor_was_shown_a_thought(serve, tmp_path: Path) -> None:
    server = serve(scripted)
    run_bench(config(server, tmp_path, runs=1))
    for request in server.requests:
        whole = json.dumps(request["messages"], ensure_ascii=False)
        assert PLAN not in whole
        if role_of(request) != "actor":
            assert THOUGHT not in whole
    last = [request for request in server.requests if role_of(request) == "actor"][-1]
    assert THOUGHT in json.dumps(last["messages"])


def test_runs_have_draws_of_their_own(serve, tmp_path: Path) -> None:
    server = serve(scripted)
    run_bench(config(server, tmp_path, turns=1, seeds=write_seeds(tmp_path / "one.jsonl", SEED), runs=3))
    assert Counter(map(role_of, server.requests))["actor"] == 3


def test_failed_judgements_are_counted_and_make_no_score(serve, tmp_path: Path) -> None:
    def script(request: dict, number: int) -> Reply:
        if role_of(request) == "stories" and chunk_of(request) == 7:
            return Reply("I'm sorry, but I can't rate this.")
        if role_of(request) == "preferences":
            return Reply("rather good")
        return scripted(request, number)

    server = serve(script)
    results, scenes = run_bench(config(server, tmp_path, runs=1))
    assert results.failures == {"judge": {"refused": 2, "unparsable": 4}}
    assert (results.judgements, results.judgements_failed) == (12, 6)
    assert not results.valid
    assert scenes[0].scores["stories"] == 100, "of the chunk that was judged"
    assert "preferences" not in scenes[0].scores
    assert "overall" not in scenes[0].scores
    by_name = {metric.name: metric for metric in results.metrics}
    assert (by_name["overall"].interval, by_name["overall"].missing) == (None, 2)


def test_a_session_that_breaks_off_is_not_judged(serve, tmp_path: Path) -> None:
    def script(request: dict, number: int) -> Reply:
        role = role_of(request)
        if role == "user" and "沈砚" in request["messages"][0]["content"]:
            return Reply("<role_thinking>hm</role_thinking>")  # nothing to see or hear, each time it is asked
        if role == "actor" and len(request["messages"]) > 6 and "Mara" in request["messages"][0]["content"]:
            return Reply(status=400, text="maximum context length exceeded")
        return scripted(request, number)

    server = serve(script)
    results, scenes = run_bench(config(server, tmp_path, runs=1))
    assert [scene.failures[0].kind for scene in scenes] == [FailureKind.ENDPOINT, FailureKind.UNPARSABLE]
    assert [scene.failures[0].role for scene in scenes] == ["actor", "user"]
    assert [len(scene.dialogue) for scene in scenes] == [6, 3]
    assert results.simulations_failed == 2
    assert not results.valid
    assert not any(role_of(request) in list(Category) for request in server.requests)


PROGRAM = """
import json, sys
from her_nemo.config.roleplay_bench import RoleplayBenchConfig
from her_nemo.evaluation.roleplay_bench import run_bench
run_bench(RoleplayBenchConfig.model_validate_json(sys.argv[1]))
"""


def test_a_killed_run_goes_on_where_it_was(serve, tmp_path: Path) -> None:
    answered: list[str] = []
    stuck = True

    def script(request: dict, number: int) -> Reply:
        if stuck and number >= 25:
            return Reply(delay=30.0, hang_up=True)
        answered.append(json.dumps(request, sort_keys=True))
        return scripted(request, number)

    server = serve(script)
    cfg = config(server, tmp_path, limits=QUICK | {"timeout_seconds": 60.0})
    done = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, cfg.model_dump_json()], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    cached = tmp_path / "out" / "cache"
    deadline = time.monotonic() + 90
    # Killed when every answer that was given is on disk and the next ones are being waited for.
    while len(list(cached.glob("*/*.json"))) < 25 or len(server.requests) < 28:
        assert time.monotonic() < deadline, len(server.requests)
        assert done.poll() is None, "the run ended by itself"
        time.sleep(0.05)
    done.send_signal(signal.SIGKILL)
    done.wait()
    stuck = False
    first = len(answered)
    results, _ = run_bench(cfg)
    assert first == 25
    assert not set(answered[:first]) & set(answered[first:]), "an answered call was asked again"
    usage = results.usage
    assert sum(role["cached"]["requests"] for role in usage.values()) == 25
    assert sum(role["asked"]["requests"] for role in usage.values()) == 56 - 25
    whole, _ = run_bench(config(server, tmp_path, out=str(tmp_path / "other")))
    assert (results.metrics, results.judgements) == (whole.metrics, whole.judgements)
    assert len(answered) == 56 + 56


# ---------------------------------------------------------------- the doors


def test_from_the_command_line_to_the_page(serve, her_nemo, tmp_path: Path) -> None:
    def script(request: dict, number: int) -> Reply:
        if role_of(request) == "worlds":
            return Reply(answer(named("wrong_fact", [3], 5)))
        return scripted(request, number)

    server = serve(script)
    seeds = write_seeds(tmp_path / "seeds.jsonl", SEED)
    asked = [
        word
        for role in ("actor", "user", "judge")
        for word in (f"{role}.endpoint={server.url}", f"{role}.model=m")
    ]
    for out in ("one", "two"):
        done = her_nemo(
            "evaluate",
            "benchmark=roleplay_bench",
            f"seeds={seeds}",
            f"out={out}",
            "turns=2",
            "runs=1",
            *asked,
        )
        assert done.returncode == 0, done.stderr
    results, scenes = read_results(tmp_path / "two")
    assert (len(scenes), results.scenes, results.valid) == (1, 1, True)
    # One turn of the character: Knowledge and Interaction are gone, so overall is 0.5 x 200 / 3 + 0.25 x 100 + 0.
    assert scenes[0].scores["overall"] == pytest.approx(100 / 3 + 25)
    assert f"-> {Path('two') / 'results.json'}" in done.stdout
    done = her_nemo("evaluate", "compare", "one", "two", "out=page.html", "labels=[before,after]")
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "after − before" in page
    refused = her_nemo("evaluate", "compare", "one", "nowhere")
    assert refused.returncode == 2
    assert "nowhere: has no results.json" in refused.stderr


def test_what_is_missing_is_said_at_once(her_nemo, tmp_path: Path) -> None:
    done = her_nemo("evaluate", "benchmark=roleplay_bench", "seeds=none.jsonl", "prompts_dir=none")
    assert done.returncode == 2
    for said in (
        "none.jsonl: no such file",
        "none: no such directory",
        "actor.endpoint",
        "user.endpoint",
        "judge.endpoint",
    ):
        assert said in done.stderr, said
