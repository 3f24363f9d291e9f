"""SFT, reward model and PPO through the command line: the same curve at every layout, resume, export with proof."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stage_files import Place, curve, summary

Stage = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "tp1": (1, 1, 1),
    "tp2": (2, 2, 1),
    "pp2": (2, 1, 2),
    "dp2": (2, 1, 1),
    "tp2_pp2": (4, 2, 2),
}
STEPS, LR, BATCH = 20, 2e-3, 4


def layout_of(name: str) -> list[str]:
    processes, tensor, pipeline = LAYOUTS[name]
    return [
        f"trainer.devices={processes}",
        f"model.tensor_model_parallel_size={tensor}",
        f"model.pipeline_model_parallel_size={pipeline}",
    ]


def sft_overrides(place: Place, out: Path, **changes: object) -> list[str]:
    values = {
        "model.data.train_ds.file_path": place.world / "sft_train.jsonl",
        "pretrained_checkpoint.restore_from_path": place.model,
        "exp_manager.explicit_log_dir": out,
        "model.encoder_seq_length": 384,
        "model.micro_batch_size": 2,
        "model.global_batch_size": BATCH,
        "model.optim.lr": LR,
        "trainer.sft.max_steps": STEPS,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def plain_torch_losses(place: Place) -> list[float]:
    """The same batches through transformers and torch's AdamW."""
    from transformers import Qwen3ForCausalLM

    from her_nemo.data.loaders import GlobalBatchSampler, collate
    from her_nemo.data.sources import read_jsonl
    from her_nemo.data.tokenise import Tokeniser, encode_all, encode_sample

    tokeniser = Tokeniser(place.model)
    rows, _ = read_jsonl(place.world / "sft_train.jsonl", "sft")
    samples, _ = encode_all(encode_sample, tokeniser, rows, 384)
    model = Qwen3ForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-8)
    losses: list[float] = []
    for indices in GlobalBatchSampler(len(samples), BATCH, 1234, True):
        batch = collate([samples[int(i)] for i in indices], tokeniser.pad_id)
        log_probs = model(batch["tokens_BS"]).logits[:, :-1].log_softmax(-1)
        nll = -log_probs.gather(-1, batch["tokens_BS"][:, 1:, None]).squeeze(-1)
        loss = (nll * batch["loss_mask_BT"]).sum() / batch["loss_mask_BT"].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) == STEPS:
            break
    return losses


@pytest.mark.parallel
def test_sft_curve_is_the_same_at_every_layout_and_in_plain_torch(
    place: Place, stage: Stage, tmp_path: Path
) -> None:
    expected = plain_torch_losses(place)
    assert expected[-1] < expected[0] - 0.5, "the reference itself does not learn"
    for name in LAYOUTS:
        stage("sft", *sft_overrides(place, tmp_path / name), *layout_of(name))
        found = curve(tmp_path / name, "train/loss")
        assert len(found) == STEPS
        assert np.abs(np.array(found) - np.array(expected)).max() < 1e-4, name


