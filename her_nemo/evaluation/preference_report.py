"""How well a reward model agrees with preference labels: accuracy with its interval, and where it fails.

One report for scalar reward models (a score for each reply) and for judges (a verdict for each order of the two).
Ties count half. What could not be scored is counted beside the accuracy and is in none of the figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from her_nemo.evaluation.statistics import Difference, Interval, bootstrap_mean, paired_bootstrap
from her_nemo.roleplay.verdict import Winner

LENGTH_MARGIN = 0.2  # of the longer reply: below it two replies are as good as equally long


class Outcome(StrEnum):
    """Whether the model prefers the reply that people preferred."""

    RIGHT = "right"
    WRONG = "wrong"
    TIE = "tie"
    FAILED = "failed"


class Order(StrEnum):
    """Where the preferred reply stood."""

    CHOSEN_FIRST = "chosen_first"
    CHOSEN_SECOND = "chosen_second"
    NONE = ""  # the replies were scored one by one


VALUES = {Outcome.RIGHT: 1.0, Outcome.TIE: 0.5, Outcome.WRONG: 0.0}


@dataclass(frozen=True)
class PairOutcome:
    """What a model said of one pair, in one order.

    Attributes:
        pair_id: the same for both orders of a pair.
        chosen_length, rejected_length: of the replies, in any one unit.
        dimensions: what the two differ in, where the data say so.
        margin: score of the chosen reply less that of the rejected one, for scalar models.
        failure: why there is no verdict, where there is none.
    """

    pair_id: str
    outcome: Outcome
    chosen_length: int
    rejected_length: int
    order: Order = Order.NONE
    dimensions: tuple[str, ...] = ()
    margin: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class Accuracy:
    """One group of pairs. `interval` is None where nothing of it was scored."""

    interval: Interval | None
    scored: int
    right: int
    wrong: int
    ties: int
    failed: int

    @property
    def tie_share(self) -> float:
        return self.ties / self.scored if self.scored else 0.0


@dataclass(frozen=True)
class PreferenceReport:
    """All of it.

    Attributes:
        overall: over pairs; the two orders of a pair are one pair, with the mean of both.
        by_order: of judges; `order_effect` is accuracy with the chosen reply second less first, over pairs judged
            both ways: 0 for a judge that does not care where a reply stands.
        consistent: share of the pairs with a verdict in both orders that have the same winner in both (or a tie in
            both); None without such pairs.
        by_length: chosen_longer, similar, chosen_shorter.
        by_dimension: where the data name dimensions; a pair may be in several.
        mean_margin: of scalar models.
        failures: why pairs were not scored -> how many.
        valid: whether few enough failed.
    """

    overall: Accuracy
    by_order: dict[str, Accuracy]
    order_effect: Difference | None
    consistent: float | None
    by_length: dict[str, Accuracy]
    by_dimension: dict[str, Accuracy]
    mean_margin: float | None
    failures: dict[str, int]
    max_failure_share: float

    @property
    def failure_share(self) -> float:
        total = self.overall.scored + self.overall.failed
        return self.overall.failed / total if total else 0.0

    @property
    def valid(self) -> bool:
        return self.overall.interval is not None and self.failure_share <= self.max_failure_share

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"valid": self.valid, "failure_share": self.failure_share, **asdict(self)}


def preference_report(
    pairs: Sequence[PairOutcome],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    max_failure_share: float = 0.05,
) -> PreferenceReport:
    """The report over pairs, in any order.

    Raises:
        ValueError: no pairs, or a pair twice in the same order.
    """
    if not pairs:
        raise ValueError("a report on no pairs")
    twice = [key for key, times in Counter((p.pair_id, p.order) for p in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"pair {twice[0][0]!r} is there twice in the same order")

    def accuracy(some: Iterable[PairOutcome]) -> Accuracy:
        return accuracy_of(some, resamples=resamples, level=level, seed=seed)

    def grouped(names: Callable[[PairOutcome], Iterable[str]]) -> dict[str, Accuracy]:
        groups: dict[str, list[PairOutcome]] = {}
        for pair in pairs:
            for name in names(pair):
                groups.setdefault(name, []).append(pair)
        return {name: accuracy(groups[name]) for name in sorted(groups)}

    orders = {
        order: {p.pair_id: VALUES[p.outcome] for p in pairs if p.order is order and p.outcome in VALUES}
        for order in (Order.CHOSEN_FIRST, Order.CHOSEN_SECOND)
    }
    first, second = orders[Order.CHOSEN_FIRST], orders[Order.CHOSEN_SECOND]
    both = first.keys() & second.keys()
    effect = paired_bootstrap(first, second, resamples=resamples, level=level, seed=seed) if both else None
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    return PreferenceReport(
        overall=accuracy(pairs),
        by_order=grouped(lambda pair: [pair.order.value] if pair.order else []),
        order_effect=effect,
        consistent=sum(first[key] == second[key] for key in both) / len(both) if both else None,
        by_length=grouped(lambda pair: [length_group(pair.chosen_length, pair.rejected_length)]),
        by_dimension=grouped(lambda pair: pair.dimensions),
        mean_margin=math.fsum(margins) / len(margins) if margins else None,
        failures=dict(Counter(p.failure or "failed" for p in pairs if p.outcome is Outcome.FAILED)),
        max_failure_share=max_failure_share,
    )


def accuracy_of(pairs: Iterable[PairOutcome], *, resamples: int, level: float, seed: int) -> Accuracy:
    """Accuracy over pairs with its bootstrap interval; the orders of one pair are averaged first, as they are not
    independent."""
    counts: Counter[Outcome] = Counter()
    by_pair: dict[str, list[float]] = {}
    for pair in pairs:
        counts[pair.outcome] += 1
        if pair.outcome in VALUES:
            by_pair.setdefault(pair.pair_id, []).append(VALUES[pair.outcome])
    values = [sum(found) / len(found) for _, found in sorted(by_pair.items())]
    interval = bootstrap_mean(values, resamples=resamples, level=level, seed=seed) if values else None
    failed = counts.pop(Outcome.FAILED, 0)
    return Accuracy(
        interval,
        counts.total(),
        counts[Outcome.RIGHT],
        counts[Outcome.WRONG],
        counts[Outcome.TIE],
        failed,
    )


def outcome_of_scores(chosen: float, rejected: float, tie_margin: float = 0.0) -> Outcome:
    """Of two scores; equal within `tie_margin` is a tie, and a score that is not finite has failed."""
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        return Outcome.FAILED
    if abs(chosen - rejected) <= tie_margin:
        return Outcome.TIE
    return Outcome.RIGHT if chosen > rejected else Outcome.WRONG


def outcome_of_verdict(label: Winner, said: Winner | None) -> Outcome:
    """Of a judge's word; None is a verdict that could not be read. A tie is half right against a label that is none."""
    if said is None:
        return Outcome.FAILED
    if said is label:
        return Outcome.RIGHT
    return Outcome.TIE if said is Winner.TIE else Outcome.WRONG


