"""What benchmarks/ppo_step.py and experiments/collapse/plot.py make of figures: medians, ratios, what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ppo_step() -> ModuleType:
    return script("benchmarks/ppo_step.py")


JOB = {"samples": 8, "tokens": 5, "steps": 3, "threads": 1}


def turn(steps: list[float], **changes: object) -> dict:
    parts = [{"step": s, "processor": s / 2, "generate": s / 8, "actor": s / 4} for s in steps]
    return {"steps": parts, "tokens": [40, 40, 40], "prompts": [[[1, 2], [3]]] * 3, "threads": 1} | changes


def test_medians_leave_out_the_first_step_of_each_turn(ppo_step: ModuleType) -> None:
    found = ppo_step.medians(JOB, [turn([100.0, 4.0, 2.0]), turn([90.0, 4.0, 8.0])])
    assert found["step_seconds"] == 4.0
    assert found["samples_per_second"] == 2.0
    assert found["samples_per_processor_second"] == 4.0
    assert found["parts_processor_seconds"] == {"generate": 0.5, "actor": 1.0, "rest": 0.5}
    assert found["prompt_tokens"] == [3, 3, 3]


def test_what_is_left_of_trls_step_counts_as_its_updates(ppo_step: ModuleType) -> None:
    parts = [{"step": 10.0, "processor": 9.0, "generate": 3.0, "policy": 1.0}] * 3
    found = ppo_step.medians(JOB, [turn([]) | {"steps": parts}])
    assert found["parts_processor_seconds"] == {"generate": 3.0, "policy": 1.0, "actor": 5.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [40, 39, 40]}, "generated"),
        ({"threads": 2}, "2 threads"),
        ({"prompts": [[[1, 2], [4]]] * 3}, "other prompts"),
    ],
)
def test_sides_that_did_other_work_are_not_compared(ppo_step: ModuleType, changes: dict, message: str) -> None:
    even = {"ours": [turn([1.0])], ppo_step.TRL: [turn([1.0])]}
    ppo_step.check_equal(JOB, even)
    with pytest.raises(SystemExit, match=message):
        ppo_step.check_equal(JOB, even | {ppo_step.TRL: [turn([1.0], **changes)]})


def test_curves_of_both_arms_come_to_one_figure(tmp_path: Path) -> None:
    plot = script("experiments/collapse/plot.py")
    for arm, top in (("without", [0.2, 0.6, 1.0]), ("with", [0.2, 0.3, 0.4])):
        directory = tmp_path / f"{arm}_seed0"
        directory.mkdir()
        rows = [
            {"step": step, "tag": tag, "value": value}
            for step, value in enumerate(top, start=1)
            for tag in ("roleplay/top1_pattern_share", "roleplay/pattern_entropy", "roleplay/format_valid", plot.WINDOW)
        ]
        rows += [{"step": n, "tag": plot.COLLAPSED, "value": float(share > 0.5)} for n, share in enumerate(top, 1)]
        rows += [{"step": step, "tag": "train_rollouts/rewards", "value": 10.0 * step} for step in (1, 2, 3)]
        if arm == "with":  # the whole reward has the bonus in it; the reward model's part has not
            rows += [{"step": step, "tag": "reward/quality", "value": 1.0 * step} for step in (1, 2, 3)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = plot.read(tmp_path)
    found = plot.summary(runs, 2)
    assert found["means"]["without"]["top1_pattern_share"] == pytest.approx(0.8)
    assert found["means"]["with"]["top1_pattern_share"] == pytest.approx(0.35)
    assert [line["reward_model_last"] for line in found["runs"]] == [25.0, 2.5]
    assert found["seeds_with_both_arms"] == [0]
    assert [line["window_top1_worst"] for line in found["runs"]] == [1.0, 0.4]
    assert [line["collapsed_at"] for line in found["runs"]] == [2, None]
    image = ElementTree.fromstring(plot.figure(runs))
    charts = [child for child in image if child.tag.endswith("svg")]
    assert len(charts) == 4
    assert all(len(chart.findall("{*}path[@class='line']")) == 2 for chart in charts)
