"""What can be known to fail of LoRA before anything starts: adapters that do not fit, bases that are gone. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from her_nemo.config import lora as adapters
from her_nemo.config.architecture import megatron_manifest
from her_nemo.config.errors import Problem
from her_nemo.config.lora import Lora
from her_nemo.config.schema import PpoConfig, SftConfig

RESTORE, DROPOUT = "model.peft.restore_from_path", "model.peft.lora_tuning.adapter_dropout"


def check(config: SftConfig | PpoConfig) -> Iterator[Problem]:
    """Everything wrong with `model.peft`. Ranks and names of targets are the schema's to check."""
    wanted, path = config.model.peft.lora(), config.model.peft.restore_from_path
    if wanted is None:
        if path is not None:
            hint = "set model.peft.peft_scheme=lora, or leave it out"
            yield Problem(RESTORE, "has an effect with model.peft.peft_scheme=lora only", hint=hint)
        return
    if isinstance(config, PpoConfig) and wanted.dropout > 0:
        text = f"{wanted.dropout}: the policy that learns would not be the one that generated"
        yield Problem(DROPOUT, text, hint=f"use {DROPOUT}=0.0 for PPO")
    if path is None:
        return
    entry = _entry(path)
    if entry is None:
        text = f"{path}: no finished checkpoint here (no manifest.json)"
        yield Problem(RESTORE, text, hint="give the run directory or a checkpoint of a LoRA run")
        return
    differing = adapters.problem_of(Lora.from_json(entry.get("lora")), wanted)
    if differing:
        hint = "set model.peft.lora_tuning to the checkpoint's, or leave model.peft.restore_from_path out"
        yield Problem(RESTORE, f"{path}: {differing}", hint=hint)


def base_is_there(key: str, path: str | Path) -> Iterator[Problem]:
    """A LoRA checkpoint is read together with the model that its adapters belong to."""
    entry = _entry(path) or {}
    base = entry.get("base")
    if entry.get("lora") is not None and base is not None and not Path(base["path"]).is_dir():
        text = f"{path}: its LoRA adapters belong to the model at {base['path']}, which is not there"
        hint = "put it back, or merge the two first: her-nemo export checkpoint=... base=DIR"
        yield Problem(key, text, hint=hint)


def _entry(path: str | Path) -> dict[str, Any] | None:
    """What the manifest of a checkpoint says of its model "model"; None where there is no readable one."""
    file = megatron_manifest(path)
    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["models"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
