"""SFT, reward model and one PPO step on a GPU, started as a user starts them, and the export of what they made."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = ["trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "model.encoder_seq_length=256",
          "model.global_batch_size=8", "model.micro_batch_size=4"]  # fmt: skip


def her_nemo(stage: str, *overrides: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "her_nemo", stage, *overrides], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def curve(run: Path, tag: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["value"] for row in rows if row["tag"] == tag]


def test_the_line_from_sft_to_ppo_and_out(tmp_path: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from her_nemo.data.miniature_files import WorldSizes, write_world
    from her_nemo.data.tokenise import Tokeniser

    world = tmp_path / "world"
    write_world(world, 0, WorldSizes(pretrain=400, sft_train=96, sft_val=16, pairs_train=48, pairs_val=16,
                                     prompts_train=48, prompts_test=16))  # fmt: skip
    tokeniser = Tokeniser(world / "tokenizer")
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=tokeniser.vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=512, eos_token_id=tokeniser.eos_id, pad_token_id=tokeniser.pad_id,
    ))  # fmt: skip
    base.save_pretrained(tmp_path / "hf")
    tokeniser.hf.save_pretrained(tmp_path / "hf")
    train = {kind: world / f"{kind}_train.jsonl" for kind in ("sft", "pairs", "prompts")}
    start = f"pretrained_checkpoint.restore_from_path={tmp_path / 'hf'}"
    sft, reward, ppo = (tmp_path / name for name in ("sft", "reward", "ppo"))
    her_nemo("sft", start, f"model.data.train_ds.file_path={train['sft']}", f"exp_manager.explicit_log_dir={sft}",
             "trainer.sft.max_steps=6", "model.optim.lr=2e-3", *ON_GPU)  # fmt: skip
    found = curve(sft, "train/loss")
    assert len(found) == 6
    assert found[-1] < found[0]
    trained = f"pretrained_checkpoint.restore_from_path={sft}"
    her_nemo("reward", trained, f"model.data.train_ds.file_path={train['pairs']}", "trainer.rm.max_steps=3",
             f"exp_manager.explicit_log_dir={reward}", *ON_GPU)  # fmt: skip
    assert all(map(math.isfinite, curve(reward, "train/loss")))
    her_nemo("ppo", trained, f"reward.restore_from_path={reward}", f"model.data.train_ds.file_path={train['prompts']}",
             f"exp_manager.explicit_log_dir={ppo}", "trainer.ppo.max_steps=1", "model.ppo.num_rollout_samples=16",
             "model.ppo.length_params.max_length=64", *ON_GPU)  # fmt: skip
    assert max(curve(ppo, "rollout/logprob_gap_max")) < 0.5
    assert curve(ppo, "train_optim/ppo_ratio")[0] == pytest.approx(1.0, abs=0.05)
    her_nemo("export", f"checkpoint={ppo}", f"out={tmp_path / 'out'}", "trainer.accelerator=gpu")
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["top1_agreement"] > 0.99
