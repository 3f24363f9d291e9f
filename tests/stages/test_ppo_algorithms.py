"""PPO's loop with the group-relative methods, rules, mixing and diversity, as a user runs it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stage_files import Place, curve, summary

Stage = Callable[..., None]
# Everything that is carried from step to step or dealt out over replicas, at once.
EVERYTHING = {
    "algorithm": "grpo",
    "model.ppo.num_samples_per_prompt": 4,
    "reward.kind": "rules",
    # The little random model writes some ten words, none of them in tags: their number is what differs.
    "reward.rules.length": 4.0,
    "reward.rules.min_words": 40,
    "reward.rules.repetition": 1.0,
    "reward.diversity.text_weight": 0.5,
    "reward.diversity.window": 12,
    "reward.diversity.max_top1_share": 0.99,
    "trainer.ppo.normalize_rewards": True,
    "trainer.ppo.kl.target": 0.5,
    "trainer.ppo.kl.horizon": 40.0,
    "model.ppo.dual_clip": 3.0,
    "model.ppo.ratio_eps_high": 0.28,
    "model.ppo.entropy_bonus": 0.01,
    "model.ppo.importance.correction": "truncate",
}
CURVES = (
    "train_rollouts/rewards",
    "reward/repetition",
    "reward/text_novelty",
    "train_optim/loss",
    "train_optim/kl_coefficient",
    "train_optim/loss_kl",
    "roleplay/window_pattern_entropy",
    "roleplay/window_self_bleu",
    "rollout/importance",
    "val_rollouts/rewards",
)


def overrides(place: Place, out: Path, **changes: object) -> list[str]:
    values = {
        "model.data.train_ds.file_path": place.world / "prompts_train.jsonl",
        "model.data.validation_ds.file_path": place.world / "prompts_test.jsonl",
        "pretrained_checkpoint.restore_from_path": place.model,
        "exp_manager.explicit_log_dir": out,
        "model.encoder_seq_length": 384,
        "model.micro_batch_size": 2,
        "model.global_batch_size": 8,
        "model.optim.lr": 1e-3,
        "model.ppo.num_rollout_samples": 16,
        "model.ppo.num_val_samples": 4,
        "model.ppo.length_params.max_length": 16,
        "trainer.ppo.val_check_interval": 2,
        "trainer.ppo.max_steps": 3,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.parallel
def test_everything_at_once_is_the_same_on_two_replicas_and_after_a_resume(
    place: Place, stage: Stage, tmp_path: Path
) -> None:
    stage("ppo", *overrides(place, tmp_path / "whole", **EVERYTHING))
    stage("ppo", *overrides(place, tmp_path / "dp2", **EVERYTHING), "trainer.devices=2")
    for steps in (2, 3):
        stage("ppo", *overrides(place, tmp_path / "cut", **EVERYTHING | {"trainer.ppo.max_steps": steps}))
    for tag in CURVES:
        whole = curve(tmp_path / "whole", tag)
        assert len(whole) == (2 if tag.startswith("val") else 3), tag
        # The shorter run validates at its end, too, and the longer one does not stop there.
        if not tag.startswith("val"):
            assert curve(tmp_path / "cut", tag) == whole, tag
        assert np.abs(np.array(curve(tmp_path / "dp2", tag)) - np.array(whole)).max() < 1e-3, tag
    assert len(set(curve(tmp_path / "whole", "train_rollouts/rewards"))) == 3, "every reply has the same reward"
    assert abs(summary(tmp_path / "whole")["ratio_step0"] - 1.0) < 1e-5
    assert len(set(curve(tmp_path / "whole", "train_optim/kl_coefficient"))) == 3
    manifest = json.loads((tmp_path / "whole/checkpoints/step_00000003/manifest.json").read_text())
    assert set(manifest["models"]) == {"model"}, "a critic was built"
    assert len(manifest["counters"]["carried"]["variety"]["texts"]) == 12
    assert not curve(tmp_path / "whole", "critic/loss")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dr_grpo", "gspo", "rloo", "her"])
def test_each_algorithm_runs_and_keeps_its_invariants(
    place: Place, stage: Stage, tmp_path: Path, algorithm: str
) -> None:
    changes = {"algorithm": algorithm, "model.ppo.num_samples_per_prompt": 4, "reward.kind": "rules",
               "reward.rules.length": 4.0, "reward.rules.min_words": 40, "trainer.ppo.max_steps": 2}  # fmt: skip
    stage("ppo", *overrides(place, tmp_path, **changes))
    figures = summary(tmp_path)
    assert abs(figures["ratio_step0"] - 1.0) < 1e-5
    assert figures["logprob_gap_max"] < 1e-4
    assert curve(tmp_path, "train_rollouts/init_policy_kl")[0] == pytest.approx(0.0, abs=1e-5)
    assert curve(tmp_path, "train_rollouts/init_policy_kl")[1] != 0.0, "nothing was learned"
    assert all(np.isfinite(curve(tmp_path, "train_optim/loss")))


@pytest.mark.slow
def test_a_collapsed_policy_stops_the_run_with_a_checkpoint(
    place: Place, her_nemo: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """A limit that any policy breaks: at most one in a thousand replies of one pattern."""
    changes = {"algorithm": "grpo", "model.ppo.num_samples_per_prompt": 4, "reward.kind": "rules",
               "reward.diversity.window": 16, "reward.diversity.max_top1_share": 0.001,
               "reward.diversity.patience": 2, "reward.diversity.action": "stop"}  # fmt: skip
    done = her_nemo("ppo", *overrides(place, tmp_path / "run", **changes), timeout=900)
    assert done.returncode != 0
    assert "step 2: stopped, for the policy has collapsed" in done.stderr
    assert "Traceback" not in done.stderr
    assert curve(tmp_path / "run", "roleplay/collapsed") == [0.0, 1.0]
    assert (tmp_path / "run/checkpoints/step_00000002/manifest.json").is_file()
