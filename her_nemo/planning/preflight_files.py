"""What `her-nemo plan` looks at besides `preflight.check`: inside the files, and at the disk. No torch.

First rows of the data, tokenizer against vocabulary, the checkpoint that would be resumed against the model, free disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from her_nemo.config.architecture import Shape as ArchitectureKeys
from her_nemo.config.architecture import architecture_from_hf, architecture_from_megatron, megatron_manifest
from her_nemo.config.errors import Problem, UserError
from her_nemo.config.judge import JudgeConfig, JudgePromptsConfig
from her_nemo.config.schema import (
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    PpoConfig,
    RewardConfig,
    StageConfig,
)
from her_nemo.config.synthesis import SynthesiseConfig
from her_nemo.planning.memory import FP32, PARAMETER_BYTES
from her_nemo.planning.shapes import Shape, total_adapter_parameters, total_parameters
from her_nemo.planning.stages import TrainingConfig

ROWS = 3  # looked at, per file
RUN_DIR = "exp_manager.explicit_log_dir"
PAIR = ("messages", "chosen", "rejected")
LABELLED = ("trace_id", "messages", "better")
CONVERSATION = ("conversation_id", "characters", "turns")
_FORMATS = PARAMETER_BYTES | {"float32": 4, "bfloat16": 2, "float16": 2}
_COUNTED = ("num_layers", "hidden_size", "vocab_size")  # of a shape that is known
# Keys that may differ between a checkpoint and the model that goes on from it.
FREE = {"max_position_embeddings", "init_method_std"}


def check(config: TrainingConfig, architecture: ArchitectureKeys) -> list[Problem]:
    """Everything wrong with files that are there; files that are not are `preflight.check`'s."""
    data = config.model.data
    wanted = PAIR if isinstance(config, RewardConfig) else ("messages",)
    if isinstance(config, PpoConfig) and config.reward.kind == "verdict":
        wanted = LABELLED
    given = config.model.tokenizer.path
    tokenizer = "model.tokenizer.path" if given else "pretrained_checkpoint.restore_from_path"
    found = [
        *_rows("model.data.train_ds.file_path", data.train_ds.file_path, wanted),
        *_rows("model.data.validation_ds.file_path", data.validation_ds.file_path, wanted),
        *(_compared_with(config) if isinstance(config, PpoConfig) else ()),
        *_vocabulary(tokenizer, given or config.pretrained_checkpoint.restore_from_path, architecture),
        *_resume(config, architecture),
    ]
    if all(key in architecture for key in _COUNTED):
        found += _disk(config, Shape.from_architecture(architecture))
    return found


def check_others(config: StageConfig) -> list[Problem]:
    """The same for the stages that train nothing: convert, export, evaluate, judge, data judge and data synthesise."""
    found: list[Problem] = []
    if isinstance(config, ConvertConfig | ExportConfig):
        reads = config.source if isinstance(config, ConvertConfig) else config.checkpoint
        tokenizer = config.model.tokenizer.path if isinstance(config, ConvertConfig) else config.tokenizer
        shape = architecture_of(reads)
        if tokenizer is not None:
            key = "model.tokenizer.path" if isinstance(config, ConvertConfig) else "tokenizer"
            found += _vocabulary(key, tokenizer, shape)
        if all(key in shape for key in _COUNTED):
            size = _FORMATS[config.trainer.precision if isinstance(config, ConvertConfig) else config.dtype]
            written = total_parameters(Shape.from_architecture(shape)) * size
            # What an interrupted run has finished is not written again.
            there = sum(file.stat().st_size for file in Path(f"{config.out}.partial").glob("**/*") if file.is_file())
            text = f"the weights are {written / 1e9:,.1f} GB"
            found += _room("out", config.out, written - there, text, "free space, or write elsewhere")
    if isinstance(config, EvaluateConfig):
        found += _rows("prompts", config.prompts, ("messages",) if config.scenes is None else ("messages", "trace_id"))
        found += _vocabulary("model", config.model, architecture_of(config.model))
    if isinstance(config, JudgeConfig):
        found += _rows("prompts", config.prompts, LABELLED)
        found += _vocabulary("model", config.model, architecture_of(config.model))
    if isinstance(config, JudgePromptsConfig):
        found += _rows("source", config.source, PAIR)
    if isinstance(config, SynthesiseConfig):
        place = Path(config.source)
        conversations = str(place / "conversations.parquet") if place.is_dir() else config.source
        found += _rows("source", conversations, PAIR if config.stage in ("principles", "judge") else CONVERSATION)
    return found


def architecture_of(path: str) -> ArchitectureKeys:
    """The shape of what lies at a path; empty where there is nothing to read (preflight.check says so)."""
    folder = Path(path)
    try:
        if (folder / "config.json").is_file():
            return architecture_from_hf(folder)
        if megatron_manifest(folder) is not None:
            return architecture_from_megatron(folder)
    except UserError:
        return {}
    return {}


def _compared_with(config: PpoConfig) -> Iterator[Problem]:
    """The replies that a judge compares with are rows of SFT."""
    if config.reward.is_judged:
        yield from _rows("reward.generative.replies", config.reward.generative.replies, ("messages",))


