"""`her-nemo plan STAGE [overrides] [--json] [--search] [--length TOKENS]`: will it run, will it fit, how long.

No torch, no process group. What is required and was not given (paths, mostly) is listed, not refused: a plan can be
made before the files are there. Exit code 0 if nothing is wrong and it fits, else 2.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from her_nemo.config import arguments, partial
from her_nemo.config.architecture import Shape as ArchitectureKeys
from her_nemo.config.errors import ConfigErrors, Problem, UserError, spoken
from her_nemo.config.problems import MISSING
from her_nemo.config.schema import ARCHITECTURE_KEYS, PpoConfig, RewardConfig, SftConfig
from her_nemo.planning import preflight, preflight_files, published, search, stages
from her_nemo.planning.servers import Servers
from her_nemo.planning.shapes import Shape, total_parameters

GB = 1e9
FLAGS = ("--json", "--search", "--fp8", "--strict")
USAGE = """usage: her-nemo plan STAGE [OVERRIDE ...] [--json] [--search [--fp8]] [--length TOKENS] [--strict]
       her-nemo plan --published

Preflight, memory per GPU and phase, seconds per phase. OVERRIDE as for the stage itself, e.g.
  her-nemo plan ppo model=qwen3_32b cluster=h100_4x8 precision=bf16 --search
--search     the fastest layouts that fit the cluster; with --fp8 also in FP8
--length N   mean tokens of a sequence, for times (default: the longest, model.encoder_seq_length)
--json       the same as JSON
--strict     a required key that was not given is a problem (as for the stage itself; Slurm jobs use this)
--published  the time model against published runs, with errors
"""


@dataclass
class Answer:
    """What `her-nemo plan` found out."""

    stage: str
    problems: list[Problem]
    to_give: list[str]
    plan: stages.StagePlan | None = None
    parameters: int = 0
    steps: int | None = None
    checked_memory: bool = True
    fixes: list[search.Option] = field(default_factory=list)
    found: list[search.Option] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.plan is None or not self.checked_memory or self.plan.headroom >= 0

    @property
    def exit_code(self) -> int:
        return 0 if not self.problems and self.fits else UserError.exit_code


def main(words: list[str]) -> int:
    """Run the command; `words` are what follows `her-nemo plan`."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE, end="")
        return 0
    if words[0] == "--published":
        print(published.table())
        return 0
    stage, words = words[0], words[1:]
    if stage == "data" and words:  # `plan data ingest` as `data ingest`
        stage, words = f"data_{words[0]}", words[1:]
    typed = arguments.parse(words, "her-nemo plan", flags=FLAGS, options=["--length"])
    if "fp8" in typed.flags and "search" not in typed.flags:
        raise UserError("--fp8 goes with --search; to plan FP8 itself give model.fp8=true")
    options = dict(typed.options)
    length = _positive(options.pop("length", None))
    answer = answer_for(
        stage, typed.overrides, length=length, search_layouts="search" in typed.flags, fp8="fp8" in typed.flags,
        **options,
    )  # fmt: skip
    if "strict" in typed.flags:
        hint = "add {}=... to the command line"
        answer.problems += [Problem(key, MISSING, "", hint.format(key)) for key in answer.to_give]
    print(json.dumps(as_json(answer), indent=1) if "json" in typed.flags else as_text(answer))
    return answer.exit_code


def _positive(length: str | None) -> float | None:
    if length is None:
        return None
    if not (length.isdigit() and int(length) > 0):
        raise UserError(f"--length {length}: give a whole number of tokens")
    return float(length)


