"""The verdict of a judge over two replies: what HER's generative reward model writes, read and written.

A verdict is free reasoning and then one JSON object: the principles the judge chose for this case, a comparison by
each of them, an overall analysis, and `better_response`. The candidates are called cand_1 and cand_2 throughout, in
texts too, so that a verdict can be told as if they had stood in the other order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from her_nemo.roleplay.principles import Dimension, Level


class Winner(StrEnum):
    """Who is better, by one principle or in all."""

    CAND_1 = "cand_1"
    CAND_2 = "cand_2"
    TIE = "tie"

    @property
    def swapped(self) -> Winner:
        """The same with the candidates in the other order."""
        return {Winner.CAND_1: Winner.CAND_2, Winner.CAND_2: Winner.CAND_1}.get(self, self)


class VerdictError(ValueError):
    """A text that is no verdict. `kind` is a word to count by, the message says what is wrong."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class ChosenPrinciple:
    """A principle that the judge picked for this case: what it asks for, and why it matters here."""

    name: str
    dimension: Dimension
    level: Level
    content: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Who is better by one principle. `principle` is the name of a chosen one; `reason` may be empty."""

    principle: str
    winner: Winner
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a judge says about two replies."""

    principles: tuple[ChosenPrinciple, ...]
    comparisons: tuple[Comparison, ...]
    analysis: str
    better: Winner


def _texts(*names: str) -> dict[str, Any]:
    return {name: {"type": "string", "minLength": 1} for name in names}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


_WINNERS = {"type": "string", "enum": [winner.value for winner in Winner]}
# JSON schema of a verdict, for structured output. The keys are in the order in which they are to be written.
VERDICT_SCHEMA: Mapping[str, Any] = _object(
    {
        "principles": {
            "type": "array",
            "minItems": 1,
            "items": _object(
                _texts("name")
                | {"dimension": {"type": "string", "enum": [dimension.value for dimension in Dimension]}}
                | {"level": {"type": "string", "enum": [level.value for level in Level]}}
                | _texts("content", "reason")
            ),
        },
        "comparisons": {
            "type": "array",
            "minItems": 1,
            "items": _object(
                _texts("principle") | {"reason": {"type": "string"}, "winner": _WINNERS}, optional=("reason",)
            ),
        },
        "analysis": {"type": "string", "minLength": 1},
        "better_response": _WINNERS,
    }
)


def parse_verdict(text: str) -> Verdict:
    """The verdict in a judge's text: the last JSON object with `better_response`, whatever stands before it.

    Raises:
        VerdictError: there is none, a part is missing or of the wrong kind, a winner or dimension is unknown, a
            principle is compared twice or not at all, or `better_response` is not what the comparisons say: the winner
            wins by no principle, or it is a tie although only one of the two wins any.
    """
    body = _verdict_object(text)
    principles = tuple(_principle(entry, at) for at, entry in _entries(body, "principles"))
    comparisons = tuple(_comparison(entry, at) for at, entry in _entries(body, "comparisons"))
    verdict = Verdict(
        principles,
        comparisons,
        _text(body, "analysis", "the verdict"),
        _winner(body, "better_response", "the verdict"),
    )
    _check_names(verdict)
    _check_winner(verdict)
    return verdict


def write_verdict(verdict: Verdict, reasoning: str = "") -> str:
    """The text of a verdict after its reasoning; `parse_verdict` reads it back."""
    body = {
        "principles": [
            {
                "name": chosen.name,
                "dimension": chosen.dimension.value,
                "level": chosen.level.value,
                "content": chosen.content,
                "reason": chosen.reason,
            }
            for chosen in verdict.principles
        ],
        "comparisons": [
            {
                "principle": comparison.principle,
                **({"reason": comparison.reason} if comparison.reason else {}),
                "winner": comparison.winner.value,
            }
            for comparison in verdict.comparisons
        ],
        "analysis": verdict.analysis,
        "better_response": verdict.better.value,
    }
    written = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"{reasoning.strip()}\n\n{written}" if reasoning.strip() else written


