"""The miniature world's generator: deterministic, closed, split as documented, flawed at the stated rates."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from her_nemo.data.miniature import (
    INTENTS,
    MOOD_OF,
    MOODS,
    OBJECTS,
    RELATIONS,
    STANCE_OF,
    STANCES,
    TEMPERAMENTS,
    Scene,
    make_splits,
    sample_scenes,
)
from her_nemo.data.miniature_files import LABEL_NOISE, WorldSizes, WorldSummary, _pair_rows, write_world
from her_nemo.data.miniature_flaws import (
    EXTRA_FLAWS,
    PAIR_WEIGHTS,
    SFT_RATES,
    Flaw,
    sample_flaws,
    sample_pair_flaws,
)
from her_nemo.data.miniature_text import MESSAGES, PARTNER_LINES, PATTERNS, prompt_messages
from her_nemo.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from her_nemo.roleplay.prompt import CHAT_TEMPLATE, CONVERSATION_START, RolePrompt
from her_nemo.roleplay.turn import Kind, parse_turn

SMALL = WorldSizes(
    pretrain=600, sft_train=400, sft_val=20, pairs_train=300, pairs_val=60, prompts_train=60, prompts_test=60
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WorldSummary]:
    out = tmp_path_factory.mktemp("world")
    return out, write_world(out, seed=0, sizes=SMALL)


@pytest.fixture(scope="module")
def tokenizer(world: tuple[Path, WorldSummary]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(world[0] / "tokenizer"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_gives_the_same_bytes_and_another_seed_another_world(
    world: tuple[Path, WorldSummary], tmp_path: Path
) -> None:
    again = write_world(tmp_path / "again", seed=0, sizes=SMALL)
    assert again == world[1]
    assert all_bytes(tmp_path / "again") == all_bytes(world[0])
    write_world(tmp_path / "other", seed=1, sizes=SMALL)
    first, other = all_bytes(world[0]), all_bytes(tmp_path / "other")
    for name in ("sft_train.jsonl", "pairs_train.jsonl", "prompts_test.jsonl", "pretrain.jsonl"):
        assert first[name] != other[name]


def test_row_counts_are_as_asked(world: tuple[Path, WorldSummary]) -> None:
    out, summary = world
    for name, count in summary.rows.items():
        assert len(read(out / name)) == count
    assert (
        summary.rows["prompts_test.jsonl"] == SMALL.prompts_test == summary.rows["oracle/test_scenes.jsonl"]
    )


def test_the_rule_is_total_and_uses_every_mood_and_stance() -> None:
    assert set(MOOD_OF) == {(t, r) for t in TEMPERAMENTS for r in RELATIONS}
    assert set(STANCE_OF) == {(m, i) for m in MOODS for i in INTENTS}
    assert set(MOOD_OF.values()) == set(MOODS)
    assert set(STANCE_OF.values()) == set(STANCES)


@pytest.mark.parametrize("seed", range(5))
def test_splits_hold_out_names_and_triples_but_no_word_and_no_pair(seed: int) -> None:
    train, test = make_splits(seed)
    assert not set(train.names) & set(test.names)
    assert not set(train.triples) & set(test.triples)
    assert len(train.triples) + len(test.triples) == len(TEMPERAMENTS) * len(RELATIONS) * len(INTENTS)
    for part in (0, 1):
        assert {name.split()[part] for name in test.names} <= {name.split()[part] for name in train.names}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pairs = Counter((triple[i], triple[j]) for triple in train.triples)
        assert {(t[i], t[j]) for t in test.triples} <= set(pairs)
        assert min(pairs.values()) >= 4
    assert {STANCE_OF[MOOD_OF[t, r], i] for t, r, i in train.triples} == set(STANCES)


def test_test_characters_appear_in_no_training_file(world: tuple[Path, WorldSummary]) -> None:
    out, _ = world
    test_names = {
        name for scene in read(out / "oracle/test_scenes.jsonl") for name in (scene["name"], scene["speaker"])
    }
    for name in (
        "pretrain.jsonl",
        "sft_train.jsonl",
        "sft_val.jsonl",
        "pairs_train.jsonl",
        "prompts_train.jsonl",
        "partners_train.jsonl",
    ):
        text = (out / name).read_text(encoding="utf-8")
        assert not [character for character in test_names if character in text]


def test_training_scenes_answer_no_held_out_triple_even_in_their_history() -> None:
    train, test = make_splits(3)
    for scene in sample_scenes(3, "any", train, 1500):
        asked = [(scene.relation, scene.intent), *((e.relation, e.intent) for e in scene.history)]
        assert not {(scene.temperament, *pair) for pair in asked} & set(test.triples)


@pytest.mark.parametrize("part", ["train", "test"])
def test_partners_go_on_with_their_own_messages_and_no_held_out_triple(
    world: tuple[Path, WorldSummary], part: str
) -> None:
    split = make_splits(0)[part == "test"]
    scenes = {
        scene.trace_id: scene
        for scene in sample_scenes(0, {"train": "prompts", "test": "test"}[part], split, SMALL.prompts_train)
    }
    rows = read(world[0] / f"partners_{part}.jsonl")
    assert [row["trace_id"] for row in rows] == [r["trace_id"] for r in read(world[0] / f"prompts_{part}.jsonl")]
    meant = {wording.format(o=thing): (intent, thing)
             for intent, wordings in MESSAGES.items() for wording in wordings for thing in OBJECTS}  # fmt: skip
    for row in rows:
        scene = scenes[row["trace_id"]]
        assert row["partner"] == scene.speaker
        said = [meant[line] for line in row["lines"]]
        assert len({thing for _, thing in said} - {scene.object}) == PARTNER_LINES
        assert all((scene.temperament, scene.relation, intent) in split.triples for intent, _ in said)


def test_test_scenes_are_all_held_out_and_round_trip_through_json(world: tuple[Path, WorldSummary]) -> None:
    _, test = make_splits(0)
    for row in read(world[0] / "oracle/test_scenes.jsonl"):
        scene = Scene.from_json(row)
        assert json.loads(json.dumps(scene.to_json())) == row
        assert (scene.temperament, scene.relation, scene.intent) in test.triples
        assert scene.name in test.names
        assert scene.speaker in scene.relations


def test_prompts_have_hers_layout_and_no_answer(world: tuple[Path, WorldSummary]) -> None:
    scenes = {row["trace_id"]: row for row in read(world[0] / "oracle/test_scenes.jsonl")}
    for row in read(world[0] / "prompts_test.jsonl"):
        scene = scenes[row["trace_id"]]
        system, *rest = row["messages"]
        prompt = RolePrompt.parse(system["content"])
        assert prompt.name == scene["name"]
        assert all(
            (prompt.background, prompt.scenario, prompt.others, prompt.inner_thoughts, prompt.requirements)
        )
        assert rest[0]["content"].startswith(CONVERSATION_START)
        roles = [message["role"] for message in rest]
        assert roles == [*["user", "assistant"] * len(scene["history"]), "user"]
        assert rest[-1]["content"].split("\n")[-1].startswith(f"{scene['speaker']}: ")
        # History keeps the character's own thoughts and none of his plans; nothing names the answer.
        for message in rest[1:-1:2]:
            turn = parse_turn(message["content"], expect_plan=False, expect_name=scene["name"])
            assert turn.well_formed
            assert not turn.plan
            assert Kind.ROLE_THINKING in turn.pattern
        assert not {"mood", scene["stance"]} & set(rest[-1]["content"].replace(".", " ").split())


def test_history_shares() -> None:
    train, _ = make_splits(0)
    turns = Counter(len(scene.history) for scene in sample_scenes(0, "any", train, 4000))
    assert turns[0] / 4000 == pytest.approx(0.6, abs=0.03)
    assert turns[1] / 4000 == pytest.approx(0.3, abs=0.03)
    assert turns[2] / 4000 == pytest.approx(0.1, abs=0.02)


def test_flaw_rates_are_as_stated() -> None:
    rng = random.Random(0)
    drawn = Counter(flaw for _ in range(6000) for flaw in sample_flaws(rng, SFT_RATES))
    for flaw in Flaw:
        assert drawn[flaw] / 6000 == pytest.approx(SFT_RATES[flaw], abs=0.015)


def test_the_worse_reply_of_a_pair_has_all_flaws_of_the_better_and_more() -> None:
    rng = random.Random(0)
    added: Counter[int] = Counter()
    alone: Counter[Flaw] = Counter()
    for _ in range(9000):
        better, worse = sample_pair_flaws(rng)
        assert better < worse
        added[len(worse - better)] += 1
        if len(worse - better) == 1:
            alone.update(worse - better)
    for count, share in zip((1, 2, 3), EXTRA_FLAWS, strict=True):
        assert added[count] / 9000 == pytest.approx(share, abs=0.02)
    for flaw, weight in PAIR_WEIGHTS.items():
        assert alone[flaw] / added[1] == pytest.approx(weight / sum(PAIR_WEIGHTS.values()), abs=0.03)


def test_training_pairs_carry_the_stated_noise_and_do_not_mark_it(
    world: tuple[Path, WorldSummary], tmp_path: Path
) -> None:
    out, summary = world
    assert all("label_flipped" not in row for row in read(out / "pairs_train.jsonl"))
    assert all(row["label_flipped"] is False for row in read(out / "pairs_val.jsonl"))
    assert all(row["chosen"] != row["rejected"] for row in read(out / "pairs_val.jsonl"))
    assert summary.labels_flipped / SMALL.pairs_train == pytest.approx(LABEL_NOISE, abs=0.06)


def test_no_pair_of_the_demos_seeds_is_twice_the_same_reply() -> None:
    """Seed 2 draws one whose two replies both break off early; the reader would refuse it."""
    for seed in (0, 1, 2):
        rows = list(_pair_rows(seed, "pairs-train", make_splits(seed)[0], 2400, LABEL_NOISE))
        assert len(rows) == 2400
        assert [row["trace_id"] for row in rows if row["chosen"] == row["rejected"]] == []


def test_tag_patterns_vary() -> None:
    assert sum(PATTERNS.values()) == pytest.approx(1.0)
    assert all(set(pattern) == set("TAS") for pattern in PATTERNS)


def test_every_word_of_the_world_is_one_token(
    world: tuple[Path, WorldSummary], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Also of the test split's texts, from which the tokenizer has learnt nothing."""
    out, _ = world
    texts = [row["text"] for row in read(out / "pretrain.jsonl")]
    for name in ("prompts_test.jsonl", "sft_train.jsonl"):
        texts += [message["content"] for row in read(out / name) for message in row["messages"]]
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    pieces = {piece for text in texts for piece, _ in split(text)}
    broken = {
        piece
        for piece in pieces
        if piece[0].isalpha() and len(tokenizer.backend_tokenizer.model.tokenize(piece)) > 1
    }
    assert not broken - {"Role"}  # occurs only in the wrong case of a flaw


def test_tokenizer_is_qwens_kind(
    world: tuple[Path, WorldSummary], tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(tokenizer) == world[1].vocab_size <= SMALL.vocab_size
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer.encode("<system_thinking>")) > 1  # HER's tags are ordinary text
    assert tokenizer.chat_template.strip() == CHAT_TEMPLATE


def test_tokenizer_round_trips_every_text_and_any_bytes(
    world: tuple[Path, WorldSummary], tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [
        message["content"] for row in read(world[0] / "prompts_test.jsonl") for message in row["messages"]
    ]
    for text in [*texts, "a  b\n\n c\t", "né à Łódź 2026 🎭", " 's I'll <think>x</think>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_too_small_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 261"):
        train_tokenizer(["a"], tmp_path, 200)


def test_prompt_wording_is_the_same_for_the_same_random_state() -> None:
    train, _ = make_splits(0)
    scene = next(sample_scenes(0, "any", train, 1))
    assert prompt_messages(random.Random(1), scene) == prompt_messages(random.Random(1), scene)
