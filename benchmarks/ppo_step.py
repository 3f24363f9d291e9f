"""Samples per second of one policy-optimisation step on the tiny model: ours against TRL's GRPOTrainer, in one run.

    python benchmarks/ppo_step.py [--trl-python PATH] [--json FILE] [--samples 64] [--group 8] [--tokens 80]

TRL (1.16) has no PPO with a critic any more; GRPO is what it offers well, so GRPO is compared, and our PPO with a
critic is shown beside it for where its time goes. A step is one rollout and its updates, everything in it included:
what is reported of the replies, too, of which we report more. Sides take turns, `--rounds` times; medians over all
steps but the first of each turn, by the clock and by processor time, which other work on the machine touches less;
parts by processor time alone.

Equal: model (random weights, read from one directory), prompts and their token ids (compared), replies of exactly
`--tokens` tokens (minimum = maximum, the end token banned), sampling from the whole distribution at temperature 1, the
reward model and the ids it reads, number of updates and micro-batches, KL to a frozen reference (k3, in the loss),
old log-probs computed once before the updates, AdamW, fp32, threads. Not equal: the random numbers, so the replies
differ in content; padding is each side's own; TRL's rollouts report no log-probs of the engine and check none, ours do.

PATH is a Python with trl in an environment of its own: docs/cards/ppo_step.md. Without it our side runs alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# What our side is run as: name -> overrides of the GRPO job.
VARIANTS: dict[str, list[str]] = {"ours": [], "ours, prompts shared": ["model.ppo.share_prompts=true"]}
CRITIC = "ours, PPO with critic"
TRL = "TRL GRPO"
PARTS = ("generate", "score", "policy", "reference", "values", "critic", "actor")
LABELS = {
    "generate": "generate",
    "score": "score (reward model)",
    "policy": "log-probs, policy",
    "reference": "log-probs, reference",
    "values": "values",
    "critic": "updates, critic",
    "actor": "updates, actor",
    "rest": "everything else",
}


def main() -> int:
    options = parse()
    if options.side:
        return our_side(options.side, json.loads(options.job.read_text()), options.out)
    with tempfile.TemporaryDirectory(prefix="her_nemo_ppo_step_") as scratch:
        job = prepare(options, Path(scratch))
        found = compare(options, job, Path(scratch))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"figures are in {options.json}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, help="a Python that has trl")
    parser.add_argument("--samples", type=int, default=64, help="replies a rollout")
    parser.add_argument("--group", type=int, default=8, help="replies to a prompt")
    parser.add_argument("--tokens", type=int, default=80, help="tokens of every reply")
    parser.add_argument("--updates", type=int, default=2, help="optimizer updates a step")
    parser.add_argument("--micro-batch", type=int, default=16, help="replies in one forward of training and scoring")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn, the first not counted")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1, help="threads of the one process of each side")
    parser.add_argument("--only", nargs="+", help="of our variants, these")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------- what is run


def prepare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """A random policy and reward model of the demo's shape in Hugging Face form, prompts, and the sizes."""
    import torch
    from transformers import Qwen3ForCausalLM, Qwen3ForSequenceClassification

    from her_nemo.config.compose import load
    from her_nemo.data.miniature_files import WorldSizes, write_world
    from her_nemo.data.tokenise import Tokeniser
    from her_nemo.stages.base import hf_config, initialise

    world = scratch / "world"
    count = options.samples * options.steps  # PPO with a critic asks one reply a prompt
    sizes = WorldSizes(pretrain=400, sft_train=400, pairs_train=8, pairs_val=8, prompts_train=count, prompts_test=8)
    write_world(world, 0, sizes)
    tokeniser = Tokeniser(world / "tokenizer")
    config = hf_config(load("demo", []).model, tokeniser)
    torch.manual_seed(0)
    policy = Qwen3ForCausalLM(config)
    initialise(policy)
    config.num_labels = 1
    for network, where in ((policy, "model"), (Qwen3ForSequenceClassification(config), "reward")):
        network.save_pretrained(scratch / where)
        tokeniser.hf.save_pretrained(scratch / where)
    given = ("samples", "group", "tokens", "updates", "micro_batch", "steps", "threads")
    return {
        **{name: getattr(options, name) for name in given},
        "prompts": str(world / "prompts_train.jsonl"),
        "model": str(scratch / "model"),
        "reward": str(scratch / "reward"),
        "beta": 0.04,
        "lr": 1e-6,
        "parameters": sum(p.numel() for p in policy.parameters()),
    }


