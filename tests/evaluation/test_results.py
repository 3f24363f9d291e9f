"""Results on disk: what is written is read back, failures stay beside scores, and too many make a result invalid."""

from __future__ import annotations

import json

import pytest

from her_nemo.config.errors import UserError
from her_nemo.evaluation.results import (
    Failure,
    FailureKind,
    Flaw,
    Judgement,
    Line,
    MetricName,
    Results,
    Scene,
    count_failures,
    metrics_of,
    read_results,
    versions,
    write_results,
)

REFUSED = Failure(FailureKind.REFUSED, "would not", "judge", "I'm sorry")


def scene(number: int, run: int = 0, **scores: float) -> Scene:
    failed = "quality" not in scores
    return Scene(
        scene_id=f"s{number}",
        run=run,
        title=f"Scene {number}",
        # A line separator, a sign beyond the basic plane, and half a surrogate pair as guided decoding may write it.
        dialogue=(
            Line("Lear", "<role_thinking>Mine.</role_thinking>Away! \u2028 \U0001f600 \ud800"),
            Line("Environment", "Rain.\r\nWind.", "environment"),
        ),
        reference=(Line("Lear", "Blow, winds!", "given"),),
        judgements=(
            Judgement("quality", None, (), REFUSED)
            if failed
            else Judgement("quality", scores["quality"], (Flaw("dull", 3, "twice"),), answer="{}"),
        ),
        scores=scores,
        ended="end_chat",
        info={"actor_messages": 2},
    )


def results(scenes: list[Scene], **changed) -> Results:
    names = [MetricName("quality", "judge"), MetricName("bleu", "overlap", None)]
    given = {
        "benchmark": "coser",
        "protocol": "her",
        "name": "test",
        "scenes": 2,
        "runs": 2,
        "metrics": metrics_of(scenes, names, resamples=100, level=0.95, seed=0),
        "judgements": 4,
        "judgements_failed": 1,
        "simulations_failed": 0,
        "max_failure_share": 0.25,
        "failures": count_failures(scenes),
        "models": {"judge": {"model": "m"}},
        "versions": versions(prompts="v1"),
        "notes": ("one",),
    }
    return Results(**given | changed)


SCENES = [
    scene(1, 0, quality=80.0, bleu=1.0),
    scene(1, 1, bleu=3.0),
    scene(2, 0, quality=20.0, bleu=0.0),
    scene(2, 1, quality=40.0, bleu=0.0),
]


def test_failures_are_no_scores() -> None:
    quality, bleu = results(SCENES).metrics
    # Scene 1 has one value, 80; scene 2 has the mean of 20 and 40.
    assert quality.interval.mean == 55.0
    assert (quality.interval.low, quality.interval.high) == (30.0, 80.0)
    assert quality.run_means == (50.0, 40.0)
    assert quality.missing == 1
    assert (bleu.interval.mean, bleu.missing, bleu.group, bleu.higher_is_better) == (1.0, 0, "overlap", None)
    assert count_failures(SCENES) == {"judge": {"refused": 1}}


def test_too_many_failures_make_it_invalid() -> None:
    assert results(SCENES).valid
    assert results(SCENES).judge_failure_share == 0.25
    assert not results(SCENES, judgements_failed=2).valid
    assert not results(SCENES, simulations_failed=2).valid
    assert not results([], metrics=(), judgements=0, judgements_failed=0).valid


def test_what_is_written_is_read_back(tmp_path) -> None:
    written = results(SCENES)
    write_results(tmp_path / "run", written, SCENES)
    assert read_results(tmp_path / "run") == (written, SCENES)
    on_disk = json.loads((tmp_path / "run" / "results.json").read_text())
    assert on_disk["valid"] is True
    assert on_disk["judge_failure_share"] == 0.25
    assert on_disk["versions"]["prompts"] == "v1"
    assert {"her_nemo", "python", "numpy"} <= on_disk["versions"].keys()


def test_a_run_without_its_figures_is_not_read(tmp_path) -> None:
    write_results(tmp_path, results(SCENES), SCENES)
    (tmp_path / "scenes.jsonl").write_text('{"scene_id": "s1"}\n')
    with pytest.raises(UserError, match="not a benchmark's results"):
        read_results(tmp_path)
    (tmp_path / "results.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_results(tmp_path)


def test_a_metric_that_nothing_has() -> None:
    (metric,) = metrics_of(SCENES, [MetricName("absent")], resamples=10, level=0.9, seed=0)
    assert (metric.interval, metric.run_means, metric.missing) == (None, (), 4)
