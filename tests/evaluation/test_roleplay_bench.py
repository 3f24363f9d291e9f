"""Role-Play Bench: the arithmetic by hand, who sees what, failures beside scores, and a run that is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roleplay_bench_script import PLAN, REPLY, SEED, THOUGHT, ZH, answer, named, seed_of, write_seeds

from her_nemo.config.errors import UserError
from her_nemo.evaluation.endpoint import BadAnswer
from her_nemo.evaluation.results import Line
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
    actor_messages,
    judge_messages,
    load_prompts,
    read_flaws,
    read_seeds,
    user_messages,
    verdict_schema,
    visible,
)

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
