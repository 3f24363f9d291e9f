"""The run report: what it must show, and that nothing in a reply can break out of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from page_outline import Outline

from her_nemo.evaluation.charts import MAX_POINTS, Curve, line_chart, number, smoothed, thinned, ticks
from her_nemo.evaluation.figures import checks, difference, table
from her_nemo.evaluation.report import (
    metric_series,
    pieces,
    plan_charts,
    sampling_words,
    side_by_side,
    write_report,
)
from her_nemo.evaluation.statistics import mean_and_standard_error, paired_difference

GOOD = "<system_thinking>Mara must bow.</system_thinking>Mara: <role_action>bows</role_action> Yes."
EVIL = "<system_thinking>x</system_thinking>Mara: <script>alert(1)</script> & <role_thinking>open"


def evaluation(score: float, *, samples: int = 400, valid: float = 0.9) -> dict:
    return {
        "oracle_score": score,
        "oracle_score_se": 0.01,
        "principles": {"plan": score, "secret": 0.5},
        "format_valid": valid,
        "leak_rate": 0.1,
        "pattern_entropy": 2.0,
        "top1_pattern_share": 0.4,
        "self_bleu": 0.8,
        "samples": samples,
        "truncated": 3,
        "mean_tokens": 80.0,
    }


@pytest.fixture
def report() -> dict:
    return {
        "stages": [{"name": "base", "seconds": 61.0}, {"name": "ppo", "seconds": 122.0}],
        "parity": {"logits_max_abs_diff": 2e-6},
        "reward_model": {"heldout_accuracy": 0.9},
        "ppo": {
            "reward_first": 0.1,
            "reward_last": 1.5,
            "kl_last": 0.2,
            "ratio_step0": 1.0,
            "logprob_gap_max": 1e-5,
        },
        "eval": {"base": evaluation(0.1), "sft": evaluation(0.7), "ppo": evaluation(0.8, valid=0.97)},
        "versions": {"torch": "2.13.0"},
        "machine": {"cpus": 2},
        "seed": 7,
        "config": {"out": "<b>runs</b>"},
    }


@pytest.fixture
def samples() -> list[dict]:
    def reply(text: str) -> dict:
        return {
            "reply": text,
            "score": 0.5,
            "principles": {"plan": True, "secret": False},
            "truncated": False,
        }

    return [
        {
            "trace_id": "t-1",
            "character": "Mara",
            "brief": "Mara is <timid>.",
            "prompt_tail": "Odo: Bow & go!",
            "replies": {"base": reply("nothing"), "sft": reply(EVIL), "ppo": reply(GOOD)},
        }
    ]


def test_the_page_has_everything_and_stands_alone(report: dict, samples: list[dict], tmp_path: Path) -> None:
    curves = {"sft/train/loss": [(1, 2.0), (2, 1.0)], "ppo/odd/tag": [(1, 3.0), (2, math.nan)]}
    write_report(report, curves, samples, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert not outline.names & {"script", "link", "iframe", "img", "b>"}
    assert not re.search(r"https?://|url\(|@import", page)
    for text in (
        "Base",
        "SFT",
        "PPO",
        "SFT: loss",
        "ppo/odd/tag",
        "2 min 02 s",
        "+0.100",
        "± 0.014",
        "seed 7",
    ):
        assert text in page, text
    assert page.count("<svg") == 2
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "words"),
    [
        (0.0, 0, 1.0, ", greedily"),
        (1.0, 0, 0.95, ", sampled at temperature 1, top-p 0.95"),
        (0.6, 20, 1.0, ", sampled at temperature 0.6, top-k 20"),
    ],
)
def test_the_page_says_how_replies_were_drawn(temperature: float, top_k: int, top_p: float, words: str) -> None:
    way = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    assert sampling_words({"eval": {"sft": {"sampling": way}, "ppo": {"sampling": way}}}) == words
    other = way | {"top_p": 0.5}
    assert sampling_words({"eval": {"sft": {"sampling": way}, "ppo": {"sampling": other}}}) == ""


def test_replies_are_escaped(report: dict, samples: list[dict], tmp_path: Path) -> None:
    write_report(report, {'a/"><script>': [(1, 1.0)]}, samples, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Mara is &lt;timid&gt;." in page
    assert "&lt;b&gt;runs&lt;/b&gt;" in page


def test_a_report_without_figures_still_makes_a_page(tmp_path: Path) -> None:
    write_report({}, {}, [], tmp_path / "report.html")
    assert "not measured" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_pieces_tile_the_reply_and_mark_what_is_wrong() -> None:
    for text in (GOOD, EVIL, "", "plain", "<role_thinking>a</system_thinking>b <Role_Action>c"):
        parts, _ = pieces(text)
        assert "".join(part.text for part in parts) == text
    parts, nowhere = pieces(GOOD, expect_name="Mara")
    assert nowhere == []
    assert [(part.text, part.classes) for part in parts[:4]] == [
        ("<system_thinking>", "system_thinking tag"),
        ("Mara must bow.", "system_thinking"),
        ("</system_thinking>", "system_thinking tag"),
        ("Mara: ", "name"),
    ]
    parts, nowhere = pieces("Hello")
    assert nowhere == ["missing_plan", "missing_name"]
    parts, _ = pieces(GOOD.replace("role_action", "Role_Action"))
    assert [part.text for part in parts if "bad" in part.classes] == ["<Role_Action>", "</Role_Action>"]
    parts, _ = pieces("<think>plan</think>Hello")
    assert [part.text for part in parts if "tag" in part.classes.split()] == ["<think>", "</think>"]


def test_checks_pass_fail_or_stay_open(report: dict) -> None:
    assert all(check.passed for check in checks(report))
    report["eval"]["ppo"] = evaluation(0.72, samples=200, valid=0.9)
    report["ppo"]["ratio_step0"] = 1.001
    failed = [check.name for check in checks(report) if check.passed is False]
    assert len(failed) == 4  # two standard errors, samples, ratio, format
    del report["eval"]["sft"]
    assert [check.passed for check in checks(report)][:3] == [None, None, None]


def test_difference_prefers_the_measured_one(report: dict) -> None:
    assert difference(report) == (pytest.approx(0.1), pytest.approx(math.hypot(0.01, 0.01)))
    report["gain"] = {"ppo_over_sft": 0.11, "standard_error": 0.005}
    assert difference(report) == (0.11, 0.005)


def test_table_by_hand(report: dict) -> None:
    rows = {row.name: row for row in table(report)}
    assert [cell.text for cell in rows["Oracle score"].cells] == [
        "0.100 ± 0.010",
        "0.700 ± 0.010",
        "0.800 ± 0.010",
    ]
    # sqrt(0.9 * 0.1 / 400 + 0.97 * 0.03 / 400) = 1.7 points
    assert rows["Format valid"].difference == "+7.0 ± 1.7"
    assert rows["Pattern entropy"].cells[0].text == "2.00"
    assert rows["Leak rate"].better == -1
    assert "Well formed" not in rows  # a principle that was not measured


def test_scenes_are_spaced_over_what_all_models_answered(tmp_path: Path) -> None:
    for model, last in (("sft", 10), ("ppo", 8)):
        (tmp_path / model).mkdir()
        rows = [
            {
                "trace_id": f"t{i}",
                "sample": sample,
                "character": "Mara",
                "brief": "",
                "prompt_tail": "Hi",
                "reply": f"{model} {i} {sample}",
            }
            for i in range(last)
            for sample in (0, 1)
        ]
        (tmp_path / model / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = side_by_side({"sft": tmp_path / "sft", "ppo": tmp_path / "ppo"}, count=4)
    assert [row["trace_id"] for row in chosen] == ["t0", "t2", "t4", "t6"]
    assert chosen[1]["replies"]["ppo"]["reply"] == "ppo 2 0"


def test_curves_are_named_after_their_stage(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tag": "train/loss", "value": 2.0}\n')
    curves = metric_series({"sft": tmp_path, "ppo": tmp_path / "none"})
    assert curves == {"sft/train/loss": [(1, 2.0)]}
    charts, more = plan_charts(curves | {"sft/val/loss": [(1, 2.5)], "sft/train/lr": [(1, 0.1)]})
    assert [chart["names"] for chart in charts] == [["train", "val"]]
    assert [chart["title"] for chart in more] == ["sft/train/lr"]


def test_ticks_are_round_and_enclose() -> None:
    assert ticks(0.0, 1.0, 4) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert ticks(1, 60, 4, whole=True) == pytest.approx([0, 20, 40, 60])
    assert ticks(3.0, 3.0, 4)[0] < 3.0 < ticks(3.0, 3.0, 4)[-1]
    for low, high in ((-0.013, 0.21), (5e-7, 9e-6), (1000.0, 1001.0), (-4.0, -3.5)):
        marks = ticks(low, high, 4)
        assert marks[0] <= low + 1e-9
        assert marks[-1] >= high - 1e-9
        assert 2 <= len(marks) <= 8


def test_charts_thin_smooth_and_survive_odd_curves() -> None:
    points = [(step, float(step % 2)) for step in range(1000)]
    thin = thinned(points)
    assert len(thin) == MAX_POINTS
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(0.5, abs=0.05)
    assert [x for x, _ in smoothed(thin)] == [x for x, _ in thin]
    flat = smoothed([(x, 2.0) for x in range(40)])
    assert all(y == pytest.approx(2.0) for _, y in flat)
    assert "<svg" in line_chart([Curve("a", [(5, 1.0)])], "one point")
    assert "nan" not in line_chart([Curve("a", [(1, math.nan), (2, math.inf), (3, 1.0)])], "odd")
    with pytest.raises(ValueError, match="no finite value"):
        line_chart([Curve("a", [(1, math.nan)])], "nothing")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.1255, "0.126"), (12.34, "12.3"), (123.4, "123"), (4321, "4,321"), (3.2e-6, "3.2e-06")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_statistics_by_hand() -> None:
    # Variance 1 over three values.
    assert mean_and_standard_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(math.sqrt(1 / 3)))
    assert math.isnan(mean_and_standard_error([1.0])[1])
    mean, error = paired_difference({"a": 0.1, "b": 0.5, "x": 9}, {"a": 0.3, "b": 0.6, "y": 9})
    assert (mean, error) == (pytest.approx(0.15), pytest.approx(0.05))
    with pytest.raises(ValueError, match="no key in common"):
        paired_difference({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="no values"):
        mean_and_standard_error([])
