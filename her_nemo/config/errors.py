"""Errors that are the user's to mend: shown without a traceback, with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to change."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: which key, what is wrong, who set it, what to do about it."""

    key: str
    message: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"  (from {self.where})" if self.where else ""
        hint = f"\n     -> {self.hint}" if self.hint else ""
        subject = f"{self.key}: " if self.key else ""
        return f"{subject}{self.message}{place}{hint}"


def spoken(stage: str) -> str:
    """A stage's name as it is typed: `data_ingest` is `data ingest`."""
    return stage.replace("_", " ")


class ConfigErrors(UserError):
    """Every problem of one configuration, reported in one go.

    `rest` is the typed configuration without what was not understood, when that much is valid: further checks
    can run on it and add to the list.
    """

    def __init__(self, problems: Sequence[Problem], stage: str = "", rest: Any = None) -> None:
        self.problems = list(problems)
        self.stage = stage
        self.rest = rest
        count = len(self.problems)
        title = f"{count} problem{'' if count == 1 else 's'} in the configuration"
        if stage:
            title += f" of `{spoken(stage)}`"
        lines = [f"  {index}. {problem}" for index, problem in enumerate(self.problems, start=1)]
        super().__init__("\n".join([title + ":", *lines]))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None when nothing is alike.

    For dotted keys, a key that ends in the same name wins over one that merely looks alike: `model.lr` is
    answered with `model.optim.lr`.
    """
    candidates = list(known)
    leaf = word.rsplit(".", 1)[-1]
    same_leaf = [key for key in candidates if key.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return max(same_leaf, key=lambda key: difflib.SequenceMatcher(None, word, key).ratio())
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if close:
        return close[0]
    leaves = {key.rsplit(".", 1)[-1]: key for key in candidates}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    return leaves[close[0]] if close else None
