"""The command line as a user types it: what it answers, with which exit code, and never with a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from her_nemo.config.errors import spoken
from her_nemo.config.schema import STAGES

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.fixture
def sft(tmp_path: Path) -> list[str]:
    """The words of an SFT command that nothing is wrong with so far as preflight can see."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "train.jsonl").write_text("{}\n")
    return [
        "sft",
        "pretrained_checkpoint.restore_from_path=hf",
        "model.data.train_ds.file_path=train.jsonl",
        "model.encoder_seq_length=512",
    ]


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one clear message on stderr that has `words`, no traceback, nothing on stdout."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("her-nemo: ")
    for word in words:
        assert word in done.stderr


def test_help_and_version(her_nemo) -> None:
    for words in ([], ["--help"], ["-h"]):
        done = her_nemo(*words)
        assert done.returncode == 0
        for stage in STAGES:
            assert f"  {spoken(stage)} " in done.stdout
    assert her_nemo("--version").stdout == "her-nemo 0.1.0\n"
    done = her_nemo("ppo", "--help")
    assert done.returncode == 0
    assert "trainer.ppo.initial_policy_kl_penalty = 0.02" in done.stdout


def test_the_installed_command(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "her-nemo"
    if not command.exists():
        pytest.skip("her-nemo is not installed in this environment (make setup installs it)")
    done = subprocess.run(
        [command, "sft", "trainer.devises=2"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    refused(done, "did you mean trainer.devices?")


def test_a_wrong_stage(her_nemo) -> None:
    refused(her_nemo("sfft"), "did you mean 'sft'?")


def test_a_wrong_key(her_nemo, sft: list[str]) -> None:
    refused(
        her_nemo(*sft, "model.tensor_model_paralel_size=2"), "did you mean model.tensor_model_parallel_size?"
    )


def test_a_wrong_group_choice(her_nemo, sft: list[str]) -> None:
    refused(her_nemo(*sft, "model=qwen3_33b"), "did you mean model=qwen3_32b?")


def test_a_wrong_type(her_nemo, sft: list[str]) -> None:
    refused(
        her_nemo(*sft, "trainer.devices=two"), "trainer.devices: given 'two' (text), wanted a whole number"
    )


def test_a_missing_file(her_nemo, sft: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").unlink()
    refused(her_nemo(*sft), "model.data.train_ds.file_path: train.jsonl: no such file")


def test_a_tp_that_does_not_divide_the_heads(her_nemo, sft: list[str]) -> None:
    done = her_nemo(*sft, "model.tensor_model_parallel_size=3", "trainer.devices=3")
    refused(
        done, "3 does not divide model.num_attention_heads = 4", "use model.tensor_model_parallel_size=1 or 2"
    )


def test_several_errors_at_once(her_nemo, sft: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").unlink()
    done = her_nemo(*sft, "model.tensor_model_parallel_size=3", "trainer.devises=3", "model.lr=1e-4")
    refused(
        done, "6 problems", "did you mean trainer.devices?", "did you mean model.optim.lr?", "no such file"
    )
    refused(done, "does not divide model.num_attention_heads", "not a multiple of TP 3 x PP 1")


def test_an_option_that_is_none(her_nemo) -> None:
    refused(her_nemo("sft", "--devices", "2"), "no option '--devices'")
    refused(her_nemo("sft", "--config-dir"), "--config-dir needs a value")


def test_several_nodes_and_nobody_started_them(her_nemo, sft: list[str]) -> None:
    refused(
        her_nemo(*sft, "trainer.num_nodes=2", "trainer.devices=2"), "torchrun --nnodes 2 --nproc-per-node 2"
    )


def test_errors_come_before_torch_is_imported(her_nemo, sft: list[str], tmp_path: Path) -> None:
    # A torch that cannot be imported stands first in the path: the errors must not need it.
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = her_nemo(*sft, "trainer.devises=2", PYTHONPATH=f"{tmp_path}:{ROOT}")
    refused(done, "did you mean trainer.devices?")


def test_two_processes_of_its_own_show_an_error_once(her_nemo, sft: list[str]) -> None:
    done = her_nemo(*sft, "trainer.devices=2", "trainer.devises=2")
    refused(done)
    assert done.stderr.count("did you mean trainer.devices?") == 1


@pytest.mark.parallel
def test_a_malformed_line_in_two_processes_is_one_error(her_nemo, sft: list[str], tmp_path: Path) -> None:
    _tokenizer(tmp_path / "hf")
    (tmp_path / "train.jsonl").write_text('{"trace_id": "a", "messages": \n')
    done = her_nemo(*sft, "trainer.devices=2", "model.global_batch_size=2", timeout=180)
    refused(done, "train.jsonl:1")
    assert done.stderr.count("train.jsonl:1") == 1


@pytest.mark.parallel
def test_under_torchrun_rank_0_alone_complains(sft: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "her_nemo",
    ]
    done = subprocess.run(
        [*command, *sft, "trainer.devices=2", "trainer.devises=2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env={**_environment()},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("did you mean trainer.devices?") == 1
    assert "her_nemo/cli.py" not in done.stderr


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with the special tokens, so that the stage gets as far as its data."""
    from her_nemo.data.tokenizer import train_tokenizer

    train_tokenizer(["a few words to learn from"] * 20, folder, vocab_size=400)


def test_plan_and_config_are_commands(her_nemo, sft: list[str]) -> None:
    done = her_nemo("plan", *sft, "trainer.accelerator=cpu", "model.num_layers=5")
    assert done.returncode == 2, done.stderr
    assert "given 5, but the checkpoint has 4" in done.stdout
    assert "train.jsonl:1: has no messages" in done.stdout
    done = her_nemo("config", "diff", *sft)
    assert done.returncode == 0, done.stderr
    assert "model.encoder_seq_length = 512" in done.stdout
    refused(her_nemo("config", "explain", "model.optim.lrr"), "did you mean model.optim.lr?")
    refused(her_nemo("plan", "sftt"), "did you mean 'sft'?")


def test_a_gpu_that_is_not_there_is_refused(her_nemo, sft: list[str]) -> None:
    refused(her_nemo(*sft, "trainer.accelerator=gpu", CUDA_VISIBLE_DEVICES=""), "torch sees no CUDA here")


def test_keys_of_nemo_aligner_are_answered_before_the_run(her_nemo, sft: list[str]) -> None:
    done = her_nemo(*sft, "model.megatron_amp_O2=true", "model.micro_batch_size=3")
    refused(done, "model.global_batch_size")
    assert "model.megatron_amp_O2 has no effect: the optimizer always steps fp32 main weights" in done.stderr
