"""The steps of synthesis over whole files: units out of conversations, results back into them, nothing lost."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.config.synthesis import SynthesiseConfig
from her_nemo.data.records import Conversation, read_conversations, write_conversations
from her_nemo.data.sources import read_jsonl
from her_nemo.data.synthesis import principles, role_thinking, settings, system_thinking
from her_nemo.data.synthesis.asker import Asker, Bill
from her_nemo.data.synthesis.part import CharacterPart, parts
from her_nemo.data.synthesis.prompt_files import PromptFile, load_prompt
from her_nemo.data.synthesis.runner import Outcome, run_units
from her_nemo.roleplay.principles import write_library

STEPS = ("role_thinking", "system_thinking", "settings")


@dataclass
class StepResult:
    """A step over all conversations, in their order; those it could not finish are unchanged."""

    step: str
    conversations: list[Conversation]
    outcomes: list[Outcome[Any]]
    touched: dict[str, list[str]]  # conversation ids by unit name

    @property
    def failed(self) -> set[str]:
        """Ids of the conversations with a quarantined unit."""
        return {id_ for unit in self.outcomes if unit.quarantined for id_ in self.touched[unit.name]}


@dataclass
class Report:
    """What a run did, for summary.json and the last lines on the terminal."""

    name: str
    stage: str
    conversations: int = 0
    written: int = 0
    quarantined: int = 0
    units: dict[str, dict[str, int]] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    identity: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)


def prompt(cfg: SynthesiseConfig, name: str) -> PromptFile:
    """The version of a prompt that the configuration asks for."""
    return load_prompt(name, cfg.prompt_versions.get(name), cfg.prompts_dir)


def load(path: str) -> list[Conversation]:
    """The conversations to work on.

    Raises:
        UserError: if there are none, or two have the same id.
    """
    conversations = list(read_conversations(path))
    if not conversations:
        raise UserError(f"source={path}: no conversation in it")
    twice = [id_ for id_, count in Counter(c.conversation_id for c in conversations).items() if count > 1]
    if twice:
        raise UserError(f"source={path}: conversation ids that come twice: {', '.join(twice[:5])}")
    return conversations


async def synthesise(
    cfg: SynthesiseConfig, conversations: list[Conversation], asker: Asker
) -> list[StepResult]:
    """One step, or all of them in turn. A conversation that a step could not finish leaves the line there,
    unless cfg.keep_quarantined."""
    results: list[StepResult] = []
    for step in STEPS if cfg.stage == "all" else (cfg.stage,):
        result = await _STEPS[step](cfg, conversations, asker)
        results.append(result)
        conversations = [
            conversation
            for conversation in result.conversations
            if cfg.keep_quarantined or conversation.conversation_id not in result.failed
        ]
    return results


async def _role_thinking(
    cfg: SynthesiseConfig, conversations: list[Conversation], asker: Asker
) -> StepResult:
    text = prompt(cfg, "role_thinking")
    chapters = role_thinking.chapters(conversations)
    units = [role_thinking.unit(chapter, asker, text, cfg.role_thinking) for chapter in chapters]
    outcomes = await run_units(
        units, asker, concurrency=cfg.limits.concurrency, title="role thinking, chapters"
    )
    new = {
        conversation.conversation_id: conversation
        for outcome in outcomes
        for conversation in outcome.result or ()
    }
    return StepResult(
        "role_thinking",
        [new.get(conversation.conversation_id, conversation) for conversation in conversations],
        outcomes,
        {chapter.name: [c.conversation_id for c in chapter.conversations] for chapter in chapters},
    )


async def _system_thinking(
    cfg: SynthesiseConfig, conversations: list[Conversation], asker: Asker
) -> StepResult:
    forward, rewrite = prompt(cfg, "system_thinking_forward"), prompt(cfg, "system_thinking_rewrite")
    sides = parts(conversations)
    units = [system_thinking.unit(side, asker, forward, rewrite, cfg.system_thinking) for side in sides]
    outcomes = await run_units(
        units, asker, concurrency=cfg.limits.concurrency, title="system thinking, characters"
    )
    plans: dict[str, dict[int, str]] = {}
    for side, outcome in zip(sides, outcomes, strict=True):
        plans.setdefault(side.conversation.conversation_id, {}).update(outcome.result or {})
    planned = [_with_plans(c, plans.get(c.conversation_id, {})) for c in conversations]
    return StepResult("system_thinking", planned, outcomes, _touched(sides))


def _with_plans(conversation: Conversation, plans: Mapping[int, str]) -> Conversation:
    turns = (replace(turn, plan=plans.get(i, turn.plan)) for i, turn in enumerate(conversation.turns))
    return replace(conversation, turns=tuple(turns))


async def _settings(cfg: SynthesiseConfig, conversations: list[Conversation], asker: Asker) -> StepResult:
    gaps, lookup = prompt(cfg, "settings_gaps"), prompt(cfg, "settings_lookup")
    sides = parts(conversations)
    units = [settings.unit(side, asker, gaps, lookup, cfg.settings) for side in sides]
    outcomes = await run_units(units, asker, concurrency=cfg.limits.concurrency, title="settings, characters")
    profiles: dict[str, dict[str, str]] = {}
    for side, outcome in zip(sides, outcomes, strict=True):
        if outcome.result is not None:
            assert outcome.result.startswith(side.character.profile), "settings only add"
            profiles.setdefault(side.conversation.conversation_id, {})[side.character.name] = outcome.result
    told = [_with_profiles(c, profiles.get(c.conversation_id, {})) for c in conversations]
    return StepResult("settings", told, outcomes, _touched(sides))


def _with_profiles(conversation: Conversation, profiles: Mapping[str, str]) -> Conversation:
    characters = (
        replace(who, profile=profiles.get(who.name, who.profile)) for who in conversation.characters
    )
    return replace(conversation, characters=tuple(characters))


def _touched(sides: Sequence[CharacterPart]) -> dict[str, list[str]]:
    return {side.name: [side.conversation.conversation_id] for side in sides}


_STEPS: dict[str, Callable[..., Any]] = {
    "role_thinking": _role_thinking,
    "system_thinking": _system_thinking,
    "settings": _settings,
}


async def distil_principles(cfg: SynthesiseConfig, asker: Asker) -> tuple[Report, int]:
    """Pairs -> cases.jsonl -> clusters -> library.yaml; the report, and how many principles there are."""
    principles.require_scikit_learn()
    pairs, _ = read_jsonl(cfg.source, "pairs")
    concurrency = cfg.limits.concurrency
    case_prompt, distil_prompt = prompt(cfg, "principles_case"), prompt(cfg, "principles_distil")
    by_case = await run_units(
        [principles.case_unit(pair, asker, case_prompt) for pair in pairs],
        asker,
        concurrency=concurrency,
        title="principles, cases",
    )
    cases = [case for outcome in by_case for case in outcome.result or ()]
    groups, alone = await principles.clusters(cases, asker, cfg.principles)
    distilled = await run_units(
        [principles.distil_unit(group, i, asker, distil_prompt) for i, group in enumerate(groups, start=1)],
        asker,
        concurrency=concurrency,
        title="principles, clusters",
    )
    library = principles.distinct([outcome.result for outcome in distilled if outcome.result is not None])
    out = Path(cfg.out)
    write_jsonl(
        out / "cases.jsonl",
        (
            {"trace_id": outcome.name, **case.model_dump(mode="json")}
            for outcome in by_case
            for case in outcome.result or ()
        ),
    )
    _replace(out / "library.yaml", lambda path: path.write_text(write_library(library), "utf-8"))
    write_units(out, [("principles_case", by_case), ("principles_distil", distilled)])
    report = Report(cfg.name, cfg.stage)
    record_units(report, "principles_case", by_case)
    record_units(report, "principles_distil", distilled)
    print(f"{len(cases)} case principles: {len(groups)} clusters, {alone} cases in none of them")
    return report, len(library)


# ---------------------------------------------------------------- files


@contextmanager
def only_run(out: Path) -> Any:
    """Makes the directory and holds it: a second run that writes to it is refused.

    Raises:
        UserError: if another process has it, or it cannot be made.
    """
    import fcntl

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(f"out={out} cannot be made: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"out={out}: another run is writing there; wait for it or give another out"
            ) from None
        yield


def write_results(
    cfg: SynthesiseConfig, before: Sequence[Conversation], results: Sequence[StepResult]
) -> Report:
    """conversations.jsonl, quarantined_conversations.jsonl, quarantine.jsonl and provenance.jsonl under cfg.out."""
    out = Path(cfg.out)
    failed = set() if cfg.keep_quarantined else set().union(*(result.failed for result in results))
    # The last step that saw a conversation has its newest form.
    newest = {c.conversation_id: c for result in results for c in result.conversations}
    good = [newest[c.conversation_id] for c in before if c.conversation_id not in failed]
    bad = [newest[c.conversation_id] for c in before if c.conversation_id in failed]
    _replace(out / "conversations.jsonl", lambda path: write_conversations(path, good))
    _replace(out / "quarantined_conversations.jsonl", lambda path: write_conversations(path, bad))
    report = Report(cfg.name, cfg.stage, len(before), len(good), len(bad))
    assert report.conversations == report.written + report.quarantined
    for result in results:
        record_units(report, result.step, result.outcomes)
    write_units(out, [(result.step, result.outcomes) for result in results])
    return report


def record_units(report: Report, step: str, outcomes: Sequence[Outcome[Any]]) -> None:
    """Counts a step's units."""
    quarantined = sum(outcome.quarantined for outcome in outcomes)
    report.units[step] = {
        "units": len(outcomes),
        "done": len(outcomes) - quarantined,
        "quarantined": quarantined,
        "answers": sum(len(outcome.trace) for outcome in outcomes),
        "without_work": sum(not outcome.trace and not outcome.quarantined for outcome in outcomes),
    }
    report.prompts = sorted({*report.prompts, *(asked.prompt for o in outcomes for asked in o.trace)})


