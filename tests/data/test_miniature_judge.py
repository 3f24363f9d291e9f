"""The miniature world's judge: transcripts that parse, argue from the flaws put in, and are short."""

from __future__ import annotations

import json
from pathlib import Path

from her_nemo.data.miniature import STANCES, make_splits
from her_nemo.data.miniature_flaws import BREAKS, Flaw
from her_nemo.data.miniature_judge import (
    CRITERIA,
    JudgeSizes,
    MadePair,
    judge_vocabulary,
    make_pairs,
    shown_stances,
    transcript,
    transcripts,
    write_judge_files,
)
from her_nemo.evaluation.oracle import score_reply
from her_nemo.roleplay.verdict import Winner, parse_verdict, swap

SIZES = JudgeSizes(sft=40, rl=20, test=20)


def made(noise: float = 0.0, count: int = 120) -> list[MadePair]:
    train, _ = make_splits(3)
    pairs = make_pairs(3, "judge-x", train, count, noise)
    return [pair for pair in pairs if pair.judged.distinct]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_flaw_a_judge_can_see_has_a_criterion() -> None:
    assert set(CRITERIA) == set(Flaw) - {Flaw.FIRST_PERSON_PLAN}
    assert len({criterion.name for criterion in CRITERIA.values()}) == len(CRITERIA)
    assert BREAKS[Flaw.FIRST_PERSON_PLAN] == {"plan"}


def test_transcripts_say_what_was_put_in_and_the_same_in_both_orders() -> None:
    ties = 0
    for pair in made():
        assert "<system_thinking>" not in pair.judged.better + pair.judged.worse
        verdict = parse_verdict(transcript(pair, Winner.CAND_1))
        assert verdict.better is (Winner.TIE if pair.tied else Winner.CAND_1)
        ties += pair.tied
        named = {chosen.name for chosen in verdict.principles}
        lost = {CRITERIA[flaw].name for flaw in pair.better_lost | pair.worse_lost}
        assert named == (lost or {"Stance"})  # two replies without a flaw keep that one alike
        even = {one.principle for one in verdict.comparisons if one.winner is Winner.TIE}
        assert even == (
            {CRITERIA[flaw].name for flaw in pair.better_lost & pair.worse_lost} if lost else {"Stance"}
        )
        other = parse_verdict(transcript(pair, Winner.CAND_2))
        assert other.comparisons == swap(verdict).comparisons
        assert other.better is swap(verdict).better
    assert 10 < ties < 60


def test_the_label_without_noise_is_the_oracles() -> None:
    """Of the whole replies, plan and all, the better one scores higher wherever the two differ."""
    plan = "<system_thinking>x</system_thinking>"
    higher = lower = 0
    pairs = [pair for pair in made(count=200) if not pair.tied]
    for pair in pairs:
        good, bad = (
            score_reply(pair.scene, plan + text).score for text in (pair.judged.better, pair.judged.worse)
        )
        higher += good > bad
        lower += good < bad
    assert higher > 0.85 * len(pairs)
    assert lower < 0.05 * len(pairs)


def test_what_a_reply_shows_is_quoted() -> None:
    """A reply that follows another stance says so in its thought and in its deed."""
    wrong = 0
    for pair in made():
        for reply, lost in ((pair.judged.better, pair.better_lost), (pair.judged.worse, pair.worse_lost)):
            thought, deed = shown_stances(pair.scene, reply)
            assert (Flaw.WRONG_STANCE in lost) == (thought != pair.scene.stance)
            assert (Flaw.WRONG_ACTION in lost) == (deed != pair.scene.stance)
            wrong += thought == deed and thought in STANCES and thought != pair.scene.stance
    assert wrong > 20


def test_a_flipped_label_names_the_worse_reply() -> None:
    straight, flipped = made(0.0), made(1.0)
    for one, other in zip(straight, flipped, strict=True):
        assert other.flipped is not one.tied
        if one.tied:
            assert one.judged == other.judged
            continue
        assert (one.judged.better, one.judged.worse) == (other.judged.worse, other.judged.better)
        assert (one.better_lost, one.worse_lost) == (other.worse_lost, other.better_lost)


def test_the_files_are_balanced_and_made_of_their_own_split(tmp_path: Path) -> None:
    report = write_judge_files(tmp_path / "a", 0, SIZES)
    again = write_judge_files(tmp_path / "b", 0, SIZES)
    assert report == again
    for name in ("sft", "rl", "test"):
        file = f"judge_{name}.jsonl"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        rows = read(tmp_path / "a" / file)
        seen = report[name]
        assert len(rows) == 2 * seen["pairs"]
        assert 0.8 * getattr(SIZES, name) <= seen["pairs"] <= getattr(SIZES, name)
        told = seen["pairs"] - seen["ties"]
        assert seen["order"] == {"cand_1": told, "cand_2": told}
        for what in ("length", "tags"):
            assert seen[what]["more"] == seen[what]["less"], (name, what)
        ties = 0
        for row in rows:
            assert row["messages"][0]["content"] == "Compare cand_1 and cand_2."
            order = row["trace_id"].rpartition("/")[2]
            label = parse_verdict(row["messages"][-1]["content"]).better if name == "sft" else row["better"]
            ties += label == "tie"
            assert label in ("tie", order)
        assert ties == 2 * seen["ties"]
    assert report["sft"]["labels_flipped"] == report["test"]["labels_flipped"] == report["test"]["ties"] == 0
    assert report["rl"]["labels_flipped"] > 0
    _, test = make_splits(0)
    for row in read(tmp_path / "a" / "judge_test.jsonl"):
        name = row["messages"][1]["content"].split("You are ")[1].split(" from ")[0]
        assert name in test.names


def test_a_verdict_is_short_in_the_judges_tokenizer_and_nothing_else_changes(tmp_path: Path) -> None:
    from her_nemo.data.miniature_files import WorldSizes, write_world
    from her_nemo.data.tokenise import Tokeniser
    from her_nemo.data.tokenizer import extend_tokenizer

    sizes = WorldSizes(2000, 400, 16, 16, 16, 16, 16)
    write_world(tmp_path, 0, sizes)
    extend_tokenizer(tmp_path / "tokenizer", tmp_path / "judge_tokenizer", judge_vocabulary())
    plain, judge = Tokeniser(tmp_path / "tokenizer"), Tokeniser(tmp_path / "judge_tokenizer")
    assert judge.vocab_size == plain.vocab_size + len(judge_vocabulary()) <= sizes.vocab_size
    for row in read(tmp_path / "sft_val.jsonl"):
        assert judge.prompt_ids(row["messages"][:-1]) == plain.prompt_ids(row["messages"][:-1])
        assert judge.reply_ids(row["messages"][-1]["content"]) == plain.reply_ids(
            row["messages"][-1]["content"]
        )
    lengths = []
    for pair in made():
        for row in transcripts(pair):
            text = row["messages"][-1]["content"]
            ids = judge.reply_ids(text)
            assert judge.decode(ids) == text
            lengths.append(len(ids))
            prompt = row["messages"][:-1]
            assert judge.joined_prompt_ids(prompt).tolist() == judge.prompt_ids(prompt)
    assert sum(lengths) / len(lengths) < 120
    assert max(lengths) < 176
    assert len(plain.reply_ids(text)) > 1.5 * len(ids)  # without the entries of its own
