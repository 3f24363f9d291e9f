"""Many units of work at a time, results in the order of the units, and a record of every one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm import tqdm

from her_nemo.data.synthesis.asker import Asked, Asker, Fault, Quarantined

Result = TypeVar("Result")


@dataclass(frozen=True)
class Unit(Generic[Result]):
    """Something to synthesise by itself: a chapter, or a character of a conversation."""

    name: str
    work: Callable[[], Awaitable[tuple[Result, Sequence[Asked]]]]


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of a unit: a result, or faults and the last answer."""

    name: str
    result: Result | None
    trace: tuple[Asked, ...]
    faults: tuple[Fault, ...] = ()
    answer: str = ""

    @property
    def quarantined(self) -> bool:
        return bool(self.faults)


async def run_units(
    units: Sequence[Unit[Result]], asker: Asker, *, concurrency: int, title: str
) -> list[Outcome[Result]]:
    """Runs all units, at most `concurrency` at a time.

    An error that is not one unit's own (UserError, a bug) stops all of them and is raised.
    """
    outcomes: dict[int, Outcome[Result]] = {}
    bar = tqdm(total=len(units), desc=title, unit="unit", disable=None)

    async def one(index: int) -> None:
        unit = units[index]
        try:
            result, trace = await unit.work()
            outcomes[index] = Outcome(unit.name, result, tuple(trace))
        except Quarantined as stopped:
            outcomes[index] = Outcome(unit.name, None, stopped.trace, stopped.faults, stopped.answer)
        bar.update()
        bar.set_postfix_str(_spent(asker), refresh=False)

    with bar:
        await work_through(len(units), one, concurrency=concurrency)
    return [outcomes[index] for index in range(len(units))]


async def work_through(count: int, work: Callable[[int], Awaitable[None]], *, concurrency: int) -> None:
    """Does `work(0)` to `work(count - 1)`, at most `concurrency` at a time; an error stops all and is raised."""
    waiting = iter(range(count))

    async def worker() -> None:
        for index in waiting:
            await work(index)

    tasks = [asyncio.create_task(worker()) for _ in range(min(concurrency, count))]
    try:
        if tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_of(work: Iterable[Awaitable[Result]]) -> list[Result]:
    """All results; when some fail, waits for the rest (they are paid for, and cached) and raises the gravest."""
    done = await asyncio.gather(*work, return_exceptions=True)
    failures = [result for result in done if isinstance(result, BaseException)]
    failures.sort(key=lambda failure: isinstance(failure, Quarantined))
    for failure in failures:
        raise failure
    return [result for result in done if not isinstance(result, BaseException)]


def _spent(asker: Asker) -> str:
    tokens = asker.asked.prompt_tokens + asker.asked.completion_tokens
    cost = asker.cost(asker.asked)
    return f"{tokens:,} tokens" + (f", cost {cost:.2f}" if cost is not None else "")
