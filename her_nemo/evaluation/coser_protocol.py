"""Whose choices a run of CoSER's benchmark makes: CoSER's repository, HER's fork of it, or ours.

The two differ from each other and from their papers in small things that move scores. Each is one field here, so that
the table can be read; `fixed` is upstream without what reads like a slip. What no protocol reproduces: a judge's answer
that cannot be used is a failure in all three (upstream stops, the fork scores it 50, or 0 on an error), what other
characters see goes through roleplay/views.py (upstream's expression misses thoughts of several lines), and the wording
of prompts is ours (`prompts_dir` takes others).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from her_nemo.evaluation.endpoint import BadAnswer
from her_nemo.evaluation.results import Flaw
from her_nemo.roleplay.layouts import Layout
from her_nemo.roleplay.views import Reader

DIMENSIONS = ("Storyline Consistency", "Anthropomorphism", "Character Fidelity", "Storyline Quality")
END_CHAT = "<END CHAT>"
FIRST_END_ROUND = 5  # counted from 0: the sixth message is the first that may be the last
DEDUCTION = 5.0  # points for one step of severity
ALLOWANCE = 0.3  # severity forgiven for each message of a character: long dialogues have more to find
SEVERITIES = range(1, 6)


@dataclass(frozen=True)
class Protocol:
    """One set of choices.

    Attributes:
        layout: of the actors' prompts and replies, unless the configuration says otherwise.
        own_history: how an actor sees its own earlier turns; SELF_NOW is with the plans.
        judge_view: what the judge sees of the characters' messages.
        judge_names: put `Name: ` before each simulated message; else it is there only if the model wrote it.
        prefix_speakers: given messages keep their own speakers; else the first goes to the first of the list, and
            the next speaker after each is checked like a prediction (two in a row are not allowed).
        first_from_data: the dialogue begins with the speaker who begins it in the book; else the first of the list.
        count_given: given messages of characters count among the actor's.
        say_prefix: the judge is told how many messages were given.
        fill_main: "(only for the main characters: ...)" in the judge's criteria names them; else the placeholder
            stays as it is, since it is filled in before the criteria are.
        repeat_instructions: after a prediction that is none, the next-speaker model reads its instructions again.
        rotate_speakers: the next-speaker model reads the names in an order that differs from scene to scene and run to
            run (each name first once in as many runs as there are names), since a name may be taken for its place;
            else in the file's order.
        brief: actors are asked for at most 60 words.
        reading: how a next speaker is read from an answer.
        severities: how flaws are counted.
        held_out_found: with retrieval, plots that are for testing may be found, the scene's own among them, and a
            character that the book does not know reads the placeholder of the passages.
        overlap: what BLEU and ROUGE-L compare; "judged" is the texts as the judge sees them, "raw_reference" takes
            the reference as it is in the data, "spoken" is both without names.
    """

    name: str
    layout: Layout
    own_history: Reader
    judge_view: Reader
    judge_names: bool
    prefix_speakers: bool
    first_from_data: bool
    count_given: bool
    say_prefix: bool
    fill_main: bool
    repeat_instructions: bool
    rotate_speakers: bool
    brief: bool
    reading: Literal["last_field", "anywhere", "exact"]
    severities: Literal["integers_or_one", "numbers", "strict"]
    overlap: Literal["judged", "raw_reference", "spoken"]
    held_out_found: bool
    notes: tuple[str, ...]


_UPSTREAM = Protocol(
    name="upstream",
    layout=Layout.COSER,
    own_history=Reader.SELF_LATER,
    judge_view=Reader.JUDGE_COSER,
    judge_names=False,
    prefix_speakers=False,
    first_from_data=False,
    count_given=True,
    say_prefix=True,
    fill_main=False,
    repeat_instructions=True,
    rotate_speakers=False,
    brief=True,
    reading="last_field",
    severities="integers_or_one",
    overlap="judged",
    held_out_found=True,
    notes=(
        "thoughts are taken out of both dialogues before the judge sees them",
        "simulated messages have a name before them only where the model wrote it, those of the book always",
        "given messages (continue_from) are dealt out in the order of the speakers' list, count among the actor's "
        "messages, and may be put into the wrong mouth",
        "the judge's criteria hold {major_characters} unfilled",
        "a flaw without severity counts 1, one whose severity is no whole number counts 0",
        "with retrieval the scene's own plot is among what can be found",
    ),
)
_HER = Protocol(
    name="her",
    layout=Layout.HER,
    own_history=Reader.SELF_NOW,
    judge_view=Reader.JUDGE_COSER_HER,
    judge_names=False,
    prefix_speakers=False,
    first_from_data=False,
    count_given=True,
    say_prefix=False,
    fill_main=False,
    repeat_instructions=False,
    rotate_speakers=False,
    brief=False,
    reading="anywhere",
    severities="numbers",
    overlap="raw_reference",
    held_out_found=False,
    notes=(
        "the judge sees role thoughts, as [..], in both dialogues; plans are taken out",
        "actors see their own earlier plans",
        "simulated messages have a name before them only where the model wrote it, those of the book always",
        "given messages (continue_from) are dealt out as upstream does, and the judge is not told of them",
        "the judge's criteria hold {major_characters} unfilled",
        "a flaw without a number for severity counts 0; BLEU and ROUGE-L compare with the data's raw text",
        "the fork stops after 10 rounds by default: max_rounds=10",
    ),
)
_FIXED = Protocol(
    name="fixed",
    layout=Layout.HER,
    own_history=Reader.SELF_LATER,
    judge_view=Reader.JUDGE_COSER,
    judge_names=True,
    prefix_speakers=True,
    first_from_data=True,
    count_given=False,
    say_prefix=True,
    fill_main=True,
    repeat_instructions=False,
    rotate_speakers=True,
    brief=False,
    reading="exact",
    severities="strict",
    overlap="spoken",
    held_out_found=False,
    notes=(
        "thoughts are taken out of both dialogues before the judge sees them",
        "every message has its speaker's name before it",
        "the next-speaker model reads the names in an order that is balanced over scenes and runs",
        "given messages (continue_from) keep their speakers and do not count among the actor's messages",
        "the dialogue begins with the speaker who begins it in the book",
        "the judge's criteria name the main characters",
        "an answer with a severity that is not a whole number from 1 to 5 is not used, and is asked for again",
        "BLEU and ROUGE-L compare what is said and done, without names",
    ),
)
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({p.name: p for p in (_UPSTREAM, _HER, _FIXED)})


def score_of(severities: Sequence[float], actor_messages: int) -> float:
    """clamp(100 - 5 x (sum of severities - 0.3 x actor messages), 0, 100)."""
    return min(100.0, max(0.0, 100.0 - DEDUCTION * (math.fsum(severities) - ALLOWANCE * actor_messages)))


def judge_schema(dimension: str) -> dict[str, Any]:
    """JSON schema of the judge's answer: {dimension: {"flaws": [{instance, type, severity}]}}."""

    def closed(properties: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": dict(properties),
            "required": list(properties),
            "additionalProperties": False,
        }

    text = {"type": "string"}
    flaw = closed(
        {"instance": text, "type": text, "severity": {"type": "integer", "enum": list(SEVERITIES)}}
    )
    return closed({dimension: closed({"flaws": {"type": "array", "items": flaw}})})


