"""CoSER's four judge calls on a played scene, and the overlap of its wording with the book's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from her_nemo.data.readers.coser import ENVIRONMENT
from her_nemo.data.synthesis.prompt_files import PromptFile
from her_nemo.evaluation.coser_protocol import DIMENSIONS, Protocol, flaws_of, judge_schema, score_of
from her_nemo.evaluation.coser_scenes import CoserScene, Given
from her_nemo.evaluation.coser_simulation import Simulation, clean
from her_nemo.evaluation.endpoint import RoleModel, json_object_in
from her_nemo.evaluation.overlap import bleu, rouge_l
from her_nemo.evaluation.results import Failure, Flaw, Judgement, Line
from her_nemo.roleplay.dialects import Dialect, parse_message
from her_nemo.roleplay.names import same_name
from her_nemo.roleplay.prompt import Message
from her_nemo.roleplay.views import Reader, view

UNFILLED = "{major_characters}"


@dataclass(frozen=True)
class Bench:
    """The judge and how it is asked."""

    protocol: Protocol
    model: RoleModel
    prompt: PromptFile
    attempts: int
    structured_output: str


async def judge(scene: CoserScene, done: Simulation, bench: Bench, run: int) -> tuple[Judgement, ...]:
    """A judgement for each dimension, asked at the same time."""
    return tuple(
        await asyncio.gather(*(_judgement(scene, done, bench, run, dimension) for dimension in DIMENSIONS))
    )


async def _judgement(
    scene: CoserScene, done: Simulation, bench: Bench, run: int, dimension: str
) -> Judgement:
    def read(text: str) -> list[Flaw]:
        return flaws_of(json_object_in(text), dimension, bench.protocol)

    name = dimension.lower().replace(" ", "_")
    found = await bench.model.parsed(
        judge_messages(scene, done, bench.prompt, bench.protocol, dimension),
        read,
        draw=run,
        attempts=bench.attempts,
        schema=(name, judge_schema(dimension)) if bench.structured_output == "json_schema" else None,
        json_object=bench.structured_output == "json_object",
        whole=True,
    )
    if isinstance(found, Failure):
        return Judgement(dimension, failure=found)
    flaws, answer = found
    score = score_of([flaw.severity for flaw in flaws], done.actor_messages)
    return Judgement(dimension, score, tuple(flaws), answer=answer)


def judge_messages(
    scene: CoserScene, done: Simulation, prompt: PromptFile, protocol: Protocol, dimension: str
) -> list[Message]:
    """The judge's prompt for one dimension."""
    main = [name for name in scene.main if name != ENVIRONMENT]
    note = ""
    if done.given and protocol.say_prefix:
        note = (
            f"The first {done.given} messages of the dialogue to review were taken from the original. Look for "
            "flaws in what comes after them."
        )
    return prompt.messages(
        book=scene.book,
        dimension=dimension,
        main=", ".join(main) if protocol.fill_main else UNFILLED,
        summary=scene.summary,
        scenario=scene.scenario,
        profiles="\n\n".join(f"## {name}\n{text}" for name, text in scene.profiles.items()),
        reference=reference_text(scene, protocol),
        note=note,
        thoughts_shown=protocol.judge_view is Reader.JUDGE_COSER_HER,
        dialogue=dialogue_text(done.lines, protocol),
    )


def dialogue_text(lines: Sequence[Line], protocol: Protocol, *, named: bool | None = None) -> str:
    """The played dialogue as the judge sees it; `named` overrules the protocol on names."""
    names = protocol.judge_names if named is None else named
    return "\n\n".join(_judged(line, protocol.judge_view, names) for line in lines)


def reference_text(scene: CoserScene, protocol: Protocol) -> str:
    """The book's dialogue as the judge sees it, always with names."""
    lines = [Line(turn.speaker, turn.message, "given", scene.dialect.value) for turn in scene.dialogue]
    return "\n\n".join(_judged(line, protocol.judge_view, named=True) for line in lines)


def _judged(line: Line, reader: Reader, named: bool) -> str:
    """One message as `reader` sees it. Malformed text is read *fail private*: what may be a thought is one."""
    if line.speaker == ENVIRONMENT and line.source != "environment":
        text = line.text.strip()  # the data's surroundings have no thoughts, and brackets of their own
        return f"{line.speaker}: {text}" if named else text
    turn = parse_message(line.text, Dialect(line.dialect), expect_name=line.speaker)
    text = clean(view(turn, reader))
    has_name = turn.name is not None and same_name(turn.name, line.speaker)
    return f"{line.speaker}: {text}" if named and not has_name else text


def overlap(scene: CoserScene, done: Simulation, protocol: Protocol, skipped: int) -> dict[str, float]:
    """BLEU and ROUGE-L of the played dialogue against the book's, the first `skipped` messages of both left out.

    Nothing where either has no more messages than that.
    """
    lines, given = done.lines[skipped:], scene.dialogue[skipped:]
    if not lines or not given:
        return {}
    if protocol.overlap == "spoken":
        text = "\n\n".join(_spoken(line) for line in lines)
        wanted = [_spoken(Line(turn.speaker, turn.message, "given", scene.dialect.value)) for turn in given]
        reference = "\n\n".join(wanted)
    else:
        text = dialogue_text(lines, protocol)
        reference = "\n\n".join(_reference(turn, scene, protocol) for turn in given)
    return {"BLEU": bleu(text, reference), "ROUGE-L": rouge_l(text, reference)}


def _reference(turn: Given, scene: CoserScene, protocol: Protocol) -> str:
    if protocol.overlap == "raw_reference":
        return f"{turn.speaker}: {turn.message}"
    return _judged(Line(turn.speaker, turn.message, "given", scene.dialect.value), protocol.judge_view, True)


def _spoken(line: Line) -> str:
    """What is said and done, without the name."""
    if line.speaker == ENVIRONMENT and line.source != "environment":
        return line.text.strip()
    turn = parse_message(line.text, Dialect(line.dialect), expect_name=line.speaker)
    text = view(turn, Reader.JUDGE_COSER)
    return text.removeprefix(turn.name_prefix.lstrip()) if turn.name_prefix else text