def overrides(job: dict[str, Any], out: Path) -> list[str]:
    """The job in `her-nemo ppo`'s keys, but for the algorithm."""
    return [
        f"model.data.train_ds.file_path={job['prompts']}",
        f"pretrained_checkpoint.restore_from_path={job['model']}",
        f"reward.restore_from_path={job['reward']}",
        f"exp_manager.explicit_log_dir={out}",
        "exp_manager.checkpoint_callback_params.save_top_k=0",
        "trainer.devices=1",
        "model.encoder_seq_length=512",
        "model.data.shuffle=false",
        f"model.micro_batch_size={job['micro_batch']}",
        f"model.global_batch_size={job['samples'] // job['updates']}",
        f"model.ppo.num_rollout_samples={job['samples']}",
        f"model.ppo.rollout_micro_batch_size={job['samples']}",
        f"model.ppo.forward_micro_batch_size={job['micro_batch']}",
        f"model.ppo.length_params.max_length={job['tokens']}",
        f"model.ppo.length_params.min_length={job['tokens']}",
        "model.optim.name=fused_adam",
        f"model.optim.lr={job['lr']}",
        "model.optim.betas=[0.9,0.95]",
        f"trainer.ppo.max_steps={job['steps']}",
    ]


def algorithm(side: str, job: dict[str, Any]) -> list[str]:
    if side == CRITIC:
        return ["critic.optim.name=fused_adam", f"critic.optim.lr={job['lr']}"]
    return [
        "algorithm=grpo",
        f"model.ppo.num_samples_per_prompt={job['group']}",
        f"trainer.ppo.initial_policy_kl_penalty={job['beta']}",
        *VARIANTS[side],
    ]


def our_side(side: str, job: dict[str, Any], out: Path) -> int:
    """Run the stage as a user runs it, in this process, with clocks of ours on its parts."""
    import torch

    from her_nemo import cli
    from her_nemo.training.logging import METRICS_FILE, series

    torch.set_num_threads(job["threads"])
    seen: dict[str, list[Any]] = {"begun": [], "parts": [], "prompts": [], "tokens": []}
    measure(seen)
    run_dir = out.with_suffix("")
    code = cli.main(["ppo", *overrides(job, run_dir), *algorithm(side, job)])
    if code:
        return code
    curves = series(run_dir / METRICS_FILE)
    steps = [
        {"step": end[0] - begin[0], "processor": end[1] - begin[1]} | parts
        for begin, end, parts in zip(seen["begun"], seen["begun"][1:], seen["parts"], strict=False)
    ]
    packages = ("torch", "megatron-core", "transformers", "numpy")
    found = {
        "steps": steps,
        "prompts": seen["prompts"],
        "tokens": seen["tokens"],
        "threads": torch.get_num_threads(),
        "logprob_gap_max": max(value for _, value in curves["rollout/logprob_gap_max"]),
        "versions": {name: version(name) for name in packages},
    }
    out.write_text(json.dumps(found) + "\n")
    return 0


