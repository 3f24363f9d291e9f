"""trainer.backend=nemo_aligner is refused, with what to do, where it cannot run or would mean something else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from her_nemo.config import compose
from her_nemo.planning import backend_checks

ROOT = Path(__file__).resolve().parents[2]
SFT = [
    "trainer.backend=nemo_aligner",
    "model.data.train_ds.file_path=a.jsonl",
    "pretrained_checkpoint.restore_from_path=model",
]
HERE = importlib.util.find_spec("nemo_aligner") is not None


def problems(stage: str, *overrides: str) -> dict[str, str]:
    found = backend_checks.check(compose.load(stage, [*SFT, *overrides]))
    return {problem.key: f"{problem.message} {problem.hint}" for problem in found}


@pytest.mark.skipif(HERE, reason="NeMo-Aligner is installed here")
def test_without_the_package_the_command_says_how_to_get_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "her_nemo", "sft", *SFT],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "trainer.backend" in done.stderr
    assert "make setup-nemo" in done.stderr


def test_what_its_trainers_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_checks, "PACKAGES", ())
    assert problems("sft") == {}
    valid = "model.data.validation_ds.file_path=b.jsonl"
    found = problems("sft", valid, "trainer.sft.save_interval=25", "trainer.sft.val_check_interval=10")
    assert "trainer.sft.save_interval=30" in found["trainer.sft.save_interval"]
    assert problems("reward", "trainer.rm.save_interval=25", "trainer.rm.val_check_interval=10") == {}
    found = problems(
        "ppo", "reward.restore_from_path=r", "trainer.ppo.max_epochs=2", "model.data.layer_weights.speech=2.0"
    )
    assert set(found) == {"trainer.ppo.max_epochs", "model.data.layer_weights"}


def test_keys_that_would_have_no_effect_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_checks, "PACKAGES", ())
    given = ["reward.restore_from_path=r", "model.ppo.ratio_eps=0.1", "trainer.ppo.gae_lambda=0.9"]
    assert problems("ppo", *given) == {}
    known = backend_checks.PPO_KEYS["model.ppo"].replace(" ratio_eps", "")
    monkeypatch.setitem(backend_checks.PPO_KEYS, "model.ppo", known)
    assert set(problems("ppo", *given)) == {"model.ppo.ratio_eps"}


def test_our_own_backend_asks_for_nothing() -> None:
    assert problems("sft", "trainer.backend=native", "trainer.sft.save_interval=25") == {}
