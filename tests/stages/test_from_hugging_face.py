"""Every stage starts from a Hugging Face directory as from the Megatron checkpoint made of it: the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversion_files import load
from stage_files import Place, curve

from her_nemo.megatron import parallel, qwen3, weights
from her_nemo.megatron.qwen3 import Qwen3Shape
from her_nemo.stages import convert, ppo, reward, sft


@pytest.fixture(scope="module")
def starts(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Form ("hf", "megatron") -> the directories of a language model, a reward model and a critic."""
    home = tmp_path_factory.mktemp("starts")
    found = {"hf": {"lm": place.model}, "megatron": {}}
    parallel.initialize(seed=3)
    try:
        for seed, name in enumerate(("reward", "critic")):
            torch.manual_seed(seed)
            model = qwen3.build(Qwen3Shape.from_hf_dir(place.model), head="scalar", trainable=False)
            model.bare().output_layer.weight.normal_()
            weights.save_hf(model, home / name)
            found["hf"][name] = home / name
    finally:
        parallel.destroy()
    for name, directory in found["hf"].items():
        out = home / f"{name}_megatron"
        convert.run(load("convert", source=directory, out=out, trainer__precision="32"))
        found["megatron"][name] = out
    return found


def settings(place: Place, data: str, start: Path, out: Path) -> dict[str, object]:
    return {
        "model.data.train_ds.file_path": place.world / data, "pretrained_checkpoint.restore_from_path": start,
        "model.tokenizer.path": place.model, "exp_manager.explicit_log_dir": out, "model.encoder_seq_length": 384,
        "model.micro_batch_size": 2, "model.global_batch_size": 4,
    }  # fmt: skip


@pytest.mark.parametrize(("stage", "data"), [("sft", "sft_train.jsonl"), ("reward", "pairs_train.jsonl")])
def test_training_starts_from_hugging_face(
    stage: str, data: str, place: Place, starts: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    run, steps = {"sft": (sft.run, "trainer.sft.max_steps"), "reward": (reward.run, "trainer.rm.max_steps")}[stage]
    for form in starts:
        values = settings(place, data, starts[form]["lm"], tmp_path / form) | {steps: 2}
        assert run(load(stage, **values)) in (0, None)
    losses = curve(tmp_path / "hf", "train/loss")
    assert len(losses) == 2
    assert losses == curve(tmp_path / "megatron", "train/loss")


def test_ppo_starts_actor_reward_and_critic_from_hugging_face(
    place: Place, starts: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    runs = {"hf": starts["hf"], "megatron": starts["megatron"], "no_critic": starts["hf"] | {"critic": None}}
    for name, start in runs.items():
        values = settings(place, "prompts_train.jsonl", start["lm"], tmp_path / name) | {
            "reward.restore_from_path": start["reward"], "model.ppo.num_rollout_samples": 4,
            "model.ppo.num_val_samples": 0, "model.ppo.length_params.max_length": 8,
            "trainer.ppo.critic_warmup_steps": 0, "trainer.ppo.max_steps": 1,
        }  # fmt: skip
        if start["critic"]:
            values["critic.restore_from_path"] = start["critic"]
        assert ppo.run(load("ppo", **values)) in (0, None)
    for tag in ("train_rollouts/rewards", "train_optim/loss", "critic/loss"):
        assert len(curve(tmp_path / "hf", tag)) == 1
        assert curve(tmp_path / "hf", tag) == curve(tmp_path / "megatron", tag), tag
    # The critic is the one that was named, not the reward model that stands in where none is.
    assert curve(tmp_path / "hf", "train_rollouts/rewards") == curve(tmp_path / "no_critic", "train_rollouts/rewards")
    assert curve(tmp_path / "hf", "critic/loss") != curve(tmp_path / "no_critic", "critic/loss")
