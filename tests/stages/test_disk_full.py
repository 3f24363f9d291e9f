"""A disk that fills up while a checkpoint is written: one clear error, nothing that loads, and going on afterwards."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from her_nemo import cli

ROOMY = shutil._ntuple_diskusage(2**40, 0, 2**40)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face directory of 5 MB."""
    config = Qwen3Config(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_disk_that_fills_up_is_said_and_the_same_command_goes_on(
    model: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", f"source={model}", f"out={disk}/out", "shard_bytes=500000", "trainer.accelerator=cpu"]
    words.append("trainer.precision=32")
    assert cli.main(words) == 2
    assert "free space, or write elsewhere" in capsys.readouterr().err

    # The disk was empty when it was looked at, and somebody else fills it meanwhile.
    monkeypatch.setattr("her_nemo.planning.preflight_files.shutil.disk_usage", lambda _: ROOMY)
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "give the same command again" in said
    assert "Traceback" not in said
    assert not (disk / "out").exists()
    partial = disk / "out.partial"
    finished = {file.relative_to(partial): file.stat().st_mtime_ns for file in partial.glob("model/*.distcp")}
    assert finished

    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert cli.main(words) == 0
    assert (disk / "out" / "manifest.json").is_file()
    kept = [name for name, time in finished.items() if (disk / "out" / name).stat().st_mtime_ns == time]
    assert kept, "everything was written again"
