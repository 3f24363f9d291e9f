"""What can be known to fail before `her-nemo data` reads or asks anything: paths, shares, names, limits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from her_nemo.config.data import IngestConfig, InspectConfig
from her_nemo.config.errors import Problem, nearest
from her_nemo.config.synthesis import SynthesiseConfig
from her_nemo.roleplay.turn import Defect

DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")
# The prompt files there are (data/synthesis/prompts), by the name that prompt_versions takes.
PROMPTS = (
    "role_thinking", "system_thinking_forward", "system_thinking_rewrite", "settings_gaps", "settings_lookup",
    "principles_case", "principles_distil", "judge_transcript",
)  # fmt: skip
_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")


def is_dataset_name(path: str) -> bool:
    """Whether `path`, at which nothing lies, may be a name for datasets.load_dataset: NAME or OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) is not None and not path.endswith(DATA_SUFFIXES)


def ingest(config: IngestConfig) -> Iterator[Problem]:
    """Problems of `data ingest`."""
    paths = [config.path] if isinstance(config.path, str) else config.path
    if not paths:
        yield Problem("path", "no path in the list", hint="give a file, a directory or a datasets name")
    for path in paths:
        yield from source("path", path)
    if config.test_set is not None:
        yield from source("test_set", config.test_set)
    named = any(not Path(path).exists() and is_dataset_name(path) for path in paths)
    for key in ("dataset_config", "dataset_split"):
        if getattr(config, key) is not None and paths and not named:
            yield Problem(key, "has an effect with a datasets name only", hint=f"leave {key} out")
    yield from _out(config.out, paths)
    shares = config.shares.model_dump()
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        parts = " + ".join(f"{share:g}" for share in shares.values())
        yield Problem("shares", f"{parts} = {total:g}, not 1", hint="make the five shares add up to 1")
    known = [defect.value for defect in Defect]
    for defect in config.allow_defects:
        if defect not in known:
            close = nearest(defect, known)
            hint = f"did you mean {close}?" if close else f"they are {', '.join(known)}"
            yield Problem("allow_defects", f"no defect named {defect!r}", hint=hint)


def inspect(config: InspectConfig) -> Iterator[Problem]:
    """Problems of `data inspect`."""
    if Path(config.path).is_dir():
        hint = "name a file in it, e.g. samples.parquet"
        yield Problem("path", f"{config.path}: is a directory", hint=hint)
    else:
        yield from _file("path", config.path)


def synthesise(config: SynthesiseConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Problems of `data synthesise`. The endpoint is not asked: it need not be up yet."""
    yield from _conversations(config)
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        yield Problem("out", f"{out}: is a file, but a directory is to be written here", hint="give another path")
    url = urlsplit(config.endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        hint = "give a base URL such as http://localhost:8000/v1"
        yield Problem("endpoint", f"{config.endpoint}: not the address of an endpoint", hint=hint)
    if config.api_key_env is not None and not environment.get(config.api_key_env):
        hint = f"export {config.api_key_env}=..., or api_key_env=null for an endpoint without keys"
        yield Problem("api_key_env", f"{config.api_key_env}: this environment variable is not set", hint=hint)
    prices = config.prices
    if config.limits.budget is not None and None in (prices.prompt_per_million, prices.completion_per_million):
        hint = "give prices.prompt_per_million and prices.completion_per_million"
        yield Problem("limits.budget", "without prices nothing can be held against it", hint=hint)
    yield from _prompts(config)
    if config.judge.library is not None and not Path(config.judge.library).is_file():
        yield Problem("judge.library", f"{config.judge.library}: no such file", hint="give one, or null")
    ranges = {
        "role_thinking.min_characters": (config.role_thinking.min_characters, config.role_thinking.max_characters),
        "system_thinking.min_characters": (
            config.system_thinking.min_characters, config.system_thinking.max_characters
        ),
        "system_thinking.min_kept_characters": (
            config.system_thinking.min_kept_characters, config.system_thinking.max_kept_characters
        ),
    }  # fmt: skip
    for key, (least, most) in ranges.items():
        if least > most:
            text = f"{least} is more than {key.replace('min_', 'max_')} = {most}: no answer would do"
            yield Problem(key, text, hint=f"use {most} or less")
    if config.stage == "principles" and config.principles.embedding_model is None and find_spec("sklearn") is None:
        hint = "pip install 'her-nemo[synthesis]', or name an embedding model of the endpoint"
        yield Problem("principles.embedding_model", "null takes scikit-learn, which is not installed", hint=hint)


def _conversations(config: SynthesiseConfig) -> Iterator[Problem]:
    """The source: a file, or (but for principles and judge) a directory that ingest wrote."""
    place = Path(config.source)
    if not place.is_dir():
        yield from _file("source", config.source)
    elif config.stage in ("principles", "judge"):
        yield Problem("source", f"{place}: is a directory", hint="name a file of preference pairs")
    elif not (place / "conversations.parquet").is_file():
        hint = "her-nemo data ingest writes it; or name a file of conversations"
        yield Problem("source", f"{place}: no conversations.parquet here", hint=hint)


def _prompts(config: SynthesiseConfig) -> Iterator[Problem]:
    if config.prompts_dir is not None and not Path(config.prompts_dir).is_dir():
        yield Problem("prompts_dir", f"{config.prompts_dir}: no such directory", hint="give one, or null")
    for name in config.prompt_versions:
        if name not in PROMPTS:
            close = nearest(name, PROMPTS)
            hint = f"did you mean {close}?" if close else f"they are {', '.join(PROMPTS)}"
            yield Problem("prompt_versions", f"no prompt named {name!r}", hint=hint)


def source(key: str, path: str) -> Iterator[Problem]:
    """Something to read: a data file, a directory of them, or a datasets name."""
    place = Path(path)
    if place.is_dir():
        saved = any((place / name).is_file() for name in _SAVED_DATASET)
        if not saved and not any(file.suffix in DATA_SUFFIXES for file in place.iterdir()):
            yield Problem(key, f"{path}: no data files here", hint=f"they end in {', '.join(DATA_SUFFIXES)}")
    elif place.exists() or not is_dataset_name(path):
        yield from _file(key, path)


def _file(key: str, path: str) -> Iterator[Problem]:
    file = Path(path)
    if not file.is_file():
        yield Problem(key, f"{path}: no such file", hint="give a file that exists")
    elif file.suffix not in DATA_SUFFIXES:
        yield Problem(key, f"{path}: not a data file", hint=f"they end in {', '.join(DATA_SUFFIXES)}")
    elif file.stat().st_size == 0:
        yield Problem(key, f"{path}: the file is empty")


def _out(out: str, paths: list[str]) -> Iterator[Problem]:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        text = f"{out}: is a file, but a directory is to be written here"
        yield Problem("out", text, hint="give another path")
        return
    here = folder.resolve()
    for path in paths:
        place = Path(path).resolve()
        if place.exists() and (place == here or here in place.parents):
            text = f"{path} lies in {out}, which is replaced by what is read from it"
            yield Problem("out", text, hint="give another directory")
