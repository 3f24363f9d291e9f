"""The demo's page: what was trained, how it went, and what the three models say to the same scenes.

One self-contained HTML file: no script, no network, light and dark.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from her_nemo.evaluation.charts import Curve, finite, line_chart, number
from her_nemo.evaluation.figures import Report, checks, duration, models_of, table, tiles, title_of
from her_nemo.roleplay.dialects import Dialect, parse_message
from her_nemo.roleplay.tags import find_tags
from her_nemo.roleplay.turn import Finding
from her_nemo.training.logging import METRICS_FILE, series

Series = Mapping[str, Sequence[tuple[int, float]]]

TEMPLATE = "report.html.jinja"
MODEL_NAMES = {"base": "Base", "sft": "SFT", "ppo": "PPO"}


@dataclass(frozen=True)
class ChartPlan:
    """A chart of the page: curves whose key matches one of `patterns`, in that order."""

    title: str
    note: str
    patterns: tuple[str, ...]


# Keys are "<stage>/<tag>", as `metric_series` makes them.
CHARTS = (
    ChartPlan("Base: loss", "next token, nats", ("base/train/loss",)),
    ChartPlan("SFT: loss", "per reply token, nats", ("sft/train/loss", "sft/val/loss")),
    ChartPlan("Reward model: loss", "Bradley-Terry", ("reward/train/loss", "reward/val/loss")),
    ChartPlan("Reward model: accuracy", "share of pairs", ("reward/train/accuracy", "reward/val/accuracy")),
    ChartPlan("PPO: reward", "reward model's score", ("ppo/train_rollouts/rewards",)),
    ChartPlan("PPO: KL to the SFT model", "nats", ("ppo/train_rollouts/init_policy_kl",)),
    ChartPlan("PPO: reply length", "tokens", ("ppo/train_rollouts/response_lengths",)),
    ChartPlan("PPO: value loss", "", ("ppo/train_optim/critic_loss", "ppo/*critic/loss", "ppo/*value_loss")),
    ChartPlan("PPO: policy entropy", "nats per token", ("ppo/*/entropy",)),
)


@dataclass
class Piece:
    """A stretch of a reply: its text, CSS classes, and what is said on hover."""

    text: str
    classes: str
    title: str = ""


@dataclass(frozen=True)
class Reply:
    """One model's reply to a scene, cut for display."""

    pieces: tuple[Piece, ...]
    score: float | None
    principles: Mapping[str, bool]
    notes: tuple[str, ...] = field(default=())


def write_report(
    report: Report,
    curves: Series,
    samples: Sequence[Mapping[str, Any]],
    out_path: str | Path,
) -> None:
    """Write the page.

    Args:
        report: `report.json`: stages, parity, reward_model, ppo, eval {base, sft, ppo}, versions, seed; what is
            missing leaves its place empty.
        curves: points by "<stage>/<tag>", as `metric_series` gives them; those that no chart of `CHARTS` takes
            are shown folded.
        samples: scenes as `side_by_side` gives them.
    """
    charts, more = plan_charts(curves)
    page = (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            report=report,
            models=[(key, MODEL_NAMES.get(key, key)) for key in models_of(report)],
            rows=table(report),
            sampling=sampling_words(report),
            checks=checks(report),
            tiles=tiles(report),
            charts=charts,
            more_charts=more,
            scenes=[_scene(sample, models_of(report)) for sample in samples],
            stages=stage_bars(report.get("stages", [])),
            config=json.dumps(report.get("config", {}), indent=1, default=str),
        )
    )
    Path(out_path).write_text(page, encoding="utf-8")


def sampling_words(report: Report) -> str:
    """", sampled at temperature 1, top-p 0.95", if all models were sampled alike and it is known how; else ""."""
    ways = [evaluation.get("sampling") for evaluation in report.get("eval", {}).values()]
    if not ways or not ways[0] or any(way != ways[0] for way in ways):
        return ""
    temperature, top_k, top_p = (ways[0][key] for key in ("temperature", "top_k", "top_p"))
    if temperature == 0:
        return ", greedily"
    words = f", sampled at temperature {temperature:g}"
    words += f", top-k {top_k}" if top_k else ""
    return words + (f", top-p {top_p:g}" if top_p < 1 else "")


def metric_series(run_dirs: Mapping[str, str | Path]) -> dict[str, list[tuple[int, float]]]:
    """The curves of several runs by "<stage>/<tag>".

    Args:
        run_dirs: stage -> the directory that holds its metrics.jsonl.
    """
    return {
        f"{stage}/{tag}": points
        for stage, directory in run_dirs.items()
        for tag, points in series(Path(directory) / METRICS_FILE).items()
    }