def swap(verdict: Verdict) -> Verdict:
    """The same verdict over the candidates in the other order; twice gives it back."""
    return Verdict(
        tuple(
            replace(chosen, content=swap_names(chosen.content), reason=swap_names(chosen.reason))
            for chosen in verdict.principles
        ),
        tuple(
            replace(comparison, winner=comparison.winner.swapped, reason=swap_names(comparison.reason))
            for comparison in verdict.comparisons
        ),
        swap_names(verdict.analysis),
        verdict.better.swapped,
    )


_NAME = re.compile(r"(?<![A-Za-z0-9])(cand_)([12])(?![0-9])", re.IGNORECASE)


def swap_names(text: str) -> str:
    """`text` with cand_1 and cand_2 exchanged."""
    return _NAME.sub(lambda found: found[1] + ("2" if found[2] == "1" else "1"), text)


# ---------------------------------------------------------------- reading

# Guided decoding lets raw control characters into strings; JSON does not.
_DECODER = json.JSONDecoder(strict=False)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every outermost JSON object in a text, in order."""
    position = text.find("{")
    while position >= 0:
        try:
            body, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            yield body
        position = text.find("{", end)


def _verdict_object(text: str) -> dict[str, Any]:
    found = list(_objects(text))
    verdicts = [body for body in found if "better_response" in body]
    if verdicts:
        return verdicts[-1]
    if '"better_response"' in text:
        raise VerdictError("broken_json", "the JSON around better_response cannot be read")
    if found:
        raise VerdictError("no_better_response", "no JSON object has better_response")
    raise VerdictError("no_json", "no JSON object in the text")


def _entries(body: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, entry) of a list of objects."""
    entries = body.get(key)
    if not isinstance(entries, list) or not entries:
        raise VerdictError("bad_part", f"{key} is not a list with something in it")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise VerdictError("bad_part", f"{key}[{index}] is not an object")
        yield f"{key}[{index}]", entry


def _text(body: Mapping[str, Any], key: str, where: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value.strip():
        raise VerdictError("bad_part", f"{where} has no text under {key!r}")
    return value


def _winner(body: Mapping[str, Any], key: str, where: str) -> Winner:
    value = body.get(key)
    if value not in list(Winner):
        raise VerdictError("unknown_winner", f"{where}: {key} is {value!r}, not one of {', '.join(Winner)}")
    return Winner(value)


def _principle(entry: Mapping[str, Any], where: str) -> ChosenPrinciple:
    dimension, level = entry.get("dimension"), entry.get("level")
    if dimension not in list(Dimension):
        raise VerdictError("bad_part", f"{where}: no dimension {dimension!r}")
    if level not in list(Level):
        raise VerdictError("bad_part", f"{where}: level is {level!r}, not one of {', '.join(Level)}")
    name, content, reason = (_text(entry, key, where) for key in ("name", "content", "reason"))
    return ChosenPrinciple(name, Dimension(dimension), Level(level), content, reason)


def _comparison(entry: Mapping[str, Any], where: str) -> Comparison:
    reason = entry.get("reason", "")
    if not isinstance(reason, str):
        raise VerdictError("bad_part", f"{where}: reason is not a text")
    return Comparison(_text(entry, "principle", where), _winner(entry, "winner", where), reason)


def _check_names(verdict: Verdict) -> None:
    names = [chosen.name for chosen in verdict.principles]
    compared = [comparison.principle for comparison in verdict.comparisons]
    unknown = [name for name in compared if name not in names]
    if unknown:
        raise VerdictError(
            "unknown_principle", f"compared by {unknown[0]!r}, which is not among the principles"
        )
    for what, given in (("chosen", names), ("compared", compared)):
        twice = [name for name in given if given.count(name) > 1]
        if twice:
            raise VerdictError("principle_twice", f"the principle {twice[0]!r} is {what} twice")
    missing = [name for name in names if name not in compared]
    if missing:
        raise VerdictError("not_compared", f"the principle {missing[0]!r} is not compared by")


def _check_winner(verdict: Verdict) -> None:
    winners = {comparison.winner for comparison in verdict.comparisons} - {Winner.TIE}
    if verdict.better is Winner.TIE:
        if len(winners) == 1:
            raise VerdictError("contradiction", f"a tie, although only {winners.pop()} wins by a principle")
    elif verdict.better not in winners:
        raise VerdictError("contradiction", f"{verdict.better} is better, but wins by no principle")
