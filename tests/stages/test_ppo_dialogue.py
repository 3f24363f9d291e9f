"""PPO on conversations, as a user runs it: two replicas, a resume, a critic, and what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stage_files import Place, curve, summary

Stage = Callable[..., None]
CURVES = (
    "train_rollouts/rewards",
    "train_optim/loss",
    "reward/turn",
    "reward/text_novelty",
    "dialogue/unheard",
    "roleplay/window_self_bleu",
)


def overrides(place: Place, out: Path, **changes: object) -> list[str]:
    scenes = [str(place.world / f"partners_{part}.jsonl") for part in ("train", "test")]
    values = {
        "model.data.train_ds.file_path": place.world / "prompts_train.jsonl",
        "model.data.validation_ds.file_path": place.world / "prompts_test.jsonl",
        "pretrained_checkpoint.restore_from_path": place.model,
        "exp_manager.explicit_log_dir": out,
        "model.encoder_seq_length": 448,
        "model.micro_batch_size": 2,
        "model.global_batch_size": 8,
        "model.optim.lr": 1e-3,
        "model.ppo.num_rollout_samples": 16,
        "model.ppo.num_val_samples": 2,
        "model.ppo.length_params.max_length": 12,
        "model.ppo.dialogue.turns": 2,
        "model.ppo.dialogue.scenes": json.dumps(scenes),
        "model.ppo.dialogue.simulator.max_tokens": 40,
        "reward.kind": "rules",
        "reward.rules.length": 4.0,
        "reward.rules.min_words": 40,
        "trainer.ppo.val_check_interval": 2,
        "trainer.ppo.max_steps": 2,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


GROUPS = {
    "algorithm": "grpo",
    "model.ppo.num_samples_per_prompt": 2,
    "reward.diversity.text_weight": 0.5,
    "reward.diversity.window": 16,
    "model.ppo.dialogue.credit": "to_go",
    "model.ppo.dialogue.discount": 0.5,
}


@pytest.mark.parallel
def test_conversations_are_the_same_on_two_replicas_and_after_a_resume(
    place: Place, stage: Stage, tmp_path: Path
) -> None:
    stage("ppo", *overrides(place, tmp_path / "whole", **GROUPS))
    stage("ppo", *overrides(place, tmp_path / "dp2", **GROUPS), "trainer.devices=2")
    for steps in (1, 2):
        stage("ppo", *overrides(place, tmp_path / "cut", **GROUPS | {"trainer.ppo.max_steps": steps}))
    for tag in CURVES:
        whole = curve(tmp_path / "whole", tag)
        assert len(whole) == 2, tag
        assert curve(tmp_path / "cut", tag) == whole, tag
        if tag != "dialogue/unheard":  # of replica 0 alone
            assert np.abs(np.array(curve(tmp_path / "dp2", tag)) - np.array(whole)).max() < 1e-3, tag
    assert abs(summary(tmp_path / "whole")["ratio_step0"] - 1.0) < 1e-5
    assert summary(tmp_path / "whole")["logprob_gap_max"] < 1e-4
    kept = [json.loads(line) for line in (tmp_path / "whole/samples/step_00000002.jsonl").read_text().splitlines()]
    assert [row["weight_version"] for row in kept] == [1] * 4
    assert all(row["prompt"].endswith("<|im_start|>assistant\n") and np.isfinite(row["reward"]) for row in kept)
    written = tmp_path / "whole/samples/dialogues_step_00000001.jsonl"
    kept = [json.loads(line) for line in written.read_text().splitlines()]
    lines = {
        row["trace_id"]: row
        for row in map(json.loads, (place.world / "partners_train.jsonl").read_text().splitlines())
    }
    assert len(kept) == 4  # one for each of the step's starts
    for talk in kept:
        scene = lines[talk["trace_id"]]
        assert [said["speaker"] == scene["partner"] for said in talk["turns"]] == [False, True, False]
        assert talk["turns"][1]["text"] == scene["lines"][0]


@pytest.mark.slow
def test_conversations_with_a_critic_in_packed_rows(place: Place, stage: Stage, tmp_path: Path) -> None:
    """What rows that are not packed would give: tests/parallel/test_ppo_packing.py."""
    changes = {"trainer.ppo.critic_warmup_steps": 1, "trainer.ppo.max_steps": 1, "model.ppo.packing": True}
    stage("ppo", *overrides(place, tmp_path, **changes))
    assert len(curve(tmp_path, "critic/loss")) == 2
    assert all(np.isfinite(curve(tmp_path, "critic/loss") + curve(tmp_path, "train_optim/loss")))
    assert abs(summary(tmp_path)["ratio_step0"] - 1.0) < 1e-5
    assert summary(tmp_path)["logprob_gap_max"] < 1e-4
    assert np.isfinite(summary(tmp_path)["val_reward"])


@pytest.mark.slow
def test_prompts_without_lines_are_named_before_the_first_step(
    place: Place, her_nemo: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    scenes = json.dumps([str(place.world / "partners_train.jsonl")])
    changes = {"model.ppo.dialogue.scenes": scenes, "model.ppo.num_val_samples": 3}
    done = her_nemo("ppo", *overrides(place, tmp_path / "run", **changes), timeout=300)
    assert done.returncode == 2
    assert "3 prompts that no conversation can begin from" in done.stderr
    assert "mini-test-000000: 0 lines in model.ppo.dialogue.scenes, and 1 are needed" in done.stderr
    assert "Traceback" not in done.stderr