def answer_for(
    stage: str,
    overrides: list[str],
    *,
    length: float | None = None,
    search_layouts: bool = False,
    fp8: bool = False,
    config_dir: str | None = None,
    config_name: str | None = None,
) -> Answer:
    """Plan one stage. ConfigErrors when the configuration cannot be read at all."""
    config, problems, to_give = partial.load(stage, overrides, config_dir, config_name)
    checked = preflight.check(config, os.environ)
    # Keys that only some configurations require are found missing by preflight.
    to_give = [*to_give, *(found.key for found in checked if found.message.startswith(MISSING))]
    # A path that was not given cannot be wrong yet.
    problems += [found for found in checked if found.key not in to_give]
    answer = Answer(stage, problems, to_give)
    if not isinstance(config, SftConfig | RewardConfig | PpoConfig):
        answer.problems += preflight_files.check_others(config)
        answer.notes.append(f"{spoken(stage)}: preflight only; memory and time are planned for sft, reward and ppo")
        return answer
    architecture = _architecture(config)
    answer.problems += [
        found for found in preflight_files.check(config, architecture) if _about_this_machine(found, config)
    ]
    missing = [key for key in ARCHITECTURE_KEYS if key not in architecture]
    if missing:
        answer.notes.append(
            "memory and time: the model's shape is not known; add model=qwen3_8b (or another), or a "
            "pretrained_checkpoint.restore_from_path that exists"
        )
        return answer
    shape = Shape.from_architecture(architecture)
    if any(found.key in LAYOUT_KEYS for found in problems) and not search_layouts:
        answer.notes.append("memory and time: not planned until the layout is right")
        return answer
    answer.parameters = total_parameters(shape)
    answer.plan = stages.plan(config, shape, length)
    answer.checked_memory = config.trainer.accelerator != "cpu"
    answer.notes += _notes(config, answer, length)
    answer.steps = _steps(config)
    answer.notes.append(preflight_files.describe(config, shape))
    if not answer.fits and not search_layouts:
        answer.fixes = search.fixes(config, shape, length=length)
    if search_layouts:
        answer.found = search.layouts(config, shape, length=length, fp8=fp8)
    return answer


LAYOUT_KEYS = {
    preflight.TP, preflight.PP, "trainer.devices", "model.global_batch_size", "model.ppo.num_rollout_samples",
    "model.ppo.length_params.max_length",
}  # fmt: skip


def _about_this_machine(problem: Problem, config: Any) -> bool:
    """A plan made on a laptop for a cluster says nothing of the laptop's disk: only a run that can start does."""
    is_disk = problem.key == preflight_files.RUN_DIR and "GB free" in problem.message
    return not is_disk or config.pretrained_checkpoint.restore_from_path != partial.NOT_GIVEN


def _architecture(config: Any) -> ArchitectureKeys:
    """Keys given, over those of the checkpoint where it is there to read."""
    shape = preflight_files.architecture_of(config.pretrained_checkpoint.restore_from_path)
    return shape | config.model.architecture()


def _notes(config: Any, answer: Answer, length: float | None) -> list[str]:
    assert answer.plan is not None
    notes = []
    if config.trainer.gpu is None:
        notes.append("trainer.gpu is not set: planned for H100 80 GB (cluster=h100_1x8 and others set it)")
    if not answer.checked_memory:
        notes.append("trainer.accelerator=cpu: memory is not held against a GPU's")
    if length is None:
        notes.append(
            f"times take every sequence at {config.model.encoder_seq_length} tokens; --length N for a mean"
        )
    if isinstance(config, SftConfig | PpoConfig) and config.model.peft.lora() is not None:
        notes.append("LoRA: times are those of training all weights, and activations are an upper bound")
    if isinstance(config, PpoConfig):
        if answer.plan.servers is None:
            text = "rollouts come from the actor itself, kernel by kernel: slow, and its time is a rough guess"
        else:
            text = "vLLM's time is that of a model fitted to published runs (--published), its sync a bandwidth"
            if config.model.ppo.vllm.servers:
                text += "; each server is taken to have a machine"
        notes.append(text)
        if config.reward.is_judged:
            notes.append("a judge's verdicts are not in the times; its checkpoint counts as large as the policy")
    return notes


def _steps(config: Any) -> int | None:
    """Steps of the run, where the configuration alone says."""
    if isinstance(config, PpoConfig):
        return config.trainer.ppo.critic_warmup_steps + config.trainer.ppo.max_steps
    loop = config.trainer.sft if isinstance(config, SftConfig) else config.trainer.rm
    return loop.max_steps if loop.max_steps > 0 else None


# ---------------------------------------------------------------- showing it


def as_text(answer: Answer) -> str:
    lines = []
    if answer.problems:
        lines.append(str(ConfigErrors(answer.problems, stage=answer.stage)))
    else:
        lines.append(f"preflight of {spoken(answer.stage)}: nothing wrong")
    if answer.to_give:
        lines.append("still to give: " + ", ".join(answer.to_give))
    if answer.plan is not None:
        lines += _plan_lines(answer, answer.plan)
    if answer.fixes:
        lines.append("it fits with (cheapest first):")
        lines += [f"  {option.overrides}\n      {_short(option)}" for option in answer.fixes]
    elif not answer.fits and answer.found is None:
        lines.append("no combination of up to three changes makes it fit: take a larger cluster")
    if answer.found is not None:
        lines.append("fastest layouts that fit:" if answer.found else "no layout of this cluster fits")
        for rank, option in enumerate(answer.found, start=1):
            lines.append(f"  {rank}. {option.overrides}\n      {_short(option)}\n      {option.why()}")
    lines += [f"note: {note}" for note in answer.notes]
    return "\n".join(lines)


