"""The curves of the collapse experiment in one figure, and their last values as JSON.

    python experiments/collapse/plot.py --runs runs/collapse --out experiments/collapse [--last 5]

Reads `metrics.jsonl` of every `<arm>_seed<n>` directory; writes `collapse.svg` and `collapse.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import escape

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from her_nemo.evaluation.charts import HEIGHT, WIDTH, Curve, line_chart
from her_nemo.training.logging import METRICS_FILE, series

ARMS = ("without", "with")
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Measure:
    """One column of the page: the first of `tags` that a run has logged."""

    name: str
    title: str
    tags: tuple[str, ...]


MEASURES = (
    Measure("top1_pattern_share", "Share of the most frequent pattern", ("roleplay/top1_pattern_share",)),
    Measure("pattern_entropy", "Entropy of patterns, bits", ("roleplay/pattern_entropy",)),
    # With a diversity reward the whole reward is another number: the reward model's part is compared.
    Measure("reward_model", "Reward model's score", ("reward/quality", "train_rollouts/rewards")),
    Measure("format_valid", "Share of well-formed replies", ("roleplay/format_valid",)),
)
# Of the newest 192 replies; and whether the rule of the run (run.py: COMMON) called the policy collapsed.
WINDOW, COLLAPSED = "roleplay/window_top1_pattern_share", "roleplay/collapsed"

STYLE = """
:root { --series-1: #d9622b; --series-2: #2a6fd0; }
text { font: 13px system-ui, sans-serif; fill: #17181a; }
.chart { overflow: visible; } .grid { stroke: #ecece8; } .axis { font-size: 11px; fill: #5b5f66; }
path { fill: none; stroke-width: 2; } .raw { stroke-width: 1; opacity: 0.32; }
"""
ACROSS, DOWN, MARGIN, HEAD = 410, 226, 14, 34  # a chart with its title; what stands around all of them
HOVER = re.compile(r'<circle class="hover".*?</circle>')  # an image has no pointer: a third of the size


def main() -> int:
    options = parse()
    runs = read(options.runs)
    if not runs:
        print(f"{options.runs}: no <arm>_seed<n>/{METRICS_FILE}", file=sys.stderr)
        return 2
    found = summary(runs, options.last)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "collapse.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "collapse.svg").write_text(figure(runs), encoding="utf-8")
    for line in found["runs"]:
        print(*(f"{key}={value}" for key, value in line.items()))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="the --out of run.py")
    parser.add_argument("--out", type=Path, required=True, help="directory of collapse.svg and collapse.json")
    parser.add_argument("--last", type=int, default=5, help="rollouts at the end that the table's means are over")
    return parser.parse_args()


def read(directory: Path) -> dict[int, dict[str, dict[str, Points]]]:
    """seed -> arm -> measure, WINDOW or COLLAPSED -> points."""
    runs: dict[int, dict[str, dict[str, Points]]] = {}
    for file in sorted(directory.glob(f"*/{METRICS_FILE}")):
        named = re.fullmatch(r"(with|without)_seed(\d+)", file.parent.name)
        if named is None:
            continue
        curves = series(file)
        measured = {
            measure.name: next(curves[tag] for tag in measure.tags if tag in curves) for measure in MEASURES
        }
        runs.setdefault(int(named[2]), {})[named[1]] = measured | {tag: curves[tag] for tag in (WINDOW, COLLAPSED)}
    return dict(sorted(runs.items()))


def tail(points: Points, last: int) -> float:
    """Mean of the last `last` values."""
    return statistics.fmean(value for _, value in points[-last:])


def summary(runs: dict[int, dict[str, dict[str, Points]]], last: int) -> dict[str, Any]:
    """First value and mean of the last ones of every run, when it collapsed, and means over seeds with both arms."""
    lines: list[dict[str, Any]] = []
    for seed, arms in runs.items():
        for arm in ARMS:
            if arm not in arms:
                continue
            line: dict[str, Any] = {"arm": arm, "seed": seed, "steps": arms[arm][MEASURES[0].name][-1][0]}
            for measure in MEASURES:
                points = arms[arm][measure.name]
                line[f"{measure.name}_first"] = round(points[0][1], 4)
                line[f"{measure.name}_last"] = round(tail(points, last), 4)
            line["window_top1_worst"] = round(max(value for _, value in arms[arm][WINDOW]), 4)
            line["collapsed_at"] = next((step for step, value in arms[arm][COLLAPSED] if value), None)
            lines.append(line)
    paired = [seed for seed, arms in runs.items() if len(arms) == len(ARMS)]
    means = {
        arm: {
            measure.name: round(statistics.fmean(tail(runs[seed][arm][measure.name], last) for seed in paired), 4)
            for measure in MEASURES
        }
        for arm in ARMS
        if paired
    }
    return {"last": last, "runs": lines, "seeds_with_both_arms": paired, "means": means}


def figure(runs: dict[int, dict[str, dict[str, Points]]]) -> str:
    """A row of charts a measure, a column a seed. Strong lines are smoothed, faint ones a point a rollout."""
    width, height = 2 * MARGIN + ACROSS * len(runs), HEAD + MARGIN + DOWN * len(MEASURES)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for index, said in enumerate(("without control", "with the diversity reward")):
        x = MARGIN + 46 + 180 * index
        colour = f"stroke:var(--series-{index + 1})"
        parts.append(f'<path style="{colour}" d="M{x} 20h24"/><text x="{x + 30}" y="24">{said}</text>')
    for column, (seed, arms) in enumerate(runs.items()):
        for row, measure in enumerate(MEASURES):
            x, y = MARGIN + ACROSS * column, HEAD + DOWN * row
            # An arm that has not run has no line, and the other one keeps its colour.
            curves = [Curve(arm, arms[arm][measure.name] if arm in arms else []) for arm in ARMS]
            chart = HOVER.sub("", line_chart(curves, f"{measure.title}, seed {seed}"))
            place = f'<svg class="chart" x="{x}" y="{y + 24}" width="{WIDTH}" height="{HEIGHT}"'
            parts.append(f'<text x="{x + 46}" y="{y + 18}">{escape(measure.title)}, seed {seed}</text>')
            parts.append(chart.replace('<svg class="chart"', place, 1))
    return "\n".join(str(part) for part in parts) + "\n</svg>\n"


if __name__ == "__main__":
    sys.exit(main())
