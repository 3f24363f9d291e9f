"""Judges as a user trains and measures them: prompts from pairs, RL with the label as reward, held-out accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from stage_files import Place, curve

from her_nemo.data.judge_rows import read_pair
from her_nemo.roleplay.verdict import Winner

Stage = Callable[..., None]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prompts(place: Place, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`her-nemo data judge` of the world's pairs."""
    out = tmp_path_factory.mktemp("judge")
    stage("data", "judge", f"source={place.world / 'pairs_train.jsonl'}", f"out={out}", "brief=true")
    return out / "judge_prompts.jsonl"


def test_prompts_of_pairs(prompts: Path, place: Place) -> None:
    report = json.loads((prompts.parent / "balance.json").read_text())
    assert report["pairs"] == 48 == report["kept"] + report["alike_to_a_judge"] + report["left_out_for_balance"]
    assert report["kept"] >= 10
    written = rows(prompts)
    assert len(written) == report["prompts"] == 2 * report["kept"]
    better = report["better_reply"]
    assert better["order"] == {"cand_1": report["kept"], "cand_2": report["kept"]}
    assert better["length"]["more"] == better["length"]["less"]
    assert better["tags"]["more"] == better["tags"]["less"]
    pairs = {row["trace_id"]: row for row in rows(place.world / "pairs_train.jsonl")}
    for row in written:
        asked = row["messages"][1]["content"]
        assert "<system_thinking>" not in asked
        assert f"==={row['better']}===\n{read_pair(pairs[row['pair']]).better}" in asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data", "judge", "source=no.jsonl", "out=x"), ("source", "no such file")),
        (("judge", "model=nowhere", "prompts=no.jsonl"), ("model", "prompts", "no such file")),
    ],
)
def test_slips_are_refused_at_once(her_nemo, words: tuple[str, ...], said: tuple[str, ...]) -> None:
    done = her_nemo(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in said:
        assert word in done.stderr


def rl(place: Place, data: Path, out: Path, **changes: object) -> list[str]:
    values = {
        "algorithm": "grpo",
        "model.data.train_ds.file_path": data,
        "model.data.validation_ds.file_path": data,
        "pretrained_checkpoint.restore_from_path": place.model,
        "exp_manager.explicit_log_dir": out,
        "reward.kind": "verdict",
        "model.encoder_seq_length": 512,
        "model.micro_batch_size": 2,
        "model.global_batch_size": 8,
        "model.ppo.num_rollout_samples": 16,
        "model.ppo.num_samples_per_prompt": 4,
        "model.ppo.num_val_samples": 4,
        "model.ppo.length_params.max_length": 16,
        "trainer.ppo.max_steps": 2,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.parallel
def test_a_model_that_writes_no_verdict_earns_nothing_on_two_replicas(
    place: Place, stage: Stage, prompts: Path, tmp_path: Path
) -> None:
    """No number of unreadable verdicts stops the run: here they are what is to be unlearned."""
    stage("ppo", *rl(place, prompts, tmp_path), "trainer.devices=2")
    assert curve(tmp_path, "reward/unparsed") == [1.0, 1.0]
    assert curve(tmp_path, "reward/correct") == [0.0, 0.0]
    assert curve(tmp_path, "train_rollouts/rewards") == [0.0, 0.0]
    assert curve(tmp_path, "val_rollouts/rewards") == [0.0]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gae", "her"])
def test_with_a_critic_or_without(
    place: Place, stage: Stage, prompts: Path, tmp_path: Path, estimator: str
) -> None:
    changes = {"trainer.ppo.advantage_estimator": estimator, "trainer.ppo.kl.placement": "reward",
               "trainer.ppo.kl.estimator": "k1", "trainer.ppo.max_steps": 1}  # fmt: skip
    stage("ppo", *rl(place, prompts, tmp_path, **changes))
    assert curve(tmp_path, "reward/unparsed") == [1.0]
    assert len(curve(tmp_path, "critic/loss")) == (1 if estimator == "gae" else 0)


@pytest.mark.slow
def test_prompts_without_labels_are_refused(place: Place, her_nemo, prompts: Path, tmp_path: Path) -> None:
    done = her_nemo("ppo", *rl(place, place.world / "prompts_train.jsonl", tmp_path / "run"))
    assert done.returncode == 2
    assert "better=None" in done.stderr
    assert "Traceback" not in done.stderr
    planned = her_nemo("plan", "ppo", *rl(place, place.world / "prompts_train.jsonl", tmp_path / "run"))
    assert "has no better" in planned.stdout + planned.stderr


def test_every_reply_carries_the_name_of_its_prompt(
    place: Place, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the second of two replicas, with groups of 2: what is scored is held against its own label."""
    from her_nemo.config import compose
    from her_nemo.data.judge_rows import read_labels
    from her_nemo.data.tokenise import Tokeniser, encode_prompt
    from her_nemo.megatron import parallel
    from her_nemo.rewards.verdict import VerdictReward
    from her_nemo.rollout.engine import Rollout
    from her_nemo.stages import ppo

    monkeypatch.setattr(parallel, "data_rank", lambda: 1)
    monkeypatch.setattr(parallel, "data_size", lambda: 2)
    cfg = compose.load("ppo", rl(place, prompts, tmp_path, **{"model.ppo.num_samples_per_prompt": 2}))
    tokeniser = Tokeniser(place.world / "tokenizer")
    asked = [encode_prompt(tokeniser, row, 900) for row in rows(prompts)[:6]]
    body = {
        "principles": [
            {"name": "A", "dimension": "Overall Quality", "level": "sentence", "content": "c", "reason": "r"}
        ],
        "comparisons": [{"principle": "A", "winner": "cand_1"}],
        "analysis": "a",
        "better_response": "cand_1",
    }
    said = tokeniser.reply_ids(json.dumps(body))

    def answer(ids, sampling, seed, indices):
        count = len(ids)
        return Rollout(ids, [said] * count, [[0.0] * len(said)] * count, 0, [True] * count)

    _, replies = ppo.generate(cfg, SimpleNamespace(generate=answer), asked, tokeniser, 1, 2)
    # The second replica has the prompts 1, 3 and 5, which are all in the order cand_2.
    names = [asked[index].trace_id for index in (1, 1, 3, 3, 5, 5)]
    assert list(replies.trace_ids) == names
    assert all(name.endswith("/cand_2") for name in names)
    labels = read_labels([prompts])
    reward = VerdictReward(labels, correct=1.0, valid=0.5)
    assert reward(replies).scores_B.tolist() == [0.5] * 6
    assert VerdictReward(
        {name: label.swapped if name == names[2] else label for name, label in labels.items()}, correct=1.0, valid=0.5
    )(replies).scores_B.tolist() == [0.5, 0.5, 1.5, 1.5, 0.5, 0.5]
    assert labels[names[0]] is Winner.CAND_2


@pytest.mark.vllm
def test_a_judges_figures(wide: Place, stage: Stage, prompts: Path, tmp_path: Path) -> None:
    stage(
        "judge", f"model={wide.model}", f"prompts={prompts}", f"out={tmp_path}", "sampling.max_tokens=24",
        "num_prompts=9",
    )  # fmt: skip
    figures = json.loads((tmp_path / "eval.json").read_text())
    samples = rows(tmp_path / "samples.jsonl")
    assert [row["trace_id"] for row in samples] == [row["trace_id"] for row in rows(prompts)[:9]]
    assert figures["prompts"] == figures["unparsed"] == figures["truncated"] == 9
    assert figures["accuracy"]["value"] is None
    assert figures["accuracy_all"]["value"] == 0.0
    assert all(row["problem"].startswith(("no_json", "no_better", "broken")) for row in samples)