def _short(option: search.Option) -> str:
    layout = option.plan.layout
    return (
        f"TP {layout.tensor} PP {layout.pipeline} DP {layout.data}: {option.plan.step_seconds:.1f} s a step, "
        f"{option.plan.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, peak {option.plan.peak.total / GB:.0f} GB"
    )


def _plan_lines(answer: Answer, plan: stages.StagePlan) -> list[str]:
    layout, gpu, served = plan.layout, plan.machine.gpu, plan.servers
    lines = [
        f"{_millions(answer.parameters)} parameters on {layout.gpus} x {gpu.name}: TP {layout.tensor}, "
        f"PP {layout.pipeline}, DP {layout.data}",
        *([_servers_line(served)] if served else []),
        "",
        f"{'GB on the fullest GPU':24}{'models':>9}{'pass':>9}{'other':>9}{'total':>9}{'seconds':>10}  bound by",
    ]
    for phase in plan.phases:
        numbers = "".join(
            f"{value / GB:9.1f}" for value in (phase.static, phase.passing, phase.overhead, phase.total)
        )
        lines.append(f"  {phase.name:22}{numbers}{phase.seconds:10.2f}  {phase.bottleneck}")
    lines += [
        "",
        "models on the first stage's first GPU (GB): "
        + "; ".join(
            f"{name} {held.weights / GB:.1f} weights"
            + (
                f" + {held.gradients / GB:.1f} gradients + {held.optimizer / GB:.1f} optimizer"
                if held.gradients
                else ""
            )
            for name, held in plan.parts.items()
        ),
        f"peak {plan.peak.total / GB:.1f} GB in {plan.peak.name}; {plan.usable / GB:.1f} GB usable: "
        + (
            f"{plan.headroom / GB:.1f} GB free"
            if plan.headroom >= 0
            else f"{-plan.headroom / GB:.1f} GB too much"
        ),
        f"{plan.step_seconds:.2f} s a step, {plan.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
        + (f"; {answer.steps} steps are {gpu_hours(answer):,.1f} GPU hours" if answer.steps else ""),
    ]
    return lines


def _servers_line(served: Servers) -> str:
    where = f"{served.gpus} more" if served.gpus else "the same GPUs"
    return (
        f"rollouts on {where}, {_count(served.count, 'vLLM server')} of TP {served.tensor}: on each GPU "
        f"{served.weights / GB:.1f} GB weights + {served.cache / GB:.1f} GB keys and values of "
        f"{_count(served.together, 'sequence')} at once"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _millions(count: int) -> str:
    """A number of parameters, as models are named."""
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def gpu_hours(answer: Answer) -> float:
    """GPU hours of the whole run, saving and loading left out."""
    assert answer.plan is not None
    assert answer.steps is not None
    return answer.steps * answer.plan.step_seconds * answer.plan.gpus / 3600


def as_json(answer: Answer) -> dict[str, Any]:
    """Bytes and seconds, by name."""
    body: dict[str, Any] = {
        "stage": answer.stage,
        "ok": answer.exit_code == 0,
        "problems": [asdict(problem) for problem in answer.problems],
        "to_give": answer.to_give,
        "notes": answer.notes,
    }
    if answer.plan is not None:
        body["parameters"] = answer.parameters
        body["fits"] = answer.fits
        body["plan"] = _plan_json(answer.plan)
        body["fixes"] = [
            {"changes": option.changes, "plan": _plan_json(option.plan)} for option in answer.fixes
        ]
        if answer.steps:
            body |= {"steps": answer.steps, "gpu_hours": gpu_hours(answer)}
    if answer.found is not None:
        body["layouts"] = [
            {"changes": option.changes, "why": option.why(), "plan": _plan_json(option.plan)}
            for option in answer.found
        ]
    return body


def _plan_json(plan: stages.StagePlan) -> dict[str, Any]:
    return {
        "gpu": plan.machine.gpu.name,
        "layout": asdict(plan.layout),
        "servers": asdict(plan.servers) if plan.servers else None,
        "gpus": plan.gpus,
        "models": {name: asdict(held) for name, held in plan.parts.items()},
        "phases": [asdict(phase) | {"total": phase.total} for phase in plan.phases],
        "peak": {"phase": plan.peak.name, "bytes": plan.peak.total},
        "usable_bytes": plan.usable,
        "headroom_bytes": plan.headroom,
        "step_seconds": plan.step_seconds,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
    }
