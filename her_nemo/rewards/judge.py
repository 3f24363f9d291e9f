"""Which of two replies is better, by a judge: asked in both orders, each question once, answers kept.

Who judges stands behind the `Judge` protocol: servers (`judge_server`) or a model in this process
(rollout/judge_engine.py). A judge is asked in messages and answers in text; what is a verdict is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from her_nemo.data.synthesis.cache import AnswerCache, cache_key
from her_nemo.megatron import parallel
from her_nemo.roleplay.judging import judge_messages
from her_nemo.roleplay.prompt import Message
from her_nemo.roleplay.verdict import VerdictError, Winner, parse_verdict

KEPT = 200_000  # verdicts in memory; the oldest go first
SHOWN = 160  # characters of a text without verdict in an error


@dataclass(frozen=True)
class Answer:
    """What a judge said. `text` is None where no answer was to be had; `problem` says why, or what spoilt it."""

    text: str | None
    problem: str = ""


class Judge(Protocol):
    """Whoever answers in text.

    Attributes:
        identity: what tells its answers from those of another judge, or of the same with other weights or sampling.
    """

    identity: Mapping[str, Any]

    def begin(self, conversations: Sequence[list[Message]]) -> None:
        """Start on what `ask` will be called with next, if it can be done beside this process's own work."""
        ...

    def ask(self, conversations: Sequence[list[Message]]) -> list[Answer]:
        """An answer to each. Called on all ranks of a replica with the same conversations; the same answers on each.

        Raises:
            UserError: on all ranks of the replica, when nobody is there to answer.
        """
        ...


@dataclass(frozen=True)
class Pair:
    """A reply and the one it is compared with, both as the judge may see them (roleplay/judging.py: candidate)."""

    context: str
    reply: str
    other: str


@dataclass(frozen=True)
class Compared:
    """What the two orders say of a pair.

    Attributes:
        points: 1 where the reply wins in both orders, -1 where it loses in both, else 0; None where a verdict is
            missing.
        disagreed: both verdicts are there and name different replies; it counts as a tie.
        problems: of the verdicts that are missing, what is wrong with each.
    """

    points: int | None
    disagreed: bool = False
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Read:
    """A text as it was read: the winner, or what keeps it from being a verdict."""

    winner: Winner | None
    problem: str = ""


@dataclass(frozen=True)
class Asked:
    """Pairs on their way: the questions of each pair (none for replies that look the same), what is known of them, and
    what the judge has been given."""

    keys: list[tuple[str, ...]]
    found: dict[str, _Read]
    new: dict[str, list[Message]]


class Verdicts:
    """A judge with a memory.

    Args:
        judge: whom to ask.
        brief: how to ask (roleplay/judging.py: judge_messages).
        cache_dir: a directory for the judge's answers; None keeps verdicts in memory alone.

    Attributes:
        asked, kept: questions of the last `compare` that were put to the judge, and that had an answer already.
    """

    def __init__(self, judge: Judge, *, brief: bool = False, cache_dir: str | Path | None = None) -> None:
        self.judge = judge
        self._brief = brief
        self._store = AnswerCache(cache_dir) if cache_dir is not None else None
        self._known: dict[str, _Read] = {}
        self.asked = self.kept = 0

    def compare(self, pairs: Sequence[Pair]) -> list[Compared]:
        """Each pair in both orders (collective over the ranks of a replica). Two replies that look the same to the
        judge are a tie, unasked.

        Raises:
            UserError: the judge cannot be reached, or a file of the cache is damaged.
        """
        return self.finish(self.begin(pairs))

    def begin(self, pairs: Sequence[Pair]) -> Asked:
        """The first half of `compare`: the judge is given what nobody has answered yet. Raises as `compare` does."""
        questions: dict[str, list[Message]] = {}
        keys: list[tuple[str, ...]] = []
        for pair in pairs:
            both = [(pair.reply, pair.other), (pair.other, pair.reply)] if pair.reply != pair.other else []
            asked = [judge_messages(pair.context, *order, brief=self._brief) for order in both]
            keys.append(tuple(cache_key(self.judge.identity, {"messages": messages}, 1) for messages in asked))
            questions |= zip(keys[-1], asked, strict=True)
        found = {key: self._known[key] for key in questions if key in self._known}
        missing = [key for key in questions if key not in found]
        if self._store is not None and missing:
            stored = parallel.on_replica_leader(partial(_stored, self._store, missing))
            found |= self._read_all(stored)
            missing = [key for key in missing if key not in stored]
        new = {key: questions[key] for key in missing}
        if new:
            self.judge.begin(list(new.values()))
        self.asked, self.kept = len(new), len(questions) - len(new)
        return Asked(keys, found, new)

    def finish(self, begun: Asked) -> list[Compared]:
        """The second half: wait for the judge."""
        found = dict(begun.found)
        if begun.new:
            answers = dict(zip(begun.new, self.judge.ask(list(begun.new.values())), strict=True))
            found |= self._read_all(answers)
            if self._store is not None and parallel.is_replica_leader():
                for key, answer in answers.items():
                    if answer.text is not None:
                        body = {"identity": dict(self.judge.identity), "request": {"messages": begun.new[key]}}
                        self._store.put(key, body | {"text": answer.text, "problem": answer.problem})
        return [in_both_orders(*(found[key] for key in both)) if both else Compared(0) for both in begun.keys]

    def _read_all(self, answers: Mapping[str, Answer]) -> dict[str, _Read]:
        """What answers say; those that are answers are remembered."""
        found = {key: read(answer) for key, answer in answers.items()}
        self._known |= {key: said for key, said in found.items() if answers[key].text is not None}
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return found


def read(answer: Answer) -> _Read:
    """The winner that an answer names, or why it names none."""
    if answer.text is None:
        return _Read(None, answer.problem)
    try:
        return _Read(parse_verdict(answer.text).better)
    except VerdictError as error:
        spoilt = f" ({answer.problem})" if answer.problem else ""
        return _Read(None, f"{error}{spoilt}: ...{answer.text[-SHOWN:]!r}")


def in_both_orders(first: _Read, second: _Read) -> Compared:
    """`first`: the reply as cand_1. `second`: the reply as cand_2."""
    problems = tuple(said.problem for said in (first, second) if said.winner is None)
    if first.winner is None or second.winner is None:
        return Compared(None, problems=problems)
    if first.winner is not second.winner.swapped:
        return Compared(0, disagreed=True)
    return Compared({Winner.CAND_1: 1, Winner.CAND_2: -1, Winner.TIE: 0}[first.winner])


def _stored(store: AnswerCache, keys: Sequence[str], alive: Callable[[], None]) -> dict[str, Answer]:
    """The answers of the cache among `keys`."""
    found = {}
    for key in keys:
        alive()
        body = store.get(key)
        if body is not None:
            found[key] = Answer(body["text"], body["problem"])
    return found
