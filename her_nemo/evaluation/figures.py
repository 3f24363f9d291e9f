"""The figures of a run report: what must hold, the headline numbers, and the table that compares the models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from her_nemo.evaluation.oracle import PRINCIPLES

Report = Mapping[str, Any]

MODELS = ("base", "sft", "ppo")


@dataclass(frozen=True)
class Check:
    """Something the run must show. `passed` is None where the report lacks the figures."""

    name: str
    shown: str
    passed: bool | None


@dataclass(frozen=True)
class Cell:
    """One figure of the table: its text, and its share of the bar behind it (None: no bar)."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. `better` tells the sign of an improvement: 1, -1, or 0 for neither."""

    name: str
    note: str
    cells: tuple[Cell, ...]
    difference: str
    better: int = 0
    head: bool = False


def checks(report: Report) -> list[Check]:
    """What a demo run must show, each against its figures."""
    scores = [_get(report, "eval", model, "oracle_score") for model in MODELS]
    gain, error = difference(report)
    accuracy = _get(report, "reward_model", "heldout_accuracy")
    ratio = _get(report, "ppo", "ratio_step0")
    valid = _get(report, "eval", "ppo", "format_valid")
    fewest = [_get(report, "eval", model, "samples") for model in MODELS]
    logits = _get(report, "parity", "logits_max_abs_diff")

    def check(name: str, shown: str, known: Sequence[Any], test: Callable[[], bool]) -> Check:
        complete = all(value is not None for value in known)
        return Check(name, shown if complete else "not measured", test() if complete else None)

    return [
        check(
            "Oracle score rises: base < SFT < PPO",
            " < ".join(_decimal(score) for score in scores),
            scores,
            lambda: scores[0] < scores[1] < scores[2],
        ),
        check(
            "PPO above SFT by more than two standard errors",
            f"{_signed(gain)} = {gain / error:.1f} standard errors" if gain is not None and error else "",
            (gain, error or None),
            lambda: gain > 2 * error,
        ),
        check(
            "At least 300 held-out samples a model",
            f"{min((n or 0) for n in fewest)}",
            fewest,
            lambda: min(fewest) >= 300,
        ),
        check(
            "Reward model: held-out accuracy at least 85 %",
            _percent(accuracy),
            (accuracy,),
            lambda: accuracy >= 0.85,
        ),
        check("PPO: ratio 1 at step 0 within 1e-5", f"{ratio}", (ratio,), lambda: abs(ratio - 1) <= 1e-5),
        check("PPO: at least 95 % well-formed replies", _percent(valid), (valid,), lambda: valid >= 0.95),
        check(
            "Export: logits equal Megatron's within 1e-4",
            _decimal(logits, "g"),
            (logits,),
            lambda: logits <= 1e-4,
        ),
    ]


