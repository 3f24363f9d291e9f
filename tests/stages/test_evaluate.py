"""`her-nemo evaluate`, as a user runs it and piece by piece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_qwen3 import tiny_model

from her_nemo.config.errors import UserError
from her_nemo.data.miniature_files import WorldSizes, write_world
from her_nemo.data.sources import read_jsonl
from her_nemo.data.tokenise import Tokeniser
from her_nemo.evaluation.oracle import PRINCIPLES, load_scenes, score_reply
from her_nemo.evaluation.results import read_results
from her_nemo.stages.evaluate import Task, make_tasks, part, scenes_of, summarise, write_results


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world")
    sizes = WorldSizes(
        pretrain=400, sft_train=200, sft_val=8, pairs_train=8, pairs_val=8, prompts_train=8, prompts_test=12
    )
    write_world(out, 0, sizes)
    return out


@pytest.fixture(scope="module")
def model(world: Path, tmp_path_factory) -> Path:
    """A random model with the world's tokenizer."""
    out = tmp_path_factory.mktemp("model")
    tokeniser = Tokeniser(world / "tokenizer")
    tiny_model(out, tokenizer=tokeniser.hf)
    return out


def arguments(model: Path, world: Path, out: Path, *extra: str) -> list[str]:
    return [
        f"model={model}",
        f"prompts={world / 'prompts_test.jsonl'}",
        f"scenes={world / 'oracle' / 'test_scenes.jsonl'}",
        f"out={out}",
        *extra,
    ]


