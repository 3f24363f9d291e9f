"""Memory of a conversion does not grow with the model, nor with its largest tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from her_nemo.megatron import safetensors_files
from her_nemo.megatron.qwen3 import Qwen3Shape
from her_nemo.megatron.qwen3_map import hf_shapes

ROOT = Path(__file__).resolve().parents[2]
WIDE = Qwen3Shape(
    num_layers=1, hidden_size=2048, ffn_hidden_size=2560, num_attention_heads=4, num_query_groups=2, kv_channels=64,
    vocab_size=151_936, tied=True,
)  # fmt: skip
EMBEDDING_BYTES = 4 * 151_936 * 2048
LIMIT = 1_000_000_000


# The kernel's own high-water mark of this program. rusage would count the test process too, whose pages a child
# has until it starts its program.
MEASURED = """
import sys
from her_nemo.cli import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")))
sys.exit(code)
"""


def peak(*words: str) -> int:
    """Peak resident bytes of `her-nemo WORDS`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split("VmHWM:")[1].split()[0])


@pytest.mark.slow
def test_peak_memory_is_below_the_largest_tensor(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    # Nothing is written into the file: all zeros, and hardly any space on the disk.
    writer = safetensors_files.TensorFileWriter(source / "model.safetensors", hf_shapes(WIDE, "lm"), torch.float32)
    writer.finish()
    os.truncate(source / "model.safetensors", writer.size)
    (source / "config.json").write_text(json.dumps(WIDE.to_hf_config()))
    assert EMBEDDING_BYTES > LIMIT
    out = tmp_path / "m"
    assert peak("convert", f"source={source}", f"out={out}", "trainer.precision=bf16-mixed") < LIMIT
    assert peak("verify", str(source), str(out)) < LIMIT
