"""PPO under PPOTrainer with the critic in the process: our loop's rollouts, advantages and updates, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from aligner_files import Place, curve, in_processes, ppo, steps, summary, supervised

pytestmark = pytest.mark.nemo

Stage = Callable[..., None]


@pytest.fixture(scope="module")
def reward(place: Place, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reward")
    stage("reward", *supervised(place, "rm", "native", run, **{"trainer.rm.max_steps": 3}))
    return run


def test_curves_are_those_of_our_loop(place: Place, reward: Path, stage: Stage, tmp_path: Path) -> None:
    """Five steps: the same replies, rewards, ratios, losses and norms of actor and critic, and validation rewards."""
    native, theirs = tmp_path / "native", tmp_path / "theirs"
    stage("ppo", *ppo(place, reward, "native", native))
    stage("ppo", *ppo(place, reward, "nemo_aligner", theirs))
    assert len(set(curve(native, "train_rollouts/rewards"))) == 5
    for tag in (
        "train_rollouts/rewards", "val_rollouts/rewards", "train_optim/loss", "train_optim/ppo_ratio",
        "train_optim/grad_norm", "critic/loss", "critic/value", "critic/return", "critic/grad_norm",
    ):  # fmt: skip
        ours, found = np.array(curve(native, tag)), np.array(curve(theirs, tag))
        assert steps(native, tag) == steps(theirs, tag), tag
        assert np.allclose(ours, found, rtol=1e-5, atol=1e-5), (tag, ours, found)
    assert steps(theirs, "train_rollouts/rewards") == [1, 2, 3, 4, 5]
    replies = np.array(curve(theirs, "train_rollouts/generation_length"))
    assert np.allclose(replies, curve(native, "train_rollouts/response_lengths"))
    figures, mine = summary(theirs), summary(native)
    assert abs(figures["ratio_step0"] - 1.0) < 1e-5
    assert figures["logprob_gap_max"] < 1e-4
    assert figures["kl_last"] != 0.0
    for key in ("reward_first", "reward_last", "kl_last", "val_reward"):
        assert figures[key] == pytest.approx(mine[key], abs=1e-5), key


def test_warm_up_several_minibatches_and_resume(
    place: Place, reward: Path, stage: Stage, tmp_path: Path
) -> None:
    """The critic learns alone first; a run that was cut goes on as the one that was not."""
    changes = {"trainer.ppo.critic_warmup_steps": 1, "model.global_batch_size": 4, "trainer.ppo.max_steps": 3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stage("ppo", *ppo(place, reward, "nemo_aligner", whole, **changes))
    assert steps(whole, "train_rollouts/rewards") == [1, 2, 3, 4]
    assert steps(whole, "critic/loss") == [1, 2, 3, 4]
    assert steps(whole, "train_optim/loss") == [2, 3, 4]
    assert curve(whole, "train_rollouts/init_policy_kl")[:2] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert abs(curve(whole, "train_rollouts/init_policy_kl")[-1]) > 1e-4
    stage("ppo", *ppo(place, reward, "nemo_aligner", cut, **changes | {"trainer.ppo.max_steps": 2}))
    stage("ppo", *ppo(place, reward, "nemo_aligner", cut, **changes))
    for tag in ("train_rollouts/rewards", "critic/loss", "train_optim/loss"):
        assert steps(cut, tag) == steps(whole, tag), tag
        assert curve(cut, tag) == pytest.approx(curve(whole, tag), abs=1e-5), tag


@pytest.mark.parallel
def test_two_replicas(place: Place, reward: Path, tmp_path: Path) -> None:
    """NeMo-Aligner gathers a rollout over the replicas and deals it out again: the same steps as ours over gloo."""
    changes = {"trainer.devices": 2, "trainer.ppo.max_steps": 2}
    for backend in ("native", "nemo_aligner"):
        in_processes("ppo", ppo(place, reward, backend, tmp_path / backend, **changes))
    for tag in ("train_rollouts/rewards", "val_rollouts/rewards", "train_optim/grad_norm", "critic/loss"):
        ours, found = (np.array(curve(tmp_path / backend, tag)) for backend in ("native", "nemo_aligner"))
        assert np.allclose(ours, found, rtol=1e-5, atol=1e-5), (tag, ours, found)
