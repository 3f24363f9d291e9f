"""The demo with one seed, as a newcomer runs it: the model must have learned, not merely run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.demo
def test_demo_learns(her_nemo, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = her_nemo("demo", "seed=0", f"out={out}", timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert str(out / "report.html") in done.stdout
    report = json.loads((out / "report.json").read_text())

    base, sft, ppo = (report["eval"][name] for name in ("base", "sft", "ppo"))
    assert min(model["samples"] for model in (base, sft, ppo)) >= 300
    assert base["oracle_score"] + 0.5 < sft["oracle_score"]
    assert sft["format_valid"] > 0.9
    gain, error = report["gain"]["ppo_over_sft"], report["gain"]["standard_error"]
    assert gain == pytest.approx(ppo["oracle_score"] - sft["oracle_score"], abs=1e-9)
    assert gain > 2 * error > 0
    assert ppo["format_valid"] >= 0.95
    assert ppo["leak_rate"] < sft["leak_rate"]
    assert report["reward_model"]["heldout_accuracy"] >= 0.85
    assert report["ppo"]["ratio_step0"] == pytest.approx(1.0, abs=1e-5)
    assert report["ppo"]["logprob_gap_max"] < 1e-3
    assert report["ppo"]["reward_last"] > report["ppo"]["reward_first"]
    assert report["parity"]["logits_max_abs_diff"] < 1e-4
    assert {"stages", "parity", "reward_model", "ppo", "eval", "versions", "seed"} <= report.keys()

    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert list(out.glob("*/tensorboard/events.*"))
