"""A checkpoint is whole or it is none, and `latest` never points at half of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from her_nemo.config.errors import UserError
from her_nemo.training import checkpoint


def save(
    run: Path, step: int, body: bytes = b"weights", keep: int = -1, **monitoring: object
) -> Path:
    """One finished, published checkpoint whose only tensor file holds `body`."""
    directory = checkpoint.step_directory(run, step)
    counters = {"monitored": monitoring["measured"]} if monitoring.get("measured") else {}
    write(directory, step, lambda where: (where / "model.bin").write_bytes(body), **counters)
    checkpoint.publish(run, step, keep, monitoring.get("monitor"))
    return directory


def write(directory: Path, step: int, save_tensors: Callable[[Path], object], **counters: object) -> None:
    checkpoint.write(
        directory,
        step,
        save_tensors,  # type: ignore[arg-type]
        models={"model": {"head": "lm"}},
        counters={"order": {"epoch": 2}, **counters},
        config={"name": "test"},
        tokenizer=None,
    )


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    directory = save(tmp_path, 7, b"abc")
    for place in (directory, tmp_path):
        found = checkpoint.read(place)
        assert (found.directory, found.step, found.config) == (directory, 7, {"name": "test"})
        assert found.models == {"model": {"head": "lm"}}
        assert found.counters == {"order": {"epoch": 2}}
        assert found.files == {"model.bin": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}


def test_a_write_that_breaks_off_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old = save(tmp_path, 1)

    def broken(where: Path) -> None:
        (where / "model.bin").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(checkpoint.step_directory(tmp_path, 2), 2, broken)
    assert checkpoint.newest(tmp_path) == old
    assert not checkpoint.is_checkpoint(checkpoint.step_directory(tmp_path, 2))
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint.read(checkpoint.step_directory(tmp_path, 2))
    # The next attempt clears what the broken one left.
    again = save(tmp_path, 2)
    assert checkpoint.read(tmp_path).directory == again


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_damaged_file_is_named(tmp_path: Path, harm: str) -> None:
    file = save(tmp_path, 3, b"0123456789") / "model.bin"
    file.unlink() if harm == "missing" else file.write_bytes(b"01234")
    with pytest.raises(UserError, match=r"damaged checkpoint.*model\.bin"):
        checkpoint.read(tmp_path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step, keep=2)
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir() if entry.is_dir())
    assert names == ["step_00000010", "step_00000100"]
    assert checkpoint.read(tmp_path).step == 100


@pytest.mark.parametrize(
    ("largest", "keep", "kept", "best"),
    [
        (False, 1, [2, 5], 2),  # the best, and the newest to go on from
        (False, 2, [2, 4, 5], 2),
        (True, 1, [1, 5], 1),
        (True, 2, [1, 3, 5], 3),  # of equals the newer
        (False, -1, [1, 2, 3, 4, 5], 2),
    ],
)
def test_the_best_are_kept_and_the_newest(
    tmp_path: Path, largest: bool, keep: int, kept: list[int], best: int
) -> None:
    losses = {1: 0.9 if keep != 2 else 0.8, 2: 0.1, 3: 0.8, 4: 0.2, 5: None}  # step 5 was saved without a validation
    monitor = checkpoint.Monitor("val/loss", largest)
    for step, loss in losses.items():
        save(tmp_path, step, keep=keep, monitor=monitor, measured=None if loss is None else {"val/loss": loss})
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir() if entry.is_dir())
    assert names == [f"step_{step:08d}" for step in kept]
    assert (tmp_path / "checkpoints" / "best").read_text() == f"step_{best:08d}\n"
    assert checkpoint.read(tmp_path).step == 5


def test_without_a_measure_the_newest_are_kept_and_none_is_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1, monitor=checkpoint.Monitor("val/loss", False), measured={"val/other": 1.0})
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir() if entry.is_dir()] == ["step_00000003"]
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_latest_that_points_nowhere_is_no_checkpoint(tmp_path: Path) -> None:
    directory = save(tmp_path, 4)
    (directory / checkpoint.MANIFEST).unlink()
    assert checkpoint.newest(tmp_path) is None
    assert not checkpoint.is_checkpoint(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, 4) / checkpoint.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read(tmp_path)
