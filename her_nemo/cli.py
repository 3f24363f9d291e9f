"""`her-nemo <stage> [overrides]`: load the configuration, check it, start the processes, run the stage.

Nothing but dispatch. torch is imported by the stage, after everything that can be checked without it was.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from her_nemo import __version__, launch
from her_nemo.config import arguments
from her_nemo.config.errors import ConfigErrors, Problem, UserError, spoken
from her_nemo.config.schema import STAGES, StageConfig

SUMMARIES = {
    "demo": "the whole line on the miniature world, with a report",
    "convert": "Hugging Face -> Megatron checkpoint",
    "sft": "supervised fine-tuning",
    "reward": "reward model: Bradley-Terry on preference pairs",
    "ppo": "PPO against the reward model",
    "export": "Megatron checkpoint -> Hugging Face, with the logits checked",
    "verify": "compare two checkpoints tensor by tensor: her-nemo verify A B",
    "evaluate": "replies from vLLM on held-out prompts, scored",
    "judge": "how well a judge of two replies judges, on held-out pairs",
    "evaluate_coser": "CoSER's scenes played and judged: her-nemo evaluate benchmark=coser",
    "evaluate_roleplay_bench": "long self-play judged for misalignment: her-nemo evaluate benchmark=roleplay_bench",
    "evaluate_reward_model": "a reward model on labelled pairs: her-nemo evaluate benchmark=reward_model",
    "evaluate_compare": "runs of one benchmark on one page: her-nemo evaluate compare RUN_A RUN_B",
    "data_ingest": "conversations of any known format -> Parquet, splits, data card",
    "data_inspect": "one row in colour: segments, masks, every reader's view",
    "data_synthesise": "thoughts, plans and settings written by a language model",
    "data_judge": "preference pairs -> a judge's prompts, both orders, balanced",
    "chat": "talk to a model in a scene (--web: in the browser), and keep it as data",
}
USAGE = """usage: her-nemo STAGE [--config-dir DIR] [--config-name NAME] [OVERRIDE ...]

stages:
{stages}

An OVERRIDE is Hydra's: trainer.devices=2, model=qwen3_8b, model.optim.lr=1e-5.
`her-nemo plan STAGE ...` says whether it will run, fit and how long it takes; `her-nemo config show|diff|explain ...`
what is configured and why. `her-nemo STAGE --help` lists the keys of a stage. `her-nemo --version` shows the version.
With trainer.devices=N it starts N processes itself; under torchrun or Slurm it takes theirs.
"""
INTERRUPTED = 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Answered from the configuration alone, before any stage (and torch) is imported.
COMMANDS = {"plan": "her_nemo.planning.command", "config": "her_nemo.config.command"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 2 the user can mend it (said on stderr), else what the stage returned."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    launch.die_with_launcher()
    try:
        return _dispatch(words)
    except ConfigErrors as error:
        return _refuse(error, on_every_rank=True)
    except UserError as error:
        return _refuse(error, on_every_rank=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if launch.another_rank_explained():
            return UserError.exit_code
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return _refuse(UserError(_no_room(error)), on_every_rank=False)
        raise


def _no_room(error: OSError) -> str:
    """What a user reads when the disk filled up while a stage wrote."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}; free some and give the same command again: it goes on from what it has finished"


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        stages = "\n".join(f"  {spoken(stage):15} {SUMMARIES[stage]}" for stage in STAGES)
        print(USAGE.format(stages=stages), end="")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"her-nemo {__version__}")
        return 0
    stage, rest = words[0], words[1:]
    if stage in COMMANDS:
        return importlib.import_module(COMMANDS[stage]).main(rest)
    if stage == "data":
        from her_nemo.stages import data

        stage, rest = data.parse(rest)
    if stage == "evaluate":
        from her_nemo.stages import benchmarks

        stage, rest = benchmarks.parse(rest)
    if stage == "evaluate_compare":
        rest = _listed(rest, "runs")
    if stage in STAGES and any(word in ("-h", "--help") for word in rest):
        print(_keys(stage))
        return 0
    if stage == "chat":
        rest = ["web=true" if word == "--web" else word for word in rest]
    if stage == "verify":
        rest = _named(rest, ("a", "b"))
    config = _checked(stage, rest)
    if getattr(getattr(config, "trainer", None), "accelerator", "auto") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, here and in the processes started
    processes = _processes(config)
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        return launch.run(words, processes)
    module = importlib.import_module(f"her_nemo.stages.{stage}")
    return module.run(config) or 0


def _checked(stage: str, words: list[str]) -> StageConfig:
    """The configuration, or every problem with it."""
    from her_nemo.config import compose
    from her_nemo.planning import preflight, preflight_files

    typed = arguments.parse(words)
    problems: list[Problem] = []
    try:
        notes: list[str] = []
        config = compose.load(stage, typed.overrides, **typed.options, notes=notes)
        if notes and int(os.environ.get("RANK", "0")) == 0 and not launch.is_launched():
            print("her-nemo: NeMo-Aligner keys:\n  " + "\n  ".join(notes), file=sys.stderr)
    except ConfigErrors as error:
        if error.rest is None:
            raise
        config, problems = error.rest, error.problems
    problems += preflight.check(config, os.environ)
    if not problems:
        problems += preflight_files.check_others(config)
    if problems:
        raise ConfigErrors(problems, stage=stage)
    return config


def _named(words: list[str], names: Sequence[str]) -> list[str]:
    """Words that are no overrides get the names of the stage's first keys: `A B` is a=A b=B."""
    from her_nemo.config.compose import assign

    waiting = list(names)
    return [word if "=" in word or not waiting else assign(waiting.pop(0), word) for word in words]


def _listed(words: list[str], name: str) -> list[str]:
    """Words that are no overrides and no options become one list: `A B` is name=[A,B]."""
    from her_nemo.config.compose import assign

    given = [assign("", word).removeprefix("=") for word in words if "=" not in word and not word.startswith("-")]
    rest = [word for word in words if "=" in word or word.startswith("-")]
    return [*rest, f"{name}=[{','.join(given)}]"] if given else rest


def _processes(config: StageConfig) -> int:
    """How many processes this machine needs; UserError when other machines take part and nobody started them."""
    trainer = getattr(config, "trainer", None)
    if trainer is None:
        return 1
    if trainer.num_nodes > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"trainer.num_nodes is {trainer.num_nodes}: start it on each node, e.g. torchrun --nnodes "
            f"{trainer.num_nodes} --nproc-per-node {trainer.devices} --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
            "-m her_nemo ..., or set trainer.num_nodes=1"
        )
    return trainer.devices


def _keys(stage: str) -> str:
    """One line per key of a stage: name, default, what it is for."""
    from her_nemo.config.compose import known_keys, subsection

    lines = [f"her-nemo {spoken(stage)}: {SUMMARIES[stage]}", ""]
    for key, info in known_keys(STAGES[stage]):
        if subsection(info.annotation) is None:
            default = "(required)" if info.is_required() else f"= {info.default!r}"
            lines.append(f"  {key} {default}\n      {info.description}")
    return "\n".join(lines)


def _refuse(error: UserError, *, on_every_rank: bool) -> int:
    """Show a user error: through the launcher if there is one, and once if every rank has the same."""
    rank = int(os.environ.get("RANK", "0"))
    if not launch.leave_message(str(error)) and (rank == 0 or not on_every_rank):
        print(f"her-nemo: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
    return error.exit_code
