"""The curves of the collapse experiment on one page, and their last values as JSON.

    python experiments/collapse/plot.py --runs runs/collapse --out experiments/collapse [--last 5]

Reads `metrics.jsonl` of every `<arm>_seed<n>` directory; writes `collapse.html` (SVG, no script) and `collapse.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from her_nemo.evaluation.charts import Curve, line_chart
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

STYLE = """
:root { color-scheme: light; --series-1: #d9622b; --series-2: #2a6fd0; --grid: #ecece8; --soft: #5b5f66; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 24px; color: #17181a; }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: 18px; }
.chart { width: 100%; height: auto; overflow: visible; } .chart .grid { stroke: var(--grid); }
.chart .axis { fill: var(--soft); font-size: 11px; }
.chart path { fill: none; stroke-width: 2; } .chart .raw { stroke-width: 1; opacity: 0.32; }
.chart .hover { opacity: 0; } .chart .hover:hover { opacity: 1; }
figure { margin: 0; } figcaption { font-size: 13px; color: var(--soft); }
i { display: inline-block; width: 18px; height: 3px; margin: 0 6px 4px 14px; }
td, th { padding: 3px 14px 3px 0; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; }
"""


def main() -> int:
    options = parse()
    runs = read(options.runs)
    if not runs:
        print(f"{options.runs}: no <arm>_seed<n>/{METRICS_FILE}", file=sys.stderr)
        return 2
    found = summary(runs, options.last)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "collapse.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "collapse.html").write_text(page(runs, found, options.last), encoding="utf-8")
    for line in found["runs"]:
        print(*(f"{key}={value}" for key, value in line.items()))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="the --out of run.py")
    parser.add_argument("--out", type=Path, required=True, help="directory of collapse.html and collapse.json")
    parser.add_argument("--last", type=int, default=5, help="rollouts at the end that the table's means are over")
    return parser.parse_args()


def read(directory: Path) -> dict[int, dict[str, dict[str, Points]]]:
    """seed -> arm -> measure -> points."""
    runs: dict[int, dict[str, dict[str, Points]]] = {}
    for file in sorted(directory.glob(f"*/{METRICS_FILE}")):
        named = re.fullmatch(r"(with|without)_seed(\d+)", file.parent.name)
        if named is None:
            continue
        curves = series(file)
        measured = {
            measure.name: next(curves[tag] for tag in measure.tags if tag in curves) for measure in MEASURES
        }
        runs.setdefault(int(named[2]), {})[named[1]] = measured
    return dict(sorted(runs.items()))


def tail(points: Points, last: int) -> float:
    """Mean of the last `last` values."""
    return statistics.fmean(value for _, value in points[-last:])


def summary(runs: dict[int, dict[str, dict[str, Points]]], last: int) -> dict[str, Any]:
    """First value and mean of the last ones of every run, and the means over the seeds that have both arms."""
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


def page(runs: dict[int, dict[str, dict[str, Points]]], found: dict[str, Any], last: int) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>her_nemo: collapse of diversity</title>",
        f"<style>{STYLE}</style><h1>Collapse of diversity, with and without control</h1>",
        '<p><i style="background:var(--series-1)"></i>without <i style="background:var(--series-2)"></i>with '
        "<code>reward.diversity.pattern_weight</code>; a point is one rollout, strong lines are smoothed.</p>",
        _table(found["runs"], last),
    ]
    for seed, arms in runs.items():
        parts.append(f"<h2>Seed {seed}</h2><div class=row>")
        for measure in MEASURES:
            curves = [Curve(arm, arms[arm][measure.name] if arm in arms else []) for arm in ARMS]
            chart = line_chart(_present(curves), f"{measure.title}, seed {seed}")
            parts.append(f"<figure><figcaption>{escape(measure.title)}</figcaption>{chart}</figure>")
        parts.append("</div>")
    return "\n".join(str(part) for part in parts) + "\n"


def _present(curves: Sequence[Curve]) -> list[Curve]:
    """The curves with points; an arm that has not run keeps its colour only if it comes last."""
    return [curve for curve in curves if curve.points]


def _table(lines: Sequence[dict[str, Any]], last: int) -> Markup:
    head = "".join(f"<th>{escape(measure.title)}" for measure in MEASURES)
    rows = "".join(
        f"<tr><td>{line['arm']}, seed {line['seed']}"
        + "".join(
            f"<td>{line[f'{measure.name}_first']:.3f} → {line[f'{measure.name}_last']:.3f}" for measure in MEASURES
        )
        for line in lines
    )
    caption = f"<p>First rollout → mean of the last {last}.</p>"
    return Markup(f"{caption}<table><tr><th>run{head}{rows}</table>")


if __name__ == "__main__":
    sys.exit(main())