def difference(report: Report) -> tuple[float | None, float | None]:
    """PPO's oracle score less SFT's, and its standard error: `report["gain"]`, else from the two models' own."""
    gain, error = _get(report, "gain", "ppo_over_sft"), _get(report, "gain", "standard_error")
    if gain is not None:
        return gain, error
    pairs = [
        (_get(report, "eval", model, "oracle_score"), _get(report, "eval", model, "oracle_score_se"))
        for model in ("sft", "ppo")
    ]
    if any(value is None for pair in pairs for value in pair):
        return None, None
    return pairs[1][0] - pairs[0][0], math.hypot(pairs[0][1], pairs[1][1])


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: (name, figure, remark)."""
    gain, error = difference(report)
    ppo = report.get("ppo", {})
    seconds = sum(stage["seconds"] for stage in report.get("stages", []))
    rows = [
        ("PPO over SFT", _signed(gain), f"± {_decimal(error)} standard error, oracle score", gain),
        (
            "Reward model",
            _percent(_get(report, "reward_model", "heldout_accuracy")),
            "held-out pairs ranked right",
            _get(report, "reward_model", "heldout_accuracy"),
        ),
        (
            "PPO reward",
            f"{_decimal(ppo.get('reward_first'), '.2f')} → {_decimal(ppo.get('reward_last'), '.2f')}",
            f"KL {_decimal(ppo.get('kl_last'), '.3g')} at the end",
            ppo.get("reward_last"),
        ),
        (
            "Logits",
            _decimal(_get(report, "parity", "logits_max_abs_diff"), ".1e"),
            "largest difference, Hugging Face to Megatron",
            _get(report, "parity", "logits_max_abs_diff"),
        ),
        (
            "Log-probs",
            _decimal(ppo.get("logprob_gap_max"), ".1e"),
            "largest gap, rollout to trainer",
            ppo.get("logprob_gap_max"),
        ),
        ("Whole run", duration(seconds), f"{len(report.get('stages', []))} stages", seconds or None),
    ]
    return [(name, figure, remark) for name, figure, remark, known in rows if known is not None]


def table(report: Report) -> list[Row]:
    """The comparison of the models."""
    models = models_of(report)

    def row(
        name: str,
        note: str,
        *keys: str,
        style: Callable[[Any], str] = _percent,
        better: int = 1,
        bar: bool = True,
        head: bool = False,
    ) -> Row:
        values = [_get(report, "eval", model, *keys) for model in models]
        cells = tuple(Cell(style(v), v if bar and v is not None else None) for v in values)
        return Row(name, note, cells, _row_difference(report, keys, style), better, head)

    score = _score_row(report, models)
    rows = [
        *([score] if score else []),
        *(
            row(title_of(name), "", "principles", name)
            for name in PRINCIPLES
            if any(_get(report, "eval", model, "principles", name) is not None for model in models)
        ),
        row("Format valid", "replies without any defect", "format_valid"),
        row("Leak rate", "hidden text would show; lower is better", "leak_rate", better=-1),
        row(
            "Pattern entropy",
            "bits, order of segments",
            "pattern_entropy",
            style=_two_places,
            better=0,
            bar=False,
        ),
        row("Top-1 pattern share", "", "top1_pattern_share", better=0),
        row("Self-BLEU", "1 = all replies alike", "self_bleu", style=_decimal, better=0, bar=False),
        row("Reply length", "tokens", "mean_tokens", style=_one_place, better=0, bar=False),
        row("Cut at the token limit", "replies", "truncated", style=_count, better=0, bar=False),
        row("Samples", "", "samples", style=_count, better=0, bar=False),
    ]
    return [row for row in rows if any(cell.text != "–" for cell in row.cells)]


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def models_of(report: Report) -> list[str]:
    present = report.get("eval", {})
    return [model for model in MODELS if model in present] + [m for m in present if m not in MODELS]


def _score_row(report: Report, models: Sequence[str]) -> Row | None:
    values = [_get(report, "eval", model, "oracle_score") for model in models]
    if all(value is None for value in values):
        return None
    errors = [_get(report, "eval", model, "oracle_score_se") for model in models]
    cells = tuple(
        Cell(f"{_decimal(value)} ± {_decimal(error)}" if error is not None else _decimal(value), value)
        for value, error in zip(values, errors, strict=True)
    )
    gain, error = difference(report)
    shown = "–" if gain is None else _signed(gain) + ("" if error is None else f" ± {_decimal(error)}")
    return Row("Oracle score", "share of principles kept ± standard error", cells, shown, 1, head=True)


def _row_difference(report: Report, keys: Sequence[str], style: Callable[[Any], str]) -> str:
    """PPO less SFT; for shares in points with the standard error of independent samples."""
    sft, ppo = (_get(report, "eval", model, *keys) for model in ("sft", "ppo"))
    if sft is None or ppo is None or style is _count:
        return ""
    if style is not _percent:
        return f"{ppo - sft:+.3g}"
    counts = [_get(report, "eval", model, "samples") for model in ("sft", "ppo")]
    text = f"{100 * (ppo - sft):+.1f}"
    if not all(counts):
        return text
    error = math.sqrt(sum(p * (1 - p) / n for p, n in zip((sft, ppo), counts, strict=True)))
    return f"{text} ± {100 * error:.1f}"


def _get(report: Report, *keys: str) -> Any:
    value: Any = report
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def title_of(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _decimal(value: float | None, style: str = ".3f") -> str:
    return "–" if value is None else format(value, style)


def _two_places(value: float | None) -> str:
    return _decimal(value, ".2f")


def _one_place(value: float | None) -> str:
    return _decimal(value, ".1f")


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"
