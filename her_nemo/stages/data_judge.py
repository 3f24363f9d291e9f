"""`her-nemo data judge`: preference pairs as a judge's prompts with labels, each in both orders, balanced."""

from __future__ import annotations

import json
from pathlib import Path

from her_nemo.config.errors import UserError
from her_nemo.config.judge import JudgePromptsConfig
from her_nemo.data.judge_rows import balance_report, balanced, prompt_rows, read_pair
from her_nemo.data.sources import read_rows
from her_nemo.data.synthesis.pipeline import write_jsonl

PROMPTS_FILE = "judge_prompts.jsonl"
BALANCE_FILE = "balance.json"


def run(cfg: JudgePromptsConfig) -> int:
    out = Path(cfg.out)
    rows, _ = read_rows(cfg.source, "pairs", cfg.skip_malformed)
    pairs = [read_pair(row) for row in rows]
    distinct = [pair for pair in pairs if pair.distinct]
    kept = balanced(distinct) if cfg.balance else distinct
    if not kept:
        raise UserError(
            f"{cfg.source}: of {len(pairs)} pairs {len(distinct)} differ in what a judge sees, and none is left after "
            "balancing; give more pairs, or balance=false"
        )
    prompts = [row for pair in kept for row in prompt_rows(pair, brief=cfg.brief)]
    report = {
        "pairs": len(pairs),
        "alike_to_a_judge": len(pairs) - len(distinct),
        "left_out_for_balance": len(distinct) - len(kept),
        "kept": len(kept),
        "prompts": len(prompts),
        "better_reply": balance_report(kept, prompts),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / PROMPTS_FILE, prompts)
    (out / BALANCE_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{report['pairs']} pairs = {report['kept']} kept + {report['alike_to_a_judge']} alike to a judge + "
        f"{report['left_out_for_balance']} left out for balance"
    )
    for what, counts in report["better_reply"].items():
        print(f"better reply, {what}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    print(f"{cfg.name}: {len(prompts)} prompts in {out / PROMPTS_FILE}")
    return 0
