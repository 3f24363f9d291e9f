"""How well a judge judges: accuracy on labelled pairs, and whether it says the same in both orders.

The two orders of a pair are no independent tries: every interval is over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from her_nemo.evaluation.statistics import mean_and_standard_error
from her_nemo.roleplay.verdict import Winner

Z95 = 1.96  # standard errors to either side of a 95 % interval


@dataclass(frozen=True)
class Judged:
    """One verdict beside its label. `said` is None where it could not be read; `words` are of cand_1 and cand_2."""

    pair: str
    label: Winner
    said: Winner | None
    words: tuple[int, int]

    @property
    def right(self) -> bool:
        return self.said is self.label

    @property
    def order(self) -> str:
        """Where the better reply stands; tie where the label is one."""
        return self.label.value

    @property
    def length(self) -> str:
        """The better reply's length next to the other's."""
        first, second = self.words if self.label is Winner.CAND_1 else reversed(self.words)
        if first == second or self.label is Winner.TIE:
            return "same"
        return "longer" if first > second else "shorter"


def judge_figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """All figures of a judge on labelled pairs.

    `accuracy` is over verdicts that can be read (a tie against a label is wrong); `accuracy_all` counts the unreadable
    as wrong. `position_consistency` is the share of pairs, both orders of which can be read, where both name the same
    reply or both a tie. Shares come as {"value", "low", "high", "count"} with a 95 % interval over pairs.
    """
    read = [one for one in judged if one.said is not None]
    return {
        "prompts": len(judged),
        "pairs": len({one.pair for one in judged}),
        "unparsed": len(judged) - len(read),
        "ties": sum(one.said is Winner.TIE for one in read),
        "said_cand_1": _share([one.said is Winner.CAND_1 for one in read]),
        "accuracy": _accuracy(read),
        "accuracy_all": _accuracy(judged),
        "position_consistency": _interval([float(same) for same in _consistent(read)]),
        "by_order": _by(read, lambda one: one.order),
        "by_length": _by(read, lambda one: one.length),
    }


def pair_scores(judged: Sequence[Judged]) -> dict[str, float]:
    """Share of right verdicts of each pair, the unreadable wrong: for the paired difference of two judges."""
    found: dict[str, list[bool]] = {}
    for one in judged:
        found.setdefault(one.pair, []).append(one.right)
    return {pair: sum(right) / len(right) for pair, right in found.items()}


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    rows = [("all", figures["accuracy"])]
    rows += [(f"better is {name}", share) for name, share in figures["by_order"].items()]
    rows += [(f"better is {name}", share) for name, share in figures["by_length"].items()]
    lines = [f"  {'accuracy':18} {'':>6} {'95 %':>15} {'verdicts':>9}"]
    lines += [f"  {name:18} {_written(share)} {share['count']:9}" for name, share in rows]
    consistency = figures["position_consistency"]
    lines.append(f"  {'both orders agree':18} {_written(consistency)} {consistency['count']:9} pairs")
    said = figures["said_cand_1"]
    first = "" if said is None else f", cand_1 named in {said:.3f}"
    lines.append(
        f"  {figures['prompts']} verdicts on {figures['pairs']} pairs: {figures['unparsed']} unparsed, "
        f"{figures['ties']} ties{first}"
    )
    return "\n".join(lines)


def _consistent(read: Sequence[Judged]) -> list[bool]:
    """For each pair with both orders read, whether they agree."""
    said: dict[str, dict[Winner, Winner]] = {}
    for one in read:
        if one.label is not Winner.TIE and one.said is not None:
            said.setdefault(one.pair, {})[one.label] = one.said
    both = [orders for orders in said.values() if len(orders) == 2]
    return [orders[Winner.CAND_1].swapped is orders[Winner.CAND_2] for orders in both]


def _by(read: Sequence[Judged], name_of: Callable[[Judged], str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Judged]] = {}
    for one in read:
        groups.setdefault(name_of(one), []).append(one)
    return {name: _accuracy(groups[name]) for name in sorted(groups)}


def _accuracy(judged: Sequence[Judged]) -> dict[str, Any]:
    return _interval(list(pair_scores(judged).values())) | {
        "value": _share([one.right for one in judged]),
        "count": len(judged),
    }


def _interval(scores: Sequence[float]) -> dict[str, Any]:
    """Mean of one number a pair, with its 95 % interval; None where there are too few."""
    if not scores:
        return {"value": None, "low": None, "high": None, "count": 0}
    mean, error = mean_and_standard_error(scores)
    margin = None if math.isnan(error) else Z95 * error
    return {
        "value": mean,
        "low": None if margin is None else max(0.0, mean - margin),
        "high": None if margin is None else min(1.0, mean + margin),
        "count": len(scores),
    }


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _written(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return f"{'-':>6} {'':>15}"
    between = "" if share["low"] is None else f"{share['low']:.3f} - {share['high']:.3f}"
    return f"{share['value']:6.3f} {between:>15}"
