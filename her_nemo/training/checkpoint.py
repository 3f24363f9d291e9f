"""Checkpoints of a run: written whole or not at all, found again, and pruned.

<run>/checkpoints/step_00000100/            tensors (torch_dist), counters, tokenizer
<run>/checkpoints/step_00000100/manifest.json   written last: no manifest, no checkpoint
<run>/checkpoints/latest                    one line, replaced atomically
<run>/checkpoints/best                      likewise, where a metric is monitored
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.megatron import parallel

MANIFEST = "manifest.json"
LATEST, BEST = "latest", "best"
FORMAT = 1
TOKENIZER_DIR = "tokenizer"
# Of a manifest's counters: the monitored metric as it was measured at that step.
MONITORED = "monitored"
_NOT_A_TOKENIZER = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf"),
    *(".git", ".cache", "proof.json"),
)
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Manifest:
    """What a finished checkpoint says of itself."""

    directory: Path
    step: int
    models: dict[
        str, dict[str, Any]
    ]  # name ("model", "critic") -> {"shape": ..., "head": ..., "fingerprint": ...}
    counters: dict[str, Any]  # sampler, consumed samples, scheduler...: whatever the stage resumes from
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]  # relative path -> {"bytes": int, "sha256": str}

    @property
    def tokenizer(self) -> Path:
        return self.directory / TOKENIZER_DIR


def write(
    directory: Path,
    step: int,
    save_tensors: Callable[[Path], None],
    *,
    models: Mapping[str, dict[str, Any]],
    counters: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Path | None,
) -> None:
    """Write one checkpoint into `directory` (collective).

    `save_tensors(dir)` is called on every rank. The manifest, with the hash of every file, comes last
    and by rename: whatever interrupts the write leaves a directory that nothing takes for a checkpoint.
    """
    if parallel.is_main():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, directory)
    parallel.barrier()
    save_tensors(directory)
    parallel.barrier()
    if parallel.is_main():
        seal(directory, step, models=models, counters=counters, config=config)
    parallel.barrier()


def seal(
    directory: Path,
    step: int,
    *,
    models: Mapping[str, dict[str, Any]],
    counters: Mapping[str, Any],
    config: Mapping[str, Any],
    known: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write the manifest that makes a directory a checkpoint. Files in `known` are not hashed again."""
    body = {
        "format": FORMAT,
        "step": step,
        "models": dict(models),
        "counters": dict(counters),
        "config": dict(config),
        "files": _hashes(directory, known or {}),
    }
    _replace(directory / MANIFEST, json.dumps(body, indent=1, sort_keys=True))


def replace_finished(partial: Path, out: Path) -> None:
    """Give a finished directory its name, in the place of an older one."""
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def check_target(out: Path, marker: str) -> None:
    """UserError if `out` holds something that is not an older one of its kind: it would be deleted."""
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise UserError(f"{out}: holds other files (and no {marker}), and would be replaced. Give another directory.")


def read(path: Path) -> Manifest:
    """The manifest of a checkpoint directory, or of the newest checkpoint of a run directory.

    Raises:
        UserError: no finished checkpoint there, or files are missing or of another size than written.
    """
    directory = newest(path) or path
    file = directory / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{path}: no finished checkpoint here (no {MANIFEST}). Give a checkpoint directory, a run directory "
            f"with checkpoints/{LATEST}, or a Hugging Face directory with config.json."
        )
    body = json.loads(file.read_text())
    if body.get("format") != FORMAT:
        raise UserError(
            f"{file}: checkpoint format {body.get('format')}, this her_nemo reads format {FORMAT}."
        )
    broken = [
        name
        for name, facts in body["files"].items()
        if not (directory / name).is_file() or (directory / name).stat().st_size != facts["bytes"]
    ]
    if broken:
        raise UserError(
            f"{directory}: damaged checkpoint; missing or cut short: {', '.join(sorted(broken)[:8])}."
        )
    return Manifest(directory, body["step"], body["models"], body["counters"], body["config"], body["files"])


def is_checkpoint(path: Path) -> bool:
    """True for a finished checkpoint directory and for a run directory that has one."""
    return (path / MANIFEST).is_file() or newest(path) is not None


def newest(run_dir: Path) -> Path | None:
    """The checkpoint directory that `<run>/checkpoints/latest` names; None where there is none."""
    pointer = run_dir / "checkpoints" / LATEST
    if not pointer.is_file():
        return None
    directory = pointer.parent / pointer.read_text().strip()
    return directory if (directory / MANIFEST).is_file() else None


def step_directory(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


@dataclass(frozen=True)
class Monitor:
    """The metric by which checkpoints are better than others, and which way."""

    name: str
    largest: bool

    def rank(self, directory: Path) -> tuple[float, int]:
        """Of a finished checkpoint, for sorting: the best last, of equals the newer; those without the metric first."""
        body = json.loads((directory / MANIFEST).read_text())
        value = body["counters"].get(MONITORED, {}).get(self.name)
        if value is None or not math.isfinite(value):
            return -math.inf, body["step"]
        return (value if self.largest else -value), body["step"]

    def measured(self, directory: Path) -> bool:
        """Whether the metric was measured at that checkpoint's step."""
        return self.rank(directory)[0] > -math.inf


def publish(run_dir: Path, step: int, keep: int, monitor: Monitor | None = None) -> None:
    """Point `latest` at `step` and remove all but `keep` finished checkpoints (-1 keeps all).

    The newest are kept; with `monitor` the best, which `best` then names, and besides them the newest: the run goes
    on from it.
    """
    if not parallel.is_main():
        return
    directory = step_directory(run_dir, step)
    _replace(directory.parent / LATEST, directory.name + "\n")
    doomed = _finished(run_dir)
    if monitor is not None:
        doomed.sort(key=monitor.rank)
        if monitor.measured(doomed[-1]):
            _replace(directory.parent / BEST, doomed[-1].name + "\n")
    for old in doomed[:-keep] if keep > 0 else []:
        if old == directory:
            continue
        # The manifest goes first, so that a half-removed checkpoint is no checkpoint.
        (old / MANIFEST).unlink()
        shutil.rmtree(old)


def _finished(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(
        (
            entry
            for entry in (run_dir / "checkpoints").iterdir()
            if _STEP.fullmatch(entry.name) and (entry / MANIFEST).is_file()
        ),
        key=lambda entry: int(entry.name.removeprefix("step_")),
    )


def copy_tokenizer(tokenizer: Path, directory: Path) -> None:
    """A copy of the tokenizer inside a checkpoint; of a model directory, everything but its weights."""
    ignored = shutil.ignore_patterns(*_NOT_A_TOKENIZER)
    shutil.copytree(tokenizer, directory / TOKENIZER_DIR, ignore=ignored, dirs_exist_ok=True)


def _hashes(directory: Path, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(entry for entry in directory.rglob("*") if entry.is_file()):
        name = str(path.relative_to(directory))
        if name in known:
            files[name] = dict(known[name])
            continue
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def _replace(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