@pytest.mark.slow
def test_resume_gives_the_same_bits(place: Place, stage: Stage, tmp_path: Path) -> None:
    """Twelve steps in one go, and eight with a stop and four more: equal losses and equal weights."""
    stage("sft", *sft_overrides(place, tmp_path / "whole", **{"trainer.sft.max_steps": 12}))
    cut = sft_overrides(place, tmp_path / "cut", **{"trainer.sft.max_steps": 8})
    stage("sft", *cut)
    stage("sft", *sft_overrides(place, tmp_path / "cut", **{"trainer.sft.max_steps": 12}))
    assert curve(tmp_path / "whole", "train/loss") == curve(tmp_path / "cut", "train/loss")
    for name in ("whole", "cut"):
        stage("export", f"checkpoint={tmp_path / name}", f"out={tmp_path / (name + '_hf')}", "dtype=float32")
    whole, again = (load_file(tmp_path / f"{name}_hf" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parallel
def test_packed_curve_is_the_unpacked_curve(place: Place, stage: Stage, tmp_path: Path) -> None:
    """Also from one cache for all runs, which only the first one fills."""
    changes = {
        "trainer.sft.max_steps": 6,
        "model.data.cache_dir": tmp_path / "cache",
        "model.data.validation_ds.file_path": place.world / "sft_val.jsonl",
    }
    stage("sft", *sft_overrides(place, tmp_path / "plain", **changes))
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    assert len(made) == 8
    for name in ("tp1", "dp2", "tp2_pp2"):
        run = tmp_path / name
        stage("sft", *sft_overrides(place, run, **changes, **{"model.data.packing": True}), *layout_of(name))
        for tag in ("train/loss", "val/loss", "layers/role_thinking/loss"):
            found, expected = np.array(curve(run, tag)), np.array(curve(tmp_path / "plain", tag))
            assert len(found) >= 1
            assert np.abs(found - expected).max() < 1e-4, (name, tag)
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    assert not (tmp_path / "plain" / "cache").exists()


@pytest.mark.slow
def test_weights_by_kind_train_what_they_weigh(place: Place, stage: Stage, tmp_path: Path) -> None:
    """Only role actions count: their loss falls more than with equal weights, the plan's hardly."""
    fell = {}
    off = {f"model.data.layer_weights.{kind}": 0.0 for kind in ("system_thinking", "role_thinking", "speech")}
    for name, weights in (("even", {}), ("actions", off)):
        stage("sft", *sft_overrides(place, tmp_path / name, **weights))
        for kind in ("system_thinking", "role_action"):
            values = curve(tmp_path / name, f"layers/{kind}/loss")
            fell[name, kind] = values[0] - values[-1]
    assert fell["actions", "role_action"] > fell["even", "role_action"]
    assert fell["actions", "system_thinking"] < fell["even", "system_thinking"] / 2


@pytest.mark.slow
def test_convert_and_export_return_every_bit(place: Place, stage: Stage, tmp_path: Path) -> None:
    stage("convert", f"source={place.model}", f"out={tmp_path / 'megatron'}")
    stage("export", f"checkpoint={tmp_path / 'megatron'}", f"out={tmp_path / 'hf'}", "dtype=float32")
    before, after = load_file(place.model / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    proof = json.loads((tmp_path / "hf" / "proof.json").read_text())
    assert proof["logits_max_abs_diff"] < 1e-4
    assert proof["top1_agreement"] == 1.0
    assert not (tmp_path / "hf.partial").exists()


def reward_overrides(place: Place, out: Path) -> list[str]:
    return [
        f"model.data.train_ds.file_path={place.world / 'pairs_train.jsonl'}",
        f"model.data.validation_ds.file_path={place.world / 'pairs_val.jsonl'}",
        f"pretrained_checkpoint.restore_from_path={place.model}",
        f"exp_manager.explicit_log_dir={out}",
        "model.encoder_seq_length=384", "model.micro_batch_size=2", "model.global_batch_size=4",
        "trainer.rm.max_steps=4", "model.optim.lr=1e-3",
    ]


def ppo_overrides(place: Place, reward: Path, out: Path, **changes: object) -> list[str]:
    values = {
        "model.data.train_ds.file_path": place.world / "prompts_train.jsonl",
        "model.data.validation_ds.file_path": place.world / "prompts_test.jsonl",
        "pretrained_checkpoint.restore_from_path": place.model,
        "reward.restore_from_path": reward,
        "exp_manager.explicit_log_dir": out,
        "model.encoder_seq_length": 384,
        "model.micro_batch_size": 2,
        "model.global_batch_size": 4,
        "model.optim.lr": 1e-3,
        "critic.optim.lr": 1e-3,
        "model.ppo.num_rollout_samples": 8,
        "model.ppo.num_val_samples": 8,
        "model.ppo.length_params.max_length": 16,
        "trainer.ppo.val_check_interval": 2,
        "trainer.ppo.critic_warmup_steps": 1,
        "trainer.ppo.max_steps": 3,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


PPO_CURVES = (
    "train_rollouts/rewards",
    "train_rollouts/response_lengths",
    "val_rollouts/rewards",
    "train_optim/loss",
    "critic/loss",
)


@pytest.mark.parallel
def test_reward_model_and_ppo_at_every_layout(place: Place, stage: Stage, tmp_path: Path) -> None:
    """The curves of both, and PPO's invariants, hold however the models are cut and the batch is dealt out."""
    losses, found = {}, {}
    for name in ("tp1", "tp2", "pp2", "dp2"):
        stage("reward", *reward_overrides(place, tmp_path / f"reward_{name}"), *layout_of(name))
        losses[name] = np.array(curve(tmp_path / f"reward_{name}", "train/loss"))
        assert np.abs(losses[name] - losses["tp1"]).max() < 1e-4, name
        assert 0.0 <= summary(tmp_path / f"reward_{name}")["heldout_accuracy"] <= 1.0
    for name in ("tp1", "tp2", "pp2", "dp2"):
        run = tmp_path / f"ppo_{name}"
        stage("ppo", *ppo_overrides(place, tmp_path / "reward_tp1", run), *layout_of(name))
        figures = summary(run)
        assert abs(figures["ratio_step0"] - 1.0) < 1e-5, name
        assert figures["logprob_gap_max"] < 1e-4, name
        assert curve(run, "train_rollouts/init_policy_kl")[0] == pytest.approx(0.0, abs=1e-5)
        found[name] = {tag: np.array(curve(run, tag)) for tag in PPO_CURVES}
        for tag, values in found[name].items():
            assert np.abs(values - found["tp1"][tag]).max() < 1e-3, (name, tag)
    # Four rollouts, two of them followed by a validation; the actor moves in three.
    assert [len(found["tp1"][tag]) for tag in PPO_CURVES] == [4, 4, 2, 3, 4]


@pytest.mark.slow
def test_ppo_resume_gives_the_same_bits(place: Place, stage: Stage, tmp_path: Path) -> None:
    """Four steps in one go, and three and one: actor, critic, samples and summary come out the same."""
    stage("reward", *reward_overrides(place, tmp_path / "reward"))
    stage("ppo", *ppo_overrides(place, tmp_path / "reward", tmp_path / "whole"))
    for steps in (2, 3):
        changes = {"trainer.ppo.max_steps": steps}
        stage("ppo", *ppo_overrides(place, tmp_path / "reward", tmp_path / "cut", **changes))
    for tag in PPO_CURVES[:2] + PPO_CURVES[3:]:
        assert curve(tmp_path / "whole", tag) == curve(tmp_path / "cut", tag), tag
    whole, cut = summary(tmp_path / "whole"), summary(tmp_path / "cut")
    assert {key: value for key, value in whole.items() if key != "seconds"} == {
        key: value for key, value in cut.items() if key != "seconds"
    }


@pytest.mark.slow
def test_a_stop_signal_saves_and_the_run_goes_on_from_there(place: Place, stage: Stage, tmp_path: Path) -> None:
    """SIGTERM, as Slurm sends it: the step is finished, the checkpoint written, the exit code 0."""
    run = tmp_path / "run"
    overrides = sft_overrides(place, run, **{"trainer.sft.save_interval": 1000})
    with subprocess.Popen(
        [sys.executable, "-m", "her_nemo", "sft", *overrides],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        metrics = run / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    stopped = len(curve(run, "train/loss"))
    assert 2 <= stopped < STEPS, "it ran to its end before the signal came"
    assert (run / "checkpoints" / f"step_{stopped:08d}" / "manifest.json").is_file()
    stage("sft", *overrides)
    stage("sft", *sft_overrides(place, tmp_path / "whole"))
    assert curve(run, "train/loss") == curve(tmp_path / "whole", "train/loss")
