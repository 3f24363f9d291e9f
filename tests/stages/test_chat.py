"""From talking to training: what a conversation leaves is trained on, and a checkpoint is talked to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stage_files import Place, curve
from streaming_endpoint import GOOD, Reply, StreamingEndpoint
from tiny_qwen3 import tiny_model

ROOT = Path(__file__).resolve().parents[2]

Stage = Callable[..., None]


def talk(lines: str, cwd: Path, *overrides: str, timeout: float = 240) -> str:
    """What `her-nemo chat` says to lines from a pipe."""
    done = subprocess.run(
        [sys.executable, "-m", "her_nemo", "chat", *overrides], input=lines, capture_output=True, text=True,
        timeout=timeout, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_was_said_trains_a_policy_and_a_reward_model(place: Place, stage: Stage, tmp_path: Path) -> None:
    with StreamingEndpoint(lambda request, number: Reply(GOOD.replace("drum", ("drum", "bell")[number % 2]))) as server:
        talk("/ab\na\nWhere is it?\n/ab\nb\n/export\n", tmp_path, f"endpoint={server.url}", "scene=0", "out=chat")
    assert len((tmp_path / "chat" / "samples.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "chat" / "pairs.jsonl").read_text().splitlines()) == 2
    common = [
        f"pretrained_checkpoint.restore_from_path={place.model}", "model.encoder_seq_length=320",
        "model.micro_batch_size=2", "model.global_batch_size=2", "model.optim.lr=1e-2",
    ]  # fmt: skip
    stage(
        "sft", *common, f"model.data.train_ds.file_path={tmp_path / 'chat' / 'samples.jsonl'}",
        "trainer.sft.max_epochs=6", f"exp_manager.explicit_log_dir={tmp_path / 'sft'}",
    )  # fmt: skip
    losses = curve(tmp_path / "sft", "train/loss")
    assert len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]
    stage(
        "reward", *common, f"model.data.train_ds.file_path={tmp_path / 'chat' / 'pairs.jsonl'}",
        "trainer.rm.max_epochs=2", f"exp_manager.explicit_log_dir={tmp_path / 'reward'}",
    )  # fmt: skip
    assert len(curve(tmp_path / "reward", "train/loss")) == 2


@pytest.mark.vllm
@pytest.mark.slow
def test_a_checkpoint_is_served_talked_to_and_its_server_ended(place: Place, tmp_path: Path) -> None:
    from her_nemo.data.tokenise import Tokeniser

    tiny_model(tmp_path / "hf", tokenizer=Tokeniser(place.world / "tokenizer").hf)
    said = talk(
        "/quit\n", tmp_path, f"checkpoint={tmp_path / 'hf'}", f"scenes={place.world / 'prompts_test.jsonl'}", "scene=0",
        "out=chat", "sampling.max_tokens=24", "sampling.seed=5", timeout=280,
    )  # fmt: skip
    prompt = json.loads((place.world / "prompts_test.jsonl").open().readline())
    name = prompt["messages"][0]["content"].split(" from ")[0].removeprefix("You are ")
    assert f"The model plays {name}" in said
    # A random model never ends: its reply is cut off at 24 tokens.
    assert "cut off before its end" in said
    assert "vLLM" in (tmp_path / "chat" / "server.log").read_text(errors="replace")
    servers = subprocess.run(["pgrep", "-f", str(tmp_path / "hf")], capture_output=True, text=True, check=False).stdout
    assert servers == ""
