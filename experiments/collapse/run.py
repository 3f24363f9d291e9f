"""Does a role-play policy fall onto one way of building its turns, and does the diversity reward prevent it?

    python experiments/collapse/run.py --demo runs/demo --seed 0 --out runs/collapse [--arm without] [--steps 50]

One run of `her-nemo ppo` an arm, from the SFT model and the reward model of a finished demo (`make demo SEED=0`). Both
arms are HER's group-relative variant on the scalar reward model alone, without a KL penalty and with a learning rate
above the demo's, which is how the collapse is said to come. They differ in one key, `reward.diversity.pattern_weight`.
`plot.py` makes the page.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "without": ["reward.diversity.pattern_weight=0.0"],
    # On the scale of the reward model, whose scores of the SFT model's replies have a deviation of about 1.
    "with": ["reward.diversity.pattern_weight=1.0"],
}
COMMON = [
    "algorithm=her",
    "trainer.devices=2",
    "trainer.ppo.initial_policy_kl_penalty=0.0",
    "model.encoder_seq_length=384",
    "model.ppo.num_rollout_samples=48",
    "model.ppo.num_samples_per_prompt=8",
    "model.ppo.share_prompts=true",
    "model.ppo.rollout_micro_batch_size=24",
    "model.ppo.forward_micro_batch_size=8",
    "model.ppo.length_params.max_length=112",
    "model.micro_batch_size=8",
    "model.global_batch_size=16",
    "model.optim.name=fused_adam",
    "model.optim.lr=5e-4",
    "model.optim.betas=[0.9,0.95]",
    # Watched in both arms: four rollouts.
    "reward.diversity.window=192",
    "reward.diversity.max_top1_share=0.9",
    "reward.diversity.patience=3",
    "reward.diversity.action=alert",
]


def main() -> int:
    options = parse()
    missing = [str(path) for path in inputs(options.demo) if not path.exists()]
    if missing:
        print(f"{options.demo} is not a finished demo; missing: {', '.join(missing)}", file=sys.stderr)
        return 2
    for arm in [options.arm] if options.arm else ARMS:
        begun = time.monotonic()
        out = options.out / f"{arm}_seed{options.seed}"
        code = subprocess.run(command(options, arm, out), cwd=ROOT, env=environment(), check=False).returncode
        print(f"{out}: exit code {code} after {time.monotonic() - begun:.0f} s", flush=True)
        if code:
            return code
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="the run directory of a finished demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling and data order")
    parser.add_argument("--arm", choices=sorted(ARMS), help="one arm; both without this")
    parser.add_argument("--steps", type=int, default=50, help="rollouts of 48 replies")
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"))
    options = parser.parse_args()
    options.demo, options.out = options.demo.resolve(), options.out.resolve()
    return options


def inputs(demo: Path) -> tuple[Path, Path, Path]:
    """Prompts, the SFT run and the reward model's run of a demo."""
    return demo / "world" / "prompts_train.jsonl", demo / "sft", demo / "reward"


def command(options: argparse.Namespace, arm: str, out: Path) -> list[str]:
    """`her-nemo ppo` of one arm. An arm that was cut off goes on from its last checkpoint."""
    prompts, sft, reward = inputs(options.demo)
    return [
        sys.executable, "-m", "her_nemo", "ppo", *COMMON, *ARMS[arm],
        f"model.data.train_ds.file_path={prompts}",
        f"pretrained_checkpoint.restore_from_path={sft}",
        f"reward.restore_from_path={reward}",
        f"exp_manager.explicit_log_dir={out}",
        f"model.seed={options.seed}",
        f"trainer.ppo.max_steps={options.steps}",
        "trainer.ppo.save_interval=10",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """One thread a process, as in the demo: the numbers do not depend on the machine's cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    sys.exit(main())
