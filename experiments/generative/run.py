"""Does a role-play policy get better when a judge compares it with its own start, as in HER?

    python experiments/generative/run.py --demo runs/demo --judge runs/judge/rl --seed 0 --out runs/generative

HER's group-relative variant from the SFT model of a finished demo (`make demo SEED=0`). `--arm generative` (the
default): the reward is the judge alone, each reply against the frozen SFT model's, in both orders. `--arm mix`: the
judge, the demo's reward model and rules of form, with a reward for differing inside a group and a watch over it. Then
export and evaluation on the demo's held-out prompts by the oracle, which no part of training reads. The last line and
`<out>/<arm>_seed<n>/gain.json` are the gain over the demo's SFT model, scene by scene. `--set KEY=VALUE` changes the
training's configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAINING = [
    "algorithm=her",
    "reward.generative.against=sft",
    "reward.generative.judge.brief=true",
    "reward.generative.judge.micro_batch_size=64",
    "trainer.devices=2",
    "trainer.ppo.initial_policy_kl_penalty=0.02",
    "model.encoder_seq_length=384",
    "model.ppo.num_rollout_samples=128",
    "model.ppo.num_samples_per_prompt=8",
    "model.ppo.share_prompts=true",
    "model.ppo.rollout_micro_batch_size=64",
    "model.ppo.forward_micro_batch_size=16",
    "model.ppo.length_params.max_length=112",
    "model.micro_batch_size=16",
    "model.global_batch_size=64",
    "model.optim.name=fused_adam",
    "model.optim.lr=3e-4",
    "model.optim.betas=[0.9,0.95]",
]
ARMS = {
    "generative": ["reward.kind=generative"],
    # The judge's points lie in [-1, 1]; the reward model's scores of the SFT model's replies have a deviation of about
    # 1, and it does not see the stance (docs/cards/demo.md).
    "mix": [
        "reward.kind=mix",
        "reward.mix.generative=1.0",
        "reward.mix.scalar=0.3",
        "reward.mix.rules=0.5",
        "reward.diversity.pattern_weight=0.3",
        "reward.diversity.window=512",
        "reward.diversity.max_top1_share=0.9",
    ],
}
CURVES = ("train_rollouts/rewards", "train_rollouts/init_policy_kl", "roleplay/top1_pattern_share")
EVALUATION = ["dtype=float32", "sampling.top_p=0.9", "sampling.max_tokens=112"]  # the demo's


def main() -> int:
    options = parse()
    missing = [str(path) for path in (*inputs(options.demo), options.judge) if not path.exists()]
    if missing:
        print(f"not a finished demo and a judge; missing: {', '.join(missing)}", file=sys.stderr)
        return 2
    out = options.out / f"{options.arm}_seed{options.seed}"
    prompts, test, scenes, sft, _ = inputs(options.demo)
    stages = {
        "ppo": [
            *TRAINING,
            *ARMS[options.arm],
            *([f"reward.restore_from_path={options.demo / 'reward'}"] if options.arm == "mix" else []),
            f"model.data.train_ds.file_path={prompts}",
            f"pretrained_checkpoint.restore_from_path={sft}",
            f"reward.generative.judge.restore_from_path={options.judge}",
            f"reward.generative.judge.max_tokens={options.verdict_tokens}",
            f"exp_manager.explicit_log_dir={out / 'ppo'}",
            f"model.seed={options.seed}",
            f"trainer.ppo.max_steps={options.steps}",
            f"trainer.ppo.save_interval={options.steps}",
            *options.set,
        ],
        "export": [f"checkpoint={out / 'ppo'}", f"out={out / 'hf'}", "dtype=float32"],
        "evaluate": [
            f"model={out / 'hf'}", f"prompts={test}", f"scenes={scenes}", f"out={out / 'eval'}", f"seed={options.seed}",
            *EVALUATION,
        ],
    }  # fmt: skip
    for stage, words in stages.items():
        begun = time.monotonic()
        command = [sys.executable, "-m", "her_nemo", stage, *words]
        code = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
        print(f"{stage}: exit code {code} after {time.monotonic() - begun:.0f} s", flush=True)
        if code:
            return code
    report(options, out)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, required=True, help="the run directory of a finished demo")
    parser.add_argument(
        "--judge", type=Path, required=True, help="a judge, e.g. runs/judge/rl of experiments/judge"
    )
    parser.add_argument(
        "--arm", choices=sorted(ARMS), default="generative", help="what the reward is made of"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of sampling and data order; the demo's, usually"
    )
    parser.add_argument("--steps", type=int, default=16, help="rollouts of 128 replies")
    parser.add_argument("--verdict-tokens", type=int, default=176, help="longest verdict")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of her-nemo ppo")
    parser.add_argument("--out", type=Path, default=Path("runs/generative"))
    options = parser.parse_args()
    options.demo, options.judge, options.out = (
        path.resolve() for path in (options.demo, options.judge, options.out)
    )
    return options


def inputs(demo: Path) -> tuple[Path, Path, Path, Path, Path]:
    """Prompts, held-out prompts and their scenes, the SFT run and its evaluation."""
    world = demo / "world"
    return (
        world / "prompts_train.jsonl", world / "prompts_test.jsonl", world / "oracle" / "test_scenes.jsonl",
        demo / "sft", demo / "eval" / "sft",
    )  # fmt: skip


def scores(evaluation: Path) -> dict[str, float]:
    """The oracle's score of each held-out prompt, by trace_id."""
    lines = (evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["trace_id"]: row["score"] for row in map(json.loads, lines)}


def report(options: argparse.Namespace, out: Path) -> None:
    """The gain, and what the judge said on the way."""
    sys.path.insert(0, str(ROOT))
    from her_nemo.evaluation.statistics import paired_difference

    gain, error = paired_difference(scores(inputs(options.demo)[-1]), scores(out / "eval"))
    rows = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()]
    curves: dict[str, list[float]] = {}
    for row in rows:
        if row["tag"] in CURVES or row["tag"].startswith("reward/"):
            curves.setdefault(row["tag"], []).append(row["value"])
    figures = {
        "arm": options.arm, "seed": options.seed, "gain": gain, "standard_error": error, "curves": curves,
        "eval": json.loads((out / "eval" / "eval.json").read_text()),
        "sft": json.loads((inputs(options.demo)[-1] / "eval.json").read_text()),
    }  # fmt: skip
    (out / "gain.json").write_text(json.dumps(figures, indent=1) + "\n")
    told = ", ".join(
        f"{tag.split('/')[1]} {curve[0]:.3f} -> {curve[-1]:.3f}" for tag, curve in curves.items()
    )
    print(
        f"{out}: {told}\n{options.arm} over SFT: {gain:+.4f} +- {error:.4f} ({gain / error:+.1f} standard errors)"
    )


def environment() -> dict[str, str]:
    """One thread a process, as in the demo: the numbers do not depend on the machine's cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    sys.exit(main())
