"""`her-nemo evaluate compare A B ...`: runs of one benchmark side by side, on one page that stands alone.

The first run is what the others are compared with. Differences are paired by scene, since what a scene is worth is
shared by all models; every figure stands with its interval and with what failed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from her_nemo.config.errors import UserError
from her_nemo.evaluation.charts import Bar, BarGroup, Curve, bar_chart, line_chart
from her_nemo.evaluation.figures import title_of
from her_nemo.evaluation.report import Piece, page_environment, pieces
from her_nemo.evaluation.results import Judgement, Line, Metric, Results, Scene, read_results
from her_nemo.evaluation.statistics import Difference, mean_over_runs, paired_bootstrap
from her_nemo.roleplay.dialects import Dialect

TEMPLATE = "compare.html.jinja"
OPEN_GROUPS = ("judge", "")  # the others are folded
GROUP_TITLES = {
    "en": "English scenes",
    "zh": "Chinese scenes",
    "flaws": "Flaws: share of turns that have them",
}
# Who was shown the hidden thoughts that stand on the page.
THOUGHTS_SEEN = {
    "roleplay_bench": "Hidden thoughts are shown here; judge and user simulator never saw them.",
    "coser": "Hidden thoughts are shown here; the judge saw them, without plans, under protocol her only.",
}
_TURNS = re.compile(r"turns? ([\d, ]+): ")
# What may differ between runs that are compared: the model under test, and what follows from it.
_FREE_ROLES = ("actor",)


@dataclass(frozen=True)
class Run:
    """One run: the name it has on the page, what it measured, and its scenes by id."""

    label: str
    results: Results
    scenes: Mapping[str, Sequence[Scene]]


@dataclass(frozen=True)
class Row:
    """One metric: a cell a run, and for each run after the first its difference to the first."""

    name: str
    key: str
    cells: tuple[Metric | None, ...]
    differences: tuple[Difference | None, ...]
    higher_is_better: bool | None

    @property
    def digits(self) -> int:
        """Decimals to show: one for scores up to 100, three for shares."""
        means = [abs(m.interval.mean) for m in self.cells if m is not None and m.interval is not None]
        largest = max(means, default=0.0)
        return 1 if largest >= 10 else 2 if largest >= 1 else 3

    def verdict(self, difference: Difference | None) -> str:
        """up or down where the interval leaves out 0 and one of them is better; "" otherwise."""
        if difference is None or difference.low is None or difference.high is None:
            return ""
        if self.higher_is_better is None or difference.low <= 0 <= difference.high:
            return ""
        return "up" if (difference.mean > 0) == self.higher_is_better else "down"


@dataclass(frozen=True)
class ShownFlaw:
    """A flaw as the judge wrote it, and the dimension that it was found for."""

    dimension: str
    type: str
    severity: float
    text: str


@dataclass(frozen=True)
class ShownLine:
    """A message cut for display, with the flaws that name its turn."""

    number: int
    speaker: str
    source: str
    pieces: tuple[Piece, ...]
    flaws: tuple[ShownFlaw, ...]


@dataclass(frozen=True)
class ShownScene:
    """One run's side of a scene; `lines` is empty where the run has not got it."""

    label: str
    lines: tuple[ShownLine, ...]
    scores: tuple[tuple[str, float], ...]
    flaws: tuple[ShownFlaw, ...]  # those that name no turn
    failures: tuple[str, ...]
    ended: str


@dataclass(frozen=True)
class SceneRow:
    """A scene with all runs' sides. `difference` is of the main metric, last run less first."""

    scene_id: str
    title: str
    difference: float | None
    sides: tuple[ShownScene, ...] = field(default=())
    reference: tuple[ShownLine, ...] = ()  # what the data have at the dialogue's place


def read_runs(paths: Sequence[str | Path], labels: Sequence[str] | None = None) -> list[Run]:
    """The runs, named by `labels` or by the shortest ends of their paths that tell them apart.

    Raises:
        UserError: fewer than two, results that cannot be read, different benchmarks, or labels that do not fit.
    """
    if len(paths) < 2:
        raise UserError("compare: give at least two runs: her-nemo evaluate compare RUN_A RUN_B ...")
    names = list(labels) if labels else short_names([Path(path) for path in paths])
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise UserError(f"labels={names}: {len(paths)} different ones are needed, one a run")
    runs = []
    for path, name in zip(paths, names, strict=True):
        results, scenes = read_results(path)
        by_id: dict[str, list[Scene]] = {}
        for scene in scenes:
            by_id.setdefault(scene.scene_id, []).append(scene)
        runs.append(Run(name, results, by_id))
    benchmarks = sorted({run.results.benchmark for run in runs})
    if len(benchmarks) > 1:
        raise UserError(f"compare: runs of one benchmark, not of {' and '.join(benchmarks)}")
    return runs


def with_limit(runs: Sequence[Run], max_failure_share: float | None) -> list[Run]:
    """The runs with another limit on the share of failed calls, above which they are invalid; None keeps each one's."""
    if max_failure_share is None:
        return list(runs)
    return [replace(run, results=replace(run.results, max_failure_share=max_failure_share)) for run in runs]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]  # the same directory twice: `read_runs` refuses it


