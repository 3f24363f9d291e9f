"""The page that compares runs: figures by hand, what is marked, and that no text can break out of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from page_outline import Outline

from her_nemo.config.errors import UserError
from her_nemo.evaluation.charts import Bar, BarGroup, bar_chart
from her_nemo.evaluation.compare import (
    read_runs,
    rows_of,
    scene_rows,
    short_names,
    turns_named,
    unequal_conditions,
    write_comparison,
)
from her_nemo.evaluation.results import (
    Failure,
    FailureKind,
    Flaw,
    Judgement,
    Line,
    MetricName,
    Results,
    Scene,
    metrics_of,
    write_results,
)

EVIL = "</span><script>alert(1)</script> <role_thinking>open & <b>"
NAMES = [
    MetricName("overall", "judge"),
    MetricName("worlds", "judge"),
    MetricName("leak_rate", "vitals", False),
]


def scene(name: str, overall: float | None, run: int = 0, **more) -> Scene:
    scores = {} if overall is None else {"overall": overall, "worlds": overall - 1, "leak_rate": 0.25}
    dialogue = (
        Line("Mara", "*waits* Well?", "given", "starred"),
        Line("Mara", "<system_thinking>Bow.</system_thinking>Mara: <role_action>bows</role_action> Yes."),
        Line("Tomas", "*nods* " + EVIL, "user", "starred"),
    )
    judgements = (
        Judgement(
            "worlds", 90.0, (Flaw("contradiction", 3, "turn 2: “Yes.”: she said no"),), part="turns 2-2"
        ),
        Judgement("worlds", 80.0, (Flaw("stagnation", 2, EVIL),), part="turns 3-3"),
    )
    return Scene(name, run, f"Title of {name}", dialogue, judgements=judgements, scores=scores, **more)


def save(out: Path, scenes: list[Scene], **more) -> Path:
    base = {
        "benchmark": "roleplay_bench",
        "protocol": "her_nemo",
        "name": out.name,
        "scenes": len({one.scene_id for one in scenes}),
        "runs": 1,
        "metrics": metrics_of(scenes, NAMES, resamples=200, level=0.95, seed=0),
        "judgements": 10,
        "judgements_failed": 0,
        "simulations_failed": 0,
        "max_failure_share": 0.05,
        "failures": {},
        "models": {"actor": {"model": out.name}, "judge": {"model": "big", "endpoint": f"http://{out.name}"}},
        "settings": {"turns": 3},
        "versions": {"her_nemo": "1"},
    }
    write_results(out, Results(**(base | more)), scenes)
    return out


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    first = [scene("a", 70.0), scene("b", 80.0), scene("c", 60.0), scene("d", None)]
    second = [scene("a", 80.0), scene("b", 90.0), scene("c", 70.0), scene("e", 10.0)]
    return [save(tmp_path / "sft", first), save(tmp_path / "ppo", second)]


def page_of(paths: list[Path], out: Path, **more) -> str:
    write_comparison(read_runs(paths), out, resamples=200, **more)
    return out.read_text(encoding="utf-8")


def test_differences_are_paired_by_scene(two: list[Path]) -> None:
    groups = rows_of(read_runs(two))
    overall, worlds = groups["judge"]
    assert [cell.interval.mean for cell in overall.cells] == [70.0, pytest.approx(62.5)]
    (difference,) = overall.differences
    # By scenes 10 each time, although the means say -7.5: e is in one run only.
    assert (difference.mean, difference.low, difference.high, difference.scenes) == (10.0, 10.0, 10.0, 3)
    assert overall.verdict(difference) == "up"
    assert replace(overall, higher_is_better=False).verdict(difference) == "down"
    assert (overall.digits, worlds.key) == (1, "worlds")
    (leaks,) = groups["vitals"]
    assert (leaks.verdict(leaks.differences[0]), leaks.digits) == ("", 3)


def test_repetitions_of_a_scene_are_one_scene(tmp_path: Path) -> None:
    one = save(tmp_path / "one", [scene("a", 10.0, 0), scene("a", 20.0, 1), scene("b", 5.0)])
    other = save(tmp_path / "other", [scene("a", 20.0, 0), scene("b", 10.0)])
    (difference,) = rows_of(read_runs([one, other]))["judge"][0].differences
    assert (difference.mean, difference.scenes) == (5.0, 2)


def test_the_page_stands_alone_and_shows_all(two: list[Path], tmp_path: Path) -> None:
    page = page_of(two, tmp_path / "page" / "compare.html")
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert not outline.names & {"script", "link", "iframe", "img"}
    assert not re.search(r"https?://(?!sft|ppo)|url\(|@import", page)
    assert "&lt;script&gt;alert(1)" in page
    for text in (
        "Overall",
        "+10.0",
        "n 3",
        "Title of a",
        "turn 2: “Yes.”: she said no",
        "severity 3",
        "(1 missing)",
    ):
        assert text in page, text
    assert '<span class="system_thinking">Bow.</span>' in page
    assert '<span class="role_action">*nods*</span>' in page
    assert page.count("<svg") == 2  # bars, and the course of the one dimension that was judged in parts
    assert "Not measured under the same conditions" not in page
    assert "no call failed" in page


def test_what_the_book_says_stands_below_the_scene(tmp_path: Path) -> None:
    given = (Line("Ann", "[She knows.] Where is it?", "given", "coser"),)
    paths = [
        save(tmp_path / name, [scene("a", 1.0, reference=given)], benchmark="coser", runs=runs)
        for name, runs in (("one", 1), ("two", 2))
    ]
    page = page_of(paths, tmp_path / "c.html")
    assert page.count("As it stands in the book") == 1
    assert '<span class="role_thinking">[She knows.]</span>' in page.split("As it stands in the book")[1]
    assert "the judge saw them, without plans, under protocol her only" in page
    assert "Of a scene's repetitions the first is shown." in page


def test_a_run_with_too_many_failures_is_marked(two: list[Path], tmp_path: Path) -> None:
    refused = Failure(FailureKind.REFUSED, "I will not", "judge")
    bad = scene("a", 99.0, failures=(refused,))
    broken = save(
        tmp_path / "broken",
        [bad],
        judgements_failed=3,
        simulations_failed=1,
        failures={"judge": {"refused": 3}},
    )
    page = page_of([*two, broken], tmp_path / "compare.html")
    assert "3 of 10 judgements failed (30.0%)" in page
    assert "1 of 1 dialogues broke off" in page
    assert "judge: 3 refused" in page
    assert "judge: refused: I will not" in page
    assert page.count('class="void"') >= 4  # its scores, and the differences that rest on them
    assert 'opacity="0.3"' in page
    assert page.count('<span class="small invalid">invalid</span>') == 2  # in both tables


def test_other_conditions_are_said(tmp_path: Path) -> None:
    one = save(tmp_path / "one", [scene("a", 1.0)])
    other = save(
        tmp_path / "other",
        [scene("a", 1.0)],
        settings={"turns": 5},
        models={"actor": {"model": "x"}, "judge": {"model": "small"}},
    )
    runs = read_runs([one, other])
    assert unequal_conditions(runs) == [
        ("settings.turns", ["3", "5"]),
        ("judge", ["model big", "model small"]),
    ]
    assert "Not measured under the same conditions" in page_of([one, other], tmp_path / "c.html")


def test_scenes_are_ordered_by_difference_and_cut(tmp_path: Path) -> None:
    one = save(tmp_path / "one", [scene(name, 50.0) for name in "abcdef"] + [scene("x", None)])
    values = {"a": 50.0, "b": 20.0, "c": 90.0, "d": 51.0, "e": 49.0, "f": 60.0}
    other = save(tmp_path / "other", [scene(name, value) for name, value in values.items()])
    runs = read_runs([one, other])
    rows, left_out = scene_rows(runs, "overall", 10)
    assert [row.scene_id for row in rows] == ["b", "e", "a", "d", "f", "c", "x"]
    assert rows[-1].difference is None
    assert rows[-1].sides[1].lines == ()
    rows, left_out = scene_rows(runs, "overall", 4)
    assert ([row.scene_id for row in rows], left_out) == (["b", "e", "f", "c"], 3)
    assert [row.scene_id for row in scene_rows(runs, "overall", 1)[0]] == ["b"]


def test_flaws_stand_at_the_turn_that_they_name(two: list[Path]) -> None:
    side = scene_rows(read_runs(two), "overall", 9)[0][0].sides[0]
    assert [[flaw.type for flaw in line.flaws] for line in side.lines] == [[], ["contradiction"], []]
    assert [flaw.type for flaw in side.flaws] == ["stagnation"]
    assert turns_named("turns 3, 15: x") == (3, 15)
    assert turns_named("it turns 3: x") == ()


def test_names_of_runs(tmp_path: Path) -> None:
    assert short_names([tmp_path / "a" / "eval", tmp_path / "b" / "eval"]) == ["a/eval", "b/eval"]
    assert short_names([Path("x/one"), Path("y/two")]) == ["one", "two"]


def test_what_cannot_be_compared(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two"):
        read_runs(two[:1])
    with pytest.raises(UserError, match="2 different ones are needed"):
        read_runs(two, ["a", "a"])
    with pytest.raises(UserError, match="different ones"):
        read_runs([two[0], two[0]])
    other = save(tmp_path / "coser", [scene("a", 1.0)], benchmark="coser")
    with pytest.raises(UserError, match="of coser and roleplay_bench"):
        read_runs([two[0], other])
    with pytest.raises(UserError, match="cannot be read"):
        read_runs([two[0], tmp_path / "none"])


def test_bars_have_whiskers_and_say_their_values() -> None:
    svg = bar_chart(
        [BarGroup("Worlds", [Bar(50.0, 40.0, 60.0), None, Bar(-10.0, faint=True)])], ["a", "b", "c<"], "x"
    )
    assert svg.count("<rect") == 2
    assert svg.count("whisker") == 1
    assert "<title>Worlds, a: 50 [40, 60]</title>" in svg
    assert "<title>Worlds, c&lt;: -10</title>" in svg
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths[0] == pytest.approx(5 * widths[1], rel=1e-3)
    with pytest.raises(ValueError, match="no value"):
        bar_chart([BarGroup("Worlds", [None])], ["a"], "x")
