"""What a judge learns to write, from labelled pairs: a labeller reasons with the principle library before its eyes, and
its reasoning and verdict become the reply to the judge's own prompt, which has no library.

The labeller is not told the label. A verdict that contradicts it is counted and left out, and so is its pair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from her_nemo.config.errors import UserError
from her_nemo.config.synthesis import SynthesiseConfig
from her_nemo.data.judge_rows import (
    ORDERS,
    JudgedPair,
    balance_report,
    balanced,
    first_order,
    prompt_rows,
    read_pair,
)
from her_nemo.data.sources import read_rows
from her_nemo.data.synthesis import pipeline
from her_nemo.data.synthesis.asker import Answer, Asked, Asker, Fault
from her_nemo.data.synthesis.prompt_files import PromptFile
from her_nemo.data.synthesis.runner import Outcome, Unit, run_units
from her_nemo.roleplay.judging import judge_messages
from her_nemo.roleplay.principles import Dimension, Level, Principle, parse_library, shipped_library
from her_nemo.roleplay.verdict import (
    ChosenPrinciple,
    Comparison,
    Verdict,
    VerdictError,
    Winner,
    parse_verdict,
    swap,
    swap_names,
    write_verdict,
)

PROMPT = "judge_transcript"
# A name that would be wrong in the other order.
_BY_PLACE = re.compile(
    r"\b(?:first|second|former|latter)\s+(?:reply|response|candidate|answer)\b"
    r"|\bthe\s+(?:former|latter|(?:first|second)\s+one)\b|\b(?:reply|response|candidate|answer)\s+(?:1|2|A|B|one|two)\b",
    re.IGNORECASE,
)


class AnsweredPrinciple(Answer):
    """A principle chosen for the case."""

    name: str = Field(min_length=1, max_length=80)
    dimension: Dimension
    level: Level
    content: str = Field(min_length=1)
    reason: str = Field(min_length=1)


class AnsweredComparison(Answer):
    """Who is better by it."""

    principle: str
    reason: str
    winner: Winner


class JudgeAnswer(Answer):
    """What the prompt judge_transcript asks for."""

    reasoning: str = Field(min_length=1)
    principles: list[AnsweredPrinciple]
    comparisons: list[AnsweredComparison]
    analysis: str
    better_response: Winner

    def verdict(self) -> Verdict:
        """Without the reasoning."""
        return Verdict(
            tuple(ChosenPrinciple(p.name, p.dimension, p.level, p.content, p.reason) for p in self.principles),
            tuple(Comparison(c.principle, c.winner, c.reason) for c in self.comparisons),
            self.analysis,
            self.better_response,
        )


@dataclass(frozen=True)
class Transcript:
    """A labeller's answer about one pair, the better reply (by the label) standing at `order`."""

    pair: JudgedPair
    order: Winner
    reasoning: str
    verdict: Verdict

    @property
    def agrees(self) -> bool:
        """Whether the labeller and the label name the same reply."""
        return self.verdict.better is self.order


def unit(
    pair: JudgedPair, library: Sequence[Principle], asker: Asker, prompt: PromptFile
) -> Unit[Transcript]:
    """The work on one pair, in one order."""

    async def work() -> tuple[Transcript, Sequence[Asked]]:
        order = first_order(pair)
        system, user = judge_messages(pair.context, *pair.in_order(order), library)
        messages = prompt.messages(
            instructions=system["content"],
            case=user["content"],
            first=Winner.CAND_1.value,
            second=Winner.CAND_2.value,
        )
        given = await asker.ask(prompt, messages, JudgeAnswer, check)
        return Transcript(pair, order, given.answer.reasoning.strip(), given.answer.verdict()), given.trace

    return Unit(pair.pair_id, work)


def check(answer: JudgeAnswer) -> list[Fault]:
    """The verdict is one, and every text calls the replies by their names."""
    verdict = answer.verdict()
    faults = []
    try:
        parse_verdict(write_verdict(verdict, answer.reasoning))
    except VerdictError as error:
        faults.append(Fault(error.kind, str(error)))
    texts = {
        "reasoning": answer.reasoning,
        "analysis": answer.analysis,
        **{f"principle {chosen.name!r}": f"{chosen.content} {chosen.reason}" for chosen in verdict.principles},
        **{f"comparison {one.principle!r}": one.reason for one in verdict.comparisons},
    }
    for where, text in texts.items():
        found = _BY_PLACE.search(text)
        if found:
            message = f"{where}: {found.group()!r}; call the replies cand_1 and cand_2"
            faults.append(Fault("named_by_place", message))
    return faults


