"""benchmarks/gpu_step.py runs here on the CPU, small, refuses to pretend, and picks what the planner says fits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from her_nemo.planning import timing
from her_nemo.planning.shapes import Shape

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_step.py"


@pytest.fixture(scope="module")
def gpu_step():
    spec = importlib.util.spec_from_file_location("gpu_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(*words: str) -> subprocess.CompletedProcess[str]:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], env=hidden, capture_output=True, text=True, timeout=900, check=False
    )


def test_without_cuda_it_says_so_in_one_line() -> None:
    done = start()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().splitlines() == [
        "gpu_step: torch sees no CUDA here. Run it where a GPU is, or small with --device cpu --model qwen3_tiny."
    ]


@pytest.mark.slow
def test_it_runs_small_on_a_cpu(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--model", "qwen3_tiny", "--sequence", "64", "--rows", "2", "--steps", "2", "--warmup",
             "1", "--json", str(tmp_path / "out.json")]  # fmt: skip
    done = start(*words)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["lines"]) == ["ours, 32", "transformers"]
    shape = Shape(4, 128, 512, 4, 2, 32, 1152, tied=True)
    for name, line in report["lines"].items():
        assert name in done.stdout
        # A random model says about log(1152) = 7.05; AdamW at 1e-5 barely moves it.
        assert 6 < line["last_loss"] < 12
        assert line["tokens_per_second"] == pytest.approx(128 / line["seconds"])
        assert line["tflops"] == pytest.approx(timing.model_flops(shape, 128, 64) / line["seconds"] / 1e12)
        assert line["mfu"] is None
        assert line["memory_bytes"] > 1e8
    assert report["versions"]["transformer-engine"] == "absent"
    assert report["setting"]["model"] == "qwen3_tiny"


def test_the_largest_that_fits_is_the_planners(gpu_step) -> None:
    h100, h200 = 85_520_809_984, 150_754_820_096
    model, precision, recompute = next(gpu_step.fitting(gpu_step.SIZES, 4096, 1, "h100_80gb", h100))
    assert model == "qwen3_1_7b"
    larger, _, _ = next(gpu_step.fitting(gpu_step.SIZES, 4096, 1, "h200_141gb", h200))
    assert larger == "qwen3_4b"
    fits = gpu_step.plan(model, 4096, 1, precision, recompute, "h100_80gb").peak.total
    assert fits <= 0.95 * h100
    above = gpu_step.SIZES[gpu_step.SIZES.index(model) - 1]
    assert all(gpu_step.plan(above, 4096, 1, *setting, "h100_80gb").peak.total > 0.95 * h100
               for setting in gpu_step.SETTINGS)  # fmt: skip
    assert not list(gpu_step.fitting(gpu_step.SIZES, 4096, 1, "h100_80gb", 2 * 10**9))


def test_devices_are_known_by_their_names(gpu_step) -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100_80gb", "NVIDIA H200": "h200_141gb", "NVIDIA A100-SXM4-80GB": "a100_80gb"}
    assert {name: gpu_step.gpu_name(name) for name in names} == names
    assert gpu_step.gpu_name("Tesla T4") is None


def test_what_runs_out_of_memory_is_a_line_and_what_fails_an_error(gpu_step) -> None:
    report = {"device": "x", "setting": {"model": "m", "rows": 1, "sequence": 2, "recompute": {}},
              "lines": {"transformers": {"error": "out of memory", "said": ""}}}  # fmt: skip
    assert "transformers          out of memory" in gpu_step.table(report)
    broken = gpu_step.in_a_process({"device": "cpu", "what": "ours", "precision": "no such", "fp8": None})
    assert broken["error"] == "exit code 1"
    assert "no such" in broken["said"]
