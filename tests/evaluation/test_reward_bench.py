"""The bench of scalar reward models: scores as in training, outcomes, and two models compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_qwen3 import tiny_config
from transformers import Qwen3ForSequenceClassification

from her_nemo.config.errors import UserError
from her_nemo.config.reward_bench import RewardBenchConfig
from her_nemo.config.roleplay_bench import CompareConfig
from her_nemo.data.miniature_files import WorldSizes, write_world
from her_nemo.data.sources import read_rows
from her_nemo.data.tokenise import Dropped, Tokeniser
from her_nemo.evaluation.preference_report import Outcome
from her_nemo.evaluation.results import read_results
from her_nemo.evaluation.reward_bench import outcomes_of, outcomes_of_verdicts, run_reward_bench
from her_nemo.evaluation.reward_scores import score_pairs
from her_nemo.stages import evaluate_compare, evaluate_reward_model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world")
    sizes = WorldSizes(
        pretrain=400, sft_train=200, sft_val=8, pairs_train=8, pairs_val=10, prompts_train=8, prompts_test=8
    )
    write_world(out, 0, sizes)
    return out


@pytest.fixture(scope="module")
def model(world: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reward")
    tokeniser = Tokeniser(world / "tokenizer")
    tokeniser.hf.save_pretrained(out)
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokeniser.hf), num_labels=1, pad_token_id=tokeniser.pad_id)
    network = Qwen3ForSequenceClassification(config)
    torch.nn.init.normal_(network.score.weight)
    network.save_pretrained(out)
    return out


def rows_of(world: Path) -> list[dict]:
    return read_rows(world / "pairs_val.jsonl", "pairs")[0]


def test_scores_are_the_head_at_the_last_token(model: Path, world: Path) -> None:
    rows = rows_of(world)[:5]
    batched = list(score_pairs(model, rows, micro_batch_size=4))
    assert list(score_pairs(model, rows, micro_batch_size=1)) == [
        pytest.approx(pair, abs=1e-5) for pair in batched
    ]
    tokeniser = Tokeniser(model)
    network = Qwen3ForSequenceClassification.from_pretrained(model).eval()
    for row, pair in zip(rows, batched, strict=True):
        for key, score in zip(("chosen", "rejected"), pair, strict=True):
            ids = torch.tensor([[*tokeniser.prompt_ids(row["messages"]), *tokeniser.reply_ids(row[key])]])
            with torch.no_grad():
                expected = network.score(network.model(ids).last_hidden_state)[0, -1, 0]
            assert score == pytest.approx(float(expected), abs=1e-5)
    assert len({round(score, 4) for pair in batched for score in pair}) > 5


def test_a_pair_that_does_not_fit_is_counted(model: Path, world: Path) -> None:
    rows = rows_of(world)[:3]
    scores = list(score_pairs(model, rows, max_length=20))
    assert all(isinstance(score, Dropped) for score in scores)
    cfg = RewardBenchConfig(name="t", model=str(model), pairs="p", out="o")
    report, results, _ = run_reward_bench(cfg, rows, outcomes_of(cfg, rows, scores))
    assert (report.overall.failed, report.valid, results.valid) == (3, False, False)
    assert results.failures == {"model": {"truncated": 3}}


def test_outcomes_by_hand(model: Path) -> None:
    def row(trace: str, chosen: str, **more) -> dict:
        messages = [{"role": "user", "content": "Well?"}]
        return {"trace_id": trace, "messages": messages, "chosen": chosen, "rejected": "no no"} | more

    cfg = RewardBenchConfig(
        name="t", model=str(model), pairs="p", out="o", tie_margin=0.1, dimension_key="why"
    )
    rows = [
        row("a", "yes yes yes yes", why="voice"),
        row("a", "yes yes", why=["voice", "plot"]),
        row("b", "yes"),
        row("c", "yes", why=None),
    ]
    scores = [(2.0, 1.0), (1.0, 2.0), (1.0, 1.05), Dropped("c", "prompt_too_long", 9, 8)]
    pairs = outcomes_of(cfg, rows, scores)
    assert [(p.pair_id, p.outcome) for p in pairs] == [
        ("a", Outcome.RIGHT), ("a#1", Outcome.WRONG), ("b", Outcome.TIE), ("c", Outcome.FAILED),
    ]  # fmt: skip
    assert (pairs[1].dimensions, pairs[2].dimensions) == (("voice", "plot"), ())
    report, results, scenes = run_reward_bench(cfg, rows, pairs)
    assert report.overall.interval.mean == 0.5
    by_name = {metric.name: metric for metric in results.metrics}
    assert by_name["accuracy"].interval.mean == 0.5
    assert by_name["accuracy"].missing == 1
    assert by_name["dimension:voice"].interval.mean == 0.5
    assert by_name["dimension:voice"].missing == 0
    assert by_name["length:chosen_longer"].interval.mean == 1.0
    assert by_name["margin"].interval.mean == pytest.approx(-0.05 / 3)
    assert scenes[3].failures[0].message == "prompt_too_long"


def test_two_models_are_compared(model: Path, world: Path, tmp_path: Path, capsys) -> None:
    pairs = str(world / "pairs_val.jsonl")
    for out, margin in (("one", 0.0), ("two", 100.0)):
        place = str(tmp_path / out)
        cfg = RewardBenchConfig(name=out, model=str(model), pairs=pairs, out=place, tie_margin=margin)
        assert evaluate_reward_model.run(cfg) == 0
    assert "all pairs" in capsys.readouterr().out
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (report["overall"]["ties"], report["overall"]["interval"]["mean"]) == (10, 0.5)
    results, scenes = read_results(tmp_path / "one")
    assert (results.scenes, len(scenes), results.valid) == (10, 10, True)
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    compared = CompareConfig(name="c", runs=runs, out=str(tmp_path / "page.html"))
    assert evaluate_compare.run(compared) == 0
    assert "settings.tie_margin" in (tmp_path / "page.html").read_text(encoding="utf-8")


def verdict(pair: str, better: str, said: str | None, words: tuple[int, int]) -> dict:
    """A row as `her-nemo judge` writes it."""
    row = {"trace_id": f"{pair}/{better}", "pair": pair, "better": better, "said": said, "words": list(words)}
    return row | {"problem": None if said else "no_json: nothing in it", "verdict": "text", "truncated": False}


def test_verdicts_by_hand() -> None:
    rows = [
        verdict("a", "cand_1", "cand_1", (10, 5)),  # right
        verdict("a", "cand_2", "cand_1", (5, 10)),  # wrong: it takes the first
        verdict("b", "cand_1", "cand_1", (5, 10)),
        verdict("b", "cand_2", "cand_2", (10, 5)),
        verdict("c", "cand_1", "tie", (8, 8)),
        verdict("c", "cand_2", None, (8, 8)),
        verdict("d", "tie", "tie", (1, 1)),
    ]
    pairs = outcomes_of_verdicts(rows)
    assert [pair.outcome.value for pair in pairs] == ["right", "wrong", "right", "right", "tie", "failed", "right"]
    assert [(pair.chosen_length, pair.rejected_length) for pair in pairs[:4]] == [(10, 5)] * 2 + [(5, 10)] * 2
    cfg = RewardBenchConfig(name="t", verdicts="samples.jsonl", out="o")
    report, results, scenes = run_reward_bench(cfg, rows, pairs)
    # By pair: a 0.5, b 1, c 0.5, d 1.
    assert report.overall.interval.mean == results.metrics[0].interval.mean == 0.75
    assert report.by_order["chosen_first"].interval.mean == pytest.approx(2.5 / 3)
    assert report.by_order["chosen_second"].interval.mean == 0.5
    assert (report.order_effect.mean, report.consistent) == (-0.5, 0.5)
    by_name = {metric.name: metric.interval.mean for metric in results.metrics}
    assert by_name["length:chosen_longer"] == 0.5
    assert by_name["length:chosen_shorter"] == 1.0
    assert by_name["order:chosen_first"] == pytest.approx(2.5 / 3)
    assert (results.scenes, results.runs, results.judgements, results.judgements_failed) == (4, 2, 7, 1)
    assert (results.failures, results.valid) == ({"model": {"unparsable": 1}}, False)
    assert [(scene.scene_id, scene.run) for scene in scenes][:2] == [("a", 0), ("a", 1)]


def test_verdicts_from_the_command_line(her_nemo, tmp_path: Path) -> None:
    rows = [verdict(pair, f"cand_{n}", f"cand_{n}", (3, 4)) for pair in "abc" for n in (1, 2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(lines, encoding="utf-8")
    done = her_nemo("evaluate", "benchmark=reward_model", "verdicts=samples.jsonl", "out=judge")
    assert done.returncode == 0, done.stderr
    assert "the same winner in both orders: 1.000" in done.stdout
    results, scenes = read_results(tmp_path / "judge")
    assert (results.scenes, len(scenes), results.metrics[0].interval.mean, results.valid) == (3, 6, 1.0, True)


def test_what_does_not_fit_together_is_said_at_once(her_nemo, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"pair": "a"}\n', encoding="utf-8")
    for words, said in (
        (["pairs=none.jsonl"], "model must be given"),
        (["verdicts=rows.jsonl", "model=lm"], "model and verdicts are both given"),
        (["verdicts=rows.jsonl"], "no verdicts as her-nemo judge writes them (KeyError: 'better')"),
    ):
        done = her_nemo("evaluate", "benchmark=reward_model", *words)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_a_language_model_is_refused(her_nemo, world: Path, tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    config = tiny_config()
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path / "lm")
    done = her_nemo("evaluate", "benchmark=reward_model", "model=lm", "pairs=none.jsonl")
    assert done.returncode == 2
    assert "lm: has no scalar head" in done.stderr
    assert "none.jsonl: no such file" in done.stderr


def test_a_head_that_is_missing_is_no_random_one(world: Path, tmp_path: Path) -> None:
    from tiny_qwen3 import tiny_model

    tiny_model(tmp_path, tokenizer=Tokeniser(world / "tokenizer").hf)
    with pytest.raises(UserError, match="no scalar-headed Qwen3"):
        next(iter(score_pairs(tmp_path, rows_of(world)[:1])))
