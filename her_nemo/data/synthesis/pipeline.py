"""The steps of synthesis over whole files: units out of conversations, results back into them, nothing lost."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.config.synthesis import SynthesiseConfig
from her_nemo.data.records import Conversation, read_conversations, write_conversations
from her_nemo.data.synthesis import role_thinking
from her_nemo.data.synthesis.asker import Asker, Bill
from her_nemo.data.synthesis.prompt_files import PromptFile, load_prompt
from her_nemo.data.synthesis.runner import Outcome, run_units

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


async def synthesise(cfg: SynthesiseConfig, conversations: list[Conversation], asker: Asker) -> list[StepResult]:
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


async def _role_thinking(cfg: SynthesiseConfig, conversations: list[Conversation], asker: Asker) -> StepResult:
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


_STEPS: dict[str, Callable[..., Any]] = {"role_thinking": _role_thinking}


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
            raise UserError(f"out={out}: another run is writing there; wait for it or give another out") from None
        yield


def write_results(cfg: SynthesiseConfig, before: Sequence[Conversation], results: Sequence[StepResult]) -> Report:
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
        lambda path: path.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", "utf-8"),
    )
    for step, counts in report.units.items():
        print(f"{step}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    if report.faults:
        print("faults: " + ", ".join(f"{count} {kind}" for kind, count in report.faults.items()))
    for title, bill in (("asked", asker.asked), ("from cache", asker.replayed)):
        cost = asker.cost(bill)
        print(
            f"{title}: {bill.requests} answers, {bill.prompt_tokens:,} prompt and {bill.completion_tokens:,} "
            f"answer tokens" + (f", cost {cost:.4f}" if cost is not None else "")
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
