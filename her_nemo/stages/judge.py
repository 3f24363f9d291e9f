"""A judge's verdicts from vLLM on held-out prompts, against their labels.

Writes `<out>/samples.jsonl` (every verdict) and, last, `<out>/eval.json` (the figures).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.config.judge import JudgeConfig
from her_nemo.data.judge_rows import read_labels
from her_nemo.data.sources import read_rows
from her_nemo.data.tokenise import Dropped, Tokeniser, encode_prompt
from her_nemo.evaluation.judge_accuracy import Judged, judge_figures, table
from her_nemo.roleplay.verdict import VerdictError, Winner, parse_verdict
from her_nemo.rollout.engine import Sampling
from her_nemo.rollout.vllm_engine import VllmEngine
from her_nemo.stages.evaluate import EVAL_FILE, SAMPLES_FILE, write_results


def run(cfg: JudgeConfig) -> int:
    started = time.monotonic()
    model, out = Path(cfg.model), Path(cfg.out)
    rows, _ = read_rows(cfg.prompts, "prompts")
    labels = read_labels([cfg.prompts])
    rows = rows if cfg.num_prompts < 0 else rows[: cfg.num_prompts]
    tokeniser = Tokeniser(model)
    sampling = Sampling(**cfg.sampling.model_dump(), stop_ids=(tokeniser.eos_id,))
    with VllmEngine(
        model,
        dtype=None if cfg.dtype == "auto" else cfg.dtype,
        max_model_len=cfg.max_model_len,
        tensor_parallel_size=cfg.tensor_parallel_size,
    ) as engine:
        fitting, asked = encode(rows, tokeniser, engine.max_model_len - sampling.max_tokens)
        rollout = engine.generate(asked, sampling, cfg.seed)
    texts = [tokeniser.decode(ids) for ids in rollout.response_ids]
    samples = [
        sample(row, labels[row["trace_id"]], text, finished)
        for row, text, finished in zip(fitting, texts, rollout.finished, strict=True)
    ]
    figures = judge_figures([judged(row) for row in samples]) | {
        "prompts_dropped": len(rows) - len(fitting),
        "truncated": rollout.finished.count(False),
        "mean_tokens": rollout.response_tokens / len(samples),
        "seconds": time.monotonic() - started,
        "model": cfg.model,
        "seed": cfg.seed,
        "sampling": cfg.sampling.model_dump(),
    }
    write_results(out, figures, samples)
    lost = f", {figures['prompts_dropped']} prompts too long" if figures["prompts_dropped"] else ""
    print(f"{cfg.model}: {figures['truncated']} cut at max_tokens{lost}\n{table(figures)}")
    print(f"-> {out / EVAL_FILE}, {out / SAMPLES_FILE}")
    return 0


def encode(
    rows: Sequence[dict[str, Any]], tokeniser: Tokeniser, room: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The rows that fit in `room` tokens, and their token ids.

    Raises:
        UserError: none does.
    """
    fitting, asked = [], []
    for row in rows:
        prompt = encode_prompt(tokeniser, row, room)
        if not isinstance(prompt, Dropped):
            fitting.append(row)
            asked.append(prompt.token_ids.tolist())
    if not fitting:
        raise UserError(
            f"none of {len(rows)} prompts fits in {room} tokens, which is the model's length less "
            "sampling.max_tokens; lower sampling.max_tokens or raise max_model_len"
        )
    return fitting, asked


def sample(row: dict[str, Any], label: Winner, text: str, finished: bool) -> dict[str, Any]:
    """One verdict, with what `judged` needs."""
    said, problem = None, None
    try:
        said = parse_verdict(text).better.value
    except VerdictError as error:
        problem = f"{error.kind}: {error}"
    return {
        "trace_id": row["trace_id"],
        "pair": row.get("pair", row["trace_id"]),
        "better": label.value,
        "words": row.get("words", [0, 0]),
        "said": said,
        "problem": problem,
        "verdict": text,
        "truncated": not finished,
    }


def judged(row: dict[str, Any]) -> Judged:
    """A row of samples.jsonl as the figures want it."""
    said = None if row["said"] is None else Winner(row["said"])
    return Judged(row["pair"], Winner(row["better"]), said, tuple(row["words"]))