@pytest.mark.vllm
def test_a_run_writes_figures_and_every_sample(her_nemo, model: Path, world: Path, tmp_path: Path) -> None:
    words = arguments(
        model, world, tmp_path / "eval", "sampling.max_tokens=20", "samples_per_prompt=2", "num_prompts=9"
    )
    done = her_nemo("evaluate", *words, "seed=3")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "eval" / "eval.json") in done.stdout
    assert "WARNING" not in done.stderr

    figures = json.loads((tmp_path / "eval" / "eval.json").read_text())
    lines = (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert (figures["samples"], figures["prompts"], len(rows)) == (18, 9, 18)
    assert figures["truncated"] == sum(row["truncated"] for row in rows)
    assert figures["oracle_score"] == pytest.approx(sum(row["score"] for row in rows) / 18)
    assert set(figures["principles"]) == set(PRINCIPLES)
    assert figures["tokens_per_second"] > 0
    results, scenes = read_results(tmp_path / "eval")
    means = {metric.name: metric.interval for metric in results.metrics}
    for key in ("oracle_score", "format_valid", "leak_rate", "repetition", "name_slips"):
        assert means[key].mean == pytest.approx(figures[key]), key
        assert means[key].low <= means[key].mean <= means[key].high
    assert (results.scenes, results.runs, len(scenes), results.valid) == (9, 2, 18, True)
    assert [scene.dialogue[-1].text for scene in scenes] == [row["reply"] for row in rows]
    assert figures["seconds"] > figures["seconds_generating"]
    for key in (
        "oracle_score_se",
        "format_valid",
        "leak_rate",
        "pattern_entropy",
        "top1_pattern_share",
        "self_bleu",
    ):
        assert figures[key] >= 0, key

    scenes = load_scenes(world / "oracle" / "test_scenes.jsonl")
    prompts, _ = read_jsonl(world / "prompts_test.jsonl", "prompts")
    assert [row["trace_id"] for row in rows[::2]] == [row["trace_id"] for row in prompts[:9]]
    for row in rows:
        assert row["principles"] == score_reply(scenes[row["trace_id"]], row["reply"]).principles
        assert row["character"] == scenes[row["trace_id"]].name
        assert not row["prompt_tail"].startswith("===")
    assert len({row["reply"] for row in rows}) == 18  # two samples of a prompt are two draws


def test_the_standard_error_is_over_prompts(world: Path) -> None:
    rows, _ = read_jsonl(world / "sft_val.jsonl", "sft")
    scenes = load_scenes(world / "oracle" / "test_scenes.jsonl")
    replies = [row["messages"][-1]["content"] for row in rows]
    scene = next(iter(scenes.values()))
    tasks = [Task(f"t{i // 2}", i % 2, [1], None, "", "", scene) for i in range(len(rows))]
    verdicts = [score_reply(scene, reply) for reply in replies]
    figures = summarise(tasks, replies, verdicts)
    scores = [verdict.score for verdict in verdicts]  # four prompts of two replies
    means = [(a + b) / 2 for a, b in zip(scores[::2], scores[1::2], strict=True)]
    mean = sum(means) / 4
    assert figures["oracle_score"] == pytest.approx(mean)
    variance = sum((value - mean) ** 2 for value in means) / 3
    assert figures["oracle_score_se"] == pytest.approx((variance / 4) ** 0.5)
    assert figures["replies"] == 8


def test_without_scenes_there_is_no_oracle_score() -> None:
    reply = "<system_thinking>a</system_thinking>Mara: Yes."
    figures = summarise([Task("t", 0, [1], "Mara", "", "", None)], [reply], [None])
    assert "oracle_score" not in figures
    assert figures["format_valid"] == 1.0
    wrong = summarise(
        [Task("t", 0, [1], "Odo", "", "", None)], ["<system_thinking>a</system_thinking>Mara: Yes."], [None]
    )
    assert wrong["defects"] == {"wrong_name": 1}


def test_prompts_that_do_not_fit_are_counted_or_refused(world: Path) -> None:
    rows, _ = read_jsonl(world / "prompts_test.jsonl", "prompts")
    tokeniser = Tokeniser(world / "tokenizer")
    every, dropped = make_tasks(rows, None, tokeniser, 1000, 1)
    assert (len(every), dropped) == (12, 0)
    middle = sorted(len(task.prompt_ids) for task in every)[5]
    some, dropped = make_tasks(rows, None, tokeniser, middle, 3)
    assert len(some) == 3 * (12 - dropped)
    assert all(len(task.prompt_ids) <= middle for task in some)
    with pytest.raises(UserError, match=r"none of 12 prompts fits in 5 tokens.*max_tokens"):
        make_tasks(rows, None, tokeniser, 5, 1)


def test_scenes_of_another_world_are_refused(world: Path) -> None:
    with pytest.raises(UserError, match=r"no scene for 1 of 1 prompts, first 'elsewhere'"):
        scenes_of([{"trace_id": "elsewhere"}], str(world / "oracle" / "test_scenes.jsonl"))


def test_the_part_is_read_from_hers_system_prompt_only(world: Path) -> None:
    rows, _ = read_jsonl(world / "prompts_test.jsonl", "prompts")
    name, brief = part(rows[0]["messages"])
    assert name
    assert brief.startswith(f"{name} acts")
    assert part([{"role": "system", "content": "You are a helpful assistant."}]) == (None, "")


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    write_results(tmp_path, {"samples": 1}, [{"reply": "é"}])
    write_results(tmp_path, {"samples": 2}, [{"reply": "a"}, {"reply": "b"}])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["eval.json", "samples.jsonl"]
    assert json.loads((tmp_path / "eval.json").read_text()) == {"samples": 2}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        pytest.param(("model=nowhere",), "nowhere", id="no model"),
        pytest.param(("prompts=nowhere.jsonl",), "nowhere.jsonl", id="no prompts"),
        pytest.param(("scenes=nowhere.jsonl",), "nowhere.jsonl", id="no scenes"),
        pytest.param(("sampling.max_token=4",), "max_tokens", id="a key misspelt"),
    ],
)
def test_mistakes_are_one_clear_error(
    her_nemo, model: Path, world: Path, tmp_path: Path, wrong, said: str
) -> None:
    done = her_nemo("evaluate", *arguments(model, world, tmp_path / "eval"), *wrong)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "eval" / "eval.json").exists()