def rows_of(
    runs: Sequence[Run], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, list[Row]]:
    """Group -> its metrics, in the order of the first run that has them."""
    order: dict[str, Metric] = {}
    for run in runs:
        for metric in run.results.metrics:
            order.setdefault(metric.name, metric)
    groups: dict[str, list[Row]] = {}
    for name, metric in order.items():
        values = [values_of(run, name) for run in runs]
        differences = tuple(
            paired_bootstrap(values[0], other, resamples=resamples, level=level, seed=seed)
            if values[0].keys() & other.keys()
            else None
            for other in values[1:]
        )
        cells = tuple(next((m for m in run.results.metrics if m.name == name), None) for run in runs)
        row = Row(title_of(name.split(":")[-1]), name, cells, differences, metric.higher_is_better)
        groups.setdefault(metric.group, []).append(row)
    return groups


def values_of(run: Run, metric: str) -> dict[str, float]:
    """Scene -> its value, the mean over the repetitions that have one."""
    return mean_over_runs(
        {
            (scene.scene_id, scene.run): scene.scores[metric]
            for scenes in run.scenes.values()
            for scene in scenes
            if metric in scene.scores
        }
    )


def unequal_conditions(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What else than the model under test differs between the runs: (what, its value in each)."""

    def conditions(run: Run) -> dict[str, str]:
        found = {"protocol": run.results.protocol, "repetitions": str(run.results.runs)}
        found |= {f"settings.{key}": _told(value) for key, value in run.results.settings.items()}
        for role, identity in run.results.models.items():
            if role not in _FREE_ROLES:
                found[role] = _told({key: value for key, value in identity.items() if key != "endpoint"})
        return found | {f"version of {name}": version for name, version in run.results.versions.items()}

    each = [conditions(run) for run in runs]
    names = dict.fromkeys(name for found in each for name in found)
    table = [(name, [found.get(name, "–") for found in each]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items())
    return str(value)


# ---------------------------------------------------------------- charts


def dimension_bars(rows: Sequence[Row], runs: Sequence[Run]) -> Markup | None:
    """Bars of one group of metrics, or None where no run has a value."""
    groups = [
        BarGroup(row.name, [_bar(metric, run) for metric, run in zip(row.cells, runs, strict=True)])
        for row in rows
        if any(metric is not None and metric.interval is not None for metric in row.cells)
    ]
    return bar_chart(groups, [run.label for run in runs], "scores by dimension") if groups else None


def _bar(metric: Metric | None, run: Run) -> Bar | None:
    if metric is None or metric.interval is None:
        return None
    found = metric.interval
    return Bar(found.mean, found.low, found.high, faint=not run.results.valid)


def course_charts(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """For benchmarks that judge a dialogue in parts: each dimension's mean score by part."""
    means: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in runs:
        for scenes in run.scenes.values():
            for judgement in (judgement for scene in scenes for judgement in scene.judgements):
                place = re.search(r"\d+", judgement.part)
                if place and judgement.score is not None:
                    of_run = means.setdefault(judgement.dimension, {}).setdefault(run.label, {})
                    of_run.setdefault(int(place.group()), []).append(judgement.score)
    charts = []
    for dimension, by_run in means.items():
        curves = [
            Curve(label, [(at, sum(found) / len(found)) for at, found in sorted(by_place.items())])
            for label, by_place in ((run.label, by_run.get(run.label, {})) for run in runs)
        ]
        if max(len(curve.points) for curve in curves) > 1:
            charts.append((title_of(dimension), line_chart(curves, f"{dimension} over the dialogue")))
    return charts


# ---------------------------------------------------------------- scenes


def scene_rows(runs: Sequence[Run], metric: str, most: int) -> tuple[list[SceneRow], int]:
    """Scenes by the difference of `metric`, the worst for the last run first; and how many were left out.

    Of more than `most` scenes those with the largest differences either way are shown, so the page is not a fair
    sample: the table is.
    """
    first, last = values_of(runs[0], metric), values_of(runs[-1], metric)
    ids = list(dict.fromkeys(scene_id for run in runs for scene_id in run.scenes))
    known = sorted((last[key] - first[key], key) for key in ids if key in first and key in last)
    unknown = [(None, key) for key in ids if key not in first or key not in last]
    ordered: list[tuple[float | None, str]] = [*known, *unknown]
    if len(ordered) > most:
        head = (most + 1) // 2
        ordered = [*ordered[:head], *known[max(head, len(known) - (most - head)) :]]
    rows = []
    for difference, key in ordered:
        scenes = [min(run.scenes.get(key, ()), key=lambda scene: scene.run, default=None) for run in runs]
        title = next(scene.title for scene in scenes if scene is not None)
        sides = tuple(_side(run, scene) for run, scene in zip(runs, scenes, strict=True))
        given = next((scene.reference for scene in scenes if scene is not None), ())
        reference = tuple(_line(number, line, ()) for number, line in enumerate(given, 1))
        rows.append(SceneRow(key, title, difference, sides, reference))
    return rows, len(ids) - len(rows)


def _side(run: Run, scene: Scene | None) -> ShownScene:
    if scene is None:
        return ShownScene(run.label, (), (), (), (), "")
    flaws = [(turns_named(flaw.text), flaw) for flaw in _flaws(scene.judgements)]
    lines = tuple(
        _line(number, line, tuple(flaw for turns, flaw in flaws if number in turns))
        for number, line in enumerate(scene.dialogue, 1)
    )
    shown = [metric for metric in run.results.metrics if metric.group in OPEN_GROUPS]
    scores = tuple((title_of(m.name), scene.scores[m.name]) for m in shown if m.name in scene.scores)
    failures = tuple(
        f"{failure.role}: {failure.kind.value.replace('_', ' ')}: {failure.message}"
        for failure in scene.all_failures()
    )
    numbers = range(1, len(scene.dialogue) + 1)
    loose = tuple(flaw for turns, flaw in flaws if not any(turn in numbers for turn in turns))
    return ShownScene(run.label, lines, scores, loose, failures, scene.ended)


def _flaws(judgements: Sequence[Judgement]) -> list[ShownFlaw]:
    return [
        ShownFlaw(judgement.dimension, flaw.type, flaw.severity, flaw.instance)
        for judgement in judgements
        for flaw in judgement.flaws
    ]


def turns_named(text: str) -> tuple[int, ...]:
    """The turns that a flaw says it is about ("turns 3, 5: ..."); none where it says nothing of the kind."""
    found = _TURNS.match(text)
    return tuple(int(part) for part in re.findall(r"\d+", found.group(1))) if found else ()


def _line(number: int, line: Line, flaws: tuple[ShownFlaw, ...]) -> ShownLine:
    cut, _ = pieces(line.text, expect_name=line.speaker, dialect=Dialect(line.dialect), expect_plan=False)
    return ShownLine(number, line.speaker, line.source, tuple(cut), flaws)


# ---------------------------------------------------------------- the page


def write_comparison(
    runs: Sequence[Run],
    out: Path,
    *,
    max_scenes: int = 40,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, list[Row]]:
    """Write the page and return the table that is on it."""
    groups = rows_of(runs, resamples=resamples, level=level, seed=seed)
    leading = [row for name in OPEN_GROUPS for row in groups.get(name, [])]
    scenes, left_out = scene_rows(runs, leading[0].key, max_scenes) if leading else ([], 0)
    page = (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            runs=runs,
            groups=groups,
            open_groups=OPEN_GROUPS,
            group_titles=GROUP_TITLES,
            bars=dimension_bars(leading, runs),
            course=course_charts(runs),
            conditions=unequal_conditions(runs),
            scenes=scenes,
            left_out=left_out,
            leading=leading[0].name if leading else "",
            leading_digits=leading[0].digits if leading else 1,
            thoughts_seen=THOUGHTS_SEEN.get(runs[0].results.benchmark, ""),
            repeated=any(run.results.runs > 1 for run in runs),
            level=level,
            figure=figure,
            signed=signed,
            failures=failure_lines,
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="backslashreplace")
    return groups


def table(runs: Sequence[Run], groups: Mapping[str, Sequence[Row]]) -> str:
    """The leading figures as lines of text, for the terminal."""
    rows = [row for name in OPEN_GROUPS for row in groups.get(name, [])]
    width = max([len(row.name) for row in rows], default=0)
    lines = [f"{'':{width}}  " + "  ".join(run.label for run in runs)]
    for row in rows:
        cells = [
            "–" if cell is None or cell.interval is None else figure(cell.interval.mean, row.digits)
            for cell in row.cells
        ]
        differences = [
            f"{signed(found.mean, row.digits)} [{signed(found.low, row.digits)}, {signed(found.high, row.digits)}]"
            for found in row.differences
            if found is not None
        ]
        lines.append(f"{row.name:{width}}  {'  '.join(cells)}   {'  '.join(differences)}")
    lines += [
        f"INVALID: {run.label}: {'; '.join(failure_lines(run.results))}"
        for run in runs
        if not run.results.valid
    ]
    return "\n".join(lines)


def failure_lines(results: Results) -> list[str]:
    """What failed in a run, in words; empty where nothing did."""
    lines = []
    if results.judgements_failed:
        share = f"{results.judge_failure_share:.1%}"
        lines.append(f"{results.judgements_failed} of {results.judgements} judgements failed ({share})")
    if results.simulations_failed:
        played = results.scenes * results.runs
        lines.append(f"{results.simulations_failed} of {played} dialogues broke off")
    lines += [
        f"{role}: {count} {kind.replace('_', ' ')}"
        for role, kinds in results.failures.items()
        for kind, count in kinds.items()
    ]
    return lines


def figure(value: float | None, digits: int = 1) -> str:
    """A score for people."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """The same with its sign."""
    return "–" if value is None else f"{value:+.{digits}f}"
