"""A small world, a small random Qwen3 over its tokenizer, and what a run over them wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Place:
    """Where the shared files lie."""

    world: Path
    model: Path


def make_place(home: Path) -> Place:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from her_nemo.data.miniature_files import WorldSizes, write_world
    from her_nemo.data.tokenise import Tokeniser

    sizes = WorldSizes(
        pretrain=200, sft_train=32, sft_val=8, pairs_train=24, pairs_val=8, prompts_train=32, prompts_test=8
    )
    write_world(home / "world", 0, sizes)
    tokeniser = Tokeniser(home / "world" / "tokenizer")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=tokeniser.vocab_size, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
            max_position_embeddings=512, eos_token_id=tokeniser.eos_id, pad_token_id=tokeniser.pad_id,
        )
    )  # fmt: skip
    model.save_pretrained(home / "hf")
    tokeniser.hf.save_pretrained(home / "hf")
    return Place(home / "world", home / "hf")


def overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def supervised(place: Place, kind: str, backend: str, out: Path, **changes: Any) -> list[str]:
    """Overrides of SFT (`kind` "sft") or of the reward model ("rm"): more than one epoch, with validation."""
    train, valid = {"sft": ("sft_train", "sft_val"), "rm": ("pairs_train", "pairs_val")}[kind]
    return overrides(
        {
            "trainer.backend": backend,
            "model.data.train_ds.file_path": place.world / f"{train}.jsonl",
            "model.data.validation_ds.file_path": place.world / f"{valid}.jsonl",
            "model.data.cache_dir": place.world / "cache",
            "pretrained_checkpoint.restore_from_path": place.model,
            "exp_manager.explicit_log_dir": out,
            "model.encoder_seq_length": 384,
            "model.micro_batch_size": 2,
            "model.global_batch_size": 8,
            "model.optim.lr": 2e-3,
            "model.optim.sched.name": "CosineAnnealing",
            "model.optim.sched.warmup_steps": 2,
            f"trainer.{kind}.max_epochs": 3,
            f"trainer.{kind}.max_steps": 7,
            f"trainer.{kind}.val_check_interval": 3,
            f"trainer.{kind}.save_interval": 6,
            **changes,
        }
    )


def ppo(place: Place, reward: Path, backend: str, out: Path, **changes: Any) -> list[str]:
    """Overrides of PPO: one minibatch a rollout, so that its order cannot tell."""
    return overrides(
        {
            "trainer.backend": backend,
            "model.data.train_ds.file_path": place.world / "prompts_train.jsonl",
            "model.data.validation_ds.file_path": place.world / "prompts_test.jsonl",
            "model.data.cache_dir": place.world / "cache",
            "pretrained_checkpoint.restore_from_path": place.model,
            "reward.restore_from_path": reward,
            "exp_manager.explicit_log_dir": out,
            "model.encoder_seq_length": 384,
            "model.micro_batch_size": 4,
            "model.global_batch_size": 8,
            "model.optim.lr": 1e-3,
            "critic.optim.lr": 1e-3,
            "model.ppo.num_rollout_samples": 8,
            "model.ppo.num_val_samples": 8,
            "model.ppo.entropy_bonus": 0.01,
            "model.ppo.length_params.max_length": 16,
            "trainer.ppo.initial_policy_kl_penalty": 0.1,
            "trainer.ppo.val_check_interval": 2,
            "trainer.ppo.save_interval": 2,
            "trainer.ppo.max_steps": 5,
            **changes,
        }
    )


def in_processes(stage: str, words: list[str]) -> None:
    """Run a stage in processes of its own, as trainer.devices says; AssertionError with what it said if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "her_nemo", stage, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def curve(run_dir: Path, tag: str) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["value"] for row in rows if row["tag"] == tag]


def steps(run_dir: Path, tag: str) -> list[int]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["tag"] == tag]


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())
