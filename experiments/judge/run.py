"""The judge at demo scale: SFT on transcripts made by construction, then RL with the label as its reward.

    python experiments/judge/run.py --demo runs/demo --out runs/judge

Starts from the SFT model of a demo (`her-nemo demo`); two processes on two cores. Writes `<out>/judge.json`: accuracy,
position consistency and the paired difference of RL to SFT. Every stage runs as a user would type it. Started again
with the same `--out` it goes on where it was ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from her_nemo.config.compose import assign
from her_nemo.data.miniature_judge import JudgeSizes, judge_vocabulary, write_judge_files
from her_nemo.data.tokenizer import extend_tokenizer
from her_nemo.evaluation.judge_accuracy import Z95, pair_scores
from her_nemo.evaluation.statistics import paired_difference
from her_nemo.stages.judge import judged

SFT = [
    "trainer.devices=2",
    "model.encoder_seq_length=576",
    "model.micro_batch_size=4",
    "model.global_batch_size=8",
    "model.optim.name=fused_adam",
    "model.optim.lr=2e-3",
    "model.optim.betas=[0.9,0.95]",
    "model.optim.sched.name=CosineAnnealing",
    "model.optim.sched.warmup_steps=20",
    "model.optim.sched.min_lr=2e-4",
    "trainer.sft.max_epochs=2",
    "trainer.sft.max_steps=1200",
    "trainer.sft.save_interval=1200",
]
RL = [
    "algorithm=grpo",
    "reward.kind=verdict",
    "trainer.devices=2",
    "model.encoder_seq_length=576",
    "model.micro_batch_size=16",
    "model.global_batch_size=64",
    "model.optim.name=fused_adam",
    "model.optim.lr=2e-4",
    "model.optim.betas=[0.9,0.95]",
    "model.ppo.num_rollout_samples=128",
    "model.ppo.share_prompts=true",
    "model.ppo.rollout_micro_batch_size=64",
    "model.ppo.forward_micro_batch_size=16",
    "model.ppo.length_params.max_length=176",
    "trainer.ppo.initial_policy_kl_penalty=0.01",
    "trainer.ppo.max_steps=16",
    "trainer.ppo.save_interval=16",
]
JUDGE = ["dtype=float32", "sampling.max_tokens=176"]


def main() -> int:
    given = arguments()
    out, seed = given.out, given.seed
    seconds = json.loads((out / "seconds.json").read_text()) if (out / "seconds.json").exists() else {}
    if not (out / "world" / "balance.json").exists():
        balance = write_judge_files(out / "world", seed, JudgeSizes())
        extend_tokenizer(given.demo / "world" / "tokenizer", out / "world" / "tokenizer", judge_vocabulary())
        (out / "world" / "balance.json").write_text(json.dumps(balance, indent=1) + "\n")

    def stage(name: str, done: Path, *overrides: str) -> None:
        if not done.exists():
            seconds[name] = seconds.get(name, 0.0) + her_nemo(name, *overrides)
            (out / "seconds.json").write_text(json.dumps(seconds) + "\n")

    def train(kind: str, data: str, start: Path, name: str, overrides: list[str]) -> None:
        model, evaluation = out / "models" / name, out / "eval" / name
        stage(
            kind,
            model / "proof.json",
            assign("model.data.train_ds.file_path", out / "world" / f"judge_{data}.jsonl"),
            assign("pretrained_checkpoint.restore_from_path", start),
            assign("exp_manager.explicit_log_dir", out / name),
            assign("model.tokenizer.path", out / "world" / "tokenizer"),
            f"model.seed={seed}",
            *overrides,
        )
        stage("export", model / "proof.json", assign("checkpoint", out / name), assign("out", model), "dtype=float32")
        stage(
            "judge",
            evaluation / "eval.json",
            assign("model", model),
            assign("prompts", out / "world" / "judge_test.jsonl"),
            assign("out", evaluation),
            *JUDGE,
        )

    train("sft", "sft", given.demo / "sft", "sft", [*SFT, *given.sft])
    train("ppo", "rl", out / "sft", "rl", [*RL, *given.rl])
    report = summarise(out) | {"seconds": seconds, "seed": seed}
    (out / "judge.json").write_text(json.dumps(report, indent=1) + "\n")
    gain = report["gain"]
    print(
        f"RL over SFT, held-out accuracy: {gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f}); position "
        f"consistency {report['rl']['position_consistency']['value']:.3f}; {sum(seconds.values()) / 60:.1f} minutes"
    )
    return 0


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, required=True, help="the run directory of a finished demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sft", action="append", default=[], help="a further override of SFT; may come again"
    )
    parser.add_argument("--rl", action="append", default=[], help="the same for RL")
    return parser.parse_args()


def her_nemo(stage: str, *overrides: str) -> float:
    """Run a stage; its seconds. Ends the program if it fails: its own message is above."""
    print(f"\n== {stage}", flush=True)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "her_nemo", stage, *overrides], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return time.monotonic() - begun


def summarise(out: Path) -> dict[str, Any]:
    """Both evaluations, and the difference pair by pair: both judges saw the same ones."""
    found: dict[str, Any] = {}
    scores = {}
    for name in ("sft", "rl"):
        found[name] = json.loads((out / "eval" / name / "eval.json").read_text())
        rows = (out / "eval" / name / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        scores[name] = pair_scores([judged(json.loads(row)) for row in rows])
    mean, error = paired_difference(scores["sft"], scores["rl"])
    return found | {"gain": {"value": mean, "low": mean - Z95 * error, "high": mean + Z95 * error}}


if __name__ == "__main__":
    sys.exit(main())