def measure(seen: dict[str, list[Any]]) -> None:
    """Clocks on the beginnings of rollouts (and the end of the last step) and, in processor time, on a step's parts.
    Prompts and numbers of tokens of each rollout are noted too."""
    from her_nemo.megatron import forward
    from her_nemo.rollout import experience
    from her_nemo.rollout.megatron_engine import MegatronEngine
    from her_nemo.stages import ppo
    from her_nemo.training.run import Run

    generated, saved = MegatronEngine.generate, Run.save
    busy: list[str] = []  # parts begun and not ended: the outermost counts, so the reward model's forwards are scoring

    def mark() -> None:
        seen["begun"].append((time.perf_counter(), time.process_time()))

    def timed(name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            part, begun = name(*args, **kwargs), time.process_time()
            busy.append(part)
            result = function(*args, **kwargs)
            busy.pop()
            if not busy:
                here = seen["parts"][-1]
                here[part] = here.get(part, 0.0) + time.process_time() - begun
            return result

        return run

    def whose(model: Any, *_: Any, **how: Any) -> str:
        return "values" if model.head == "scalar" else "policy" if how.get("with_entropy") else "reference"

    @wraps(generated)
    def generate(self: MegatronEngine, prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        rollout = generated(self, prompts, *args, **kwargs)
        seen["prompts"].append(prompts)
        seen["tokens"].append(rollout.response_tokens)
        return rollout

    clocked = timed(lambda *_, **__: "generate", generate)

    @wraps(generated)
    def begin(self: MegatronEngine, *args: Any, **kwargs: Any) -> Any:
        mark()
        seen["parts"].append({})
        return clocked(self, *args, **kwargs)

    @wraps(saved)
    def save(self: Run, step: int) -> None:
        mark()  # the last step asks for a checkpoint, which save_top_k=0 declines
        saved(self, step)

    Run.save = save
    MegatronEngine.generate = begin
    experience.score = timed(lambda *_, **__: "score", experience.score)
    forward.outputs = timed(whose, forward.outputs)
    ppo.update = timed(lambda learner, *_, **__: "actor" if learner.model.head == "lm" else "critic", ppo.update)


# ---------------------------------------------------------------- turns, medians, tables


def compare(options: argparse.Namespace, job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """All sides in turn; per side the median step and its parts, and what is equal as far as it can be checked."""
    job_file = scratch / "job.json"
    job_file.write_text(json.dumps(job))
    ours = [sys.executable, str(Path(__file__).resolve()), "--job", str(job_file), "--side"]
    sides = {side: [*ours, side, "--out"] for side in options.only or [*VARIANTS, CRITIC]}
    if options.trl_python:
        sides[TRL] = [str(options.trl_python), str(ROOT / "benchmarks/ppo_step_trl.py"), str(job_file)]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(options.rounds):
        for number, (side, command) in enumerate(sides.items()):
            print(f"round {turn + 1} of {options.rounds}: {side}", flush=True)
            runs[side].append(once([*command, str(scratch / f"{turn}_{number}.json")], job["threads"]))
            taken = runs[side][-1]["steps"]
            print("  " + ", ".join(f"{step['step']:.2f} s ({step['processor']:.2f})" for step in taken), flush=True)
    check_equal(job, runs)
    job = {key: value for key, value in job.items() if key not in ("prompts", "model", "reward")}
    figures = {side: medians(job, turns) for side, turns in runs.items()}
    if TRL in figures:
        for figure in figures.values():
            for name in ("samples_per_second", "samples_per_processor_second"):
                figure[f"{name}_over_trl"] = figure[name] / figures[TRL][name]
    return {"job": job, "machine": machine(), "sides": figures}


def once(command: list[str], threads: int) -> dict[str, Any]:
    """One turn of one side in a process of its own; its figures."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stdout}{done.stderr}"[-4000:])
    return json.loads(Path(command[-1]).read_text())


def check_equal(job: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> None:
    """The sides that are compared saw the same prompt ids in the same steps and generated as many tokens.

    Raises:
        SystemExit: they did not; the figures would mean nothing.
    """
    compared = {side: turns for side, turns in runs.items() if side != CRITIC}
    wanted = next(iter(compared.values()))[0]["prompts"] if compared else []
    for side, turns in runs.items():
        for turn in turns:
            if turn["tokens"] != [job["samples"] * job["tokens"]] * job["steps"]:
                raise SystemExit(f"{side}: generated {turn['tokens']} tokens a step")
            if turn["threads"] != job["threads"]:
                raise SystemExit(f"{side}: ran on {turn['threads']} threads, not {job['threads']}")
            if side in compared and turn["prompts"] != wanted:
                raise SystemExit(f"{side}: was asked other prompts than {next(iter(compared))}")


def medians(job: dict[str, Any], turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps after the first of each turn: seconds of a step, and processor seconds of its parts."""
    steps = [step for turn in turns for step in turn["steps"][1:]]
    whole, processor = (statistics.median(step[name] for step in steps) for name in ("step", "processor"))
    parts = {
        part: statistics.median(step[part] for step in steps) for part in PARTS if all(part in step for step in steps)
    }
    left = [step["processor"] - sum(value for name, value in step.items() if name in PARTS) for step in steps]
    # TRL's loop has no place for a clock around its updates alone: what is left of its step is called that.
    parts["rest" if "actor" in parts else "actor"] = statistics.median(left)
    found = {
        "samples_per_second": job["samples"] / whole,
        "samples_per_processor_second": job["samples"] / processor,
        "step_seconds": whole,
        "step_processor_seconds": processor,
        "steps_measured": [round(step["step"], 3) for step in steps],
        "parts_processor_seconds": parts,
        "prompt_tokens": [sum(map(len, prompts)) for prompts in turns[0]["prompts"]],
    }
    kept = ("versions", "dtype", "reference_dtype", "attention", "logprob_gap_max")
    return found | {key: turns[0][key] for key in kept if key in turns[0]}


def show(found: dict[str, Any]) -> None:
    job, sides = found["job"], found["sides"]
    print(
        f"\n{job['parameters'] / 1e6:.1f} M parameters, {job['samples']} replies of {job['tokens']} tokens, "
        f"{job['group']} to a prompt, {job['updates']} updates, micro-batches of {job['micro_batch']}, fp32, "
        f"{job['threads']} thread{'s' * (job['threads'] > 1)}"
    )
    width = max(map(len, LABELS.values()))
    print(f"\n{'processor seconds':{width}}" + "".join(f"  {side:>22}" for side in sides))
    for part, label in LABELS.items():
        cells = [figure["parts_processor_seconds"].get(part) for figure in sides.values()]
        if any(cell is not None for cell in cells):
            print(f"{label:{width}}" + "".join(f"  {'' if c is None else f'{c:.2f}':>22}" for c in cells))
    for label, key, style in (
        ("step, by the clock", "step_seconds", ".2f"),
        ("step, processor", "step_processor_seconds", ".2f"),
        ("samples/s", "samples_per_second", ".2f"),
        ("  over TRL", "samples_per_second_over_trl", ".2f"),
        ("samples/processor s", "samples_per_processor_second", ".2f"),
        ("  over TRL", "samples_per_processor_second_over_trl", ".2f"),
    ):
        cells = [figure.get(key) for figure in sides.values()]
        if any(cell is not None for cell in cells):
            print(f"{label:{width}}" + "".join(f"  {'' if c is None else format(c, style):>22}" for c in cells))
    print(
        "\nsync: nothing to do here, rollouts read the trainer's own tensors on both sides. TRL's updates hold "
        "everything else of its step;\nPPO with a critic asks other prompts (one reply each) and is not to be "
        "compared with the GRPO columns."
    )


def machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