def sft_rows(transcript: Transcript, *, brief: bool) -> list[dict[str, Any]]:
    """The pair in both orders, each with the transcript as its reply, told in that order."""
    rows = []
    for prompt, order in zip(prompt_rows(transcript.pair, brief=brief), ORDERS, strict=True):
        verdict, reasoning = transcript.verdict, transcript.reasoning
        if order is not transcript.order:
            verdict, reasoning = swap(verdict), swap_names(reasoning)
        text = write_verdict(verdict, reasoning)
        assert parse_verdict(text) == verdict
        assert verdict.better is order
        reply = {"role": "assistant", "content": text}
        rows.append({"trace_id": prompt["trace_id"], "messages": [*prompt["messages"], reply]})
    return rows


def load_library(path: str | None) -> Sequence[Principle]:
    """The principles shown to the labeller: of a file, or those that come with her_nemo.

    Raises:
        UserError: the file cannot be read.
    """
    if path is None:
        return shipped_library()
    try:
        return parse_library(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"judge.library={path}: {error}") from error


async def write_transcripts(cfg: SynthesiseConfig, asker: Asker) -> tuple[pipeline.Report, str]:
    """Pairs -> judge_sft.jsonl, contradicted.jsonl and balance.json; the report, and a line on what became of them."""
    out, library = Path(cfg.out), load_library(cfg.judge.library)
    rows, _ = read_rows(cfg.source, "pairs")
    pairs = [read_pair(row) for row in rows]
    distinct = [pair for pair in pairs if pair.distinct]
    asked = balanced(distinct) if cfg.judge.balance else distinct
    prompt = pipeline.prompt(cfg, PROMPT)
    outcomes: list[Outcome[Transcript]] = await run_units(
        [unit(pair, library, asker, prompt) for pair in asked],
        asker,
        concurrency=cfg.limits.concurrency,
        title="judge transcripts, pairs",
    )
    found = [outcome.result for outcome in outcomes if outcome.result is not None]
    kept = [transcript for transcript in found if transcript.agrees]
    written = [row for transcript in kept for row in sft_rows(transcript, brief=cfg.judge.brief)]
    pipeline.write_jsonl(out / "judge_sft.jsonl", written)
    pipeline.write_jsonl(out / "contradicted.jsonl", (_contradiction(t) for t in found if not t.agrees))
    pipeline.write_units(out, [(PROMPT, outcomes)])
    counts = {
        "pairs": len(pairs),
        "alike_to_a_judge": len(pairs) - len(distinct),
        "left_out_for_balance": len(distinct) - len(asked),
        "quarantined": len(asked) - len(found),
        "contradict_the_label": len(found) - len(kept),
        "kept": len(kept),
    }
    orders = [{"better": row["trace_id"].rpartition("/")[2]} for row in written]
    body = counts | {
        "sft_rows": len(written),
        "better_reply": balance_report([t.pair for t in kept], orders),
        "labeller": _labeller(found),
    }
    (out / "balance.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    report = pipeline.Report(cfg.name, cfg.stage)
    pipeline.record_units(report, PROMPT, outcomes)
    told = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
    return report, f"{told}; {len(written)} rows in {out / 'judge_sft.jsonl'}"


def _labeller(found: Sequence[Transcript]) -> Mapping[str, Mapping[str, int]]:
    """How often the labeller agrees with the label, by the order it was shown: its own position bias."""
    return {
        order.value: {
            "asked": sum(t.order is order for t in found),
            "agrees": sum(t.order is order and t.agrees for t in found),
            "ties": sum(t.order is order and t.verdict.better is Winner.TIE for t in found),
        }
        for order in ORDERS
    }


def _contradiction(transcript: Transcript) -> dict[str, Any]:
    return {
        "pair": transcript.pair.pair_id,
        "better": transcript.order.value,
        "said": transcript.verdict.better.value,
        "verdict": write_verdict(transcript.verdict, transcript.reasoning),
    }