def side_by_side(eval_dirs: Mapping[str, str | Path], count: int = 6) -> list[dict[str, Any]]:
    """Scenes that every model answered, evenly spaced through the test set rather than picked.

    Args:
        eval_dirs: model -> the `out` of its evaluation.

    Returns:
        rows of trace_id, character, brief, prompt_tail and replies {model: row of its samples.jsonl}.
    """
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for model, directory in eval_dirs.items():
        lines = (Path(directory) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        by_model[model] = {row["trace_id"]: row for row in rows if row["sample"] == 0}
    if not by_model:
        return []
    first = next(iter(by_model.values()))
    shared = [key for key in first if all(key in rows for rows in by_model.values())]
    chosen = (
        [shared[place * len(shared) // count] for place in range(count)] if len(shared) > count else shared
    )
    return [
        {
            "trace_id": key,
            "character": first[key]["character"],
            "brief": first[key]["brief"],
            "prompt_tail": first[key]["prompt_tail"],
            "replies": {model: rows[key] for model, rows in by_model.items()},
        }
        for key in chosen
    ]


def plan_charts(curves: Series) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The charts of `CHARTS` that have data, and one chart for each other curve."""
    left = {key: points for key, points in curves.items() if finite(points)}
    charts = []
    for plan in CHARTS:
        keys = [key for pattern in plan.patterns for key in left if fnmatch.fnmatchcase(key, pattern)]
        if keys:
            charts.append(_chart(plan.title, plan.note, {key: left.pop(key) for key in dict.fromkeys(keys)}))
    more = [_chart(key, "", {key: points}) for key, points in sorted(left.items())]
    return charts, more


def pieces(
    text: str, *, expect_name: str | None = None, dialect: Dialect = Dialect.HER, expect_plan: bool = True
) -> tuple[list[Piece], list[str]]:
    """A message cut for display: every character once, coloured by segment, tags dimmed, defects marked.

    Returns the pieces, and the defects that have no place in the text (a missing plan).
    """
    turn = parse_message(text, dialect, expect_plan=expect_plan, expect_name=expect_name)
    spans = [(segment.start, segment.end, segment.kind.value) for segment in turn.segments]
    if turn.name_span:
        spans.append((*turn.name_span, "name"))
    tags = [(tag.start, tag.end) for tag in find_tags(text)[0]]
    marked = [
        finding for finding in turn.findings if finding.start < finding.end and not _whole(finding, text)
    ]
    borders = {0, len(text)}
    for start, end in [*((s, e) for s, e, _ in spans), *tags, *((f.start, f.end) for f in marked)]:
        borders |= {start, end}
    out: list[Piece] = []
    edges = sorted(borders)
    for start, end in itertools.pairwise(edges):
        kind = next((k for s, e, k in spans if s <= start < e), "speech")
        defects = [f.defect.value for f in marked if f.start <= start < f.end]
        classes = [
            kind,
            *(["tag"] if any(s <= start < e for s, e in tags) else []),
            *(["bad"] if defects else []),
        ]
        out.append(Piece(text[start:end], " ".join(classes), ", ".join(defects).replace("_", " ")))
    nowhere = [f.defect.value for f in turn.findings if f not in marked]
    return out, list(dict.fromkeys(nowhere))


def stage_bars(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each stage with its share of the longest one, for the bars."""
    longest = max((stage["seconds"] for stage in stages), default=0) or 1
    return [
        {"name": stage["name"], "text": duration(stage["seconds"]), "share": stage["seconds"] / longest}
        for stage in stages
    ]


def page_environment() -> Environment:
    """Templates of this directory: what is put in is escaped, and a value that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["title_of"] = title_of
    return environment


def _scene(sample: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    replies: dict[str, Reply] = {}
    for model in models:
        row = sample["replies"].get(model)
        if row is None:
            continue
        parts, nowhere = pieces(row["reply"], expect_name=sample.get("character"))
        notes = [name.replace("_", " ") for name in nowhere]
        if row.get("truncated"):
            notes.append("cut at the token limit")
        replies[model] = Reply(tuple(parts), row.get("score"), row.get("principles") or {}, tuple(notes))
    return {"character": None, "brief": "", **sample, "replies": replies}


def _chart(title: str, note: str, curves: Series) -> dict[str, Any]:
    names = _short_names(list(curves))
    lines = [Curve(name, points) for name, points in zip(names, curves.values(), strict=True)]
    last = finite(lines[-1].points)[-1][1]
    svg: Markup = line_chart(lines, title)
    return {
        "title": title,
        "note": note,
        "svg": svg,
        "names": names if len(names) > 1 else [],
        "last": number(last),
    }


def _short_names(keys: Sequence[str]) -> list[str]:
    """Keys without the parts that all of them share: sft/train/loss, sft/val/loss -> train, val."""
    parts = [key.split("/") for key in keys]
    width = max(map(len, parts))
    if len(keys) == 1 or any(len(part) != width for part in parts):
        return list(keys)
    kept = [place for place in range(width) if len({part[place] for part in parts}) > 1]
    return ["/".join(part[place] for place in kept) for part in parts]


def _whole(finding: Finding, text: str) -> bool:
    """Whether a finding is about the reply as a whole, so that underlining would mark everything."""
    return (finding.start, finding.end) == (0, len(text))
