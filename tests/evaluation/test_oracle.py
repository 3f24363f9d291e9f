"""The oracle: right replies keep everything, each flaw breaks its own principle, nonsense earns nothing."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import her_nemo
from her_nemo.config.errors import UserError
from her_nemo.data.miniature import STANCES, Scene, make_splits, sample_scenes
from her_nemo.data.miniature_flaws import BREAKS, SFT_RATES, Flaw, flawed_reply, sample_flaws
from her_nemo.data.miniature_text import clean_reply
from her_nemo.evaluation.oracle import PRINCIPLES, has_loop, load_scenes, score_reply
from her_nemo.roleplay.turn import parse_turn


def scenes(seed: int, count: int, purpose: str = "oracle") -> list[Scene]:
    train, test = make_splits(seed)
    return [*sample_scenes(seed, purpose, train, count), *sample_scenes(seed, purpose, test, count)]


def broken(scene: Scene, reply: str) -> frozenset[str]:
    return frozenset(name for name, kept in score_reply(scene, reply).principles.items() if not kept)


@pytest.mark.parametrize("seed", range(4))
def test_a_right_reply_keeps_every_principle(seed: int) -> None:
    rng = random.Random(seed)
    for scene in scenes(seed, 400):
        reply = clean_reply(rng, scene).text()
        verdict = score_reply(scene, reply)
        assert verdict.score == 1.0, (reply, verdict)
        assert tuple(verdict.principles) == PRINCIPLES


@pytest.mark.parametrize("flaw", list(Flaw))
def test_each_flaw_breaks_its_own_principles(flaw: Flaw) -> None:
    rng = random.Random(0)
    for scene in scenes(7, 200):
        reply = flawed_reply(rng, scene, [flaw])
        if flaw is Flaw.MALFORMED:
            assert broken(scene, reply) >= BREAKS[flaw], reply
        else:
            assert broken(scene, reply) == BREAKS[flaw], reply


def test_several_flaws_break_all_their_principles() -> None:
    rng = random.Random(0)
    for scene in scenes(8, 400):
        flaws = sample_flaws(rng, dict.fromkeys(Flaw, 0.3) | {Flaw.MALFORMED: 0.0})
        # The wrong action and the off-topic speech of a wrong stance break no more than each does alone.
        expected = frozenset().union(*(BREAKS[flaw] for flaw in flaws))
        assert broken(scene, flawed_reply(rng, scene, flaws)) == expected


def test_sft_replies_score_as_documented() -> None:
    rng = random.Random(0)
    scores = [
        score_reply(s, flawed_reply(rng, s, sample_flaws(rng, SFT_RATES))).score for s in scenes(0, 1500)
    ]
    assert sum(scores) / len(scores) == pytest.approx(0.887, abs=0.012)


def test_only_the_right_stance_is_right() -> None:
    rng = random.Random(0)
    for scene in scenes(9, 40):
        kept = [
            s for s in STANCES if score_reply(scene, clean_reply(rng, scene, stance=s).text()).score == 1.0
        ]
        assert kept == [scene.stance]


NONSENSE = [
    "",
    " ",
    ":",
    "<",
    "</system_thinking>",
    "<system_thinking>",
    "<system_thinking></system_thinking>",
    "<role_thinking><role_action><system_thinking>",
    "The Salt Road. It is a wet day at the inn.",
    "word " * 400,
    "<|im_start|>assistant\n<think></think>",
    "\x00\ufffd\u202e🎭",
]


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_never_crashes_and_earns_nothing(text: str) -> None:
    scene = scenes(0, 1)[0]
    assert score_reply(scene, text).score == 0.0


def test_plain_prose_without_hers_format_earns_next_to_nothing() -> None:
    rng = random.Random(0)
    for scene in scenes(0, 50):
        reply = clean_reply(rng, scene)
        prose = f"{reply.plan} {scene.name} thinks: {reply.thought} {' '.join(reply.speeches())}"
        assert score_reply(scene, prose).score <= 0.25


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_mutilation_of_a_reply_is_scored_without_a_crash(data: st.DataObject) -> None:
    scene = scenes(0, 3)[data.draw(st.integers(0, 5))]
    text = clean_reply(random.Random(0), scene).text()
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    text = text[:start] + data.draw(st.text(max_size=20)) + text[end:]
    verdict = score_reply(scene, text)
    assert 0.0 <= verdict.score <= 1.0
    if not parse_turn(text, expect_name=scene.name).well_formed:
        assert verdict.score < 1.0


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_arbitrary_text_earns_next_to_nothing(text: str) -> None:
    assert score_reply(scenes(0, 1)[0], text).score <= 0.25


def test_a_cut_off_reply_loses_what_is_missing() -> None:
    rng = random.Random(0)
    for scene in scenes(2, 50):
        text = clean_reply(rng, scene).text()
        plan_only = text[: text.index("</system_thinking>") + len("</system_thinking>")]
        lost = broken(scene, plan_only)
        assert lost == frozenset(PRINCIPLES) - {"plan"}
        assert "well_formed" in broken(scene, text[: text.index("</role_thinking>")])


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("Ada Holt: Take the cart. Take the cart.", True),
        ("Ada Holt: cart cart cart", True),
        ("Ada Holt: the cart the cart the cart", True),
        ("Ada Holt: the cart, the cart is here", False),
        ("Ada Holt: Take the cart and take the lamp.", False),
        ("Ada Holt: <role_action>nods and nods and nods and</role_action> Aye.", True),
        ("Ada Holt: <role_thinking>I want the cart</role_thinking> I want the cart", False),
    ],
)
def test_loops(text: str, loops: bool) -> None:
    assert has_loop(parse_turn(text, expect_plan=False)) is loops


def test_secret_may_be_thought_but_not_shown() -> None:
    scene = scenes(0, 1)[0]
    text = clean_reply(random.Random(0), scene).text()
    thought = text.replace("<role_thinking>", f"<role_thinking>My {scene.secret_object} is safe. ")
    assert "secret" not in broken(scene, thought)
    shown = text.replace("<role_action>", f"<role_action>shows the {scene.secret_object} and ")
    assert broken(scene, shown) == {"secret"}


def test_scene_files_are_read_by_trace_id_and_bad_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "scenes.jsonl"
    some = scenes(0, 3, "unique")
    path.write_text("".join(json.dumps(scene.to_json()) + "\n" for scene in some[:3]), encoding="utf-8")
    assert load_scenes(path) == {scene.trace_id: scene for scene in some[:3]}
    with path.open("a", encoding="utf-8") as handle:
        handle.write('{"trace_id": "x"}\n')
    with pytest.raises(UserError, match=r"scenes.jsonl:4"):
        load_scenes(path)
    with pytest.raises(UserError, match="no such file"):
        load_scenes(tmp_path / "missing.jsonl")


def test_no_training_code_reads_the_oracle_or_the_test_facts() -> None:
    package = Path(her_nemo.__file__).parent
    rooms = (
        "rollout",
        "rewards",
        "training",
        "megatron",
        "algorithms",
        "data",
        "planning",
        "config",
        "roleplay",
    )
    training = [path for room in rooms for path in (package / room).rglob("*.py")]
    training += [package / "stages" / f"{stage}.py" for stage in ("sft", "reward", "ppo")]
    for path in training:
        if not path.exists():
            continue
        source = path.read_text(encoding="utf-8")
        imported = {
            name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        }
        assert not [name for name in imported if name.endswith("oracle")], path
        assert "test_scenes" not in source or path.name == "miniature_files.py", path
