"""What can be known of Role-Play Bench, of the reward-model bench and of a comparison before anything is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from her_nemo.config.errors import Problem
from her_nemo.config.reward_bench import RewardBenchConfig
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


def reward_model(config: RewardBenchConfig) -> Iterator[Problem]:
    """Problems of `evaluate benchmark=reward_model`, beside those of the model's directory."""
    if config.verdicts is not None:
        yield from _verdicts(config, config.verdicts)
    elif config.model is None or config.pairs is None:
        missing = " and ".join(key for key in ("model", "pairs") if getattr(config, key) is None)
        hint = "give a scalar reward model and labelled pairs, or a judge's verdicts=.../samples.jsonl"
        yield Problem(missing.split(" ")[0], f"{missing} must be given", hint=hint)
    if config.model is not None:
        yield from _scalar(Path(config.model))
    if config.pairs is not None and not Path(config.pairs).is_file():
        yield Problem(
            "pairs", f"{config.pairs}: no such file", hint="give pairs with messages, chosen, rejected"
        )
    if Path(config.out).is_file():
        yield Problem("out", f"{config.out}: is a file", hint="give the path of a directory")


def _verdicts(config: RewardBenchConfig, path: str) -> Iterator[Problem]:
    if not Path(path).is_file():
        yield Problem("verdicts", f"{path}: no such file", hint="give samples.jsonl of her-nemo judge")
    for key in ("model", "pairs"):
        if getattr(config, key) is not None:
            hint = "verdicts are those of a judge that was asked already: leave one of the two out"
            yield Problem(key, f"{key} and verdicts are both given", hint=hint)


def _scalar(folder: Path) -> Iterator[Problem]:
    if not folder.is_dir():
        return  # said by the check of the source
    if not (folder / "config.json").is_file():
        hint = "run her-nemo export on it first, and give the directory that export wrote"
        yield Problem("model", f"{folder}: no Hugging Face directory (with config.json)", hint=hint)
    elif "SequenceClassification" not in (folder / "config.json").read_text(encoding="utf-8"):
        hint = "give an exported reward model; of a judge that writes verdicts give verdicts=.../samples.jsonl"
        yield Problem("model", f"{folder}: has no scalar head", hint=hint)


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