def _rows(key: str, path: str | None, wanted: Sequence[str]) -> Iterator[Problem]:
    """The first rows of a JSON-lines file, or the columns of a Parquet file, are what the stage reads."""
    if path is None or not Path(path).is_file():
        return
    if Path(path).suffix == ".parquet":
        yield from _columns(key, path, wanted)
        return
    if Path(path).suffix not in (".jsonl", ".json"):
        return
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in islice(((n, text) for n, text in enumerate(file, start=1) if text.strip()), ROWS):
            try:
                row = json.loads(line)
            except ValueError as error:
                yield Problem(
                    key,
                    f"{path}:{number}: not JSON: {error}",
                    hint="one JSON object a line, see docs/data.md",
                )
                return
            missing = [name for name in wanted if not isinstance(row, dict) or name not in row]
            if missing:
                hint = "docs/data.md has the schema each stage reads"
                yield Problem(key, f"{path}:{number}: has no {', '.join(missing)}", hint=hint)
                return


def _columns(key: str, path: str, wanted: Sequence[str]) -> Iterator[Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        hint = "write it again: a Parquet file that was cut short cannot be read"
        yield Problem(key, f"{path}: not a Parquet file: {error}", hint=hint)
        return
    missing = [name for name in wanted if name not in columns]
    if missing:
        hint = "docs/data.md has the schema each stage reads"
        yield Problem(key, f"{path}: has no {', '.join(missing)}", hint=hint)


def _vocabulary(key: str, folder: str, architecture: ArchitectureKeys) -> Iterator[Problem]:
    """No token of the tokenizer in `folder` lies beyond the model's embedding."""
    file = Path(folder) / "tokenizer.json"
    rows = architecture.get("vocab_size")
    if rows is None or not file.is_file():
        return
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        ids = [int(token["id"]) for token in body.get("added_tokens", [])]
        vocabulary = body["model"]["vocab"]
        ids += vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Problem(key, f"{file}: cannot be read as a tokenizer: {error!r}")
        return
    if max(ids) >= rows:
        text = f"{file}: has token {max(ids)}, but the model's embedding has {rows} rows"
        yield Problem(key, text, hint="give the tokenizer that belongs to the model")


def _resume(config: TrainingConfig, architecture: ArchitectureKeys) -> Iterator[Problem]:
    """What lies in the run directory is this model's, and may be gone on from."""
    manager = config.exp_manager
    run = Path(manager.explicit_log_dir)
    if megatron_manifest(run) is None:
        if manager.resume_if_exists and not manager.resume_ignore_no_checkpoint:
            hint = "set exp_manager.resume_ignore_no_checkpoint=true to start afresh"
            yield Problem(RUN_DIR, f"{run}: no checkpoint to resume", hint=hint)
        return
    if not manager.resume_if_exists:
        hint = "set exp_manager.resume_if_exists=true to go on from it, or name another directory"
        yield Problem(RUN_DIR, f"{run}: holds checkpoints of an earlier run", hint=hint)
        return
    try:
        held = architecture_from_megatron(run)
    except UserError as error:
        yield Problem(RUN_DIR, str(error))
        return
    differing = [
        f"{name} {held[name]} (wanted {architecture[name]})"
        for name in sorted(held.keys() & architecture.keys() - FREE)
        if held[name] != architecture[name]
    ]
    if differing:
        text = f"{run}: its checkpoint is another model's: {', '.join(differing)}"
        yield Problem(RUN_DIR, text, hint="name another exp_manager.explicit_log_dir")


def checkpoint_bytes(config: TrainingConfig, shape: Shape) -> int:
    """One checkpoint: weights, fp32 main weights where weights are bf16, two moments; in PPO also of the critic. With
    LoRA of the adapters alone."""
    size = PARAMETER_BYTES[config.trainer.precision]
    each = size + (0 if size == FP32 else FP32) + 2 * FP32
    if isinstance(config, RewardConfig):
        return total_parameters(shape, "scalar") * each
    lora = config.model.peft.lora()
    trained = total_parameters(shape) if lora is None else total_adapter_parameters(shape, lora)
    if isinstance(config, PpoConfig):
        trained += total_parameters(shape, "scalar") if config.trainer.ppo.has_critic else 0
    return trained * each


def _disk(config: TrainingConfig, shape: Shape) -> Iterator[Problem]:
    """Room for the checkpoints kept and the one being written (which comes before another goes)."""
    keep = config.exp_manager.checkpoint_callback_params.save_top_k
    if keep == 0:
        return
    # The best ones, and the newest beside them.
    count = max(keep, 0) + (2 if config.exp_manager.checkpoint_callback_params.monitor else 1)
    one = checkpoint_bytes(config, shape)
    needed = one * count
    text = f"{count} checkpoints of {one / 1e9:,.0f} GB are {needed / 1e9:,.0f} GB"
    hint = "free space, write elsewhere, or lower exp_manager.checkpoint_callback_params.save_top_k"
    yield from _room(RUN_DIR, config.exp_manager.explicit_log_dir, needed, text, hint)


def _room(key: str, path: str, needed: int, text: str, hint: str) -> Iterator[Problem]:
    """`needed` bytes are free where `path` is or will be."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        yield Problem(key, f"{folder}: {text}, but {free / 1e9:,.0f} GB free", hint=hint)


def describe(config: Any, shape: Shape) -> str:
    """One line for the plan."""
    return f"a checkpoint is {checkpoint_bytes(config, shape) / 1e9:,.1f} GB"