def length_group(chosen: int, rejected: int) -> str:
    """chosen_longer, chosen_shorter, or similar: within LENGTH_MARGIN of the longer one."""
    if abs(chosen - rejected) <= LENGTH_MARGIN * max(chosen, rejected):
        return "similar"
    return "chosen_longer" if chosen > rejected else "chosen_shorter"


def table(report: PreferenceReport) -> str:
    """The report as lines of text, for the terminal."""
    rows = [("all pairs", report.overall)]
    for title, group in (
        ("order", report.by_order),
        ("length", report.by_length),
        ("dimension", report.by_dimension),
    ):
        rows += [(f"{title}: {name.replace('_', ' ')}", accuracy) for name, accuracy in group.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  accuracy  interval          scored   ties  failed"]
    for name, accuracy in rows:
        found = accuracy.interval
        mean = "-" if found is None else f"{found.mean:.3f}"
        spread = "-" if found is None or found.low is None else f"[{found.low:.3f}, {found.high:.3f}]"
        lines.append(
            f"{name:{width}}  {mean:>8}  {spread:16}  {accuracy.scored:6}  {accuracy.ties:5}  {accuracy.failed:6}"
        )
    if report.consistent is not None and report.order_effect is not None:
        lines.append(
            f"the same winner in both orders: {report.consistent:.3f}; "
            f"chosen second less first: {report.order_effect.mean:+.3f}"
        )
    if not report.valid:
        lines.append(
            f"INVALID: {report.failure_share:.1%} of the judgements failed, more than {report.max_failure_share:.1%}"
        )
    return "\n".join(lines)
