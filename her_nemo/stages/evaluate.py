"""Evaluation: replies from vLLM on held-out prompts, scored by the world's oracle and by the vitals.

Writes `<out>/samples.jsonl` (every reply with its verdict), `results.json` and `scenes.jsonl` (the same with intervals,
for `her-nemo evaluate compare`) and, last, `<out>/eval.json` (the figures).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.config.schema import EvaluateConfig
from her_nemo.data.miniature import Scene
from her_nemo.data.sources import read_jsonl
from her_nemo.data.tokenise import Dropped, Tokeniser, encode_prompt
from her_nemo.evaluation import reply_results, results
from her_nemo.evaluation.oracle import PRINCIPLES, OracleVerdict, load_scenes, score_reply
from her_nemo.evaluation.statistics import mean_and_standard_error
from her_nemo.evaluation.vitals import vitals
from her_nemo.roleplay.prompt import CONVERSATION_START, RolePrompt
from her_nemo.roleplay.turn import parse_turn
from her_nemo.rollout.engine import Rollout, Sampling
from her_nemo.rollout.vllm_engine import VllmEngine

EVAL_FILE = "eval.json"
SAMPLES_FILE = "samples.jsonl"
SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class Task:
    """One reply to generate. `character` is None where the system prompt is not of HER's layout.

    `brief` (who plays, whom they meet) and `tail` (the last message) are there for people who read the samples.
    """

    trace_id: str
    sample: int
    prompt_ids: list[int]
    character: str | None
    brief: str
    tail: str
    scene: Scene | None
    others: tuple[str, ...] = ()  # who else the system prompt names


def run(cfg: EvaluateConfig) -> int:
    started = time.monotonic()
    model, out = Path(cfg.model), Path(cfg.out)
    rows, _ = read_jsonl(cfg.prompts, "prompts")
    rows = rows if cfg.num_prompts < 0 else rows[: cfg.num_prompts]
    scenes = None if cfg.scenes is None else scenes_of(rows, cfg.scenes)
    tokeniser = Tokeniser(model)
    sampling = Sampling(**cfg.sampling.model_dump(), stop_ids=(tokeniser.eos_id,))
    with VllmEngine(
        model,
        dtype=None if cfg.dtype == "auto" else cfg.dtype,
        max_model_len=cfg.max_model_len,
        tensor_parallel_size=cfg.tensor_parallel_size,
    ) as engine:
        room = engine.max_model_len - sampling.max_tokens
        tasks, dropped = make_tasks(rows, scenes, tokeniser, room, cfg.samples_per_prompt)
        begun = time.monotonic()
        rollout = engine.generate([task.prompt_ids for task in tasks], sampling, cfg.seed)
        generating = time.monotonic() - begun
    replies = [tokeniser.decode(ids) for ids in rollout.response_ids]
    verdicts = [
        None if task.scene is None else score_reply(task.scene, reply)
        for task, reply in zip(tasks, replies, strict=True)
    ]
    figures = summarise(tasks, replies, verdicts) | {
        "samples": len(tasks),
        "prompts": len({task.trace_id for task in tasks}),
        "prompts_dropped": dropped,
        "truncated": rollout.finished.count(False),
        "mean_tokens": rollout.response_tokens / len(tasks),
        "seconds": time.monotonic() - started,
        "seconds_generating": generating,
        "tokens_per_second": rollout.response_tokens / generating,
        "model": cfg.model,
        "seed": cfg.seed,
        "sampling": cfg.sampling.model_dump(),
    }
    samples = sample_rows(tasks, replies, verdicts, rollout)
    others = [task.others for task in tasks]
    (out / EVAL_FILE).unlink(missing_ok=True)
    results.write_results(
        out, *reply_results.results_of_replies(cfg, samples, secrets=secrets_of(tasks), others=others)
    )
    write_results(out, figures, samples)
    print(headline(figures, out))
    return 0


def scenes_of(rows: Sequence[dict[str, Any]], path: str) -> dict[str, Scene]:
    """The oracle's scene of every row.

    Raises:
        UserError: a row has none.
    """
    scenes = load_scenes(path)
    missing = [row["trace_id"] for row in rows if row["trace_id"] not in scenes]
    if missing:
        raise UserError(
            f"{path}: no scene for {len(missing)} of {len(rows)} prompts, first {missing[0]!r}; "
            "give the scenes that were written with these prompts"
        )
    return scenes


def make_tasks(
    rows: Sequence[dict[str, Any]],
    scenes: dict[str, Scene] | None,
    tokeniser: Tokeniser,
    room: int,
    samples_per_prompt: int,
) -> tuple[list[Task], int]:
    """All replies to generate, and how many prompts were left out for want of room.

    Args:
        room: tokens a prompt may have; longer ones lose their oldest turns first.

    Raises:
        UserError: no prompt fits.
    """
    tasks: list[Task] = []
    dropped = 0
    for row in rows:
        prompt = encode_prompt(tokeniser, row, room)
        if isinstance(prompt, Dropped):
            dropped += 1
            continue
        scene = None if scenes is None else scenes[row["trace_id"]]
        name, brief = part(row["messages"])
        others = company(row["messages"])
        tail = row["messages"][-1]["content"].removeprefix(CONVERSATION_START)[-SHOWN_CHARACTERS:]
        tasks += [
            Task(row["trace_id"], sample, prompt.token_ids.tolist(), name, brief, tail, scene, others)
            for sample in range(samples_per_prompt)
        ]
    if not tasks:
        raise UserError(
            f"none of {len(rows)} prompts fits in {room} tokens, which is the model's length less "
            "sampling.max_tokens; lower sampling.max_tokens or raise max_model_len"
        )
    return tasks, dropped


def part(messages: Sequence[dict[str, str]]) -> tuple[str | None, str]:
    """The name the model is to speak as, and a brief of the part, from a system prompt of HER's layout; None
    and "" for any other."""
    try:
        prompt = RolePrompt.parse(messages[0]["content"])
    except ValueError:
        return None, ""
    return prompt.name, " ".join([prompt.profile, *(text for _, text in prompt.others)])[:SHOWN_CHARACTERS]


def company(messages: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """The names of the others in a system prompt of a known layout; none in any other."""
    try:
        return tuple(name for name, _ in RolePrompt.parse(messages[0]["content"]).others)
    except ValueError:
        return ()


def summarise(
    tasks: Sequence[Task], replies: Sequence[str], verdicts: Sequence[OracleVerdict | None]
) -> dict[str, Any]:
    """The oracle's scores, where there are scenes, and the vitals.

    The standard error is over prompts, since replies to the same prompt are not independent.
    """
    figures: dict[str, Any] = {}
    scored = [(task, verdict) for task, verdict in zip(tasks, verdicts, strict=True) if verdict is not None]
    if scored:
        by_prompt: dict[str, list[float]] = {}
        for task, verdict in scored:
            by_prompt.setdefault(task.trace_id, []).append(verdict.score)
        score, error = mean_and_standard_error([sum(s) / len(s) for s in by_prompt.values()])
        figures = {
            "oracle_score": score,
            # JSON has no nan.
            "oracle_score_se": None if math.isnan(error) else error,
            "principles": {
                name: sum(verdict.principles[name] for _, verdict in scored) / len(scored)
                for name in PRINCIPLES
            },
        }
    names, others = [task.character for task in tasks], [task.others for task in tasks]
    return figures | vitals(replies, names=names, secrets=secrets_of(tasks), others=others).as_dict()


def secrets_of(tasks: Sequence[Task]) -> list[tuple[str, ...]]:
    """What must not show in each reply: the hidden thing and its place, where there are scenes."""
    return [(task.scene.secret_object, task.scene.secret_place) if task.scene else () for task in tasks]


def sample_rows(
    tasks: Sequence[Task],
    replies: Sequence[str],
    verdicts: Sequence[OracleVerdict | None],
    rollout: Rollout,
) -> list[dict[str, Any]]:
    """One row a reply, in the order of the prompts."""
    return [
        {
            "trace_id": task.trace_id,
            "sample": task.sample,
            "character": task.character,
            "brief": task.brief,
            "prompt_tail": task.tail,
            "reply": reply,
            "score": verdict.score if verdict else None,
            "principles": verdict.principles if verdict else None,
            "defects": list(parse_turn(reply, expect_name=task.character).defects),
            "truncated": not finished,
        }
        for task, reply, verdict, finished in zip(tasks, replies, verdicts, rollout.finished, strict=True)
    ]


def write_results(out: Path, figures: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """Both files, each replaced whole; the figures last, so that they never stand beside older samples."""
    out.mkdir(parents=True, exist_ok=True)
    (out / EVAL_FILE).unlink(missing_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    for name, text in ((SAMPLES_FILE, lines), (EVAL_FILE, json.dumps(figures, indent=1) + "\n")):
        scratch = out / f".{name}.partial"
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, out / name)


def headline(figures: dict[str, Any], out: Path) -> str:
    """What the stage says when it is done."""
    score = ""
    if "oracle_score" in figures:
        error = figures["oracle_score_se"]
        score = (
            f"oracle {figures['oracle_score']:.3f}" + (f" ± {error:.3f}" if error is not None else "") + ", "
        )
    lost = f", {figures['prompts_dropped']} prompts too long" if figures["prompts_dropped"] else ""
    return (
        f"{figures['model']}: {score}format valid {figures['format_valid']:.1%}, "
        f"leaks {figures['leak_rate']:.1%}, {figures['samples']} samples "
        f"({figures['truncated']} cut at max_tokens{lost}), {figures['tokens_per_second']:.0f} tokens/s"
        f"\n-> {out / EVAL_FILE}, {out / SAMPLES_FILE}"
    )