def write_units(out: Path, steps: Sequence[tuple[str, Sequence[Outcome[Any]]]]) -> None:
    """quarantine.jsonl: units without a valid answer, why, and the last answer. provenance.jsonl: every answer."""
    write_jsonl(
        out / "quarantine.jsonl",
        (
            {
                "step": step,
                "unit": outcome.name,
                "faults": [asdict(fault) for fault in outcome.faults],
                "answer": outcome.answer,
            }
            for step, outcomes in steps
            for outcome in outcomes
            if outcome.quarantined
        ),
    )
    write_jsonl(
        out / "provenance.jsonl",
        (
            {
                "step": step,
                "unit": outcome.name,
                "quarantined": outcome.quarantined,
                "answers": [asdict(asked) for asked in outcome.trace],
            }
            for step, outcomes in steps
            for outcome in outcomes
        ),
    )


def finish(report: Report, cfg: SynthesiseConfig, asker: Asker) -> None:
    """summary.json, and what a person wants to know on the terminal."""
    report.faults = dict(asker.faults.most_common())
    report.identity = asker.identity
    report.usage = {
        "this_run": _usage(asker.asked, asker),
        "from_cache": _usage(asker.replayed, asker),
        "http_requests": asker.endpoint.requests,
        "http_retries": asker.endpoint.retries,
    }
    _replace(
        Path(cfg.out) / "summary.json",
        lambda path: path.write_text(
            json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", "utf-8"
        ),
    )
    for step, counts in report.units.items():
        print(f"{step}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    if report.faults:
        print("faults: " + ", ".join(f"{count} {kind}" for kind, count in report.faults.items()))
    for title, bill in (("asked", asker.asked), ("from cache", asker.replayed)):
        cost = asker.cost(bill)
        print(
            f"{title}: {bill.requests} answers, {bill.prompt_tokens:,} prompt and {bill.completion_tokens:,} "
            f"answer tokens"
            + (f", cost {cost:.4f}" if cost is not None else "")
            + (f" ({bill.without_usage} without a count)" if bill.without_usage else "")
        )


def _usage(bill: Bill, asker: Asker) -> dict[str, Any]:
    return {**asdict(bill), "cost": asker.cost(bill)}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON Lines file, whole or not at all."""

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")

    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside `path` and puts it in place, so that a killed run leaves the old file or the new one."""
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    write(partial)
    os.replace(partial, path)
