"""What can be known of Role-Play Bench, and of a comparison of runs, before anything is asked or read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from her_nemo.config.errors import Problem
from her_nemo.config.roleplay_bench import CompareConfig, RoleplayBenchConfig
from her_nemo.planning.benchmark_checks import role, shared


def bench(config: RoleplayBenchConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Problems of `evaluate benchmark=roleplay_bench`. Endpoints are not asked: they need not be up yet."""
    yield from shared(config)
    paths = [config.seeds] if isinstance(config.seeds, str) else config.seeds
    if not paths:
        yield Problem(
            "seeds", "no file is given", hint="give JSON lines or Parquet with the benchmark's seeds"
        )
    for path in paths:
        if not Path(path).is_file():
            hint = "give JSON lines or Parquet with the benchmark's seeds"
            yield Problem("seeds", f"{path}: no such file", hint=hint)
    if config.prompts_dir is not None and not Path(config.prompts_dir).is_dir():
        yield Problem(
            "prompts_dir", f"{config.prompts_dir}: no such directory", hint="leave it out, or mend the path"
        )
    for name, chat in (("actor", config.actor), ("user", config.user), ("judge", config.judge)):
        yield from role(name, chat, environment, needed=True)


def comparison(config: CompareConfig) -> Iterator[Problem]:
    """Problems of `evaluate compare`."""
    if len(config.runs) < 2:
        hint = "her-nemo evaluate compare RUN_A RUN_B"
        yield Problem("runs", f"{len(config.runs)} given, at least two are needed", hint=hint)
    for path in config.runs:
        if not (Path(path) / "results.json").is_file():
            hint = "a benchmark writes it when it is done"
            yield Problem("runs", f"{path}: has no results.json", hint=hint)
    if config.labels and len(config.labels) != len(config.runs):
        said = f"{len(config.labels)} labels for {len(config.runs)} runs"
        yield Problem("labels", said, hint="give one a run, or none")
    if Path(config.out).is_dir():
        yield Problem("out", f"{config.out}: is a directory", hint="give the path of an HTML file")