def flaws_of(body: Mapping[str, Any], dimension: str, protocol: Protocol) -> list[Flaw]:
    """The flaws of a judge's answer, with the severities that the protocol counts.

    Raises:
        BadAnswer: there is no list of flaws for this dimension, or the protocol does not take one of them.
    """
    strange = sorted(set(body) - set(DIMENSIONS))
    if strange and protocol.severities != "numbers":
        raise BadAnswer(f"unknown dimension {strange[0]!r}")
    about = body.get(dimension)
    listed = about.get("flaws") if isinstance(about, Mapping) else None
    if not isinstance(listed, list):
        raise BadAnswer(f"no list of flaws under {dimension!r}")
    read = _SEVERITY[protocol.severities]
    flaws = []
    for entry in listed:
        if not isinstance(entry, Mapping):
            raise BadAnswer(f"a flaw is {type(entry).__name__}, not an object")
        flaws.append(Flaw(_words(entry.get("type")), read(entry.get("severity")), _words(entry.get("instance"))))
    return flaws


def _words(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _integers_or_one(value: Any) -> float:
    return 1 if value is None else value if isinstance(value, int) else 0


def _numbers(value: Any) -> float:
    return value if isinstance(value, int | float) and math.isfinite(value) else 0


def _strict(value: Any) -> float:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in SEVERITIES:
        raise BadAnswer(f"severity {value!r} is not a whole number from 1 to 5")
    return value


_SEVERITY: Mapping[str, Callable[[Any], float]] = {
    "integers_or_one": _integers_or_one,
    "numbers": _numbers,
    "strict": _strict,
}
