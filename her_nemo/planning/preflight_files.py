"""What `her-nemo plan` looks at besides `preflight.check`: inside the files, and at the disk. No torch.

First rows of the data, tokenizer against vocabulary, the checkpoint that would be resumed against the model, free disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from her_nemo.config.architecture import Shape as ArchitectureKeys
from her_nemo.config.architecture import architecture_from_megatron, megatron_manifest
from her_nemo.config.errors import Problem, UserError
from her_nemo.config.schema import PpoConfig, RewardConfig
from her_nemo.planning.memory import FP32, PARAMETER_BYTES
from her_nemo.planning.shapes import Shape, total_parameters
from her_nemo.planning.stages import TrainingConfig

ROWS = 3  # looked at, per file
RUN_DIR = "exp_manager.explicit_log_dir"
# Keys that may differ between a checkpoint and the model that goes on from it.
FREE = {"max_position_embeddings", "init_method_std"}


def check(config: TrainingConfig, architecture: ArchitectureKeys) -> list[Problem]:
    """Everything wrong with files that are there; files that are not are `preflight.check`'s."""
    data = config.model.data
    found = [
        *_rows("model.data.train_ds.file_path", data.train_ds.file_path, config),
        *_rows("model.data.validation_ds.file_path", data.validation_ds.file_path, config),
        *_vocabulary(config, architecture),
        *_resume(config, architecture),
    ]
    if all(key in architecture for key in ("num_layers", "hidden_size", "vocab_size")):
        found += _disk(config, Shape.from_architecture(architecture))
    return found


def _rows(key: str, path: str | None, config: TrainingConfig) -> Iterator[Problem]:
    """The first rows of a JSON-lines file have the fields this stage reads."""
    if path is None or not Path(path).is_file() or Path(path).suffix not in (".jsonl", ".json"):
        return
    wanted = ("messages", "chosen", "rejected") if isinstance(config, RewardConfig) else ("messages",)
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


def _vocabulary(config: TrainingConfig, architecture: ArchitectureKeys) -> Iterator[Problem]:
    """No token of the tokenizer lies beyond the model's embedding."""
    given = config.model.tokenizer.path
    file = Path(given or config.pretrained_checkpoint.restore_from_path) / "tokenizer.json"
    rows = architecture.get("vocab_size")
    if rows is None or not file.is_file():
        return
    key = "model.tokenizer.path" if given else "pretrained_checkpoint.restore_from_path"
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
    """One checkpoint: weights, fp32 main weights where weights are bf16, two moments; in PPO also of the critic."""
    size = PARAMETER_BYTES[config.trainer.precision]
    each = size + (0 if size == FP32 else FP32) + 2 * FP32
    if isinstance(config, PpoConfig):
        critic = total_parameters(shape, "scalar") if config.trainer.ppo.has_critic else 0
        return (total_parameters(shape) + critic) * each
    return total_parameters(shape, "scalar" if isinstance(config, RewardConfig) else "lm") * each


def _disk(config: TrainingConfig, shape: Shape) -> Iterator[Problem]:
    """Room for the checkpoints kept and the one being written (which comes before the oldest goes)."""
    keep = config.exp_manager.checkpoint_callback_params.save_top_k
    if keep == 0:
        return
    folder = Path(config.exp_manager.explicit_log_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    one, free = checkpoint_bytes(config, shape), shutil.disk_usage(folder).free
    needed = one * (max(keep, 0) + 1)
    if needed > free:
        count = max(keep, 0) + 1
        text = f"{count} checkpoints of {one / 1e9:,.0f} GB are {needed / 1e9:,.0f} GB, but {free / 1e9:,.0f} GB free"
        hint = "free space, write elsewhere, or lower exp_manager.checkpoint_callback_params.save_top_k"
        yield Problem(RUN_DIR, f"{folder}: {text}", hint=hint)


def describe(config: Any, shape: Shape) -> str:
    """One line for the plan."""
    return f"a checkpoint is {checkpoint_bytes(config, shape) / 1e9:,.1f} GB"
