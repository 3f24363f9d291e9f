"""The miniature world's judge: transcripts that parse, argue from the flaws put in, and are short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from her_nemo.data.miniature import make_splits
from her_nemo.data.miniature_flaws import BREAKS, Flaw
from her_nemo.data.miniature_judge import (
    CRITERIA,
    JudgeSizes,
    MadePair,
    judge_vocabulary,
    make_pairs,
    transcript,
    transcripts,
    write_judge_files,
)
from her_nemo.evaluation.oracle import score_reply
from her_nemo.roleplay.verdict import Winner, parse_verdict, swap

SIZES = JudgeSizes(sft=40, rl=20, test=20)


def made(noise: float = 0.0, count: int = 120) -> list[MadePair]:
    train, _ = make_splits(3)
    return list(make_pairs(3, "judge-x", train, count, noise))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_flaw_a_judge_can_see_has_a_criterion() -> None:
    assert set(CRITERIA) == set(Flaw) - {Flaw.FIRST_PERSON_PLAN}
    assert len({criterion.name for criterion in CRITERIA.values()}) == len(CRITERIA)
    assert BREAKS[Flaw.FIRST_PERSON_PLAN] == {"plan"}


def test_transcripts_say_what_was_put_in_and_the_same_in_both_orders() -> None:
    for pair in made():
        assert "<system_thinking>" not in pair.judged.better + pair.judged.worse
        if not pair.judged.distinct or pair.better_flaws == pair.worse_flaws:
            continue
        # A reply that breaks off may hide a flaw that it has; what is said to be lost was put in all the same.
        verdict = parse_verdict(transcript(pair, Winner.CAND_1))
        assert verdict.better is Winner.CAND_1
        named = {chosen.name for chosen in verdict.principles}
        assert named == {CRITERIA[flaw].name for flaw in pair.better_flaws | pair.worse_flaws}
        ties = {one.principle for one in verdict.comparisons if one.winner is Winner.TIE}
        assert ties == {CRITERIA[flaw].name for flaw in pair.better_flaws & pair.worse_flaws}
        other = parse_verdict(transcript(pair, Winner.CAND_2))
        told = [(one.principle, one.winner.swapped) for one in other.comparisons]
        assert told == [(one.principle, one.winner) for one in verdict.comparisons]
        assert other.better is swap(verdict).better


def test_the_label_without_noise_is_the_oracles() -> None:
    """Of the whole replies, plan and all, the better one scores higher wherever the two differ."""
    train, _ = make_splits(3)
    pairs = [pair for pair in make_pairs(3, "judge-x", train, 150, 0.0) if pair.judged.distinct]
    plan = "<system_thinking>x</system_thinking>"
    higher = lower = 0
    for pair in pairs:
        good, bad = (score_reply(pair.scene, plan + text).score for text in (pair.judged.better, pair.judged.worse))
        higher += good > bad
        lower += good < bad
    assert higher > 0.85 * len(pairs)
    assert lower < 0.03 * len(pairs)


def test_a_flipped_pair_argues_for_the_wrong_reply() -> None:
    straight, flipped = made(0.0), made(1.0)
    for one, other in zip(straight, flipped, strict=True):
        assert (one.judged.better, one.judged.worse) == (other.judged.worse, other.judged.better)
        if one.judged.distinct and one.better_flaws != one.worse_flaws:
            right = parse_verdict(transcript(one, Winner.CAND_1))
            wrong = parse_verdict(transcript(other, Winner.CAND_1))
            assert wrong.better is Winner.CAND_1
            assert wrong.comparisons == right.comparisons  # the flaws of the one are found in the other


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
        assert seen["order"] == {"cand_1": seen["pairs"], "cand_2": seen["pairs"]}
        for what in ("length", "tags"):
            assert seen[what]["more"] == seen[what]["less"], (name, what)
        for row in rows:
            assert row["messages"][0]["content"] == "Compare cand_1 and cand_2."
            if name == "sft":
                verdict = parse_verdict(row["messages"][-1]["content"])
                assert verdict.better == row["trace_id"].rpartition("/")[2]
            else:
                assert row["better"] == row["trace_id"].rpartition("/")[2]
    assert report["test"]["labels_flipped"] == 0
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
        assert judge.reply_ids(row["messages"][-1]["content"]) == plain.reply_ids(row["messages"][-1]["content"])
    lengths = []
    for pair in made():
        if pair.judged.distinct and pair.better_flaws != pair.worse_flaws:
            for row in transcripts(pair):
                text = row["messages"][-1]["content"]
                ids = judge.reply_ids(text)
                assert judge.decode(ids) == text
                lengths.append(len(ids))
                prompt = row["messages"][:-1]
                assert judge.joined_prompt_ids(prompt).tolist() == judge.prompt_ids(prompt)
    assert sum(lengths) / len(lengths) < 150
    assert max(lengths) < 200
    with pytest.raises(AssertionError):
        assert len(plain.reply_ids(text)) < 200  # without the entries of its own it is twice as long
